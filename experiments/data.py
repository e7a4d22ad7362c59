"""python -m experiments.data: the same as grpo-jax data, see grpo_jax/tools/data.py."""

from grpo_jax.tools.data import command

if __name__ == "__main__":
    command()
