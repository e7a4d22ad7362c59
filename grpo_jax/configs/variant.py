"""Any variant by its name (grpo_jax/objectives/variants.py), also one that has no file of its own here.

`--config=gspo:runlocal` comes here as the argument "gspo,runlocal":

    grpo-jax train --config=gspo --workdir=runs/gspo
    grpo-jax train --config=gtpo:smollm2 --workdir=runs/gtpo
"""

from grpo_jax import objectives
from grpo_jax.configs import base, dapo


def get_config(argument: str = "grpo"):
    name, _, scale = argument.partition(",")
    if name not in objectives.VARIANTS:
        raise ValueError(f"unknown variant {name!r} after the colon; known: {', '.join(objectives.VARIANTS)}")
    # DAPO's dynamic sampling and overlong punishment are not in its loss, so its name stands for more than an objective.
    start = dapo if name in ("dapo", "dapo_paper") else base
    config = start.get_config(scale or "tiny")
    config.objective = base.objective_of(name)
    return config
