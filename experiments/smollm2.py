"""python -m experiments.smollm2: see grpo_jax/tools/smollm2.py."""

from grpo_jax.tools.smollm2 import main

if __name__ == "__main__":
    main()
