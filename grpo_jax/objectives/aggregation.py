"""From per-token losses to one scalar: a weight for each token and ONE global denominator, both functions of the mask only.

Because they do not depend on parameters they are fixed before the backward pass; microbatches and devices then only add
up `sum(loss_BT * weight_BT) / denom`, and how the batch was cut cannot change the result. A function of one's own has the
signature of those below: (obj, mask_BT, max_completion_length) -> (weight_BT, this device's share of the denominator).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from grpo_jax.objectives.functions import Function, find
from grpo_jax.objectives.ratios import Arrays, is_per_row
from grpo_jax.objectives.variants import Objective
from grpo_jax.types import AxisName

Weights = tuple[Float[jax.Array, "B T"], Shaped[jax.Array, ""]]  # of each token, and this device's share of the denominator


def sequence_mean(obj: Objective, mask_BT: Float[jax.Array, "B T"], max_completion_length: int) -> Weights:
    """Every row counts the same: (1/N) sum_i (1/|o_i|) sum_t."""
    del obj, max_completion_length
    # N counts rows that have tokens. A dropped row in it would shrink the step by the share of dropped rows.
    lengths_B1 = mask_BT.sum(-1, keepdims=True)
    return mask_BT / jnp.maximum(lengths_B1, 1.0), (lengths_B1 > 0).sum()


def token_mean(obj: Objective, mask_BT: Float[jax.Array, "B T"], max_completion_length: int) -> Weights:
    """Every token counts the same (DAPO, arXiv 2503.14476, eq. 8)."""
    del obj, max_completion_length
    return mask_BT, mask_BT.sum()


def constant(obj: Objective, mask_BT: Float[jax.Array, "B T"], max_completion_length: int) -> Weights:
    """Divide by the generation budget, not by anything the policy can change (Dr. GRPO, arXiv 2503.20783, listing 1)."""
    del obj
    # Not T either: buckets cut a microbatch to its longest row, and the width would come back as a length bias.
    return mask_BT, mask_BT.any(-1).sum() * max_completion_length


def sequence_sum(obj: Objective, mask_BT: Float[jax.Array, "B T"], max_completion_length: int) -> Weights:
    """Rows count by their number of tokens: (1/N) sum_i sum_t, the log-probability of whole rows (RLOO, arXiv 2402.14740)."""
    del obj, max_completion_length
    return mask_BT, mask_BT.any(-1).sum()


AGGREGATIONS: Mapping[str, Function] = MappingProxyType(
    {
        "sequence_mean": sequence_mean,
        "token_mean": token_mean,
        "constant": constant,
        "sequence_sum": sequence_sum,
    }
)


def token_weights(
    obj: Objective,
    mask_BT: Shaped[Arrays, "B T"],
    *,
    max_completion_length: int,
    axis_name: AxisName | None = None,
) -> tuple[Float[jax.Array, "B T"], Float[jax.Array, ""]]:
    """Turn a mask into weights: loss = sum(loss_BT * weight_BT) / denom, summed over devices.

    Args:
      obj: its `aggregation` is read, and whether its ratio has one value a row. mask_BT: 1 on completion tokens.
      max_completion_length: generation budget, tokens. axis_name: mesh axis to count over, inside `shard_map`.
    Returns: (weight_BT float32, denom float32 scalar: global, at least 1).
    """
    aggregation = obj.aggregation
    # With one value a row there is nothing to average over its tokens; but a row may count by their number.
    if is_per_row(obj) and aggregation != "sequence_sum":
        aggregation = "sequence_mean"
    function = find("aggregation", aggregation, AGGREGATIONS)
    weight_BT, denom = function(obj, jnp.asarray(mask_BT, jnp.float32), max_completion_length)
    denom = jnp.asarray(denom, jnp.float32)
    if axis_name:
        denom = jax.lax.psum(denom, axis_name)
    # At least 1: a batch without any token has loss 0, not 0 / 0.
    return weight_BT, jnp.maximum(denom, 1.0)
