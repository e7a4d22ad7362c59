"""Tasks: where prompts come from and what a completion is worth.

A task is one object with the interface below. If `is_traceable`, its `train_prompts` and `reward` are pure JAX functions
and a whole iteration (prompts, rollout, reward, advantage, update) compiles into one call. Otherwise both run on the host.
"""

from __future__ import annotations

from typing import Any, Protocol

from grpo_jax.types import Prompts, Reward


class Tokenizer(Protocol):
    """The few things the library needs from a tokenizer."""

    vocab_size: int
    pad_id: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Text -> ids, with no special tokens added."""
        ...

    def decode(self, ids: Any) -> str:
        """Ids -> text, special tokens left out."""
        ...


class Task(Protocol):
    """Prompts and a reward.

    stop_ids: a completion ends at (and includes) the first of these. prompt_tokens: S, the fixed prompt width.
    """

    tokenizer: Tokenizer
    stop_ids: tuple[int, ...]
    prompt_tokens: int
    is_traceable: bool

    def train_prompts(self, position: Any, num_prompts: int) -> Prompts:
        """The training prompts number position .. position + num_prompts - 1: a pure function of (task, position)."""
        ...

    def eval_prompts(self) -> Prompts:
        """All held-out prompts; none of them is ever a training prompt."""
        ...

    def reward(self, answer: Any, tokens_PGT: Any, mask_PGT: Any) -> Reward:
        """What the completions are worth (success is a task reward >= `objective.success_threshold`)."""
        ...

    def final_answers(self, tokens_PGT: Any, mask_PGT: Any) -> list[list[str]]:
        """What each completion gives as its answer; equal texts are votes for the same one."""
        ...

    def close(self) -> None:
        """Release what the task holds (worker processes)."""
        ...


class TraceableTask(Task, Protocol):
    """A task whose prompts and reward are pure JAX functions. `is_traceable` is True."""

    def train_prompts(self, position: Any, num_prompts: int, seed: Any = None) -> Prompts:
        """The prompts of an order that `seed` decides (it may be traced); None: of the seed the task was made with."""
        ...
