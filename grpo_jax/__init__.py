"""Group-relative policy optimisation in JAX: GRPO, DAPO, Dr. GRPO, GTPO and GRPO-S on one set of axes.

    import grpo_jax

    run = grpo_jax.train("gtpo", workdir="runs/gtpo")
    run.summary["success_after"], run.metrics[-1]

`train`, `sweep`, `report` and `show` are those of grpo_jax/tools/python.py; docs/python.md tells more.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
# Imported when they are asked for: the front door must not make the objectives alone wait for all rooms behind it.
_FRONT_DOOR = ("train", "sweep", "report", "show", "draw_advantages", "inspect_data")
__all__ = list(_FRONT_DOOR)


def __getattr__(name: str) -> Any:
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module 'grpo_jax' has no attribute {name!r}")
    module = "grpo_jax.tools.data" if name == "inspect_data" else "grpo_jax.tools.python"
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return [*globals(), *_FRONT_DOOR]
