r"""Equality of answers: as numbers where both are, as mathematics where both are, by math-verify; else as text.

What stands where is decided by answers.py, for all parts alike. math-verify (github.com/huggingface/Math-Verify) is only asked
about two formulas: it takes a word for the product of its letters, 12:30 for a division and 41 42 for a sum.
"""

from __future__ import annotations

import functools
import itertools
import logging
import re
from collections.abc import Sequence
from typing import Any

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify
from sympy import Abs, Basic, Max

from grpo_jax.rewards.scorers.answers import (
    REASONING_TAGS,
    acceptable_answers,
    announced_answer,
    find_answer,
    is_all_of,
    judged_text,
    last_expression,
)
from grpo_jax.rewards.scorers.formulas import as_latex, is_code, is_formula, is_relation, may_be_set, right_side, split_unit
from grpo_jax.rewards.scorers.normal_form import as_words, undressed, unworded, worded_parts
from grpo_jax.rewards.scorers.quantities import read_quantity, same_quantity, split_list

_log = logging.getLogger("math_verify")
_INTEGER = re.compile(r"-?[1-9]\d{0,17}")
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_BASE = re.compile(r"(\d[\dA-Fa-f]*|[\dA-F]{2,})_\{?([2-9]|[12]\d|3[0-6])\}?")
_HEDGED = re.compile(r"\b(?:not|never|least|most|more than|less than|over|under|between|except)\b|n't\b", re.IGNORECASE)
_SENTENCE = re.compile(r"[\w\s.,:;'\u2019-]*")
MAX_LIST = 50
_DIGIT = re.compile(r"\d")
_LABELLED = re.compile(r"\(?([A-Z])[).:]\s*((?!(?:and|or)\b|[,;(])\S.*)", re.DOTALL)
_METRES = re.compile(r"(.*\d)[mgshlLNJWVKCFA]")
# Units are read here, and not by math-verify: it takes the letters of 2ab for one.
_LATEX = (
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
        )
    ),
)


def math_verify_score(completion: str, item: dict[str, Any], *, reasoning_tags: Sequence[str] = REASONING_TAGS) -> float:
    """Return 1.0 if the completion's final answer equals `item["answer"]`, or one of several, as mathematics or text; else 0.0.

    Args:
      completion: the text. item: its row, the acceptable answer or a list of them under "answer".
      reasoning_tags: what stands between them is no answer.
    Returns: 1.0 or 0.0.
    """
    text = judged_text(completion, item, reasoning_tags)
    if text is None:
        return 0.0
    golds, given = acceptable_answers(item), find_answer(text)
    if any(is_equal(gold, given.text) for gold in golds):
        return 1.0
    return float(any(is_all_of(gold, text) for gold in golds))


def is_equal(gold: str, given: str) -> bool:
    """Compare an answer with the data's, which decides how: as a number, as mathematics or as text."""
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(gold):  # most answers
        return given == gold
    if not given.strip():
        return False
    if as_words(given) == as_words(gold) != "":
        return True
    if is_code(gold):
        return False
    gold, given = undressed(gold), undressed(given)
    labels = [_LABELLED.fullmatch(unworded(each)) for each in (gold, given)]
    if any(labels) and _is_same_label(labels, gold, given):
        return True
    bases = [_BASE.fullmatch(each) for each in (gold, given)]
    if any(bases):
        return _same_in_base(bases, gold, given)
    number, value = read_quantity(gold), read_quantity(given)
    if number is not None and value is not None:
        return same_quantity(number, value)
    golds, givens = split_list(gold), split_list(given)
    if len(golds) > 1 and len(golds) == len(givens) and _is_permutation(golds, givens):
        return True
    if number is not None:
        return _is_number(gold, given, sum(is_formula(each) or _DIGIT.search(each) is not None for each in givens))
    return _is_same_formula(gold, given, len(golds), len(givens))


def _is_same_label(labels: Sequence[re.Match[str] | None], gold: str, given: str) -> bool:
    """Compare "(B) 12" with "B" (and, where the data's answer is the labelled one, with "12")."""
    gold_label, given_label = labels
    if gold_label is None:
        return given_label is not None and given_label[1].casefold() == as_words(gold)
    if given_label is None:
        return as_words(given) == gold_label[1].casefold() or is_equal(gold_label[2], given)
    return gold_label[1] == given_label[1] and is_equal(gold_label[2], given_label[2])


def _same_in_base(bases: Sequence[re.Match[str] | None], gold: str, given: str) -> bool:
    """1010_2 is 1010_2, and 1010 where the base goes without saying; never 1010_3."""
    if len({base[2] for base in bases if base}) > 1:
        return False
    digits = [(base[1] if base else text).lstrip("0").casefold() for base, text in zip(bases, (gold, given), strict=True)]
    return digits[0] == digits[1]


def _is_permutation(golds: Sequence[str], givens: Sequence[str]) -> bool:
    """Compare two lists without regard to order; lists of words are compared as one text, by the caller."""
    if len(golds) > MAX_LIST or any(read_quantity(each) is None and not is_formula(each) for each in golds):
        return False
    rest = list(givens)
    for gold in golds:
        found = next((i for i, given in enumerate(rest) if is_equal(gold, given)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _is_number(gold: str, given: str, num_given: int) -> bool:
    """Compare a number of the data with what is more than a number: an equation, a formula, a sentence."""
    if _DECIMAL_COMMA.fullmatch(given) and "." in gold:  # 3,5 where 3.5 is asked for; else it is a list of two
        return is_equal(gold, given.replace(",", "."))
    if num_given > 1:  # a list of candidates earns nothing
        return False
    if "=" in given:
        return right_side(given) != given and is_equal(gold, right_side(given))
    attached = _METRES.fullmatch(given)
    if attached is not None:  # 100m is a length where a number is asked for
        return is_equal(gold, attached[1])
    wanted = read_quantity(gold)
    formula = split_unit(given)[0]
    if wanted is not None and is_formula(formula) and not worded_parts(formula):
        return _verify(gold if wanted.is_percent else str(wanted.value), formula)
    # A sentence inside the mark. It may hold one number, and no more: which one it would mean is a guess.
    inner, given = None, unworded(given)
    if _SENTENCE.fullmatch(given):
        inner = announced_answer(given) or last_expression(given)
    is_only = inner is not None and len(re.findall(r"\d+", given)) == len(re.findall(r"\d+", inner))
    if inner is None or not is_only or inner == given or _HEDGED.search(given):
        return False
    if wanted is not None and wanted.unit:
        return as_words(gold) in as_words(given)
    quantity = read_quantity(inner)
    return quantity is not None and wanted is not None and same_quantity(wanted, quantity)


def _is_same_formula(gold: str, given: str, num_gold: int, num_given: int) -> bool:
    """Compare an answer that is no plain number."""
    if right_side(gold) != gold and right_side(given) == given:  # x = 5, where the completion says 5
        return is_equal(right_side(gold), given)
    if "=" in given and "=" not in gold and right_side(given) != given:
        return is_equal(gold, right_side(given))
    if num_gold == 1 and num_given > 1 and not re.search(r"\\pm|\\cup|[=<>|]|\\(?:le|ge|in|begin)", gold):
        return False
    if not is_formula(gold) or not is_formula(given):
        return False
    (gold, unit), (given, given_unit) = split_unit(gold), split_unit(given)
    if unit and given_unit and unit != given_unit:
        return False
    words, given_words = worded_parts(gold), worded_parts(given)
    if words and given_words and words != given_words:  # "3 if n is even"; math-verify drops what is in \text
        return False
    return _verify(gold, given)


def _verify(gold: str, given: str) -> bool:
    """Ask math-verify about two formulas."""
    # It would solve an inequality for a value, which can take minutes; only a set may be equal to one.
    if is_relation(gold) != is_relation(given) and not (may_be_set(gold) or may_be_set(given)):
        return False
    # math-verify's own time limits are off (0): they rest on SIGALRM, which a regular expression stuck in C never sees. The
    # pool that calls this kills the process instead. It would warn of that at every call.
    _log.setLevel(logging.ERROR)
    pairs = itertools.product(_parse(as_latex(gold)), _parse(as_latex(given)))
    is_percentage = "%" in gold or "%" in given
    return any(verify([a], [b], timeout_seconds=0) and (is_percentage or not _differ_in_size(a, b)) for a, b in pairs)


def _differ_in_size(a: Any, b: Any) -> bool:
    """Tell 2^-99 from 2^-98, whose difference is nothing to math-verify."""
    if not all(isinstance(each, Basic) and each.is_number for each in (a, b)):
        return False
    try:
        sizes = [Abs(each).evalf(30) for each in (a, b, a - b)]
        return bool(1000 * sizes[2] > Max(*sizes[:2]))
    except (TypeError, ValueError, OverflowError):  # no numbers after all: infinity, or what cannot be evaluated
        return False


@functools.lru_cache(maxsize=1024)
def _parse(latex: str) -> list[Any]:
    """Parse a formula; bare text is only seen as one between dollars."""
    # What cannot be parsed comes back as its text, and equal texts have been found equal before.
    return [each for each in parse(f"${latex}$", extraction_config=_LATEX, parsing_timeout=0) if not isinstance(each, str)]
