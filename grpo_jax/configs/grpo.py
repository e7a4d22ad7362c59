"""GRPO: advantages are rewards normalised by their group's mean and std (Shao et al., DeepSeekMath, arXiv 2402.03300).

grpo-jax train --config=grpo:tiny --workdir=runs/grpo
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "grpo")
