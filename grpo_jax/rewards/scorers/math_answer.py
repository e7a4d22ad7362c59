"""Are two mathematical answers equal? By math-verify (github.com/huggingface/Math-Verify)."""

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
    """1.0 if the completion's final mathematical expression equals `item["answer"]`, or the texts are equal; else 0.0.

    The expression is what stands in <answer> tags, else what math-verify takes for the final one.
    math-verify's own time limits are off: they rest on SIGALRM, which a regular expression stuck in C never sees. The
    pool that calls this kills the process instead.
    """
    answer = str(item["answer"])
    marked = marked_answer(completion)
    given, expected = normalise_answer(completion if marked is None else marked), normalise_answer(answer)
    if given == expected:
        return 1.0
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(expected):  # most answers: a thousand times faster
        return float(int(given) == int(expected))
    _log.setLevel(logging.ERROR)  # it warns that its time limits are off; so they shall be
    tagged = tagged_answer(completion)
    readings = [parse(completion if tagged is None else tagged, parsing_timeout=0)]
    if tagged is not None:  # a bare formula is only seen as one between dollars
        readings.append(_parse_bare(tagged))
    gold = _parse_bare(answer)
    return float(any(verify(gold, reading, timeout_seconds=0) for reading in readings))


@functools.lru_cache(maxsize=1024)
def _parse_bare(answer: str) -> list[Any]:
    """An answer parsed as LaTeX; bare text such as `x^2 + 1` or `(1, 2)` is only seen as such between dollars."""
    is_delimited = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    return parse(answer if is_delimited else f"${answer}$", parsing_timeout=0)
