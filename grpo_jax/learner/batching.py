"""Batches as the update reads them: in microbatches, and at the length that their completions really have."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Int, Shaped

from grpo_jax.parallel import context
from grpo_jax.parallel.sharding import ROW_AXES, largest_in_step
from grpo_jax.rollout.prompt_parts import PromptParts, parts_of, without_long_rows
from grpo_jax.types import Prompts, Rollout

Tree = TypeVar("Tree")
Result = TypeVar("Result")


def split_microbatches(tree: Tree, rollout: Rollout, num_microbatches: int) -> Tree:
    """Split [P, G, ...] leaves into microbatches: by groups, and within groups once P is used up.

    Args:
      tree: leaves [P, G, ...], but [P, ...] inside of `Prompts`. A group that is split has its prompt in each of its pieces.
      rollout: gives P and G.
      num_microbatches: a divisor of P, or P times a divisor of G.
    Returns: the tree, its leaves [num_microbatches, prompts, completions of each, ...].
    """
    P, G = rollout.tokens_PGT.shape[:2]
    # Whole groups come first, for each piece of a group runs its prompt through the layers once more. Advantages are computed
    # before: no group statistic is taken of a piece.
    pieces = max(1, num_microbatches // P)  # of each group

    def split_prompts(x: jax.Array) -> jax.Array:
        return jnp.repeat(x, pieces, axis=0).reshape(num_microbatches, P * pieces // num_microbatches, *x.shape[1:])

    def split(x: jax.Array | Prompts) -> jax.Array | Prompts:
        if isinstance(x, Prompts):
            return jax.tree.map(split_prompts, x)
        return x.reshape(num_microbatches, P * pieces // num_microbatches, G // pieces, *x.shape[2:])

    return jax.tree.map(split, tree, is_leaf=_is_prompts)


def split_by_prompts(
    tree: Tree, rollout: Rollout, num_microbatches: int
) -> tuple[PromptParts | None, tuple[tuple[Tree, int], ...]]:
    """Split leaves [P, ...] into groups with short and with long prompts, where `Prompts.long_rows` says that few are long.

    Args:
      tree: leaves [P, ...]. rollout: its prompts, as they are in the tree. num_microbatches: of all groups.
    Returns: (the parts, None if there is one only; of each its tree and its number of microbatches).
    """
    P = len(rollout.tokens_PGT)
    parts = parts_of(rollout.prompts)
    if parts is None:
        return None, ((without_long_rows(tree), num_microbatches),)

    def num_of(num_groups: int) -> int:
        """Return how many microbatches of equal size take so many groups, none larger than it was."""
        if num_microbatches > P:
            return num_groups * num_microbatches // P
        most = P // num_microbatches
        return next(num for num in range(1, num_groups + 1) if num_groups % num == 0 and num_groups // num <= most)

    nums = num_of(parts.num_short), num_of(P - parts.num_short)
    return parts, tuple(zip(parts.split(tree), nums, strict=True))


def length_order(mask_PGT: Shaped[jax.Array, "P G T"]) -> Int[jax.Array, " P"]:
    """Sort groups by their longest completion: neighbours need about the same width."""
    return jnp.argsort(completion_lengths(mask_PGT).max(-1))


def length_buckets(max_tokens: int, bucket_tokens: int) -> tuple[int, ...]:
    """List the completion widths that the update is compiled for: bucket_tokens doubled until max_tokens (0: only the last).

    >>> length_buckets(300, 64), length_buckets(6, 64), length_buckets(300, 0)
    ((64, 128, 256, 300), (6,), (300,))
    """
    # Each width is a program to compile, so there should be few; doubled ones, beyond the first, are more than half full.
    shorter = []
    while 0 < bucket_tokens < max_tokens:
        shorter.append(bucket_tokens)
        bucket_tokens *= 2
    return (*shorter, max_tokens)


def run_at_bucket(
    function: Callable[[Tree], Result], tree: Tree, mask_PGT: Shaped[jax.Array, "P G T"], choices: tuple[int, ...]
) -> Result:
    """Call a function on a tree that is truncated to the least width that holds every real token.

    What is left out is padding in every row, so the result is the same but for the order of sums.

    Args:
      function: compiled once for each choice; the shapes of its result must not depend on the width.
      tree: as `truncate_length` takes it. mask_PGT: > 0 on real tokens.
      choices: widths in tokens, rising; the last is T.
    Returns: function(truncated tree).
    """
    if len(choices) == 1:
        return function(tree)
    # Lengths are data of a compiled program, so a switch on the device chooses; the update never waits for the host. Devices
    # that exchange weights or tokens in each layer take one width: they wait for each other anyway.
    # Keys that go round the devices of `context` travel in one step of all devices, whatever their other axes.
    axes = ("fsdp", "expert") if context.num_devices_here() == 1 else ROW_AXES
    longest = largest_in_step(completion_lengths(mask_PGT).max(), axes)
    place = (jnp.asarray(choices) < longest).sum()
    return jax.lax.switch(place, [lambda tree, width=width: function(truncate_length(tree, width)) for width in choices], tree)


def truncate_length(tree: Tree, width: int) -> Tree:
    """Keep the first `width` completion slots of [P, G, T] leaves; others and prompts stay."""

    def truncate(x: jax.Array | Prompts) -> jax.Array | Prompts:
        if isinstance(x, Prompts) or x.ndim < 3:
            return x
        return x[:, :, :width]

    return jax.tree.map(truncate, tree, is_leaf=_is_prompts)


def completion_lengths(mask_PGT: Shaped[jax.Array, "P G T"]) -> Int[jax.Array, "P G"]:
    """Count the slots up to the last real token."""
    return ((mask_PGT > 0) * (jnp.arange(mask_PGT.shape[-1]) + 1)[None, None]).max(-1)


def _is_prompts(x: object) -> bool:
    """Stop at `Prompts`: their leaves have no axis G, and S is not T."""
    return isinstance(x, Prompts)
