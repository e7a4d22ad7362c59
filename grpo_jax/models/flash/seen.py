"""The keys that a query sees, block by block: for the kernels that are written here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from grpo_jax.parallel.hardware import target_platform

LOG2E = math.log2(math.e)  # the hardware computes powers of two
MASK_VALUE = -1e30  # as in `attention`


@dataclasses.dataclass(frozen=True)
class Part:
    """Keys of one kind, the prompt's or a row's own: which of them a query sees.

    Query t stands at slot `offset` + t and sees key u of `num` if begin <= u <= its own slot, within the window.
    """

    num: int
    offset: int
    window: int | None

    def keys_seen(self, start: Any, queries: int, keys: int, begin: Any) -> tuple[Any, Any]:
        """Return (first, end) of the blocks of `keys` keys that a block of queries, from `start` on, sees."""
        first, last = begin, jnp.minimum(self.offset + start + queries, self.num) - 1
        if self.window is not None:
            first = jnp.maximum(first, self.offset + start - self.window + 1)
        return div(first, keys), (div(last, keys) + 1) * (first <= last).astype(jnp.int32)

    def keys_seen_by_all(self, start: Any, queries: int, keys: int, begin: Any) -> tuple[Any, Any]:
        """Return (first, end) of the blocks of which every key is seen by every query; end may be below first."""
        first, end = begin, jnp.minimum(self.offset + start + 1, self.num)
        if self.window is not None:
            first = jnp.maximum(first, self.offset + start + queries - self.window)
        return div(first + keys - 1, keys), div(end, keys)

    def queries_seeing(self, start: Any, queries: int, keys: int, begin: Any, num_queries: int) -> tuple[Any, Any]:
        """Return (first, end) of the blocks of queries that see a block of keys, from `start` on."""
        first, end = jnp.maximum(start - self.offset, 0), num_queries
        if self.window is not None:
            last_key = jnp.minimum(start + keys, self.num) - 1
            end = jnp.clip(last_key + self.window - self.offset, 0, num_queries)
        # None of a block that is all padding. By a product: Triton's lowering takes no literal in the `where` of a scalar.
        end = end * ((start + keys > begin) & (start < self.num)).astype(jnp.int32)
        return div(first, queries), div(end + queries - 1, queries)

    def sees(self, query: Any, key: Any, begin: Any) -> Any:
        """Return which keys which queries see; both are places in their arrays, of shapes that broadcast."""
        distance = self.offset + query - key
        seen = (distance >= 0) & (key >= begin) & (key < self.num)
        if self.window is not None:
            seen &= distance < self.window
        return seen


def div(x: Any, size: Any) -> Any:
    """Return x // size of numbers that are not negative, size a scalar."""
    # Not `//`, which looks at signs: of jax 0.10 Triton's lowering has no sign of integers.
    return jax.lax.div(*_like_first(x, size))


def rem(x: Any, size: Any) -> Any:
    """Return x % size, as `div`."""
    return jax.lax.rem(*_like_first(x, size))


def _like_first(x: Any, size: Any) -> tuple[Array, Array]:
    x = jnp.asarray(x, jnp.int32)
    return x, jnp.broadcast_to(jnp.asarray(size, jnp.int32), x.shape)


def cap_scores(score: Any, cap: float | None) -> tuple[Any, Any]:
    """Return (scores in units of log 2, the factor of their gradient) of products of queries and keys."""
    if cap is None:
        return score * LOG2E, None
    tanh = jnp.tanh(score / cap)
    return tanh * (cap * LOG2E), 1.0 - tanh * tanh


def dot(x: Any, y: Any, contract: tuple[int, int]) -> Any:
    """Return the float32 product of two matrices of a kernel over these axes of them."""
    # Of float32 all digits, as elsewhere; a GPU would take 10 bits of them. In three passes of its matrix units (21 bits):
    # by plain arithmetic a kernel takes minutes to compile.
    precision: Any = None
    if x.dtype == jnp.float32:
        on_gpu = target_platform() == "gpu"
        precision = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3 if on_gpu else jax.lax.Precision.HIGHEST
    dims = ((contract[:1], contract[1:]), ((), ()))
    return jax.lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)
