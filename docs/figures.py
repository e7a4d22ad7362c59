"""Draws docs/advantages.png, what each variant makes of the guide's one group: python -m docs.figures"""

from __future__ import annotations

import pathlib

from grpo_jax.tools.advantages import EXAMPLE, FIVE, draw

DRAWN = (*FIVE, "gspo")  # the variants that the guide treats at length

if __name__ == "__main__":
    (pathlib.Path(__file__).parent / "advantages.png").write_bytes(draw(EXAMPLE, DRAWN))
