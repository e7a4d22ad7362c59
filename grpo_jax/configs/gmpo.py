"""GMPO: geometric mean of a completion's token ratios, each clipped by itself (Zhao et al., arXiv 2507.20673).

Differs from GRPO only with several updates a batch: --config.learner.num_minibatches=4.

    grpo-jax train --config=gmpo:tiny --workdir=runs/gmpo
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "gmpo")
