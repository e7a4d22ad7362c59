r"""Where the answer of a completion stands. Pure, and linear in the text's length: it runs on whatever a model writes.

Every part that looks for an answer looks here, and in this order: behind the reasoning; then the last <answer>...</answer>,
else the last \boxed{...}, else the line after `####`, else what "the answer is" announces, else the last number, formula or
date, else all of the text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grpo_jax.rewards.scorers.normal_form import (
    as_words,
    ascii_signs,
    normalise_answer,
    text_of_number,
    undressed,
    without_tags,
)
from grpo_jax.rewards.scorers.quantities import read_quantity

REASONING_TAGS = ("<think>", "</think>")

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)  # \{ and \} are no braces
_BETWEEN_BOXES = re.compile(
    r"[\s$]*(?:\\[()\[\]])?[\s$]*(?:(?:,|;|,?\s*(?:and|or)|\\text\{\s*(?:and|or)\s*\})[\s$]*(?:\\[()\[\]])?[\s$]*)?"
)
MAX_BOXES = 10
_HASHES = re.compile(r"(?<!#)####(?!#)")
_ANNOUNCED = re.compile(
    r"(?:\banswer(?:\s+is|\s*[:=]|\s+(?:should|must|will|would)\s+be)|答案\s*(?:是|为|為|[:\uff1a])|答\s*[:\uff1a]|\bréponse(?:\s+est|\s*:)|"
    r"\bantwort(?:\s+ist|\s*:)|\brespuesta(?:\s+es|\s*:)|\b\u043e\u0442\u0432\u0435\u0442\s*(?:-|:))\s*:?",
    re.IGNORECASE,
)
_ANNOUNCING = ("answer", "答", "réponse", "antwort", "respuesta", "\u043e\u0442\u0432\u0435\u0442")
# A sentence ends at a stop before white space, or where its reason begins.
_SENTENCE_END = re.compile(
    r"\n|[.!?;](?=\s|$|[*_`\"')])|。|,?\s(?:because|since|so that|which|where|and so|as)\s|,\s(?:so|and|but|not)\s",
    re.IGNORECASE,
)
_SHORT_WORDS = frozenset(("yes", "no", "true", "false", "none"))

# A number with what belongs to it, a date, a time, a ratio: digits and the marks between them. Not within a word (H2O, B12).
_DIGITS = (
    r"(?:0[xX][0-9A-Fa-f]+|\d+(?:\.\d+)? ?(?:x|\*|\\times|\\cdot) ?10\^(?:\{-?\d{1,4}\}|-?\d{1,4})|"
    r"\d{1,3}(?:[ \u00a0\u2009\u202f]\d{3})+(?!\d)(?:[.,]\d+)?|"
    r"\d+(?:(?:[.,:/'-]|\\,)\d+)*(?:[eE][-+]?\d+(?![A-Za-z0-9]))?|\.\d+)"
)
# What an unmarked answer is found by: its last number, or a command of LaTeX that is a value or makes one.
_ANCHOR = re.compile(
    rf"(?<![A-Za-z0-9])(?<![A-Za-z0-9)\]}}]_)(?<![0-9][.,:/'])(?<![^A-Za-z][A-Za-z]\.){_DIGITS}|"
    r"\\(?:pi|infty|emptyset|varnothing|[dt]?frac|sqrt)(?![a-zA-Z])"
)
_PIECES = re.compile(
    rf"(?P<number>{_DIGITS})|"
    r"(?P<operator>\\(?:times|cdot|div|[lg](?:e|eq|t)|neq?|pm|mp|cup|cap|in|setminus)(?![a-zA-Z])|\\%|[-+*/^=<>_|%!])"
    r"|(?P<command>\\(?:[A-Za-z]+|[,;:! {}]))|(?P<word>[^\W\d_]+)"
    r"|(?P<bracket>[()\[\]{}])|(?P<space>[ \t]+)|(?P<other>.)",
    re.DOTALL,
)
_PROSE_COMMANDS = re.compile(
    r"\\(?:text|math|boxed|mbox|begin|end|item|quad|qquad|section|label|newline|par|underline|frame|emph|bf|it$|rm$|n$|approx|implies|to$|right)"
)
_FUNCTIONS = frozenset(("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "arcsin", "arccos", "arctan"))
_UNIT_LETTERS = frozenset("mgshlLNJWVFCTAD")
_TUPLE = re.compile(r"(?<!\\)[(\[]([^()\[\]\n,]{1,60}(?:,[^()\[\]\n,]{1,60}){1,20})(?<!\\)[)\]]")
_JOINED = re.compile(r"[\s$*`]*(?:,\s*)?(?<![A-Za-z])(or|and|或者?|和)[\s$*`]*$")
_MIXED = re.compile(r"\d{1,3} \d{1,3}/\d{1,3}")
_IN_PROSE = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,20} \$?\d+\$?\.?\s*$")  # "... is 42."
_SCALED = re.compile(r"\s?(?:percent|per cent|hundred|thousand|[mbtr]+illion|[百千万萬亿億]+)(?![a-z])", re.IGNORECASE)
_DEGREES = re.compile(r"\s*\^\s*\{?\s*\\circ\s*\}?$")
_DAYTIME = re.compile(r"\s?[ap]\.?m\b\.?", re.IGNORECASE)
_WORD_OF = {"and": "and", "和": "and"}
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf)\{[^{}]*\}")
_WORD = re.compile(r"[^\W\d_]{2,}")
DRESSING = 20  # characters beside the answer, as $ and **, of a text that is nothing but the answer
_WINDOW = 240  # characters that an unmarked formula may reach to either side of its last number
_TAIL = 600


class Answer(NamedTuple):
    """An answer as it was written, and whether the text marks it as its answer (a box, a tag, ####)."""

    text: str
    is_marked: bool


def judged_text(completion: str, item: Mapping[str, Any], tags: Sequence[str] = REASONING_TAGS) -> str | None:
    """Find the text behind the reasoning, in which the answer is looked for.

    Args:
      completion: the text that was sampled. item: its row; what the prompt opened (`prompt_opens`, "<think>") counts as the
        completion's beginning.
      tags: the opening and the closing tag of reasoning; none: all of the text is judged.
    Returns: what stands behind the last closing tag; None if reasoning was opened and never closed.
    """
    text = whole_text(completion, item)
    if len(tags) != 2:
        return text
    opening, closing = tags
    end = text.rfind(closing)
    behind = text if end < 0 else text[end + len(closing) :]
    return None if opening in behind else behind


def whole_text(completion: str, item: Mapping[str, Any]) -> str:
    """Return the completion with what the prompt opened for it."""
    return f"{item.get('prompt_opens') or ''}{completion}"


def acceptable_answers(item: Mapping[str, Any]) -> tuple[str, ...]:
    """List the row's answers; of several each is right."""
    answer = item["answer"]
    if isinstance(answer, str):
        return (answer,)
    answers = answer if isinstance(answer, list | tuple) else (answer,)
    return tuple(text_of_number(each) if isinstance(each, float) else str(each) for each in answers)


def final_answer(text: str, tags: Sequence[str] = REASONING_TAGS) -> str:
    r"""Find the answer a text ends on, normalised; "" for none.

    >>> final_answer("Half of 48 is 24.\n#### $1,024"), final_answer("so x is -4."), final_answer(" Paris ")
    ('1024', '-4', 'Paris')
    """
    behind = judged_text(text, {}, tags)
    return "" if behind is None else normalise_answer(find_answer(behind).text)


def find_answer(text: str) -> Answer:
    """Find the answer of a text without reasoning, as it was written; "" for none."""
    marked = marked_answer(text)
    if marked is not None:
        return Answer(marked, True)
    announced = announced_answer(text)
    if announced is not None:
        return Answer(announced, False)
    return Answer(last_expression(text) or text.strip(), False)


def is_all_of(gold: str, text: str) -> bool:
    """Tell that a text is the data's answer and nothing else, whatever number may stand in it."""
    if gold.isdigit():  # a number that the text says has been found; most answers
        return False
    return len(text) <= 2 * len(gold) + DRESSING and as_words(text) == as_words(gold) != ""


def marked_answer(text: str) -> str | None:
    """Find the answer that a text marks as such, unchanged; "" if it marks nothing, None if there is no mark."""
    tagged = tagged_answer(text)
    # A box inside the tags is the answer; one outside of them belongs to the reasoning.
    if tagged is not None:
        boxed = boxed_answer(tagged)
        return tagged if boxed is None else boxed
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    return hashed_answer(text)


def tagged_answer(text: str) -> str | None:
    """Find the text inside the last <answer>...</answer>."""
    # From the end, by plain searches: a regular expression would go over the whole text for every tag that is never closed.
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    return text[start + len("<answer>") : end].strip()


def boxed_answer(text: str) -> str | None:
    r"""Find the text inside the last \boxed{...} whose braces balance; of nested ones the innermost, of a list of boxes all.

    >>> boxed_answer(r"\boxed{1}, no, \boxed{2}"), boxed_answer(r"$\boxed{1}$ and $\boxed{2}$"), boxed_answer(r"\boxed{1")
    ('2', '1, 2', None)
    """
    if "\\boxed" not in text:
        return None
    # One pass with a stack of open braces. Braces nest, so no regular expression finds their end, and counting anew from each
    # box would be quadratic in a text of many open ones.
    opened: list[tuple[int, int, bool]] = []
    boxes: list[tuple[int, int, int]] = []
    for match in _BRACES.finditer(text):
        if match[0].endswith("{") and not match[0].startswith("\\{"):
            opened.append((match.start(), match.end(), match[0] != "{"))
        elif match[0] == "}" and opened:
            outside, start, is_box = opened.pop()
            if is_box and (not boxes or start > boxes[-1][1]):
                boxes.append((outside, start, match.start()))
    if not boxes:
        return None
    outside, start, end = boxes.pop()
    found = [text[start:end].strip()]
    while boxes and _BETWEEN_BOXES.fullmatch(text, boxes[-1][2] + 1, outside) and len(found) < MAX_BOXES:
        outside, start, end = boxes.pop()
        found.insert(0, text[start:end].strip())
    return ", ".join(dict.fromkeys(found))


def hashed_answer(text: str) -> str | None:
    """Find the line after the last `####` that marks an answer: the text's last line, or a value before other lines.

    `#### Step 2` before other lines is a heading of Markdown and marks none.
    """
    if "####" not in text:
        return None
    end = len(text.rstrip())
    for mark in reversed([*_HASHES.finditer(text)][-50:]):
        start = len(text) - len(text[mark.end() :].lstrip()) if mark.end() < end else end
        stop = text.find("\n", start)
        line = text[start : stop if stop >= 0 else len(text)].strip()
        if not line or start + len(line) >= end or is_value(line):
            return line
    return None


def is_value(line: str) -> bool:
    """Tell an answer, a quantity or a formula, from a heading."""
    return read_quantity(line) is not None or not _WORD.search(re.sub(r"\\[a-zA-Z]+", "", line[:_WINDOW]))


def announced_answer(text: str) -> str | None:
    """Find what "the answer is" or "Answer:" announces last: a value, or words that no number follows; None if neither."""
    if not any(map(text.casefold().__contains__, _ANNOUNCING)):  # most texts, and a hundred times faster
        return None
    announced = _last_match(_ANNOUNCED, text)
    if announced is None:
        return None
    tail = ascii_signs(text[announced.end() :]).lstrip(" \t:*_`")
    end = _SENTENCE_END.search(tail, 0, _WINDOW)
    stop = end.start() if end else min(len(tail), _WINDOW)
    words = undressed(tail[:stop].rstrip(" *_`"))
    if not words:
        return None
    if read_quantity(words) is not None:
        return last_expression(words)  # without its unit, as every number that is found in prose
    is_formula = "=" not in words and is_value(_TEXT.sub("", words)) and _ANCHOR.search(words) is not None
    if is_formula or as_words(words) in _SHORT_WORDS or len(as_words(words)) == 1:
        return words
    # Apollo 11, May 5; but "5 more than 13" announces nothing, and "as follows" only what comes behind it.
    is_name = words[0].isupper() and len(words.split()) <= 3
    has_value = any(sign.isdigit() for sign in words)
    if (has_value and not is_name) or _ANCHOR.search(tail, stop):
        return None
    return words


def last_expression(text: str) -> str | None:
    """Find the number, formula, date or time that a text ends on; of "3 or 4" and "3 and 4" both; None without digits."""
    text = without_tags(ascii_signs(text))
    found = _last_run(text)
    if found is None:
        return None
    start, end = found
    expression = text[start:end]
    for _ in range(9):  # as many as anybody would list
        low = max(0, start - _WINDOW)
        before = text[low:start]
        joined = _JOINED.search(before, max(0, len(before) - 20))
        if joined is None:
            break
        before = before[: joined.start()]
        other = _last_run(before)
        if other is None or other[1] != len(before):
            break
        expression = f"{before[other[0] :]} {_WORD_OF.get(joined[1], 'or')} {expression}"
        start = low + other[0]
    return _DEGREES.sub("", expression)  # a unit, as all that stands behind numbers in prose


def _last_match(pattern: re.Pattern[str], text: str) -> re.Match[str] | None:
    """Find a pattern's last match, near the end if there is one."""
    for begin in (max(0, len(text) - _TAIL), 0):
        last = None
        for last in pattern.finditer(text, begin):  # noqa: B007
            pass
        if last is not None or not begin:
            return last
    return None


def _last_run(text: str) -> tuple[int, int] | None:
    """Find the last number or value with the mathematics around it -> (start, end)."""
    anchor = _last_match(_ANCHOR, text)
    if anchor is None:
        return None
    if _IN_PROSE.search(text, max(0, anchor.start() - 24)):  # most texts, and ten times faster
        return anchor.span()
    low, high = max(0, anchor.start() - _WINDOW), min(len(text), anchor.end() + _WINDOW)
    for match in _TUPLE.finditer(text, low, high):
        if match.end() >= anchor.end() and all(map(_is_coordinate, match[1].split(","))):
            return match.span()
    daytime = _DAYTIME.match(text, anchor.end()) if ":" in anchor[0] else None
    if daytime is not None:
        return anchor.start(), daytime.end()
    pieces = list(_PIECES.finditer(text, low, high))
    place = next((i for i, piece in enumerate(pieces) if piece.start() >= anchor.start()), None)
    if place is None:
        return anchor.span()
    first, last = _within_brackets(pieces, _spread(pieces, place, -1), _spread(pieces, place, +1), place)
    start, end = _trimmed(pieces, first, last, place)
    scaled = _SCALED.match(text, end)
    return start, scaled.end() if scaled else end


def _is_coordinate(text: str) -> bool:
    return read_quantity(text) is not None or as_words(text).lstrip("-+") in ("\\infty", *"abcnxyz")


def _spread(pieces: Sequence[re.Match[str]], place: int, step: int) -> int:
    """Go from a piece to one side for as long as the pieces are of one formula; return the last index."""
    reach, i = place, place + step
    while 0 <= i < len(pieces):
        kind = pieces[i].lastgroup
        if kind == "space":
            # White space belongs to a formula only beside an operator: "2 + 3", but not "in 2 days".
            beyond = pieces[i + step].lastgroup if 0 <= i + step < len(pieces) else None
            is_mixed = beyond == "number" and _is_mixed(pieces[i - 1][0], pieces[i + 1][0])
            beside = {beyond, pieces[i - step].lastgroup}
            # A letter beside a command is an article: "a \\frac{1}{2} chance".
            is_formula = "operator" in beside or ("command" in beside and "word" not in beside)
            if not is_mixed and not is_formula:
                break
        elif not _is_mathematical(pieces, i, step):
            break
        else:
            reach = i
        i += step
    return reach


def _is_mixed(whole: str, fraction: str) -> bool:
    """Tell a mixed number, 2 1/2, from two numbers."""
    return _MIXED.fullmatch(f"{whole} {fraction}") is not None


def _is_mathematical(pieces: Sequence[re.Match[str]], i: int, step: int) -> bool:
    kind, piece = pieces[i].lastgroup, pieces[i][0]
    if kind == "command":
        return _PROSE_COMMANDS.match(piece) is None
    if kind == "word":
        # 5m and 5h are metres and hours, 5x is a product.
        is_unit = step > 0 and pieces[i - 1].lastgroup == "number" and piece in _UNIT_LETTERS
        return (len(piece) == 1 and piece.isascii() and not is_unit) or piece in _FUNCTIONS
    return kind in ("number", "operator", "bracket")


def _within_brackets(pieces: Sequence[re.Match[str]], first: int, last: int, place: int) -> tuple[int, int]:
    """Leave out what lies beyond a bracket that has no partner in the range."""
    opened: list[int] = []
    alone: list[int] = []
    for i in range(first, last + 1):
        if pieces[i].lastgroup != "bracket":
            continue
        if pieces[i][0] in "([{":
            opened.append(i)
        elif opened:
            opened.pop()
        else:
            alone.append(i)
    for i in (*alone, *opened):
        if i < place:
            first = max(first, i + 1)
        else:
            last = min(last, i - 1)
    return first, last


def _trimmed(pieces: Sequence[re.Match[str]], first: int, last: int, place: int) -> tuple[int, int]:
    """Leave out the left side of an equation, dangling operators, and brackets around all of it -> (start, end) in the text."""
    for i in range(first, place):
        follows = pieces[i + 1][0] if i + 1 < len(pieces) else ""
        if pieces[i][0] == "=" and follows != "=" and (i == first or pieces[i - 1][0] not in "<>!="):
            first = i + 1
    while first < place and pieces[first].lastgroup in ("space", "operator") and not _is_sign(pieces, first):
        first += 1
    while last > place and (
        pieces[last].lastgroup == "space" or (pieces[last].lastgroup == "operator" and "%" not in pieces[last][0])
    ):
        last -= 1
    if pieces[first][0] == "(" and pieces[last][0] == ")" and all(pieces[i][0] not in "()" for i in range(first + 1, last)):
        first, last = first + 1, last - 1
    return pieces[first].start(), pieces[last].end()


def _is_sign(pieces: Sequence[re.Match[str]], i: int) -> bool:
    """Tell the minus of -4 from that of "total - 4" and of COVID-19."""
    if pieces[i][0] != "-":
        return False
    before = [piece for piece in pieces[max(0, i - 2) : i] if piece.lastgroup != "space"]
    if before and before[-1][0] == "=":
        return True
    left = pieces[i - 1]
    # Scripts without spaces put a number right behind a word.
    is_behind_word = i > 0 and ((left.lastgroup in ("word", "number") and left[0].isascii()) or left[0] in ")]}")
    return not is_behind_word and pieces[i + 1].lastgroup != "space"
