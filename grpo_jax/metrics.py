"""Metrics that survive being cut into microbatches, devices and steps: sums and counts, never means of means."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.types import AxisName

ROUNDING = 1e-6  # relative; a few units in the last place of float32


@flax.struct.dataclass
class Mean:
    """A weighted mean kept as (total, count); `merge` adds, `value` divides (0 where nothing was counted)."""

    total: Any
    count: Any

    @classmethod
    def of(cls, values: Any, weight: Any = None) -> Mean:
        """Mean of `values` under `weight` (same shape, >= 0; default all ones). Values with weight 0 may be NaN."""
        if weight is None:
            weight = jnp.ones_like(values, dtype=jnp.float32)
        weight = weight.astype(jnp.float32)
        return cls(jnp.where(weight > 0, values * weight, 0.0).sum(), weight.sum())

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def psum(self, axis_name: AxisName) -> Mean:
        return jax.lax.psum(self, axis_name)

    def reduce(self) -> Mean:
        return Mean(self.total.sum(0), self.count.sum(0))

    def value(self) -> Any:
        return self.total / np.maximum(self.count, 1e-9)


@flax.struct.dataclass
class Max:
    """The largest value seen."""

    largest: Any

    def merge(self, other: Max) -> Max:
        return Max(jnp.maximum(self.largest, other.largest))

    def psum(self, axis_name: AxisName) -> Max:
        return jax.lax.pmax(self, axis_name)

    def reduce(self) -> Max:
        return Max(self.largest.max(0))

    def value(self) -> Any:
        return self.largest


@flax.struct.dataclass
class Correlation:
    """Pearson's correlation of x and y, in [-1, 1]; 0 where either has no spread.

    Kept as count, means and centred second moments: plain sums of squares would lose their digits to an offset.
    """

    count: Any
    mean_x: Any
    mean_y: Any
    moment_xx: Any
    moment_yy: Any
    moment_xy: Any

    @classmethod
    def of(cls, x: Any, y: Any, weight: Any) -> Correlation:
        """Of pairs (x, y) under `weight` (all of one shape, weight >= 0). Pairs with weight 0 may be NaN."""
        x, y = (jnp.where(weight > 0, values, 0.0) for values in (x, y))
        zero = jnp.zeros_like(x)
        return cls(weight.astype(jnp.float32), x, y, zero, zero, zero)._pooled(jnp.sum)  # each pair is a part of its own

    def merge(self, other: Correlation) -> Correlation:
        return jax.tree.map(lambda *each: jnp.stack(each), self, other).reduce()

    def psum(self, axis_name: AxisName) -> Correlation:
        return self._pooled(lambda x: jax.lax.psum(x, axis_name))

    def reduce(self) -> Correlation:
        return self._pooled(lambda x: x.sum(0))

    def _pooled(self, total: Callable[[Any], Any]) -> Correlation:
        """The whole, of parts that `total` adds up (Chan, Golub and LeVeque's pairwise update)."""
        count = total(self.count)
        mean_x, mean_y = (total(self.count * mean) / jnp.maximum(count, 1e-9) for mean in (self.mean_x, self.mean_y))
        off_x, off_y = self.mean_x - mean_x, self.mean_y - mean_y
        moments = (
            (self.moment_xx, off_x * off_x),
            (self.moment_yy, off_y * off_y),
            (self.moment_xy, off_x * off_y),
        )
        return Correlation(count, mean_x, mean_y, *(total(inner + self.count * between) for inner, between in moments))

    def value(self) -> Any:
        spread_x = self.moment_xx > self.count * (ROUNDING * self.mean_x) ** 2
        spread_y = self.moment_yy > self.count * (ROUNDING * self.mean_y) ** 2
        scale = np.sqrt(np.maximum(self.moment_xx, 1e-30)) * np.sqrt(np.maximum(self.moment_yy, 1e-30))
        return np.where(spread_x & spread_y, self.moment_xy / scale, 0.0)


Metric = Mean | Max | Correlation
Metrics = Mapping[str, Metric]


def merge(left: Metrics, right: Metrics) -> dict[str, Metric]:
    """Merge two metric dictionaries; a name that only one of them has is kept."""
    both = {name: _merge_one(left[name], right[name]) for name in left.keys() & right.keys()}
    return {**left, **right, **both}


def _merge_one(left: Any, right: Any) -> Metric:
    return left.merge(right)


def reduce_stacked(stacked: Metrics) -> dict[str, Metric]:
    """Metrics stacked on a leading axis (what `lax.scan` returns) -> one."""
    return {name: metric.reduce() for name, metric in stacked.items()}


def unstack_metrics(stacked: Metrics, num: int) -> list[dict[str, Metric]]:
    """Metrics stacked on a leading axis of length num -> one dict for each place on it."""
    return [{name: jax.tree.map(operator.itemgetter(i), metric) for name, metric in stacked.items()} for i in range(num)]


def psum(metrics: Metrics, axis_name: AxisName) -> dict[str, Metric]:
    """Reduce over the devices of a mesh axis (inside `shard_map`)."""
    return {name: metric.psum(axis_name) for name, metric in metrics.items()}


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Read the values on the host, sorted by name (one transfer for all of them)."""
    host = jax.device_get(dict(metrics))
    return {name: float(host[name].value()) for name in sorted(host)}
