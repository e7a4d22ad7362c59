"""python -m experiments.sweep: see grpo_jax/tools/sweep/."""

from grpo_jax.tools import cli
from grpo_jax.tools.sweep.command import main

if __name__ == "__main__":
    cli.run(main)
