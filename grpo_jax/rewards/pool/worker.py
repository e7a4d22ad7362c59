"""The parent's end of one scoring process; `grpo_jax.rewards.pool.serve` is the other end."""

from __future__ import annotations

import contextlib
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.rewards.pool.serve import HEADER


class Worker:
    """One scoring process and what it is at: starting, idle, or busy with job `index` since `since`."""

    def __init__(
        self, scorers: Mapping[str, tuple[str, Mapping[str, Any]]], memory_limit_mb: int, selector: selectors.BaseSelector
    ) -> None:
        # The worker imports what this process can import: the same sys.path, in which an empty entry means the current folder.
        path = [*(entry or os.getcwd() for entry in sys.path), os.getcwd()]
        setup = f"import sys; sys.path[:] = {path!r}; from grpo_jax.rewards.pool.serve import serve"
        command = [sys.executable, "-c", f"{setup}; serve({dict(scorers)!r}, {memory_limit_mb}, {os.getpid()})"]
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}  # the accelerator is the trainer's
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C at the terminal is for the trainer, and what a scorer starts can be killed too.
        self._process = subprocess.Popen(command, bufsize=0, stdin=pipe, stdout=pipe, start_new_session=True, env=env)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._selector = selector
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self.is_ready = False
        self.index: int | None = None
        self.since = time.monotonic()
        # One thread serves all workers, so no pipe may make it wait: a hung worker does not read a frame larger than its pipe.
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)
        selector.register(self._stdout, selectors.EVENT_READ, self)

    @property
    def is_idle(self) -> bool:
        """True if a job can be sent."""
        return self.is_ready and self.index is None

    def send(self, index: int, frame: bytes) -> bool:
        """Hand over a job. False if the process had died before, so that nobody has seen the job."""
        try:
            num_sent = os.write(self._stdin.fileno(), frame)
        except BrokenPipeError:
            return False
        self.index, self.since = index, time.monotonic()
        if num_sent < len(frame):  # larger than the pipe: the rest goes when the worker has read some
            self._unsent = memoryview(frame)[num_sent:]
            self._selector.register(self._stdin, selectors.EVENT_WRITE, self)
        return True

    def send_rest(self) -> None:
        """Go on with a large frame."""
        try:
            self._unsent = self._unsent[os.write(self._stdin.fileno(), self._unsent) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # its stdout says so as well, and that is where death is dealt with
            self._unsent = memoryview(b"")
        if not self._unsent:
            self._selector.unregister(self._stdin)

    def receive(self) -> tuple[Any, str] | None:
        """Return the next message if all of it has arrived, else None. Raises EOFError if the process has ended."""
        try:
            data = os.read(self._stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        self._received += data
        if len(self._received) < HEADER.size:
            return None
        end = HEADER.size + HEADER.unpack_from(self._received)[0]
        if len(self._received) < end:
            return None
        message = pickle.loads(self._received[HEADER.size : end])
        del self._received[:end]
        return message

    def kill(self) -> int:
        """End the process and all it started, and wait for it. Returns its exit code.

        A child that began a session of its own escapes if the process itself had ended before.
        """
        for pipe in (self._stdin, self._stdout):
            if pipe.fileno() in self._selector.get_map():
                self._selector.unregister(pipe)
            pipe.close()
        # Listed before the kill: afterwards the children have another parent and could not be found.
        children = _descendants(self._process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # it has ended, and so has all it started
            os.killpg(self._process.pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        return self._process.wait()


def _descendants(pid: int) -> list[int]:
    """List the processes below one (Linux; none elsewhere, where only those of its group are ended)."""
    parents: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended a moment ago
            parent = int(file.read_text(errors="replace").rpartition(")")[2].split()[1])
            parents.setdefault(parent, []).append(int(file.parent.name))
    found = parents.get(pid, [])
    for child in found:  # grows while it is gone through
        found += parents.get(child, [])
    return found
