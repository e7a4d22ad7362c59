"""Weights in int8, as a rollout may read them at every token: half the memory traffic of bfloat16.

Each row of a matrix (an output) has a scale, its largest absolute weight over 127, and a weight is a whole multiple of it: off
by at most half a scale (Dettmers et al., arXiv 2208.07339, without its outliers). The sampler is then another policy than the
learner's; what it records is its own.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.parallel.sharding import path_names

LARGEST = 127  # of an int8, on both sides: -128 would have no partner
EXPERTS = ("expert_gate", "expert_up", "expert_down")  # their products take whole stacks, and stay as they are


@flax.struct.dataclass
class Int8Matrix:
    """A matrix q * scale, of one layer or stacked. q: int8 [..., O, I]. scale: float32 [..., O, 1]."""

    q: Any
    scale: Any


def quantize(matrix: Float[Array, "*L O I"]) -> Int8Matrix:
    """Round a matrix to int8, row by row."""
    largest = jnp.abs(matrix.astype(jnp.float32)).max(-1, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1.0) / LARGEST
    return Int8Matrix(jnp.round(matrix.astype(jnp.float32) / scale).astype(jnp.int8), scale)


def dequantize(matrix: Int8Matrix, dtype: Any) -> Float[Array, "*L O I"]:
    """Return the matrix in a compute dtype."""
    return (matrix.q.astype(jnp.float32) * matrix.scale).astype(dtype)


def quantize_layers(tree: Any) -> Any:
    """Quantize the matrices of products in a tree of layers' weights; biases, norms, adapters, routers and experts stay."""

    def of_leaf(path: Any, x: Any) -> Any:
        names = [name for name in path_names(path) if name != "value"]
        module, name = names[-2:] if len(names) > 1 else ("", *names)
        if name != "weight" or x.ndim < 2 or module in EXPERTS or module.endswith("norm"):
            return x
        return quantize(x)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def dequantize_layers(tree: Any, dtype: Any) -> Any:
    """Return a tree of layers' weights with all that was quantized in a compute dtype; other leaves as they are."""
    return jax.tree.map(
        lambda x: dequantize(x, dtype) if isinstance(x, Int8Matrix) else x, tree, is_leaf=lambda x: isinstance(x, Int8Matrix)
    )
