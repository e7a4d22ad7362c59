"""Scores completions in worker processes, so that a scorer may hang, crash or print without harming the run.

Workers are fresh interpreters (no fork: JAX is multithreaded) that get one job at a time, so every fault has one job to
be blamed on. A job is one completion and one scorer; for a scorer that takes them together, all completions of a prompt.
What a fault costs:

- A job has `time_limit_secs`; then its process is killed and it counts as a timeout.
- A worker that has been busy for more than a fiftieth of the limit counts as hung, and a spare worker starts while it is
  waited out. So hung jobs wait side by side, and a few of them cost a batch about one time limit together. There are at
  most N / 64 spare workers for a batch of N jobs, but no fewer than 4 and no more than 32.
- When more than 2 (num_workers + 4) jobs of a scorer, and more than a tenth of those done so far, have timed out, the
  rest of its jobs in the batch is counted as timed out unseen. A scorer that always hangs costs about three time limits a
  batch, and the other scorers nothing.
"""

from __future__ import annotations

import logging
import selectors
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from grpo_jax.config import ScoringConfig
from grpo_jax.errors import UserError
from grpo_jax.rewards.pool.jobs import JobBatch, ScoreResult
from grpo_jax.rewards.pool.worker import Worker

STARTUP_LIMIT_SECS = 120.0  # for importing the scorers: sympy on a busy machine takes 10 s
HUNG_FRACTION = 0.02  # of the time limit, after which a spare worker starts
MIN_SPARE_WORKERS, MAX_SPARE_WORKERS = 4, 32

_log = logging.getLogger(__name__)


class Scorer(NamedTuple):
    """function: "package.module:function" that this interpreter can import, see `grpo_jax.rewards.scorers`."""

    function: str
    settings: Mapping[str, Any]


class ScoringPool:
    """Worker processes that run some scorers. They start with the first batch, or `start`, and stay until `close` or exit.

    scorers: name -> Scorer. Raises UserError, from `start` and `score`, where one cannot be imported.
    """

    def __init__(self, scorers: Mapping[str, Scorer], config: ScoringConfig) -> None:
        self._scorers, self._config = dict(scorers), config
        self._is_batch: dict[str, bool] = {}  # known from the first worker that is ready
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._num_failed_starts = 0
        self._warned: set[str] = set()
        # To Linux, "dies with its parent" means with the thread that started it: so the pool has a thread for that.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        # Runs when `close` calls it, when the pool is forgotten, or when the interpreter exits.
        self._release = weakref.finalize(self, _end_all, self._workers, self._selector, self._starter)

    def start(self) -> None:
        """Wait until a worker has imported the scorers."""
        with self._lock:
            self._await_ready()

    def score(self, items: Sequence[Mapping[str, Any]], completions_PG: Sequence[Sequence[str]]) -> ScoreResult:
        """Score all completions of each item by every scorer.

        One whose scorer raised, crashed or returned no finite number is an error, one that ran out of time a timeout; both
        score 0, and so do the others of the group where the scorer takes them together. Raises UserError if a scorer
        cannot be imported or the pool is closed.
        """
        with self._lock:
            if not self._release.alive:
                raise UserError("the scoring pool is closed: build a new task to score again")
            batch = JobBatch(items, completions_PG)
            if not self._scorers or not all(batch.shape):
                batch.add_jobs(dict.fromkeys(self._scorers, False))
                return batch.result
            self._await_ready()
            batch.add_jobs(self._is_batch)
            try:
                self._run(batch)
            finally:
                # After an error or Ctrl-C some workers are still at jobs of this batch, and what they send would be taken for
                # results of the next. Of those without a job the spare ones go, those first that are not even ready.
                for worker in [worker for worker in self._workers if worker.index is not None]:
                    self._discard(worker)
                for worker in sorted(self._workers, key=lambda worker: not worker.is_ready)[self._config.num_workers :]:
                    self._discard(worker)
        return batch.result

    def close(self) -> None:
        """End all processes. Safe to call twice."""
        with self._lock:
            self._release()

    def _await_ready(self) -> None:
        """Start workers and wait until one has imported the scorers and said which of them take completions together."""
        nothing = JobBatch([], [])
        for worker in self._workers:
            worker.since = time.monotonic()  # one that is still starting was not listened to since the last batch
        while not self._is_batch:
            self._start_workers(self._config.num_workers, self._config.num_workers)
            self._listen(nothing)
            self._kill_overdue(nothing)

    def _run(self, batch: JobBatch) -> None:
        """Hand out jobs and collect results until none is left."""
        num_workers = self._config.num_workers
        max_workers = num_workers + min(MAX_SPARE_WORKERS, max(MIN_SPARE_WORKERS, len(batch.jobs) // 64))
        patience = 2 * (num_workers + MIN_SPARE_WORKERS)  # timeouts
        while batch.num_left:
            # Hand out before starting: what still waits then is what idle workers could not take, and only that is worth a new
            # process. Both come before listening, or the first wait would be for nobody.
            self._hand_out(batch)
            self._start_workers(len(batch.waiting), max_workers)
            self._listen(batch)
            self._kill_overdue(batch)  # after listening: a result that has come in time counts, however late it is read
            # The tenth keeps a scorer that is only now and then slow; the patience keeps one whose first jobs happen to hang.
            for name, num_timeouts in list(batch.num_timeouts.items()):
                if num_timeouts > max(patience, batch.num_done[name] // 10):
                    self._give_up(name, batch)

    def _give_up(self, name: str, batch: JobBatch) -> None:
        """Skip what is left of a scorer's jobs; workers that are at one count as hung and are ended."""
        if batch.num_done[name] == batch.num_of[name]:
            return
        batch.give_up(name)
        for worker in list(self._workers):
            if worker.index is not None and batch.jobs[worker.index].scorer == name:
                batch.finish(worker.index, is_timeout=True)
                self._discard(worker)

    def _kill_overdue(self, batch: JobBatch) -> None:
        """End workers whose job has run out of time. Raises UserError if importing the scorers takes too long."""
        now = time.monotonic()
        for worker in list(self._workers):
            secs = now - worker.since
            if not worker.is_ready and secs > STARTUP_LIMIT_SECS:
                raise UserError(f"{self._names()}: importing took more than {STARTUP_LIMIT_SECS} seconds")
            if worker.index is not None and secs >= self._config.time_limit_secs:
                self._warn_once(
                    batch.jobs[worker.index].scorer, f"ran into the limit of {self._config.time_limit_secs} seconds"
                )
                batch.finish(worker.index, is_timeout=True)
                self._discard(worker)

    def _hand_out(self, batch: JobBatch) -> None:
        """Give each idle worker a job."""
        for worker in [worker for worker in self._workers if worker.is_idle]:
            if not batch.waiting:
                return
            # The job leaves the queue once it has been sent: a worker that died idle has not seen it.
            index = batch.waiting[0]
            if worker.send(index, batch.frame(index)):
                batch.waiting.popleft()
            else:
                self._count_failed_start(self._discard(worker))

    def _start_workers(self, num_waiting: int, max_workers: int) -> None:
        """Start workers until as many are not hung as the pool should have, or as there are jobs for."""
        # Hung ones are replaced while they are waited out, so that a few of them do not take the pool's speed. Those that are
        # starting or idle will take a waiting job each, so they are subtracted: starting costs seconds of imports.
        hung_since = time.monotonic() - HUNG_FRACTION * self._config.time_limit_secs
        num_hung = sum(worker.index is not None and worker.since <= hung_since for worker in self._workers)
        num_coming = sum(worker.index is None for worker in self._workers)
        num_new = min(
            self._config.num_workers - (len(self._workers) - num_hung),
            num_waiting - num_coming,
            max_workers - len(self._workers),
        )
        scorers = {name: (scorer.function, scorer.settings) for name, scorer in self._scorers.items()}
        for _ in range(num_new):
            # In the starter's thread, which lives as long as the pool: a worker dies with the thread that started it.
            start = self._starter.submit(Worker, scorers, self._config.memory_limit_mb, self._selector)
            self._workers.append(start.result())

    def _listen(self, batch: JobBatch) -> None:
        """Wait for the next message, exit, or moment at which something has to be done about a worker; take what has come."""
        # A busy worker has two such moments: when it counts as hung and gets a spare beside it, and when its job is overdue. A
        # second at the latest, since a worker that starts has a limit too, which need not be met exactly.
        now = time.monotonic()
        moments = [now + 1.0]
        for worker in self._workers:
            if worker.index is not None:
                hung = worker.since + HUNG_FRACTION * self._config.time_limit_secs
                overdue = worker.since + self._config.time_limit_secs
                moments.append(hung if hung > now else overdue)
        for key, _ in self._selector.select(max(0.0, min(moments) - now)):
            # Both pipes of a worker may be in the list, and the first may have shown that it has ended.
            worker: Worker = key.data
            if worker not in self._workers:
                continue
            if key.events & selectors.EVENT_WRITE:
                worker.send_rest()
                continue
            try:
                message = worker.receive()
            except EOFError:
                self._on_worker_exit(worker, batch)
                continue
            if message is not None:
                self._on_message(worker, message, batch)

    def _on_message(self, worker: Worker, message: tuple[Any, str], batch: JobBatch) -> None:
        """Take a message: a worker's first one says if it could import the scorers, each further one is a result."""
        value, error = message
        if not worker.is_ready:
            if error:
                raise UserError(f"config.reward: cannot import {error}")
            self._is_batch, worker.is_ready = value, True
            return
        assert worker.index is not None
        self._num_failed_starts = 0
        if error:
            self._warn_once(batch.jobs[worker.index].scorer, error)
        batch.finish(worker.index, value, is_error=bool(error))
        worker.index = None

    def _on_worker_exit(self, worker: Worker, batch: JobBatch) -> None:
        """Remove a worker that ended by itself; if it had a job, that is an error."""
        exit_code = self._discard(worker)
        if worker.index is None:
            self._count_failed_start(exit_code)
        else:
            self._warn_once(batch.jobs[worker.index].scorer, f"ended its process, exit code {exit_code}")
            batch.finish(worker.index, is_error=True)

    def _count_failed_start(self, exit_code: int) -> None:
        """Count a worker that ended without a job. Raises UserError if too many do."""
        # One may be killed from outside. If all end, no job is to blame and starting them again would go on for ever.
        self._num_failed_starts += 1
        if self._num_failed_starts > 2 * self._config.num_workers + 2:
            raise UserError(f"{self._names()}: its processes end before they score, exit code {exit_code}")

    def _discard(self, worker: Worker) -> int:
        """End a worker and forget it; returns its exit code."""
        self._workers.remove(worker)
        return worker.kill()

    def _names(self) -> str:
        return "config.reward, " + ", ".join(scorer.function for scorer in self._scorers.values())

    def _warn_once(self, name: str, what: str) -> None:
        """Log a scorer's first failure."""
        if name not in self._warned:
            _log.warning("reward %s failed: %s (scored 0; further failures are only counted)", name, what)
        self._warned.add(name)


def _end_all(workers: list[Worker], selector: selectors.BaseSelector, starter: ThreadPoolExecutor) -> None:
    """Release all that a pool holds; no method of it, for a finalizer that refers to the pool would keep it alive."""
    while workers:
        workers.pop().kill()
    selector.close()
    starter.shutdown(wait=False)  # this may be running in the starter's own thread
