"""The loop of a scoring process. `worker` is the other end of its pipes, `protocol` what goes through them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import functools
import importlib
import inspect
import io
import json
import math
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_jax.rewards.calling import Calling, Request, call, plan_call
from grpo_jax.rewards.pool.keeper import keep
from grpo_jax.rewards.pool.protocol import FAILED, REQUEST, SETUP, pack_reply, shorten
from grpo_jax.screen import keep_standard_streams

MAX_CAUSES = 20  # of an error, one behind the other; they may go round
MAX_CHARACTERS_OF_LINE = 2000  # of an error's text
OWN_FRAMES = ("grpo_jax.rewards.pool", "grpo_jax.rewards.calling")
MAX_DESCRIPTOR = 1024  # the pipes get numbers just below it, or below the limit on open files: others count from 3


class Scorer(NamedTuple):
    """function: "package.module:function" that can be imported. settings: by the names of its parameters."""

    function: str
    settings: Mapping[str, Any]


class Setup(NamedTuple):
    """The first thing that a worker is told.

    scorers: by name. columns: of the data; None: not known. memory_limit_mb: MiB beyond what the imports take; 0: none.
    file_limit_mb: of a file that is written; 0: none.
    """

    scorers: Mapping[str, Scorer]
    columns: Collection[str] | None
    memory_limit_mb: int
    file_limit_mb: int = 0


class Frame(NamedTuple):
    """A message from the trainer. number: of the first of its jobs. body: pickled."""

    number: int
    num_jobs: int
    body: bytes


class Function(NamedTuple):
    """A scorer that can be called, and how."""

    function: Callable[..., Any]
    calling: Calling


def load(path: str) -> Callable[..., Any]:
    """Import "package.module:function". Raises whatever the import raises, and TypeError for what cannot be called."""
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function


def serve(trainer: int, folder: str = "") -> None:
    """Answer requests until their pipe, descriptor 0, ends; the body of a scoring process, never returns.

    trainer: the process that started this one, to end with. folder: for temporary files, gone with this process; "": none.
    """
    keep(trainer, folder)
    worker = os.getpid()
    requests, replies = _private(0, "rb"), _private(1, "wb")
    # A scorer may print and read as it likes: from here on its stdout is stderr, and its stdin is empty.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    keep_standard_streams()  # the trainer's terminal may be closed, and then a scorer that prints must not fail
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    pipes = [requests.fileno(), replies.fileno()]

    def close_in_child() -> None:
        # A process that a scorer forks has no pipe: what it would answer, no one asked. Its own children have none to close.
        while pipes:
            with contextlib.suppress(OSError):
                os.close(pipes.pop())

    os.register_at_fork(after_in_child=close_in_child)

    def reply(number: int, scores: Sequence[float], text: str = "", is_last: bool = False) -> None:
        # A scorer that forks returns twice, and once here, in the child.
        if os.getpid() != worker:
            os._exit(0)
        replies.write(pack_reply(number, scores, text, is_last=is_last))
        replies.flush()

    try:
        functions = _set_up(requests, reply)
        while (frame := _read_frame(requests)) is not None:
            for job in range(frame.num_jobs):
                scores, text, is_disk_full = _score(functions, frame, job)
                # Whatever it has written is in the way of others. The keeper removes what is in the folder for temporary files.
                reply(frame.number + job, scores, text, is_last=is_disk_full)
                if is_disk_full:
                    os._exit(0)
    except OSError:  # the trainer is gone, or a scorer has closed the pipes
        pass
    os._exit(0)  # threads that a scorer left behind must not keep the process alive


def _set_up(requests: io.BufferedReader, reply: Callable[..., None]) -> dict[str, Function]:
    """Load the scorers and tell the trainer how each is called; an import may fail in any way, and the trainer reports it."""
    frame = _read_frame(requests)
    if frame is None:
        os._exit(0)
    setup: Setup = pickle.loads(frame.body)
    functions = {}
    for name, (path, settings) in setup.scorers.items():
        doing = "import"
        try:
            function = load(path)
            doing = "call"
            calling = plan_call(path.partition(":")[2], inspect.signature(function), setup.columns, settings)
        except BaseException as error:
            reply(SETUP, (), f"cannot {doing} {path}: {describe(error)}\n{traceback_of(error)}")
            os._exit(1)
        functions[name] = Function(function, calling)
    # After the imports: the limit is for what a scorer does with an answer, not for the size of its libraries.
    note = _limit_memory(setup.memory_limit_mb)
    _limit_files(setup.file_limit_mb)
    facts = {name: facts_of(setup.scorers[name].function, each.calling) for name, each in functions.items()}
    reply(SETUP, [1.0], json.dumps({"facts": facts, "note": note}))
    return functions


def facts_of(path: str, calling: Calling) -> dict[str, Any]:
    """Return what the trainer must know of a scorer, as JSON can hold it."""
    return {
        "is_group": calling.form.is_group,
        "wants_prompt": calling.wants_prompt,
        "wants_ids": calling.wants_ids,
        "settings": list(calling.settings),
        "line": calling.describe(path),
    }


def _score(functions: Mapping[str, Function], frame: Frame, job: int) -> tuple[Sequence[float], str, bool]:
    """Run one job -> (scores or (), the first error in one line and its traceback or "", if an error is of a full disk)."""
    # Unpickling is inside the try too: it imports what the item's objects are made of, and a failure is that job's error. Each
    # job has its own item, whatever the one before did to it.
    try:
        name, request = pickle.loads(frame.body)
        request = Request(*request)
        if frame.num_jobs > 1:
            request = request.of_one(job)
        scores = call(*functions[name], request, _wait)
        failures = [score for score in scores if isinstance(score, Exception)]
        text = "".join(f"{describe(error)}\n{traceback_of(error)}" for error in failures[:1])
        return [_as_float(score) for score in scores], text, any(map(_is_of_full_disk, failures))
    except BaseException as error:  # SystemExit too: a scorer that exits has failed on this item
        return (), f"{describe(error)}\n{traceback_of(error)}", _is_of_full_disk(error)


def _is_of_full_disk(error: BaseException | None) -> bool:
    """Tell if an error, or one behind it, says that there is no room for a file."""
    for _ in range(MAX_CAUSES):
        if error is None:
            break
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        error = error.__cause__ or error.__context__
    return False


def _as_float(score: float | Exception | None) -> float:
    """Write what became of a completion as a number."""
    if score is None:
        return math.nan
    if isinstance(score, Exception):
        return FAILED
    return score


def describe(error: BaseException) -> str:
    """Describe an exception in one line; `traceback` survives exceptions whose own `__str__` raises."""
    return " ".join(shorten(traceback.format_exception_only(error)[-1], MAX_CHARACTERS_OF_LINE).split())


def traceback_of(error: BaseException) -> str:
    """Format an exception's traceback from the scorer's own frames on."""
    own = error.__traceback__
    while own is not None and own.tb_frame.f_globals.get("__name__", "").startswith(OWN_FRAMES):
        own = own.tb_next
    try:
        lines = "".join(traceback.format_exception(type(error), error, own, limit=100)).split("\n")
    except BaseException:  # its cause or context may be of any kind
        return describe(error)
    # Line by line: a long message must not push out where it came from.
    return "\n".join(shorten(line, MAX_CHARACTERS_OF_LINE) for line in lines)


def _wait(awaitable: Any) -> Any:
    """Run an awaitable to its end."""
    return _loop().run_until_complete(awaitable)


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """Make the event loop of this process: one for all calls, since a user's client belongs to the loop it was made in."""
    return asyncio.new_event_loop()


def _limit_memory(limit_mb: int) -> str:
    """Let allocations fail beyond what is in use now and `limit_mb` more (Linux, where that can be read); -> what to tell."""
    # An allocation that fails is a MemoryError of this job; without a limit the kernel might end the trainer instead.
    status = Path("/proc/self/statm")
    if not limit_mb or not status.exists():
        return ""
    import resource

    size = int(status.read_text().split()[0]) * resource.getpagesize() + limit_mb * 2**20
    allowed = resource.getrlimit(resource.RLIMIT_AS)[1]
    if allowed == resource.RLIM_INFINITY or size <= allowed:
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        return ""
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    return (
        f"config.reward.scoring.memory_limit_mb = {limit_mb} is more than `ulimit -v` leaves: "
        f"scoring processes have {allowed >> 20} MiB each, imports included"
    )


def _limit_files(limit_mb: int) -> None:
    """Let writing a file fail beyond a size, and write none when this process crashes."""
    import resource

    limits = {resource.RLIMIT_CORE: 0}
    if limit_mb:
        limits[resource.RLIMIT_FSIZE] = limit_mb * 2**20
    for kind, limit in limits.items():
        allowed = resource.getrlimit(kind)[1]
        if allowed == resource.RLIM_INFINITY or limit < allowed:
            resource.setrlimit(kind, (limit, limit))


def _private(descriptor: int, mode: str) -> Any:
    """Move a pipe to a number that no program uses by accident, and close the old one to programs that are started."""
    import resource

    top = min(MAX_DESCRIPTOR, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    return os.fdopen(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, max(3, top - 16)), mode)


def _read_frame(stream: io.BufferedReader) -> Frame | None:
    """Read the next message; None where the stream ends."""
    header = stream.read(REQUEST.size)
    if len(header) < REQUEST.size:
        return None
    number, num_jobs, length = REQUEST.unpack(header)
    body = stream.read(length)
    if len(body) < length:
        return None
    return Frame(number, num_jobs, body)
