"""Masks, and sums, means and standard deviations under them: defined when everything is masked, blind to what is masked."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Real, Shaped

from grpo_jax.types import Arrays, AxisName

Axis = int | tuple[int, ...] | None
ROUNDING = 1e-6  # relative; a few units in the last place of float32


def masked_sum(
    x: Real[Arrays, "*axes"],
    mask: Shaped[Arrays, "*#axes"],
    axis: Axis = None,
    axis_name: AxisName | None = None,
    keepdims: bool = False,
) -> Real[jax.Array, "..."]:
    """Add up x where mask > 0, over the devices of `axis_name` too.

    Args:
      x: values; masked ones may be NaN or infinite. mask: > 0 on values that count.
      axis, keepdims: as in NumPy. axis_name: mesh axes, inside `shard_map`.
    Returns: the sum; 0 where everything is masked.
    """
    # A select, not a product: 0 * NaN is NaN. It keeps NaN out of the gradient too.
    total = jnp.where(mask > 0, x, 0.0).sum(axis, keepdims=keepdims)
    return jax.lax.psum(total, axis_name) if axis_name else total


def masked_mean(
    x: Real[Arrays, "*axes"],
    mask: Shaped[Arrays, "*#axes"],
    axis: Axis = None,
    axis_name: AxisName | None = None,
    keepdims: bool = False,
) -> Float[jax.Array, "..."]:
    """Average x where mask > 0.

    Args: those of `masked_sum`.
    Returns: the mean; 0 where everything is masked.
    """
    total = masked_sum(x, mask, axis, axis_name, keepdims)
    # Sum and count are each added over the devices before one division: devices hold different numbers of values.
    return total / jnp.maximum(masked_sum(jnp.ones_like(x), mask, axis, axis_name, keepdims), 1.0)


def masked_std(
    x: Real[Arrays, "*axes"],
    mask: Shaped[Arrays, "*#axes"],
    axis: Axis = None,
    axis_name: AxisName | None = None,
    keepdims: bool = False,
    ddof: int = 1,
) -> Float[jax.Array, "..."]:
    """Compute the standard deviation of x where mask > 0.

    Args: those of `masked_sum`, and
      ddof: the variance is a sum over (count - ddof).
    Returns: the standard deviation; 0 with fewer than ddof + 1 values.
    """
    # Two passes: the mean of squares minus the squared mean loses all digits of float32 to an offset that is large beside
    # the spread.
    centred = x - masked_mean(x, mask, axis, axis_name, keepdims=True)
    count = masked_sum(jnp.ones_like(x), mask, axis, axis_name, keepdims)
    variance = masked_sum(jnp.square(centred), mask, axis, axis_name, keepdims) / jnp.maximum(count - ddof, 1.0)
    return jnp.where(count > ddof, jnp.sqrt(variance), 0.0)


def is_constant(
    x: Real[Arrays, "*axes"], mask: Shaped[Arrays, "*#axes"], axis: Axis = None, axis_name: AxisName | None = None
) -> Bool[jax.Array, "..."]:
    """Tell if all values where mask > 0 are the same, to float32 rounding.

    Args: those of `masked_sum`.
    Returns: bool, reduced axes kept with size 1; True of no values, False with NaN or infinity among them.
    """
    highest = jnp.where(mask > 0, x, -jnp.inf).max(axis, keepdims=True)
    lowest = jnp.where(mask > 0, x, jnp.inf).min(axis, keepdims=True)
    if axis_name:
        highest, lowest = jax.lax.pmax(highest, axis_name), jax.lax.pmin(lowest, axis_name)
    # Relative to the largest value, as equal rewards may differ by rounding once shaping has been added to them. Of no values
    # the highest is -inf and the lowest inf: constant. With NaN or infinity among them nothing is: it must not become a 0.
    is_bounded = (highest < jnp.inf) & (lowest > -jnp.inf)
    return is_bounded & (highest - lowest <= ROUNDING * jnp.maximum(jnp.abs(highest), jnp.abs(lowest)))


def standardise(
    x: Real[Arrays, "*axes"],
    mask: Shaped[Arrays, "*#axes"],
    axis: Axis = None,
    axis_name: AxisName | None = None,
    *,
    ddof: int,
    eps: float,
) -> Float[jax.Array, "..."]:
    """Map values where mask > 0 to (x - mean) / (std + eps).

    Args: those of `masked_sum`, and
      ddof: of the standard deviation. eps: added to it, in the units of x.
    Returns: float32, of x's shape. 0 where the values are all the same (dividing rounding noise by a vanishing std would blow
      it up), and where there are too few of them for a std.
    """
    mean = masked_mean(x, mask, axis, axis_name, keepdims=True)
    std = masked_std(x, mask, axis, axis_name, keepdims=True, ddof=ddof)
    count = masked_sum(jnp.ones_like(x), mask, axis, axis_name, keepdims=True)
    has_spread = (count > ddof) & ~is_constant(x, mask, axis, axis_name)
    return jnp.where(has_spread, (x - mean) / (std + eps), 0.0)
