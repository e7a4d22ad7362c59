"""GRPO with a sampler that is not the policy: batches some steps old, or numbers in bfloat16; with and without corrections.

grpo-jax sweep --config=sweeps/stale:countdown --workdir=runs/stale        (chain, countdown, maze, forks)

"ratio" leaves it to the clipped ratio over the sampler's own log-probs; "none" corrects nothing; the others weigh by the policy
before the update over the sampler (docs/variants.md, "Truncated importance sampling").
"""

from grpo_jax.configs.sweeps import base, tasks

CORRECTIONS = {
    "ratio": {"learner.old_logp": "sampler"},
    "none": {"learner.old_logp": "learner"},
    "tis": {"learner.importance_cap": 2.0},
    "icepop": {"learner.importance_cap": 5.0, "learner.importance_floor": 0.5, "learner.importance_outside": "mask"},
    "sequence_mis": {
        "learner.importance_cap": 3.0,
        "learner.importance_level": "sequence",
        "learner.importance_outside": "mask",
    },
}


def get_config(task: str = "countdown"):
    config = tasks.get_config(task)
    config.configs = ("grpo",)
    config.seeds = tasks.seeds_for(task)
    coarse = {"bfloat16": {"model.dtype": "bfloat16"}}
    sets = {"": {}, "async=1-ratio": {"async_steps": 1, **CORRECTIONS["ratio"]}}
    sets |= base.crossed({"async=4": {"async_steps": 4}}, CORRECTIONS)
    sets |= base.crossed(coarse, {name: CORRECTIONS[name] for name in ("ratio", "none", "tis")})
    config.sets = base.crossed(config.sets, sets)
    return config
