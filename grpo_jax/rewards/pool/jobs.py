"""The jobs of one call to a scoring pool, and their results."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from grpo_jax.rewards.pool.protocol import FAILED, pack_request

# What became of a completion under one scorer.
SCORED, ERROR, TIMEOUT, ABSTAINED, NOT_ASKED = range(5)


@dataclasses.dataclass
class ScoreResult:
    """Scores of all completions.

    scores: scorer -> float32[P, G]; 0 where there is none. outcomes: scorer -> int8[P, G], SCORED, ERROR, TIMEOUT,
    ABSTAINED or NOT_ASKED. failures: scorer -> its first error in this call, one line and the traceback behind it.
    """

    shape: tuple[int, int]
    scores: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    outcomes: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_error_PG(self) -> np.ndarray:
        """Some scorer failed."""
        return self.is_any(ERROR)

    @property
    def is_timeout_PG(self) -> np.ndarray:
        """Some scorer ran out of time."""
        return self.is_any(TIMEOUT)

    @property
    def is_abstained_PG(self) -> np.ndarray:
        """Some scorer had no opinion."""
        return self.is_any(ABSTAINED)

    def is_any(self, outcome: int) -> np.ndarray:
        """Tell for each completion if this became of it under some scorer."""
        found_PG = np.zeros(self.shape, bool)
        for outcomes_PG in self.outcomes.values():
            found_PG |= outcomes_PG == outcome
        return found_PG


class Context(NamedTuple):
    """Things that scorers may ask for beside the item. prompts_P: text or chats. ids_PG: tokens. step: updates done."""

    prompts_P: Sequence[Any] | None = None
    ids_PG: Sequence[Sequence[Sequence[int]]] | None = None
    step: int = 0


class Facts(NamedTuple):
    """A worker's word on a scorer. is_group: it takes the completions of a prompt together. line: how it is called."""

    is_group: bool
    wants_prompt: bool
    wants_ids: bool
    settings: tuple[str, ...]
    line: str


class Job(NamedTuple):
    """A scorer and the completions it is asked about: row `p` from column `g` on, `num` of them."""

    scorer: str
    p: int
    g: int
    num: int


class JobBatch:
    """The jobs of one `score` call and what has become of them. waiting: indices into `jobs`; result: filled job by job."""

    def __init__(
        self, items: Sequence[Mapping[str, Any]], completions_PG: Sequence[Sequence[str]], context: Context | None = None
    ) -> None:
        self.items, self.completions_PG, self.context = items, completions_PG, context or Context()
        self.shape = (len(items), len(completions_PG[0]) if len(completions_PG) else 0)
        self.jobs: list[Job] = []
        self.waiting: collections.deque[int] = collections.deque()
        self.retried: set[int] = set()
        self.num_left = 0
        self.num_of, self.num_done, self.num_timeouts = (collections.Counter[str]() for _ in range(3))  # by scorer
        self.facts: Mapping[str, Facts] = {}
        self.result = ScoreResult(self.shape)

    def add_scores_of(self, names: Sequence[str]) -> None:
        """Make room for the scores of these scorers."""
        self.result.scores.update({name: np.zeros(self.shape, np.float32) for name in names})
        self.result.outcomes.update({name: np.full(self.shape, SCORED, np.int8) for name in names})

    def add_jobs(self, facts: Mapping[str, Facts], asked: Mapping[str, Bool[np.ndarray, " P"]] | None = None) -> None:
        """Queue the jobs of all scorers.

        Args:
          facts: of each scorer. asked: scorer -> rows that it is asked about; None: all scorers about all rows.
        """
        P, G = self.shape
        self.facts = facts
        sizes = {name: G if each.is_group else 1 for name, each in facts.items()}
        # Prompt by prompt, not scorer by scorer: the time limits of a scorer that hangs then pass while the others score.
        pairs = [(p, name) for p in range(P) for name in sizes if asked is None or asked[name][p]]
        self.jobs = [Job(name, p, g, sizes[name]) for p, name in pairs for g in range(0, G, sizes[name])]
        self.waiting.extend(range(len(self.jobs)))
        self.num_left = len(self.jobs)
        self.num_of.update(job.scorer for job in self.jobs)
        self.add_scores_of(list(facts))
        for name, outcomes_PG in self.result.outcomes.items():
            if asked is not None:
                outcomes_PG[~asked[name]] = NOT_ASKED

    def frame(self, index: int, number: int, num_jobs: int) -> bytes:
        """Pack jobs for a worker. index: of the first. number: that its reply must carry. num_jobs: from `num_alike`."""
        name, p, g, num = self.jobs[index]
        num *= num_jobs
        facts, context = self.facts[name], self.context
        prompt = ids = None
        if facts.wants_prompt and context.prompts_P is not None:
            prompt = context.prompts_P[p]
        if facts.wants_ids and context.ids_PG is not None:
            ids = list(context.ids_PG[p][g : g + num])
        # A Request, as a plain tuple: a class in a pickle is looked up by its name every time.
        request = (dict(self.items[p]), list(self.completions_PG[p][g : g + num]), prompt, ids, context.step)
        return pack_request(number, (name, request), num_jobs)

    def num_alike(self, index: int, most: int) -> int:
        """Count the jobs from this one on that wait in a row and are of its scorer and prompt: they can be sent together."""
        first, num = self.jobs[index], 1
        if index in self.retried or self.waiting[0] != index:
            return 1
        for other in itertools.islice(self.waiting, 1, most):
            job = self.jobs[other]
            if other != index + num or job.p != first.p or job.scorer != first.scorer or other in self.retried:
                break
            num += 1
        return num

    def next_for(self, *, is_fresh: bool) -> int | None:
        """Find the job that a worker should do, which stays in the queue; None if there is none for it.

        is_fresh: the worker had no job yet. Only such a one gets what is tried again: if it ends too, the job is to blame.
        """
        return next((index for index in self.waiting if is_fresh or index not in self.retried), None)

    def take_out(self, index: int, num: int) -> None:
        """Take so many jobs from this one on out of the queue, for a worker has them now."""
        for each in range(index, index + num):
            self.waiting.remove(each)

    def take_back(self, indices: Sequence[int]) -> None:
        """Queue jobs that a worker was given and has not begun."""
        self.waiting.extendleft(reversed(indices))

    def retry(self, index: int) -> bool:
        """Put a job back to be done by another worker, once. False if it has been."""
        if index in self.retried:
            return False
        self.retried.add(index)
        self.waiting.appendleft(index)
        return True

    def finish(self, index: int, scores: Sequence[float] = (), outcome: int = SCORED, failure: str = "") -> None:
        """Write a job's result.

        Args:
          index: of the job.
          scores: one for each of its completions, NaN where it abstained, FAILED where it failed; empty: none has one.
          outcome: why there are none. failure: the error, if it was one.
        """
        name, p, g, num = self.jobs[index]
        if outcome != SCORED:
            self.result.outcomes[name][p, g : g + num] = outcome
        # One by one and not as arrays: most jobs have one completion.
        for column, score in enumerate(scores, g):
            if math.isnan(score):
                self.result.outcomes[name][p, column] = ABSTAINED
            elif score == FAILED:
                self.result.outcomes[name][p, column] = ERROR
            else:
                self.result.scores[name][p, column] = score
        if failure:
            self.result.failures.setdefault(name, failure)
        self.num_done[name] += 1
        self.num_timeouts[name] += outcome == TIMEOUT
        self.num_left -= 1

    def give_up(self, name: str) -> None:
        """Count all jobs of a scorer that wait as timed out.

        They were never tried, so this is a guess; the metrics report it like the others.
        """
        given_up = [index for index in self.waiting if self.jobs[index].scorer == name]
        self.waiting = collections.deque(index for index in self.waiting if self.jobs[index].scorer != name)
        for index in given_up:
            self.finish(index, outcome=TIMEOUT)
