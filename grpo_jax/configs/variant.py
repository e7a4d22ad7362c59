"""Any variant by its name (grpo_jax/objectives/variants.py), also one that has no file of its own here.

`--config=gspo:runlocal` comes here as the argument "gspo,runlocal":

    grpo-jax train --config=gspo --workdir=runs/gspo
    grpo-jax train --config=gtpo:smollm2 --workdir=runs/gtpo
"""

from grpo_jax import objectives
from grpo_jax.configs import base, dapo, gtpo_paper

# Names that stand for more than an objective: for dynamic sampling and a punishment of length beside it.
WITH_MORE = {"dapo": dapo, "dapo_paper": dapo, "gtpo_paper": gtpo_paper}


def get_config(argument: str = "grpo"):
    name, _, scale = argument.partition(",")
    if name not in objectives.VARIANTS:
        raise ValueError(f"unknown variant {name!r} after the colon; known: {', '.join(objectives.VARIANTS)}")
    config = WITH_MORE.get(name, base).get_config(scale or "tiny")
    config.objective = base.objective_of(name)
    return config
