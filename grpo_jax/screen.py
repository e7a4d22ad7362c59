"""stdout and stderr that may go away: a terminal that is closed, a pipe whose reader has had enough, a full disk under a log.

What a program computes is worth more than what it says on the way, so it goes on without being heard.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # for good; another error may pass, a full disk


class Screen(io.FileIO):
    """A descriptor to write to, whose errors are nobody's: what cannot be written is left out."""

    def write(self, data: Any, /) -> int:
        """Write, or seem to. Returns the number of bytes that are done with."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in GONE:
                # For the libraries that write by the descriptor's number, and to be done with it.
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return memoryview(data).nbytes


def keep_standard_streams() -> None:
    """Have stdout and stderr of this process be screens, and descriptors 0, 1 and 2 be no files of its own."""
    # A process that was started with one of them closed would open its records under that number, and libraries write to it.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    for name in ("stdout", "stderr"):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is None:  # closed when Python started
            nowhere = os.open(os.devnull, os.O_WRONLY)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(io.FileIO(nowhere, "w")), "utf-8"))
        elif stream is original and isinstance(stream, io.TextIOWrapper) and not isinstance(_raw_of(stream), Screen):
            stream.flush()
            raw = io.BufferedWriter(Screen(stream.fileno(), "w", closefd=False))
            screen = io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
            setattr(sys, name, screen)
            setattr(sys, f"__{name}__", screen)


def _raw_of(stream: io.TextIOWrapper) -> object:
    return getattr(stream.buffer, "raw", None)
