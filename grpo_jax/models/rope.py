"""Rotary position embedding: tables of cosines and sines, the ways in which families slow them down, and the rotation."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from grpo_jax.models.architecture import Rope, Yarn
from grpo_jax.parallel.hardware import target_platform

RopeTables = tuple[Float[Array, "B T 1 halfR"], Float[Array, "B T 1 halfR"]]  # cos, sin


def rope_tables(positions_BT: Int[Array, "B T"], rope: Rope, head_dim: int) -> RopeTables:
    """Compute the cosine and sine of the angle that each position turns each channel pair by.

    Args:
      positions_BT: in tokens. rope: the frequencies. head_dim: H; of its channels `rope.share` turn, R of them.
    Returns: float32 (cos, sin), each [B, T, 1, R/2], times `rope.magnitude`.
    """
    # float32 whatever the compute dtype: around position 1000 a bfloat16 angle is off by up to 2 radians.
    num = int(head_dim * rope.share)
    inverse = _scale_frequencies(rope.theta ** (-jnp.arange(0, num, 2, dtype=jnp.float32) / num), rope)
    angles = positions_BT.astype(jnp.float32)[..., None] * inverse[None, None]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    if rope.magnitude == 1:
        return cos, sin
    return cos * rope.magnitude, sin * rope.magnitude


def query_scale(positions_BT: Int[Array, "B T"], growth: tuple[float, int] | None) -> Float[Array, "B T 1 1"] | None:
    """Return the factor of the queries at these positions, as `Architecture.query_growth` says; None: it is 1."""
    if growth is None:
        return None
    beta, context = growth
    return (1 + beta * jnp.log1p((positions_BT // context).astype(jnp.float32)))[:, :, None, None]


def _scale_frequencies(inverse: Float[Array, " halfR"], rope: Rope) -> Float[Array, " halfR"]:
    """Return the angles a token turns by, in radians, slowed down as `rope` says."""
    if rope.factor == 1:
        return inverse
    if rope.yarn is not None:
        kept = _yarn_kept(rope.yarn, rope.theta, len(inverse))
    elif rope.llama3 is not None:
        # A pair that turns often within the original context says where tokens are relative to each other, and keeps its
        # speed; a slow one would come to angles it has never seen in training.
        low, high, context = rope.llama3
        kept = jnp.clip((inverse * context / (2 * math.pi) - low) / (high - low), 0, 1)  # 1: turns often enough to stay
    else:
        return inverse / rope.factor
    return inverse * (kept + (1 - kept) / rope.factor)


def _yarn_kept(yarn: Yarn, theta: float, num_pairs: int) -> Float[Array, " halfR"]:
    """Return for each channel pair how much of its speed it keeps beyond 1 / factor of it: 1 all, 0 nothing."""

    def pair_of(turns: float) -> float:
        """Return the number, a fraction, of the pair that turns so many times in the original context."""
        return num_pairs * math.log(yarn.context / (turns * 2 * math.pi)) / math.log(theta)

    first, last = pair_of(yarn.beta_fast), pair_of(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bounds are those of the channels, not of the pairs: published models were trained so.
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    if first == last:
        last += 0.001
    return 1 - jnp.clip((jnp.arange(num_pairs, dtype=jnp.float32) - first) / (last - first), 0, 1)


def rotate(x_BTNH: Float[Array, "B T N H"], tables: RopeTables, *, is_interleaved: bool = False) -> Float[Array, "B T N H"]:
    """Turn channel pairs by the angles of the tables; channels behind theirs stay as they are.

    Args:
      x_BTNH: queries or keys. tables: [B, T, 1, R/2] each, R <= H.
      is_interleaved: pairs are channels 2i and 2i + 1; else i and i + R/2 (the half-split layout).
    Returns: the same shape and dtype.
    """
    cos, sin = (table.astype(x_BTNH.dtype) for table in tables)
    num = 2 * cos.shape[-1]
    turning, rest = x_BTNH[..., :num], x_BTNH[..., num:]
    if is_interleaved:
        left, right = turning[..., ::2], turning[..., 1::2]
        turned = jnp.stack([left * cos - right * sin, right * cos + left * sin], -1).reshape(turning.shape)
        return jnp.concatenate([turned, rest], -1)
    if target_platform() == "tpu" and not rest.shape[-1]:
        # By whole heads: XLA:TPU takes two passes to compute halves and to put them together.
        halves = turning.reshape(*turning.shape[:-1], 2, -1)
        of_others = jnp.stack([-sin, sin], -2)
        return (halves * cos[..., None, :] + halves[..., ::-1, :] * of_others).reshape(turning.shape)
    left, right = jnp.split(turning, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin, *([rest] if rest.shape[-1] else [])], -1)
