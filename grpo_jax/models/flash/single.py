"""Attention of each row's newest token, as decoding has it, in one kernel of Pallas's Triton: on GPUs (TPUs: `tpu_newest`).

In plain operations it is a dozen of kernels a layer, each of which waits for the one before, and reads the slots that are empty
as well. Here a program has one head of keys of a few rows of a prompt: it begins with the newest tokens' own keys and values,
writes them to the cache, and goes on over the prompt's keys and the rows' earlier ones, block by block, with a running maximum
(Dao, arXiv 2307.08691). A product has 16 rows at least, so that the queries of several rows cost no more than one's: they read
the prompt together, and each block of a row's own keys is met by all, and seen by that row's. Programs of one prompt stand side
by side, so that its keys come out of the GPU's own cache for all but the first.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.flash import tpu_newest
from grpo_jax.models.flash.attend import on_devices
from grpo_jax.models.flash.call import Call, has_kernels, say_once
from grpo_jax.models.flash.seen import cap_scores, div, dot, rem
from grpo_jax.parallel.hardware import Hardware

UNIT = 64  # caches are whole multiples of it; blocks of every size divide it
MIN_PRODUCT = 16  # rows of the smallest product
MANY_PROGRAMS = 512  # about four for each multiprocessor: with fewer, some stand idle


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Slots at a time, Triton's warps and stages: of bfloat16 heads of 64 and 128 the quickest on an H200."""

    slots: int
    warps: int
    stages: int


def _blocks(x: Array) -> Blocks:
    """Return the sizes for heads [..., H] of this many channels and bytes."""
    bytes_ = x.shape[-1] * x.dtype.itemsize
    if bytes_ > 256:
        return Blocks(32, 4, 2)
    return Blocks(64, 2, 2) if bytes_ > 128 else Blocks(64, 4, 2)


@flax.struct.dataclass
class NewestTokens:
    """Slots that the newest token of each row sees, in a kernel's terms.

    own_B2: int32, (the first of its row's slots that it sees, its own slot). prompt_BX: int32, of each part of the prompts
    (`Prefix`) the first slot that it sees and the end of them; both are 0 in a part that does not have its prompt.
    """

    own_B2: Int[Array, "B 2"]
    prompt_BX: Int[Array, "B X"]
    hardware: Hardware = flax.struct.field(pytree_node=False)


def suits(hardware: Hardware | None, head_dim: int) -> bool:
    """Decide if decoding is by a kernel: on GPUs for heads that are a power of two wide, on TPUs for whole registers."""
    if hardware is None or head_dim % MIN_PRODUCT:
        return False
    if hardware.platform == "gpu":
        return head_dim == 1 << (head_dim.bit_length() - 1) and has_kernels("gpu")
    return hardware.platform == "tpu"


def round_slots(hardware: Hardware | None, num_slots: int) -> int:
    """Return a number of slots of the rows' caches rounded up to whole blocks of the kernel of this hardware."""
    unit = tpu_newest.unit_of(num_slots) if hardware is not None and hardware.platform == "tpu" else UNIT
    return -(-num_slots // unit) * unit


def round_prompt(hardware: Hardware | None, num_slots: int) -> int:
    """Return the same of prompts, which on TPUs are one block of any size."""
    return num_slots if hardware is not None and hardware.platform == "tpu" else round_slots(hardware, num_slots)


def newest_tokens(
    hardware: Hardware | None,
    slot_B: Int[Array, " B"],
    masks_PS: Sequence[Bool[Array, "P S"]],
    lengths_P: Int[Array, " P"],
    window: int | None,
) -> NewestTokens:
    """Return what tokens at these slots of their rows see.

    Args:
      hardware: GPUs. slot_B: the tokens' slots.
      masks_PS: of each part of the left-padded prompts, True on tokens. lengths_P: of all prompts, in tokens.
      window: tokens that a query sees, itself included; None: all before it.
    """
    group_size = len(slot_B) // len(lengths_P)
    length_B = jnp.repeat(lengths_P, group_size)
    first_B = jnp.zeros_like(slot_B) if window is None else jnp.maximum(slot_B - window + 1, 0)
    ends = list(itertools.accumulate(len(mask_PS) * group_size for mask_PS in masks_PS))
    row_B, of_parts = jnp.arange(len(slot_B)), []
    for start, end, mask_PS in zip((0, *ends), ends, masks_PS, strict=False):
        S = mask_PS.shape[1]
        seen_B = S - length_B
        if window is not None:  # counted in slots of the prompt, the token's own is S + slot
            seen_B = jnp.minimum(jnp.maximum(seen_B, S + slot_B - window + 1), S)
        is_here_B = (row_B >= start) & (row_B < end)
        of_parts += [jnp.where(is_here_B, x, 0) for x in (seen_B, jnp.full_like(seen_B, S))]
    assert hardware is not None
    own_B2, prompt_BX = (jnp.stack(x, -1).astype(jnp.int32) for x in ((first_B, slot_B), of_parts))
    return NewestTokens(own_B2, prompt_BX, hardware)


def attend_filled(
    q_BNH: Float[Array, "B N H"],
    cache: tuple[Float[Array, "B K H U"], Float[Array, "B K U H"]],
    prompts: Sequence[tuple[Float[Array, "P K H S"], Float[Array, "P K S H"]]],
    rows: NewestTokens,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B N H"] | None:
    """Do `attend_newest` on TPUs, of a cache that has the newest tokens in it; None if the prompts are too long."""

    def by_lanes(keys_and_values: tuple[Array, Array]) -> tuple[Array, Array]:
        k, v = keys_and_values
        return k, jnp.swapaxes(v, 2, 3)

    arrays = q_BNH, by_lanes(cache), tuple(map(by_lanes, prompts))
    group_size = len(q_BNH) // sum(len(k_PKHS) for k_PKHS, _ in prompts)
    if not tpu_newest.fits(group_size, cache[0], [k_PKHS for k_PKHS, _ in prompts]):
        longest = max(k_PKHS.shape[-1] for k_PKHS, _ in prompts)
        say_once(f"decoding attends by plain operations: a core's memory does not hold prompts of {longest} tokens")
        return None
    run = functools.partial(tpu_newest.attend, scale)
    return on_devices(Call(rows.hardware, 0, cap), run, arrays, (rows.own_B2, rows.prompt_BX))


def attend_newest(
    q_BNH: Float[Array, "B N H"],
    new: tuple[Float[Array, "B K H"], Float[Array, "B K H"]],
    cache: tuple[Float[Array, "B K H U"], Float[Array, "B K U H"]],
    prompts: Sequence[tuple[Float[Array, "P K H S"], Float[Array, "P K S H"]]],
    rows: NewestTokens,
    scale: float,
    cap: float | None = None,
) -> tuple[Float[Array, "B N H"], tuple[Float[Array, "B K H U"], Float[Array, "B K U H"]]]:
    """Attend to the token itself, its row's earlier tokens and its prompt, in one softmax, and write its key and value.

    Args:
      q_BNH: rotated queries. new: key (rotated) and value of the same tokens.
      cache: of the rows' tokens, of whole blocks. prompts: of each part, of whole blocks; rows p*G .. p*G+G-1 see prompt p.
      rows: what they see. scale, cap: of the scores, as in `attention.attend`.
    Returns: (the heads' outputs, the cache with the new token in its slot).
    """
    call = Call(rows.hardware, 0, cap)
    arrays = q_BNH, new, cache, tuple(prompts)
    out_BNH, k_BKHU, v_BKUH = on_devices(call, functools.partial(_run, scale), arrays, (rows.own_B2, rows.prompt_BX))
    return out_BNH, (k_BKHU, v_BKUH)


def _run(scale: float, call: Call, arrays: Any, masks: Any) -> tuple[Array, Array, Array]:
    from jax.experimental import pallas as pl  # only here, as in `attend._kernels`
    from jax.experimental.pallas import triton

    q_BNH, new, cache, prompts = arrays
    own_B2, prompt_BX = masks
    (B, N, H), K = q_BNH.shape, cache[0].shape[1]
    P = sum(len(k_PKHS) for k_PKHS, _ in prompts)
    rows = _rows_at_a_time(B // P, N // K, B * K)
    sets = B // P // rows  # of a prompt's rows

    def of_rows(*block: int | None) -> pl.BlockSpec:
        """Return, of an array [B, heads, ...], what belongs to the program's rows and head of keys."""
        return pl.BlockSpec((rows, *block), lambda g, k, p: (p * sets + g, k, *(0 for _ in block[1:])))

    def numbers(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((rows, x.shape[1]), lambda g, k, p: (p * sets + g, 0))

    def of_prompt(start: int, x: Array) -> pl.BlockSpec:
        last = len(x) - 1
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda g, k, p: (jnp.clip(p - start, 0, last), k, 0, 0))

    starts = itertools.accumulate((len(k_PKHS) for k_PKHS, _ in prompts), initial=0)
    of_prompts = [of_prompt(start, x) for start, part in zip(starts, prompts, strict=False) for x in part]
    of_cache = [of_rows(None, *x.shape[2:]) for x in cache]
    heads = of_rows(N // K, H)
    blocks = _blocks(q_BNH)
    return pl.pallas_call(
        functools.partial(_kernel, call.cap, scale, len(prompts), blocks.slots),
        grid=(sets, K, P),
        in_specs=[heads, *(of_rows(None, H),) * 2, numbers(own_B2), numbers(prompt_BX), *of_prompts, *of_cache],
        out_specs=[heads, *of_cache],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BNH, *cache)],
        input_output_aliases={5 + len(of_prompts): 1, 6 + len(of_prompts): 2},
        name="attend_newest",
        compiler_params=triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=call.hardware.interpret,
    )(q_BNH, *new, own_B2, prompt_BX, *itertools.chain(*prompts), *cache)


def _rows_at_a_time(group_size: int, heads_per_key: int, num_programs: int) -> int:
    """Return how many of a prompt's rows a program has: as fill a product, and still programs for the whole device."""
    sizes = [size for size in range(group_size, 0, -1) if group_size % size == 0 and size * heads_per_key <= MIN_PRODUCT]
    return next((size for size in sizes if num_programs // size >= MANY_PROGRAMS), 1)


def _kernel(
    cap: float | None, scale: float, num_parts: int, block: int, q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any
) -> None:
    from jax.experimental import pallas as pl

    from grpo_jax.models.flash.gpu import add_keys

    own_ref, prompt_ref, *keys, own_k_ref, own_v_ref, out_ref, cached_k_ref, cached_v_ref = refs
    num_rows, num_heads = q_ref.shape[:2]
    # The last head stands for those that fill up the product, and is written again.
    place_M = jnp.minimum(jnp.arange(max(MIN_PRODUCT, pl.next_power_of_2(num_rows * num_heads))), num_rows * num_heads - 1)
    row_M, head_M = div(place_M, num_heads), rem(place_M, num_heads)
    k_MH, v_MH = k_ref[row_M, :], v_ref[row_M, :]
    q_MH = q_ref[row_M, head_M, :] * jnp.asarray(scale, k_MH.dtype)
    for row in range(num_rows):
        slot = own_ref[row, 1]
        cached_k_ref[row, :, slot], cached_v_ref[row, slot, :] = k_ref[row, :], v_ref[row, :]

    def over(k_HU: Any, v_UH: Any, seen_MU: Any, carry: Any) -> Any:
        return add_keys(cap_scores(dot(q_MH, k_HU, (1, 0)), cap)[0], v_UH, seen_MU, carry)

    def slots(number: Any) -> tuple[Any, Any]:
        return pl.ds(number * block, block), number * block + jnp.arange(block)

    f32 = jnp.float32
    top_M = cap_scores((q_MH.astype(f32) * k_MH.astype(f32)).sum(-1), cap)[0]
    carry = top_M, jnp.ones_like(top_M), v_MH.astype(f32)
    for part in range(num_parts):
        part_k_ref, part_v_ref = keys[2 * part : 2 * part + 2]
        # Of a window each row sees another first slot; all see the prompt to its end.
        first_M, end = prompt_ref[row_M, 2 * part], prompt_ref[0, 2 * part + 1]

        def of_prompt(number: Any, carry: Any, refs=(part_k_ref, part_v_ref), first_M=first_M, end=end) -> Any:
            piece, slot_U = slots(number)
            seen_MU = (slot_U[None] >= first_M[:, None]) & (slot_U < end)[None]
            return over(refs[0][:, piece], refs[1][piece, :], seen_MU, carry)

        carry = jax.lax.fori_loop(div(first_M.min(), block), div(end + (block - 1), block), of_prompt, carry)

    # One loop over rows and their blocks: Triton loads ahead in the innermost loop only.
    first_M, end_M = own_ref[row_M, 0], own_ref[row_M, 1]
    start = div(first_M.min(), block)
    num = jnp.maximum(div(end_M.max() + (block - 1), block) - start, 0)

    def of_rows(number: Any, carry: Any) -> Any:
        row, number = div(number, num), rem(number, num)
        piece, slot_U = slots(start + number)
        seen_MU = (slot_U[None] >= first_M[:, None]) & (slot_U[None] < end_M[:, None]) & (row_M == row)[:, None]
        return over(own_k_ref[row, :, piece], own_v_ref[row, piece, :], seen_MU, carry)

    _, total_M, sum_MH = jax.lax.fori_loop(0, num_rows * num, of_rows, carry)
    out_ref[row_M, head_M, :] = (sum_MH / total_M[:, None]).astype(out_ref.dtype)
