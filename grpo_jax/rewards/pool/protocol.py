"""Messages between the pool and its workers, and their checks.

    to a worker    number, jobs, length; then a pickle: first its setup, then (scorer, Request)
    from a worker  mark, number, count, length; then `count` float32, then `length` bytes of UTF-8; another mark in its last one

A message has one job, or several: then each is one of the request's completions, and each has a reply of its own, with the next
number.

A worker runs code that nobody has checked, so nothing of what it sends is unpickled, and what has not the number of the job it
was given is not believed. NaN is "no opinion" and minus infinity "failed", for a score itself is finite; the text says how.
Count 0 is an error of the whole job.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

REQUEST = struct.Struct("<QIQ")
REPLY = struct.Struct("<4sQII")
MARKS = MARK, LAST_MARK = b"\xffGJ1", b"\xffGJ2"
FAILED = -math.inf
SETUP = 0  # the number of a worker's first message
MAX_TEXT = 1 << 16  # bytes
MAX_LINE = 300  # characters of an error's one line


class ProtocolError(Exception):
    """A worker's bytes are no reply to what it was asked."""


class Reply(NamedTuple):
    """scores: one a completion, NaN for no opinion, FAILED for an error, whose first line and traceback are in the text.

    Without scores all of the job has failed. is_last: the worker ends behind it.
    """

    scores: Sequence[float]
    text: str
    is_last: bool = False


def pack_request(number: int, message: Any, num_jobs: int = 1) -> bytes:
    """Frame a message to a worker. number: of the first of its jobs."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return REQUEST.pack(number, num_jobs, len(body)) + body


def pack_reply(number: int, scores: Sequence[float], text: str = "", *, is_last: bool = False) -> bytes:
    """Frame a message from a worker. Text beyond the limit is left out in the middle."""
    mark = LAST_MARK if is_last else MARK
    body = shorten(text, MAX_TEXT // 4).encode("utf-8", "backslashreplace")
    return REPLY.pack(mark, number, len(scores), len(body)) + struct.pack(f"<{len(scores)}f", *scores) + body


def read_reply(data: bytearray, number: int, num_scores: int) -> Reply | None:
    """Take a reply from the beginning of what has arrived.

    Args:
      data: bytes; those of the reply are removed. number: of the job that the worker has. num_scores: of its completions.
    Returns: the reply, or None where more of it is to come.
    Raises: ProtocolError if it is no reply to this job.
    """
    if len(data) < REPLY.size:
        if not any(mark.startswith(data[: len(mark)]) for mark in MARKS):
            raise ProtocolError("bytes that are no reply")
        return None
    mark, got, count, length = REPLY.unpack_from(data)
    if mark not in MARKS:
        raise ProtocolError("bytes that are no reply")
    if got != number:
        raise ProtocolError(f"a reply to job {got}, not to {number}")
    if count not in (0, num_scores) or length > MAX_TEXT:
        raise ProtocolError(f"{count} scores for {num_scores} completions, and {length} bytes of text")
    end = REPLY.size + 4 * count + length
    if len(data) < end:
        return None
    scores = struct.unpack_from(f"<{count}f", data, REPLY.size)
    if math.inf in scores:
        raise ProtocolError("a score that is not finite")
    try:
        text = data[REPLY.size + 4 * count : end].decode()
    except UnicodeDecodeError:
        raise ProtocolError("text that is not UTF-8") from None
    del data[:end]
    return Reply(scores, text, mark == LAST_MARK)


def shorten(text: str, limit: int) -> str:
    """Leave out the middle of a text that is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}\n[... {len(text) - limit} characters left out ...]\n{text[-limit // 2 :]}"


def printable(text: str) -> str:
    """Write what is no printable character as Python does in quotes: no text from a reward may steer a terminal."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def one_line(text: str) -> str:
    """Bring an error into one printable line of bounded length."""
    line = printable(" ".join(text[: 4 * MAX_LINE].split()))
    if len(line) > MAX_LINE:
        return f"{line[: MAX_LINE - 4]} ..."
    return line
