"""The sources of questions, by the name in config.task.name."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from grpo_jax.config import Config, RewardConfig, TaskConfig, mixture, reward_expression
from grpo_jax.errors import UserError
from grpo_jax.tasks import dataset, jsonl, reasoning_gym
from grpo_jax.tasks.questions import Source

# Parts of a reward that compare a completion with the row's answer. A function of one's own may do without.
COMPARING = ("math_verify", "exact", "choice", "reasoning_gym")


def load_data(config: Config) -> list[Source]:
    """Load the questions that config.task names.

    Raises: UserError naming field, file and line of what cannot be read.
    """
    needs_answer = compares_answers(config.reward, config.task.name)
    if needs_answer and not config.task.columns.answer and config.task.name in ("jsonl", "dataset"):
        raise UserError(
            "config.task.columns.answer is empty: config.reward compares completions with an answer; name its column"
        )
    return SOURCES[config.task.name](config.task, config.eval.num_prompts, needs_answer=needs_answer)


def load_mixture(config: TaskConfig, num_eval: int, *, needs_answer: bool = True) -> list[Source]:
    """Load the sources of `task.mixture`; each gives its share of the held-out questions.

    Args:
      config: config.task. num_eval: questions to hold out of all of them. needs_answer: as in `question_of`.
    Returns: the sources; their streams have other names, and weights that add up to the sources' own.
    """
    members = mixture.members(config.mixture, config)
    shares = reasoning_gym.shares(tuple(member.weight for member in members), num_eval)
    sources = []
    for number, (member, share) in enumerate(zip(members, shares, strict=True), 1):
        for source in SOURCES[member.task.name](member.task, share, needs_answer=needs_answer):
            sources.append(_renamed(source, f"source {number}", member.weight))
    return sources


def _renamed(source: Source, name: str, weight: float) -> Source:
    """Put a source's streams into a mixture. name: of the source there. weight: of all its streams together."""
    total = sum(source.weights.values())
    weights = {f"{name} {stream}".strip(): weight * each / total for stream, each in source.weights.items()}

    def rename(questions):
        return [dataclasses.replace(question, stream=f"{name} {question.stream}".strip()) for question in questions]

    evaluation = None if source.evaluation is None else rename(source.evaluation)
    return dataclasses.replace(source, train=rename(source.train), evaluation=evaluation, weights=weights)


def compares_answers(reward: RewardConfig, task_name: str) -> bool:
    """Tell if a part of the reward compares a completion with an answer that the data has to give."""
    return bool(comparing_parts(reward, task_name) - {"reasoning_gym"})


def comparing_parts(reward: RewardConfig, task_name: str) -> set[str]:
    """List the named parts of a reward that compare a completion with the right answer. task_name: whose own reward counts."""
    task = reward.task or reward_expression.OF_TASK.get(task_name, "")
    parts = {part.name for text in (task, reward.shaping) for part in reward_expression.parse(text, "config.reward")}
    found = parts & set(COMPARING)
    if "regex" in parts and re.compile(reward.regex.pattern).groups:
        found.add("regex")
    return found


# (config.task, number to hold out, needs_answer=...) -> where the questions come from.
SOURCES: dict[str, Callable[..., list[Source]]] = {
    "jsonl": jsonl.load,
    "dataset": dataset.load,
    "reasoning_gym": reasoning_gym.load,
    "mixture": load_mixture,
}
