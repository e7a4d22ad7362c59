"""The five variants beside a control: the same runs with their rewards handed to the wrong rows, where nothing may be learnt.

grpo-jax sweep --config=sweeps/control:tiny --workdir=runs/control
"""

from grpo_jax.configs.sweeps import variants


def get_config(scale: str = "tiny"):
    config = variants.get_config(scale)
    config.seeds = tuple(range(10))  # fewer could show nothing about 10 settings
    config.sets = {"": {}, "shuffled": {"shuffle_rewards": True}}
    return config
