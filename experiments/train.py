"""Train: python -m experiments.train --config=configs/dapo.py:tiny --workdir=runs/dapo --config.seed=1

The same command goes on from the newest checkpoint in the workdir. SIGTERM saves and exits 0.
"""

from __future__ import annotations

import pathlib

from absl import flags
from rich.console import Console
from rich.table import Table

from experiments import cli
from grpo_jax import objectives, trainer
from grpo_jax.errors import UserError

PROFILE = flags.DEFINE_string(
    "profile", None, "steps to trace with jax.profiler, for example 10:12; the traces go to <workdir>/profile, for TensorBoard"
)
ALLOW_CONFIG_CHANGE = flags.DEFINE_bool(
    "allow_config_change", False, "go on in a workdir that another config wrote (for example with more num_steps)"
)


def main() -> None:
    config = cli.config_from_flags()
    if cli.WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/dapo")
    workdir = pathlib.Path(cli.WORKDIR.value)
    profiled = steps_of(PROFILE.value) if PROFILE.value else None
    summary = trainer.train(config, workdir, allow_config_change=ALLOW_CONFIG_CHANGE.value, profiled=profiled)
    table = Table(title=f"{objectives.describe(config.objective)}, seed {config.seed}: {workdir}")
    for name in ("steps", "held-out success before", "after", "training seconds"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{summary['steps']}/{config.num_steps}",
        f"{summary['success_before']:.3f}",
        f"{summary['success_after']:.3f}",
        f"{summary['training_secs']:.0f}",
    )
    console = Console()
    console.print(table)
    console.print(f"curve: {workdir}/learning_curve.png   records: {workdir}/metrics.jsonl", soft_wrap=True)


def steps_of(text: str) -> range:
    """10:12 -> steps 10, 11 and 12. Raises UserError."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UserError(f"--profile={text}: expected two steps, first:last, for example 10:12")
    return range(int(first), int(last) + 1)


if __name__ == "__main__":
    cli.run(main)
