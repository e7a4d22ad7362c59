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
from grpo_jax.errors import UserError
from grpo_jax.runlog import read_config


def main() -> None:
    workdir = pathlib.Path(cli.WORKDIR.value) if cli.WORKDIR.value else None
    config = read_config(workdir) if workdir else cli.config_from_flags()
    run = trainer.make_run(config)
    try:
        if workdir:
            checkpointer = Checkpointer(workdir, config.checkpoint)
            step = checkpointer.latest_step()
            if step is None:
                raise UserError(f"--workdir={workdir}: no finished checkpoint in it; train first")
            state = checkpointer.restore(step, trainer.abstract_state(run))
        else:
            state = trainer.initial_state(run)
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


if __name__ == "__main__":
    cli.run(main)
