"""python -m experiments.smollm2: the same as grpo-jax smollm2, see grpo_jax/tools/smollm2.py."""

from grpo_jax.tools.smollm2 import command

if __name__ == "__main__":
    command()
