"""python -m experiments.doctor: the same as grpo-jax doctor, see grpo_jax/tools/doctor.py."""

from grpo_jax.tools.doctor import command

if __name__ == "__main__":
    command()
