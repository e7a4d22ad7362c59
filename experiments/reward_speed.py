"""Measure how many answers a second a reward scores: python -m experiments.reward_speed --config=configs/grpo.py:tiny

--config.reward.* as for training, on made-up answers to made-up sums (math_verify if config.reward.task is empty).
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np

from grpo_jax.rewards.reward_function import RewardFunction
from grpo_jax.tools import cli

NUM_PROMPTS, GROUP_SIZE = 250, 8
FORMS = (
    "Adding {a} and {b} we get \\boxed{{{c}}}.",
    "{a} + {b} = {c}\n#### {c}",
    "<think>{a} + {b}</think><answer>{c}</answer>",
    "So $\\frac{{{a}}}{{7}} + \\frac{{{b}}}{{7}} = \\frac{{{c}}}{{7}}$, that is {c} sevenths, and the sum is ${c}$.",
)


def main() -> None:
    """Run the command: score made-up answers, and say how fast it went."""
    config = cli.config_from_flags()
    reward = config.reward
    if not reward.task:
        reward = dataclasses.replace(reward, task="math_verify")
    function = RewardFunction(reward, config.task.name, config.rollout.max_completion_tokens)
    # Every group has all forms, right and wrong: parsers take longer for some than for others, and the mean is of the mixture.
    rng = np.random.default_rng(0)
    items, completions_PG = [], []
    for a, b in rng.integers(100, 10_000, (NUM_PROMPTS, 2)).tolist():
        items.append({"answer": str(a + b)})
        wrong_G = rng.integers(0, 2, GROUP_SIZE).tolist()
        completions_PG.append([FORMS[g % len(FORMS)].format(a=a, b=b, c=a + b + wrong) for g, wrong in enumerate(wrong_G)])
    lengths_PG = np.ones((NUM_PROMPTS, GROUP_SIZE))
    # The first, untimed call starts the processes, which import their libraries: seconds that a run spends once.
    try:
        function(items[:8], completions_PG[:8], lengths_PG[:8])
        began = time.monotonic()
        scored = function(items, completions_PG, lengths_PG)
        secs = time.monotonic() - began
    finally:
        function.close()
    num = lengths_PG.size
    print(f"{num} answers in {secs:.2f} s with {reward.scoring.num_workers} workers: {num / secs:.0f} answers/s")
    print(", ".join(f"{name} {float(metric.value()):.3f}" for name, metric in scored.metrics.items()))


if __name__ == "__main__":
    cli.run(main)
