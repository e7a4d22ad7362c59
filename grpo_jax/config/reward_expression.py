"""Reward expressions: `math_verify`, `0.2*format - 0.1*length`, `my_rewards:brevity`. A weighted sum of named parts."""

from __future__ import annotations

import re
from typing import NamedTuple

from grpo_jax.errors import UserError

NAMES = ("math_verify", "exact", "choice", "regex", "format", "repetition", "length", "reasoning_gym", "code", "judge")
# What an empty config.reward.task means.
OF_TASK = {"jsonl": "math_verify", "dataset": "math_verify", "mixture": "math_verify", "reasoning_gym": "reasoning_gym"}

_TERM = re.compile(
    r"\s*(?P<sign>[+-]?)\s*(?:(?P<weight>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*\*\s*)?"
    r"(?P<name>[A-Za-z_][\w.]*(?::[A-Za-z_]\w*)?)\s*"
)


def of_task(name: str) -> str:
    """Return the reward of a task where config.reward.task is empty; "" if the task has one that is no expression."""
    return OF_TASK.get(name, "math_verify" if ":" in name else "")


class Part(NamedTuple):
    """One term. name: of NAMES, or "module:function"."""

    name: str
    weight: float


def parse(expression: str, field: str) -> tuple[Part, ...]:
    """Parse the terms of an expression, none for an empty one. field: its dotted name, for messages.

    >>> parse("0.2*format - my_rewards:brevity", "config.reward.shaping")
    (Part(name='format', weight=0.2), Part(name='my_rewards:brevity', weight=-1.0))

    Raises UserError naming the field and what is wrong with it.
    """
    # Term by term, and not by one pattern for all: so a message can quote the rest that could not be read. Only the first term
    # may be without a sign.
    parts: list[Part] = []
    position = len(expression) - len(expression.lstrip())
    while position < len(expression):
        term = _TERM.match(expression, position)
        if term is None or (parts and not term["sign"]):
            rest = expression[position:]
            raise UserError(f"{field} = {expression!r}: cannot read {rest!r}; write it like '0.2*format + 0.1*length'")
        name = term["name"]
        # A module is not imported here: users' rewards are loaded in the processes that score.
        if ":" not in name and name not in NAMES:
            raise UserError(f"{field} = {expression!r}: no part {name!r}; there are {', '.join(NAMES)} and module:function")
        if name in [part.name for part in parts]:
            raise UserError(f"{field} = {expression!r}: {name!r} stands in it twice; add up its weights")
        parts.append(Part(name, float(term["weight"] or 1) * (-1 if term["sign"] == "-" else 1)))
        position = term.end()
    return tuple(parts)
