"""Where a text says what its answer is. Pure, and linear in the text's length: it runs on whatever a model writes."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # \{ and \} are no braces
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:{_INTEGER}(?:\.\d+)?|\.\d+)(?:/\d+)?")


def final_answer(text: str) -> str:
    """The answer a text ends on, normalised; "" for none.

    The last <answer>...</answer>, else the last balanced \\boxed{...}, else the line after the last `####`, else the
    last number, else all of the text.

    >>> final_answer("Half of 48 is 24.\\n#### $1,024"), final_answer("so x is 3 or -4."), final_answer(" Paris ")
    ('1024', '-4', 'Paris')
    """
    marked = marked_answer(text)
    if marked is not None:
        return normalise_answer(marked)
    numbers = _NUMBER.findall(text.replace("\u2212", "-"))
    return normalise_answer(numbers[-1] if numbers else text)


def marked_answer(text: str) -> str | None:
    """The answer that a text marks as such, as it stands there; None if there is no mark."""
    tagged = tagged_answer(text)
    inside = boxed_answer(text if tagged is None else tagged)
    if inside is not None or tagged is not None:
        return tagged if inside is None else inside
    _, mark, after = text.rpartition("####")
    lines = after.strip().splitlines()
    return lines[0].strip() if mark and lines else None


def tagged_answer(text: str) -> str | None:
    """What stands in the last <answer>...</answer>."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end].strip() if start >= 0 else None


def boxed_answer(text: str) -> str | None:
    """What stands in the last \\boxed{...} whose braces balance; of nested ones the innermost."""
    opened: list[tuple[int, bool]] = []
    last = None
    for match in _BRACES.finditer(text):
        if match[0].endswith("{") and not match[0].startswith("\\{"):
            opened.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = (start, match.start())
    return None if last is None else text[last[0] : last[1]].strip()


def normalise_answer(answer: str) -> str:
    """Without dollar signs, thousands separators, a full stop at the end and superfluous white space."""
    text = answer.replace("\u2212", "-").replace("\\$", "").replace("$", "").replace("{,}", ",").replace("\\!", "")
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return " ".join(text.split()).removesuffix(".").rstrip()
