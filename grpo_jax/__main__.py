"""python -m grpo_jax <command>: the same as grpo-jax <command>."""

from grpo_jax.tools.main import main

if __name__ == "__main__":
    main()
