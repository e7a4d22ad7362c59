"""The five variants, 8 seeds each. The format of a sweep is described in configs/sweeps/base.py.

grpo-jax sweep --config=sweeps/variants:tiny --workdir=runs/sweep
"""

from grpo_jax.configs.sweeps import base


def get_config(scale: str = "tiny"):
    config = base.get_config(scale)
    config.configs = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
    return config
