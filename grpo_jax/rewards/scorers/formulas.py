r"""Mathematics told from other text, and its LaTeX. Pure.

A computer algebra system reads every text as a formula: `listen` as a product of letters, 2024-05-01 as a difference. So an
answer counts as mathematics only if nothing in it says otherwise.
"""

from __future__ import annotations

import re

from grpo_jax.rewards.scorers.normal_form import without_words
from grpo_jax.rewards.scorers.quantities import unit_of

MAX_LENGTH = 2000

# Numbers that are names: bits, codes and numerals keep their leading zeros.
_CODE = re.compile(r"[-+]?0\d+")
_NO_ARITHMETIC = re.compile(
    r"\d\s*:\s*\d"  # times and ratios
    r"|\d+\s*[-/]\s*\d+\s*[-/]\s*\d+"  # dates
    r"|(?<![\d.\w)}\]^])\d+(?:\.\d+)?-\d+(?:\.\d+)?(?![\d.\w(\\^!])"  # ranges, scores, telephone numbers: 10-15, 3-2
    r"|\d+\.\d+\.\d+"  # versions and addresses
    r"|\(\d{3}\)\s*\d{3}"
    r"|(?<!frac )(?<![_\d])\d+\s+\d"  # 40 41 42
)
_COMMANDS = re.compile(r"\\(?:begin|end)\{[a-z]+\}|\\[a-zA-Z]+")
_FUNCTIONS = re.compile(
    r"(?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|sqrt|pi|inf(?:inity|ty)?|max|min|gcd|lcm|det|mod|deg|dim|ker|lim|sup|abs|floor|ceil|frac"
)
_LETTERS = re.compile(r"[A-Za-z]+")
_SIGNS = re.compile(r"[\d+*/^=<>|!]|[A-Za-z]\(|\\[a-zA-Z]+|-\s*[\w\\(]|\(.*,.*[)\]]|\[.*,.*[)\]]")
_FOREIGN = re.compile(r"[^\x00-\x7fͰ-Ͽ]|[#@?\"`;]|:(?!=)")
_OPERATOR = re.compile(r"[-+*/^]|\d\s*[A-Za-z]")
_RELATION = re.compile(r"\\(?:le|ge|ne|leq|geq|neq|in|to|lt|gt)(?![a-zA-Z])|[<>]|!=|:=|==|≈")
_UNIT_BEHIND = re.compile(
    r"(.*[\w)}\]])\s*(?:\\(?:text|mathrm|textrm|mbox)\s*\{(?!\s*(?:and|or|if|for)\b)([^{}]*)\}(?:\^\{?[23]\}?)?"
    r"|\s((?:sq(?:uare)?\s|cu(?:bic)?\s)?(?:[cmk]?m|kg|m[lg]|ft|in|units?|inches|feet|meters|miles|degrees|dollars)(?:\^\{?[23]\}?)?))"
)
_SET = re.compile(r"[(\[{]|\\(?:cup|cap|mathbb|emptyset)")
_PLAIN_NAMES = (
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<!\\)\bsqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\^\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])(sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|arcsin|arccos|arctan)(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"(?<![\\a-zA-Z])(?:inf|infinity|oo|infty)(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\sqrt\s+(\d+|[a-z])"), r"\\sqrt{\1}"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"(?<!\\)\*"), r"\\cdot "),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
)


def is_code(text: str) -> bool:
    """Tell a number whose leading zeros count: 0110, 007."""
    return _CODE.fullmatch(text.strip()) is not None


def is_formula(text: str) -> bool:
    r"""Tell mathematics from words, names, dates, times, ratios, ranges, versions and telephone numbers.

    >>> [is_formula(text) for text in ("x^2+1", "(1, 2)", r"\frac{1}{2}", "xy", "x", "2ab")]
    [True, True, True, True, True, True]
    >>> [is_formula(text) for text in ("no", "XIV", "GATTACA", "not spam", "Apollo 11", "12:30", "2024-05-01", "H2O", "10-15")]
    [False, False, False, False, False, False, False, False, False]
    """
    if len(text) > MAX_LENGTH:
        return False
    bare = without_words(text)
    if is_code(bare) or _NO_ARITHMETIC.search(bare) or _FOREIGN.search(bare):
        return False
    # Names of commands are no words; what stands in front of a digit then is a letter of its own.
    words = _LETTERS.findall(re.sub(r"(?<![a-zA-Z])(?:" + _FUNCTIONS.pattern + r")(?![a-zA-Z])", " ", _COMMANDS.sub(" ", bare)))
    if re.search(r"(?<![\\A-Za-z_^{])[A-Za-z]+\s*\d", _COMMANDS.sub(" \\\\ ", bare)) and not re.search(r"\\|[-+*^=(]", bare):
        return False
    has_signs = _SIGNS.search(bare) is not None
    if not has_signs and len(words) != 1:  # a sequence of letters, not their product
        return False
    return all(_is_variables(word, has_signs) for word in words)


def _is_variables(word: str, has_signs: bool) -> bool:
    """Tell a product of variables from a word: single letters, xyz, and beside signs two or three small letters."""
    if len(word) == 1 or (set(word) <= set("xyz") and len(word) <= 3):
        return True
    return has_signs and len(word) <= 3 and word.islower()


def right_side(text: str) -> str:
    """Return what an equation ends on: 5 of "x = 5", 42 of "20 + 22 = 42"; relations and lists stay whole."""
    if "=" not in text or _RELATION.search(text) or "," in text:
        return text
    left, _, value = text.rpartition("=")
    name, _, steps = left.partition("=")
    # What is on the left may be a name (x, f(x), the total) and sums of numbers; x^2 + y^2 = 25 and 2x = 10 say no number.
    is_name = not _OPERATOR.search(name) or not _LETTERS.search(_COMMANDS.sub("", name))
    if not value.strip() or not is_name or _LETTERS.search(_COMMANDS.sub("", steps)):
        return text
    return value.strip()


def is_relation(text: str) -> bool:
    """Tell inequalities and memberships from values; an equation is none."""
    return _RELATION.search(text) is not None


def may_be_set(text: str) -> bool:
    """Tell what can be an interval, a set or a union of them."""
    return _SET.search(text) is not None


def split_unit(text: str) -> tuple[str, str]:
    r"""Split a formula and the unit behind it, "" for none.

    >>> split_unit(r"\frac{\sqrt{3}}{2}\text{ cm}"), split_unit(r"\sqrt{3} cm"), split_unit("2ab")
    (('\\frac{\\sqrt{3}}{2}', 'cm'), ('\\sqrt{3}', 'cm'), ('2ab', ''))
    """
    behind = _UNIT_BEHIND.fullmatch(text)
    unit = behind and unit_of(" " + (behind[2] or behind[3]))
    if behind is None or not unit:
        return text, ""
    return behind[1].rstrip(), unit


def as_latex(text: str) -> str:
    r"""Write what is written in programs as LaTeX: sqrt(2), x**2, 2*pi, <=."""
    for pattern, latex in _PLAIN_NAMES:
        text = pattern.sub(latex, text)
    return text
