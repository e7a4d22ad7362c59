"""The choice among questions: trained on, held out, shown as examples or left out; and a line for what is noteworthy."""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.prompting import Prompt, Prompting
from grpo_jax.tasks.questions import HELD_OUT, TRAINING, Question, Source, by_hash, conflicts, exclude

_log = logging.getLogger(__name__)

# Why a question is left out: its name in the records -> what is said.
REASONS = {
    "no_answer": "no answer",
    "too_long": "over task.max_prompt_tokens = {limit}",
    "worked_examples": "worked examples",
    "held_out_too": "also among the held-out questions",
}


class Selected(NamedTuple):
    """A question that is asked, with its prompt."""

    question: Question
    prompt: Prompt


class Selection(NamedTuple):
    """The questions of a task.

    weights: of each stream. dropped: side -> reason (of REASONS) -> how many were left out. num_conflicts: questions
    whose text an earlier row has with another answer. num_wanted: held-out questions that were asked for. unknown: those
    whose prompt has text that the tokenizer has no token for.
    """

    train: list[Selected]
    held_out: list[Selected]
    weights: Mapping[str, float]
    dropped: Mapping[str, collections.Counter[str]]
    num_conflicts: int
    num_wanted: int
    unknown: list[Selected]


def select(config: TaskConfig, tokenizer: Tokenizer, sources: Sequence[Source]) -> Selection:
    """Choose among the questions of all sources.

    Questions too long for `task.max_prompt_tokens` are left out first. Of those that fit, each source's first `num_eval` in
    the order of a hash of their texts are held out (or of its own split for evaluation), so they are the same in every run,
    whatever the seed and the order of the rows. The next are the worked examples. No copy of a held-out question, nothing of a
    split for evaluation and no worked example is trained on.

    Args:
      config: config.task. tokenizer: of the prompts. sources: of the questions.
    Returns: the Selection, after a line for what was left out, too few or contradictory.
    Raises: UserError if nothing is left to train on.
    """
    dropped = {side: collections.Counter() for side in (TRAINING, HELD_OUT)}
    for source in sources:
        for side, counts in source.dropped.items():
            dropped[side].update(counts)
    conflicting = conflicts(question for source in sources for question in (*source.train, *(source.evaluation or ())))
    shots = choose_shots(config, tokenizer, sources)
    fitting = Fitting(Prompting(config, tokenizer, shots), config.max_prompt_tokens)
    shown = {shot.text for shot in shots}
    sides = [hold_out(source, fitting, shown, dropped) for source in sources]
    taken = [each.question for side in sides for each in (*side.held_out, *side.evaluation)]
    train = []
    for source, side in zip(sources, sides, strict=True):
        kept = {id(question) for question in exclude([each.question for each in side.train], taken)}
        train += [each for each in side.train if id(each.question) in kept]
        if source.evaluation is not None:
            dropped[TRAINING]["held_out_too"] += len(side.train) - len(kept)
    held_out = _first_of_each_text(each for side in sides for each in side.held_out)
    if not train:
        raise UserError(
            f"config.eval.num_prompts = {sum(source.num_eval for source in sources)}: nothing is left of "
            f"{', '.join(source.where for source in sources)} to train on; lower it, or give it other questions to hold out"
        )
    weights = {name: weight for source in sources for name, weight in source.weights.items()}
    num_wanted = sum(source.num_eval for source in sources)
    unknown_id = getattr(tokenizer, "unknown_id", None)
    unknown = []
    if unknown_id is not None:
        unknown = [each for each in (*train, *held_out) if unknown_id in each.prompt.ids]
    selection = Selection(train, held_out, weights, dropped, len(conflicting), num_wanted, unknown)
    say(selection, config.max_prompt_tokens, conflicting)
    _check_markup(fitting, [each.question for each in (*train, *held_out)])
    return selection


class Fitting:
    """Makes prompts, each question's once, and tells if they are short enough."""

    def __init__(self, prompting: Prompting, limit: int) -> None:
        self.prompting, self.limit = prompting, limit

    def __call__(self, question: Question) -> Prompt | None:
        """Return the prompt; None if it is too long."""
        # Dropped, not truncated: a prompt without its beginning is another question, with an answer that no longer fits.
        try:
            prompt = self.prompting(question)
        except UserError as error:  # of the template, or a token that the model has not
            raise UserError(f"{question.where}: {error}") from error
        if not prompt.ids:
            raise UserError(f"{question.where}: the prompt has no tokens; the sampler needs one to begin from")
        return prompt if len(prompt.ids) <= self.limit else None

    def keep(self, questions: Sequence[Question], side: str, dropped: collections.Counter[str]) -> list[Selected]:
        """Keep the questions that fit.

        Args:
          questions: of one side. side: its name, for the message. dropped: counts the others.
        Returns: those that fit, with their prompts.
        Raises: UserError if there are questions and none fits.
        """
        kept = []
        for question in questions:
            prompt = self(question)
            if prompt is None:
                dropped["too_long"] += 1
            else:
                kept.append(Selected(question, prompt))
        if not kept and questions:
            raise UserError(f"config.task.max_prompt_tokens = {self.limit}: no {side} prompt is that short; raise it")
        return kept


class Sides(NamedTuple):
    """A source's questions that fit. evaluation: its split for evaluation, of which `held_out` are some; empty without one."""

    train: list[Selected]
    held_out: list[Selected]
    evaluation: list[Selected]


def hold_out(source: Source, fitting: Fitting, shown: set[str], dropped: Mapping[str, collections.Counter[str]]) -> Sides:
    """Hold out questions of one source, among those that fit.

    Args:
      source: of the questions. fitting: makes the prompts. shown: texts of worked examples, which are asked nowhere.
      dropped: side -> counts what is left out.
    Returns: the two sides. Held-out questions are still among `train`.
    """
    asked = [question for question in source.train if question.text not in shown]
    dropped[TRAINING]["worked_examples"] += len(source.train) - len(asked)
    if source.train and not asked:
        raise UserError(f"config.task.num_shots: no question of {source.where} is left to train on; lower it")
    train = fitting.keep(asked, TRAINING, dropped[TRAINING])
    if source.evaluation is None:
        return Sides(train, _choose(train, source.num_eval), [])
    others = [question for question in source.evaluation if question.text not in shown]
    evaluation = fitting.keep(others, HELD_OUT, dropped[HELD_OUT])
    # All of the split leaves the training side, also what is too long or is not needed now: it is a split for evaluation.
    return Sides(train, _choose(evaluation, source.num_eval), [Selected(each, Prompt([], "")) for each in others])


def choose_shots(config: TaskConfig, tokenizer: Tokenizer, sources: Sequence[Source]) -> list[Question]:
    """Choose `task.num_shots` worked examples among the training questions, in the order of a hash.

    Args:
      config: config.task. tokenizer: of the prompts. sources: of the questions.
    Returns: questions with a worked answer, none of which would be held out.
    Raises: UserError if there are too few.
    """
    if not config.num_shots:
        return []
    # By their length without examples, which are not known yet: those that fit with them are held out in the end.
    fits_alone = Fitting(Prompting(config, tokenizer, ()), config.max_prompt_tokens)
    taken: list[Question] = []
    for source in sources:
        if source.evaluation is None:
            fitting = (question for question in by_hash(source.train) if fits_alone(question))
            taken += itertools.islice(fitting, source.num_eval)
        else:
            taken += source.evaluation
    candidates = exclude((question for source in sources for question in source.train), taken)
    worked = (question for question in by_hash(candidates) if question.solution and fits_alone(question))
    shots = list(itertools.islice(worked, config.num_shots))
    # One more than the examples is needed, or there would be nothing to train on.
    if len(shots) < config.num_shots or not exclude(candidates, shots):
        raise UserError(
            f"config.task.num_shots = {config.num_shots}: no question is left to train on, of {len(candidates)} "
            "that are not held out; lower it"
        )
    return shots


def _choose(selected: Sequence[Selected], num: int) -> list[Selected]:
    """Choose the first `num` different questions in the order of a hash."""
    by_question = {id(each.question): each for each in selected}
    return [by_question[id(question)] for question in itertools.islice(by_hash(each.question for each in selected), num)]


def _first_of_each_text(selected: Iterable[Selected]) -> list[Selected]:
    """Leave out what another source holds out too."""
    return list({each.question.text: each for each in reversed(list(selected))}.values())[::-1]


def say(selection: Selection, limit: int, conflicting: Sequence[tuple[Question, Question]]) -> None:
    """Warn, a line each, of what was left out, of too few held-out questions, and of rows that contradict each other.

    Args:
      selection: of the questions. limit: of a prompt, tokens. conflicting: from `conflicts`.
    """
    left_out = [
        f"{num} {side} ({REASONS[why].format(limit=limit)})"
        for side, counts in selection.dropped.items()
        for why, num in counts.items()
        if num
    ]
    if left_out:
        _log.warning("questions left out: %s", ", ".join(left_out))
    if selection.unknown:
        _log.warning(
            "%s with text that the tokenizer has no token for, so the model cannot read it; the first: %s %r",
            counted(len(selection.unknown), "prompt"),
            selection.unknown[0].question.where,
            selection.unknown[0].question.text[:80],
        )
    if len(selection.held_out) < selection.num_wanted:
        _log.warning(
            "held out: %s, config.eval.num_prompts = %d: there are no more that differ and fit",
            counted(len(selection.held_out), "question"),
            selection.num_wanted,
        )
    if conflicting:
        one, other = conflicting[0]
        _log.warning(
            "%s with another answer than an earlier row with the same prompt: %s %r, %s %r%s",
            counted(len(conflicting), "row"),
            one.where,
            one.item.get("answer"),
            other.where,
            other.item.get("answer"),
            ", ..." * (len(conflicting) > 1),
        )


def counted(num: int, noun: str) -> str:
    """Write a number of things."""
    return f"{num} {noun}{'s' * (num != 1)}"


def _check_markup(fitting: Fitting, questions: Sequence[Question]) -> None:
    """Look for prompts that hold a chat's markup already, and would be templated twice.

    Raises: UserError if that is so in half of them; of fewer it warns.
    """
    marks = fitting.prompting.markup()
    found = list(_marked(questions, marks))
    if not found:
        return
    first, mark = found[0]
    said = f"{len(found)} of {len(questions)} prompts hold a chat's markup already, {first.where} {mark!r}"
    if 2 * len(found) >= len(questions):
        raise UserError(f"{said}; set config.task.use_chat_template = False, or give the messages without it")
    _log.warning("%s: the model reads it as the beginning of a turn", said)


def _marked(questions: Iterable[Question], marks: Sequence[str]) -> Iterator[tuple[Question, str]]:
    """Yield the questions in which a mark occurs, each with the first that does."""
    for question in questions:
        found = next((mark for mark in marks if any(mark in message["content"] for message in question.messages)), None)
        if found is not None:
            yield question, found
