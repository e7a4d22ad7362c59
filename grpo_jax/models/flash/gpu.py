"""The kernels of `attend` on GPUs, in Pallas's Triton: one pass over the prompt's keys and a row's own.

Forward: a block of queries of one head, first over its prompt's keys, then over its own (Dao, arXiv 2307.08691). Backward: the
queries' gradient the same way; keys' and values' by a kernel for each part, a block of keys over the queries of its heads.
Padding costs little: blocks before a prompt's or a row's first token are not run, nor those beyond the diagonal or the window.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from grpo_jax.models.flash.call import Call, KeysAndValues, Masks, by_kind
from grpo_jax.models.flash.seen import LOG2E, MASK_VALUE, Part, cap_scores, div, dot, rem

UNIT = 128  # lengths are whole multiples of it; blocks of every size divide it
MANY_PROGRAMS = 264  # two for each multiprocessor of an H100


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Queries and keys at a time, Triton's warps and stages.

    Of bfloat16 heads of 64 and 128 the quickest on an H200 (experiments/studies/gpu), of others by registers and shared memory.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def _blocks(x: Array, *, is_backward: bool) -> Blocks:
    """Return the sizes for heads [..., H] of this many channels and bytes."""
    bytes_ = x.shape[-1] * x.dtype.itemsize
    if bytes_ > 512 or (bytes_ > 256 and x.dtype == jnp.float32):  # three passes hold each operand twice
        return Blocks(32, 32, 4, 1)
    if bytes_ > 256:
        return Blocks(64, 64, 8, 1) if is_backward else Blocks(64, 32, 4, 2)
    if bytes_ > 128:
        return Blocks(64, 64, 4, 2) if is_backward else Blocks(128, 64, 4, 2)
    return Blocks(64, 64, 4, 3)


def padded_length(num: int) -> int:
    """Return a length in tokens rounded up to whole blocks."""
    return -(-num // UNIT) * UNIT


def width_of(head_dim: int) -> int:
    """Return the channels of a head as the kernels take them: a power of two, as few as a product has."""
    return max(16, pl.next_power_of_2(head_dim))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a call's arrays: head (k, g, r) of M reads the prompt's keys k of K and its row's own keys (k, g)."""

    P: int
    M: int
    T: int
    H: int
    group_size: int
    heads_per_key: int  # R

    @classmethod
    def of(cls, q_PMTH: Array, own: KeysAndValues, masks: Masks) -> Sizes:
        """Read them."""
        group_size = len(masks[0]) // len(q_PMTH)
        P, M, T, H = q_PMTH.shape
        return cls(P, M, T, H, group_size, M // own[0].shape[1])


def _parts(call: Call, num_keys: int, window: int | None, has_prompt: bool) -> tuple[Part, ...]:
    """num_keys: of rows; where they are before all queries, these stand behind the last of them."""
    own = Part(num_keys, num_keys if call.is_before else 0, window)
    return (Part(call.prompt_slots, call.prompt_slots, window), own) if has_prompt else (own,)


def _begins(call: Call, masks: Masks, has_prompt: bool) -> tuple[Int[Array, "R 1"], ...]:
    """Return the first token's place in each prompt and each row: all padding stands before it, or is hidden by causality."""
    own_BT, prompt_PS, _ = masks
    own_B1 = jnp.zeros((len(own_BT), 1), jnp.int32)
    if call.is_left_padded:
        own_B1 = jnp.argmax(own_BT > 0, axis=1, keepdims=True).astype(jnp.int32)
    if not has_prompt:
        return (own_B1,)
    return jnp.argmax(prompt_PS > 0, axis=1, keepdims=True).astype(jnp.int32), own_B1


# ------------------------------------------------------------------------------------------------------- forward and backward


def forward(call: Call, arrays: Any, masks: Masks) -> tuple[Float[Array, "P M T H"], Float[Array, "P M T"]]:
    """Run the kernel -> (outputs, float32 log-sum-exp of all scores). arrays: queries, own keys and values, the prompts'."""
    q_PMTH, own, prompt = arrays
    sizes, blocks = Sizes.of(q_PMTH, own, masks), _blocks(q_PMTH, is_backward=False)

    def run(window: int | None) -> tuple[Array, Array]:
        parts = _parts(call, own[0].shape[2], window, prompt is not None)
        keys, begins = _given(own, prompt), _begins(call, masks, prompt is not None)
        return pl.pallas_call(
            functools.partial(_forward_kernel, parts, call.cap, blocks),
            grid=(sizes.T // blocks.queries, sizes.M, sizes.P),
            in_specs=[_rows(sizes, blocks.queries), *_keys_of_head(sizes, keys), *_begins_of_head(sizes, parts)],
            out_specs=[_rows(sizes, blocks.queries), _numbers(blocks.queries)],
            out_shape=[
                jax.ShapeDtypeStruct(q_PMTH.shape, q_PMTH.dtype),
                jax.ShapeDtypeStruct(q_PMTH.shape[:3], jnp.float32),
            ],
            name="flash_forward",
            **_settings(call, blocks),
        )(q_PMTH, *keys, *begins)

    return by_kind(call, masks, run)


def backward(call: Call, arrays: Any, masks: Masks) -> tuple[Any, Any, Any]:
    """Run the kernels of the gradients, each with the whole's output and log-sum-exp -> gradients like (q, own, prompt)."""
    (q_PMTH, own, prompt), out_PMTH, lse_PMT, d_out_PMTH = arrays
    sizes, blocks = Sizes.of(q_PMTH, own, masks), _blocks(q_PMTH, is_backward=True)
    # What the softmax's derivative takes off: the same for all keys of a query, whichever part they are of.
    delta_PMT = jnp.sum(out_PMTH.astype(jnp.float32) * d_out_PMTH.astype(jnp.float32), -1)
    of_queries = q_PMTH, d_out_PMTH, lse_PMT, delta_PMT

    def run(window: int | None) -> tuple[Any, Any, Any]:
        parts = _parts(call, own[0].shape[2], window, prompt is not None)
        keys, begins = _given(own, prompt), _begins(call, masks, prompt is not None)
        dq_PMTH = _queries_gradient(call, sizes, blocks, parts, of_queries, keys, begins)
        d_own = _keys_gradient(call, sizes, blocks, parts[-1], of_queries, own, begins[-1], sizes.group_size)
        d_prompt = None
        if prompt is not None:
            splits = _splits(sizes, prompt[0].shape[1] * (prompt[0].shape[2] // blocks.keys))
            d_prompt = _keys_gradient(call, sizes, blocks, parts[0], of_queries, prompt, begins[0], splits)
        return dq_PMTH, d_own, d_prompt

    return by_kind(call, masks, run)


def _splits(sizes: Sizes, num_blocks: int) -> int:
    """Return in how many parts a group's rows go over their prompt's keys: few, and still programs for the whole device."""
    divisors = [size for size in range(1, sizes.group_size + 1) if sizes.group_size % size == 0]
    return next((size for size in divisors if size * sizes.P * num_blocks >= MANY_PROGRAMS), sizes.group_size)


def _queries_gradient(call: Call, sizes: Sizes, blocks: Blocks, parts: Any, of_queries: Any, keys: Any, begins: Any) -> Array:
    rows, numbers = _rows(sizes, blocks.queries), _numbers(blocks.queries)
    return pl.pallas_call(
        functools.partial(_queries_kernel, parts, call.cap, blocks),
        grid=(sizes.T // blocks.queries, sizes.M, sizes.P),
        in_specs=[rows, rows, numbers, numbers, *_keys_of_head(sizes, keys), *_begins_of_head(sizes, parts)],
        out_specs=rows,
        out_shape=jax.ShapeDtypeStruct(of_queries[0].shape, of_queries[0].dtype),
        name="flash_backward_queries",
        **_settings(call, blocks),
    )(*of_queries, *keys, *begins)


def _keys_gradient(
    call: Call, sizes: Sizes, blocks: Blocks, part: Part, of_queries: Any, keys: KeysAndValues, begin: Array, splits: int
) -> KeysAndValues:
    """Return the gradients of keys and values of one part, read by `splits` sets of heads for each of K."""
    P, L, U, H = keys[0].shape  # L: K of a prompt, K * G of rows
    programs = (sizes.M // (sizes.group_size * sizes.heads_per_key)) * splits  # K * splits
    heads = sizes.M // programs
    shared = programs // L  # sets of heads whose gradients are added up: 1 for own keys

    def of_heads(*rest: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, heads, *rest), lambda u, n, p: (p, n, *(0 for _ in rest)))

    block = pl.BlockSpec((None, None, blocks.keys, H), lambda u, n, p: (p, div(n, shared), u, 0))
    made = pl.BlockSpec((None, None, blocks.keys, H), lambda u, n, p: (p, n, u, 0))
    rows = len(begin) // P  # 1 of prompts, G of own keys
    first = pl.BlockSpec((1, 1), lambda u, n, p: (p * rows + rem(n, rows), 0))
    grads = pl.pallas_call(
        functools.partial(_keys_kernel, part, call.cap, blocks, heads),
        grid=(U // blocks.keys, programs, P),
        in_specs=[*(of_heads(sizes.T, H),) * 2, *(of_heads(sizes.T),) * 2, block, block, first],
        out_specs=[made, made],
        out_shape=[jax.ShapeDtypeStruct((P, programs, U, H), jnp.float32 if shared > 1 else x.dtype) for x in keys],
        name="flash_backward_keys",
        **_settings(call, blocks),
    )(*of_queries, *keys, begin)
    return tuple(x.reshape(P, L, shared, U, H).sum(2).astype(keys[0].dtype) for x in grads)


def _settings(call: Call, blocks: Blocks) -> dict[str, Any]:
    return {
        "compiler_params": triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        "interpret": call.hardware.interpret,
    }


# --------------------------------------------------------------------------------------- which piece of an array a program gets


def _rows(sizes: Sizes, queries: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, queries, sizes.H), lambda t, m, p: (p, m, t, 0))


def _numbers(queries: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, queries), lambda t, m, p: (p, m, t))


def _given(own: KeysAndValues, prompt: KeysAndValues | None) -> tuple[Array, ...]:
    return (*prompt, *own) if prompt is not None else own


def _keys_of_head(sizes: Sizes, keys: tuple[Array, ...]) -> list[pl.BlockSpec]:
    """Whole arrays of keys or values, [P, K or K * G, U, H]: a kernel takes block after block of them."""

    def spec(x: Array) -> pl.BlockSpec:
        heads = sizes.M // x.shape[1]  # that read one of them
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda t, m, p: (p, div(m, heads), 0, 0))

    return [spec(x) for x in keys]


def _begins_of_head(sizes: Sizes, parts: tuple[Part, ...]) -> list[pl.BlockSpec]:
    prompt = pl.BlockSpec((1, 1), lambda t, m, p: (p, 0))
    G, R = sizes.group_size, sizes.heads_per_key
    own = pl.BlockSpec((1, 1), lambda t, m, p: (p * G + rem(div(m, R), G), 0))
    return [prompt, own][-len(parts) :]


# --------------------------------------------------------------------------------------------------------------- the kernels


def _over_keys(parts: tuple[Part, ...], blocks: Blocks, refs: Any, turn: Callable[..., Any], carry: Any) -> Any:
    """Call turn(k_UH, v_UH, seen_QU, carry) -> carry for each block of keys that this program's queries see, part after part.

    Args:
      refs: keys and values of each part, then begins.
    """
    start = pl.program_id(0) * blocks.queries
    query_Q = start + jnp.arange(blocks.queries)
    for place, part in enumerate(parts):
        k_ref, v_ref, begin = refs[2 * place], refs[2 * place + 1], refs[2 * len(parts) + place][0, 0]

        def of_block(block: Any, carry: Any, part=part, k_ref=k_ref, v_ref=v_ref, begin=begin) -> Any:
            piece = pl.ds(block * blocks.keys, blocks.keys)
            seen_QU = part.sees(query_Q[:, None], (block * blocks.keys + jnp.arange(blocks.keys))[None], begin)
            return turn(k_ref[piece, :], v_ref[piece, :], seen_QU, carry)

        carry = jax.lax.fori_loop(*part.keys_seen(start, blocks.queries, blocks.keys, begin), of_block, carry)
    return carry


def add_keys(score_QU: Any, v_UH: Any, seen_QU: Any, carry: Any) -> Any:
    """Return the carry (maximum, sum of exponentials, their sum of values) of each query with a block of keys more.

    score_QU: in units of log 2. v_UH: the keys' values. seen_QU: which of them a query sees.
    """
    top_Q, total_Q, sum_QH = carry
    # A finite value: what a query gathers of a block in which it sees no key is later multiplied with exp(-1e30).
    score_QU = jnp.where(seen_QU, score_QU, MASK_VALUE)
    higher_Q = jnp.maximum(top_Q, score_QU.max(-1))
    p_QU, shrunk_Q = jnp.exp2(score_QU - higher_Q[:, None]), jnp.exp2(top_Q - higher_Q)
    sum_QH = sum_QH * shrunk_Q[:, None] + dot(p_QU.astype(v_UH.dtype), v_UH, (1, 0))
    return higher_Q, total_Q * shrunk_Q + p_QU.sum(-1), sum_QH


def _forward_kernel(parts: tuple[Part, ...], cap: float | None, blocks: Blocks, q_ref: Any, *refs: Any) -> None:
    q_QH = q_ref[...]
    *keys_and_begins, out_ref, lse_ref = refs

    def turn(k_UH: Any, v_UH: Any, seen_QU: Any, carry: Any) -> Any:
        score_QU, _ = cap_scores(dot(q_QH, k_UH, (1, 1)), cap)
        return add_keys(score_QU, v_UH, seen_QU, carry)

    top_Q = jnp.full(blocks.queries, MASK_VALUE, jnp.float32)
    carry = top_Q, jnp.zeros(blocks.queries, jnp.float32), jnp.zeros(q_QH.shape, jnp.float32)
    top_Q, total_Q, sum_QH = _over_keys(parts, blocks, keys_and_begins, turn, carry)
    total_Q = jnp.maximum(total_Q, 1.0)  # no other than it was, but where a block of padding has seen no key at all
    out_ref[...] = (sum_QH / total_Q[:, None]).astype(out_ref.dtype)
    lse_ref[...] = (top_Q + jnp.log2(total_Q)) / LOG2E


def _probabilities(q: Any, k: Any, cap: float | None, lse_Q: Any, seen_QU: Any) -> tuple[Any, Any]:
    """Return (what each query gave each key of its attention, the factor of the score's gradient)."""
    score_QU, factor_QU = cap_scores(dot(q, k, (1, 1)), cap)
    return jnp.where(seen_QU, jnp.exp2(score_QU - lse_Q[:, None] * LOG2E), 0.0), factor_QU


def _score_gradient(p_QU: Any, factor_QU: Any, d_out_QH: Any, v_UH: Any, delta_Q: Any) -> Any:
    d_score_QU = p_QU * (dot(d_out_QH, v_UH, (1, 1)) - delta_Q[:, None])
    return d_score_QU if factor_QU is None else d_score_QU * factor_QU


def _queries_kernel(
    parts: Any, cap: float | None, blocks: Blocks, q_ref: Any, d_out_ref: Any, lse_ref: Any, delta_ref: Any, *refs: Any
) -> None:
    q_QH, d_out_QH, lse_Q, delta_Q = q_ref[...], d_out_ref[...], lse_ref[...], delta_ref[...]
    *keys_and_begins, dq_ref = refs

    def turn(k_UH: Any, v_UH: Any, seen_QU: Any, dq_QH: Any) -> Any:
        p_QU, factor_QU = _probabilities(q_QH, k_UH, cap, lse_Q, seen_QU)
        d_score_QU = _score_gradient(p_QU, factor_QU, d_out_QH, v_UH, delta_Q)
        return dq_QH + dot(d_score_QU.astype(k_UH.dtype), k_UH, (1, 0))

    dq_QH = _over_keys(parts, blocks, keys_and_begins, turn, jnp.zeros(q_QH.shape, jnp.float32))
    dq_ref[...] = dq_QH.astype(dq_ref.dtype)


def _keys_kernel(
    part: Part,
    cap: float | None,
    blocks: Blocks,
    num_heads: int,
    q_ref: Any,
    d_out_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    k_ref: Any,
    v_ref: Any,
    begin_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
) -> None:
    start, begin = pl.program_id(0) * blocks.keys, begin_ref[0, 0]
    key_U = start + jnp.arange(blocks.keys)
    k_UH, v_UH = k_ref[...], v_ref[...]
    first, end = part.queries_seeing(start, blocks.queries, blocks.keys, begin, q_ref.shape[1])
    num = end - first

    def turn(number: Any, carry: Any) -> Any:
        dk_UH, dv_UH = carry
        head, block = div(number, num), first + rem(number, num)
        piece = pl.ds(block * blocks.queries, blocks.queries)
        q_QH, d_out_QH = q_ref[head, piece, :], d_out_ref[head, piece, :]
        query_Q = block * blocks.queries + jnp.arange(blocks.queries)
        seen_QU = part.sees(query_Q[:, None], key_U[None], begin)
        p_QU, factor_QU = _probabilities(q_QH, k_UH, cap, lse_ref[head, piece], seen_QU)
        dv_UH += dot(p_QU.astype(d_out_QH.dtype), d_out_QH, (0, 0))
        d_score_QU = _score_gradient(p_QU, factor_QU, d_out_QH, v_UH, delta_ref[head, piece])
        return dk_UH + dot(d_score_QU.astype(q_QH.dtype), q_QH, (0, 0)), dv_UH

    # One loop over heads and blocks of queries: Triton loads ahead in the innermost loop only.
    zeros = jnp.zeros(k_UH.shape, jnp.float32)
    dk_UH, dv_UH = jax.lax.fori_loop(0, num_heads * jnp.maximum(num, 0), turn, (zeros, zeros))
    dk_ref[...], dv_ref[...] = dk_UH.astype(dk_ref.dtype), dv_UH.astype(dv_ref.dtype)
