"""What the machine can do at most, measured, and what the work needs at least, counted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device: of square matrix products, and of reading memory."""

    flops_per_s: float
    bytes_per_s: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """P prompts of S tokens, P * G completions of T tokens; means where they are ragged."""

    P: float
    G: int
    S: float
    T: float


def measure_ceilings(dtype: Any, bytes_read: float) -> Ceilings:
    """The best of several sizes, kinds and calls.

    dtype: of the matrix products. bytes_read: what is read over and over, for a small model's weights stay in the cache.
    """
    is_cpu = jax.default_backend() == "cpu"
    products = [product_rate(n, dtype) for n in ((1024, 2048) if is_cpu else (4096, 8192))]
    return Ceilings(max(products), max(read_rate(probe, bytes_read) for probe in PROBES))


def product_rate(n: int, dtype: Any) -> float:
    """FLOP/s of an [n, n] product."""
    square = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    return 2.0 * n**3 / best_secs(jax.jit(lambda a: a @ a), square)


def _as_head(matrix_VD, x_D):
    """Logits of one row, as decoding computes them."""
    return jnp.einsum("bd,vd->bv", x_D[None], matrix_VD)[0]


def _as_product(matrix_VD, x_D):
    return matrix_VD @ x_D


def _as_reduction(matrix_VD, x_D):
    return jnp.maximum(matrix_VD, x_D[None]).max(1)


PROBES = (_as_head, _as_product, _as_reduction)


def read_rate(probe: Callable[[Any, Any], Any], bytes_read: float) -> float:
    """bytes/s of reading a float32 matrix of about so many bytes again and again, each pass on the last one's result."""
    D = 512
    V = max(D, int(bytes_read) // (4 * D))
    matrix_VD = jax.random.normal(jax.random.key(0), (V, D))
    num_passes = max(4, (1 << 28) // matrix_VD.nbytes)

    @jax.jit
    def passes(matrix_VD, x_D):
        return jax.lax.fori_loop(0, num_passes, lambda _, x_D: probe(matrix_VD, x_D)[:D] * 1e-2, x_D)

    return num_passes * matrix_VD.nbytes / best_secs(passes, matrix_VD, jnp.ones(D))


def best_secs(call: Any, *args: Any, repeats: int = 8) -> float:
    """The quickest of several calls, after one that compiles. Seconds."""
    jax.block_until_ready(call(*args))
    secs = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call(*args))
        secs.append(time.perf_counter() - began)
    return min(secs)


def layer_weights(arch: Architecture) -> int:
    """Numbers in the matrices of all layers."""
    attention = arch.dim * arch.head_dim * (2 * arch.num_heads + 2 * arch.num_kv_heads)
    return arch.num_layers * (attention + 3 * arch.dim * arch.ffn_dim)


def forward_flops(arch: Architecture, sizes: Sizes) -> float:
    """One pass over prompts and the completions that attend to them: every matrix product, and causal attention's lower half.

    A rollout's decode steps do the same products one by one. The last token of a completion is predicted, never read; the
    head is applied to completions only. Sliding windows, norms and softmax are left out.
    """
    P, rows, S, T = sizes.P, sizes.P * sizes.G, sizes.S, sizes.T
    tokens = P * S + rows * (T - 1)
    pairs = P * S * (S + 1) / 2 + rows * (T - 1) * (S + T / 2)
    attention = 4 * arch.num_layers * arch.num_heads * arch.head_dim * pairs
    return 2 * layer_weights(arch) * tokens + attention + 2 * arch.vocab_size * arch.dim * rows * T


def step_bytes(arch: Architecture, sizes: Sizes, itemsize: int) -> float:
    """What a decode step has to read: all weights and the head, each prompt's cache once, the rows' own caches (half full)."""
    weights = layer_weights(arch) + arch.vocab_size * arch.dim
    cached = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * (sizes.P * sizes.S + sizes.P * sizes.G * sizes.T / 2)
    return (weights + cached) * itemsize


def decode_bytes(arch: Architecture, sizes: Sizes, itemsize: int) -> float:
    """What the T - 1 decode steps of a rollout have to read."""
    return (sizes.T - 1) * step_bytes(arch, sizes, itemsize)
