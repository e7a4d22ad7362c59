"""Are two mathematical answers equal? By math-verify (github.com/huggingface/Math-Verify)."""

from __future__ import annotations

import functools
import logging
from typing import Any

from math_verify import parse, verify

_log = logging.getLogger("math_verify")


def math_verify_score(item: dict[str, Any], completion: str) -> float:
    """1.0 if the completion's last mathematical expression equals `item["answer"]`, or the texts are equal; else 0.0.

    math-verify's own time limits are off: they rest on SIGALRM, which a regular expression stuck in C never sees. The
    pool that calls this kills the process instead.
    """
    if completion.strip() == item["answer"].strip():
        return 1.0
    _log.setLevel(logging.ERROR)  # it warns that its time limits are off; so they shall be
    return float(verify(_parse_gold(item["answer"]), parse(completion, parsing_timeout=0), timeout_seconds=0))


@functools.lru_cache(maxsize=1024)
def _parse_gold(answer: str) -> list[Any]:
    """The true answer parsed as LaTeX; bare text such as `x^2 + 1` or `(1, 2)` is only seen as such between dollars."""
    is_delimited = any(mark in answer for mark in ("$", "\\boxed", "\\(", "\\["))
    return parse(answer if is_delimited else f"${answer}$", parsing_timeout=0)
