"""From per-token losses to one scalar: a weight for each token and ONE global denominator, both functions of the mask only.

Because they do not depend on parameters they are fixed before the backward pass; microbatches and devices then only add
up `sum(loss_BT * weight_BT) / denom`, and how the batch was cut cannot change the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.types import AxisName


def sequence_mean(mask_BT, max_completion_length: int):
    """Every row counts the same: (1/N) sum_i (1/|o_i|) sum_t."""
    del max_completion_length
    lengths_B1 = mask_BT.sum(-1, keepdims=True)
    return mask_BT / jnp.maximum(lengths_B1, 1.0), (lengths_B1 > 0).sum()


def token_mean(mask_BT, max_completion_length: int):
    """Every token counts the same (DAPO, arXiv 2503.14476, eq. 8)."""
    del max_completion_length
    return mask_BT, mask_BT.sum()


def constant(mask_BT, max_completion_length: int):
    """Divide by the generation budget, not by anything the policy can change (Dr. GRPO, arXiv 2503.20783, listing 1)."""
    return mask_BT, mask_BT.any(-1).sum() * max_completion_length


def sequence_sum(mask_BT, max_completion_length: int):
    """Rows count by their number of tokens: (1/N) sum_i sum_t, the log-probability of whole rows (RLOO, arXiv 2402.14740)."""
    del max_completion_length
    return mask_BT, mask_BT.any(-1).sum()


AGGREGATIONS: Mapping[str, Callable[[Any, int], tuple[Any, Any]]] = MappingProxyType(
    {"sequence_mean": sequence_mean, "token_mean": token_mean, "constant": constant, "sequence_sum": sequence_sum}
)


def token_weights(aggregation: str, mask_BT, *, max_completion_length: int, axis_name: AxisName | None = None):
    """-> (weight_BT, denom): loss = sum(loss_BT * weight_BT) / denom, summed over devices; denom >= 1 is global."""
    weight_BT, denom = AGGREGATIONS[aggregation](jnp.asarray(mask_BT, jnp.float32), max_completion_length)
    denom = jnp.asarray(denom, jnp.float32)
    return weight_BT, jnp.maximum(jax.lax.psum(denom, axis_name) if axis_name else denom, 1.0)
