"""Held-out success of a run, a model or an adapter, with 95 % intervals:

    grpo-jax evaluate --workdir=runs/dapo [--step=400]
    grpo-jax evaluate --config=grpo:smollm2 --config.model.path=folder [--config.lora.path=adapter]

Greedy success, and from eval.num_samples completions at the training temperature mean@k, pass@k and maj@k. With both flags
the weights are the run's, and questions and settings are the config's: other data, or more samples.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import TYPE_CHECKING

from absl import flags

from grpo_jax.errors import UserError
from grpo_jax.files import write_atomically
from grpo_jax.tools import cli

if TYPE_CHECKING:
    from grpo_jax.config import Config

flags.declare_key_flag("step")
flags.declare_key_flag("strict")
# Export has a flag of this name too: a program that imports both must not fail, and no process runs two commands.
OUT = flags.DEFINE_string(
    "out", None, "JSON file of the results; default: evaluation.json in the workdir, else none", allow_override=True
)


def main() -> None:
    """Run the command: evaluate, write the results, show them as a table."""
    from rich.console import Console
    from rich.table import Table

    from grpo_jax.tasks.host import HostTask
    from grpo_jax.training.data_record import pin_template_date
    from grpo_jax.training.run import make_run

    workdir = cli.workdir_of(cli.WORKDIR.value) if cli.WORKDIR.value else None
    config = choose_config(workdir)
    if workdir:
        config = pin_template_date(config, [workdir])
    run = make_run(config)
    # After an error too: the scoring processes are ended and waited for, not left to the interpreter's exit.
    try:
        if workdir:
            step, policy = cli.restore_policy(run, workdir, cli.chosen_step(workdir), is_strict=cli.STRICT.value)
        else:
            step, policy = 0, run.initial_state().policy
        # For rewards that ask for the step.
        if isinstance(run.task, HostTask):
            run.task.step = step
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
    out = choose_out(workdir)
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


def choose_config(workdir: pathlib.Path | None) -> Config:
    """Return the config of --config, else the run's own. Raises UserError."""
    from grpo_jax.training.settings import read_config

    # --config wins: with both flags the run's weights are evaluated on other questions, or with more samples.
    if workdir is None or cli.CONFIG.value is not None:
        return cli.config_from_flags()
    return read_config(workdir)


def choose_out(workdir: pathlib.Path | None) -> pathlib.Path | None:
    """Return the file of --out, else the one in the workdir; None: the results are shown only."""
    if OUT.value:
        return pathlib.Path(OUT.value)
    if workdir is None:
        return None
    return workdir / "evaluation.json"


def command() -> None:
    """Run from the command line."""
    cli.run(main)
