"""python -m experiments.sweep: the same as grpo-jax sweep, see grpo_jax/tools/sweep/command.py."""

from grpo_jax.tools.sweep.command import command

if __name__ == "__main__":
    command()
