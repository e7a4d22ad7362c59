"""A row of data -> a question, and the questions of a source, for all sources."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from grpo_jax.config import ColumnsConfig
from grpo_jax.errors import UserError
from grpo_jax.rewards.scorers.answers import marked_answer
from grpo_jax.rewards.scorers.normal_form import text_of_number
from grpo_jax.tasks.chat import Message
from grpo_jax.tasks.columns import ABSENT, column_names, find_column
from grpo_jax.tasks.row_rewards import RowRewards

TRAINING, HELD_OUT = "training", "held-out"  # the sides of the data


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt and the data that its completions are scored by.

    messages: the prompt as a chat; a plain prompt is one message of the user. solution: its worked answer, as an example
    shows it; empty if the row has none. item: the row of data, under "answer" its final answer, or a tuple of them where
    each of several is right. stream: which part of a mixture it belongs to. where: file and line, or what the row is called.
    is_chat: the row has messages, and not one text. reward: the expression that it is scored by; empty: config.reward.task.
    """

    messages: tuple[Message, ...]
    solution: str
    item: Mapping[str, Any]
    stream: str = ""
    where: str = ""
    is_chat: bool = False
    reward: str = ""

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """The prompt as its row has it: a text, or messages."""
        if self.is_chat:
            return [dict(message) for message in self.messages]
        return self.messages[-1]["content"]

    @property
    def text(self) -> str:
        """The prompt's words, up to white space; two prompts count as the same if these are equal."""
        return " ".join(word for message in self.messages for word in message["content"].split())


@dataclasses.dataclass(frozen=True)
class Source:
    """All questions of one source of data, before any is left out for its length or held out.

    train: to train on. evaluation: those of a split or file of its own; None: held out are some of `train`.
    num_eval: how many are held out. weights: of each stream. where: what the source is called. dropped: side of the data ->
    reason (a key of `selection.REASONS`) -> rows that are no questions.
    """

    train: Sequence[Question]
    evaluation: Sequence[Question] | None
    num_eval: int
    weights: Mapping[str, float]
    where: str
    dropped: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)


Rows = Iterable[tuple[Mapping[str, Any], str]]  # of data, each with its place


def source_of(
    rows: Rows, eval_rows: Rows | None, columns: ColumnsConfig, rewards: RowRewards, num_eval: int, where: str
) -> Source:
    """Make a source of one stream.

    Args:
      rows: to train on. eval_rows: of data for evaluation; None: held out are some of `rows`.
      columns, rewards: as in `questions_of`. num_eval: questions to hold out. where: what the source is called.
    Raises: UserError as `questions_of` does.
    """
    train, dropped = questions_of(rows, columns, rewards)
    evaluation, dropped_held_out = None, {}
    if eval_rows is not None:
        evaluation, dropped_held_out = questions_of(eval_rows, columns, rewards)
    return Source(train, evaluation, num_eval, {"": 1.0}, where, {TRAINING: dropped, HELD_OUT: dropped_held_out})


class MissingAnswerError(UserError):
    """A row has no answer, where a reward compares with one."""


def question_of(row: Mapping[str, Any], columns: ColumnsConfig, where: str, *, needs_answer: bool = True) -> Question:
    """Make a question of a row.

    The final answer is the one that the answer column marks (`#### 42` on its last line, \\boxed{42}), else all of it. A list
    holds several answers, each of which is right.

    Args:
      row: of data. columns: names of the columns, with dots for those inside of others. where: the row's place, for messages.
      needs_answer: False for rewards that compare with nothing: then a row may be without an answer, or have one that is
        neither text nor number, and that is left as it is.
    Returns: a Question, whose item is the row with the final answer under "answer".
    Raises: UserError naming place and column; MissingAnswerError if the answer is null, NaN, infinite or blank.
    """
    value = _column(row, "prompt", columns.prompt, where)
    is_chat = isinstance(value, list | tuple)
    if not is_chat:
        value = [{"role": "user", "content": value}]
    messages = tuple(value)
    _require_chat(messages, f"{where}: `{columns.prompt}`")
    if not needs_answer:
        raw = find_column(row, columns.answer) if columns.answer else ABSENT
        if not _is_answer(raw):
            item = row if raw is ABSENT else {**row, "answer": raw}
            return Question(messages, "", item, where=where, is_chat=is_chat)
    answers = _answers(_column(row, "answer", columns.answer, where), f"{where}: `{columns.answer}`")
    finals = tuple(dict.fromkeys(_final(answer, f"{where}: `{columns.answer}`") for answer in answers))
    final: str | tuple[str, ...] = finals
    if len(finals) == 1:
        (final,) = finals
    return Question(messages, answers[0], {**row, "answer": final}, where=where, is_chat=is_chat)


def questions_of(rows: Rows, columns: ColumnsConfig, rewards: RowRewards) -> tuple[list[Question], dict[str, int]]:
    """Make questions of rows.

    Args:
      rows: of data, each with its place. columns: as in `question_of`. rewards: what each row is scored by.
    Returns: (the questions; reason -> how many rows were left out for it).
    Raises: UserError naming a row that is no question, or the first row if none of them has an answer.
    """
    questions, missing = [], []
    for row, where in rows:
        expression = rewards.of(row, where)
        try:
            question = question_of(row, columns, where, needs_answer=rewards.needs_answer(expression))
            questions.append(dataclasses.replace(question, reward=expression))
        except MissingAnswerError as error:
            missing.append(error)
    if missing and not questions:
        raise UserError(f"{missing[0]}; no row has an answer (config.task.columns.answer = {columns.answer!r})")
    return questions, {"no_answer": len(missing)}


def _is_answer(value: Any) -> bool:
    """Tell if a value can be compared with: text, numbers, or several of them."""
    try:
        return value is not ABSENT and bool(_answers(value, ""))
    except UserError:
        return False


def _column(row: Mapping[str, Any], role: str, name: str, where: str) -> Any:
    value = find_column(row, name)
    if value is ABSENT:
        known = ", ".join(column_names(row)) or "none"
        raise UserError(f"{where}: no column `{name}` (config.task.columns.{role}); it has {known}")
    return value


def _require_chat(messages: tuple[Any, ...], where: str) -> None:
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise UserError(f"{where} must be text or a list of messages with role and content, got {_short(message)}")
        _require_unicode(message["content"], where)
    if not messages or not messages[-1]["content"].strip():
        raise UserError(f"{where} is empty")
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{where} ends with a message of the assistant: there is nothing left to answer; "
            "what an answer begins with belongs into config.task.assistant_prefill"
        )


def _require_unicode(text: str, where: str) -> None:
    """Check for characters that no tokenizer takes: half of a surrogate pair, which JSON can hold, and NUL."""
    bad = next((i for i, char in enumerate(text) if char == "\0" or "\ud800" <= char <= "\udfff"), None)
    if bad is None:
        return
    name = "NUL" if text[bad] == "\0" else f"a lone surrogate (U+{ord(text[bad]):04X})"
    raise UserError(f"{where} holds {name} at character {bad + 1}, which is no text; take it out of the data")


def _answers(value: Any, where: str) -> list[str]:
    """Return the answers of a row as text, one or several."""
    if isinstance(value, list | tuple):
        if not value:
            raise MissingAnswerError(f"{where} is an empty list")
        return [_text(each, f"{where} holds an answer that") for each in value]
    return [_text(value, where)]


def _text(value: Any, where: str) -> str:
    """Return one answer as text."""
    if value is None:
        raise MissingAnswerError(f"{where} is null")
    # A bool is an int to Python, but as an answer it is a mistake in the data: which text would a model have to write? And
    # numbers as a model writes them, not as Python does: 1e16 could never be matched.
    try:
        text = value.strip() if isinstance(value, str) else text_of_number(value)
    except TypeError:
        raise UserError(f"{where} must be text or a number, or a list of them, got {_short(value)}") from None
    except ValueError as error:
        if not isinstance(value, str) and not math.isfinite(value):
            raise MissingAnswerError(f"{where} is {value}") from None
        raise UserError(f"{where} must be text or a number: {error}") from None
    if not text:
        raise MissingAnswerError(f"{where} is empty")
    _require_unicode(text, where)
    return text


def _final(solution: str, where: str) -> str:
    """Return the final answer of a worked one."""
    # A mark with nothing behind it marks no answer, and all of the text would count as one.
    if solution.endswith("####"):
        raise UserError(f"{where} is empty")
    # The mark stands before the last line. Others are headings, as Markdown has them, of a text that is the answer itself.
    last_line = solution.rpartition("\n")[2]
    marked = solution
    if "####" in solution and "####" not in last_line:
        marked = solution.replace("####", "")
    final = marked_answer(marked)
    if final is None:
        return solution
    if not final:
        raise UserError(f"{where} is empty")
    return final


def _short(value: Any) -> str:
    """Show a value, or a message's content, in at most 60 characters."""
    if isinstance(value, Mapping) and "content" in value:
        value = value["content"]
    return f"{json.dumps(value, default=repr):.60}"


def conflicts(questions: Iterable[Question]) -> list[tuple[Question, Question]]:
    """Find questions with the same text and another answer, each beside the first of its text."""
    first: dict[str, Question] = {}
    found = []
    for question in questions:
        before = first.setdefault(question.text, question)
        if _as_set(before.item.get("answer")) != _as_set(question.item.get("answer")):
            found.append((before, question))
    return found


def _as_set(answer: Any) -> frozenset[str]:
    """Return right answers without an order."""
    return frozenset(map(repr, answer if isinstance(answer, tuple) else (answer,)))


def by_hash(questions: Iterable[Question]) -> Iterator[Question]:
    """Yield questions with different texts, in the order of the texts' hashes."""
    # A hash and no random number: the order does not change with the seed, the rows' order, or rows added elsewhere.
    different: dict[str, Question] = {}
    for question in questions:
        different.setdefault(question.text, question)
    for text in sorted(different, key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()):
        yield different[text]


def choose_distinct(questions: Iterable[Question], num: int) -> list[Question]:
    """Choose the first `num` questions of `by_hash` (all, if there are fewer)."""
    return list(itertools.islice(by_hash(questions), num))


def exclude(questions: Iterable[Question], others: Iterable[Question]) -> list[Question]:
    """Return the questions whose text is not among the others'."""
    taken = {question.text for question in others}
    return [question for question in questions if question.text not in taken]
