"""Dr. GRPO: GRPO without dividing by the group's std or the row's length (Liu et al., arXiv 2503.20783).

A KL term is kept beside the paper's two corrections; --config.objective.kl_coef=0 is the paper's objective.

    grpo-jax train --config=dr_grpo:tiny --workdir=runs/dr_grpo
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "dr_grpo")
