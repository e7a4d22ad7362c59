"""The five variants beside a control: the same runs with their rewards handed to the wrong rows, where nothing may be learnt.

python -m experiments.sweep --config=configs/sweeps/control.py:tiny --workdir=runs/control
"""

from configs.sweeps import variants


def get_config(scale: str = "tiny"):
    config = variants.get_config(scale)
    config.seeds = tuple(range(10))  # fewer could show nothing about 10 settings
    config.sets = {"": {}, "shuffled": {"shuffle_rewards": True}}
    return config
