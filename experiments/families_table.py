"""python -m experiments.families_table --write: see grpo_jax/tools/families_table.py."""

import sys

from grpo_jax.tools.families_table import main

if __name__ == "__main__":
    sys.exit(main())
