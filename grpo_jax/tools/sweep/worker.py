"""The work of one process of a sweep. Programs, once compiled, are kept for the next run of the same shape."""

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
import zlib
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection

from grpo_jax.caches import enable_compilation_cache
from grpo_jax.config import Config
from grpo_jax.config.embedded import EMBEDDED
from grpo_jax.errors import UserError
from grpo_jax.files import note_once, printable
from grpo_jax.learner.hyperparams import joint_key, static_key, value_of
from grpo_jax.tools.sweep.plan import RunSpec
from grpo_jax.training import trainer
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.data_record import pin_template_date
from grpo_jax.training.run import Run, make_run
from grpo_jax.types import Params

SUM_BYTES = 4  # of a CRC-32


@dataclasses.dataclass(frozen=True)
class Job:
    """Runs to be done by one process: one, or several that one vmapped program advances together.

    workdir: of the sweep.
    """

    runs: tuple[RunSpec, ...]
    workdir: pathlib.Path

    @property
    def output(self) -> pathlib.Path:
        """The file of what the runs print."""
        return self.workdir / self.runs[0].folder / "output.txt"


def jobs_of(specs: Sequence[RunSpec], to_do: Sequence[RunSpec], cohort_size: int, workdir: pathlib.Path) -> list[Job]:
    """Make jobs of runs, those that share a program one after another.

    Args:
      specs: all runs of the sweep.
      to_do: those that are left.
      cohort_size: runs that one call advances; 0: all that share a program.
      workdir: of the sweep.
    Returns: jobs in the order in which they should be done.
    """
    # A run by itself follows those that have the very same program; in one call an update by another objective is no hindrance.
    key_of = static_key if cohort_size == 1 else joint_key
    keys = list(dict.fromkeys(key_of(spec.config) for spec in specs))

    def place(spec: RunSpec) -> tuple[int, int]:
        # Runs that one call advances must be at the same step, as all of them leave the loop together; a run by itself may
        # be anywhere.
        step = -1
        if cohort_size != 1:
            step = max(saved_steps(workdir / spec.folder), default=-1)
        return keys.index(key_of(spec.config)), step

    def size_of(members: Sequence[RunSpec]) -> int:
        return 1 if stands_alone(members[0].config) else cohort_size or len(members)

    jobs = []
    for _, group in itertools.groupby(sorted(to_do, key=place), key=place):
        members = list(group)
        jobs += [Job(runs, workdir) for runs in batched(members, size_of(members))]
    return jobs


def stands_alone(config: Config) -> bool:
    """Tell if no other run can share a call with a run: the host decides how many rollouts a step of it takes, or when."""
    return config.task.name not in EMBEDDED and (config.dynamic_sampling.enabled or config.async_steps > 0)


def batched(specs: Sequence[RunSpec], size: int) -> Iterator[tuple[RunSpec, ...]]:
    """Split (A, B, C) by 2 into (A, B), (C,)."""
    return (tuple(specs[i : i + size]) for i in range(0, len(specs), size))


def serve_jobs(connection: Connection, num_threads: int) -> None:
    """Receive jobs, send what went wrong with the runs of each, until the other end is closed. num_threads: for XLA."""
    os.environ["NPROC"] = str(num_threads)  # read when JAX makes its devices, which has not happened yet
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches the whole group; the sweep's process decides
    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        try:
            connection.send(attempt(connection.recv()))
        except (EOFError, BrokenPipeError):
            return


def end_with_parent() -> None:
    """End this process when the sweep's process ends."""
    # A run must not go on after a sweep that was killed: the next sweep resumes it, and two would write into one folder.
    # Daemon processes are only ended by a parent that exits in order. Without `_exit` the main thread would train on.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def attempt(job: Job) -> list[str]:
    """Do a job and return what went wrong with each of its runs, in one line, or ""."""
    # Whatever it is: the traceback is in the run's output, and the process is fit for the next job.
    job.output.parent.mkdir(parents=True, exist_ok=True)
    with output_to(job.output):
        try:
            return do(job)
        except UserError as error:
            print(f"error: {printable(str(error))}", file=sys.stderr)
            return [printable(f"{type(error).__name__}: {error}")] * len(job.runs)
        except Exception as error:
            traceback.print_exc()
            return [printable(f"{type(error).__name__}: {error}")] * len(job.runs)


def do(job: Job) -> list[str]:
    """Train, from where each run left off, and return why each could not go on, or ""."""
    # On disk, next to the runs: processes and later sweeps find what any of them has compiled.
    enable_compilation_cache(job.workdir / "compiled")
    configs = [spec.config for spec in job.runs]
    workdirs = [job.workdir / spec.folder for spec in job.runs]
    if configs[0].task.name not in EMBEDDED:
        return do_on_host(configs, workdirs)
    templates = templates_of(configs)
    runs = [templates[static_key(config)].with_config(config) for config in configs]
    runs = [share_weights(run, job.workdir / "weights") for run in runs]
    if len(runs) > 1:
        return trainer.train_vmapped(runs, workdirs)
    trainer.train_run(runs[0], workdirs[0])
    return [""]


def do_on_host(configs: Sequence[Config], workdirs: Sequence[pathlib.Path]) -> list[str]:
    """`do` for runs that are scored on the host."""
    if len(configs) == 1:
        trainer.train(configs[0], workdirs[0])
        return [""]
    configs = [pin_template_date(config, [workdir, *workdirs]) for config, workdir in zip(configs, workdirs, strict=True)]
    of_seeds: dict[int, Run] = {configs[0].seed: make_run(configs[0])}
    try:
        for config in configs:
            if config.seed not in of_seeds:
                of_seeds[config.seed] = of_seeds[configs[0].seed].with_config(config)
        runs = [of_seeds[config.seed].with_config(config) for config in configs]
        return trainer.train_vmapped(runs, workdirs)
    finally:
        for run in of_seeds.values():
            run.task.close()


_templates: dict[Config, Run] = {}


def template_of(key: Config, config: Config) -> Run:
    """Make a run whose compiled functions all runs of one static key share, or return it if the last job had the same key."""
    # Jobs come sorted by it, so the newest is all there is to keep; an older one would only hold memory.
    if key not in _templates:
        _templates.clear()
        _templates[key] = make_run(config)
    return _templates[key]


def templates_of(configs: Sequence[Config]) -> dict[Config, Run]:
    """Make a run for each static key of some configs of one joint key."""
    first = configs[0]
    templates = {static_key(first): template_of(static_key(first), first)}
    for config in configs:
        key = static_key(config)
        if key not in templates:
            templates[key] = templates[static_key(first)].with_config(config)
    return templates


def share_weights(run: Run, folder: pathlib.Path) -> Run:
    """Make a run's warm start only once for all runs that begin with the same weights."""
    if run.config.model.path:
        return run  # they are in a folder already
    return dataclasses.replace(run, load_weights=keep_in_file(run.load_weights, folder / start_of(run.config)))


def keep_in_file(make: Callable[[], Params], path: pathlib.Path) -> Callable[[], Params]:
    """Wrap a function so that its result is made once, and read from `path` from then on."""

    def weights() -> Params:
        from flax.serialization import msgpack_restore, msgpack_serialize

        content = b""
        if path.exists():
            content = path.read_bytes()
            if not is_whole(content):
                note_once(f"{path}: not what was written, or an older version's; made again")
                content = b""
        if not content:
            made = msgpack_serialize(make())
            content = zlib.crc32(made).to_bytes(SUM_BYTES) + made
            path.parent.mkdir(parents=True, exist_ok=True)
            # Two processes may both find nothing and make the same weights. Each writes a file of its own and moves it, so that
            # a reader never sees half of one.
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.write_bytes(content)
            temporary.replace(path)
        return msgpack_restore(content[SUM_BYTES:])

    return weights


def is_whole(content: bytes) -> bool:
    """Tell if a file of weights is what was written: its CRC-32 stands before them."""
    return len(content) > SUM_BYTES and zlib.crc32(content[SUM_BYTES:]).to_bytes(SUM_BYTES) == content[:SUM_BYTES]


def start_of(config: Config) -> str:
    """Name the weights that a run begins with, by a hash of all they depend on."""
    # The last three matter to it as well: how its loss is summed, which questions are held out, how long answers are. A field
    # that is missing here would let runs of different settings begin with the same weights.
    fields = ("seed", "model", "task", "warm_start", "learner.logprob_chunk_tokens", "eval.num_prompts")
    values = [repr(value_of(config, field)) for field in (*fields, "rollout.max_completion_tokens")]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


@contextlib.contextmanager
def output_to(path: pathlib.Path) -> Iterator[None]:
    """Append everything that this process prints to a file."""
    # The descriptors and not only sys.stdout: XLA and other C libraries write to them directly.
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
