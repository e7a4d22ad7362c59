"""The answer that a text gives. Pure, and linear in the text's length: it runs on whatever a model writes."""

from __future__ import annotations

import re

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # \{ and \} are no braces
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_INTEGER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:{_INTEGER}(?:\.\d+)?|\.\d+)(?:/\d+)?")


def final_answer(text: str) -> str:
    """Find the answer a text ends on, normalised; "" for none.

    The last <answer>...</answer>, else the last balanced \\boxed{...}, else the line after the last `####`, else the
    last number, else all of the text.

    >>> final_answer("Half of 48 is 24.\\n#### $1,024"), final_answer("so x is 3 or -4."), final_answer(" Paris ")
    ('1024', '-4', 'Paris')
    """
    marked = marked_answer(text)
    if marked is not None:
        return normalise_answer(marked)
    numbers = _NUMBER.findall(text.replace("\u2212", "-"))  # the minus sign of typeset mathematics
    return normalise_answer((numbers or [text])[-1])


def marked_answer(text: str) -> str | None:
    """Find the answer that a text marks as such, unchanged; None if there is no mark."""
    tagged = tagged_answer(text)
    # A box inside the tags is the answer; one outside of them belongs to the reasoning.
    if tagged is not None:
        boxed = boxed_answer(tagged)
        return tagged if boxed is None else boxed
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    _, mark, after = text.rpartition("####")
    lines = after.strip().splitlines()
    if not mark or not lines:
        return None
    return lines[0].strip()


def tagged_answer(text: str) -> str | None:
    """Find the text inside the last <answer>...</answer>."""
    # From the end, by plain searches: a regular expression would go over the whole text for every tag that is never closed.
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    return text[start + len("<answer>") : end].strip()


def boxed_answer(text: str) -> str | None:
    """Find the text inside the last \\boxed{...} whose braces balance; of nested ones the innermost."""
    # One pass with a stack of open braces. Braces nest, so no regular expression finds their end, and counting anew from each
    # box would be quadratic in a text of many open ones.
    opened: list[tuple[int, bool]] = []
    last = None
    for match in _BRACES.finditer(text):
        if match[0].endswith("{") and not match[0].startswith("\\{"):
            opened.append((match.end(), match[0] != "{"))
        elif match[0] == "}" and opened:
            start, is_box = opened.pop()
            if is_box and (last is None or start > last[0]):
                last = (start, match.start())
    if last is None:
        return None
    return text[last[0] : last[1]].strip()


def normalise_answer(answer: str) -> str:
    """Remove dollar signs, thousands separators, a full stop at the end and superfluous white space."""
    text = answer.replace("\u2212", "-").replace("\\$", "").replace("$", "").replace("{,}", ",").replace("\\!", "")
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    return " ".join(text.split()).removesuffix(".").rstrip()
