"""The process above a scoring process: however that or the trainer ends, nothing that a reward started stays.

    trainer -> keeper -> worker -> whatever a reward starts

The keeper does nothing but wait. On Linux it is the subreaper of all below: a process that is orphaned, daemonised ones
included, becomes its child, so it can go on killing until it has none. A reward's parent is the keeper and not the trainer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # from linux/prctl.h
MARK = "GRPO_JAX_SCORING"  # environment variable of all processes of one worker
SWEEP_SECS = 5.0
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def keep(trainer: int, folder: str = "") -> None:
    """Become two processes: returns in the worker, and never in the keeper, which ends as the worker did.

    trainer: the process that started this one. folder: for temporary files, removed at the end; "": none.
    """
    # The trainer's death is a SIGTERM, not a SIGKILL: there is something left to do.
    die_with(trainer, signal.SIGTERM)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    # Blocked until the handler is there: a signal between would leave the worker behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        die_with(keeper, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
        return
    # The pipes are the worker's alone: the trainer sees their end when it ends.
    for descriptor in (0, 1):
        os.close(descriptor)
    for number in ENDING:
        signal.signal(number, lambda number, _: _leave(worker, 128 + number, folder))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    # Orphans end here too; each is taken off the table at once.
    ended, status = os.waitpid(-1, 0)
    while ended != worker:
        ended, status = os.waitpid(-1, 0)
    code = os.waitstatus_to_exitcode(status)
    _leave(worker, code if code >= 0 else 128 - code, folder)


def _leave(worker: int, code: int, folder: str) -> None:
    """Kill all processes below this one, until there are none (Linux; elsewhere the worker alone), and end."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    deadline = time.monotonic() + SWEEP_SECS
    kill(worker)
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid()):
            kill(pid)
        # Those whose parents have just been killed are children of this one now; so are their own.
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        time.sleep(0.001)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(code)


def die_with(parent: int, number: int) -> None:
    """Ask the kernel for a signal when the parent ends, however it ends (Linux; elsewhere the end of a pipe has to do)."""
    # A worker stuck in its scorer does not read its pipe, so it would never notice a parent that was killed.
    if _prctl(PR_SET_PDEATHSIG, number) and os.getppid() != parent:  # it ended before the call
        os._exit(1)


def descendants(pid: int) -> list[int]:
    """List the processes below one (Linux; none elsewhere)."""
    parents: dict[int, list[int]] = {}
    for each, parent in _parents():
        parents.setdefault(parent, []).append(each)
    found = list(parents.get(pid, []))
    for child in found:  # grows while it is gone through
        found += parents.get(child, [])
    return found


def marked(mark: str) -> tuple[list[int], bool]:
    """List the processes whose environment began with this mark (Linux; none elsewhere).

    Returns: (they; True if some process has no environment: it may have, as soon as the program that it becomes has begun).
    """
    wanted, found, is_one_between = f"{MARK}={mark}".encode(), [], False
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # another user's, or it ended a moment ago
            environment = file.read_bytes()
            if wanted in environment.split(b"\0"):
                found.append(int(file.parent.name))
            elif not environment:
                os.readlink(file.with_name("exe"))  # the kernel's own processes and those that have ended have no program
                is_one_between = True
    return found, is_one_between


def kill(pid: int) -> bool:
    """Kill a process; False if it is gone, or not ours."""
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _parents() -> Iterator[tuple[int, int]]:
    """Yield (process, its parent) of all processes."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended a moment ago
            yield int(file.parent.name), int(file.read_text(errors="replace").rpartition(")")[2].split()[1])


def _prctl(option: int, value: int) -> bool:
    """Set an attribute of this process; False where the system has no prctl."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0
    except (OSError, AttributeError):  # a C library without prctl
        return False
