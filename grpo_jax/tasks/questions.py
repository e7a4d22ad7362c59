"""A row of data -> a question, and questions -> training and held-out ones, for all sources of questions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.config import ColumnsConfig
from grpo_jax.errors import UserError
from grpo_jax.rewards.scorers.answers import marked_answer
from grpo_jax.rewards.scorers.normal_form import text_of_number

Message = Mapping[str, str]  # {"role": ..., "content": ...}


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and the data that its completions are scored by.

    messages: the prompt as a chat; a plain prompt is one message of the user. solution: its worked answer, as an example
    shows it. item: the row of data, its final answer under "answer". stream: which part of a mixture it belongs to.
    """

    messages: tuple[Message, ...]
    solution: str
    item: Mapping[str, Any]
    stream: str = ""

    @property
    def text(self) -> str:
        """The prompt's words, up to white space; two prompts count as the same if these are equal."""
        return " ".join(word for message in self.messages for word in message["content"].split())


@dataclasses.dataclass(frozen=True)
class Split:
    """Questions to train on and held-out ones; no text is on both sides. weights: of each stream of a mixture."""

    train: Sequence[Question]
    held_out: Sequence[Question]
    weights: Mapping[str, float]


def question_of(row: Mapping[str, Any], columns: ColumnsConfig, where: str) -> Question:
    """Make a question of a row.

    The final answer is the one that the answer column marks (`#### 42`, \\boxed{42}), else all of it.

    Args:
      row: of data. columns: names of the columns. where: the row's place, for messages.
    Returns: a Question, whose item is the row with the final answer under "answer".
    Raises: UserError naming place and column.
    """
    value = _column(row, "prompt", columns.prompt, where)
    if not isinstance(value, list | tuple):
        value = [{"role": "user", "content": value}]
    messages = tuple(value)
    _require_chat(messages, f"{where}: `{columns.prompt}`")
    answer = _column(row, "answer", columns.answer, where)
    # A bool is an int to Python, but as an answer it is a mistake in the data: which text would a model have to write? And
    # numbers as a model writes them, not as Python does: 1e16 could never be matched.
    try:
        solution = answer.strip() if isinstance(answer, str) else text_of_number(answer)
    except TypeError:
        raise UserError(f"{where}: `{columns.answer}` must be text or a number, got {_short(answer)}") from None
    except ValueError as error:  # NaN, Infinity
        raise UserError(f"{where}: `{columns.answer}` must be text or a number: {error}") from None
    final = marked_answer(solution)
    if final is None:
        final = solution
    # A mark with nothing behind it marks no answer, and all of the text would count as one.
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
    """Show a value, or a message's content, in at most 60 characters."""
    if isinstance(value, Mapping) and "content" in value:
        value = value["content"]
    return f"{json.dumps(value, default=repr):.60}"


def hold_out(questions: Sequence[Question], others: Sequence[Question] | None, num_eval: int, where: str) -> Split:
    """Hold `num_eval` different questions out: of `others` if there are any, else of `questions`.

    A hash of the text decides which, so they are the same in every run, whatever the seed and the order of the rows. All
    copies of a held-out question, and all that is in `others`, leave the training side.

    Args:
      questions: to train on. others: of a split of its own for evaluation, or None.
      num_eval: questions to hold out. where: the questions came from, for the error.
    Returns: a Split of one stream.
    Raises: UserError if none is left to train on.
    """
    # All of `others` leave the training side, not only those that are held out now: they are a split for evaluation.
    if others is None:
        held_out = choose_distinct(questions, num_eval)
        train = exclude(questions, held_out)
    else:
        held_out = choose_distinct(others, num_eval)
        train = exclude(questions, others)
    if not train:
        raise UserError(
            f"config.eval.num_prompts = {num_eval}: nothing is left of {where} to train on; "
            "lower it, or give it other questions to hold out"
        )
    return Split(train, held_out, {"": 1.0})


def choose_distinct(questions: Iterable[Question], num: int) -> list[Question]:
    """Choose `num` questions with different texts (all, if there are fewer), in the order of the texts' hashes."""
    # A hash and no random number: the choice does not change with the seed, the rows' order, or rows added elsewhere. A lone
    # surrogate, which JSON can hold, has no UTF-8 and must not end the run.
    different: dict[str, Question] = {}
    for question in questions:
        different.setdefault(question.text, question)
    chosen = sorted(different, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())[:num]
    return [different[text] for text in chosen]


def exclude(questions: Iterable[Question], others: Iterable[Question]) -> list[Question]:
    """Return the questions whose text is not among the others'."""
    taken = {question.text for question in others}
    return [question for question in questions if question.text not in taken]
