"""CISPO: the clipped ratio is a weight without gradient, so no token is dropped (MiniMax-M1, arXiv 2506.13585, eqs. 4-5).

Differs from GRPO's loss only with several updates a batch: --config.learner.num_minibatches=4.

    grpo-jax train --config=cispo:tiny --workdir=runs/cispo
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "cispo")
