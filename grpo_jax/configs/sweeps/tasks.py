"""The five variants on one embedded task of long completions, 10 seeds, small enough for two cores. After the colon: the task.

grpo-jax sweep --config=sweeps/tasks:forks --workdir=runs/forks        (chain, countdown, maze, forks; the control:)
grpo-jax sweep --config=sweeps/tasks:forks --set=shuffle_rewards=True --config.seeds="(0, 1, 2)" --workdir=runs/forks_shuffled
"""

from grpo_jax.configs.sweeps import variants

# 128 completions a step and 60 steps in calls of 20; four samples of each held-out prompt beside the greedy answer.
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
    "chain": {},
    "countdown": {},
    "maze": {},
    "forks": {"task.forks.filler_tokens": 2, "warm_start.batch_size": 64},
}


def get_config(task: str = "forks"):
    if task in TASKS:
        config = variants.get_config("tiny")
        config.sets = {"": {"task.name": task, **SMALL, **TASKS[task]}}
    else:  # a scale, for all four tasks
        config = variants.get_config(task)
        config.sets = {name: {"task.name": name} for name in TASKS}
    config.seeds = tuple(range(10))
    return config
