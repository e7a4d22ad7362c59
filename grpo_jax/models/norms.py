"""Root-mean-square norms (Zhang and Sennrich, arXiv 1910.07467), as the families round them, and what scales the stream."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.linear import like


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, the statistics in float32."""

    def __init__(self, dim: int, arch: Architecture):
        fill = jnp.zeros if arch.norm_plus_one else jnp.ones  # a fresh norm multiplies by 1
        self.weight = nnx.Param(fill(dim))
        self.eps, self.plus_one, self.rounds_last = arch.norm_eps, arch.norm_plus_one, arch.norm_rounds_last

    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        # The families differ in where they round: Gemma multiplies by 1 + weight in float32, as bfloat16 has no 1.001; Llama
        # rounds first. Loaded weights give the same logits only if it is done their way.
        if self.plus_one:
            return (normed * like(1 + self.weight[...].astype(jnp.float32), x)).astype(x.dtype)
        if self.rounds_last:
            return (normed * like(self.weight[...].astype(jnp.float32), x)).astype(x.dtype)
        return normed.astype(x.dtype) * like(self.weight[...].astype(x.dtype), x)


def norm_if(is_present: bool, dim: int, arch: Architecture) -> Callable[[Array], Array]:
    """Return a norm, or the identity for a family that has none there: it has no parameters and is no branch."""
    if is_present:
        return RMSNorm(dim, arch)
    return _identity


def _identity(x: Array) -> Array:
    return x


def scaled(x: Array, factor: float) -> Array:
    """Return x times a number, rounded once: the number itself would be rounded to the compute dtype."""
    if factor == 1:
        return x
    return (x.astype(jnp.float32) * factor).astype(x.dtype)
