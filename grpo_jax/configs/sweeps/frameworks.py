"""Constants of frameworks and papers by themselves: std ddof, std epsilon, then whole presets' objectives.

Only the objective is a preset's: DAPO's sampling is configs/sweeps/dapo_parts.py's, and dual clip needs several updates a
batch, so there are four.

    grpo-jax sweep --config=sweeps/frameworks:tiny --workdir=runs/frameworks
"""

from grpo_jax import objectives
from grpo_jax.configs import base as settings
from grpo_jax.configs.sweeps import base


def get_config(scale: str = "tiny"):
    config = base.get_config(scale)
    config.configs = ("grpo",)
    config.seeds = tuple(range(10))  # fewer could show nothing about 11 settings
    constants = {"": {}, **base.grid({"objective.std_ddof": (0,)}), **base.grid({"objective.adv_eps": (1e-8, 1e-4)})}
    presets = {name: settings.changes_to(name) for name in objectives.PRESETS}
    config.sets = base.crossed({"": {"learner.num_minibatches": 4}}, {**constants, **presets})
    return config
