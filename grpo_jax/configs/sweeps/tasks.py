"""The five variants on one embedded task of long completions, small enough for two cores. After the colon: the task.

grpo-jax sweep --config=sweeps/tasks:forks --workdir=runs/forks                  (chain, countdown, maze, forks; 10 seeds)
grpo-jax sweep --config=sweeps/tasks:forks_control --workdir=runs/forks_control  (3 seeds; the same, and with rewards shuffled)
"""

from grpo_jax.configs.sweeps import base, variants

# 128 completions a step, in calls of 20; four samples of each held-out prompt beside the greedy answer. All five variants learn
# at these settings (experiments/studies/tasks). The learning rates of "chain" and "forks" are low because what noise alone does
# grows with them (docs/tasks.md).
SMALL = {
    "num_steps": 60,
    "steps_per_call": 20,
    "eval_every": 20,
    "eval.num_samples": 4,
    "checkpoint.every": 60,
    "log.completions_every": 20,
    "rollout.num_prompts": 16,
}
TASKS = {
    "chain": {"optimizer.learning_rate": 3e-4},
    "countdown": {"num_steps": 120, "checkpoint.every": 120},
    "maze": {"num_steps": 100, "checkpoint.every": 100},
    "forks": {
        "task.forks.filler_tokens": 2,
        "warm_start.num_steps": 600,
        "warm_start.batch_size": 64,
        "num_steps": 120,
        "checkpoint.every": 120,
        "optimizer.learning_rate": 1e-4,
    },
}
CONTROL = "_control"
SHORT = {"eval_every": 0, "log.completions_every": 0}  # before and after: evaluations took longer than the steps


def seeds_for(task: str) -> tuple[int, ...]:
    """Return seeds that can show something about a dozen settings: of one task, or of a scale's four tasks together."""
    return tuple(range(10 if task in TASKS else 12))


def get_config(task: str = "forks"):
    name = task.removesuffix(CONTROL)
    if name in TASKS:
        config = variants.get_config("tiny")
        config.sets = {"": {"task.name": name, **SMALL, **TASKS[name]}}
    else:  # a scale, for all four tasks
        config = variants.get_config(name)
        config.sets = {each: {"task.name": each} for each in TASKS}
    config.seeds = tuple(range(10))
    if task.endswith(CONTROL):
        config.sets = base.crossed(config.sets, {"": SHORT, "shuffled": {**SHORT, "shuffle_rewards": True}})
        config.seeds = (0, 1, 2)
    return config
