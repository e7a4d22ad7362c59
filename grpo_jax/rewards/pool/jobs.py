"""The jobs of one call to a scoring pool, and their results."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from grpo_jax.rewards.pool.serve import pack


class ScoreResult(NamedTuple):
    """scores: scorer -> float32[P, G]. is_error_PG, is_timeout_PG: bool, some scorer failed or ran out of time there."""

    scores: dict[str, np.ndarray]
    is_error_PG: np.ndarray
    is_timeout_PG: np.ndarray


class Job(NamedTuple):
    """A scorer and the completions it is asked about: row `p` from column `g` on, `num` of them."""

    scorer: str
    p: int
    g: int
    num: int


class JobBatch:
    """The jobs of one `score` call and what has become of them. waiting: indices into `jobs`; result: filled job by job."""

    def __init__(self, items: Sequence[Mapping[str, Any]], completions_PG: Sequence[Sequence[str]]) -> None:
        self.items, self.completions_PG = items, completions_PG
        self.shape = (len(items), len(completions_PG[0]) if len(completions_PG) else 0)
        self.jobs: list[Job] = []
        self.waiting: collections.deque[int] = collections.deque()
        self.num_left = 0
        self.num_of, self.num_done, self.num_timeouts = (collections.Counter[str]() for _ in range(3))  # by scorer
        self.result = ScoreResult({}, np.zeros(self.shape, bool), np.zeros(self.shape, bool))

    def add_jobs(self, is_batch: Mapping[str, bool]) -> None:
        """Queue the jobs of all scorers. is_batch: scorer -> True if it takes the completions of a prompt together."""
        P, G = self.shape
        sizes = {name: G if together else 1 for name, together in is_batch.items()}
        # Prompt by prompt, not scorer by scorer: the time limits of a scorer that hangs then pass while the others score.
        self.jobs = [Job(name, p, g, num) for p in range(P) for name, num in sizes.items() for g in range(0, G, num)]
        self.waiting.extend(range(len(self.jobs)))
        self.num_left = len(self.jobs)
        self.num_of.update(job.scorer for job in self.jobs)
        self.result.scores.update({name: np.zeros(self.shape, np.float32) for name in is_batch})

    def frame(self, index: int) -> bytes:
        """Pack a job for a worker."""
        job = self.jobs[index]
        return pack((job.scorer, dict(self.items[job.p]), list(self.completions_PG[job.p][job.g : job.g + job.num])))

    def finish(self, index: int, scores: Sequence[float] = (), *, is_error: bool = False, is_timeout: bool = False) -> None:
        """Write a job's result.

        Args:
          index: of the job. scores: one for each of its completions; empty: all are 0.
          is_error, is_timeout: why there are none.
        """
        name, p, g, num = self.jobs[index]
        columns = slice(g, g + num)
        self.result.scores[name][p, columns] = scores or 0.0
        self.result.is_error_PG[p, columns] |= is_error
        self.result.is_timeout_PG[p, columns] |= is_timeout
        self.num_done[name] += 1
        self.num_timeouts[name] += is_timeout
        self.num_left -= 1

    def give_up(self, name: str) -> None:
        """Count all jobs of a scorer that wait as timed out.

        They were never tried, so this is a guess; the metrics report it like the others.
        """
        given_up = [index for index in self.waiting if self.jobs[index].scorer == name]
        self.waiting = collections.deque(index for index in self.waiting if self.jobs[index].scorer != name)
        for index in given_up:
            self.finish(index, is_timeout=True)
