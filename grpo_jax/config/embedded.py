"""The embedded tasks: their settings, and the steps and tokens that a run of each takes unless the config says otherwise."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from typing import Any, TypeVar

from grpo_jax.knobs import knob

EMBEDDED = ("arithmetic", "chain", "countdown", "maze", "forks")
NUM_FILLERS = 8  # letters that task "forks" fills with
BY_TASK = -1  # of a field: what the task decides
T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ChainConfig:
    """Sums with written steps: 3+4+2= is answered by 3+4=7,7+2=9."""

    num_terms: int = knob(6, "numbers of a sum; a step for each but the first", at_least=2, at_most=32)
    max_term: int = knob(4, "largest of them; more of a sum is beyond ten then, where the teacher forgets to carry", at_least=1)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest right answer, stop token included."""
        sums = [len(str(self.max_term * number)) for number in range(1, self.num_terms + 1)]
        # Of each step the number before it, the term, the sum, and three signs; the last one's comma is the stop token.
        return sum(before + sums[0] + after + 3 for before, after in itertools.pairwise(sums))


@dataclasses.dataclass(frozen=True)
class CountdownConfig:
    """Numbers and a target: 03,05,09:07 is answered by 09-05=04,04+03=07, or any other way that uses each number once."""

    num_numbers: int = knob(3, "numbers to use, each once", at_least=2, at_most=6)
    max_number: int = knob(20, "largest of them; num_numbers * max_number is at most 99", at_least=2)

    @property
    def longest_answer(self) -> int:
        """Tokens of a right answer, stop token included: they are all as long."""
        return 9 * (self.num_numbers - 1)


@dataclasses.dataclass(frozen=True)
class MazeConfig:
    """A square of cells, some of them walls: any path from start to goal is right, however long."""

    side: int = knob(5, "cells along each side", at_least=3, at_most=7)
    num_walls: int = knob(7, "cells that no path may enter, given in the prompt", at_least=0)
    min_distance: int = knob(4, "steps from start to goal at the least", at_least=1)

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest path that the teacher shows, stop token included."""
        return 3 * self.side + 1


@dataclasses.dataclass(frozen=True)
class ForksConfig:
    """Digits, each to be told even (L) or odd (R) at a fork; what stands between two forks does not matter."""

    num_forks: int = knob(4, "k: decisive tokens of a completion", at_least=1, at_most=16)
    filler_tokens: int = knob(6, "before each fork", unit="tokens", at_least=0, at_most=64)
    filler_entropy: float = knob(
        1.0, f"of each of them, as the teacher draws it; at most log {NUM_FILLERS}", unit="nats", at_least=0, at_most=2.0794
    )
    hard_digits: int = knob(3, "the highest digits, that the teacher is careless about", at_least=0, at_most=10)

    @property
    def longest_answer(self) -> int:
        """Tokens of a right answer, stop token included: they are all as long."""
        return self.num_forks * (self.filler_tokens + 1) + 1


# Task -> (steps, supervised steps before them) in which the decoder of :tiny learns it.
STEPS = {"arithmetic": (800, 1200), "chain": (100, 1200), "countdown": (200, 1200), "maze": (150, 500), "forks": (100, 300)}


def budget_of(task: Any) -> int:
    """Return the completion tokens that suit a task. task: config.task."""
    if task.name not in EMBEDDED[1:]:
        return 6  # of sums; every scale for language models says its own
    # A third more than an answer takes, so that DAPO's punishment, which begins at three quarters, does not meet right ones.
    return math.ceil(getattr(task, task.name).longest_answer * 4 / 3)


def fill_by_task(config: T) -> T:
    """Return the config with the fields decided that are left to the task, and say which these are.

    Args:
      config: a Config; num_steps and warm_start.num_steps of -1 and rollout.max_completion_tokens of 0 are left to the task.
    """
    task, warm_start, rollout = (getattr(config, name) for name in ("task", "warm_start", "rollout"))
    num_steps, num_warm = STEPS.get(task.name, STEPS["arithmetic"])
    said = {}
    if config.num_steps == BY_TASK:  # type: ignore[attr-defined]
        said["num_steps"] = num_steps
        config = dataclasses.replace(config, num_steps=num_steps)  # type: ignore[type-var]
    if warm_start.num_steps == BY_TASK:
        said["warm_start.num_steps"] = num_warm
        config = dataclasses.replace(config, warm_start=dataclasses.replace(warm_start, num_steps=num_warm))  # type: ignore[type-var]
    if rollout.max_completion_tokens == 0:
        said["rollout.max_completion_tokens"] = budget = budget_of(task)
        config = dataclasses.replace(config, rollout=dataclasses.replace(rollout, max_completion_tokens=budget))  # type: ignore[type-var]
    if said and task.name in EMBEDDED[1:]:
        _log.info("task %r decides %s", task.name, ", ".join(f"config.{name} = {value}" for name, value in said.items()))
    return config
