"""The widths that batches of prompts are padded to: a few buckets, so that one long prompt widens its own batch only.

A batch on its way has the width of its bucket; where shapes are fixed for a whole run, in dynamic sampling's buffer and in the
state's next batch, it has the task's width. Prompts are left-padded, so it is their beginning that is cut or filled up.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from grpo_jax.config import Config
from grpo_jax.learner.batching import length_buckets
from grpo_jax.types import Batch, Prompts

Tree = TypeVar("Tree")


def prompt_buckets(config: Config, prompt_tokens: int) -> tuple[int, ...]:
    """List the widths of prompts that programs are compiled for; the last is the task's."""
    return length_buckets(prompt_tokens, config.rollout.prompt_bucket_tokens)


def longest_prompt(is_used_S: Bool[np.ndarray, " S"]) -> int:
    """Count the slots from the first that any prompt uses."""
    return int(len(is_used_S) - is_used_S.argmax())


def bucket_of(longest: int, buckets: tuple[int, ...]) -> int:
    """Return the least width that holds the longest prompt."""
    return next(width for width in buckets if width >= longest)


def with_prompt_width(tree: Tree, width: int) -> Tree:
    """Give every `Prompts` in a tree another width; no prompt may be longer."""

    def resize(x: object) -> object:
        if not isinstance(x, Prompts):
            return x
        padding = max(width - x.tokens_PS.shape[1], 0)
        cut = x.tokens_PS.shape[1] + padding - width
        tokens_PS, mask_PS = (jnp.pad(each[:, cut:], ((0, 0), (padding, 0))) for each in (x.tokens_PS, x.mask_PS))
        return Prompts(tokens_PS, mask_PS, x.answer)

    return jax.tree.map(resize, tree, is_leaf=lambda x: isinstance(x, Prompts))


def resize_batch(batch: Batch, width: int) -> Batch:
    """`with_prompt_width` of a batch on devices, maybe of several processes; where it has that width, nothing is done."""
    if batch.rollout.prompts.tokens_PS.shape[1] == width:
        return batch
    prompts = resize_on_device(batch.rollout.prompts, width)
    return dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, prompts=prompts))


resize_on_device = jax.jit(with_prompt_width, static_argnums=1)
