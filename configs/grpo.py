"""GRPO: advantages are rewards normalised by their group's mean and std (Shao et al., DeepSeekMath, arXiv 2402.03300).

python -m experiments.train --config=configs/grpo.py:tiny --workdir=runs/grpo
"""

from configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "grpo")
