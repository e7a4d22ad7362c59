"""GTPO: token-level rewards shaped by the sampling policy's entropy (Tan et al., arXiv 2508.04349, eqs. 2-5).

grpo-jax train --config=gtpo:tiny --workdir=runs/gtpo
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "gtpo")
