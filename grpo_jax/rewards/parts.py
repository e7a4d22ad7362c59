"""The parts of a reward, one at a time: their settings, and the score of a single completion."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from grpo_jax.errors import UserError
from grpo_jax.rewards.calling import Request, call, plan_call
from grpo_jax.rewards.pool.serve import load
from grpo_jax.rewards.scorers import FUNCTIONS, LOOKS_FOR_AN_ANSWER

if TYPE_CHECKING:
    # Only here: a process that scores answers imports this package, and should not wait for JAX, which the config needs.
    from grpo_jax.config import RewardConfig


def settings_of(config: RewardConfig) -> dict[str, dict[str, Any]]:
    """Return the keyword arguments of each built-in part: the fields of config.reward.<part>, and the tags of reasoning."""
    choice = config.choice
    settings: dict[str, dict[str, Any]] = {part: {} for part in FUNCTIONS}
    settings["regex"] = {"pattern": config.regex.pattern}
    settings["format"] = {"pattern": config.format.pattern, "once": config.format.once}
    settings["choice"] = {"options": choice.options, "prompt": choice.prompt, "answer": choice.answer}
    settings["repetition"] = {"ngram_size": config.repetition.ngram_size}
    settings["code"], settings["judge"] = dataclasses.asdict(config.code), dataclasses.asdict(config.judge)
    for part in LOOKS_FOR_AN_ANSWER:
        settings[part]["reasoning_tags"] = config.reasoning_tags
    return settings


def score(part: str, completion: str, item: Mapping[str, Any], **settings: Any) -> float | None:
    r"""Score one completion by one part of a reward, in this process and without a time limit.

    Args:
      part: a name of config.reward ("math_verify", "exact", "choice", "regex", "format", "repetition", "reasoning_gym"), or
        "module:function".
      completion: the text. item: the row, with its answer (or a list of acceptable ones) under "answer".
      settings: what differs from the defaults of config.reward.<part>; of a function its keyword arguments.
    Returns: the score; None if the part has no opinion.
    Raises: UserError for a part that is not there, and what the part itself raises.

    >>> score("exact", "It is $1,024.00.", {"answer": "1024"}), score("format", "<think>", {})
    (1.0, 0.0)
    """
    if part in FUNCTIONS:
        from grpo_jax.config import RewardConfig

        settings = {**settings_of(RewardConfig())[part], **settings}
    elif ":" not in part:
        more = "`length` is counted in tokens, by the reward function" if part == "length" else "or module:function"
        raise UserError(f"no part {part!r} to score a text by; there are {', '.join(FUNCTIONS)}; {more}")
    function = load(FUNCTIONS.get(part, part))
    calling = plan_call(part, inspect.signature(function), None, settings)
    unknown = sorted(set(settings) - set(calling.settings))
    if unknown:
        raise TypeError(f"{part} has no setting {unknown[0]!r}")
    (value,) = call(function, calling, Request(item, [completion], item.get("prompt")), asyncio.run)
    if isinstance(value, Exception):
        raise value
    return value
