"""A row of data -> a question, and questions -> training and held-out ones. What all sources of questions share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.config import ColumnsConfig
from grpo_jax.errors import UserError
from grpo_jax.rewards.scorers.answers import marked_answer

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and what its completions are judged by.

    messages: the prompt as a chat; a plain prompt is one message of the user. solution: its worked answer, as an example
    shows it. item: the row of data, its final answer under "answer". stream: which part of a mixture it belongs to.
    """

    messages: tuple[Message, ...]
    solution: str
    item: Mapping[str, Any]
    stream: str = ""

    @property
    def text(self) -> str:
        """What two prompts have in common if they count as the same: their words, up to white space."""
        return " ".join(word for message in self.messages for word in message["content"].split())


@dataclasses.dataclass(frozen=True)
class Split:
    """Questions to train on and held-out ones; no text is on both sides. weights: of each stream of a mixture."""

    train: Sequence[Question]
    held_out: Sequence[Question]
    weights: Mapping[str, float]


def make_question(row: Mapping[str, Any], columns: ColumnsConfig, where: str) -> Question:
    """One row -> a Question. where: the row's place, for messages. Raises UserError naming place and column.

    The final answer is the one that the answer column marks (`#### 42`, \\boxed{42}), else the whole of it.
    """
    value = _column(row, "prompt", columns.prompt, where)
    messages = tuple(value) if isinstance(value, list | tuple) else ({"role": "user", "content": value},)
    _require_chat(messages, f"{where}: `{columns.prompt}`")
    answer = _column(row, "answer", columns.answer, where)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f"{where}: `{columns.answer}` must be text or a number, got {_short(answer)}")
    solution = str(answer).strip()
    final = marked_answer(solution)
    final = solution if final is None else final
    if not final or solution.endswith("####"):
        raise UserError(f"{where}: `{columns.answer}` is empty")
    return Question(messages, solution, {**row, "answer": final})


def _column(row: Mapping[str, Any], role: str, name: str, where: str) -> Any:
    if name not in row:
        known = ", ".join(sorted(map(str, row))) or "none"
        raise UserError(f"{where}: no column `{name}` (config.task.columns.{role}); it has {known}")
    return row[name]


def _require_chat(messages: tuple[Any, ...], where: str) -> None:
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where} must be text or a list of messages with role and content, got {_short(message)}")
    if not messages or not messages[-1]["content"].strip():
        raise UserError(f"{where} is empty")
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{where} ends with a message of the assistant: there is nothing left to answer")


def _short(value: Any) -> str:
    value = value["content"] if isinstance(value, Mapping) and "content" in value else value
    return f"{json.dumps(value, default=repr):.60}"


def hold_out(questions: Sequence[Question], others: Sequence[Question] | None, num_eval: int, where: str) -> Split:
    """Hold `num_eval` different questions out: of `others` if there are any, else of `questions`.

    A hash of the text decides which, so they are the same in every run, whatever the seed and the order of the rows. All
    copies of a held-out question, and all that is in `others`, leave the training side.
    Raises UserError naming `where` the questions came from if none is left to train on.
    """
    held_out = choose_distinct(questions if others is None else others, num_eval)
    train = exclude(questions, held_out if others is None else others)
    if not train:
        raise UserError(
            f"config.eval.num_prompts = {num_eval}: nothing is left of {where} to train on; "
            "lower it, or give it other questions to hold out"
        )
    return Split(train, held_out, {"": 1.0})


def choose_distinct(questions: Iterable[Question], num: int) -> list[Question]:
    """`num` questions with different texts (all, if there are fewer), in the order of the texts' hashes."""
    different: dict[str, Question] = {}
    for question in questions:
        different.setdefault(question.text, question)
    chosen = sorted(different, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())[:num]
    return [different[text] for text in chosen]


def exclude(questions: Iterable[Question], others: Iterable[Question]) -> list[Question]:
    """The questions whose text is not among the others'."""
    taken = {question.text for question in others}
    return [question for question in questions if question.text not in taken]
