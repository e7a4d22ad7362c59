"""python -m experiments.show: the same as grpo-jax show, see grpo_jax/tools/show/command.py."""

from grpo_jax.tools.show.command import command

if __name__ == "__main__":
    command()
