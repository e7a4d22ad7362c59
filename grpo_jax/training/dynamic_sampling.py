"""DAPO's dynamic sampling with static shapes: a buffer that rounds of groups are poured into and full batches taken from.

Groups found beyond the batch wait in the buffer for the next step; their `sampler_logp` keeps the ratio honest.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from grpo_jax.types import Arrays, Batch, GroupBuffer


def empty_buffer(example: Batch) -> GroupBuffer:
    """Make an empty buffer for batches shaped like `example` (arrays or ShapeDtypeStructs): it has room for two of them."""
    # Rounds are added while fewer than P groups wait, and each adds P at most: 2P slots never overflow.
    slots = jax.tree.map(lambda x: jnp.zeros((2 * x.shape[0], *x.shape[1:]), x.dtype), example)
    return GroupBuffer(slots, jnp.int32(0))


def push(buffer: GroupBuffer, batch: Batch, keep_P: Bool[Arrays, " P"]) -> GroupBuffer:
    """Append the groups marked in keep_P, in order. The caller never pushes into a buffer that holds P or more.

    Args:
      buffer: of 2P slots. batch: P groups. keep_P: True for groups to append.
    Returns: the buffer with them.
    """
    # How many are kept is data, so the batch cannot be shortened to them: every group is given a slot to be written to, and
    # those that are not kept a slot behind the end, where a write is dropped.
    capacity = 2 * len(keep_P)
    slot_P = jnp.where(keep_P, buffer.count + jnp.cumsum(keep_P) - 1, capacity)
    slots = jax.tree.map(lambda old, new: old.at[slot_P].set(new, mode="drop"), buffer.batch, batch)
    return GroupBuffer(slots, buffer.count + keep_P.sum(dtype=jnp.int32))


def pop(buffer: GroupBuffer, num_groups: int) -> tuple[Batch, GroupBuffer]:
    """Take the first `num_groups`. Slots that were never filled come out fully masked: they train nothing."""
    batch = jax.tree.map(lambda x: x[:num_groups], buffer.batch)
    is_real_P = jnp.arange(num_groups) < buffer.count
    rollout = batch.rollout
    rollout = dataclasses.replace(rollout, mask_PGT=rollout.mask_PGT * is_real_P[:, None, None])
    # Rolled and not shifted: what comes round is behind `count`, where slots are undefined anyway.
    rest = jax.tree.map(lambda x: jnp.roll(x, -num_groups, axis=0), buffer.batch)
    return dataclasses.replace(batch, rollout=rollout), GroupBuffer(rest, jnp.maximum(buffer.count - num_groups, 0))
