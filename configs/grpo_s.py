"""GRPO-S: sequence-level rewards shaped by mean entropy, sequence-level ratio (Tan et al., arXiv 2508.04349, eqs. 6-8).

python -m experiments.train --config=configs/grpo_s.py:tiny --workdir=runs/grpo_s
"""

from configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "grpo_s")
