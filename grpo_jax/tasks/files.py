"""Rows of data files: JSON Lines, a JSON array, CSV, TSV or Parquet, each but the last maybe gzipped; several, or a glob."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError

Row = tuple[dict[str, Any], str]  # with its place, for messages

SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"


def is_files(path: str) -> bool:
    """Tell if a path means data files, and not a folder or a dataset of the hub."""
    if Path(path).expanduser().is_dir():
        return False
    parts = path.split(",")
    return any(part.strip().lower().removesuffix(".gz").endswith(SUFFIXES) or glob.has_magic(part) for part in parts)


def find_files(path: str, field: str) -> list[str]:
    """List the files that a path means: one, several with commas between them, or globs, whose files come by name.

    Args:
      path: from the config. field: it came from, for the errors.
    Returns: the files, in the order in which they are read.
    Raises: UserError if a glob finds nothing, or a file twice.
    """
    if not path.strip():
        raise UserError(f"{field} is empty: name a file")
    if Path(path).expanduser().exists():  # a name may hold a comma or a bracket
        return [path]
    found = []
    for part in (each.strip() for each in path.split(",")):
        here = [part]
        if glob.has_magic(part):
            here = sorted(glob.glob(str(Path(part).expanduser()), recursive=True))
        if not here:
            raise UserError(f"{field} = {path!r}: no file is called like {part!r}")
        found += here
    twice = next((file for file in found if found.count(file) > 1), None)
    if twice is not None:
        raise UserError(f"{field} = {path!r}: names {twice!r} twice")
    return found


def read_rows(path: str, field: str) -> Iterator[Row]:
    """Yield the rows of data files.

    Args:
      path: as in `find_files`. field: the config field that `path` came from, for the errors.
    Returns: (row, its place as file:line) of each; blank lines are skipped.
    Raises: UserError with file and line for what is not such a file, or if a file holds nothing.
    """
    for file in find_files(path, field):
        is_empty = True
        for row in _read_file(file, field):
            is_empty = False
            yield row
        if is_empty:
            raise UserError(f"{field} = {file!r}: the file is empty; give one JSON object a line")


def _read_file(file: str, field: str) -> Iterator[Row]:
    try:
        data = Path(file).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{field} = {file!r}: cannot read it: {error.strerror}") from error
    # By what the file holds and not by its name, where that can be seen: names lie more often.
    if data.startswith(GZIP):
        data = _unzip(data, file)
    if data.startswith(PARQUET):
        return _read_parquet(data, file)
    name = file.lower().removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        return _read_table(data, file, "\t" if name.endswith(".tsv") else ",")
    # Some editors begin a file with a byte order mark.
    data = data.removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        return _read_array(data, file)
    return _read_lines(data, file)


def _unzip(data: bytes, file: str) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: a gzip file that cannot be unpacked ({error})") from error


def _read_lines(data: bytes, file: str) -> Iterator[Row]:
    # Split as bytes, and at \n alone: str.splitlines also breaks at U+2028, which JSON allows inside of a string, and one line
    # that is not UTF-8 can be named by its number.
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{file}:{number}"
        text = _decode(line, where).strip()
        if text:
            yield _as_row(_parse(text, file, number, "each line must be one JSON object"), where), where


def _read_array(data: bytes, file: str) -> Iterator[Row]:
    """Yield the objects of a JSON array."""
    rows = _parse(_decode(data, file), file, 1, "give one JSON object a line, or an array of them")
    for number, row in enumerate(rows, 1):
        where = f"{file}, element {number}"
        yield _as_row(row, where), where


def _read_table(data: bytes, file: str, delimiter: str) -> Iterator[Row]:
    """Yield the rows of a CSV file with a header. All values are text, as the file writes them; empty ones are null."""
    # Not by a library that guesses types: one empty cell would make a column of whole numbers one of floats.
    text = _decode(data.removeprefix(b"\xef\xbb\xbf"), file)
    csv.field_size_limit(2**31 - 1)  # a long prompt is no mistake
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        _require_once(reader.fieldnames or (), f"{file}:1")
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: has another number of columns than the header")
            yield {name: value or None for name, value in row.items()}, where
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: not CSV ({error})") from error


def _read_parquet(data: bytes, file: str) -> Iterator[Row]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{file}: a Parquet file needs pyarrow: pip install 'grpo_jax[tasks]'") from None
    number = 0
    try:
        opened = parquet.ParquetFile(pyarrow.BufferReader(data))
        _require_once(opened.schema_arrow.names, file)
        for batch in opened.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield row, f"{file}, row {number}"
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: a Parquet file that cannot be read: {' '.join(str(error).split())}") from error


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error


def _parse(text: str, file: str, line: int, want: str) -> Any:
    """Parse JSON, in which no key stands twice.

    Args:
      text: to be parsed. file: it is from. line: where it begins. want: the shape it should have, for the message.
    Returns: the value.
    Raises: UserError naming file and line.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{line + error.lineno - 1}: not JSON ({error}); {want}") from error
    except ValueError as error:
        raise UserError(f"{file}:{line}: {error}") from error
    except RecursionError as error:
        raise UserError(f"{file}:{line}: nested too deeply; {want}") from error


def _require_once(names: Sequence[str], where: str) -> None:
    """Raise UserError if a column is there twice: a row could have one of them only."""
    twice = next((name for name in names if list(names).count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: the column {twice!r} stands twice; which of the two counts?")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of pairs. Raises ValueError if a key is there twice: JSON would take the last without a word."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object; which of its values counts?")
    return values


def _as_row(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected a JSON object with prompt and answer, got {json.dumps(value):.60}")
    return value
