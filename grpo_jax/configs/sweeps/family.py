"""Ten objectives of the wider family against GRPO, on one embedded task; four updates a batch, so that ratios and clips act.

Each as its paper has it, its KL too; "no_kl" is GRPO without its own, for most of the ten have none.

    grpo-jax sweep --config=sweeps/family:countdown --workdir=runs/family        (chain, countdown, maze, forks)
"""

from grpo_jax.configs import base as settings
from grpo_jax.configs.sweeps import base, tasks

NAMES = ("cispo", "dppo_tv", "gpg", "gspo", "lite_ppo", "maxrl", "opo", "pass_at_k", "rloo", "sapo")


def get_config(task: str = "countdown"):
    config = tasks.get_config(task)
    config.configs = ("grpo",)
    config.seeds = tasks.seeds_for(task)
    objectives = {"": {}, "no_kl": {"objective.kl_coef": 0.0}, **{name: settings.changes_to(name) for name in NAMES}}
    config.sets = base.crossed(base.crossed(config.sets, {"": {"learner.num_minibatches": 4}}), objectives)
    return config
