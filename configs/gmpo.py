"""GMPO: geometric mean of a completion's token ratios, each clipped by itself (Zhao et al., arXiv 2507.20673).

Differs from GRPO only with several updates a batch: --config.learner.num_minibatches=4.

    python -m experiments.train --config=configs/gmpo.py:tiny --workdir=runs/gmpo
"""

from configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "gmpo")
