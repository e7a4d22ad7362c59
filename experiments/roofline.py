"""What the machine can do at most, measured, and what the work needs at least, counted."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.models.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates: of a large square matrix product, and of reading memory in a matrix-vector product."""

    flops_per_s: float
    bytes_per_s: float


def measure_ceilings(dtype: Any) -> Ceilings:
    """The best of several calls of each, on one device."""
    is_cpu = jax.default_backend() == "cpu"
    n = 2048 if is_cpu else 8192
    square = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    matmul = jax.jit(lambda a: a @ a)
    rows = (1 << 28) // n // square.dtype.itemsize if is_cpu else (1 << 32) // n // square.dtype.itemsize
    tall = jnp.ones((rows, n), dtype)
    matvec = jax.jit(lambda a, x: a @ x)
    return Ceilings(2.0 * n**3 / best_secs(matmul, square), tall.nbytes / best_secs(matvec, tall, tall[0]))


def best_secs(call: Any, *args: Any, repeats: int = 6) -> float:
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


def forward_flops(arch: Architecture, P: int, G: int, S: int, T: int) -> float:
    """One pass over P prompts of S tokens and P * G completions of T tokens that attend to them; the head on completions only.

    Causal attention counts half a square.
    """
    tokens = P * S + P * G * T
    pairs = P * S * S / 2 + P * G * T * (S + T / 2)
    attention = 4 * arch.num_layers * arch.num_heads * arch.head_dim * pairs
    return 2 * layer_weights(arch) * tokens + attention + 2 * arch.vocab_size * arch.dim * P * G * T


def rollout_flops(arch: Architecture, P: int, G: int, S: int, T: int) -> float:
    """Decoding does the same products as one forward pass, token by token."""
    return forward_flops(arch, P, G, S, T)


def update_flops(arch: Architecture, P: int, G: int, S: int, T: int, *, has_reference: bool) -> float:
    """Forward and backward (twice the forward), and the reference's forward pass."""
    return (3 + has_reference) * forward_flops(arch, P, G, S, T)


def decode_bytes(arch: Architecture, P: int, G: int, S: int, T: int, itemsize: int) -> float:
    """What T - 1 decode steps have to read: all weights and the head, each prompt's cache once, the completions' own caches."""
    weights = layer_weights(arch) + arch.vocab_size * arch.dim
    cached = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * (P * S + P * G * T / 2)
    return (T - 1) * (weights + cached) * itemsize
