"""GSPO: importance ratio of whole completions, clipped narrowly (Zheng et al., arXiv 2507.18071).

Differs from GRPO only with several updates a batch: --config.learner.num_minibatches=4.

    grpo-jax train --config=gspo:tiny --workdir=runs/gspo
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    return base.get_config(scale, "gspo")
