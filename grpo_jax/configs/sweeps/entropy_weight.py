"""GTPO and GRPO-S over entropy_weight and stat_scope, beside GRPO and DAPO; and with the zeros left out of eq. 4.

entropy_weight 0 is the variant without its idea. include_other_side False is the mistaken reading, under which being right
counts for nothing on average: its runs unlearn the task instead.

    grpo-jax sweep --config=sweeps/entropy_weight:tiny --workdir=runs/entropy_weight
"""

from grpo_jax.configs import base as settings
from grpo_jax.configs.sweeps import base, dapo_parts

WEIGHTS, SCOPES = (0.0, 0.1, 0.5), ("batch", "group")


def get_config(scale: str = "tiny"):
    config = base.get_config(scale)
    config.configs = ("grpo",)
    config.seeds = tuple(range(10))  # fewer could show nothing about 18 settings
    variants = {name: settings.changes_to(name) for name in ("gtpo", "grpo_s")}
    weights = base.grid({"objective.entropy_weight": WEIGHTS, "objective.stat_scope": SCOPES})
    mistaken = base.grid({"objective.include_other_side": (False,), "objective.stat_scope": SCOPES})
    dapo = {field: value for part in dapo_parts.parts(scale).values() for field, value in part.items()}
    config.sets = {"": {}, "dapo": dapo, **base.crossed(variants, weights), **base.crossed(variants, mistaken)}
    return config
