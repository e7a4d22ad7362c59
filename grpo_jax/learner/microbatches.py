"""Gradients of microbatches, added up one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from grpo_jax import metrics as metrics_lib
from grpo_jax.learner import batching
from grpo_jax.metrics import Metric
from grpo_jax.parallel import context
from grpo_jax.parallel.sharding import vary_like
from grpo_jax.types import Leaf, Params

# Groups (a `train_step.Target`) with the weight of each token, float32[P, G, T], over the global denominator; loops stack them.
Pieces = tuple[Any, Float[Leaf, "P G T"]]
# (microbatch, the sum so far or None) -> (the sum with the microbatch's gradients, metrics)
AddGradients = Callable[[Pieces, Params | None], tuple[Params, dict[str, Metric]]]
Loss = Callable[..., tuple[Float[jax.Array, ""], dict[str, Metric]]]
IN_PLACE = ("layers", "embed", "head")  # parameters whose gradient a model adds to a sum as it is made


def add_gradients(
    loss_of: Loss, params: Params, total: Params | None, *, in_place: bool
) -> tuple[tuple[Float[jax.Array, ""], dict[str, Metric]], Params]:
    """Differentiate a loss, and add the gradient to a sum.

    Args:
      loss_of: (params, sums) -> (scalar, metrics); sums are what the gradients of IN_PLACE are added to, or not given.
      params: what is trained. total: the sum so far, None before the first. in_place: it is given to the loss.
    Returns: ((loss, metrics), the sum).
    """
    if total is None or not in_place:
        found, grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        return found, grads if total is None else jax.tree.map(jnp.add, total, grads)
    layers, others = params["layers"], {name: x for name, x in params.items() if name != "layers"}

    def loss_of_others(others: Params, sums: Params) -> tuple[jax.Array, dict[str, Metric]]:
        return loss_of({**others, "layers": layers}, sums)

    differentiate = jax.value_and_grad(loss_of_others, (0, 1), has_aux=True)
    found, (grads, sums) = differentiate(others, {name: total[name] for name in IN_PLACE if name in total})
    # Of a table read in another way than in place there is a gradient of its own, else zeros, which the compiler leaves out.
    so_far = {name: sums[name] if name in sums else total[name] for name in others}
    return found, {**jax.tree.map(jnp.add, so_far, grads), "layers": sums["layers"]}


def sum_over(
    gradients_of: AddGradients, pieces: Pieces, num_microbatches: int, buckets: tuple[int, ...]
) -> tuple[Params, dict[str, Metric]]:
    """Add up gradients over microbatches, each at the shortest bucket that holds it.

    Groups are sorted by length first: neighbours then need about the same bucket, and short microbatches cost little. Where
    few prompts are long, microbatches have short prompts only, or long ones.

    Args:
      gradients_of: of a microbatch. pieces: all of this device's groups, with the weights of their tokens.
      num_microbatches: that they are split into. buckets: widths in tokens, as in `batching.run_at_bucket`.
    Returns: (sum of gradients, merged metrics).
    """
    _, parts = batching.split_by_prompts(pieces, pieces[0].rollout, num_microbatches)
    (grads, metrics), *others = (_sum_at_one_width(gradients_of, *part, buckets) for part in parts)
    for more_grads, more_metrics in others:
        grads = jax.tree.map(jnp.add, grads, more_grads)
        metrics = metrics_lib.merge(metrics, more_metrics)
    return grads, metrics


def _sum_at_one_width(
    gradients_of: AddGradients, pieces: Pieces, num_microbatches: int, buckets: tuple[int, ...]
) -> tuple[Params, dict[str, Metric]]:
    """Do `sum_over` for groups whose prompts have one width."""

    def add(total: Params | None, piece: Pieces) -> tuple[Params, dict[str, Metric]]:
        return batching.run_at_bucket(lambda cut: gradients_of(cut, total), piece, piece[0].rollout.mask_PGT, buckets)

    if num_microbatches == 1:
        return add(None, pieces)
    rollout = pieces[0].rollout
    order = batching.length_order(rollout.mask_PGT)
    pieces = jax.tree.map(lambda x: x[order], pieces)
    pieces = batching.split_microbatches(pieces, rollout, num_microbatches)
    # The sum begins at zeros and not at the first microbatch, which would be compiled a second time outside of the scan.
    shapes = jax.eval_shape(lambda piece: add(None, piece)[0], jax.tree.map(lambda x: x[0], pieces))
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    zeros = vary_like(zeros, rollout.tokens_PGT + context.rank_here())
    grads, stacked = jax.lax.scan(add, zeros, pieces)
    return grads, metrics_lib.reduce_stacked(stacked)
