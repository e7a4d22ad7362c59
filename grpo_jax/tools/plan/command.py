"""Estimate what a run needs on which machine: bytes a device, seconds an iteration, traffic. Nothing is computed or loaded.

    grpo-jax plan --config=dapo:smollm2 --shape=qwen2.5-7b --chip=h100 --devices=8 --config.mesh.fsdp=8
    grpo-jax plan ... --sweep       all meshes of that many devices that are allowed, the quickest first
    grpo-jax plan ... --compile     the real programs, for simulated devices: memory and collectives
    grpo-jax plan ... --compile --chip=v5e --topology=4x4   by the chip's own compiler, which needs no chip

docs/planning.md says what is exact, what is estimated, and how far it was off.
"""

from __future__ import annotations

from absl import flags

from grpo_jax.tools import cli
from grpo_jax.tools.plan import flags as plan_flags

flags.adopt_module_key_flags(plan_flags)


def main() -> None:
    """Print the tables that the flags ask for. Raises UserError."""
    from grpo_jax.tools.plan import tables

    tables.show()


def command() -> None:
    """Run from the command line."""
    cli.run(main)
