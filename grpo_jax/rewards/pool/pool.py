"""Scores completions in worker processes, so that a scorer may hang, crash or print without harming the run.

Workers are fresh interpreters (no fork: JAX is multithreaded) that do one job at a time, so every fault has one job to
be blamed on. A job is one completion and one scorer; for a scorer that takes them together, all completions of a prompt.
Of a scorer that takes less than milliseconds a worker gets some jobs of a prompt in one message, which is most of their cost;
it answers each by itself, and those that it has not begun when it ends go back to the others. What a fault costs:

- A job has `time_limit_secs` for each of its completions; then its process is killed and it counts as a timeout.
- A process that ends by itself at its first job costs that job. One that does so later (a job before may have set an alarm),
  is ended by a signal that was meant for the trainer too, sends what is no reply to its job, or whose keeper was killed, costs
  the process alone: the job is done once more by a fresh one, and if that goes the same way, it is an error.
- A worker that has been busy for more than a fiftieth of the limit counts as hung, and a spare worker starts while it is
  waited out. So hung jobs wait side by side, and a few of them cost a batch about one time limit together. There are at
  most N / 64 spare workers for a batch of N jobs, but no fewer than 4 and no more than 32.
- When more than 2 (num_workers + 4) jobs of a scorer, and more than a tenth of those done so far, have timed out, the
  rest of its jobs in the batch is counted as timed out unseen. A scorer that always hangs costs about three time limits a
  batch, and the other scorers nothing.
"""

from __future__ import annotations

import collections
import itertools
import json
import logging
import secrets
import selectors
import threading
import time
import weakref
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Bool

from grpo_jax.config import ScoringConfig
from grpo_jax.errors import UserError
from grpo_jax.rewards.pool.jobs import ERROR, TIMEOUT, Context, Facts, JobBatch, ScoreResult
from grpo_jax.rewards.pool.keeper import ENDING
from grpo_jax.rewards.pool.protocol import ProtocolError, Reply, one_line
from grpo_jax.rewards.pool.serve import Scorer, Setup
from grpo_jax.rewards.pool.worker import SentJob, Worker

__all__ = ["Context", "Scorer", "ScoringPool"]

STARTUP_LIMIT_SECS = 120.0  # for importing the scorers: sympy on a busy machine takes 10 s
FROM_OUTSIDE = [128 + number for number in ENDING]  # exit codes: some systems send these to all processes of a job
PAUSED_SECS = 2.0  # nothing was heard for so long beyond what was waited for: this process was stopped, maybe all were
HUNG_FRACTION = 0.02  # of the time limit, after which a spare worker starts
MIN_SPARE_WORKERS, MAX_SPARE_WORKERS = 4, 32
MAX_TOGETHER, TOGETHER_SECS = 16, 0.005  # jobs in a message, and what they may take
LEARNING = 0.2  # of a job's seconds in the running mean of its scorer's

_log = logging.getLogger(__name__)


class ScoringPool:
    """Worker processes that run some scorers. They start with the first batch, or `start`, and stay until `close` or exit.

    Raises UserError, from `start` and `score`, where a scorer cannot be imported or called.
    """

    def __init__(self, scorers: Mapping[str, Scorer], config: ScoringConfig, columns: Collection[str] | None = None) -> None:
        """Take note of what will be needed.

        Args:
          scorers: by name. config: config.reward.scoring. columns: names of the data's columns; None: any may be one.
        """
        self._scorers, self._config = dict(scorers), config
        known = None if columns is None else frozenset(columns)
        self._setup = Setup(self._scorers, known, config.memory_limit_mb, config.file_limit_mb)
        self.facts: dict[str, Facts] = {}  # known from the first worker that is ready
        # From a random number on: a worker's next number is not to be had by counting.
        self._numbers = itertools.count(secrets.randbits(62) + 1)
        self._workers: list[Worker] = []
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        self._num_failed_starts = 0
        self._secs_of = collections.defaultdict[str, float](lambda: TOGETHER_SECS)  # scorer -> of a job, lately
        self._warned: set[str] = set()
        # To Linux, "dies with its parent" means with the thread that started it: so the pool has a thread for that.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        # Runs when `close` calls it, when the pool is forgotten, or when the interpreter exits.
        self._release = weakref.finalize(self, _end_all, self._workers, self._selector, self._starter)

    def start(self) -> None:
        """Wait until a worker has imported the scorers."""
        with self._lock:
            self._await_ready()

    def score(
        self,
        items: Sequence[Mapping[str, Any]],
        completions_PG: Sequence[Sequence[str]],
        context: Context | None = None,
        asked: Mapping[str, Bool[np.ndarray, " P"]] | None = None,
    ) -> ScoreResult:
        """Score all completions of each item by every scorer, or by those that are asked about it.

        One whose scorer raised, crashed or returned no finite number is an error, one that ran out of time a timeout. Neither
        has a score, and nor have the others of the group where the scorer takes them together.

        Args:
          items: P rows of data. completions_PG: G texts of each. context: what scorers may ask for beside these.
          asked: scorer -> rows that it is asked about; None: all scorers about all rows.
        Returns: the scores, and what became of those that have none.
        Raises: UserError if a scorer cannot be imported or called, or the pool is closed.
        """
        with self._lock:
            if not self._release.alive:
                raise UserError("the scoring pool is closed: build a new task to score again")
            batch = JobBatch(items, completions_PG, context)
            if not self._scorers or not all(batch.shape):
                batch.add_scores_of(list(self._scorers))
                return batch.result
            self._await_ready()
            batch.add_jobs(self.facts, asked)
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
        while not self.facts:
            self._start_workers(self._config.num_workers, self._config.num_workers)
            self._listen(nothing)
            self._kill_overdue(nothing)

    def _run(self, batch: JobBatch) -> None:
        """Hand out jobs and collect results until none is left."""
        num_workers = self._config.num_workers
        max_workers = num_workers + min(MAX_SPARE_WORKERS, max(MIN_SPARE_WORKERS, len(batch.jobs) // 64))
        patience = 2 * (num_workers + MIN_SPARE_WORKERS)  # timeouts
        while batch.num_left:
            assert batch.waiting or any(worker.index is not None for worker in self._workers), "a job is nowhere"
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
        for worker in list(self._workers):
            if worker.index is not None and batch.jobs[worker.index].scorer == name:
                batch.finish(worker.index, outcome=TIMEOUT)
                self._discard(worker, batch)
        batch.give_up(name)

    def _kill_overdue(self, batch: JobBatch) -> None:
        """End workers whose job has run out of time. Raises UserError if importing the scorers takes too long."""
        now = time.monotonic()
        for worker in list(self._workers):
            secs = now - worker.since
            if not worker.is_ready and secs > STARTUP_LIMIT_SECS:
                raise UserError(f"{self._names()}: importing took more than {STARTUP_LIMIT_SECS} seconds")
            if worker.index is not None and secs >= worker.limit_secs:
                job = batch.jobs[worker.index]
                self._warn_once(job.scorer, f"ran into the limit of {worker.limit_secs:g} seconds for {job.num} completion(s)")
                batch.finish(worker.index, outcome=TIMEOUT)
                self._secs_of[job.scorer] = worker.limit_secs
                self._discard(worker, batch)

    def _hand_out(self, batch: JobBatch) -> None:
        """Give each idle worker a job, or some that are quick."""
        for worker in [worker for worker in self._workers if worker.is_idle]:
            if not batch.waiting:
                return
            index = batch.next_for(is_fresh=not worker.num_begun)
            if index is None:
                # What is left is for fresh workers alone: one makes room for such a one.
                if all(each.num_begun for each in self._workers):
                    self._discard(worker)
                    return
                continue
            scorer, _, _, num = batch.jobs[index]
            num_jobs = batch.num_alike(index, self._num_together(scorer, len(batch.waiting)))
            numbers = [next(self._numbers) for _ in range(num_jobs)]  # one behind the other
            limit_secs = num * self._config.time_limit_secs
            jobs = [SentJob(index + i, number, num, limit_secs) for i, number in enumerate(numbers)]
            # The jobs leave the queue once they have been sent: a worker that died idle has not seen them.
            if worker.send(jobs, batch.frame(index, numbers[0], num_jobs)):
                batch.take_out(index, num_jobs)
            else:
                self._count_failed_start(self._discard(worker))

    def _num_together(self, scorer: str, num_waiting: int) -> int:
        """Return how many jobs a worker may get at once: so many as take milliseconds, and no more than its share."""
        # What a job costs beyond its scorer is its message, about 50 microseconds; more of them in one hold up the others.
        num_quick = int(TOGETHER_SECS / self._secs_of[scorer])
        return max(1, min(MAX_TOGETHER, num_quick, num_waiting // self._config.num_workers))

    def _start_workers(self, num_waiting: int, max_workers: int) -> None:
        """Start workers until as many are not hung as the pool should have, or as there are jobs for."""
        # Hung ones are replaced while they are waited out, so that a few of them do not take the pool's speed. Those that are
        # starting or idle will take a waiting job each, so they are subtracted: starting costs seconds of imports.
        now = time.monotonic()
        num_hung = sum(
            worker.index is not None and now - worker.since >= HUNG_FRACTION * worker.limit_secs for worker in self._workers
        )
        num_coming = sum(worker.index is None for worker in self._workers)
        num_new = min(
            self._config.num_workers - (len(self._workers) - num_hung),
            num_waiting - num_coming,
            max_workers - len(self._workers),
        )
        for _ in range(num_new):
            # In the starter's thread, which lives as long as the pool: a worker dies with the thread that started it.
            start = self._starter.submit(Worker, self._setup, self._selector)
            self._workers.append(start.result())

    def _listen(self, batch: JobBatch) -> None:
        """Wait for the next message, exit, or moment at which something has to be done about a worker; take what has come."""
        # A busy worker has two such moments: when it counts as hung and gets a spare beside it, and when its job is overdue. A
        # second at the latest, since a worker that starts has a limit too, which need not be met exactly.
        now = time.monotonic()
        moments = [now + 1.0]
        for worker in self._workers:
            if worker.index is not None:
                hung, overdue = (worker.since + share * worker.limit_secs for share in (HUNG_FRACTION, 1.0))
                moments.append(hung if hung > now else overdue)
        secs = max(0.0, min(moments) - now)
        ready = self._selector.select(secs)
        # Of what the workers had no part of they are not to blame: a job that is stopped and goes on, a machine that slept.
        secs_paused = time.monotonic() - now - secs
        if secs_paused > PAUSED_SECS:
            for worker in self._workers:
                worker.since += secs_paused
        for key, _ in ready:
            # Both pipes of a worker may be in the list, and the first may have shown that it has ended.
            worker: Worker = key.data
            if worker not in self._workers:
                continue
            if key.events & selectors.EVENT_WRITE:
                worker.send_rest()
                continue
            try:
                self._take_replies(worker, batch)
            except EOFError:
                self._on_worker_exit(worker, batch)
            except ProtocolError as error:
                self._on_nonsense(worker, str(error), batch)

    def _take_replies(self, worker: Worker, batch: JobBatch) -> None:
        """Take what has come from a worker. Raises EOFError or ProtocolError, as `Worker.receive`."""
        reply = worker.receive()
        while reply is not None:
            self._on_reply(worker, reply, batch)
            if reply.is_last:  # before it turns to the next job, which would be no one's then
                self._discard(worker, batch)
                return
            worker.go_on()
            if worker.index is None:
                if worker.has_more:
                    self._on_nonsense(worker, "bytes behind its reply", batch)
                return
            reply = worker.read()

    def _on_reply(self, worker: Worker, reply: Reply, batch: JobBatch) -> None:
        """Take a reply: a worker's first one says how the scorers are called, each further one is a result."""
        if not worker.is_ready:
            self._on_ready(worker, reply)
            return
        assert worker.index is not None
        self._num_failed_starts = 0
        scorer = batch.jobs[worker.index].scorer
        if reply.scores:
            if reply.text:
                self._warn_once(scorer, reply.text.partition("\n")[0])
            batch.finish(worker.index, reply.scores, failure=reply.text)
        else:
            self._fail(worker.index, reply.text, batch)
        self._secs_of[scorer] += LEARNING * (time.monotonic() - worker.since - self._secs_of[scorer])

    def _on_ready(self, worker: Worker, reply: Reply) -> None:
        """Take the first reply. Raises UserError if a scorer cannot be imported or called."""
        if not reply.scores:
            raise UserError(f"config.reward: {one_line(reply.text.partition(chr(10))[0])}")
        try:
            said = json.loads(reply.text)
            facts = {name: Facts(**said["facts"][name]) for name in self._scorers}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self._names()}: a scoring process did not say how they are called") from error
        if not self.facts and said["note"]:
            _log.warning(one_line(str(said["note"])))
        self.facts, worker.is_ready = facts, True

    def _on_nonsense(self, worker: Worker, what: str, batch: JobBatch) -> None:
        """End a worker that sent something else than a reply; its job, which need not be the one to blame, is tried again."""
        self._discard(worker, batch)
        if worker.index is None:
            _log.warning("a scoring process was ended: it sent %s, as if a reward wrote into its pipe", one_line(what))
        elif not batch.retry(worker.index):
            self._fail(worker.index, f"it wrote into the pipe of its process: {what}", batch)

    def _on_worker_exit(self, worker: Worker, batch: JobBatch) -> None:
        """Remove a worker that ended by itself; if it had a job, that is an error."""
        exit_code = self._discard(worker, batch, has_ended=True)
        if worker.index is None:
            self._count_failed_start(exit_code)
        # A worker dies a moment after its keeper was killed, maybe at another's job than that which did it.
        elif not (exit_code < 0 or exit_code in FROM_OUTSIDE or worker.num_begun > 1) or not batch.retry(worker.index):
            self._fail(worker.index, f"ended its process, exit code {exit_code}", batch)

    def _fail(self, index: int, failure: str, batch: JobBatch) -> None:
        """Count a job as an error. failure: one line, and maybe more behind it."""
        self._warn_once(batch.jobs[index].scorer, failure.partition("\n")[0])
        batch.finish(index, outcome=ERROR, failure=failure)

    def _count_failed_start(self, exit_code: int) -> None:
        """Count a worker that ended without a job. Raises UserError if too many do."""
        # One may be killed from outside. If all end, no job is to blame and starting them again would go on for ever.
        self._num_failed_starts += 1
        if self._num_failed_starts > 2 * self._config.num_workers + 2:
            raise UserError(f"{self._names()}: its processes end before they score, exit code {exit_code}")

    def _discard(self, worker: Worker, batch: JobBatch | None = None, *, has_ended: bool = False) -> int:
        """End a worker and forget it; returns its exit code.

        batch: what it was given and has not begun is queued there again. has_ended: it went by itself.
        """
        self._workers.remove(worker)
        if batch is not None:
            batch.take_back([job.index for job in worker.ahead])
        return worker.kill(has_ended=has_ended)

    def _names(self) -> str:
        return "config.reward, " + ", ".join(scorer.function for scorer in self._scorers.values())

    def _warn_once(self, name: str, what: str) -> None:
        """Log a scorer's first failure."""
        if name not in self._warned:
            _log.warning("reward %s failed: %s (left out of training; further failures are only counted)", name, one_line(what))
        self._warned.add(name)


def _end_all(workers: list[Worker], selector: selectors.BaseSelector, starter: ThreadPoolExecutor) -> None:
    """Release all that a pool holds; no method of it, for a finalizer that refers to the pool would keep it alive."""
    while workers:
        workers.pop().kill()
    selector.close()
    starter.shutdown(wait=False)  # this may be running in the starter's own thread
