"""python -m experiments.export: see grpo_jax/tools/export.py."""

from grpo_jax.tools import cli
from grpo_jax.tools.export import main

if __name__ == "__main__":
    cli.run(main)
