"""The five variants on sums of numbers up to 299: nine times as many questions, two places to carry, and a longer warm start.

grpo-jax sweep --config=sweeps/harder:tiny --workdir=runs/harder
"""

from grpo_jax.configs.sweeps import variants

HARDER = {"task.arithmetic.max_operand": 299, "warm_start.num_steps": 2000}


def get_config(scale: str = "tiny"):
    config = variants.get_config(scale)
    config.sets = {"": HARDER}
    return config
