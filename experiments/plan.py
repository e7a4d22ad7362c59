"""python -m experiments.plan: see grpo_jax/tools/plan/."""

from grpo_jax.tools import cli
from grpo_jax.tools.plan.command import main

if __name__ == "__main__":
    cli.run(main)
