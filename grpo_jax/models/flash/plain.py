"""Attention in plain operations that gives its log-sum-exp and takes one back, as the kernels of `tpu` and `gpu` do.

For rows whose tokens are spread over devices (`models.ring`), where no kernel suits. Any other attention without a kernel is
`attention.attend`'s, which XLA differentiates.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from grpo_jax.models.flash.call import KeysAndValues
from grpo_jax.models.linear import soft_cap
from grpo_jax.parallel.sharding import vary_like

MASK_VALUE = -1e30  # as in `attention`
BLOCK_QUERIES = 128  # whose scores exist at a time

# Which keys a query sees: own [X, U], the prompts' [P, X, S] or None.
Seen = tuple[Bool[Array, "X U"], Any]
# Keys are [P, K, G, U, H] of rows and [P, K, S, H] of prompts, queries [P, K, G, R, X, H]: a part's axes as einsum names them.
OWN, PROMPT = "pkg", "pk"
F32 = {"preferred_element_type": jnp.float32}


def forward(cap: float | None, arrays: Any, seen: Seen) -> tuple[Float[Array, "P M X H"], Float[Array, "P M X"]]:
    """Attend -> (outputs, log-sum-exp), float32. arrays: queries, own keys and values, the prompts' or None."""
    q, parts = _given(arrays)

    def block(of_block: Any) -> tuple[Array, Array]:
        q, *seen_by_part = of_block
        scores = [_scores(cap, q, rows, k, seen) for (rows, k, _), seen in zip(parts, seen_by_part, strict=True)]
        lse = jax.nn.logsumexp(jnp.stack([jax.nn.logsumexp(each, axis=-1) for each in scores]), axis=0)
        outs = []
        for (rows, _, v), each in zip(parts, scores, strict=True):
            p = jnp.exp(each - lse[..., None]).astype(v.dtype)
            outs.append(jnp.einsum(f"pkgrxu,{rows}uh->pkgrxh", p, v, **F32))
        return functools.reduce(jnp.add, outs), lse

    out, lse = jax.lax.map(block, _blocks(q, seen))
    return _join(out, -2).reshape(arrays[0].shape), _join(lse, -1).reshape(arrays[0].shape[:-1])


def backward(cap: float | None, arrays: Any, seen: Seen) -> Any:
    """Return float32 gradients like (q, own, prompt). arrays: of `forward`, then outputs and log-sum-exp of all keys, d_out."""
    inputs, out, lse, d_out = arrays
    q, parts = _given(inputs)
    # d score = p (d p - sum of p d p over all keys), and that sum is the product of the whole's output with its cotangent.
    mean = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    d_out, lse, mean = (x.reshape(*q.shape[:4], *x.shape[2:]) for x in (d_out, lse, mean))

    def block(totals: list[KeysAndValues], of_block: Any) -> tuple[list[KeysAndValues], Array]:
        (q, *seen_by_part), d_out, lse, mean = of_block
        added, dq = [], []
        for (rows, k, v), seen, (dk, dv) in zip(parts, seen_by_part, totals, strict=True):
            scores = _scores(cap, q, rows, k, seen)
            p = jnp.exp(scores - lse[..., None])
            d_scores = p * (jnp.einsum(f"pkgrxh,{rows}uh->pkgrxu", d_out, v, **F32) - mean[..., None])
            if cap is not None:  # the slope of tanh
                d_scores *= jnp.where(seen, 1 - jnp.square(scores / cap), 0.0)
            d_scores, p = d_scores.astype(q.dtype), p.astype(q.dtype)
            dk += jnp.einsum(f"pkgrxu,pkgrxh->{rows}uh", d_scores, q, **F32)
            dv += jnp.einsum(f"pkgrxu,pkgrxh->{rows}uh", p, d_out, **F32)
            added.append((dk, dv))
            dq.append(jnp.einsum(f"pkgrxu,{rows}uh->pkgrxh", d_scores, k, **F32))
        return added, functools.reduce(jnp.add, dq)

    size = _block_size(q.shape[-2])
    of_blocks = _blocks(q, seen), *(_cut(x, axis, size) for x, axis in ((d_out, -2), (lse, -1), (mean, -1)))
    zeros = [tuple(jnp.zeros(x.shape, jnp.float32) for x in part[1:]) for part in parts]
    totals, dq = jax.lax.scan(block, vary_like(zeros, inputs[1][0].astype(jnp.int32)), of_blocks)
    (dk, dv), *d_prompt = totals
    d_own = tuple(x.reshape(inputs[1][0].shape) for x in (dk, dv))
    return _join(dq, -2).reshape(inputs[0].shape), d_own, d_prompt[0] if d_prompt else None


def _given(arrays: Any) -> tuple[Array, list[tuple[str, Array, Array]]]:
    """Return (queries [P, K, G, R, X, H], of each part its axes, keys and values)."""
    q, own, prompt = arrays
    P, M, *rest = q.shape
    num_rows = own[0].shape[1]  # K * G
    K = num_rows if prompt is None else prompt[0].shape[1]
    parts = [(OWN, *(x.reshape(P, K, num_rows // K, *x.shape[2:]) for x in own))]
    if prompt is not None:
        parts.append((PROMPT, *prompt))
    return q.reshape(P, K, num_rows // K, M // num_rows, *rest), parts


def _scores(cap: float | None, q: Array, rows: str, k: Array, seen: Array) -> Float[Array, "P K G R X U"]:
    scores = jnp.einsum(f"pkgrxh,{rows}uh->pkgrxu", q, k, **F32)
    return jnp.where(seen, soft_cap(scores, cap), MASK_VALUE)


def _block_size(num_queries: int) -> int:
    return BLOCK_QUERIES if num_queries % BLOCK_QUERIES == 0 else num_queries


def _blocks(q: Array, seen: Seen) -> tuple[Array, ...]:
    """Cut queries, and what they see of each part, into blocks; what they see broadcasts to scores."""
    own_XU, prompt_PXS = seen
    size = _block_size(q.shape[-2])
    shaped = [own_XU[None, None, None, None]]
    if prompt_PXS is not None:
        shaped.append(prompt_PXS[:, None, None, None])
    return tuple(_cut(x, -2, size) for x in (q, *shaped))


def _cut(x: Array, axis: int, size: int) -> Array:
    """Cut an axis into blocks, which are the first axis of the result."""
    axis %= x.ndim
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _join(x: Array, axis: int) -> Array:
    """Undo `_cut`."""
    axis %= x.ndim - 1
    x = jnp.moveaxis(x, 0, axis)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
