"""Searches along a vocabulary: the token at a place of the distribution, and the logit that a share of it reaches down to."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from grpo_jax.parallel.sharding import in_full_over_tensor

# Tokens that are summed at a time. The relative error of a block's sum is at most 127 x 2^-24, and cumulating some thousand
# blocks adds about 11 x 2^-24 of the whole; one running sum over a vocabulary could be wrong by a percent.
BLOCK = 128


def block_sums(x_CV: Float[jax.Array, "C V"]) -> Float[jax.Array, "C N"]:
    """Sum each BLOCK of neighbours; tokens behind the last whole block stay single."""
    num, vocab = x_CV.shape
    end = vocab - vocab % BLOCK
    return jnp.concatenate([x_CV[:, :end].reshape(num, -1, BLOCK).sum(-1), x_CV[:, end:]], axis=1)


def uniforms(keys_B: Key[jax.Array, " B"]) -> Float[jax.Array, "B 2"]:
    """Draw two numbers in (0, 1) for each key: (k + 1/2) / 2^23, so that neither end is ever drawn."""
    bits_B2 = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys_B)
    return ((bits_B2 >> 9).astype(jnp.float32) + 0.5) * 2.0**-23


def pick_token(
    logits_BV: Float[jax.Array, "B V"],
    top_B1: Float[jax.Array, "B 1"],
    sums_BN: Float[jax.Array, "B N"],
    uniform_B2: Float[jax.Array, "B 2"],
) -> Int[jax.Array, " B"]:
    """Invert the cumulated distribution exp(logits) in two steps: the first number finds the block, the second the token in it.

    Of float32 numbers one alone would find 2^23 places only, which for tokens of a probability of 1e-5 is an error of percents.
    Here the probability of a block is off by at most 2^-23 and its rounding, and of a token within its block likewise.

    Args:
      logits_BV: -inf for tokens that are not to be drawn. top_B1: the largest of each row.
      sums_BN: `block_sums` of exp(logits_BV - top_B1).
      uniform_B2: from `uniforms`.
    Returns: int32 tokens below V whose probability is not 0; 0 where the logits are NaN.
    """
    num_blocks = logits_BV.shape[-1] // BLOCK
    # Of sums that are spread over devices jax 0.12 makes cumulated ones by a loop, of a turn for each of them.
    block_B = _first_above(in_full_over_tensor(sums_BN), uniform_B2[:, 0])
    if not num_blocks:
        return block_B
    # Only this block is looked at one by one: no [B, V] of cumulated sums is ever made. And it is taken by its number: a slice
    # that begins at a traced token would be gathered whole from the devices that `tensor` spreads the vocabulary over.
    number_B = jnp.minimum(block_B, num_blocks - 1)
    start_B = BLOCK * number_B
    blocks_BNI = logits_BV[:, : num_blocks * BLOCK].reshape(len(logits_BV), num_blocks, BLOCK)
    inside_BI = jnp.take_along_axis(blocks_BNI, number_B[:, None, None], axis=1)[:, 0]
    place_B = _first_above(jnp.exp(inside_BI - top_B1), uniform_B2[:, 1])
    return jnp.where(block_B < num_blocks, start_B + place_B, block_B + num_blocks * (BLOCK - 1))


def least_kept(
    logits_BV: Float[jax.Array, "B V"], mass_above: Callable[[Float[jax.Array, "B 1"]], jax.Array], limit_B: Array
) -> Float[jax.Array, " B"]:
    """Find the smallest logit of each row above which there is less than `limit_B`.

    Args:
      logits_BV: float32. mass_above: bounds [B, 1] -> number or probability of each row's tokens above its bound, [B].
      limit_B: of the same unit, above 0.
    Returns: float32 [B], one of the row's logits; -inf if the whole row has less.
    """
    # Bisection over the floats themselves: in the order of their bits there are 2^32, so 32 passes over the row find exactly
    # the logit that sorting it would, in a fraction of the time.
    at_top_B = _to_ordered(logits_BV.max(-1))
    below_all_B = jnp.full_like(at_top_B, _to_ordered(jnp.float32(-jnp.inf)) - 1)

    def halve(_: Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        too_low_B, enough_B = bounds
        # Half of the sum, rounded up, without the sum itself: it may be too large for an int32.
        middle_B = (too_low_B >> 1) + (enough_B >> 1) + ((too_low_B | enough_B) & 1)
        is_enough_B = mass_above(_from_ordered(middle_B)[:, None]) < limit_B
        return jnp.where(is_enough_B, too_low_B, middle_B), jnp.where(is_enough_B, middle_B, enough_B)

    return _from_ordered(jax.lax.fori_loop(0, 32, halve, (below_all_B, at_top_B))[1])


def argmax(x_BV: Float[jax.Array, "B V"]) -> Int[jax.Array, " B"]:
    """Find the first maximum's index; 0 if there is a NaN. On a CPU XLA's own takes four times as long."""
    # Two reductions over stored values.
    x_BV = jax.lax.optimization_barrier(x_BV)
    vocab = x_BV.shape[-1]
    first_B = jnp.where(x_BV >= x_BV.max(-1, keepdims=True), jnp.arange(vocab)[None], vocab).min(-1)
    return jnp.where(first_B < vocab, first_B, 0)


def _first_above(weight_BN: Float[jax.Array, "B N"], uniform_B: Float[jax.Array, " B"]) -> Int[jax.Array, " B"]:
    """Find the first place whose cumulated weight is above a share of the whole; its own weight is not 0."""
    cumulated_BN = jnp.cumsum(weight_BN, -1)
    return first_above(weight_BN, cumulated_BN, (uniform_B * cumulated_BN[:, -1])[:, None])[:, 0]


def first_above(
    weight_BN: Float[jax.Array, "B N"], cumulated_BN: Float[jax.Array, "B N"], target_B1: Float[jax.Array, "B 1"]
) -> Int[jax.Array, "B 1"]:
    """Find the first place whose cumulated weight is above a target; its own weight is not 0. In a kernel, too."""
    places_BN = jax.lax.broadcasted_iota(jnp.int32, weight_BN.shape, 1)
    has_weight_BN = weight_BN > 0
    is_first_BN = (cumulated_BN > target_B1) & has_weight_BN
    first_B1 = jnp.where(is_first_BN, places_BN, weight_BN.shape[-1]).min(-1, keepdims=True)
    # A parallel sum need not rise from place to place, by its rounding. So the last place with a weight stands in where none
    # is above, and place 0 where there is no weight at all: with logits of NaN no comparison is true.
    return jnp.minimum(first_B1, jnp.where(has_weight_BN, places_BN, 0).max(-1, keepdims=True))


def _to_ordered(x: Float[jax.Array, "*x"]) -> Int[jax.Array, "*x"]:
    """Map floats to int32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered(x: Int[jax.Array, "*x"]) -> Float[jax.Array, "*x"]:
    """Undo `_to_ordered`."""
    return jax.lax.bitcast_convert_type(x ^ ((x >> 31) & 0x7FFFFFFF), jnp.float32)
