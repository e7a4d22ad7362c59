"""python -m experiments.export: the same as grpo-jax export, see grpo_jax/tools/export.py."""

from grpo_jax.tools.export import command

if __name__ == "__main__":
    command()
