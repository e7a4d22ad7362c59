"""Draws what variants make of the guide's one group, advantages.png of the guide and one_group.png of the README:

python -m docs.figures
"""

from __future__ import annotations

import pathlib

from grpo_jax.tools.advantages import EXAMPLE, FIVE, draw

DRAWN = {
    "advantages.png": (*FIVE, "gspo"),  # the variants that the guide treats at length
    "one_group.png": ("grpo", "gtpo"),
}

if __name__ == "__main__":
    for name, variants in DRAWN.items():
        (pathlib.Path(__file__).parent / name).write_bytes(draw(EXAMPLE, variants))
