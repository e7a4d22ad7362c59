"""The disk under a run's folder: room for its checkpoints, and one line in place of what its faults raise."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax

from grpo_jax.errors import RunError, UserError
from grpo_jax.files import note_once
from grpo_jax.training.checkpoint import saved_fields
from grpo_jax.types import TrainState

# Errors that a program has no part in, and the words by which libraries pass them on that know no error numbers.
FAULTS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE),
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE),
)
WORDS = ("No space left", "quota", "File too large", "Read-only", "Permission denied", "Input/output error", "Stale file")
FILES = ("config.json", "sources.json", "metrics.jsonl", "completions.jsonl", "summary.json", "lock")
OF_NO_ROOM = re.compile("No space left|quota|File too large")


def size_of_checkpoint(like: TrainState) -> int:
    """Return the bytes of a checkpoint, at most (Orbax compresses). like: the state, or its shapes."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(saved_fields(like)))


def require_place(workdir: pathlib.Path) -> None:
    """Look if a run's folder can be made and written, as far as that is known without doing it.

    Raises: UserError naming what is in the way.
    """
    try:
        place = workdir.absolute()
        while not place.exists():
            place = place.parent
        reason = ""
        if not place.is_dir():
            reason = f"{place} is no folder"
        elif not os.access(place, os.W_OK | os.X_OK):
            reason = f"{place} is read-only, or another user's"
        in_the_way = [name for name in FILES if (workdir / name).is_dir()]
        if in_the_way:
            reason = f"{in_the_way[0]} there is a folder"
    except OSError as error:  # a name that is too long
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"--workdir={workdir}: cannot be written ({reason}); choose another folder")


def require_room(workdir: pathlib.Path, like: TrainState, keep: int) -> None:
    """Look if the checkpoints that a run will have at a time fit on the disk, those beside them that are there already.

    Args:
      workdir: exists. like: the run's state. keep: checkpoints kept.
    Raises: RunError if not even one fits; if it may become tight later, that is said.
    """
    one, free = size_of_checkpoint(like), shutil.disk_usage(workdir).free
    there = sum(path.stat().st_size for path in (workdir / "checkpoints").rglob("*") if path.is_file())
    # The oldest goes when the newest is complete: for a moment there is one more than are kept.
    needed = (max(keep, 1) + 1) * one
    said = f"--workdir={workdir}: {in_units(free)} are free there; a checkpoint takes up to {in_units(one)}"
    if free < one:
        raise RunError(f"{said}: make room, or choose another folder")
    if free + there < needed:
        note_once(f"{said}, and config.checkpoint.keep = {keep} with one being written {in_units(needed)}: it may become full")


def in_units(num_bytes: float) -> str:
    """Write bytes in a unit that leaves few digits: 3.1 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


@contextlib.contextmanager
def faults_in_one_line(workdir: pathlib.Path, like: TrainState) -> Iterator[None]:
    """Turn what a full, broken or vanished disk raises into RunError. like: the state of the run, for its size."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = describe_fault(error)
        if reason is None:
            raise
        needed = ""
        with contextlib.suppress(OSError):
            if OF_NO_ROOM.search(reason):
                free = in_units(shutil.disk_usage(workdir).free)
                needed = f" ({free} are free, a checkpoint takes up to {in_units(size_of_checkpoint(like))})"
        raise RunError(
            f"{workdir}: cannot be written: {reason}{needed}; what was saved before is whole, the same command goes on from it"
        ) from error


def describe_fault(error: BaseException | None) -> str | None:
    """Say in a few words what went wrong on the disk; None if the error is of another kind."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FAULTS and not isinstance(error, ConnectionError):
            where = f" ({error.filename})" if error.filename else ""
            return f"{error.strerror}{where}"
        words: Any = next((words for words in WORDS if words in str(error)), None)
        if words:
            # TensorStore writes its whole way to the file into one line: the last name before the words is the file.
            before = str(error).partition(words)[0]
            names = re.findall(r'"([^"]+)"', before)
            return f"{words} ({names[-1]})" if names else words
        error = error.__cause__ or error.__context__
    return None
