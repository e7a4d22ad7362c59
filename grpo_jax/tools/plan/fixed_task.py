"""A task of the same prompts at every step, for programs that are planned or timed and teach nothing."""

from __future__ import annotations

import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from grpo_jax.types import Prompts, Reward


class FixedTask:
    """The prompts it is given, every time; nothing ends a completion, and rewards differ within a group.

    tokens_PS: int, no padding. pad_id: of the tokenizer.
    """

    # Traceable, so that whole iterations can be compiled; no stop token, so that every completion uses all of its budget and
    # a timed rollout does the same work each time.
    is_traceable, stop_ids = True, ()

    def __init__(self, tokens_PS: npt.ArrayLike, pad_id: int):
        self.tokens_PS = np.asarray(tokens_PS, np.int32)
        self.prompt_tokens = self.tokens_PS.shape[1]
        self.tokenizer: Any = types.SimpleNamespace(pad_id=pad_id)

    def train_prompts(self, position: Any, num_prompts: int, seed: Any = None) -> Prompts:
        """Return the prompts, whatever the position and the seed."""
        del position, seed
        tokens_PS = jnp.asarray(self.tokens_PS)
        assert len(tokens_PS) == num_prompts
        return Prompts(tokens_PS, jnp.ones_like(tokens_PS, bool), jnp.zeros(num_prompts, jnp.int32))

    def eval_prompts(self) -> Prompts:
        return self.train_prompts(0, len(self.tokens_PS))

    def reward(self, answer: Any, tokens_PGT: Any, mask_PGT: Any) -> Reward:
        """Score completions by their token ids.

        Args:
          answer: not used.
          tokens_PGT: int32, the completions.
          mask_PGT: not used.
        """
        del answer, mask_PGT
        # The rewards of a group must differ: equal ones give an advantage of 0, and dynamic sampling
        # would use up all its rounds.
        reward_PG = (tokens_PGT.sum(-1) % 7).astype(jnp.float32)
        return Reward(reward_PG, jnp.zeros_like(reward_PG), {})

    def final_answers(self, tokens_PGT: Any, mask_PGT: Any) -> list[list[str]]:
        raise NotImplementedError("nothing is evaluated here")

    def close(self) -> None:
        pass
