"""The reward that config.reward describes: each part is scored apart, then they are summed by weight."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from grpo_jax.config import RewardConfig, reward_expression
from grpo_jax.config.reward_expression import Part
from grpo_jax.errors import UserError
from grpo_jax.metrics import Mean
from grpo_jax.rewards.parts import settings_of
from grpo_jax.rewards.pool.pool import Scorer, ScoringPool
from grpo_jax.rewards.scorers import FUNCTIONS
from grpo_jax.types import Reward

PACKAGES = {"math_verify": "math_verify", "reasoning_gym": "reasoning_gym"}  # part -> what it imports, of the extra `tasks`


class RewardFunction:
    """The parts of both expressions of config.reward and the worker processes that score them.

    Args:
      config: config.reward. task_name: the task whose own reward an empty config.reward.task means.
      max_completion_tokens: the budget that `length` is a share of.
    Raises: UserError if a part's library is missing, or a user's function cannot be imported.
    """

    def __init__(self, config: RewardConfig, task_name: str, max_completion_tokens: int) -> None:
        self._task = reward_expression.parse(config.task or reward_expression.OF_TASK[task_name], "config.reward.task")
        self._shaping = reward_expression.parse(config.shaping, "config.reward.shaping")
        self._max_completion_tokens = max_completion_tokens
        settings = settings_of(config)
        # A part that both expressions name is scored once.
        self._names = tuple(dict.fromkeys(part.name for part in (*self._task, *self._shaping)))
        scorers = {}
        for name in self._names:
            if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
                raise UserError(f"config.reward: the part {name!r} needs a library: pip install 'grpo_jax[tasks]'")
            if name != "length":
                scorers[name] = Scorer(FUNCTIONS.get(name, name), settings.get(name, {}))
        self._pool = ScoringPool(scorers, config.scoring)
        if any(":" in name for name in self._names):
            self._pool.start()  # a mistake in the user's file should show before a model is loaded

    def __call__(
        self,
        items: Sequence[Mapping[str, Any]],
        completions_PG: Sequence[Sequence[str]],
        lengths_PG: Int[np.ndarray, "P G"],
    ) -> Reward:
        """Score the completions of each item.

        Args:
          items: P rows of data. completions_PG: G texts of each.
          lengths_PG: tokens, stop token included.
        Returns: a Reward of float32 arrays [P, G].
        """
        scored = self._pool.score(items, completions_PG)
        shape = np.shape(lengths_PG)  # (0, G) on a host that has no rows of its own
        scores = {name: each.reshape(shape) for name, each in scored.scores.items()}
        # Counted here and not in a worker: the number of tokens is known, while a text tells it only to its tokenizer.
        scores["length"] = 1 - np.asarray(lengths_PG, np.float32) / self._max_completion_tokens
        # Sums and counts, no means: on several hosts each has scored its own rows only.
        metrics = {
            "reward/errors": _mean(scored.is_error_PG),
            "reward/timeouts": _mean(scored.is_timeout_PG),
            **{f"reward/part/{name}": _mean(scores[name]) for name in self._names},
        }
        return Reward(_weighted_sum(self._task, scores), _weighted_sum(self._shaping, scores), metrics)

    def close(self) -> None:
        """End the scoring processes."""
        self._pool.close()


def _weighted_sum(parts: Sequence[Part], scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Add parts up in float32, the dtype that the update computes with."""
    total_PG = np.zeros_like(scores["length"])
    for part in parts:
        total_PG += np.float32(part.weight) * scores[part.name]
    return total_PG


def _mean(values_PG: np.ndarray) -> Mean:
    return Mean(np.float32(values_PG.sum()), np.float32(values_PG.size))
