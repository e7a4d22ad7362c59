"""GTPO taken apart on an embedded task: without its entropy weight, with statistics of the group, with the row's normaliser.

Beside it GRPO with and without KL (GTPO has none), and GRPO-S with both of its ratios.

    grpo-jax sweep --config=sweeps/gtpo_parts:maze --workdir=runs/gtpo_parts     (chain, countdown, maze, forks)
"""

from grpo_jax.configs import base as settings
from grpo_jax.configs.sweeps import base, tasks


def get_config(task: str = "maze"):
    config = tasks.get_config(task)
    config.configs, config.seeds = ("grpo",), tasks.seeds_for(task)
    gtpo = settings.changes_to("gtpo")
    no_weight, of_group = {"objective.entropy_weight": 0.0}, {"objective.stat_scope": "group"}
    parts = {
        "": {},
        "no_kl": {"objective.kl_coef": 0.0},
        "gtpo": gtpo,
        "gtpo-no_weight": {**gtpo, **no_weight},
        "gtpo-group": {**gtpo, **of_group},
        "gtpo-no_weight-group": {**gtpo, **no_weight, **of_group},
        **{name: settings.changes_to(name) for name in ("gtpo_geometric", "grpo_s", "grpo_s_geometric")},
    }
    config.sets = base.crossed(config.sets, parts)
    return config
