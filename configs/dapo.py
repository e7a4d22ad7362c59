"""DAPO: decoupled clip, token-level loss, dynamic sampling, soft overlong punishment, no KL (Yu et al., arXiv 2503.14476).

python -m experiments.train --config=configs/dapo.py:tiny --workdir=runs/dapo
"""

from configs import base


def get_config(scale: str = "tiny"):
    config = base.get_config(scale, "dapo")
    config.dynamic_sampling.enabled = True
    config.overlong.cache_tokens = config.rollout.max_completion_tokens // 4
    return config
