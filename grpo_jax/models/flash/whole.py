"""The kernel of `attend` on TPUs for rows that fit in a core's own memory: prompt and own keys in one pass.

Tokens lie along the lanes, so that heads of any width fill registers, sums over keys are sums of registers, and queries come as
a product and the rotary positions leave them. A program has one head of keys of a row and a block of queries of each head that
reads them; it goes over the prompt's keys and the row's own, block by block (Dao, arXiv 2307.08691). Backward all gradients are
of one pass: those of keys and values are added up in the core's memory, a prompt's over all rows of its group.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.flash.call import Call, KeysAndValues, Masks, by_kind
from grpo_jax.models.flash.seen import LOG2E, MASK_VALUE, Part, cap_scores, dot

UNIT = 128  # lengths are whole multiples of it
BLOCK = 256  # queries or keys at a time where it divides their number; above the diagonal less is computed than by larger ones
WIDTH = 16  # channels of a head are whole multiples of it: rows of a register of bfloat16
MAX_BYTES = 12 * 2**20  # of what a program holds; the compiler's own limit is 16 MiB


def fits(q_BTNH: Float[Array, "B T N H"], own: KeysAndValues, prompt: KeysAndValues | None) -> bool:
    """Say if a core's memory holds a row, forward and backward; arguments as in `attend.attend_causally`."""
    arrays = jax.eval_shape(lay_out, q_BTNH, own, prompt)
    return program_bytes(Sizes.of(arrays), q_BTNH.dtype.itemsize) <= MAX_BYTES


def lay_out(q_BTNH: Float[Array, "B T N H"], own: KeysAndValues, prompt: KeysAndValues | None) -> Any:
    """Return queries, own keys and values and the prompts' as the kernel takes them, [rows, heads, H, tokens], padded."""

    def pad(x: Array) -> Array:
        *_, width, length = x.shape
        return jnp.pad(x, ((0, 0), (0, 0), (0, -width % WIDTH), (0, -length % UNIT)))

    arrays = q_BTNH.transpose(0, 2, 3, 1), *jax.tree.map(lambda x: x.swapaxes(2, 3), (own, prompt))
    return jax.tree.map(pad, arrays)


def block_of(num: int) -> int:
    """Return how many queries or keys of so many are taken at a time."""
    return BLOCK if num % BLOCK == 0 else UNIT


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a call's arrays: N = K * R heads of queries, B = P * G rows, S slots of prompts or none."""

    P: int
    G: int
    K: int
    R: int
    H: int
    T: int
    S: int | None

    @classmethod
    def of(cls, arrays: Any) -> Sizes:
        """Read them."""
        q_BNHT, (k_BKHT, _), prompt = arrays
        (B, N, H, T), K = q_BNHT.shape, k_BKHT.shape[1]
        P, S = (B, None) if prompt is None else (len(prompt[0]), prompt[0].shape[3])
        return cls(P, B // P, K, N // K, H, T, S)

    def lengths(self) -> tuple[int, ...]:
        """Return the numbers of keys of the parts: of the prompt, if there is one, and of the row."""
        return (self.T,) if self.S is None else (self.S, self.T)


def program_bytes(sizes: Sizes, itemsize: int) -> int:
    """Count what a program of the backward pass holds: what is read and written twice, for one waits for the next."""
    keys = sum(sizes.lengths())
    of_key = itemsize * (2 * 4 * sizes.H + 2 * max(sizes.H, UNIT)) + 4 * 2 * sizes.H
    return keys * of_key + 2 * 4 * sizes.R * sizes.H * block_of(sizes.T) * itemsize


def forward(call: Call, arrays: Any, masks: Masks) -> tuple[Float[Array, "B N H T"], Float[Array, "B K R T"]]:
    """Run the kernel -> (outputs, float32 log-sum-exp of all scores)."""
    q_BNHT, own, prompt = arrays
    sizes = Sizes.of(arrays)

    def run(window: int | None) -> tuple[Array, Array]:
        parts = _parts(call, sizes, window)
        out_shape = [
            jax.ShapeDtypeStruct(q_BNHT.shape, q_BNHT.dtype),
            jax.ShapeDtypeStruct((sizes.P * sizes.G, sizes.K, sizes.R, sizes.T), jnp.float32),
        ]
        return _run(
            call,
            sizes,
            functools.partial(_forward_kernel, parts, call, sizes.G),
            "attention_forward",
            [_queries(sizes)],
            [_queries(sizes), _numbers(sizes)],
            out_shape,
            [_turned(sizes, length, q_BNHT.dtype) for length in sizes.lengths()],
        )(*_begins(call, masks, sizes), q_BNHT, *_given(own, prompt))

    return by_kind(call, masks, run)


def backward(call: Call, arrays: Any, masks: Masks) -> Any:
    """Run the kernel of the gradients with the whole's output and log-sum-exp -> gradients like (q, own, prompt)."""
    (q_BNHT, own, prompt), out_BNHT, lse_BKRT, d_out_BNHT = arrays
    sizes = Sizes.of(arrays[0])

    def run(window: int | None) -> Any:
        parts, given = _parts(call, sizes, window), _given(own, prompt)
        turned = [_turned(sizes, length, q_BNHT.dtype) for length in sizes.lengths() for _ in range(2)]
        dq_BNHT, *d_keys = _run(
            call,
            sizes,
            functools.partial(_backward_kernel, parts, call, sizes.G),
            "attention_backward",
            [_queries(sizes)] * 3 + [_numbers(sizes)],
            [_queries(sizes), *_keys(sizes)],
            [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BNHT, *given)],
            turned + [_vmem((sizes.H, length), jnp.float32) for length in sizes.lengths() for _ in range(2)],
        )(*_begins(call, masks, sizes), q_BNHT, out_BNHT, d_out_BNHT, lse_BKRT, *given)
        d_own, d_prompt = tuple(d_keys[-2:]), None if prompt is None else tuple(d_keys[:2])
        return dq_BNHT, d_own, d_prompt

    return by_kind(call, masks, run)


def _parts(call: Call, sizes: Sizes, window: int | None) -> tuple[Part, ...]:
    own = Part(sizes.T, 0, window)
    return (own,) if sizes.S is None else (Part(call.prompt_slots, call.prompt_slots, window), own)


def _begins(call: Call, masks: Masks, sizes: Sizes) -> tuple[Array, ...]:
    """Return the first token's place in each prompt and each row: all padding stands before it, or is hidden by causality."""
    own_BT, prompt_PS, _ = masks
    own_B1 = jnp.zeros((len(own_BT), 1), jnp.int32)
    if call.is_left_padded:
        own_B1 = _first_token(own_BT)
    return (own_B1,) if sizes.S is None else (_first_token(prompt_PS), own_B1)


def _first_token(mask_RU: Any) -> Array:
    # With a second axis: `vmap` puts one before the first, and the last two must be there in full.
    return jnp.argmax(mask_RU > 0, axis=1, keepdims=True).astype(jnp.int32)


def _given(own: KeysAndValues, prompt: KeysAndValues | None) -> tuple[Array, ...]:
    return (*own,) if prompt is None else (*prompt, *own)


# --------------------------------------------------------------------------------------- which piece of an array a program gets


def _run(
    call: Call,
    sizes: Sizes,
    kernel: Callable[..., None],
    name: str,
    of_queries: list[Any],
    out_specs: list[Any],
    out_shape: list[Any],
    scratch: list[Any],
) -> Callable[..., Any]:
    """Return a call of the kernel with the first tokens' places, arrays by the queries, and all keys and values."""
    from jax.experimental import pallas as pl  # only here: no CPU needs it, and it takes a second
    from jax.experimental.pallas import tpu as pltpu

    places = [pl.BlockSpec(memory_space=pltpu.SMEM)] * len(sizes.lengths())
    return pl.pallas_call(
        kernel,
        grid=(sizes.P, sizes.K, sizes.G, sizes.T // block_of(sizes.T)),
        in_specs=[*places, *of_queries, *_keys(sizes)],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=scratch,
        # Rows of a group one after another: a prompt's keys stay where they are, and their gradients are added up.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        interpret=call.hardware.interpret,
        name=name,
    )


def _vmem(shape: tuple[int, ...], dtype: Any) -> Any:
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.VMEM(shape, dtype)


def _turned(sizes: Sizes, length: int, dtype: Any) -> Any:
    return _vmem((length, sizes.H), dtype)


def _queries(sizes: Sizes) -> Any:
    from jax.experimental import pallas as pl

    return pl.BlockSpec((None, sizes.R, sizes.H, block_of(sizes.T)), lambda p, k, g, t: (p * sizes.G + g, k, 0, t))


def _numbers(sizes: Sizes) -> Any:
    from jax.experimental import pallas as pl

    return pl.BlockSpec((None, None, sizes.R, block_of(sizes.T)), lambda p, k, g, t: (p * sizes.G + g, k, 0, t))


def _keys(sizes: Sizes) -> list[Any]:
    """Keys and values of the prompt, if there is one, and of the row: whole, of one head."""
    from jax.experimental import pallas as pl

    own = pl.BlockSpec((None, None, sizes.H, sizes.T), lambda p, k, g, t: (p * sizes.G + g, k, 0, 0))
    if sizes.S is None:
        return [own, own]
    prompt = pl.BlockSpec((None, None, sizes.H, sizes.S), lambda p, k, g, t: (p, k, 0, 0))
    return [prompt, prompt, own, own]


# --------------------------------------------------------------------------------------------------------------- the kernels


@dataclasses.dataclass(frozen=True)
class _Keys:
    """A part's keys and values as a program has them: k, v [H, U], and turned_k, turned_v [U, H].

    begin: the first of them that is a token. Backward: dk, dv are written to at last, sum_dk, sum_dv are float32.
    """

    part: Part
    begin: Any
    k: Any
    v: Any
    turned_k: Any
    turned_v: Any = None
    dk: Any = None
    dv: Any = None
    sum_dk: Any = None
    sum_dv: Any = None

    @property
    def num(self) -> int:
        """The number of keys."""
        return self.k.shape[1]

    def enter(self) -> None:
        """Turn keys and values, a block at a time, and begin the sums."""
        size = block_of(self.num)
        for ref, turned in ((self.k, self.turned_k), (self.v, self.turned_v)):
            if turned is not None:
                for start in range(0, self.num, size):
                    turned[start : start + size, :] = ref[:, start : start + size].T
        for total in () if self.sum_dk is None else (self.sum_dk, self.sum_dv):
            total[...] = jnp.zeros_like(total)

    def leave(self, scale: float) -> None:
        """Write the gradients, of unscaled keys."""
        for made, total, factor in ((self.dk, self.sum_dk, scale), (self.dv, self.sum_dv, 1.0)):
            made[...] = (total[...] * factor).astype(made.dtype)

    def piece(self, first: Any) -> Any:
        """Return the block of keys from one on."""
        from jax.experimental import pallas as pl

        return pl.ds(pl.multiple_of(first, block_of(self.num)), block_of(self.num))

    def scores(self, call: Call, q_HQ: Any, first: Any) -> tuple[Any, Any]:
        """Return scores [U, Q] of a block in units of log 2, and the factor of their gradient but for the scale."""
        score_UQ = dot(self.turned_k[self.piece(first), :], q_HQ, (1, 0))
        if call.cap is None:
            return score_UQ * (call.scale * LOG2E), None
        return cap_scores(score_UQ * call.scale, call.cap)


Turn = Callable[[_Keys, Any, Any, Any], Any]  # (keys, the first of a block, seen_UQ or None where all are, carry) -> carry


def _over_keys(all_keys: list[_Keys], start: Any, num_queries: int, turn: Turn, carry: Any) -> Any:
    """Call `turn` for each block of keys that the queries from `start` on see. Most are seen whole, and need no mask."""
    for keys in all_keys:
        size = block_of(keys.num)
        of_block = start, num_queries, size, keys.begin
        first, end = keys.part.keys_seen(*of_block)
        whole, end_whole = keys.part.keys_seen_by_all(*of_block)
        whole = jnp.clip(whole, first, end)
        end_whole = jnp.clip(end_whole, whole, end)

        def partly(block: Any, carry: Any, keys=keys, size=size) -> Any:
            shape = size, num_queries
            key_UQ = block * size + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
            query_UQ = start + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            return turn(keys, block * size, keys.part.sees(query_UQ, key_UQ, keys.begin), carry)

        def wholly(block: Any, carry: Any, keys=keys, size=size) -> Any:
            return turn(keys, block * size, None, carry)

        carry = jax.lax.fori_loop(first, whole, partly, carry)
        carry = jax.lax.fori_loop(whole, end_whole, wholly, carry)
        carry = jax.lax.fori_loop(end_whole, end, partly, carry)
    return carry


def _places(parts: tuple[Part, ...], group_size: int, refs: Any) -> tuple[list[Any], list[Any], list[Any]]:
    """Return of each part, the prompt's before the row's own: its first token, and if this is its first and last program."""
    from jax.experimental import pallas as pl

    p, g, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    is_first, is_last = t == 0, t == pl.num_programs(3) - 1
    begins, firsts, lasts = [refs[-1][p * group_size + g, 0]], [is_first], [is_last]
    if len(parts) > 1:
        begins, firsts = [refs[0][p, 0], *begins], [is_first & (g == 0), is_first]
        lasts = [is_last & (g == group_size - 1), is_last]
    return begins, firsts, lasts


def _by_part(num: int, refs: Any) -> list[Any]:
    """Return keys' and values' of each part, of arrays that stand so one behind the other."""
    return [refs[2 * place : 2 * place + 2] for place in range(num)]


def _forward_kernel(parts: tuple[Part, ...], call: Call, group_size: int, *refs: Any) -> None:
    from jax.experimental import pallas as pl

    num = len(parts)
    begins, firsts, _ = _places(parts, group_size, refs[:num])
    q_ref, refs = refs[num], refs[num + 1 :]
    given, (out_ref, lse_ref, *turned) = _by_part(num, refs), refs[2 * num :]
    all_keys = [_Keys(part, begins[i], given[i][0], given[i][1], turned[i]) for i, part in enumerate(parts)]
    for keys, is_first in zip(all_keys, firsts, strict=True):
        pl.when(is_first)(keys.enter)
    num_heads, H, Q = q_ref.shape
    start = pl.program_id(3) * Q

    def of_head(r: Any, _: Any) -> None:
        carry = jnp.full((1, Q), MASK_VALUE, jnp.float32), jnp.zeros((1, Q), jnp.float32), jnp.zeros((H, Q), jnp.float32)
        turn = functools.partial(_attend_to_block, call, q_ref[r])
        top_Q, total_Q, sum_HQ = _over_keys(all_keys, start, Q, turn, carry)
        total_Q = jnp.maximum(total_Q, 1.0)  # no other than it was, but where a query of padding has seen no key at all
        out_ref[r] = (sum_HQ / total_Q).astype(out_ref.dtype)
        lse_ref[pl.ds(r, 1), :] = (top_Q + jnp.log2(total_Q)) / LOG2E

    jax.lax.fori_loop(0, num_heads, of_head, None)


def _attend_to_block(call: Call, q_HQ: Any, keys: _Keys, first: Any, seen_UQ: Any, carry: Any) -> Any:
    top_Q, total_Q, sum_HQ = carry
    score_UQ, _ = keys.scores(call, q_HQ, first)
    if seen_UQ is not None:
        # Finite: what a query gathers of a block in which it sees no key is later multiplied with exp(-1e30).
        score_UQ = jnp.where(seen_UQ, score_UQ, MASK_VALUE)
    higher_Q = jnp.maximum(top_Q, score_UQ.max(0, keepdims=True))
    p_UQ, shrunk_Q = jnp.exp2(score_UQ - higher_Q), jnp.exp2(top_Q - higher_Q)
    v_HU = keys.v[:, keys.piece(first)]
    sum_HQ = sum_HQ * shrunk_Q + dot(v_HU, p_UQ.astype(v_HU.dtype), (1, 0))
    return higher_Q, total_Q * shrunk_Q + p_UQ.sum(0, keepdims=True), sum_HQ


def _backward_kernel(parts: tuple[Part, ...], call: Call, group_size: int, *refs: Any) -> None:
    from jax.experimental import pallas as pl

    num = len(parts)
    begins, firsts, lasts = _places(parts, group_size, refs[:num])
    (q_ref, out_ref, d_out_ref, lse_ref), refs = refs[num : num + 4], refs[num + 4 :]
    given, dq_ref, refs = _by_part(num, refs), refs[2 * num], refs[2 * num + 1 :]
    made, turned, sums = (_by_part(num, refs[2 * num * i :]) for i in range(3))
    all_keys = [_Keys(part, begins[i], *given[i], *turned[i], *made[i], *sums[i]) for i, part in enumerate(parts)]
    for keys, is_first in zip(all_keys, firsts, strict=True):
        pl.when(is_first)(keys.enter)
    num_heads, H, Q = q_ref.shape
    start = pl.program_id(3) * Q

    def of_head(r: Any, _: Any) -> None:
        d_out_HQ = d_out_ref[r]
        # What the softmax's derivative takes off: the same for all keys of a query.
        delta_Q = jnp.sum(out_ref[r].astype(jnp.float32) * d_out_HQ.astype(jnp.float32), 0, keepdims=True)
        of_queries = q_ref[r], d_out_HQ, lse_ref[pl.ds(r, 1), :] * LOG2E, delta_Q
        turn = functools.partial(_differentiate_block, call, of_queries)
        dq_HQ = _over_keys(all_keys, start, Q, turn, jnp.zeros((H, Q), jnp.float32))
        dq_ref[r] = (dq_HQ * call.scale).astype(dq_ref.dtype)

    jax.lax.fori_loop(0, num_heads, of_head, None)
    for keys, is_last in zip(all_keys, lasts, strict=True):
        pl.when(is_last)(functools.partial(keys.leave, call.scale))


def _differentiate_block(call: Call, of_queries: Any, keys: _Keys, first: Any, seen_UQ: Any, dq_HQ: Any) -> Any:
    q_HQ, d_out_HQ, lse_Q, delta_Q = of_queries
    piece = keys.piece(first)
    score_UQ, factor_UQ = keys.scores(call, q_HQ, first)
    p_UQ = jnp.exp2(score_UQ - lse_Q)
    if seen_UQ is not None:
        p_UQ = jnp.where(seen_UQ, p_UQ, 0.0)
    d_score_UQ = p_UQ * (dot(keys.turned_v[piece, :], d_out_HQ, (1, 0)) - delta_Q)
    if factor_UQ is not None:
        d_score_UQ = d_score_UQ * factor_UQ
    d_score_UQ = d_score_UQ.astype(q_HQ.dtype)
    keys.sum_dv[:, piece] += dot(d_out_HQ, p_UQ.astype(d_out_HQ.dtype), (1, 1))
    keys.sum_dk[:, piece] += dot(q_HQ, d_score_UQ, (1, 1))
    return dq_HQ + dot(keys.k[:, piece], d_score_UQ, (1, 0))
