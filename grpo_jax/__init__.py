"""Group-relative policy optimisation in JAX: GRPO, DAPO, Dr. GRPO, GTPO and GRPO-S on one set of axes.

    import grpo_jax

    run = grpo_jax.train("gtpo", workdir="runs/gtpo")
    run.summary["success_after"], run.metrics[-1]

`train`, `sweep`, `report` and `show` are those of grpo_jax/tools/python.py; docs/python.md tells more.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
# What is to be had from the package itself, name -> module. Imported when it is asked for: most programs need little of it.
_LAZY = {
    **dict.fromkeys(("train", "sweep", "report", "show", "draw_advantages"), "grpo_jax.tools.python"),
    "inspect_data": "grpo_jax.tools.inspection",
}


def __getattr__(name: str) -> Any:
    """Import what the package offers under a name of its own."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_LAZY]
