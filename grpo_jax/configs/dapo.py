"""DAPO: decoupled clip, token-level loss, dynamic sampling, soft overlong punishment, no KL (Yu et al., arXiv 2503.14476).

grpo-jax train --config=dapo:tiny --workdir=runs/dapo
"""

from grpo_jax.configs import base


def get_config(scale: str = "tiny"):
    config = base.get_config(scale, "dapo")
    config.dynamic_sampling.enabled = True
    config.overlong.cache_share = 0.25
    return config
