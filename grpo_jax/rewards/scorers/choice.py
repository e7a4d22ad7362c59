"""Multiple choice: the label or the text of the right option."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.rewards.scorers.answers import (
    REASONING_TAGS,
    acceptable_answers,
    announced_answer,
    judged_text,
    last_expression,
    marked_answer,
)
from grpo_jax.rewards.scorers.normal_form import as_words, undressed
from grpo_jax.rewards.scorers.quantities import read_quantity, same_quantity

LABELS = "ABCDEFGHIJ"

_LINES = re.compile(r"^[ \t]*(?:[-*][ \t]+)?(?:\*\*)?\(?([A-J])(?:\*\*)?[).:][ \t]*(\S.*)$", re.MULTILINE)
_INLINE = re.compile(r"\(([A-J])\)[ \t]*([^()\n]*[^()\s])")
_HEADED = re.compile(r"\(?([a-z0-9]{1,2})\s*(?:[).:,]|\s-|(?=\s(?:because|since)\b))\s*(.+)$", re.DOTALL)
_AT_END = re.compile(r"(?<=[a-z] )\(?([A-Z])\)?[.!*]*\s*$")
_JOINED = re.compile(r"(?:\b(?:or|and|not|nor)|,)\s*\(?$")
_NAMED = re.compile(
    r"\b(?:answer|option|choice|choose|pick|select)(?:\s+(?:is|would\s+be|should\s+be|must\s+be))?(?:\s+(?:option|choice))?"
    r"\s*:?[\s*_`$]*(?:\\(?:text|textbf|mathrm|boxed)\{)?\(?([A-Za-z0-9]{1,2})(?![\w'])",
    re.IGNORECASE,
)


def choice_score(
    completion: str,
    item: dict[str, Any],
    *,
    options: str = "choices",
    prompt: str = "prompt",
    answer: str = "label",
    reasoning_tags: Sequence[str] = REASONING_TAGS,
) -> float:
    """Return 1.0 if the completion chooses the right option, by its label or its text; 0.0 for another, several or none.

    Args:
      completion: the text. item: its row; the right option under "answer", or a list of options of which any will do.
      options: column with the options. prompt: column in whose text they stand if the row has no such column.
      answer: "label" (or the option's text), or "index" from 0.
      reasoning_tags: what stands between them is no answer.
    Returns: 1.0 or 0.0.
    Raises: ValueError if the row's answer is none of its options.
    """
    known = options_of(item, options, prompt)
    right = {_right_label(gold, known, answer) for gold in acceptable_answers(item)}
    text = judged_text(completion, item, reasoning_tags)
    return float(text is not None and chosen_label(text, known) in right)


def options_of(item: Mapping[str, Any], options: str, prompt: str) -> dict[str, str]:
    """Return label -> text of a row's options; the letters A to J without texts if the row shows none."""
    value = item.get(options)
    if isinstance(value, Mapping) and set(value) >= {"label", "text"}:
        return dict(zip(map(str, value["label"]), map(str, value["text"]), strict=True))
    if isinstance(value, Mapping):
        return {str(label): str(text) for label, text in value.items()}
    if value is not None and not isinstance(value, str):
        return dict(zip(LABELS, map(str, value), strict=False))
    return _options_in(value or _prompt_text(item.get(prompt))) or dict.fromkeys(LABELS, "")


def _prompt_text(prompt: Any) -> str:
    """The text of a prompt, or of a chat's last message."""
    if isinstance(prompt, str):
        return prompt
    return str(prompt[-1].get("content", "")) if prompt else ""


def _options_in(text: str) -> dict[str, str]:
    """Read the last list of options in a text, each on its line or all on one."""
    for pattern in (_LINES, _INLINE):
        found: dict[str, str] = {}
        for match in pattern.finditer(text):
            if match[1] == "A":  # another question's options begin: those of a worked example stand before
                found = {}
            if match[1] == LABELS[len(found)]:
                found[match[1]] = match[2].strip(" ,;*")
        if len(found) > 1:
            return found
    return {}


def _right_label(gold: str, options: Mapping[str, str], form: str) -> str:
    if form == "index" and gold.strip().isdigit() and int(gold) < len(options):
        return list(options)[int(gold)]
    label = label_in(gold, options) if form != "index" else None
    if label is None:
        raise ValueError(f"answer {gold!r:.60} is none of the options {', '.join(options)} (config.reward.choice)")
    return label


def chosen_label(text: str, options: Mapping[str, str]) -> str | None:
    """Find the option that a text chooses; None for none, or for more than one."""
    marked = marked_answer(text)
    if marked is not None:
        return label_in(marked, options)
    announced = announced_answer(text)
    if announced is not None:
        label = label_in(announced, options)
        if label is not None:
            return label
    named = [match[1].upper() for match in _NAMED.finditer(text) if match[1].upper() in _upper(options)]
    if named:
        return _upper(options)[named[-1]] if not _names_another(text, options, named[-1]) else None
    lines = text.strip().splitlines() or [""]
    last = _AT_END.search(lines[-1])
    if last is not None and last[1] in options:
        return last[1] if not _JOINED.search(lines[-1][: last.start()]) else None
    for place in (lines[-1], lines[0], last_expression(text) or ""):
        label = label_in(place, options)
        if label is not None:
            return label
    bracketed = {match for match in re.findall(r"\(([A-Z0-9])\)", text) if match in options}
    return bracketed.pop() if len(bracketed) == 1 else None


def _upper(options: Mapping[str, str]) -> dict[str, str]:
    return {label.upper(): label for label in options}


def _names_another(text: str, options: Mapping[str, str], label: str) -> bool:
    """Find "B or C" behind the last announcement."""
    *_, last = _NAMED.finditer(text)
    joined = re.match(r"[)*}$\s]*(?:or|and|/|,)\s*(?:option\s+)?\(?([A-Za-z0-9])(?!\w)", text[last.end() : last.end() + 40])
    return joined is not None and joined[1].upper() in _upper(options) and joined[1].upper() != label


def label_in(text: str, options: Mapping[str, str]) -> str | None:
    """Read a short text as one option: "B", "(B)", "B) Paris", "option B", or an option's text; None if it is not one."""
    words = as_words(text)
    by_text = [label for label, option in options.items() if option and _is_same(words, text, option)]
    if len(by_text) == 1:
        return by_text[0]
    labels = {label.casefold(): label for label in options}
    words = re.sub(r"^(?:option|choice|answer)\s*:?\s+", "", words).strip("() .:")
    if words in labels:
        return labels[words]
    headed = _HEADED.match(words)
    if headed is None or headed[1] not in labels:
        return None
    label, rest = labels[headed[1]], headed[2].strip()
    if any(_is_same(as_words(rest), rest, option) for other, option in options.items() if option and other != label):
        return None  # the label of one and the text of another
    names_another = re.match(r"(?:or|and|,|/)?\s*\(?([a-z0-9]{1,2})(?:[).:,]|\s|$)", rest)
    if names_another is not None and names_another[1] in labels and names_another[1] != headed[1]:
        return None
    return label


def _is_same(words: str, text: str, option: str) -> bool:
    if words == as_words(option):
        return bool(words)
    given, wanted = read_quantity(undressed(text)), read_quantity(undressed(option))
    return given is not None and wanted is not None and same_quantity(wanted, given)
