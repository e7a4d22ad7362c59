"""Processes of this machine, or the nodes of a cluster, that do the jobs of a sweep. One that fails stops no other."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from multiprocessing import connection
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.tools import cli
from grpo_jax.tools.sweep import worker
from grpo_jax.tools.sweep.worker import Job
from grpo_jax.training.signals import StopSignal

POLL_SECS = 1.0
Event = tuple[Job, str, list[str]]  # job, "running" | "ended", what went wrong with each run ("" if nothing did)


def default_num_processes() -> int:
    """Return one a processor core on a CPU, one in all on an accelerator, whose memory a single process takes."""
    # Asked in a process of its own: JAX in this one would take the accelerator's memory from the runs.
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    backend = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    if backend == "cpu":
        return num_cores()
    return 1


def num_cores() -> int:
    """Count the processor cores that this process may use."""
    # In a container or under taskset they are fewer than the machine's; macOS has no such list.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclasses.dataclass
class Worker:
    """A process and the job that it is at."""

    process: Any
    pipe: connection.Connection
    job: Job | None = None
    is_told: bool = False  # to stop

    @classmethod
    def start(cls, num_threads: int) -> Worker:
        """Start a process that waits for jobs. num_threads: for XLA."""
        # `spawn` and not `fork`: a forked child would inherit JAX's threads and locks in the middle of something.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        os.environ.setdefault("GLIBC_TUNABLES", cli.HUGE_PAGES)  # only a new process reads it
        process = context.Process(target=worker.serve_jobs, args=(theirs, num_threads), daemon=True)
        process.start()
        theirs.close()  # while this process holds their end too, ours does not notice that the other process died
        return cls(process, ours)

    def begin(self, job: Job) -> Job:
        """Hand a job to the process, which must be idle."""
        self.job = job
        self.pipe.send(job)
        return job

    def obey(self, stop: StopSignal) -> None:
        """Pass a signal on: the run saves, or if it has not begun to train, its process ends."""
        # Only once: the first makes the run save, and a second, after the run has taken its handler back, would kill it then.
        if stop.is_set and not self.is_told:
            self.is_told = True
            os.kill(self.process.pid, signal.SIGTERM)

    def end(self) -> Event:
        """Receive the outcome of the job from the process, or if it died, report its exit status."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return job, "ended", self.pipe.recv()
        except EOFError:
            self.process.join()
            if self.is_told:
                return job, "ended", [""] * len(job.runs)  # it was asked to stop before it had begun to train: no failure
            return job, "ended", [f"the process ended with status {self.process.exitcode}"] * len(job.runs)


def run_in_processes(jobs: Sequence[Job], num_processes: int, stop: StopSignal) -> Generator[Event | None, None, None]:
    """Do the jobs in order, in processes of this machine.

    A process that dies fails its job and is replaced. When `stop` is set, every run saves and ends, and no other begins.

    Args:
      jobs: those of one program next to each other, so that a process compiles it once.
      num_processes: jobs at a time.
      stop: looked at every POLL_SECS.
    Returns: a generator of what happens, and of None at least every POLL_SECS.
    """
    # XLA takes all cores in each process if nobody tells it otherwise; they would then wait for each other.
    waiting, num_threads = deque(jobs), max(num_cores() // num_processes, 1)
    workers: list[Worker] = []
    try:
        while waiting or any(each.job for each in workers):
            if stop.is_set:
                waiting.clear()
            for each in workers:
                each.obey(stop)
            idle = [each for each in workers if each.job is None]
            # An idle process comes before a new one: it has compiled programs, and the next job may have the same shape.
            while waiting and (idle or len(workers) < num_processes):
                if not idle:
                    idle.append(Worker.start(num_threads))
                    workers.append(idle[0])
                job = idle.pop().begin(waiting.popleft())
                yield job, "running", [""] * len(job.runs)
            busy = {each.pipe: each for each in workers if each.job}
            for pipe in connection.wait(list(busy), timeout=POLL_SECS):
                each = busy[pipe]  # type: ignore[index]
                yield each.end()
                if not each.process.is_alive():
                    workers.remove(each)
            yield None
    finally:
        for each in workers:
            each.process.terminate()
            each.pipe.close()
            each.process.join()


def run_by_submitit(
    jobs: Sequence[Job], cluster: str, settings: Mapping[str, Any], workdir: pathlib.Path, stop: StopSignal
) -> Generator[Event | None, None, None]:
    """Hand every job to submitit. When `stop` is set, the jobs are cancelled.

    Args:
      jobs: handed over at once; the cluster decides about their order.
      cluster: "slurm", or "local" or "debug" to try it.
      settings: submitit's, {"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 60}.
      workdir: of the sweep; submitit's files go to a folder in it.
      stop: looked at every POLL_SECS.
    Returns: a generator of the same events as `run_in_processes`.
    Raises: UserError if submitit is missing or refuses the settings.
    """
    if importlib.util.find_spec("submitit") is None:
        raise UserError(f"--launcher={cluster}: submitit is not installed; pip install -e .[slurm]")
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=workdir / "submitit", cluster=cluster)
        executor.update_parameters(**settings)
        handles = dict(zip(executor.map_array(worker.attempt, jobs), jobs, strict=True))
    except (NameError, TypeError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"--launcher={cluster}: {error}") from None
    running: set[Any] = set()
    try:
        while handles and not stop.is_set:
            for handle in list(handles):
                if handle not in running and handle.state == "RUNNING":
                    running.add(handle)
                    yield handles[handle], "running", [""] * len(handles[handle].runs)
                if handle.done():
                    job = handles.pop(handle)
                    yield job, "ended", outcome_of(handle, len(job.runs))
            yield None
            time.sleep(POLL_SECS)
    finally:
        # A sweep that is started again hands everything over again: two jobs would then write into one folder.
        for handle in handles:
            handle.cancel()


def outcome_of(handle: Any, num_runs: int) -> list[str]:
    """Read what went wrong with the runs of a submitit job that is done: its own word, or if it crashed, where to look."""
    failure = handle.exception()
    if failure is None:
        return handle.result()
    return [f"{type(failure).__name__}: see {handle.paths.stderr}"] * num_runs
