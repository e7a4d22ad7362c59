"""GRPO-S: sequence-level rewards shaped by mean entropy, sequence-level ratio (Tan et al., arXiv 2508.04349, eqs. 6-8).

grpo-jax train --config=grpo_s:tiny --workdir=runs/grpo_s
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "grpo_s")
