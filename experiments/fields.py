"""python -m experiments.fields: see grpo_jax/tools/fields.py."""

from grpo_jax.tools.fields import main

if __name__ == "__main__":
    main()
