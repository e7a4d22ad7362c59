"""How a batch is cut for the update: into microbatches, and to the length that their completions really have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.types import Prompts, Rollout


def split_microbatches(tree: Any, rollout: Rollout, num_microbatches: int) -> Any:
    """Cut [P, G, ...] leaves into [num_microbatches, p, g, ...]: by groups, and within groups once P is used up.

    A group's prompt is then repeated for each part of it. Leaves of `Prompts` are [P, ...] without G.
    """
    P, G = rollout.tokens_PGT.shape[:2]
    parts = max(1, num_microbatches // P)  # of each group

    def cut_prompts(x):
        return jnp.repeat(x, parts, axis=0).reshape(num_microbatches, P * parts // num_microbatches, *x.shape[1:])

    def cut(x):
        if isinstance(x, Prompts):
            return jax.tree.map(cut_prompts, x)
        return x.reshape(num_microbatches, P * parts // num_microbatches, G // parts, *x.shape[2:])

    return jax.tree.map(cut, tree, is_leaf=lambda x: isinstance(x, Prompts))


def length_order(mask_PGT):
    """Groups by their longest completion, int[P]: neighbours need about the same width."""
    return jnp.argsort(completion_lengths(mask_PGT).max(-1))


def length_buckets(max_tokens: int, bucket_tokens: int) -> tuple[int, ...]:
    """The completion widths that the update is compiled for: bucket_tokens doubled until max_tokens (0: only the last).

    >>> length_buckets(300, 64), length_buckets(6, 64), length_buckets(300, 0)
    ((64, 128, 256, 300), (6,), (300,))
    """
    shorter = []
    while 0 < bucket_tokens < max_tokens:
        shorter.append(bucket_tokens)
        bucket_tokens *= 2
    return (*shorter, max_tokens)


def run_at_bucket(function: Callable[[Any], Any], tree: Any, mask_PGT, choices: tuple[int, ...]) -> Any:
    """function(tree cut to the least of `choices` that holds every real token). Compiled once for each choice.

    What is cut off is padding in every row, so the result is the same but for the order of sums; its shapes must not
    depend on the width.
    """
    if len(choices) == 1:
        return function(tree)
    place = (jnp.asarray(choices) < completion_lengths(mask_PGT).max()).sum()
    return jax.lax.switch(place, [lambda tree, width=width: function(truncate_length(tree, width)) for width in choices], tree)


def truncate_length(tree: Any, width: int) -> Any:
    """The first `width` completion slots of [P, G, T] leaves; others and prompts stay."""

    def cut(x):
        return x if isinstance(x, Prompts) or x.ndim < 3 else x[:, :, :width]

    return jax.tree.map(cut, tree, is_leaf=lambda x: isinstance(x, Prompts))


def completion_lengths(mask_PGT):
    """Slots up to the last real token, int[P, G]."""
    return ((mask_PGT > 0) * (jnp.arange(mask_PGT.shape[-1]) + 1)[None, None]).max(-1)
