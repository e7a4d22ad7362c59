"""Attention of each row's newest token on TPUs, in one kernel: prompt and the filled part of the row's cache.

In plain operations a layer reads the cache in two products with the scores' array between them, and sums over it: more than
half of a token's time. Here a program has some rows of a prompt and some heads of keys; it begins with the prompt, and goes
over the cache block by block with a running maximum (Dao, arXiv 2307.08691). Blocks that no row has filled are neither read nor
run. Slots lie along the lanes, as the cache has them. The newest token is in the cache already.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from grpo_jax.models.flash.call import Call
from grpo_jax.models.flash.seen import MASK_VALUE, cap_scores, dot

UNIT = 128  # caches are whole multiples of it
BLOCK = 256  # slots at a time, where it divides their number
BLOCK_BYTES = 2**20  # of keys and values that are read at a time: small ones cost more to begin than to read
MAX_PROGRAM_HEADS = 16  # rows times heads of keys: each is compiled
MAX_BYTES = 8 * 2**20  # of keys and values in a core's memory, each twice, for the next are read while these are used


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Rows and heads of keys of a program, slots of a block. rows divides G, heads K, slots U."""

    rows: int
    heads: int
    slots: int

    @classmethod
    def of(cls, group_size: int, cache: Any) -> Sizes:
        """Choose them for keys [B, K, H, U]."""
        _, K, H, U = cache.shape
        slots = BLOCK if U % BLOCK == 0 else UNIT if U % UNIT == 0 else U
        of_head = 2 * H * slots * cache.dtype.itemsize
        num_heads = min(BLOCK_BYTES // of_head, MAX_PROGRAM_HEADS)
        heads = largest_divisor(K, num_heads)
        return cls(largest_divisor(group_size, num_heads // heads), heads, slots)


def unit_of(num_slots: int) -> int:
    """Return the size of which a cache of so many slots should be a multiple: of whole blocks, if it is long."""
    return BLOCK if num_slots > 2 * BLOCK else UNIT


def largest_divisor(num: int, most: int) -> int:
    """Return the largest divisor that is not above `most`, 1 at the least."""
    return max(size for size in range(1, num + 1) if num % size == 0 and size <= max(most, 1))


def fits(group_size: int, cache: Any, prompts: Sequence[Any]) -> bool:
    """Say if a core's memory holds a program's keys and values. cache [B, K, H, U], prompts [P, K, H, S]: keys."""
    sizes = Sizes.of(group_size, cache)
    slots = sizes.rows * sizes.slots + sum(each.shape[-1] for each in prompts)
    return 2 * 2 * sizes.heads * cache.shape[2] * slots * cache.dtype.itemsize <= MAX_BYTES


def attend(scale: float, call: Call, arrays: Any, masks: Any) -> Array:
    """Run the kernel -> the heads' outputs [B, N, H].

    Args:
      scale: of the scores. arrays: queries [B, N, H], the cache's keys and values, the prompts' of each part, all
        [rows, K, H, slots]. masks: of `NewestTokens`.
    """
    from jax.experimental import pallas as pl  # only here, as in `whole`
    from jax.experimental.pallas import tpu as pltpu

    q_BNH, cache, prompts = arrays
    own_B2, prompt_BX = masks
    (B, N, H), (_, K, _, U) = q_BNH.shape, cache[0].shape
    R, group_size = N // K, B // sum(len(k_PKHS) for k_PKHS, _ in prompts)
    sizes = Sizes.of(group_size, cache[0])
    sets = group_size // sizes.rows  # of a prompt's rows
    bounds_2 = jnp.stack([own_B2[:, 0].min(), own_B2[:, 1].max()])  # of the slots that any row sees

    def of_rows(b: Any, k: Any, u: Any, bounds: Any) -> tuple[Any, ...]:
        del u, bounds
        return b, k, 0, 0

    def of_cache(b: Any, k: Any, u: Any, bounds: Any) -> tuple[Any, ...]:
        # Where no block is to be run it is the one before or the next, which is not read again.
        return b, k, 0, jnp.clip(u, jax.lax.div(bounds[0], sizes.slots), jax.lax.div(bounds[1], sizes.slots))

    def of_prompt(start: int, x: Array) -> Any:
        def place(b: Any, k: Any, u: Any, bounds: Any) -> tuple[Any, ...]:
            del u, bounds
            return jnp.clip(jax.lax.div(b, sets) - start, 0, len(x) - 1), k, 0, 0

        return pl.BlockSpec((None, sizes.heads, H, x.shape[-1]), place)

    heads = pl.BlockSpec((sizes.rows, sizes.heads, R, H), of_rows)
    slots = pl.BlockSpec((sizes.rows, sizes.heads, H, sizes.slots), of_cache)
    numbers = pl.BlockSpec(memory_space=pltpu.SMEM)
    starts = itertools.accumulate((len(k_PKHS) for k_PKHS, _ in prompts), initial=0)
    of_prompts = [of_prompt(start, x) for start, part in zip(starts, prompts, strict=False) for x in part]
    sums = [pltpu.VMEM((sizes.rows, sizes.heads, R, width), jnp.float32) for width in (1, 1, H)]
    out_BKRH = pl.pallas_call(
        functools.partial(_kernel, call.cap, scale, len(prompts), sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B // sizes.rows, K // sizes.heads, U // sizes.slots),
            in_specs=[numbers, numbers, heads, *of_prompts, slots, slots],
            out_specs=heads,
            scratch_shapes=sums,
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, R, H), q_BNH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=call.hardware.interpret,
        name="attention_newest",
    )(bounds_2, own_B2, prompt_BX, q_BNH.reshape(B, K, R, H), *itertools.chain(*prompts), *cache)
    return out_BKRH.reshape(B, N, H)


def _kernel(
    cap: float | None, scale: float, num_parts: int, sizes: Sizes, bounds: Any, own: Any, prompt: Any, q_ref: Any, *refs: Any
) -> None:
    from jax.experimental import pallas as pl

    prompts, (k_ref, v_ref, out_ref, *sums) = refs[: 2 * num_parts], refs[2 * num_parts :]
    first_row, u = pl.program_id(0) * sizes.rows, pl.program_id(2)
    pairs = list(itertools.product(range(sizes.rows), range(sizes.heads)))
    start = u * sizes.slots

    def add(row: int, head: int, k_HU: Any, v_HU: Any, place: Any, first: Any, last: Any) -> None:
        """Take keys and values of slots from `place` on, of which those from first to last are seen."""
        place_of = [each.at[row, head] for each in sums]
        top_R1, total_R1, sum_RH = (each[...] for each in place_of)
        score_RU, _ = cap_scores(dot(q_ref[row, head], k_HU, (1, 0)) * scale, cap)
        slot_RU = place + jax.lax.broadcasted_iota(jnp.int32, score_RU.shape, 1)
        score_RU = jnp.where((slot_RU >= first) & (slot_RU <= last), score_RU, MASK_VALUE)
        higher_R1 = jnp.maximum(top_R1, score_RU.max(1, keepdims=True))
        p_RU, shrunk_R1 = jnp.exp2(score_RU - higher_R1), jnp.exp2(top_R1 - higher_R1)
        place_of[0][...], place_of[1][...] = higher_R1, total_R1 * shrunk_R1 + p_RU.sum(1, keepdims=True)
        place_of[2][...] = sum_RH * shrunk_R1 + dot(p_RU.astype(v_HU.dtype), v_HU, (1, 1))

    @pl.when(u == 0)
    def _() -> None:
        for each, value in zip(sums, (MASK_VALUE, 0.0, 0.0), strict=True):
            each[...] = jnp.full(each.shape, value, jnp.float32)
        for part in range(num_parts):
            part_k_ref, part_v_ref = prompts[2 * part : 2 * part + 2]
            end = prompt[first_row, 2 * part + 1]  # 0 where the rows' prompt is of another part

            @pl.when(end > 0)
            def _(part_k_ref=part_k_ref, part_v_ref=part_v_ref, end=end, part=part) -> None:
                for row, head in pairs:
                    first = prompt[first_row + row, 2 * part]
                    add(row, head, part_k_ref[head], part_v_ref[head], 0, first, end - 1)

    @pl.when((start + sizes.slots > bounds[0]) & (start <= bounds[1]))
    def _() -> None:
        for row, head in pairs:
            add(row, head, k_ref[row, head], v_ref[row, head], start, own[first_row + row, 0], own[first_row + row, 1])

    @pl.when(u == pl.num_programs(2) - 1)
    def _() -> None:
        out_ref[...] = (sums[2][...] / sums[1][...]).astype(out_ref.dtype)
