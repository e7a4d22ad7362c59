"""python -m experiments.evaluate: the same as grpo-jax evaluate, see grpo_jax/tools/evaluate.py."""

from grpo_jax.tools.evaluate import command

if __name__ == "__main__":
    command()
