"""An algorithm with the constants of a paper or of a framework's defaults (docs/variants.md, "Where constants come from").

The argument names the preset, and after a comma the scale:

    python -m experiments.train --config=configs/preset.py:trl_default --workdir=runs/trl_default
    python -m experiments.train --config=configs/preset.py:verl_default,smollm2 --workdir=runs/verl_default
"""

from configs import variant
from grpo_jax import objectives


def get_config(argument: str = "deepseekmath"):
    name = argument.partition(",")[0]
    if name not in objectives.PRESETS:
        raise ValueError(f"unknown preset {name!r} after the colon; known: {', '.join(objectives.PRESETS)}")
    return variant.get_config(argument)
