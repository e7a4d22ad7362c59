"""Scores of reasoning-gym's own generators."""

from __future__ import annotations

from typing import Any

from reasoning_gym import create_dataset
from reasoning_gym.dataset import ProceduralDataset

from grpo_jax.rewards.scorers.answers import tagged_answer

_generators: dict[str, ProceduralDataset] = {}  # kept, since some load word lists when they are built


def reasoning_gym_score(completion: str, item: dict[str, Any]) -> float:
    """Score an answer by `score_answer` of the item's generator, in [0, 1].

    item: what the generator returned, and `generator` (its name) and `settings`.
    The answer is the text inside the last <answer>...</answer>, or the stripped completion if there is none.
    """
    key = f"{item['generator']} {item['settings']!r}"
    if key not in _generators:
        _generators[key] = create_dataset(item["generator"], **item["settings"])
    answer = tagged_answer(completion)
    if answer is None:
        answer = completion.strip()
    return _generators[key].score_answer(answer, item)
