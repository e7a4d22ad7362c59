"""The end of a run: its summary and its learning curve."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

from grpo_jax import objectives
from grpo_jax.config import Config
from grpo_jax.files import write_atomically
from grpo_jax.training.plots import learning_curve
from grpo_jax.training.provenance import provenance
from grpo_jax.training.runlog import read_metrics


def finalize_run(config: Config, workdir: pathlib.Path, num_callback_errors: int = 0) -> dict[str, Any]:
    """Finish a run whose files are closed: write its summary, and remove checkpoints that are not wanted any more."""
    summary = summarise(config, workdir, num_callback_errors)
    if not config.checkpoint.keep and summary["steps"] == config.num_steps:
        shutil.rmtree(workdir / "checkpoints")
    return summary


def summarise(config: Config, workdir: pathlib.Path, num_callback_errors: int = 0) -> dict[str, Any]:
    """Write summary.json and learning_curve.png from the run's records; -> the summary."""
    records = read_metrics(workdir)
    evaluated = [record for record in records if "eval/success" in record]
    summary: dict[str, Any] = {
        "steps": records[-1]["step"] if records else 0,
        # Of step 0 and no other: if that record was damaged, nothing is known of what was before.
        "success_before": next((record["eval/success"] for record in evaluated if record["step"] == 0), None),
        "success_after": evaluated[-1]["eval/success"] if evaluated else None,
        "training_secs": sum(record.get("time/step_secs", 0.0) for record in records),
        **{name: value for name, value in records[0].items() if name.startswith("data/")},
        **({"callback_errors": num_callback_errors} if num_callback_errors else {}),
        **provenance(),
    }
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    learning_curve(records, objectives.describe(config.objective), workdir / "learning_curve.png")
    return summary
