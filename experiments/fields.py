"""python -m experiments.fields: the same as grpo-jax fields, see grpo_jax/tools/fields.py."""

from grpo_jax.tools.fields import command

if __name__ == "__main__":
    command()
