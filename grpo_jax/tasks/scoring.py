"""Scores completions in worker processes, so that a scorer may hang, crash or print without harming the run.

Workers are fresh interpreters (no fork: JAX is multithreaded) that get one item at a time, so every fault has one item
to be blamed on. What a fault costs:

- An item has `time_limit_secs`; then its process is killed and it counts as a timeout.
- A worker busy for more than a tenth of the limit is taken for hung, and a stand-in starts while it is waited out. So
  hung items wait side by side, and a few of them cost a batch about one time limit together. There are at most
  N / 64 stand-ins for a batch of N items, but no fewer than 4 and no more than 32.
- When more than 2 (num_workers + 4) items, and more than a tenth of those scored so far, have timed out, the rest of
  the batch is counted as timed out unseen. A scorer that always hangs costs about three time limits a batch.
"""

from __future__ import annotations

import collections
import logging
import math
import selectors
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.scorers.serve import pack
from grpo_jax.tasks.scoring_worker import Worker

STARTUP_LIMIT_SECS = 120.0  # for importing the scorer: sympy on a busy machine takes 10 s
HUNG_FRACTION = 0.1  # of the time limit, after which a stand-in starts
MIN_STAND_INS, MAX_STAND_INS = 4, 32

_log = logging.getLogger(__name__)


class _Batch:
    """The items of one `score` call and what has become of them."""

    def __init__(self, items: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> None:
        self.items, self.completions = items, completions
        self.waiting = collections.deque(range(len(items)))
        self.scores = np.zeros(len(items), np.float32)
        self.num_done = self.num_errors = self.num_timeouts = 0

    def finish(self, index: int, score: float) -> None:
        self.scores[index] = score
        self.num_done += 1

    def give_up(self) -> None:
        """Count all that is not scored as timed out."""
        self.num_timeouts += len(self.items) - self.num_done
        self.num_done = len(self.items)


class ScoringPool:
    """Worker processes that run one scorer. They start with the first batch and stay until `close` or exit.

    scorer: "package.module:function", a `function(item: dict, completion: str) -> float` that this interpreter can
    import. num_workers: processes. time_limit_secs: what one item may take, seconds.
    Raises UserError where one of them cannot be (here), or where the scorer cannot be imported (in `score`).
    """

    def __init__(self, scorer: str, num_workers: int, time_limit_secs: float) -> None:
        module, _, function = scorer.partition(":")
        if not module or not function.isidentifier():
            raise UserError(f"scorer {scorer!r}: expected 'package.module:function'")
        if num_workers < 1:
            raise UserError(f"task.scoring.num_workers = {num_workers}: at least 1 process is needed")
        if not 0 < time_limit_secs < math.inf:
            raise UserError(f"task.scoring.time_limit_secs = {time_limit_secs}: must be a positive number of seconds")
        self._scorer, self._num_workers, self._time_limit_secs = scorer, num_workers, time_limit_secs
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._num_vain_starts = 0
        self._is_quiet = False
        # To Linux, "dies with its parent" means with the thread that started it: so the pool has a thread for that.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        # Runs when `close` calls it, when the pool is forgotten, or when the interpreter exits.
        self._release = weakref.finalize(self, _end_all, self._workers, self._selector, self._starter)

    def score(self, items: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> tuple[np.ndarray, int, int]:
        """Score completion i against item i.

        Returns: (scores, num_errors, num_timeouts); scores is float32[N], in the order given.
        An item whose scorer raised, crashed or returned no finite number is an error, one that ran out of time a
        timeout; both score 0. Raises UserError if the scorer cannot be imported or the pool is closed.
        """
        if len(items) != len(completions):
            raise ValueError(f"{len(items)} items for {len(completions)} completions")
        with self._lock:
            if not self._release.alive:
                raise UserError("the scoring pool is closed: build a new task to score again")
            batch = _Batch(items, completions)
            try:
                self._run(batch)
            finally:
                for worker in [worker for worker in self._workers if worker.index is not None]:
                    self._discard(worker)
                for worker in sorted(self._workers, key=lambda worker: not worker.is_ready)[self._num_workers :]:
                    self._discard(worker)
        return batch.scores, batch.num_errors, batch.num_timeouts

    def close(self) -> None:
        """End all processes. Safe to call twice."""
        with self._lock:
            self._release()

    def _run(self, batch: _Batch) -> None:
        num_items = len(batch.items)
        for worker in self._workers:
            worker.since = time.monotonic()  # one that is still starting was not listened to since the last batch
        max_workers = self._num_workers + min(MAX_STAND_INS, max(MIN_STAND_INS, num_items // 64))
        patience = 2 * (self._num_workers + MIN_STAND_INS)  # timeouts
        while batch.num_done < num_items:
            self._hand_out(batch)
            self._start_workers(len(batch.waiting), max_workers)
            self._listen(batch)
            self._kill_overdue(batch)  # after listening: a result that has come in time counts, however late it is read
            if batch.num_timeouts > max(patience, batch.num_done // 10):
                _log.warning("%s timed out on %d items: skipping the batch's rest", self._scorer, batch.num_timeouts)
                batch.give_up()

    def _kill_overdue(self, batch: _Batch) -> None:
        now = time.monotonic()
        for worker in list(self._workers):
            secs = now - worker.since
            if not worker.is_ready and secs > STARTUP_LIMIT_SECS:
                raise UserError(f"scorer {self._scorer!r}: importing it took more than {STARTUP_LIMIT_SECS} seconds")
            if worker.index is not None and secs >= self._time_limit_secs:
                self._warn_once(f"ran into the limit of {self._time_limit_secs} seconds")
                batch.num_timeouts += 1
                batch.finish(worker.index, 0.0)
                self._discard(worker)

    def _hand_out(self, batch: _Batch) -> None:
        for worker in [worker for worker in self._workers if worker.is_idle]:
            if not batch.waiting:
                return
            index = batch.waiting[0]
            if worker.send(index, pack((batch.items[index], batch.completions[index]))):
                batch.waiting.popleft()
            else:
                self._start_was_vain(self._discard(worker))

    def _start_workers(self, num_waiting: int, max_workers: int) -> None:
        """Have as many workers that are not hung as the pool should have, or as there are items for."""
        hung_since = time.monotonic() - HUNG_FRACTION * self._time_limit_secs
        num_hung = sum(worker.index is not None and worker.since <= hung_since for worker in self._workers)
        num_coming = sum(worker.index is None for worker in self._workers)
        num_new = min(
            self._num_workers - (len(self._workers) - num_hung),
            num_waiting - num_coming,
            max_workers - len(self._workers),
        )
        for _ in range(num_new):
            self._workers.append(self._starter.submit(Worker, self._scorer, self._selector).result())

    def _listen(self, batch: _Batch) -> None:
        """Wait for the next message, death, or moment at which something has to be done about a worker."""
        now = time.monotonic()
        moments = [now + 1.0]
        for worker in self._workers:
            if worker.index is not None:
                hung = worker.since + HUNG_FRACTION * self._time_limit_secs
                moments.append(hung if hung > now else worker.since + self._time_limit_secs)
        for key, _ in self._selector.select(max(0.0, min(moments) - now)):
            worker: Worker = key.data
            if worker not in self._workers:  # buried a moment ago
                continue
            if key.events & selectors.EVENT_WRITE:
                worker.send_rest()
                continue
            try:
                message = worker.receive()
            except EOFError:
                self._bury(worker, batch)
                continue
            if message is not None:
                self._take(worker, message, batch)

    def _take(self, worker: Worker, message: tuple[Any, str], batch: _Batch) -> None:
        """A message: the first of a worker says whether it could import the scorer, each further one is a result."""
        value, error = message
        if not worker.is_ready:
            if not value:
                raise UserError(f"scorer {self._scorer!r} cannot be imported: {error}")
            worker.is_ready = True
            return
        assert worker.index is not None
        self._num_vain_starts = 0
        if error:
            self._warn_once(error)
            batch.num_errors += 1
        batch.finish(worker.index, value)
        worker.index = None

    def _bury(self, worker: Worker, batch: _Batch) -> None:
        """A worker ended by itself; if it had an item, that is an error."""
        exit_code = self._discard(worker)
        if worker.index is None:
            self._start_was_vain(exit_code)
        else:
            self._warn_once(f"ended its process, exit code {exit_code}")
            batch.num_errors += 1
            batch.finish(worker.index, 0.0)

    def _start_was_vain(self, exit_code: int) -> None:
        """A worker ended without an item: as an idle one may, killed from outside, but not all of them."""
        self._num_vain_starts += 1
        if self._num_vain_starts > 2 * self._num_workers + 2:
            raise UserError(f"scorer {self._scorer!r}: its processes end before they score, exit code {exit_code}")

    def _discard(self, worker: Worker) -> int:
        self._workers.remove(worker)
        return worker.kill()

    def _warn_once(self, what: str) -> None:
        if not self._is_quiet:
            _log.warning("%s failed on an item: %s (scored 0; further failures are only counted)", self._scorer, what)
        self._is_quiet = True


def _end_all(workers: list[Worker], selector: selectors.BaseSelector, starter: ThreadPoolExecutor) -> None:
    while workers:
        workers.pop().kill()
    selector.close()
    starter.shutdown(wait=False)  # this may be running in the starter's own thread
