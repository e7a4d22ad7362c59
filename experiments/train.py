"""python -m experiments.train: see grpo_jax/tools/train.py."""

from grpo_jax.tools import cli
from grpo_jax.tools.train import main

if __name__ == "__main__":
    cli.run(main)
