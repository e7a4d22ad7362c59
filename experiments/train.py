"""python -m experiments.train: the same as grpo-jax train, see grpo_jax/tools/train.py."""

from grpo_jax.tools.train import command

if __name__ == "__main__":
    command()
