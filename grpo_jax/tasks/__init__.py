"""Tasks: prompts, and rewards for completions.

A task is one object with the interface below. If `is_traceable`, its `train_prompts` and `reward` are pure JAX functions
and a whole iteration (prompts, rollout, reward, advantage, update) compiles into one call. Otherwise both run on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxtyping import Int, Shaped

from grpo_jax.types import Arrays, Prompts, Reward


class Tokenizer(Protocol):
    """The few things the library needs from a tokenizer."""

    vocab_size: int
    pad_id: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Text -> ids, with no special tokens added."""
        ...

    def encode_prompt(self, text: str) -> list[int]:
        """Text -> ids of a prompt: begun as the tokenizer begins a text (one BOS, where it writes one), without an end."""
        ...

    def decode(self, ids: Sequence[int] | Int[Arrays, " T"]) -> str:
        """Ids -> the text that is judged: ends of turns and padding left out, other special tokens as they are."""
        ...

    def decode_prompt(self, ids: Sequence[int] | Int[Arrays, " T"]) -> str:
        """Ids -> text as the model reads it, every special token written out."""
        ...


class Task(Protocol):
    """Prompts and a reward.

    stop_ids: a completion ends at (and includes) the first of these. prompt_tokens: S, the widest prompt. A task may also have
    stop_strings, texts that end a completion.
    """

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    prompt_tokens: int
    is_traceable: bool

    def train_prompts(self, position: int | Int[Arrays, ""], num_prompts: int) -> Prompts:
        """Return training prompts number position .. position + num_prompts - 1: a pure function of (task, position)."""
        ...

    def eval_prompts(self) -> Prompts:
        """Return all held-out prompts; none of them is ever a training prompt."""
        ...

    def reward(
        self,
        answer: Shaped[Arrays, "P ..."],
        tokens_PGT: Int[Arrays, "P G T"],
        mask_PGT: Shaped[Arrays, "P G T"],
    ) -> Reward:
        """Score completions (success is a task reward >= `objective.success_threshold`).

        Args:
          answer: `Prompts.answer` of their prompts. tokens_PGT: the completions.
          mask_PGT: > 0 through the stop token.
        Returns: float32 rewards [P, G].
        """
        ...

    def final_answers(self, tokens_PGT: Int[Arrays, "P G T"], mask_PGT: Shaped[Arrays, "P G T"]) -> list[list[str]]:
        """Return the answer that each completion gives, [P][G]; equal texts are votes for the same one."""
        ...

    def close(self) -> None:
        """Release what the task holds (worker processes)."""
        ...


def data_metrics(task: Task) -> Mapping[str, float]:
    """Return the numbers of a task's data for a run's records (data/train, data/dropped/...); none for one that counts none."""
    return getattr(task, "data_metrics", {})


def fingerprint(task: Task) -> str:
    """Return a hash of all that a task asks and of what it scores by; empty for one whose config says all of that."""
    return getattr(task, "fingerprint", "")


def summary(task: Task) -> str:
    """Describe a task's data in one line; empty for one whose config says all of that."""
    return getattr(task, "summary", "")


def knows_credit(task: Task) -> bool:
    """Tell if a task knows the true advantage of every token (`ForksTask.token_credit`)."""
    return hasattr(task, "token_credit")


class TraceableTask(Task, Protocol):
    """A task whose prompts and reward are pure JAX functions. `is_traceable` is True."""

    def reference(self, answer: Any) -> list[int]:
        """Return a right completion, without a stop token. answer: of one prompt."""
        ...

    def train_prompts(
        self, position: int | Int[Arrays, ""], num_prompts: int, seed: int | Int[Arrays, ""] | None = None
    ) -> Prompts:
        """Return training prompts of an order that `seed` decides, so that runs of several seeds share one program.

        Args:
          position: int32, of the first one. num_prompts: P. seed: may be traced; None: the one the task was made with.
        """
        ...
