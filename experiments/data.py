"""python -m experiments.data: see grpo_jax/tools/data.py."""

from grpo_jax.tools import cli
from grpo_jax.tools.data import main

if __name__ == "__main__":
    cli.run(main)
