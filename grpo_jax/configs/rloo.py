"""RLOO: REINFORCE with the mean of the other completions' rewards as baseline (Ahmadian et al., arXiv 2402.14740).

grpo-jax train --config=rloo:tiny --workdir=runs/rloo
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "rloo")
