r"""One spelling for the many ways of writing the same answer. Pure, and linear in the text's length.

Nothing here computes: `1/2` and `0.5` stay two texts (quantities.py and math_answer.py compare values).
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from numbers import Integral, Rational, Real
from typing import Any

# Numbers of the data with more digits than these are refused: they would be typing errors, and gigabytes of text.
MAX_EXPONENT = 4000

_SYMBOLS = {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2012": "-", "\u2013": "-", "\ufe63": "-",
    "\u3002": ". ", "\u3001": ",", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',
    "\u2044": "/", "\u2215": "/", "\u066b": ".", "\u066c": ",", "\u066a": "%", "\u2236": ":",
    "\u2205": "\\emptyset ", "\u221e": "\\infty ", "\u03c0": "\\pi ", "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ",
    "\u00b1": "\\pm ", "\u222a": "\\cup ", "\u2229": "\\cap ", "\u2208": "\\in ", "\u00d7": "\\times ", "\u00f7": "/",
    "\u22c5": "\\cdot ", "\u00b7": "\\cdot ", "\u2248": "\\approx ", "\u00b0": "^\\circ ", "\u221a": "\\sqrt ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u200b": "", "\u200e": "", "\u200f": "", "\ufeff": "",
}  # fmt: skip
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+")
_VULGAR = re.compile("[¼½¾⅐-⅞]")
_SEPARATED = re.compile(r"(?<=\d)(?:\\[,; ]|~|['_])(?=\d{3}(?!\d))")
_SPACES = re.compile(r"(?<!\\)\\(?:[,;:! ]|quad(?![a-z])|qquad(?![a-z]))|~")
_EMPHASIS = re.compile(r"(?<![\w)*])(\*{1,3}|__?|`{1,3})(?=[^\s*])([^\n*`]{0,400}?[^\s*])\1(?![\w*])")
_BRACKETS = re.compile(r"\\?[{}]|[()\[\]]")
# Groups of three; of two and one of three, as in India; of three with points, if two of them or a comma behind leave no doubt.
_THOUSANDS = re.compile(r"(?<![\d,.])(?:\d{1,3}(?:,\d{3})+|\d{1,2}(?:,\d{2})+,\d{3})(?![\d,])")
_POINTS = re.compile(r"(?<![\d,.])(\d{1,3}(?:\.\d{3}){2,}|\d{1,3}(?:\.\d{3})+(?=,\d+(?![\d,.])))(?:,(\d+))?(?!\d|[,.]\d)")
_BLANKS = re.compile(r"(?<![\d,.])(?<!\d )(\d{1,3}(?: \d{3})+)(?:,(\d+))?(?!\d|[,. ]\d)")
_PERCENT_WORD = re.compile(r"(?<=\d)\s?(?:percent|per cent)$", re.IGNORECASE)
_DECIMAL = re.compile(r"([-+]?)\s*(\d*)(?:\.(\d*))?")
_SCIENTIFIC = re.compile(
    r"([-+]?(?:\d+\.?\d*|\.\d+))(?:[eE]([-+]?\d{1,4})|\s*(?:\\times|\\cdot|\*|x)\s*10\^\{?([-+]?\d{1,4})\}?)"
)
_FONT = re.compile(r"\\(?:bf|it|rm|em|tt)(?![a-zA-Z])")
_EXCLAMATION = re.compile(r"(?<=[^\W\d_]{2})[!?]+$")
_TAGS = re.compile(r"</?(?:b|i|u|s|p|em|br|strong|code|span)\s?/?>|<\|[a-z_]{1,20}\|>|<<[^<>\n]{0,80}>>")
_CURRENCY = re.compile(r"\\(?:textdollar|texteuro|euro|pounds|\$)(?![a-zA-Z])|\$")
_WORDS = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:rm|bf|it|sf)|mbox|operatorname|underline|f(?:rame)?box|emph|boldsymbol)\s*\{([^{}]*)\}"
)


def normalise_answer(answer: str) -> str:
    r"""Remove what an answer is dressed in: dollar signs, emphasis, thousands separators, zeros and stops at its end.

    >>> normalise_answer("**$1,024.50**."), normalise_answer("42.0"), normalise_answer("(1,200)"), normalise_answer("1.5e6")
    ('1024.5', '42', '(1,200)', '1500000')
    """
    if answer.isascii() and answer.isdigit():
        return answer
    return plain_number(_PERCENT_WORD.sub("%", undressed(answer)))


def undressed(answer: str) -> str:
    """Remove delimiters, emphasis, thousands separators and superfluous white space; the number itself is left as it is."""
    text = without_tags(ascii_signs(answer))
    if "\\" in text or "$" in text:
        text = _CURRENCY.sub("", text).replace("{,}", ",").replace("\\!", "")
        for mark in ("\\(", "\\)", "\\[", "\\]", "\\left", "\\right"):
            text = _without_mark(text, mark)
    text = _SEPARATED.sub("", text)
    text = " ".join(_SPACES.sub(" ", text).split())
    if "*" in text or "_" in text or "`" in text:
        for _ in range(3):  # bold and italic and code, one inside the other
            text, num = _EMPHASIS.subn(r"\2", text)
            if not num:
                break
    if not text.endswith("..."):
        text = text.rstrip(" .,;") or text
    return without_separators(text)


def without_tags(text: str) -> str:
    """Remove the tags of bold, italics and the like of HTML."""
    return _TAGS.sub("", text) if "<" in text else text


def _without_mark(text: str, mark: str) -> str:
    if mark not in text:
        return text
    # \leftarrow and \rightarrow are no brackets.
    return re.sub(re.escape(mark) + r"(?![a-zA-Z])", "", text)


def ascii_signs(text: str) -> str:
    """Write digits, minus signs, full-width signs and mathematical symbols of Unicode as ASCII or LaTeX."""
    if text.isascii():
        return text
    text = _RAISED.sub(lambda match: "^{" + match[0].translate(_SUPERSCRIPTS) + "}", text)
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"), text)
    return "".join(map(_ascii_sign, text))


def _ascii_sign(sign: str) -> str:
    if sign < "\x80":
        return sign
    if sign in _SYMBOLS:
        return _SYMBOLS[sign]
    digit = unicodedata.decimal(sign, None)
    if digit is not None:
        return str(digit)
    if "\uff01" <= sign <= "\uff5e":  # the full-width copies of ASCII
        return chr(ord(sign) - 0xFEE0)
    return sign


def without_separators(text: str) -> str:
    r"""Remove thousands separators, but none inside ( ), [ ] and \{ \}: (1,200) is a point and \{1,200\} a set of two.

    >>> without_separators("1,200 or (1,200)"), without_separators("1.234,5"), without_separators("1 234 567")
    ('1200 or (1,200)', '1234.5', '1234567')
    """
    if "," not in text and "." not in text and " " not in text:
        return text
    pieces, depth, end = [], 0, 0
    for match in _BRACKETS.finditer(text):
        bracket = match[0]
        if bracket in ("{", "}"):  # braces that only group, as in \frac{1,000}{3}
            continue
        pieces.append(_join_groups(text[end : match.start()], depth))
        pieces.append(bracket)
        depth = max(depth + (1 if bracket[-1] in "([{" else -1), 0)
        end = match.end()
    pieces.append(_join_groups(text[end:], depth))
    return "".join(pieces)


def _join_groups(text: str, depth: int) -> str:
    if depth or not text:
        return text
    if "," in text:
        text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if "." in text:
        text = _POINTS.sub(lambda match: _number_of(match, "."), text)
    if " " in text:
        text = _BLANKS.sub(lambda match: _number_of(match, " "), text)
    return text


def _number_of(match: re.Match[str], separator: str) -> str:
    fraction = "." + match[2] if match[2] else ""
    return match[1].replace(separator, "") + fraction


def plain_number(text: str) -> str:
    """Write a number without exponent, plus sign and idle zeros; other text and leading zeros stay as they are."""
    if text.isascii() and text.isdigit():
        return text
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific is not None:
        text = _shifted(scientific[1], int(scientific[2] or scientific[3]))
    number = _DECIMAL.fullmatch(text)
    if number is None or not (number[2] or number[3]):
        return text
    sign, whole, fraction = number[1], number[2] or "0", (number[3] or "").rstrip("0")
    plain = f"{whole}.{fraction}" if fraction else whole
    return "-" + plain if sign == "-" and plain.strip("0.") else plain


def _shifted(digits: str, exponent: int) -> str:
    if abs(exponent) >= MAX_EXPONENT:
        return f"{digits}e{exponent}"
    return format(Decimal(f"{digits}e{exponent}"), "f")


def text_of_number(value: Any) -> str:
    """Write a number of the data as plain exact text: no exponent, no idle zeros.

    Args: value: an int, float, Decimal, Fraction, or NumPy's numbers; of a float the shortest text that reads as it.
    Returns: its digits; of a fraction that no decimal ends, numerator/denominator.
    Raises: TypeError for what is no number (a bool is none), ValueError for NaN, Infinity and thousands of digits.

    >>> text_of_number(1e16), text_of_number(0.00001), text_of_number(42.0), text_of_number(Decimal("2.50"))
    ('10000000000000000', '0.00001', '42', '2.5')
    """
    if type(value).__name__ in ("bool", "bool_") or not isinstance(value, Real | Decimal):
        raise TypeError(f"{value!r:.60} is no number")
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Rational):
        value = Fraction(value)
        return str(value) if value.denominator > 1 else str(value.numerator)
    # NumPy's float32 prints the digits that tell it from other float32; as a double it would have eight wrong ones.
    number = value if isinstance(value, Decimal) else Decimal(str(value))
    if not number.is_finite():
        raise ValueError(f"{number} is no finite number")
    if abs(number.adjusted()) >= MAX_EXPONENT:
        raise ValueError(f"{number:.5e} has thousands of digits")
    return plain_number(format(number, "f"))


def as_words(text: str) -> str:
    r"""Reduce an answer to what a reader would compare: case, \text, quotation marks, and brackets around all of it aside.

    >>> as_words(r"\textbf{(B)}"), as_words(" New  York. "), as_words(r"\text{Evelyn}")
    ('b', 'new york', 'evelyn')
    """
    text = undressed(text)
    for _ in range(3):  # one inside the other; no more, as each goes over all of the text
        text, num = _WORDS.subn(r"\1", text)
        if not num:
            break
    text = plain_number(" ".join(text.replace("\\varnothing", "\\emptyset").replace("\\{\\}", "\\emptyset").split()))
    text = re.sub(r"\s*([:,\\(){}=+*/^<>|\[\]])\s*", r"\1", text)
    for pair in ('""', "''", "{}", "()"):
        if len(text) > 2 and text[0] == pair[0] and text[-1] == pair[1] and not set(text[1:-1]) & set("(){},"):
            text = text[1:-1].strip()
    return _EXCLAMATION.sub("", text.rstrip(" .") or text).casefold()


def unworded(text: str) -> str:
    r"""Unwrap \text{...} and its like."""
    return " ".join(_FONT.sub(" ", _WORDS.sub(r" \1 ", text)).split()) if "\\" in text else text


def worded_parts(text: str) -> tuple[str, ...]:
    r"""List the words that stand in \text{...} and its like, and and or aside."""
    words = " ".join(_WORDS.findall(text)).casefold().split()
    return tuple(word for word in words if word not in ("and", "or"))


def without_words(text: str) -> str:
    r"""Remove \text{...} and its like with their content; "and" and "or" become commas."""
    return _WORDS.sub(lambda match: "," if match[1].strip() in ("and", "or") else " ", text)
