"""The widths that batches of prompts are padded to: a few buckets, so that one long prompt widens its own batch only.

And of that batch its own part only: where few prompts are long, the batch says so (`Prompts.long_rows`), and programs compute
the others at a width of their own.

A batch on its way has the width of its bucket; where shapes are fixed for a whole run, in dynamic sampling's buffer and in the
state's next batch, it has the task's width. Prompts are left-padded, so it is their beginning that is cut or filled up.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.config import Config
from grpo_jax.learner.batching import length_buckets
from grpo_jax.rollout.prompt_parts import without_long_rows
from grpo_jax.types import Arrays, Batch, LongRows, Prompts

Tree = TypeVar("Tree")


def prompt_buckets(config: Config, prompt_tokens: int) -> tuple[int, ...]:
    """List the widths of prompts that programs are compiled for; the last is the task's."""
    return length_buckets(prompt_tokens, config.rollout.prompt_bucket_tokens)


LONG_SHARE = 8  # 1 in 8 of a device's rows may be long; for each pair of widths programs are compiled
MAX_SLOTS_LEFT = 0.6  # of the slots at one width, if two parts are to be worth a second one


def long_rows_of(lengths_P: Int[np.ndarray, " P"], num_shards: int, buckets: tuple[int, ...]) -> LongRows | None:
    """Return what can be promised of prompts, where two widths are worth it.

    Args:
      lengths_P: slots from a prompt's first token on. num_shards: devices that the rows are spread over.
      buckets: from `prompt_buckets`.
    """
    lengths = np.sort(lengths_P.reshape(num_shards, -1), -1)
    num_rows = lengths.shape[1]
    num_long = -(-num_rows // LONG_SHARE)
    if num_long == num_rows:
        return None
    short, width = (bucket_of(int(longest), buckets) for longest in (lengths[:, -num_long - 1].max(), lengths.max()))
    slots = (num_rows - num_long) * short + num_long * width
    return LongRows(num_long, short) if slots <= MAX_SLOTS_LEFT * num_rows * width else None


def fit_prompts(prompts: Prompts, lengths_P: Int[np.ndarray, " P"], num_shards: int, buckets: tuple[int, ...]) -> Prompts:
    """Return prompts on devices at the width of their bucket, with what can be promised of long rows.

    Args: as `long_rows_of` has them, of these prompts.
    """
    width = bucket_of(int(lengths_P.max()), buckets)
    if width != prompts.tokens_PS.shape[1]:
        prompts = resize_on_device(prompts, width)
    return dataclasses.replace(prompts, long_rows=long_rows_of(lengths_P, num_shards, buckets))


def prompt_lengths(mask_PS: Bool[Arrays, "P S"]) -> Int[Arrays, " P"]:
    """Count each prompt's slots from its first token on."""
    return mask_PS.shape[1] - mask_PS.argmax(-1)


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
    """`with_prompt_width` of a batch on devices, maybe of several processes."""
    prompts = without_long_rows(batch.rollout.prompts)
    if prompts.tokens_PS.shape[1] != width:
        prompts = resize_on_device(prompts, width)
    return dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, prompts=prompts))


resize_on_device = jax.jit(with_prompt_width, static_argnums=1)
