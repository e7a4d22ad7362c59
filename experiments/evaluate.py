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
from grpo_jax.checkpoint import Checkpointer
from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.run import initial_state, make_run, restored_policy


def main() -> None:
    workdir = pathlib.Path(cli.WORKDIR.value) if cli.WORKDIR.value else None
    config = config_of(workdir) if workdir else cli.config_from_flags()
    run = make_run(config)
    try:
        if workdir:
            checkpointer = Checkpointer(workdir, config.checkpoint)
            step = checkpointer.latest_step()
            if step is None:
                raise UserError(f"--workdir={workdir}: no finished checkpoint in it; train first")
            policy = restored_policy(run, checkpointer, step)
        else:
            step, policy = 0, initial_state(run).policy
        results = {"step": step, **run.evaluate(policy)}
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


def config_of(workdir: pathlib.Path) -> Config:
    """The config that the run was started with."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; --workdir must be the folder of a training run")
    return Config.from_config_dict(json.loads(path.read_text()))


if __name__ == "__main__":
    cli.run(main)
