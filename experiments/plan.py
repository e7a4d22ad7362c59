"""python -m experiments.plan: the same as grpo-jax plan, see grpo_jax/tools/plan/command.py."""

from grpo_jax.tools.plan.command import command

if __name__ == "__main__":
    command()
