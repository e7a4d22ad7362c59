"""Files of records, one JSON object a line: continued after a kill, and read whatever has happened to them.

The last line alone may be torn, for a record is written by appending. Any other line that is no record was damaged by something
else: it is named and left where it is, and so is all that stands behind it.
"""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from grpo_jax.files import note_once, parse_json_object

Record = dict[str, Any]
Check = Callable[[Record], str]  # says what is wrong with a record, in a few words; "" if nothing is
BLOCK = 2**20  # bytes that are looked at together
SHOWN_LINES = 5  # damaged lines that are named one by one


class RecordFile:
    """A file that records are appended to, opened behind the last one of `step`; later ones are cut off, as they come again."""

    def __init__(self, path: pathlib.Path, step: int, check: Check):
        self.path = path
        self.end = cut_after(path, step, check)
        # Bytes and not text: every write is one whole line, which the system appends in one piece.
        self._file = path.open("ab", buffering=0)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record. Raises OSError naming the file."""
        # Half of a surrogate pair cannot be written as UTF-8; as an escape, JSON has a place for it.
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def sync(self) -> None:
        """Put all records so far on disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@dataclasses.dataclass
class End:
    """The end of a file of records, seen from a step. kept: the step of the last record up to it, None without one.

    offset: in bytes, behind all that stays. dropped: steps of the first and last record that does not stay. damaged: lines that
    are no records, from the end: offset, reason. is_torn: the last line was cut off.
    """

    offset: int
    kept: int | None = None
    dropped: tuple[int, int] | None = None
    damaged: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    is_torn: bool = False


def find_end(content: mmap.mmap, step: int, check: Check) -> End:
    """Find where the records up to a step end.

    Args:
      content: of the file. step: the last one that is wanted. check: of a record.
    """
    # From the end, since the wanted records are nearly all of the file. Records are in the order of their steps, so everything
    # behind one that comes again comes again; but a damaged line before it may be one that is wanted.
    found, end = End(len(content)), len(content)
    while end:
        start = content.rfind(b"\n", 0, end - 1) + 1
        line = content[start:end]
        record, reason = _parse(line, check)
        if record is not None and record["step"] <= step:
            found.kept = record["step"]
            break
        if record is not None:
            found.offset = start
            found.dropped = record["step"], (found.dropped or (0, record["step"]))[1]
        elif not line.endswith(b"\n"):
            found.offset, found.is_torn = start, True
        else:
            found.damaged.append((start, reason))
        end = start
    return found


def cut_after(path: pathlib.Path, step: int, check: Check) -> End:
    """Cut a file behind its last record of `step` or before it, and say what was wrong with its end.

    Only the end is read and the rest is not touched: a kill in the middle of this loses nothing.

    Args:
      path: absent or any file. step: the last one that is wanted. check: of a record.
    """
    if not path.exists() or not path.stat().st_size:
        return End(0)
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = find_end(content, step, check)
            is_whole = not found.offset or content[found.offset - 1] == ord("\n")
            _say_what_is_wrong(path, found, content)
        file.truncate(found.offset)
        if not is_whole:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")  # or the next record would be glued to this one, and both be lost
    return found


def _say_what_is_wrong(path: pathlib.Path, found: End, content: mmap.mmap) -> None:
    """Name the damaged lines at the end of a file."""
    if found.is_torn:
        note_once(f"{path}: its last line is torn, as a kill leaves it: removed")
    staying = [(offset, reason) for offset, reason in reversed(found.damaged) if offset < found.offset]
    if staying:
        first, reason = staying[0]
        number = 1 + sum(content[i : min(i + BLOCK, first)].count(b"\n") for i in range(0, first, BLOCK))
        more = f" and {len(staying) - 1} more" if len(staying) > 1 else ""
        note_once(f"{path}, line {number}{more}: no record ({reason}); left there, and skipped by all that read the file")
    if len(staying) < len(found.damaged):
        note_once(f"{path}: {len(found.damaged) - len(staying)} damaged line(s) behind a step that is done again: removed")


def _parse(line: bytes, check: Check) -> tuple[Record | None, str]:
    """Return (the record of a line or None, what is wrong with it)."""
    try:
        record = parse_json_object(line)
    except ValueError as error:
        return None, str(error)
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        return None, "it has no step"
    reason = check(record)
    if reason:
        return None, reason
    return record, ""


def scan(path: pathlib.Path, check: Check) -> Iterator[tuple[Record | None, str]]:
    """Yield (record or None, where and what is wrong with it) of each line of a file; nothing if it is absent.

    Args:
      path: of the file. check: of a record.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            record, reason = _parse(line, check)
            if record is None and not line.endswith(b"\n"):
                reason = "the last one, torn"
            yield record, f"line {number} ({reason})" if record is None else ""


def read_records(path: pathlib.Path, check: Check) -> Iterator[Record]:
    """Yield the records of a file, in its order, and say which lines are none; nothing if it is absent.

    Args:
      path: of the file. check: of a record.
    """
    damaged: list[str] = []
    for record, fault in scan(path, check):
        if record is not None:
            yield record
        else:
            damaged.append(fault)
    if damaged:
        more = f" and {len(damaged) - SHOWN_LINES} more" if len(damaged) > SHOWN_LINES else ""
        note_once(f"{path}: no record, skipped: {', '.join(damaged[:SHOWN_LINES])}{more}")
