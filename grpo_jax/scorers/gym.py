"""What reasoning-gym says about an answer."""

from __future__ import annotations

from typing import Any

from reasoning_gym import create_dataset
from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.utils import extract_answer

_generators: dict[str, ProceduralDataset] = {}  # kept, since some load word lists when they are built


def reasoning_gym_score(item: dict[str, Any], completion: str) -> float:
    """`score_answer` of the item's generator, in [0, 1].

    item: `dataset` (generator name), `params` (its settings), `entry` (what the generator returned).
    The answer is the text inside the last <answer>...</answer>, or the stripped completion if there is none.
    """
    key = f"{item['dataset']} {item['params']!r}"
    if key not in _generators:
        _generators[key] = create_dataset(item["dataset"], **item["params"])
    answer = extract_answer(completion)
    return _generators[key].score_answer(completion.strip() if answer is None else answer, item["entry"])
