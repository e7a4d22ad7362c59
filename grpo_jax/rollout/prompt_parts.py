"""A few long prompts among short ones: the rows in two parts, each as wide as its own prompts.

Padded to one width, one prompt of 512 tokens makes 31 others of 64 eight times as long, in the rollout and in the update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Int

from grpo_jax.types import Prompts

Tree = TypeVar("Tree")


class PromptParts(NamedTuple):
    """The rows of prompts, the short ones first.

    order_P: int32, a row's place before. num_short: rows of the first part. short_tokens: its width.
    """

    order_P: Int[jax.Array, " P"]
    num_short: int
    short_tokens: int

    def split(self, tree: Tree) -> tuple[Tree, Tree]:
        """Split leaves [P, ...] into those of short and of long rows; each `Prompts` in the tree gets its part's width."""
        ordered: Any = jax.tree.map(lambda x: x[self.order_P], without_long_rows(tree))

        def cut(x: Any) -> Any:
            if not isinstance(x, Prompts):
                return x
            tokens_PS, mask_PS = (each[:, -self.short_tokens :] for each in (x.tokens_PS, x.mask_PS))
            return dataclasses.replace(x, tokens_PS=tokens_PS, mask_PS=mask_PS)

        short = jax.tree.map(lambda x: x[: self.num_short], ordered)
        short = jax.tree.map(cut, short, is_leaf=lambda x: isinstance(x, Prompts))
        return short, jax.tree.map(lambda x: x[self.num_short :], ordered)

    def put_back(self, tree: Tree) -> Tree:
        """Return leaves [P, ...], short rows before long ones, in the rows' own order."""
        place_P = jnp.argsort(self.order_P)
        return jax.tree.map(lambda x: x[place_P], tree)

    def join(self, parts: Sequence[Tree]) -> Tree:
        """Return leaves [P, ...] in the rows' own order; the inverse of `split` but for widths."""
        return self.put_back(jax.tree.map(lambda *x: jnp.concatenate(x), *parts))


def parts_of(prompts: Prompts) -> PromptParts | None:
    """Return the two parts of prompts that `long_rows` speaks of.

    Args:
      prompts: of one device, or of any part of its rows: the promise holds there as well.
    Returns: None where there is no promise, or where it leaves no short rows.
    """
    if prompts.long_rows is None:
        return None
    P, S = prompts.tokens_PS.shape
    num_long, short_tokens = prompts.long_rows
    num_short = P - num_long
    if not 0 < num_short < P or short_tokens >= S:
        return None
    first_P = jnp.argmax(prompts.mask_PS, -1)  # the slot of a row's first token: short rows have a late one
    return PromptParts(jnp.argsort(-first_P), num_short, short_tokens)


def without_long_rows(tree: Tree) -> Tree:
    """Drop the promise from each `Prompts` in a tree: of rows that go elsewhere it may not hold."""

    def drop(x: Any) -> Any:
        if not isinstance(x, Prompts):
            return x
        return dataclasses.replace(x, long_rows=None)

    return jax.tree.map(drop, tree, is_leaf=lambda x: isinstance(x, Prompts))
