"""GTPO: token-level rewards shaped by the sampling policy's entropy (Tan et al., arXiv 2508.04349, eqs. 2-5).

python -m experiments.train --config=configs/gtpo.py:tiny --workdir=runs/gtpo
"""

from configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "gtpo")
