"""Questions from the generators of reasoning-gym (arXiv:2505.24760), one of them or a mixture."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
from typing import Any

import numpy as np

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks.questions import Question, Source, choose_distinct, exclude
from grpo_jax.tasks.row_rewards import RowRewards


def load(config: TaskConfig, num_eval: int, rewards: RowRewards | None = None) -> list[Source]:
    """Generate `num_train` training and `num_eval` held-out questions, shared among the generators by their weights.

    The two come from seeds of their own, the same in every run; a training question that is also held out is left out.
    A few generators (isomorphic_strings, polynomial_multiplication, ransom_note, word_ladder in 0.1.25) iterate over
    sets: they give the same questions in another process, as in a resumed run, only under the same PYTHONHASHSEED.

    Args:
      config: config.task. num_eval: questions to hold out. rewards: not used, generators know their answers.
    Returns: one source, of a stream for each generator.
    Raises: UserError for an unknown generator, for settings it does not take, and if nothing is left to train on.
    """
    del rewards
    if importlib.util.find_spec("reasoning_gym") is None:
        raise UserError("config.task.name = 'reasoning_gym' needs reasoning-gym: pip install 'grpo_jax[tasks]'")
    gym = config.reasoning_gym
    weights = gym.weights or (1.0,) * len(gym.datasets)
    settings = json.loads(gym.params or "{}")
    train, held_out = [], []
    for name, num, num_held in zip(gym.datasets, shares(weights, gym.num_train), shares(weights, num_eval), strict=True):
        held_out += _generate(name, settings.get(name) or {}, "held out", num_held)
        train += _generate(name, settings.get(name) or {}, "train", num)
    # Generators repeat themselves: a question may be held out twice, and be among the training ones too.
    held_out = choose_distinct(held_out, num_eval)
    train = exclude(train, held_out)
    # A generator that has nothing left would be missing from the mixture, and the others' weights would mean something else.
    missing = [name for name in gym.datasets if name not in {question.stream for question in train}]
    if missing:
        raise UserError(
            f"config.task.reasoning_gym.datasets: no training question of {missing[0]} is left; "
            "raise num_train, lower config.eval.num_prompts, or set params for which there are more questions"
        )
    streams = dict(zip(gym.datasets, weights, strict=True))
    return [Source(train, held_out, num_eval, streams, ", ".join(gym.datasets))]


def shares(weights: tuple[float, ...], total: int) -> list[int]:
    """Divide `total` by weight into whole numbers."""
    # Rounded ends, not rounded shares: those need not add up to the total.
    ends = np.round(np.cumsum(weights) / sum(weights) * total)
    return np.diff(ends, prepend=0).astype(int).tolist()


def _generate(name: str, params: dict[str, Any], purpose: str, size: int) -> list[Question]:
    """Generate `size` questions, each with all that `grpo_jax.rewards.scorers.gym` needs."""
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4) or sorted(DATASETS)[:3]
        raise UserError(f"config.task.reasoning_gym.datasets: no generator {name!r}; there are {', '.join(close)}, ...")
    reserved = next((key for key in ("seed", "size") if key in params), None)
    if reserved:
        raise UserError(f"config.task.reasoning_gym.params.{name}.{reserved}: set by the library; use num_train")
    if not size:
        return []
    seed = _seed(purpose)
    try:
        entries = list(create_dataset(name, **params, seed=seed, size=size))
    # Each generator checks its settings in its own way, if it does: by an assertion, or by failing somewhere later.
    except (TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"config.task.reasoning_gym.params = {params!r}: {name} does not take them: {reason[0]}") from error
    settings = {**params, "seed": seed, "size": 1}  # a scorer need not generate anything
    return [
        Question(
            ({"role": "user", "content": entry["question"]},),
            _solution(entry["answer"]),
            {**entry, "generator": name, "settings": settings},
            name,
            f"{name}, question {number}",
        )
        for number, entry in enumerate(entries)
    ]


def _solution(answer: Any) -> str:
    """Return an answer as a worked example shows it; empty if the generator gives none, but only tells right from wrong."""
    return "" if answer is None else str(answer)


def _seed(purpose: str) -> int:
    """Hash a purpose into a seed."""
    # Generators draw question i from seed + i: neighbouring seeds would share most of their questions.
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "little") % 2**31
