"""Search for NaN and infinity in trees of arrays, on the devices that hold them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.parallel import hosts


def find_not_finite(tree: Any) -> list[tuple[tuple[Any, ...], int]]:
    """List the arrays that hold NaN or infinity: the path of each, and the first place on its first axis (0 for a scalar).

    One compiled call reads every number once; all processes must come to it.
    """
    leaves = [(path, x) for path, x in jax.tree_util.tree_leaves_with_path(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    are_finite = hosts.gather_to_host(_finite_along_first_axis([x for _, x in leaves]))
    return [(path, int(np.argmin(flags))) for (path, _), flags in zip(leaves, are_finite, strict=True) if not np.all(flags)]


@jax.jit
def _finite_along_first_axis(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(x).all(tuple(range(1, x.ndim))) for x in arrays]
