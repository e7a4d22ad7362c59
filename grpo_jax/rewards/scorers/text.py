"""Rewards that look at a completion's text alone."""

from __future__ import annotations

import re
from typing import Any

from grpo_jax.rewards.scorers.answers import final_answer, normalise_answer


def exact_score(completion: str, item: dict[str, Any]) -> float:
    """Return 1.0 if the final answer is `item["answer"]`, up to white space, dollar signs and thousands separators."""
    return float(final_answer(completion) == normalise_answer(str(item["answer"])))


def regex_score(completion: str, item: dict[str, Any], *, pattern: str) -> float:
    """Return 1.0 if the pattern occurs; if it has a group, the first group of its last occurrence must equal the answer."""
    last = None
    for last in re.finditer(pattern, completion):  # noqa: B007
        pass
    if last is None or not last.re.groups:
        return float(last is not None)
    return float(normalise_answer(last[1] or "") == normalise_answer(str(item["answer"])))


def format_score(completion: str, item: dict[str, Any], *, pattern: str) -> float:
    """Return 1.0 if the whole completion has the form of the pattern (a dot matches newlines too)."""
    del item
    return float(re.fullmatch(pattern, completion, re.DOTALL) is not None)
