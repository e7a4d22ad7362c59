"""Prompts and answers from a JSON Lines file, answers compared by math-verify: GSM8K, MATH, DAPO-Math and the like."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.host import HostTask, Question, same_text, without

SCORER = "grpo_jax.scorers.math_answer:math_verify_score"


class JsonlTask(HostTask):
    """One object a line with the fields `prompt` and `answer`; reward 1 for an equal answer, else 0.

    What follows the last `####` of an answer is the answer (GSM8K); white space around it does not count.
    num_eval: how many questions are held out. They come from `eval_path` if there is one, else out of `path`. A hash of
    the prompt decides which, so they are the same in every run whatever the seed and the order of the lines; a prompt
    that is held out is trained on in none of its copies.
    Raises UserError naming file and line of what cannot be read, and if holding out leaves nothing to train on.
    """

    def __init__(self, config: TaskConfig, tokenizer: Tokenizer, seed: int, num_eval: int) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("task.name = 'jsonl' needs math-verify: pip install 'grpo_jax[tasks]'")
        jsonl = config.jsonl
        questions = read_questions(jsonl.path, "task.jsonl.path")
        pool = read_questions(jsonl.eval_path, "task.jsonl.eval_path") if jsonl.eval_path else questions
        held_out = _choose(pool, num_eval)
        train = without(questions, pool if jsonl.eval_path else held_out)
        if not train:
            raise UserError(
                f"eval.num_prompts = {num_eval}: nothing is left of {jsonl.path} to train on; "
                "lower it, or give task.jsonl.eval_path a file with other prompts"
            )
        super().__init__(
            config,
            tokenizer,
            train,
            held_out,
            scorer=SCORER,
            system_prompt=jsonl.system_prompt,
            use_chat=jsonl.use_chat_template,
            seed=seed,
        )


def read_questions(path: str, field: str) -> list[Question]:
    """Read a JSON Lines file; blank lines are skipped. field: the config field that `path` came from, for the errors.

    Raises UserError with path and line number for what is not such a file.
    """
    questions = [_question(line, f"{path}:{number}") for number, line in _lines(path, field)]
    if not questions:
        raise UserError(f"{field} = {path!r}: the file is empty; give one JSON object a line with prompt and answer")
    return questions


def _lines(path: str, field: str) -> Iterator[tuple[int, str]]:
    """Numbers (from 1) and texts of the lines that are not blank."""
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{field} = {path!r}: cannot read it: {error.strerror}") from error
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 ({error.reason} at byte {error.start} of the line)") from error
        if text:
            yield number, text


def _question(text: str, where: str) -> Question:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); each line must be one JSON object") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply; each line must be one flat JSON object") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected a JSON object with prompt and answer, got {text:.60}")
    answer = _field(record, "answer", where, str | int | float).rsplit("####", 1)[-1].strip()
    if not answer:
        raise UserError(f"{where}: `answer` is empty")
    return Question(_field(record, "prompt", where, str), {"answer": answer})


def _field(record: dict[str, Any], name: str, where: str, kind: Any) -> str:
    if name not in record:
        raise UserError(f"{where}: no field `{name}`; the line has {', '.join(sorted(record)) or 'no fields'}")
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise UserError(f"{where}: `{name}` must be text, got {json.dumps(value):.60}")
    text = str(value)
    if not text.strip():
        raise UserError(f"{where}: `{name}` is empty")
    return text


def _choose(questions: list[Question], num: int) -> list[Question]:
    """`num` questions with different prompts (all, if there are fewer), in the order of their prompts' hashes."""
    different = {same_text(question.prompt): question for question in reversed(questions)}
    chosen = sorted(different, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())[:num]
    return [different[text] for text in chosen]
