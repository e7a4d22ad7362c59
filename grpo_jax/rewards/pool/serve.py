"""The loop of a scoring process; `grpo_jax.rewards.pool.worker` is the other end of its pipes.

One frame each way per job: 8 bytes of little-endian length, then a pickle.
    to the worker    (scorer, item, completions): one completion, or all of a prompt for a scorer that takes them together
    from the worker  first (scorer -> whether it takes them together, error), then (scores, error); "" means no error
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import inspect
import io
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

HEADER = struct.Struct("<Q")
FLOAT32_MAX = 3.4028234e38
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # from linux/prctl.h


class Function(NamedTuple):
    """A scorer with its settings bound. is_batch: it takes all completions of a prompt together."""

    call: Callable[..., Any]
    is_batch: bool


def load(path: str, settings: Mapping[str, Any]) -> Function:
    """Import "package.module:function" and bind its settings.

    Raises whatever the import raises, and TypeError for what is no scorer.
    """
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    first = next(iter(inspect.signature(function).parameters), None)
    if first not in ("completion", "completions"):
        raise TypeError(f"the first parameter of {name} is {first!r}; call it `completion`, or `completions` for a whole group")
    return Function(functools.partial(function, **settings), first == "completions")


def pack(message: Any) -> bytes:
    """One frame: length, then pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def serve(scorers: Mapping[str, tuple[str, Mapping[str, Any]]], memory_limit_mb: int, parent_pid: int) -> None:
    """Answer frames from file descriptor 0 until it ends; the body of a worker process, never returns.

    Args:
      scorers: name -> ("module:function", settings).
      memory_limit_mb: MiB beyond what the imports take; 0: no limit. parent_pid: the process to end with.
    """
    _die_with_parent(parent_pid)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # A scorer may print and read as it likes: from here on its stdout is stderr, and its stdin is empty.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        functions = {}
        for name, (path, settings) in scorers.items():
            try:
                functions[name] = load(path, settings)
            except BaseException as error:  # an import may raise anything; the parent reports it
                _send(replies, (None, f"{path}: {_describe(error)}"))
                os._exit(1)
        _send(replies, ({name: function.is_batch for name, function in functions.items()}, ""))
        # After the imports: the limit is for what a scorer does with an answer, not for the size of its libraries.
        if memory_limit_mb:
            _limit_memory(memory_limit_mb)
        while (frame := _read_frame(requests)) is not None:
            _send(replies, _score(functions, frame))
    except BrokenPipeError:  # the parent is gone
        pass
    os._exit(0)  # threads that a scorer left behind must not keep the process alive


def _score(functions: Mapping[str, Function], frame: bytes) -> tuple[list[float], str]:
    """Run one job -> (scores, ""), or ([], error in one line)."""
    # Unpickling is inside the try too: it imports what the item's objects are made of, and a failure is that job's error.
    try:
        name, item, completions = pickle.loads(frame)
        function = functions[name]
        values = function.call(completions, item) if function.is_batch else [function.call(completions[0], item)]
        if len(values) != len(completions):
            raise ValueError(f"the scorer returned {len(values)} scores for {len(completions)} completions")
        return [_as_score(value) for value in values], ""
    except BaseException as error:  # SystemExit too: a scorer that exits has failed on this item
        return [], _describe(error)


def _as_score(value: Any) -> float:
    """Turn what a scorer returned into a float that float32 can hold. Raises TypeError or ValueError if it is none."""
    # float("0.5") would pass, but a scorer that returns text has returned the wrong thing.
    if isinstance(value, str | bytes):
        raise TypeError(f"the scorer returned {value!r:.80}, not a number")
    score = float(value)
    if not abs(score) <= FLOAT32_MAX:  # written so that NaN fails too
        raise ValueError(f"the scorer returned {score}, not a finite number")
    return score


def _limit_memory(limit_mb: int) -> None:
    """Let allocations fail beyond what is in use now and `limit_mb` more (Linux, where that can be read)."""
    # An allocation that fails is a MemoryError of this job; without a limit the kernel might end the trainer instead.
    status = Path("/proc/self/statm")
    if status.exists():
        import resource

        size = int(status.read_text().split()[0]) * resource.getpagesize() + limit_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _describe(error: BaseException) -> str:
    """The exception in one line; `traceback` survives exceptions whose own `__str__` raises."""
    return traceback.format_exception_only(error)[-1].strip().replace("\n", " ")[:300]


def _read_frame(stream: io.BufferedIOBase) -> bytes | None:
    """The next frame's body, or None where the stream ends."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    (length,) = HEADER.unpack(header)
    body = stream.read(length)
    if len(body) < length:
        return None
    return body


def _send(stream: io.BufferedIOBase, message: Any) -> None:
    stream.write(pack(message))
    stream.flush()


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel to end this process when its parent ends, however it ends (Linux; elsewhere end-of-file has to do).

    A worker stuck in its scorer does not read its pipe, so it would never notice a parent that was killed.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a scorer starts stays below this process, where `Worker.kill` finds it
    except (OSError, AttributeError):  # a C library without prctl
        return
    if os.getppid() != parent_pid:  # it ended before the call above
        os._exit(1)
