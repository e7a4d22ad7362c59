"""The settings in a run's folder: written when it begins, compared when it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from grpo_jax.config import Config, parse_config
from grpo_jax.config.aliases import complete
from grpo_jax.errors import UserError
from grpo_jax.files import printable, read_json, write_atomically
from grpo_jax.parallel import hosts
from grpo_jax.training.brought import find_functions
from grpo_jax.training.checkpoint import saved_steps

SHOWN = 200  # characters of a setting
SEEN_WITHIN_SECS = 60.0  # a network's file system may show a file so late to the other hosts


@dataclasses.dataclass(frozen=True)
class Start:
    """Wishes of one who starts a run in a folder that may hold its beginning.

    step: of the checkpoint to go on from; None: the newest that can be read. is_strict: a damaged one is an error, and no older
    one is taken. allowed_changes: fields or groups of fields of the config that may differ, though that changes what comes out.
    """

    step: int | None = None
    is_strict: bool = False
    allowed_changes: Sequence[str] = ()

    def allows(self, name: str) -> bool:
        """Tell if a field, by its dotted name, may differ."""
        return is_within(name, self.allowed_changes)


FROM_WHERE_IT_IS = Start()
# Fields that change nothing of what is trained: what is looked at and kept, and how the work is cut into calls and processes.
# `eval.num_prompts` is none of them, for it says which questions are held out of the training.
HARMLESS = (
    "eval_every",
    "eval.num_samples",
    "eval.batch_size",
    "checkpoint",
    "log",
    "steps_per_call",
    "reward.scoring.num_workers",
    "optimizer.max_skipped_steps",
)


def is_within(name: str, groups: Sequence[str]) -> bool:
    """Tell if a field is one of the named ones, or in a group that is."""
    return any(name == group or name.startswith(f"{group}.") for group in groups)


def init_workdir(workdir: pathlib.Path, config: dict[str, Any], start: Start = FROM_WHERE_IT_IS) -> None:
    """Write the config into a new workdir; in an old one, refuse if it was made by another config.

    Args:
      workdir: folder of the run; it exists. config: as a plain dict. start: the changes it allows.
    Raises: UserError naming the fields that differ, or that the folder cannot be written.
    """
    check_same_config(workdir, config, start)
    if hosts.is_first():
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            write_atomically(workdir / "config.json", json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder") from error
    # The other processes wait until the file is written. Then each looks for it: a --workdir on a disk of its own is a one-line
    # error here, and not a failure in the middle of a save.
    hosts.broadcast_from_process0(np.zeros(()))
    deadline = time.monotonic() + SEEN_WITHIN_SECS
    while not (workdir / "config.json").exists():
        if time.monotonic() > deadline:
            raise UserError(f"--workdir={workdir}: not the folder that the first host writes; take one that all hosts share")
        time.sleep(1)


def check_same_config(workdir: pathlib.Path, config: dict[str, Any], start: Start = FROM_WHERE_IT_IS) -> None:
    """Compare a config with that of the run in a workdir, and say what the run goes on with that it did not have before.

    Args:
      workdir: may be new. config: as a plain dict. start: the changes it allows.
    Raises: UserError naming the fields that differ, harm, and are not allowed.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    changes = _changes(read_settings(workdir), config)
    refused = _refused(changes, start)
    # A flipped bit makes another config of it, too. The run is that of its newest checkpoint, which has a copy.
    copy = _copy_in_checkpoint(workdir)
    if refused and copy is not None and not _refused(_changes(copy, config), start):
        hosts.say(f"{path}: {refused[0]}, but its newest checkpoint was made with this config; going on with it")
        return
    if refused:
        names = ",".join(each.name for each in refused)
        raise UserError(
            f"{path}: written by another config: {'; '.join(map(str, refused[:3]))}{_and_more(len(refused) - 3)}; "
            f"use another --workdir, or go on with the new settings by --allow_config_change={names}"
        )
    for each in changes:
        hosts.say(f"{path}: going on with another setting, {each}")


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    # An older version's file is brought up to date first. What is compared is what JSON makes of either: of tuples lists, also
    # of those that are defaults of newer fields.
    before, now = (json.loads(json.dumps(each)) for each in (complete(old), new))
    if now.get("learner", {}).get("num_microbatches") == 0 and "learner" in before:
        # 0 leaves it to the run (`training.fit`), whose file says what it decided.
        now["learner"]["num_microbatches"] = before["learner"]["num_microbatches"]
    return list(_differences(before, now, ""))


def _refused(changes: list[Change], start: Start) -> list[Change]:
    return [each for each in changes if not each.is_harmless and not start.allows(each.name)]


def _copy_in_checkpoint(workdir: pathlib.Path) -> dict[str, Any] | None:
    """Read the settings that a run's newest checkpoint was made with; None if there is none that can be read."""
    for step in reversed(saved_steps(workdir)):
        with contextlib.suppress(UserError):
            return read_json(workdir / "checkpoints" / str(step) / "config" / "metadata")
    return None


def check_sources(workdir: pathlib.Path, sources: dict[str, str], start: Start, *, reads_again: Sequence[str]) -> None:
    """Compare the marks of files outside of the workdir, which the run was begun with, with those of today.

    Args:
      workdir: of the run, with its config.json. sources: mark of each, by a name. start: the changes it allows, by these
        names. reads_again: those that a run reads once more when it goes on.
    Raises: UserError naming one of the latter that has changed and is not allowed.
    """
    path, before = workdir / "sources.json", {}
    if path.exists():
        try:
            before = read_json(path, "files of the model are not compared")
        except UserError as error:
            hosts.say(str(error))
    for name, mark in sources.items():
        if before.get(name, mark) == mark:
            continue
        what = f"{path}: the files of {name} are not those that the run began with"
        if name in reads_again and not start.allows(name):
            raise UserError(
                f"{what}, and it reads them again; bring them back, use another --workdir, or go on with the new ones by "
                f"--allow_config_change={name}"
            )
        hosts.say(f"{what}; going on")
    if before != sources and hosts.is_first():
        write_atomically(path, json.dumps(sources, indent=2) + "\n")


def _and_more(num: int) -> str:
    return f" and {num} more" if num > 0 else ""


def read_settings(workdir: pathlib.Path) -> dict[str, Any]:
    """Read the settings that a run was started with, as they are in its config.json; of a damaged one its newest checkpoint's.

    Raises: UserError if the folder is not that of a run, or none of its copies can be read.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; --workdir must be the folder of a training run")
    try:
        return read_json(path, "delete the folder, or start its run again with another --workdir")
    except UserError as error:
        copy = _copy_in_checkpoint(workdir)
        if copy is None:
            raise
        hosts.say(f"{error.args[0].split(';')[0]}; its newest checkpoint's copy is taken")
        return copy


def read_config(workdir: pathlib.Path) -> Config:
    """Read the config that the run was started with. Raises UserError if the folder is not that of a run."""
    settings = read_settings(workdir)
    find_functions(workdir)  # a run made in Python keeps them in its folder, and config.json names them
    try:
        return parse_config(complete(settings))
    except UserError as error:
        raise UserError(f"{workdir}/config.json: {error}") from None


@dataclasses.dataclass(frozen=True)
class Change:
    """A field of a config, by its dotted name, that has another value now."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"config.{self.name} was {printable(repr(self.old), SHOWN)}, now {printable(repr(self.new), SHOWN)}"

    @property
    def is_harmless(self) -> bool:
        """The training stays the same with it; that of a longer run, as far as the shorter one went."""
        is_longer = self.name == "num_steps" and isinstance(self.old, int) and self.new > self.old
        return is_longer or is_within(self.name, HARMLESS)


def _differences(old: Any, new: Any, where: str) -> Iterator[Change]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{where}.{key}" if where else key)
    elif old != new:
        yield Change(where, old, new)
