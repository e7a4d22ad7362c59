"""python -m experiments.variants_table --write: see grpo_jax/tools/variants_table.py."""

import sys

from grpo_jax.tools.variants_table import main

if __name__ == "__main__":
    sys.exit(main())
