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
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any

from experiments.sweep import worker
from experiments.sweep.worker import Job
from grpo_jax.errors import UserError
from grpo_jax.trainer import StopSignal

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

    @classmethod
    def start(cls, num_threads: int) -> Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=worker.serve, args=(theirs, num_threads), daemon=True)
        process.start()
        theirs.close()  # so that ours ends when the process does
        return cls(process, ours)

    def outcome(self) -> str:
        """What the process says of its job, or what became of the process."""
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join()
            return f"the process ended with status {self.process.exitcode}"


def in_processes(jobs: Sequence[Job], num_processes: int, stop: StopSignal) -> Iterator[Event | None]:
    """Do the jobs in order, so many at a time; yields what happens, and None at least every POLL_SECS.

    A process that dies fails its job and is replaced. When `stop` is set, every run saves and ends, and no other begins.
    """
    waiting, num_threads = deque(jobs), max(num_cores() // num_processes, 1)
    workers: list[Worker] = []
    is_told = False
    try:
        while True:
            if stop.is_set and not is_told:
                waiting.clear()
                is_told = True
                for each in workers:
                    os.kill(each.process.pid, signal.SIGTERM)
            while waiting and sum(each.job is not None for each in workers) < num_processes:
                idle = next((each for each in workers if each.job is None), None)
                if idle is None:
                    workers.append(idle := Worker.start(num_threads))
                idle.job = waiting.popleft()
                idle.pipe.send(idle.job)
                yield idle.job, "running", ""
            busy = {each.pipe: each for each in workers if each.job is not None}
            if not busy:
                return
            for pipe in connection.wait(list(busy), timeout=POLL_SECS):
                each = busy[pipe]  # type: ignore[index]
                error, job = each.outcome(), each.job
                each.job = None
                assert job is not None
                if not each.process.is_alive():
                    workers.remove(each)
                yield job, "ended", "" if is_told and not each.process.is_alive() else error
            yield None
    finally:
        for each in workers:
            each.process.terminate()
            each.pipe.close()
            each.process.join()


def by_submitit(
    jobs: Sequence[Job], cluster: str, settings: Mapping[str, Any], workdir: pathlib.Path
) -> Iterator[Event | None]:
    """Hand every job to submitit: cluster "slurm", or "local" or "debug" to try it. Yields as `in_processes` does.

    settings: submitit's, {"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 60}.
    Raises UserError if it is not installed or refuses the settings.
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
    while handles:
        for handle in list(handles):
            if handle not in running and handle.state == "RUNNING":
                running.add(handle)
                yield handles[handle], "running", ""
            if handle.done():
                failure = handle.exception()
                error = handle.result() if failure is None else f"{type(failure).__name__}: {handle.paths.stderr}"
                yield handles.pop(handle), "ended", error
        yield None
        time.sleep(POLL_SECS)
