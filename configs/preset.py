"""An algorithm with the constants of a paper or of a framework's defaults (docs/variants.md, "Where constants come from").

The argument names the preset, and after a comma the scale:

    python -m experiments.train --config=configs/preset.py:trl_default --workdir=runs/trl_default
    python -m experiments.train --config=configs/preset.py:verl_default,smollm2 --workdir=runs/verl_default
"""

from configs import base, dapo
from grpo_jax import objectives


def get_config(argument: str = "deepseekmath"):
    name, _, scale = argument.partition(",")
    if name not in objectives.PRESETS:
        raise ValueError(f"unknown preset {name!r} after the colon; known: {', '.join(objectives.PRESETS)}")
    config = (dapo if name == "dapo_paper" else base).get_config(scale or "tiny")  # DAPO's sampling is not in its loss
    config.objective = base.objective_of(name)
    return config
