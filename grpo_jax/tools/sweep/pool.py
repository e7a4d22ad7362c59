"""Who does the jobs of a sweep: processes of this machine, or the nodes of a cluster. One that fails stops no other."""

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
from grpo_jax.training.trainer import StopSignal

POLL_SECS = 1.0
Event = tuple[Job, str, str]  # job, "running" | "ended", what went wrong ("" if nothing did)


def default_num_processes() -> int:
    """One a processor core on a CPU, one in all on an accelerator, whose memory a single process takes."""
    ask = [sys.executable, "-c", "import jax; print(jax.default_backend())"]  # asked elsewhere: it would take the device
    backend = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    return num_cores() if backend == "cpu" else 1


def num_cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass
class Worker:
    """A process and the job that it is at."""

    process: Any
    pipe: connection.Connection
    job: Job | None = None
    is_told: bool = False  # to stop

    @classmethod
    def start(cls, num_threads: int) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        os.environ.setdefault("GLIBC_TUNABLES", cli.HUGE_PAGES)  # only a new process reads it
        process = context.Process(target=worker.serve_jobs, args=(theirs, num_threads), daemon=True)
        process.start()
        theirs.close()  # so that ours ends when the process does
        return cls(process, ours)

    def begin(self, job: Job) -> Job:
        self.job = job
        self.pipe.send(job)
        return job

    def obey(self, stop: StopSignal) -> None:
        """Pass a signal on, once: the run saves, or if it has not begun to train, its process ends."""
        if stop.is_set and not self.is_told:
            self.is_told = True
            os.kill(self.process.pid, signal.SIGTERM)

    def end(self) -> Event:
        """What the process says of its job, or what became of the process."""
        job, self.job = self.job, None
        assert job is not None
        try:
            return job, "ended", self.pipe.recv()
        except EOFError:
            self.process.join()
            return job, "ended", "" if self.is_told else f"the process ended with status {self.process.exitcode}"


def in_processes(jobs: Sequence[Job], num_processes: int, stop: StopSignal) -> Generator[Event | None, None, None]:
    """Do the jobs in order, so many at a time; yields what happens, and None at least every POLL_SECS.

    A process that dies fails its job and is replaced. When `stop` is set, every run saves and ends, and no other begins.
    """
    waiting, num_threads = deque(jobs), max(num_cores() // num_processes, 1)
    workers: list[Worker] = []
    try:
        while waiting or any(each.job for each in workers):
            if stop.is_set:
                waiting.clear()
            for each in workers:
                each.obey(stop)
            idle = [each for each in workers if each.job is None]
            while waiting and (idle or len(workers) < num_processes):
                if not idle:
                    idle.append(Worker.start(num_threads))
                    workers.append(idle[0])
                yield idle.pop().begin(waiting.popleft()), "running", ""
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


def by_submitit(
    jobs: Sequence[Job], cluster: str, settings: Mapping[str, Any], workdir: pathlib.Path, stop: StopSignal
) -> Generator[Event | None, None, None]:
    """Hand every job to submitit: cluster "slurm", or "local" or "debug" to try it. Yields as `in_processes` does.

    settings: submitit's, {"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 60}. When `stop` is set, the jobs are
    cancelled: a later sweep would start them once more. Raises UserError if submitit is missing or refuses the settings.
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
                    yield handles[handle], "running", ""
                if handle.done():
                    failure = handle.exception()
                    error = handle.result() if failure is None else f"{type(failure).__name__}: see {handle.paths.stderr}"
                    yield handles.pop(handle), "ended", error
            yield None
            time.sleep(POLL_SECS)
    finally:
        for handle in handles:
            handle.cancel()
