"""An algorithm with the constants of a paper or of a framework's defaults (docs/variants.md, "Where constants come from").

`--config=trl_default:tiny` comes here as the argument "trl_default,tiny":

    grpo-jax train --config=trl_default --workdir=runs/trl_default
    grpo-jax train --config=verl_default:smollm2 --workdir=runs/verl_default
"""

from grpo_jax import objectives
from grpo_jax.configs import variant


def get_config(argument: str = "deepseekmath"):
    name = argument.partition(",")[0]
    if name not in objectives.PRESETS:
        raise ValueError(f"unknown preset {name!r} after the colon; known: {', '.join(objectives.PRESETS)}")
    return variant.get_config(argument)
