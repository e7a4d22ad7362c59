"""The loop of a scoring process; `grpo_jax.tasks.scoring_worker` is the other end of its pipes.

One frame each way per item: 8 bytes of little-endian length, then a pickle.
    to the worker    (item, completion)
    from the worker  first (is_ready, message), then (score, error); an empty error means that the score counts
"""

from __future__ import annotations

import ctypes
import importlib
import io
import os
import pickle
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from typing import Any, cast

Scorer = Callable[[dict[str, Any], str], float]

HEADER = struct.Struct("<Q")
FLOAT32_MAX = 3.4028234e38
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def load_scorer(name: str) -> Scorer:
    """Import "package.module:function". Raises whatever the import raises."""
    module, _, function = name.partition(":")
    scorer = getattr(importlib.import_module(module), function)
    if not callable(scorer):
        raise TypeError(f"{function} is not a function")
    return cast(Scorer, scorer)


def pack(message: Any) -> bytes:
    """One frame: length, then pickle."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return HEADER.pack(len(body)) + body


def serve(scorer: str, parent_pid: int) -> None:
    """Score frames from file descriptor 0 until it ends; the body of a worker process, never returns."""
    _die_with_parent(parent_pid)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # The scorer may print and read as it likes: from here on its stdout is stderr, and its stdin is empty.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)
    try:
        function = load_scorer(scorer)
        _send(replies, (True, ""))
        while (frame := _read_frame(requests)) is not None:
            _send(replies, _judge(function, frame))
    except BrokenPipeError:  # the parent is gone
        pass
    except BaseException as error:  # a scorer's import may raise anything; the parent reports it
        _send(replies, (False, _describe(error)))
    os._exit(0)  # threads that the scorer left behind must not keep the process alive


def _judge(function: Scorer, frame: bytes) -> tuple[float, str]:
    try:
        item, completion = pickle.loads(frame)
        value = function(item, completion)
        if isinstance(value, str | bytes):
            raise TypeError(f"the scorer returned {value!r:.80}, not a number")
        score = float(value)
        if not abs(score) <= FLOAT32_MAX:  # written so that NaN fails too
            raise ValueError(f"the scorer returned {score}, not a finite number")
    except BaseException as error:  # SystemExit too: a scorer that exits has failed on this item
        return 0.0, _describe(error)
    return score, ""


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
    return body if len(body) == length else None


def _send(stream: io.BufferedIOBase, message: Any) -> None:
    stream.write(pack(message))
    stream.flush()


def _die_with_parent(parent_pid: int) -> None:
    """Have the kernel end this process when its parent ends, however it ends (Linux; elsewhere end-of-file has to do).

    A worker stuck in its scorer does not read its pipe, so it would never notice a parent that was killed.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):  # a C library without prctl
        return
    if os.getppid() != parent_pid:  # it ended before the call above
        os._exit(1)
