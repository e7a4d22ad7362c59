r"""Numbers with their percent signs and units, read exactly. Pure.

What an answer of plain numbers is worth is decided here, without a computer algebra system: it is a thousand times faster, and
that one adds 2 1/2 up to 3/2, and takes 2^-99 for 2^-98.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from grpo_jax.rewards.scorers.normal_form import plain_number, undressed, unworded

MAX_DIGITS = 1000

_CURRENCY = r"(?:US\s?|USD\s?|Rs\.?\s?)?[$€£¥₹₩₽₺₫₪]?"
_LEAD = re.compile(
    rf"(?:\\approx|≈|~|approximately|approx\.?|about|around|roughly)?\s*([-+]?)\s*{_CURRENCY}\s*([-+]?)\s*", re.IGNORECASE
)
_PLAIN = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,4}|\s*(?:\\times|\\cdot|\*|x)\s*10\^(?:\{[-+]?\d{1,4}\}|[-+]?\d{1,4}))?"
_INTEGER_FRACTION = r"\\[dtc]?frac\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))"
_FRACTION = rf"\\[dtc]?frac\s*(?:\{{\s*([-+]?{_PLAIN})\s*\}}\s*\{{\s*([-+]?{_PLAIN})\s*\}}|(\d)\s*(\d))"
_FORMS = (
    # 2 1/2, 2\frac{1}{2}
    ("mixed", re.compile(rf"(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])|(\d+)\s*{_INTEGER_FRACTION}")),
    ("repeating", re.compile(r"(\d*)\.(\d*)(?:\\overline\s*\{(\d+)\}|\((\d+)\))")),
    ("fraction", re.compile(rf"({_PLAIN})\s*/\s*({_PLAIN})|{_FRACTION}")),
    ("plain", re.compile(rf"({_PLAIN})")),
)  # fmt: skip
_PERCENT = re.compile(r"\\?%|\s*(?:percent|per\s?cent|pct\.?|percentage)(?![a-z])", re.IGNORECASE)
_SCALES = {
    "hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12,
    "百": 2, "千": 3, "万": 4, "萬": 4, "百万": 6, "千万": 7, "亿": 8, "億": 8,
}  # fmt: skip
_SCALE = re.compile(r"(?:\s|\\ )*(" + "|".join(sorted(_SCALES, key=len, reverse=True)) + r")s?(?![a-z])", re.IGNORECASE)

# A unit is text without digits, but for a square or a cube. A single letter may be a variable.
_TEXT = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
_UNIT_TEXT = re.compile(rf"\s*{_TEXT}(?:\s*(?:/|\^\{{?[23]\}}?)?)*")
_DEGREES = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree)\s*([CFK]?)(?![a-zA-Z])")
_RAISED = re.compile(r"\s*\^\s*\{?([23])\}?(?!\d)")
_NO_UNIT = re.compile(
    r"or|and|to|plus|minus|times|over|divided|squared|cubed|choose|mod|modulo|than|more|less|not|is|equals|factorial|"
    r"pi|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|sqrt|lim|theta|alpha|beta|infty|inf|max|gcd|lcm|[ap]\.?m|"
    r"jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    r"nov(?:ember)?|dec(?:ember)?"
)
_SHORT_UNIT = re.compile(
    r"[cmkn]?m|k?g|m[gls]|[cd]l|hrs?|ft|in|lbs?|oz|mi|yd|th|st|[nr]d|sec|mph|kmh|kwh?|wh|hz", re.IGNORECASE
)
_ONE_LETTER_UNITS = frozenset("mgshlLNJWVKCFAT")
_SAME_UNITS = {
    "centimeter": "cm", "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "kilometer": "km", "kilometre": "km",
    "meter": "m", "metre": "m", "kilogram": "kg", "gram": "g", "milligram": "mg", "liter": "l", "litre": "l",
    "milliliter": "ml", "millilitre": "ml", "hour": "h", "hr": "h", "minute": "min", "second": "s", "sec": "s",
    "foot": "ft", "feet": "ft", "inch": "in", "inches": "in", "pound": "lb", "ounce": "oz", "mile": "mi", "yard": "yd",
    "usd": "dollar", "eur": "euro", "buck": "dollar", "degree": "°", "deg": "°", "sq": "square",
}  # fmt: skip


_SEPARATOR = re.compile(
    r"\\(?:text|mathrm|textrm|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|[,;或和]|\\?[{}]|[()\[\]]"
)


class Quantity(NamedTuple):
    """A number as it was written. unit: in one spelling, "" for none; is_decimal: with a decimal point, perhaps rounded."""

    value: Fraction
    unit: str = ""
    is_percent: bool = False
    is_decimal: bool = False


@functools.lru_cache(maxsize=4096)
def read_quantity(text: str) -> Quantity | None:
    r"""Read one number with what may stand around it: currency, percent sign, a word of scale, a unit; None for anything else.

    >>> [str(read_quantity(text).value) for text in (r"2\frac{1}{2}", "1.5 million", "-$3.50", r"0.\overline{3}", "18 apples")]
    ['5/2', '1500000', '-7/2', '1/3', '18']
    """
    if len(text) > MAX_DIGITS:
        return None
    text = undressed(text)
    if text.startswith(("\\text", "\\math", "\\under", "\\f", "{\\")) and not text.startswith("\\frac"):
        text = unworded(text)
    text = _without_outer_brackets(text)
    lead = _LEAD.match(text)
    if lead is None:
        return None
    number = _read_number(text, lead.end())
    if number is None:
        return None
    value, end, is_decimal = number
    if "-" in (lead[1], lead[2]):
        value = -value
    percent = _PERCENT.match(text, end)
    if percent is not None:
        unit = unit_of(text[percent.end() :])
        return None if unit is None else Quantity(value, "", True, is_decimal)
    scale = _SCALE.match(text, end)
    if scale is not None:
        value, end = value * 10 ** _SCALES[scale[1].lower()], scale.end()
    unit = unit_of(text[end:])
    return None if unit is None else Quantity(value, unit, False, is_decimal)


def _without_outer_brackets(text: str) -> str:
    for pair in ("()", "{}"):
        if len(text) > 2 and text[0] == pair[0] and text[-1] == pair[1] and not set(text[1:-1]) & set("(){},"):
            return text[1:-1].strip()
    return text


def _read_number(text: str, start: int) -> tuple[Fraction, int, bool] | None:
    """Read the number at a place -> (value, its end, has a decimal point)."""
    for form, pattern in _FORMS:
        match = pattern.match(text, start)
        if match is None:
            continue
        parts = [part for part in match.groups() if part is not None]
        if form == "repeating":
            return _repeating(*parts), match.end(), False
        numbers = [Fraction(plain_number(part)) for part in parts]
        if form != "plain" and numbers[-1] == 0:
            return None
        if form == "mixed":
            return numbers[0] + numbers[1] / numbers[2], match.end(), False
        if form == "fraction":
            return numbers[0] / numbers[1], match.end(), False
        return numbers[0], match.end(), numbers[0].denominator > 1
    return None


def _repeating(whole: str, fixed: str, period: str) -> Fraction:
    """0.1(6) = (16 - 1) / 90."""
    digits = int(f"{whole}{fixed}{period}") - int(f"{whole}{fixed}" or 0)
    return Fraction(digits, (10 ** len(period) - 1) * 10 ** len(fixed))


def unit_of(rest: str) -> str | None:
    """Read what stands behind a number as its unit, "" for none, None if it is something else."""
    if not rest.strip():
        return ""
    degrees = _DEGREES.fullmatch(rest)
    if degrees is not None:
        return "°" + degrees[1]
    if rest.startswith(("^", "_", "!")) or re.match(r"-[A-Z]", rest):
        return None
    is_attached = not rest[0].isspace() and not rest.startswith("\\")
    is_worded = _UNIT_TEXT.match(rest) is not None
    words = re.sub(_TEXT, r" \1 ", rest)
    words = _RAISED.sub(r"\1", re.sub(r"\\circ", "°", words)).replace("²", "2").replace("³", "3")
    words = words.replace("\\", " ").strip(" .,;:()[]\"'")
    if re.search(r"(?<![a-zA-Z])\d|\d\d|[=<>+*^_|{}?!&#@]|-\s", words):
        return None
    names = [_unit_name(word) for word in re.split(r"[\s/·.-]+", words) if word]
    if not names or _NO_UNIT.fullmatch(names[0]):
        return "" if not names else None
    if not is_worded and not _is_unit(words.split()[0], is_attached):
        return None
    return " ".join(name for name in names if name not in ("per", "of", "in"))


def _is_unit(word: str, is_attached: bool) -> bool:
    """Tell a unit from variables: 5 m and 5km are quantities, 5m and 5xy products."""
    letters = word.strip("23/.,")
    if not letters.isascii() or not letters.isalpha():
        return True
    if is_attached:
        return len(letters) > 3 or (len(letters) > 1 and _SHORT_UNIT.fullmatch(letters) is not None)
    if len(letters) == 1:
        return letters in _ONE_LETTER_UNITS
    return not set(letters) <= set("xyz")


def _unit_name(word: str) -> str:
    name = word.casefold()
    if len(name) > 3 and name.endswith("s") and not name.endswith("ss"):
        name = name[:-1]
    return _SAME_UNITS.get(name, name)


def same_quantity(gold: Quantity, given: Quantity) -> bool:
    """Compare two numbers: the values must be equal, and the units where both have one.

    A percentage is its hundredth or, beside a number that is none, the number itself (`50%` is 0.5, and 50 where the question
    asked for percent). A number with a decimal point may be rounded: to six decimals, and to a thousandth of itself.
    """
    units = [set(each.unit.split()) for each in (gold, given)]
    if not (units[0] <= units[1] or units[1] <= units[0]):  # "5 m" and "5 cm"; not "5 m" and "5 m long"
        return False
    is_rounded = gold.is_decimal or given.is_decimal
    if _is_close(gold.value, given.value, is_rounded):
        return True
    if gold.is_percent == given.is_percent:
        return False
    shares = [each.value / 100 if each.is_percent else each.value for each in (gold, given)]
    return _is_close(shares[0], shares[1], is_rounded)


def _is_close(a: Fraction, b: Fraction, is_rounded: bool) -> bool:
    if a == b:
        return True
    return is_rounded and round(a, 6) == round(b, 6) and abs(a - b) <= max(abs(a), abs(b)) / 1000


def split_list(text: str) -> Sequence[str]:
    r"""Split an answer of several at its outer commas, semicolons, "and" and "or"; one in brackets is one.

    >>> split_list("1, 2 and (3, 4)"), split_list(r"\{1,200\}"), split_list(r"x=1 \text{ or } x=2"), split_list("(1, 2)")
    (['1', '2', '(3, 4)'], ['1', '200'], ['x=1', 'x=2'], ['(1, 2)'])
    """
    text = undressed(text)
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    parts, depth, start = [], 0, 0
    for match in _SEPARATOR.finditer(text):
        mark = match[0]
        if mark in ("(", "[", "{", "\\{"):
            depth += 1
        elif mark in (")", "]", "}", "\\}"):
            depth -= 1
        elif depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
