"""From GRPO to DAPO one part at a time: KL off, clip-higher, token-level loss, dynamic sampling, overlong punishment.

Four updates a batch, as a clip does nothing on the first of them.

    grpo-jax sweep --config=sweeps/dapo_parts:tiny --workdir=runs/dapo_parts
"""

from grpo_jax.configs import dapo
from grpo_jax.configs.sweeps import base


def parts(scale: str) -> dict[str, base.Changes]:
    """List the changes of each part, in the order of the sweep."""
    return {
        "kl_off": {"objective.kl_coef": 0.0},
        "clip_higher": {"objective.clip_high": 0.28},
        "token_loss": {"objective.aggregation": "token_mean"},
        "dynamic_sampling": {"dynamic_sampling.enabled": True},
        "overlong": {"overlong.cache_share": dapo.get_config(scale).overlong.cache_share},
    }


def get_config(scale: str = "tiny"):
    config = base.get_config(scale)
    config.configs = ("grpo",)
    changes = {"learner.num_minibatches": 4}
    config.sets = {"": dict(changes)}
    for name, part in parts(scale).items():
        changes |= part
        config.sets[f"+{name}"] = dict(changes)
    return config
