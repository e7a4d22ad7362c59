"""The sources of task "mixture": each a task's config of its own, with a weight."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, NamedTuple

from grpo_jax.config import reward_expression
from grpo_jax.config.schema import TaskConfig
from grpo_jax.config.strict import build
from grpo_jax.errors import UserError
from grpo_jax.imports import is_import

SOURCES = ("jsonl", "dataset", "reasoning_gym")
OWN = ("weight", "name", "columns", "params", "reward", *SOURCES)  # what a source may set; all else is the mixture's


class Member(NamedTuple):
    """One source of a mixture.

    weight: its share of the training prompts, beside the others' weights. reward: the expression that its questions are
    scored by; empty: config.reward.task.
    """

    weight: float
    task: TaskConfig
    reward: str = ""


def members(text: str, task: TaskConfig) -> list[Member]:
    """Read the sources of a mixture.

    Args:
      text: JSON, `task.mixture`. task: settings that a source does not make of its own.
    Returns: the sources.
    Raises: UserError naming the source and the field that is wrong.
    """
    field = "config.task.mixture"
    try:
        entries = json.loads(text or "[]")
    except ValueError as error:
        raise UserError(f"{field}: not JSON ({error})") from None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        example = '[{"weight": 2, "name": "jsonl", "jsonl": {"path": ...}}]'
        raise UserError(f"{field}: a list with at least one source, {example}")
    return [_member(task, entry, f"{field}[{number}]") for number, entry in enumerate(entries)]


def _member(task: TaskConfig, entry: dict[str, Any], where: str) -> Member:
    unknown = next((name for name in entry if name not in OWN), None)
    if unknown is not None:
        raise UserError(f"{where}.{unknown}: not a setting of a source; it may have {', '.join(OWN)}")
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
        raise UserError(f"{where}.weight = {weight!r}: a number above 0")
    name, reward = entry.get("name"), entry.get("reward", "")
    if name not in SOURCES and not is_import(name):
        raise UserError(f"{where}.name = {name!r}: one of {', '.join(SOURCES)}, or module:function")
    if not isinstance(reward, str):
        raise UserError(f"{where}.reward = {reward!r}: expected the parts of a reward, as in config.reward.task")
    reward_expression.parse(reward, f"{where}.reward")
    values = dataclasses.asdict(task)
    for name, value in entry.items():
        if isinstance(value, dict):
            value = {**values[name], **value}
        values[name] = value
    for apart in ("weight", "reward"):
        values.pop(apart, None)
    return Member(float(weight), build(TaskConfig, values, where), reward)
