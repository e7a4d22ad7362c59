"""Metrics that survive being cut into microbatches, devices and steps: sums and counts, never means of means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


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

    def psum(self, axis_name: str) -> Mean:
        return jax.lax.psum(self, axis_name)

    def value(self) -> Any:
        return self.total / np.maximum(self.count, 1e-9)


@flax.struct.dataclass
class Max:
    """The largest value seen."""

    largest: Any

    def merge(self, other: Max) -> Max:
        return Max(jnp.maximum(self.largest, other.largest))

    def psum(self, axis_name: str) -> Max:
        return jax.lax.pmax(self, axis_name)

    def value(self) -> Any:
        return self.largest


Metric = Mean | Max
Metrics = Mapping[str, Metric]


def merge(left: Metrics, right: Metrics) -> dict[str, Metric]:
    """Merge two metric dictionaries; a name that only one of them has is kept."""
    both = {name: _merge_one(left[name], right[name]) for name in left.keys() & right.keys()}
    return {**left, **right, **both}


def _merge_one(left: Any, right: Any) -> Metric:
    return left.merge(right)


def reduce_stacked(stacked: Metrics) -> dict[str, Metric]:
    """Metrics stacked on a leading axis (what `lax.scan` returns) -> one."""

    def reduce_one(metric: Metric) -> Metric:
        if isinstance(metric, Max):
            return Max(metric.largest.max(0))
        return Mean(metric.total.sum(0), metric.count.sum(0))

    return {name: reduce_one(metric) for name, metric in stacked.items()}


def psum(metrics: Metrics, axis_name: str) -> dict[str, Metric]:
    """Reduce over the devices of a mesh axis (inside `shard_map`)."""
    return {name: metric.psum(axis_name) for name, metric in metrics.items()}


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Read the values on the host, sorted by name (one transfer for all of them)."""
    host = jax.device_get(dict(metrics))
    return {name: float(host[name].value()) for name in sorted(host)}
