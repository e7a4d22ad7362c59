"""python -m experiments.doctor: see grpo_jax/tools/doctor.py."""

from grpo_jax.tools.doctor import main

if __name__ == "__main__":
    main()
