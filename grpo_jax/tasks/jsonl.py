"""Questions from a JSON Lines file: one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from grpo_jax.config import ColumnsConfig, TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks.questions import Question, Split, hold_out, question_of


def load(config: TaskConfig, num_eval: int) -> Split:
    """Load the questions of `task.jsonl.path`; held out are some of `eval_path` if there is one, else some of `path`.

    Raises UserError naming file and line of what cannot be read, and if holding out leaves nothing to train on.
    """
    data = config.jsonl
    questions = read_questions(data.path, "config.task.jsonl.path", config.columns)
    others = None
    if data.eval_path:
        others = read_questions(data.eval_path, "config.task.jsonl.eval_path", config.columns)
    return hold_out(questions, others, num_eval, data.path)


def read_questions(path: str, field: str, columns: ColumnsConfig) -> list[Question]:
    """Read a JSON Lines file; blank lines are skipped.

    Args:
      path: of the file. field: the config field that `path` came from, for the errors.
      columns: names of the columns.
    Returns: a Question for each line.
    Raises: UserError with path and line number for what is not such a file.
    """
    questions = [_parse_line(line, f"{path}:{number}", columns) for number, line in _lines(path, field)]
    if not questions:
        raise UserError(f"{field} = {path!r}: the file is empty; give one JSON object a line")
    return questions


def _lines(path: str, field: str) -> Iterator[tuple[int, str]]:
    """Yield the number (from 1) and the text of each line that is not blank."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{field} = {path!r}: cannot read it: {error.strerror}") from error
    # Split as bytes, and at \n alone: str.splitlines also breaks at U+2028, which JSON allows inside of a string, and one line
    # that is not UTF-8 can be named by its number. Some editors begin a file with a byte order mark.
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
        if text:
            yield number, text


def _parse_line(text: str, where: str, columns: ColumnsConfig) -> Question:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply; each line must be one flat JSON object") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object with prompt and answer, got {text:.60}")
    return question_of(row, columns, where)
