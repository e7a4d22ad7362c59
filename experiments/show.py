"""python -m experiments.show: see grpo_jax/tools/show/."""

from grpo_jax.tools.show.command import main

if __name__ == "__main__":
    main()
