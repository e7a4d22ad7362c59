"""Held-out success of a run, a model or an adapter, with 95 % intervals:

    python -m experiments.evaluate --workdir=runs/dapo [--step=400]
    python -m experiments.evaluate --config=configs/grpo.py:smollm2 --config.model.path=folder [--config.lora.path=adapter]

Greedy success, and from eval.num_samples completions at the training temperature mean@k, pass@k and maj@k. With both flags
the weights are the run's, and questions and settings are the config's: other data, or more samples.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib

from absl import flags
from rich.console import Console
from rich.table import Table

from grpo_jax.errors import UserError
from grpo_jax.tools import cli
from grpo_jax.training.checkpoint import write_atomically
from grpo_jax.training.run import make_run
from grpo_jax.training.runlog import read_config

OUT = flags.DEFINE_string("out", None, "JSON file of the results; default: evaluation.json in the workdir, else none")


def main() -> None:
    workdir = pathlib.Path(cli.WORKDIR.value) if cli.WORKDIR.value else None
    config = cli.config_from_flags() if cli.CONFIG.value is not None or not workdir else read_config(workdir)
    run = make_run(config)
    try:
        if workdir:
            step = cli.choose_step(workdir, cli.STEP.value)
            policy = run.restore_policy(workdir, step)
        else:
            step, policy = 0, run.initial_state().policy
        estimates = run.evaluate(policy)
        num_prompts = len(run.task.eval_prompts().tokens_PS)
    finally:
        run.task.close()
    results = {
        "step": step,
        "seed": config.seed,
        "num_prompts": num_prompts,
        "num_samples": config.eval.num_samples,
        "temperature": config.rollout.temperature,
        "estimates": {name: dataclasses.asdict(each) for name, each in estimates.items()},
    }
    out = pathlib.Path(OUT.value) if OUT.value else workdir and workdir / "evaluation.json"
    if out:
        try:
            write_atomically(out, json.dumps(results, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"--out={out}: cannot be written ({error.strerror})") from error
    table = Table(title=f"{num_prompts} held-out prompts, step {step}")
    table.add_column("metric")
    for name in ("value", "95 % interval"):
        table.add_column(name, justify="right")
    for name, each in estimates.items():
        table.add_row(name, f"{each.value:.3f}", f"{each.low:.3f} to {each.high:.3f}")
    Console().print(table)
