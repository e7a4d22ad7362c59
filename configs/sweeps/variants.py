"""The five variants, 8 seeds each. The format of a sweep is described in configs/sweeps/base.py.

python -m experiments.sweep --config=configs/sweeps/variants.py:tiny --workdir=runs/sweep
"""

from configs.sweeps import base


def get_config(scale: str = "tiny"):
    config = base.get_config(scale)
    config.configs = tuple(f"configs/{name}.py" for name in ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s"))
    return config
