"""python -m experiments.report: the same as grpo-jax report, see grpo_jax/tools/report/command.py."""

from grpo_jax.tools.report.command import command

if __name__ == "__main__":
    command()
