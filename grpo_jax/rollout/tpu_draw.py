"""The draw of a token in one kernel, on TPUs: eight rows at a time, of which a core's memory holds all logits.

As operations of their own its passes over [B, V] take a tenth of a token's time and more: maximum, sums of exponentials,
entropy, sums of blocks, the drawn one's block. Here the logits are read once. The distribution is inverted in two steps as in
`search.pick_token`; but a block is not a run of neighbours, which share a register, but one lane of 128 registers in a row:
tokens 128 apart, whose sum is one of registers.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from grpo_jax.models.flash.attend import mesh_of, on_devices
from grpo_jax.models.flash.call import Call
from grpo_jax.models.flash.seen import dot
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.rollout.search import first_above

ROWS, LANES = 8, 128  # of a register
SET = 128  # registers whose lanes are blocks
UNROLLED = 8  # registers at a time
MAX_BYTES = 14 * 2**20  # of the logits in a core's memory


def suits(hardware: Hardware | None, vocab: int) -> bool:
    """Decide if tokens of such a vocabulary are drawn by the kernel."""
    return hardware is not None and hardware.platform == "tpu" and ROWS * 4 * vocab <= MAX_BYTES


def draw_tokens(
    hardware: Hardware, logits_BV: Float[Array, "B V"], uniform_B2: Float[Array, "B 2"]
) -> tuple[Int[Array, " B"], Float[Array, " B"], Float[Array, " B"]]:
    """Draw a token of each row of the distribution exp(logits).

    Args:
      hardware: TPUs. logits_BV: float32, -inf for tokens that are not to be drawn. uniform_B2: from `search.uniforms`.
    Returns: (int32 tokens whose probability is not 0, their log-probabilities, the entropies), [B], nats; token 0 where the
      logits are NaN.
    """
    mesh, (num_rows, vocab) = mesh_of(hardware), logits_BV.shape
    num_devices = 1 if mesh is None else mesh.shape["tensor"]
    # Where `tensor` spreads the vocabulary each device gets some of the rows in full, or all if they cannot be shared. It is
    # said here, for the compiler would gather the head.
    rows = tokens = PartitionSpec()
    if vocab % num_devices == 0:
        tokens = PartitionSpec(None, "tensor")
        rows = PartitionSpec("tensor") if num_rows % num_devices == 0 else rows
    drawn = on_devices(
        Call(hardware, 0, None),
        functools.partial(_draw_here, vocab),
        (logits_BV, uniform_B2),
        (jnp.zeros(1, jnp.int32),),
        (tokens, rows),
        PartitionSpec(),
    )
    token_B1, logp_B1, entropy_B1 = drawn
    return token_B1[:, 0], logp_B1[:, 0], entropy_B1[:, 0]


def _draw_here(vocab: int, call: Call, arrays: Any, masks: Any) -> tuple[Array, Array, Array]:
    """Draw for all rows; logits are of some tokens where `tensor` spreads the vocabulary, numbers of some rows."""
    del masks
    logits_BV, uniform_B2 = arrays
    if logits_BV.shape[1] == vocab:
        return _run(call, logits_BV, uniform_B2)
    if len(uniform_B2) == len(logits_BV):
        return _run(call, jax.lax.all_gather(logits_BV, "tensor", axis=1, tiled=True), uniform_B2)
    drawn = _run(call, jax.lax.all_to_all(logits_BV, "tensor", 0, 1, tiled=True), uniform_B2)
    # Results of some rows would make the compiler spread the rows of all that follows, and read each matrix for fewer of them.
    return tuple(jax.lax.all_gather(x_B1, "tensor", axis=0, tiled=True) for x_B1 in drawn)


def _run(call: Call, logits_BV: Array, uniform_B2: Array) -> tuple[Array, Array, Array]:
    from jax.experimental import pallas as pl  # only here: no CPU needs it, and it takes a second
    from jax.experimental.pallas import tpu as pltpu

    num_rows, vocab = logits_BV.shape
    logits_BV = jnp.pad(logits_BV, ((0, 0), (0, -vocab % LANES)), constant_values=-jnp.inf)
    width = logits_BV.shape[1]
    # The next rows are read while these are drawn, if there is room.
    buffers = 2 if 2 * ROWS * 4 * width <= MAX_BYTES else 1

    def rows(size: int, **mode: Any) -> pl.BlockSpec:
        return pl.BlockSpec((ROWS, size), lambda b: (b, 0), **mode)

    return pl.pallas_call(
        functools.partial(_kernel, width // LANES),
        grid=(pl.cdiv(num_rows, ROWS),),
        in_specs=[rows(width, pipeline_mode=pl.Buffered(buffers)), rows(2)],
        out_specs=[rows(1)] * 3,
        out_shape=[jax.ShapeDtypeStruct((num_rows, 1), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)],
        scratch_shapes=[pltpu.VMEM((-(-width // (LANES * SET)), ROWS, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=call.hardware.interpret,
        name="draw_tokens",
    )(logits_BV, uniform_B2)


def _kernel(
    num_registers: int, logits_ref: Any, uniform_ref: Any, token_ref: Any, logp_ref: Any, entropy_ref: Any, sums_ref: Any
) -> None:
    num_sets = sums_ref.shape[0]
    shape = (ROWS, LANES)
    lane_8L = jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    top_8L = _over(logits_ref, 0, num_registers, lambda x_8L, top_8L: jnp.maximum(top_8L, x_8L), jnp.full(shape, -jnp.inf))
    top_81 = top_8L.max(1, keepdims=True)

    def add(x_8L: Any, carry: Any) -> Any:
        sum_8L, weighted_8L = carry
        below_8L = x_8L - top_81
        p_8L = jnp.exp(below_8L)
        # A token that is ruled out has p = 0 at a logit of -inf, and their product would be NaN.
        return sum_8L + p_8L, weighted_8L + p_8L * jnp.where(x_8L > -jnp.inf, below_8L, 0.0)

    total_81 = weighted_81 = jnp.zeros((ROWS, 1), jnp.float32)
    for number in range(num_sets):
        end = min((number + 1) * SET, num_registers)
        zeros = jnp.zeros(shape, jnp.float32)
        sum_8L, weighted_8L = _over(logits_ref, number * SET, end, add, (zeros, zeros))
        sums_ref[number] = sum_8L
        total_81 += sum_8L.sum(1, keepdims=True)
        weighted_81 += weighted_8L.sum(1, keepdims=True)
    log_total_81 = jnp.log(total_81)
    entropy_ref[...] = log_total_81 - weighted_81 / total_81

    set_81, lane_81 = _pick_block(sums_ref, total_81 * uniform_ref[:, 0:1])
    inside_8J = _of_block(logits_ref, num_registers, num_sets, set_81, lane_81)
    weight_8J = jnp.exp(inside_8J - top_81)
    cumulated_8J = _cumulate(weight_8J)
    place_81 = first_above(weight_8J, cumulated_8J, cumulated_8J[:, LANES - 1 :] * uniform_ref[:, 1:2])
    token_ref[...] = jnp.where(jnp.isnan(top_81), 0, (set_81 * SET + place_81) * LANES + lane_81)
    logit_81 = jnp.where(lane_8L == place_81, inside_8J, 0.0).sum(1, keepdims=True)
    logp_ref[...] = logit_81 - (log_total_81 + top_81)


def _over(logits_ref: Any, first: int, end: int, add: Any, carry: Any) -> Any:
    """Call add(x_8L, carry) -> carry for the registers from first to end."""
    from jax.experimental import pallas as pl

    def several(i: Any, carry: Any) -> Any:
        start = pl.multiple_of((first + i * UNROLLED) * LANES, UNROLLED * LANES)
        x = logits_ref[:, pl.ds(start, UNROLLED * LANES)]
        for n in range(UNROLLED):
            carry = add(x[:, n * LANES : (n + 1) * LANES], carry)
        return carry

    num = (end - first) // UNROLLED
    if num:
        carry = jax.lax.fori_loop(0, num, several, carry)
    for register in range(first + num * UNROLLED, end):
        carry = add(logits_ref[:, register * LANES : (register + 1) * LANES], carry)
    return carry


def _pick_block(sums_ref: Any, target_81: Any) -> tuple[Any, Any]:
    """Return the set and the lane at which the cumulated sums pass a target, a share of the whole."""
    nothing, none_81 = jnp.zeros((ROWS, LANES), jnp.float32), jnp.zeros((ROWS, 1), jnp.float32)
    # A sum need not rise from place to place, by its rounding. So the last set with a weight stands in where none is above.
    set_81, before_81, chosen_8L, so_far_81 = jnp.zeros((ROWS, 1), jnp.int32), none_81, nothing, none_81
    is_found_81 = jnp.zeros((ROWS, 1), bool)
    for number in range(sums_ref.shape[0]):
        sum_8L = sums_ref[number]
        sum_81 = sum_8L.sum(1, keepdims=True)
        is_it_81 = ~is_found_81 & (sum_81 > 0)
        set_81 = jnp.where(is_it_81, number, set_81)
        before_81, chosen_8L = jnp.where(is_it_81, so_far_81, before_81), jnp.where(is_it_81, sum_8L, chosen_8L)
        so_far_81 = so_far_81 + sum_81
        is_found_81 = is_found_81 | (is_it_81 & (so_far_81 > target_81))
    return set_81, first_above(chosen_8L, before_81 + _cumulate(chosen_8L), target_81)


def _of_block(logits_ref: Any, num_registers: int, num_sets: int, set_81: Any, lane_81: Any) -> Any:
    """Return the logits of each row's block, one for each register of its set; -inf behind the last."""
    from jax.experimental import pallas as pl

    lane_8L = jax.lax.broadcasted_iota(jnp.int32, (ROWS, LANES), 1)

    def of_register(j: Any, inside_8J: Any) -> Any:
        chosen_8L = jnp.full((ROWS, LANES), -jnp.inf)
        for number in range(num_sets):
            register = number * SET + j
            start = pl.multiple_of(jnp.minimum(register, num_registers - 1) * LANES, LANES)
            is_it = (set_81 == number) & (register < num_registers)
            chosen_8L = jnp.where(is_it, logits_ref[:, pl.ds(start, LANES)], chosen_8L)
        # A sum of which one summand counts.
        value_81 = jnp.where(lane_8L == lane_81, chosen_8L, 0.0).sum(1, keepdims=True)
        return jnp.where(lane_8L == j, value_81, inside_8J)

    return jax.lax.fori_loop(0, SET, of_register, jnp.zeros((ROWS, SET), jnp.float32))


def _cumulate(x_8L: Any) -> Any:
    shape = (LANES, LANES)
    is_not_behind = jax.lax.broadcasted_iota(jnp.int32, shape, 0) <= jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return dot(x_8L, is_not_behind.astype(jnp.float32), (1, 0))
