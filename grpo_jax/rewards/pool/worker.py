"""The trainer's end of one scoring process; `grpo_jax.rewards.pool.serve` is the other end."""

from __future__ import annotations

import collections
import contextlib
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

from grpo_jax.rewards.pool.keeper import MARK, kill, marked
from grpo_jax.rewards.pool.protocol import SETUP, ProtocolError, Reply, pack_request, read_reply
from grpo_jax.rewards.pool.serve import Setup

LEAVE_SECS = 6.0  # for the keeper to end all below it, once it is asked to
FOLLOW_SECS = 1.0  # for it to end by itself, once the worker has
MAX_SWEEPS, SWEEP_PAUSE_SECS = 20, 0.05  # for what a killed keeper has left


class SentJob(NamedTuple):
    """A job as a worker is given it.

    index: in its batch. number: in the pool's life. num_scores: that the reply has. limit_secs: that it may take.
    """

    index: int
    number: int
    num_scores: int
    limit_secs: float


class Worker:
    """One scoring process and what it is at: starting, idle, or busy with job `index` since `since`.

    ahead: jobs that it has behind this one. num_begun: jobs that it was at so far.
    """

    def __init__(self, setup: Setup, selector: selectors.BaseSelector) -> None:
        # The worker imports what this process can import: the same sys.path, in which an empty entry means the current folder.
        path = [*(entry or os.getcwd() for entry in sys.path), os.getcwd()]
        self._mark, self._folder = secrets.token_hex(8), make_folder()
        serve = f"from grpo_jax.rewards.pool.serve import serve; serve({os.getpid()}, {self._folder!r})"
        code = f"import sys; sys.path[:] = {path!r}; {serve}"
        env = {**os.environ, "JAX_PLATFORMS": "cpu", MARK: self._mark}  # the accelerator is the trainer's
        if self._folder:
            env["TMPDIR"] = self._folder
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C at the terminal is for the trainer, and what a scorer starts can be killed too.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], bufsize=0, stdin=pipe, stdout=pipe, start_new_session=True, env=env
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        self._selector = selector
        self._unsent = memoryview(b"")
        self._received = bytearray()
        self.is_ready = False
        self.index: int | None = None
        self.since, self.limit_secs = time.monotonic(), 0.0
        self._number, self._num_scores, self.num_begun = SETUP, 1, 0
        self.ahead: collections.deque[SentJob] = collections.deque()
        # One thread serves all workers, so no pipe may make it wait: a hung worker does not read a frame larger than its pipe.
        for pipe in (self._stdin, self._stdout):
            os.set_blocking(pipe.fileno(), False)
        selector.register(self._stdout, selectors.EVENT_READ, self)
        self._write(pack_request(SETUP, setup))

    @property
    def is_idle(self) -> bool:
        """True if a job can be sent."""
        return self.is_ready and self.index is None

    def send(self, jobs: Sequence[SentJob], frame: bytes) -> bool:
        """Hand over jobs, to be done one after another. frame: `pack_request` of them.

        Returns: False if the process had died before, so that nobody has seen them.
        """
        if not self._write(frame):
            return False
        self.ahead.extend(jobs)
        self.go_on()
        return True

    def go_on(self) -> None:
        """Turn to the next job that it has; without one it is idle."""
        self.index = None
        if self.ahead:
            self.index, self._number, self._num_scores, self.limit_secs = self.ahead.popleft()
            self.since = time.monotonic()
            self.num_begun += 1

    def _write(self, frame: bytes) -> bool:
        """Begin to send a frame. False if nobody reads."""
        try:
            num_sent = os.write(self._stdin.fileno(), frame)
        except BrokenPipeError:
            return False
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

    def receive(self) -> Reply | None:
        """Return the reply if all of it has arrived, else None.

        Raises: EOFError if the process has ended. ProtocolError if what has come is no reply to what it is at.
        """
        try:
            data = os.read(self._stdout.fileno(), 1 << 16)
        except BlockingIOError:
            return None
        if not data:
            raise EOFError
        if self.is_idle:
            raise ProtocolError("bytes that nobody asked for")
        self._received += data
        return self.read()

    def read(self) -> Reply | None:
        """Return the reply to what it is at, if all of it has arrived. Raises ProtocolError."""
        return read_reply(self._received, self._number, self._num_scores)

    @property
    def has_more(self) -> bool:
        """True if more has come than the reply: someone beside the worker writes into its pipe."""
        return bool(self._received)

    def kill(self, *, has_ended: bool = False) -> int:
        """End the process and all it started, and wait for it.

        has_ended: it went by itself, and its keeper is about to follow. Returns its exit code, 128 + n if signal n ended it;
        below 0: something has killed the keeper above it.
        """
        try:
            return self._kill(has_ended)
        finally:
            if self._folder:  # the keeper has removed it, unless it was killed
                shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self, has_ended: bool) -> int:
        for pipe in (self._stdin, self._stdout):
            if pipe.fileno() in self._selector.get_map():
                self._selector.unregister(pipe)
            pipe.close()
        code = self._wait(FOLLOW_SECS) if has_ended else None
        if code is None:
            self._process.terminate()
            code = self._wait(LEAVE_SECS)
        if code is not None and code >= 0:
            return code
        # The keeper was killed or stopped, which only a scorer does. What it kept is known by its mark; what forks meanwhile is
        # found the next time.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        num_clean = 0  # twice in a row: one that forked and ended while /proc was read hides its child from the first look
        for _ in range(MAX_SWEEPS):
            found, is_one_between = marked(self._mark)
            num_clean = 0 if found or is_one_between else num_clean + 1
            if num_clean == 2:
                break
            if not any([kill(pid) for pid in found]):
                time.sleep(SWEEP_PAUSE_SECS)
        return self._process.wait()

    def _wait(self, secs: float) -> int | None:
        """Wait for the keeper; None if it has not ended by then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(secs)
        return None


def make_folder() -> str:
    """Make a folder for the temporary files of a worker's rewards; "" where there is no room for one."""
    try:
        return tempfile.mkdtemp(prefix="grpo_jax_reward_")
    except OSError:
        return ""
