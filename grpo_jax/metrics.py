"""Metrics that are the same however a batch is split over microbatches and devices: sums and counts, not means of means."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Real, Shaped

from grpo_jax.masking import ROUNDING
from grpo_jax.types import Arrays, AxisName

# One number, on a device or on the host; `lax.scan` stacks them on a leading axis.
Number = jax.Array | np.ndarray | np.float32


@flax.struct.dataclass
class Mean:
    """A weighted mean kept as (total, count); `merge` adds, `value` divides (0 where nothing was counted)."""

    total: Number
    count: Number

    @classmethod
    def of(cls, values: Real[Arrays, "..."] | Bool[Arrays, "..."], weight: Shaped[Arrays, "..."] | None = None) -> Mean:
        """Mean of `values` under `weight` (same shape, >= 0; default all ones). Values with weight 0 may be NaN."""
        if weight is None:
            weight = jnp.ones_like(values, dtype=jnp.float32)
        weight = weight.astype(jnp.float32)
        # A select, for a weight of 0 times NaN would be NaN.
        return cls(jnp.where(weight > 0, values * weight, 0.0).sum(), weight.sum())

    def merge(self, other: Mean) -> Mean:
        """Return the mean of both."""
        return Mean(self.total + other.total, self.count + other.count)

    def psum(self, axis_name: AxisName) -> Mean:
        """Merge over the devices of a mesh axis."""
        return jax.lax.psum(self, axis_name)

    def reduce(self) -> Mean:
        """Merge over the leading axis."""
        return Mean(self.total.sum(0), self.count.sum(0))

    def value(self) -> Number:
        """Return the mean itself."""
        # The total is 0 wherever the count is, so any small divisor will do.
        return self.total / np.maximum(self.count, 1e-9)


@flax.struct.dataclass
class Max:
    """The largest value seen."""

    largest: Number

    def merge(self, other: Max) -> Max:
        """Return the larger of both."""
        return Max(jnp.maximum(self.largest, other.largest))

    def psum(self, axis_name: AxisName) -> Max:
        """Merge over the devices of a mesh axis. The name is that of the other metrics' method; it is a maximum."""
        return jax.lax.pmax(self, axis_name)

    def reduce(self) -> Max:
        """Merge over the leading axis."""
        return Max(self.largest.max(0))

    def value(self) -> Number:
        """Return the maximum itself."""
        return self.largest


@flax.struct.dataclass
class Correlation:
    """Pearson's correlation of x and y, in [-1, 1]; 0 where either has no spread.

    Kept as count, means and centred second moments: plain sums of squares would lose their digits to an offset.
    """

    count: Number
    mean_x: Number
    mean_y: Number
    moment_xx: Number
    moment_yy: Number
    moment_xy: Number

    @classmethod
    def of(cls, x: Shaped[Arrays, "*axes"], y: Shaped[Arrays, "*axes"], weight: Shaped[Arrays, "*axes"]) -> Correlation:
        """Correlate pairs (x, y) under a weight.

        Args:
          x, y: numbers or bools; pairs with weight 0 may be NaN.
          weight: >= 0.
        Returns: their Correlation.
        """
        x, y = (jnp.where(weight > 0, values, 0.0) for values in (x, y))
        zero = jnp.zeros_like(x)
        # Each pair is first a correlation of its own, with its values for means and no moments, and then all are pooled: one
        # formula serves for pairs, microbatches, devices and steps.
        return cls(weight.astype(jnp.float32), x, y, zero, zero, zero)._pool(jnp.sum)

    def merge(self, other: Correlation) -> Correlation:
        """Return the correlation of all pairs of both."""
        return jax.tree.map(lambda *each: jnp.stack(each), self, other).reduce()

    def psum(self, axis_name: AxisName) -> Correlation:
        """Merge over the devices of a mesh axis."""
        return self._pool(lambda x: jax.lax.psum(x, axis_name))

    def reduce(self) -> Correlation:
        """Merge over the leading axis."""
        return self._pool(lambda x: x.sum(0))

    def _pool(self, total: Callable[[Any], jax.Array]) -> Correlation:
        """Merge the correlations that `total` adds up (Chan, Golub and LeVeque's pairwise update)."""
        count = total(self.count)
        mean_x, mean_y = (total(self.count * mean) / jnp.maximum(count, 1e-9) for mean in (self.mean_x, self.mean_y))
        # A second moment about the common mean is the moments about the own means plus what the means lie apart.
        off_x, off_y = self.mean_x - mean_x, self.mean_y - mean_y
        moments = (
            (self.moment_xx, off_x * off_x),
            (self.moment_yy, off_y * off_y),
            (self.moment_xy, off_x * off_y),
        )
        return Correlation(count, mean_x, mean_y, *(total(inner + self.count * between) for inner, between in moments))

    def value(self) -> np.ndarray:
        """Return the coefficient itself."""
        # Constant values come out of the update with a moment of rounding errors, relative to their mean: no spread.
        spread_x = self.moment_xx > self.count * (ROUNDING * self.mean_x) ** 2
        spread_y = self.moment_yy > self.count * (ROUNDING * self.mean_y) ** 2
        scale = np.sqrt(np.maximum(self.moment_xx, 1e-30)) * np.sqrt(np.maximum(self.moment_yy, 1e-30))
        return np.where(spread_x & spread_y, self.moment_xy / scale, 0.0)


@flax.struct.dataclass
class Std:
    """The standard deviation, with the number of values as divisor; 0 of none. Kept as one half of a Correlation."""

    pooled: Correlation

    @classmethod
    def of(cls, values: Shaped[Arrays, "*axes"], weight: Shaped[Arrays, "*axes"]) -> Std:
        """Std of `values` under `weight` (>= 0); values with weight 0 may be NaN."""
        return cls(Correlation.of(values, values, weight))

    def merge(self, other: Std) -> Std:
        """Return the deviation of the values of both."""
        return Std(self.pooled.merge(other.pooled))

    def psum(self, axis_name: AxisName) -> Std:
        """Merge over the devices of a mesh axis."""
        return Std(self.pooled.psum(axis_name))

    def reduce(self) -> Std:
        """Merge over the leading axis."""
        return Std(self.pooled.reduce())

    def value(self) -> np.ndarray:
        """Return the deviation itself."""
        return np.sqrt(self.pooled.moment_xx / np.maximum(self.pooled.count, 1e-9))


@flax.struct.dataclass
class ShareEntropy:
    """The entropy of shares in nats, mean over rows: log n if all n are equal, 0 if one has all.

    Kept as counts, float32 [rows, n]: the entropy of a part's counts says nothing of the whole's.
    """

    counts: Number

    def merge(self, other: ShareEntropy) -> ShareEntropy:
        """Return that of both."""
        return type(self)(self.counts + other.counts)

    def psum(self, axis_name: AxisName) -> ShareEntropy:
        """Merge over the devices of a mesh axis."""
        return jax.lax.psum(self, axis_name)

    def reduce(self) -> ShareEntropy:
        """Merge over the leading axis."""
        return type(self)(self.counts.sum(0))

    def shares(self) -> np.ndarray:
        """Return each count over its row's sum (0 where nothing was counted)."""
        counts = np.asarray(self.counts)
        return counts / np.maximum(counts.sum(-1, keepdims=True), 1e-9)

    def value(self) -> np.ndarray:
        """Return the entropy itself."""
        shares = self.shares()
        return -(shares * np.log(np.maximum(shares, 1e-30))).sum(-1).mean()


@flax.struct.dataclass
class ShareMax(ShareEntropy):
    """The largest share over the mean share, of the row where it is largest: 1 if all are equal, n if one has all."""

    def value(self) -> np.ndarray:
        """Return the ratio itself."""
        shares = self.shares()
        return shares.max() * shares.shape[-1]


Metric = Mean | Max | Correlation | Std | ShareEntropy
Metrics = Mapping[str, Metric]


def merge(left: Metrics, right: Metrics) -> dict[str, Metric]:
    """Merge two metric dictionaries; a name that only one of them has is kept."""
    # In the order of `left`: that of a set is another one in every process, and so would be their programs.
    both = {name: _merge_one(left[name], right[name]) for name in left if name in right}
    return {**left, **right, **both}


def _merge_one(left: Any, right: Any) -> Metric:  # of one type, which a union cannot say
    return left.merge(right)


def reduce_stacked(stacked: Metrics) -> dict[str, Metric]:
    """Merge metrics that are stacked on a leading axis, as `lax.scan` returns them."""
    return {name: metric.reduce() for name, metric in stacked.items()}


def unstack_metrics(stacked: Metrics, num: int) -> list[dict[str, Metric]]:
    """Split metrics that are stacked on a leading axis of length num into one dict for each place on it."""
    return [{name: jax.tree.map(operator.itemgetter(i), metric) for name, metric in stacked.items()} for i in range(num)]


def psum(metrics: Metrics, axis_name: AxisName) -> dict[str, Metric]:
    """Reduce over the devices of a mesh axis (inside `shard_map`)."""
    return {name: metric.psum(axis_name) for name, metric in metrics.items()}


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Read the values on the host, sorted by name (one transfer for all of them)."""
    host = jax.device_get(dict(metrics))
    return {name: float(host[name].value()) for name in sorted(host)}
