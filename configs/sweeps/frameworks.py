"""What the constants of frameworks and papers do by themselves: std ddof, std epsilon, then whole presets' objectives.

Only the objective is a preset's: DAPO's sampling is configs/sweeps/dapo_parts.py's, and dual clip needs several updates a
batch, so there are four.

    python -m experiments.sweep --config=configs/sweeps/frameworks.py:tiny --workdir=runs/frameworks
"""

from configs import base as settings
from configs.sweeps import base
from grpo_jax import objectives


def get_config(scale: str = "tiny"):
    config = base.get_config(scale)
    config.configs = ("configs/grpo.py",)
    config.seeds = tuple(range(10))  # fewer could show nothing about 11 settings
    constants = {"": {}, **base.grid({"objective.std_ddof": (0,)}), **base.grid({"objective.adv_eps": (1e-8, 1e-4)})}
    presets = {name: settings.changes_to(name) for name in objectives.PRESETS}
    config.sets = base.crossed({"": {"learner.num_minibatches": 4}}, {**constants, **presets})
    return config
