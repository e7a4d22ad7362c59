"""Held-out success of a run: python -m experiments.evaluate --workdir=runs/dapo

Greedy, and the mean over eval.num_samples completions at the training temperature. With --config in place of --workdir,
the model before any training.
"""

from __future__ import annotations

import json
import pathlib

from rich.console import Console
from rich.table import Table

from experiments import cli
from grpo_jax import trainer
from grpo_jax.checkpoint import Checkpointer
from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.types import TrainState


def main() -> None:
    workdir = pathlib.Path(cli.WORKDIR.value) if cli.WORKDIR.value else None
    config = config_of(workdir) if workdir else cli.config_from_flags()
    run = trainer.make_run(config)
    try:
        state = restored_state(run, workdir) if workdir else trainer.initial_state(run)
        results = {"step": int(state.step), **run.evaluate(state.params)}
    finally:
        run.task.close()
    if workdir:
        (workdir / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    table = Table(title=f"{config.eval.num_prompts} held-out prompts, step {results['step']}")
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in results.items():
        if name != "step":
            table.add_row(name, f"{value:.3f}")
    Console().print(table)


def restored_state(run: trainer.Run, workdir: pathlib.Path, step: int | None = None) -> TrainState:
    """The state that a run saved at `step` (None: at last). Raises UserError if there is no such checkpoint."""
    checkpointer = Checkpointer(workdir, run.config.checkpoint)
    try:
        steps = checkpointer.steps()
        if not steps:
            raise UserError(f"--workdir={workdir}: no finished checkpoint in it; train first")
        if step is not None and step not in steps:
            raise UserError(f"--step={step}: no such checkpoint in {workdir}; there are: {', '.join(map(str, steps))}")
        return checkpointer.restore(steps[-1] if step is None else step, trainer.abstract_state(run))
    finally:
        checkpointer.close()


def config_of(workdir: pathlib.Path) -> Config:
    """The config that the run was started with."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; --workdir must be the folder of a training run")
    return Config.from_config_dict(json.loads(path.read_text()))


if __name__ == "__main__":
    cli.run(main)
