"""Work on rows in tiles of one size, so that a row's numbers do not depend on how many rows there are.

A product of 8 rows rounds otherwise than one of 8,000, and a fused loop otherwise than its parts. Sampler and learner have
different numbers of rows; cut into equal tiles, both run the same operations on the same shapes, and agree bit for bit (He
and Thinking Machines Lab 2025, "Defeating nondeterminism in LLM inference").
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree

from grpo_jax.parallel.hardware import Hardware

SCOPE = "exact_tile"  # of its operations' names in a compiled program (experiments/studies/exact/hlo.py)
Rows = PyTree[Float[jax.Array, "M ..."]]


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of what is computed at a time: rows of a product, a row's queries, and the keys that they see."""

    rows: int
    queries: int
    keys: int

    def round_keys(self, num: int) -> int:
        """Return a number of keys rounded up to whole blocks."""
        return -(-num // self.keys) * self.keys


# Rows: on a CPU as few as a product is quick at, since a decoding step pads its own to a tile; on accelerators as many as a
# weight must serve for its reading not to take longer than its products (v5e: 240). Queries: decoding pads its one to them.
CPU = Tiles(rows=32, queries=8, keys=32)
ACCELERATOR = Tiles(rows=256, queries=8, keys=128)


def tiles_of(hardware: Hardware | None) -> Tiles:
    """Return the sizes for accelerators, or for CPUs where there are none."""
    if hardware is None:
        return CPU
    return ACCELERATOR


def in_tiles(function: Callable[[Any, Any], Any], size: int, weights: Any, rows: Rows) -> Rows:
    """Run function(weights, rows) on tiles of rows, one after the other.

    The gradient is that of the function on all rows at once, computed again from what went in: rounding of gradients may differ
    with the number of rows, values do not.

    Args:
      function: works on each row by itself, on any number of them; results have the rows as their first axis.
      size: rows of a tile. weights: a tree of floats. rows: a tree of floats, each [M, ...].
    Returns: what the function does of all rows.
    """
    return _in_tiles(function, size, weights, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _in_tiles(function, size, weights, rows):
    num = len(jax.tree.leaves(rows)[0])

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, ((0, -num % size),) + ((0, 0),) * (x.ndim - 1))
        return padded.reshape(-1, size, *x.shape[1:])

    def tile(rows):
        # Nothing outside may be fused with what is inside, even where the loop has one turn and is none any more.
        rows = jax.lax.optimization_barrier(rows)
        with jax.named_scope(SCOPE):
            return jax.lax.optimization_barrier(function(weights, rows))

    done = jax.lax.map(tile, jax.tree.map(split, rows))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num], done)


def _forward(function, size, weights, rows):
    return _in_tiles(function, size, weights, rows), (weights, rows)


def _backward(function, size, given, cotangents):
    del size
    return jax.vjp(function, *given)[1](cotangents)


_in_tiles.defvjp(_forward, _backward)
