"""Rewards that look at a completion's text alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from grpo_jax.rewards.scorers.answers import DRESSING, REASONING_TAGS, acceptable_answers, find_answer, judged_text, whole_text
from grpo_jax.rewards.scorers.normal_form import normalise_answer


def exact_score(completion: str, item: dict[str, Any], *, reasoning_tags: Sequence[str] = REASONING_TAGS) -> float:
    """Return 1.0 if the final answer, or all of the text, is `item["answer"]` (one of several) in the same spelling.

    Args:
      completion: the text. item: its row. reasoning_tags: what stands between them is no answer.
    Returns: 1.0 or 0.0; white space, dollar signs, thousands separators and idle zeros make no difference.
    """
    text = judged_text(completion, item, reasoning_tags)
    if text is None:
        return 0.0
    golds = acceptable_answers(item)
    found = find_answer(text)
    spelling = normalise_answer(found.text)
    given = {spelling, spelling.removesuffix("%")}
    if not found.is_marked and len(text) <= 2 * max(map(len, golds)) + DRESSING:
        given.add(normalise_answer(text))
    return float(text.strip() in golds or any(normalise_answer(gold) in given - {""} for gold in golds))


def regex_score(
    completion: str, item: dict[str, Any], *, pattern: str, reasoning_tags: Sequence[str] = REASONING_TAGS
) -> float:
    """Return 1.0 if the pattern occurs; if it has a group, the first group of its last occurrence must equal the answer.

    Args:
      completion: the text. item: its row.
      pattern: a regular expression; with a group it is looked for behind the reasoning, without one in all of the text.
      reasoning_tags: around the reasoning.
    Returns: 1.0 or 0.0.
    """
    text: str | None = whole_text(completion, item)
    expression = re.compile(pattern)
    if expression.groups:
        text = judged_text(completion, item, reasoning_tags)
    last = None
    for last in expression.finditer(text or ""):  # noqa: B007
        pass
    if last is None or not expression.groups:
        return float(last is not None)
    found = normalise_answer(last[1] or "")
    return float(any(found == normalise_answer(gold) for gold in acceptable_answers(item)))


def format_score(completion: str, item: dict[str, Any], *, pattern: str, once: Sequence[str] = ()) -> float:
    """Return 1.0 if the whole completion has the form of the pattern, and each tag that it names stands in it once.

    Args:
      completion: the text. item: its row; what the prompt opened belongs to the completion.
      pattern: a regular expression, whose dot matches newlines too. once: tags.
    Returns: 1.0 or 0.0.
    """
    text = whole_text(completion, item)
    named = re.sub(r"\\(.)", r"\1", pattern)
    # `.*?` of a pattern runs over any number of further blocks, and over nested ones.
    if any(text.count(tag) != 1 for tag in once if tag in named):
        return 0.0
    return float(re.fullmatch(pattern, text, re.DOTALL) is not None)
