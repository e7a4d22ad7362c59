"""What a process does with its share of a sweep. Programs, once compiled, are kept for the next run of the same shape."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from grpo_jax.caches import enable_compilation_cache
from grpo_jax.config import Config
from grpo_jax.learner.hyperparams import static_key, value_of
from grpo_jax.tools.sweep.plan import RunSpec
from grpo_jax.training import build, trainer
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.run import Run, make_run


@dataclasses.dataclass(frozen=True)
class Job:
    """Runs to be done by one process: one, or several that one vmapped program advances together.

    alike: the configs of all runs of the sweep that share the program. workdir: of the sweep.
    """

    runs: tuple[RunSpec, ...]
    alike: tuple[Config, ...]
    workdir: pathlib.Path

    @property
    def output(self) -> pathlib.Path:
        """What the runs print."""
        return self.workdir / self.runs[0].folder / "output.txt"


def jobs_of(specs: Sequence[RunSpec], to_do: Sequence[RunSpec], cohort_size: int, workdir: pathlib.Path) -> list[Job]:
    """What is to do, runs that share a program one after another; those that one call advances stand at the same step."""
    shapes = list(dict.fromkeys(static_key(spec.config) for spec in specs))
    alike = {shape: tuple(spec.config for spec in specs if static_key(spec.config) == shape) for shape in shapes}

    def place(spec: RunSpec) -> tuple[int, int]:
        step = -1 if cohort_size == 1 else max(saved_steps(workdir / spec.folder), default=-1)
        return shapes.index(static_key(spec.config)), step

    jobs = []
    for (shape, _), group in itertools.groupby(sorted(to_do, key=place), key=place):
        members = list(group)
        jobs += [Job(runs, alike[shapes[shape]], workdir) for runs in batched(members, cohort_size or len(members))]
    return jobs


def batched(specs: Sequence[RunSpec], size: int) -> Iterator[tuple[RunSpec, ...]]:
    """(A, B, C), 2 -> (A, B), (C,)."""
    return (tuple(specs[i : i + size]) for i in range(0, len(specs), size))


def serve_jobs(connection: Connection, num_threads: int) -> None:
    """Jobs in, what went wrong with each (one line, or "") out, until the other end is closed. num_threads: for XLA."""
    os.environ["NPROC"] = str(num_threads)  # read when JAX makes its devices, which has not happened yet
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole group; the sweep's process decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        try:
            connection.send(attempt(connection.recv()))
        except (EOFError, BrokenPipeError):
            return


def end_with_parent() -> None:
    """A run must not go on behind the back of a sweep that was killed: the next one resumes it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def attempt(job: Job) -> str:
    """Do a job; -> what went wrong, in one line, or ""."""
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with output_to(job.output):
        try:
            do(job)
        except Exception as error:
            traceback.print_exc()
            return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def do(job: Job) -> None:
    """Train, from where each run left off."""
    enable_compilation_cache(job.workdir / "compiled")
    configs = [spec.config for spec in job.runs]
    workdirs = [job.workdir / spec.folder for spec in job.runs]
    if configs[0].task.name in build.SOURCES:  # scored on the host: nothing to share
        for config, workdir in zip(configs, workdirs, strict=True):
            trainer.train(config, workdir)
        return
    template = template_of(static_key(configs[0]), configs[0])
    runs = [with_shared_weights(template.with_config(config), job.workdir / "weights") for config in configs]
    if len(runs) > 1:
        trainer.train_vmapped(runs, workdirs)
    else:
        trainer.train_run(runs[0], workdirs[0])


_templates: dict[Config, Run] = {}


def template_of(key: Config, config: Config) -> Run:
    """A run whose compiled functions all runs of one static key share. Jobs come sorted by it, so only the newest is kept."""
    if key not in _templates:
        _templates.clear()
        _templates[key] = make_run(config)
    return _templates[key]


def with_shared_weights(run: Run, folder: pathlib.Path) -> Run:
    """The run, with its warm start made only once for all runs that begin with the same weights."""
    return (
        run
        if run.config.model.path
        else dataclasses.replace(run, load_weights=kept(run.load_weights, folder / start_of(run.config)))
    )


def kept(make: Callable[[], Any], path: pathlib.Path) -> Callable[[], Any]:
    """make(), or what it gave before and `path` has kept."""

    def weights() -> Any:
        from flax.serialization import msgpack_restore, msgpack_serialize

        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(msgpack_serialize(make()))
            temporary.replace(path)
        return msgpack_restore(path.read_bytes())

    return weights


def start_of(config: Config) -> str:
    """A name for the weights that a run begins with: a hash of all they depend on."""
    fields = ("seed", "model", "task", "warm_start", "learner.logprob_chunk_tokens", "eval.num_prompts")
    values = [repr(value_of(config, field)) for field in (*fields, "rollout.max_completion_tokens")]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@contextlib.contextmanager
def output_to(path: pathlib.Path) -> Iterator[None]:
    """Everything that this process prints, C libraries' words too, is appended to a file."""
    saved = [os.dup(fd) for fd in (1, 2)]
    with path.open("a") as file:
        for fd in (1, 2):
            os.dup2(file.fileno(), fd)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, old in zip((1, 2), saved, strict=True):
                os.dup2(old, fd)
                os.close(old)
