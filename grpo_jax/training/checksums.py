"""Checksums of a folder's files, written into it: what has changed on the disk since then is found before it is read."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
import zlib

from grpo_jax.errors import UserError
from grpo_jax.files import read_json, write_atomically

SUMS = "checksums.json"
LATER = ("_CHECKPOINT_METADATA", "commit_success.txt")  # Orbax writes them last; no data is in them
BLOCK = 2**22  # bytes read at a time
NUM_THREADS = 8


def write_checksums(folder: pathlib.Path) -> None:
    """Write size and CRC-32 of every file under a folder into its checksums.json."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = [name for name in files if name not in LATER]
    sums = {name: list(sum_of(folder / name)) for name in files}
    write_atomically(folder / SUMS, json.dumps({"crc32": sums, "crc32_of_table": _sum_of_table(sums)}, indent=1) + "\n")


def find_damage(folder: pathlib.Path) -> str | None:
    """Compare a folder with its checksums.json.

    Returns: what is wrong with the first file that differs, "" if none does, None if there is nothing to compare with.
    """
    if not (folder / SUMS).exists():
        return None
    try:
        content = read_json(folder / SUMS)
        sums = content.pop("crc32")
        expected = {str(name): (int(size), int(crc)) for name, (size, crc) in sums.items()}
    except (UserError, KeyError, TypeError, ValueError, AttributeError):
        return f"{SUMS} is damaged"
    # A table with another bit in it would blame a file that is whole. Those of older versions have no sum of their own.
    if content and content != {"crc32_of_table": _sum_of_table(sums)}:
        return f"{SUMS} is damaged"
    # CRC-32 releases the interpreter's lock, and finds every change of a few neighbouring bits. A checkpoint's files are large.
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        reasons = pool.map(lambda name: _compare(folder / name, name, expected[name]), expected)
        return next((reason for reason in reasons if reason), "")


def _compare(path: pathlib.Path, name: str, expected: tuple[int, int]) -> str:
    try:
        size = path.stat().st_size
        if size != expected[0]:
            return f"{name} has {size} bytes in place of {expected[0]}"
        return "" if sum_of(path) == expected else f"{name} does not have the content that was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"


def _sum_of_table(sums: dict[str, list[int]]) -> int:
    """Return the CRC-32 of a table of sums, however its file is laid out."""
    return zlib.crc32(json.dumps(sums, sort_keys=True).encode())


def sum_of(path: pathlib.Path) -> tuple[int, int]:
    """Return (bytes, CRC-32) of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc
