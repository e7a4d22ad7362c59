"""The sources of questions, by the name in config.task.name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from grpo_jax.config import Config, RewardConfig, TaskConfig, mixture
from grpo_jax.errors import UserError
from grpo_jax.tasks import dataset, jsonl, own, reasoning_gym
from grpo_jax.tasks.questions import Source
from grpo_jax.tasks.row_rewards import RowRewards


def load_data(config: Config) -> list[Source]:
    """Load the questions that config.task names.

    Raises: UserError naming field, file and line of what cannot be read.
    """
    if config.task.name == "mixture":
        return load_mixture(config.task, config.eval.num_prompts, config.reward)
    return _load(config.task, config.eval.num_prompts, config.reward)


def load_mixture(config: TaskConfig, num_eval: int, reward: RewardConfig) -> list[Source]:
    """Load the sources of `task.mixture`; each gives its share of the held-out questions.

    Args:
      config: config.task. num_eval: questions to hold out of all of them. reward: config.reward.
    Returns: the sources; their streams have other names, and weights that add up to the sources' own.
    """
    members = mixture.members(config.mixture, config)
    shares = reasoning_gym.shares(tuple(member.weight for member in members), num_eval)
    sources = []
    for number, (member, share) in enumerate(zip(members, shares, strict=True), 1):
        own_reward = dataclasses.replace(reward, task=member.reward or reward.task)
        for source in _load(member.task, share, own_reward):
            sources.append(_as_member(source, f"source {number}", member))
    return sources


def _load(task: TaskConfig, num_eval: int, reward: RewardConfig) -> list[Source]:
    """Load one source, whose questions know their reward."""
    rewards = RowRewards(reward, task.name, task.columns.reward)
    # Where each row has its own reward, `question_of` sees what it lacks.
    has_one_reward = not task.columns.reward and task.name != "reasoning_gym"
    if has_one_reward and not task.columns.answer and rewards.needs_answer(rewards.of({}, "")):
        raise UserError(
            "config.task.columns.answer is empty: config.reward compares completions with an answer; name its column"
        )
    return SOURCES.get(task.name, own.load)(task, num_eval, rewards)


def _as_member(source: Source, name: str, member: mixture.Member) -> Source:
    """Put a source's streams into a mixture. name: of the source there. member: its weight, and its reward if it has one."""
    total = sum(source.weights.values())
    weights = {f"{name} {stream}".strip(): member.weight * each / total for stream, each in source.weights.items()}

    def put_in(question):
        stream = f"{name} {question.stream}".strip()
        return dataclasses.replace(question, stream=stream, reward=question.reward or member.reward)

    evaluation = None if source.evaluation is None else list(map(put_in, source.evaluation))
    return dataclasses.replace(source, train=list(map(put_in, source.train)), evaluation=evaluation, weights=weights)


# (config.task, number to hold out, rewards of rows) -> where the questions come from.
SOURCES: dict[str, Callable[..., list[Source]]] = {
    "jsonl": jsonl.load,
    "dataset": dataset.load,
    "reasoning_gym": reasoning_gym.load,
}
