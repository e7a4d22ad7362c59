"""Small files that must survive a kill, and what is read from files that may not have: one line in place of a traceback."""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
from typing import Any

from grpo_jax.errors import UserError

MAX_SHOWN = 1000  # characters of a message; a setting may be a whole file
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
SURROGATE = re.compile("[\ud800-\udfff]")
_said: set[str] = set()


def printable(text: str, limit: int = MAX_SHOWN) -> str:
    """Bring any text into one line that a terminal shows as it is; of a longer one the middle is left out."""
    # What a reward or a file says may hold escape sequences, which would colour or clear the terminal, or rename its window.
    shown = CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", " ".join(text.split()))
    if len(shown) <= limit:
        return shown
    return f"{shown[: limit // 2]} [{len(shown) - limit} characters] {shown[-limit // 2 :]}"


def is_text(text: str) -> bool:
    """Tell if a text can be a path, an argument or a file's content: no zero byte, and no half of a surrogate pair."""
    return "\x00" not in text and not SURROGATE.search(text)


def note_once(text: str) -> None:
    """Say on stderr what is no error, in one line; the same text only once in a process."""
    # A table that is drawn every second reads the same damaged file every second.
    if text not in _said:
        _said.add(text)
        print(f"note: {printable(text)}", file=sys.stderr, flush=True)


def parse_json_object(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError saying, in a few words, what the text holds in its place."""
    # Not `json.loads` of bytes: it guesses other encodings than UTF-8, and lets halves of surrogate pairs pass.
    if not text.strip():
        raise ValueError("empty")
    if not text.strip(b"\x00"):
        raise ValueError("zero bytes only, as a crash of the machine leaves them")
    try:
        content = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"no UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object is expected, not {type(content).__name__}")
    return content


def read_json(path: str | os.PathLike[str], advice: str = "") -> dict[str, Any]:
    """Read a JSON object.

    Raises: UserError naming the file and what is wrong, if it holds anything else; advice: the end of that line.
    """
    try:
        return parse_json_object(pathlib.Path(path).read_bytes())
    except OSError as error:
        reason = error.strerror or str(error)
    except ValueError as error:
        reason = str(error)
    ending = f"; {advice}" if advice else ""
    raise UserError(f"{path}: cannot be read as JSON: {reason}{ending}")


def write_atomically(path: pathlib.Path, content: str | bytes) -> None:
    """Write a file so that, whenever the process or the machine dies, there is either all of the new file or the old one."""
    if isinstance(content, str):
        content = content.encode("utf-8")
    # Beside it, because a rename is atomic only within one file system.
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            # The bytes before the name: a machine that loses power in between would leave the new name without its content.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Put the names in a folder on disk, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some network file systems refuse it, and write names through by themselves
    finally:
        os.close(descriptor)
