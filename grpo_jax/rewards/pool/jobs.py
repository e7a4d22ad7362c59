"""What a scoring pool is asked in one call, cut into jobs, and what has become of them."""

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
    """The jobs of one `score` call and what has become of them."""

    def __init__(self, items: Sequence[Mapping[str, Any]], completions_PG: Sequence[Sequence[str]]) -> None:
        self.items, self.completions_PG = items, completions_PG
        self.shape = (len(items), len(completions_PG[0]) if len(completions_PG) else 0)
        self.jobs: list[Job] = []
        self.waiting: collections.deque[int] = collections.deque()
        self.num_left = 0
        self.num_of, self.num_done, self.num_timeouts = (collections.Counter[str]() for _ in range(3))  # by scorer
        self.judged = ScoreResult({}, np.zeros(self.shape, bool), np.zeros(self.shape, bool))

    def add_jobs(self, is_batch: Mapping[str, bool]) -> None:
        """is_batch: scorer -> whether it takes the completions of a prompt together."""
        P, G = self.shape
        sizes = {name: G if together else 1 for name, together in is_batch.items()}
        self.jobs = [Job(name, p, g, num) for p in range(P) for name, num in sizes.items() for g in range(0, G, num)]
        self.waiting.extend(range(len(self.jobs)))
        self.num_left = len(self.jobs)
        self.num_of.update(job.scorer for job in self.jobs)
        self.judged.scores.update({name: np.zeros(self.shape, np.float32) for name in is_batch})

    def frame(self, index: int) -> bytes:
        job = self.jobs[index]
        return pack((job.scorer, dict(self.items[job.p]), list(self.completions_PG[job.p][job.g : job.g + job.num])))

    def finish(self, index: int, scores: Sequence[float] = (), *, is_error: bool = False, is_timeout: bool = False) -> None:
        """No scores: 0 for all of the job's completions."""
        name, p, g, num = self.jobs[index]
        columns = slice(g, g + num)
        self.judged.scores[name][p, columns] = scores or 0.0
        self.judged.is_error_PG[p, columns] |= is_error
        self.judged.is_timeout_PG[p, columns] |= is_timeout
        self.num_done[name] += 1
        self.num_timeouts[name] += is_timeout
        self.num_left -= 1

    def give_up(self, name: str) -> None:
        """Count all jobs of a scorer that wait as timed out."""
        given_up = [index for index in self.waiting if self.jobs[index].scorer == name]
        self.waiting = collections.deque(index for index in self.waiting if self.jobs[index].scorer != name)
        for index in given_up:
            self.finish(index, is_timeout=True)
