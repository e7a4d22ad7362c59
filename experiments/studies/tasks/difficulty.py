"""Held-out success right after the warm start, by task and settings, and the seconds that it took: one CSV line each.

python -m experiments.studies.tasks.difficulty > experiments/studies/tasks/difficulty.csv
"""

import argparse
import csv
import sys
import time

import jax

from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.training.run import make_run

# Task -> settings, from hard to easy.
SETTINGS = {
    "chain": [{"task.chain.num_terms": 9}, {}, {"warm_start.label_noise": 0.2}],
    "countdown": [
        {},
        {"warm_start.label_noise": 0.4},
        {
            "task.countdown.num_numbers": 2,
            "task.countdown.max_number": 40,
            "warm_start.label_noise": 0.1,
            "warm_start.num_steps": 2400,
        },
    ],
    "maze": [
        {"task.maze.side": 6, "task.maze.min_distance": 6, "warm_start.label_noise": 1.0},
        {},
        {"task.maze.side": 4, "task.maze.num_walls": 3, "task.maze.min_distance": 2, "warm_start.label_noise": 0.1},
    ],
    "forks": [
        {"task.forks.hard_digits": 5},
        {},
        {"task.forks.hard_digits": 1},
        {"warm_start.label_noise": 0.2, "warm_start.num_steps": 900},
    ],
}


def main():
    """Print the CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    args = parser.parse_args()
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["task", "changes", "greedy", "mean@4", "secs"])
    for task in args.tasks:
        for changes in SETTINGS[task]:
            raw = base.get_config("tiny", "grpo")
            raw.update_from_flattened_dict({"task.name": task, "eval.num_samples": 4, "mesh.data": 1, **changes})
            began = time.monotonic()
            run = make_run(parse_config(raw))
            policy = jax.block_until_ready(run.initial_state().policy)
            secs = time.monotonic() - began
            found = run.evaluate(policy)
            words = " ".join(f"{field}={value}" for field, value in changes.items()) or "as they are"
            writer.writerow([task, words, *(f"{found[name].value:.3f}" for name in ("success", "mean@4")), f"{secs:.0f}"])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
