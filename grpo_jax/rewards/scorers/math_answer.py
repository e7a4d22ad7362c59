"""Equality of mathematical answers, by math-verify (github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import functools
import logging
import re
from typing import Any

from math_verify import parse, verify

from grpo_jax.rewards.scorers.answers import marked_answer, normalise_answer, tagged_answer

_log = logging.getLogger("math_verify")
_INTEGER = re.compile(r"-?\d{1,18}")


def math_verify_score(completion: str, item: dict[str, Any]) -> float:
    """Return 1.0 if the completion's final mathematical expression equals `item["answer"]`, or the texts are equal; else 0.0.

    The expression is the text in <answer> tags, else what math-verify takes for the final one.
    """
    answer = str(item["answer"])
    marked = marked_answer(completion)
    if marked is None:
        marked = completion
    given, expected = normalise_answer(marked), normalise_answer(answer)
    if given == expected:
        return 1.0
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(expected):  # most answers: a thousand times faster
        return float(int(given) == int(expected))
    # math-verify's own time limits are off (0): they rest on SIGALRM, which a regular expression stuck in C never sees. The
    # pool that calls this kills the process instead. It would warn of that at every call.
    _log.setLevel(logging.ERROR)
    tagged = tagged_answer(completion)
    if tagged is None:
        readings = [parse(completion, parsing_timeout=0)]
    else:  # a bare formula is only seen as one between dollars
        readings = [parse(tagged, parsing_timeout=0), _parse_bare(tagged)]
    gold = _parse_bare(answer)
    return float(any(verify(gold, reading, timeout_seconds=0) for reading in readings))


@functools.lru_cache(maxsize=1024)
def _parse_bare(answer: str) -> list[Any]:
    """Parse an answer as LaTeX; bare text such as `x^2 + 1` or `(1, 2)` is only seen as such between dollars."""
    is_delimited = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    if not is_delimited:
        answer = f"${answer}$"
    return parse(answer, parsing_timeout=0)
