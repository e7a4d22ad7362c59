"""Prompts as arrays, and which of them come next: the same for all tasks that keep theirs in a table."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.rng import key_for
from grpo_jax.types import Arrays


def pad_left(
    ids: Sequence[Sequence[int] | Int[np.ndarray, " L"]], width: int, pad_id: int
) -> tuple[Int[np.ndarray, "P S"], Bool[np.ndarray, "P S"]]:
    """Pad rows of tokens on the left, so that all end in the same slot.

    Args:
      ids: rows, none of them empty. width: S, at least the longest row's length. pad_id: token of the padding.
    Returns: (tokens int32, True where there is a token).
    """
    tokens_PS = np.full((len(ids), width), pad_id, np.int32)
    mask_PS = np.zeros(tokens_PS.shape, bool)
    for place, row in enumerate(ids):
        tokens_PS[place, -len(row) :] = row
        mask_PS[place, -len(row) :] = True
    return tokens_PS, mask_PS


def draw_rows(
    seed: int | Int[Arrays, ""], position: int | Int[Arrays, ""], num: int, first: int, end: int
) -> Int[jax.Array, " P"]:
    """Draw rows number position .. of the endless order, each uniformly from first .. end - 1.

    Args:
      seed: of the order, may be traced. position: int32, of the first one. num: P. first, end: the rows to draw from.
    """
    # One key for each number, not one for the batch: neither the batch size nor resuming changes row number i.
    keys = jax.vmap(lambda i: key_for(seed, "prompts", i))(position + jnp.arange(num))
    return jax.vmap(lambda key: jax.random.randint(key, (), first, end))(keys)
