"""Dr. GRPO's two corrections apart and together: no division by the group's std, none by the row's length. No KL in any.

grpo-jax sweep --config=sweeps/dr_grpo_parts:tiny --workdir=runs/dr_grpo_parts
"""

from grpo_jax.configs.sweeps import base


def get_config(scale: str = "tiny"):
    config = base.get_config(scale)
    config.configs = ("grpo",)
    std = {"std": {"objective.kl_coef": 0.0}, "no_std": {"objective.kl_coef": 0.0, "objective.advantage": "group_center"}}
    config.sets = base.crossed(std, {"length": {}, "no_length": {"objective.aggregation": "constant"}})
    return config
