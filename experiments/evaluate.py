"""python -m experiments.evaluate: see grpo_jax/tools/evaluate.py."""

from grpo_jax.tools import cli
from grpo_jax.tools.evaluate import main

if __name__ == "__main__":
    cli.run(main)
