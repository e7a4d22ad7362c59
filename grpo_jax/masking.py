"""Masks, and sums, means and standard deviations under them: defined when everything is masked, blind to what is masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax.types import AxisName

Axis = int | tuple[int, ...] | None
ROUNDING = 1e-6  # relative; a few units in the last place of float32


def masked_sum(x, mask, axis: Axis = None, axis_name: AxisName | None = None, keepdims: bool = False):
    """Sum of x where mask > 0; over the devices of `axis_name` too. Masked values may be NaN or infinite."""
    total = jnp.where(mask > 0, x, 0.0).sum(axis, keepdims=keepdims)
    return jax.lax.psum(total, axis_name) if axis_name else total


def masked_mean(x, mask, axis: Axis = None, axis_name: AxisName | None = None, keepdims: bool = False):
    """Mean of x where mask > 0, or 0 where nothing is."""
    total = masked_sum(x, mask, axis, axis_name, keepdims)
    return total / jnp.maximum(masked_sum(jnp.ones_like(x), mask, axis, axis_name, keepdims), 1.0)


def masked_std(x, mask, axis: Axis = None, axis_name: AxisName | None = None, keepdims: bool = False, ddof: int = 1):
    """Standard deviation of x where mask > 0, in two passes; 0 with fewer than ddof + 1 values."""
    centred = x - masked_mean(x, mask, axis, axis_name, keepdims=True)
    count = masked_sum(jnp.ones_like(x), mask, axis, axis_name, keepdims)
    variance = masked_sum(jnp.square(centred), mask, axis, axis_name, keepdims) / jnp.maximum(count - ddof, 1.0)
    return jnp.where(count > ddof, jnp.sqrt(variance), 0.0)


def is_constant(x, mask, axis: Axis = None, axis_name: AxisName | None = None):
    """Whether the values where mask > 0 are one and the same, to float32 rounding; axes are kept. True of no values."""
    highest = jnp.where(mask > 0, x, -jnp.inf).max(axis, keepdims=True)
    lowest = jnp.where(mask > 0, x, jnp.inf).min(axis, keepdims=True)
    if axis_name:
        highest, lowest = jax.lax.pmax(highest, axis_name), jax.lax.pmin(lowest, axis_name)
    return ~(highest - lowest > ROUNDING * jnp.maximum(jnp.abs(highest), jnp.abs(lowest)))


def standardise(x, mask, axis: Axis = None, axis_name: AxisName | None = None, *, ddof: int, eps: float):
    """(x - mean) / (std + eps) over the values where mask > 0.

    0 where the values are all the same (dividing rounding noise by a vanishing std would blow it up), and where there are
    too few of them for a std.
    """
    mean = masked_mean(x, mask, axis, axis_name, keepdims=True)
    std = masked_std(x, mask, axis, axis_name, keepdims=True, ddof=ddof)
    count = masked_sum(jnp.ones_like(x), mask, axis, axis_name, keepdims=True)
    has_spread = (count > ddof) & ~is_constant(x, mask, axis, axis_name)
    return jnp.where(has_spread, (x - mean) / (std + eps), 0.0)
