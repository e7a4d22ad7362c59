"""Inside `shard_map`: which values differ from device to device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

AxisName = str | tuple[str, ...]  # one or several axes of a mesh


def vary_like(tree: Any, reference_ints: jax.Array) -> Any:
    """Mark every leaf as varying over the mesh axes that `reference_ints` (an integer array) varies over.

    Constants that enter a loop beside per-device data need it: a loop's carry must keep its type. Adding an integer zero
    made from the reference does this in every JAX version, and compiles to nothing.
    """
    zero = reference_ints.ravel()[0] * 0
    return jax.tree.map(lambda x: x | (zero != 0) if x.dtype == bool else x + zero.astype(jnp.asarray(x).dtype), tree)
