"""GSPO: importance ratio of whole completions, clipped narrowly (Zheng et al., arXiv 2507.18071).

Differs from GRPO only with several updates a batch: --config.learner.num_minibatches=4.

    python -m experiments.train --config=configs/gspo.py:tiny --workdir=runs/gspo
"""

from configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "gspo")
