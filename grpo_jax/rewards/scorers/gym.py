"""Scores of reasoning-gym's own generators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasoning_gym import create_dataset
from reasoning_gym.dataset import ProceduralDataset

from grpo_jax.rewards.scorers.answers import REASONING_TAGS, judged_text, tagged_answer

_generators: dict[str, ProceduralDataset] = {}  # kept, since some load word lists when they are built


def reasoning_gym_score(completion: str, item: dict[str, Any], *, reasoning_tags: Sequence[str] = REASONING_TAGS) -> float:
    """Score an answer by `score_answer` of the item's generator, in [0, 1].

    The answer is the text inside the last <answer>...</answer> behind the reasoning, or all of that text; none earns 0.

    Args:
      completion: the text. item: what the generator returned, and `generator` (its name) and `settings`.
      reasoning_tags: what stands between them is no answer.
    Returns: 1.0 for the generator's own answer, else what the generator says.
    """
    text = judged_text(completion, item, reasoning_tags)
    if text is None:
        return 0.0
    answer = tagged_answer(text)
    if answer is None:
        answer = text.strip()
    if not answer:
        return 0.0  # some generators pay a little for any answer
    if answer == str(item["answer"]).strip():
        return 1.0
    key = f"{item['generator']} {item['settings']!r}"
    if key not in _generators:
        _generators[key] = create_dataset(item["generator"], **item["settings"])
    return _generators[key].score_answer(answer, item)
