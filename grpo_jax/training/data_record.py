"""The data that a run began with: kept in its folder, so that one that goes on with other data says so."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.config import Config
from grpo_jax.config.embedded import EMBEDDED
from grpo_jax.errors import UserError
from grpo_jax.files import write_atomically
from grpo_jax.parallel import hosts
from grpo_jax.tasks import Task, data_metrics, fingerprint, summary
from grpo_jax.tasks.chat import template_writes_date, today

NAME = "data.json"


def note_data(workdir: pathlib.Path, task: Task) -> None:
    """Say what is trained on, and record it; in a folder that holds such a record, say if it is not the same.

    Args:
      workdir: of the run, there already. task: of the run.
    """
    said = summary(task)
    if said:
        print(f"data: {said}", file=sys.stderr)
    mark, counts = fingerprint(task), data_metrics(task)
    if not mark:  # made by a rule that the config describes
        return
    path = workdir / NAME
    begun = _read(path)
    if not begun:
        write_atomically(path, json.dumps({"fingerprint": mark, **counts}, indent=2) + "\n")
    elif begun.get("fingerprint") != mark:
        changed = [
            f"{name} {begun.get(name, 0):.0f} -> {value:.0f}" for name, value in counts.items() if begun.get(name) != value
        ]
        print(
            f"note: --workdir={workdir}: these are not the questions that the run began with ({path.name}); "
            f"it goes on with them, in another order; {', '.join(changed) or 'their numbers are the same'}",
            file=sys.stderr,
        )


def pin_template_date(config: Config, workdirs: Sequence[pathlib.Path]) -> Config:
    """Fix the day that the model's chat template writes, if it writes one and the config does not say which.

    Args:
      config: of a run. workdirs: its folder, and those of runs that should have the same prompts.
    Returns: the config with the day of the first of these runs that began, or else today.
    """
    # In the config, so that all who read a run's config.json (evaluation, export, a resume) have the same prompts.
    task = config.task
    if task.template_date or task.name in EMBEDDED or not (config.model.path and task.use_chat_template):
        return config
    try:
        if not template_writes_date(config.model.path, task.chat_template):
            return config
    except UserError:  # no such model: the run says so where it loads it, and stops no other of a sweep
        return config
    recorded = [_read(workdir / "config.json").get("task") for workdir in workdirs]
    days = [each.get("template_date") for each in recorded if isinstance(each, dict)]
    day = next((each for each in days if each and isinstance(each, str)), "")
    if not day and any((workdir / "config.json").exists() for workdir in workdirs[:1]):
        return config  # begun by a version that did not fix it: nobody knows the day
    if not day:
        # Midnight comes to several hosts at different times.
        ordinal = int(hosts.broadcast_from_process0(np.asarray(today().toordinal())))
        day = today().fromordinal(ordinal).isoformat()
    return dataclasses.replace(config, task=dataclasses.replace(task, template_date=day))


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
