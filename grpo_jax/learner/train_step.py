"""One batch -> one update: a pure `train_step(state, batch) -> (state, metrics)` over a device mesh.

batch -> advantages (whole groups, global statistics), old and reference log-probs      once per update
      -> epochs x minibatches: weights and ONE denominator -> sum of microbatch gradients -> one psum -> AdamW

Rows are spread over the mesh axes data and fsdp. What fsdp has cut arrives in parts, is gathered layer by layer
(`models.fsdp`), and so do its gradients; AdamW works on parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.learner import batching
from grpo_jax.learner.advantage_diagnostics import advantage_metrics, batch_advantages, trained_mask
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.metrics import Max, Mean, Metric
from grpo_jax.models.transformer import ModelDef
from grpo_jax.objectives import Objective
from grpo_jax.parallel.sharding import (
    REPLICATED,
    ROW_AXES,
    ROWS,
    constrain,
    drop_mesh_axis,
    row_axes,
    shard_map_over_batch,
    specs_of,
    to_memory_space,
    vary_like,
)
from grpo_jax.rng import key_for
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.types import AxisName, Batch, Params, Rollout, TrainState, join_params

TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Metric]]]


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """The static half of an update.

    length_buckets: completion lengths that it is compiled for; each microbatch takes the shortest that fits (`batching`).
    old_logp: "sampler" (what was recorded) or "learner" (one more forward pass). importance_cap: of truncated importance
    sampling, 0: none.
    fsdp_min_elements: smaller weights are not cut (`sharding.param_spec`).
    offload: the optimizer's state waits in the host's memory.
    """

    objective: Objective
    sampling: Sampling
    max_completion_tokens: int
    num_epochs: int
    num_minibatches: int
    num_microbatches: int
    logprob_chunk_tokens: int
    length_buckets: tuple[int, ...]
    old_logp: str
    importance_cap: float
    filter_truncated: bool
    seed: int
    fsdp_min_elements: int
    offload: bool = False


@flax.struct.dataclass
class Target:
    """What the loss needs beside the policy; fixed for the whole update.

    is_fresh_PG: sampled by the very policy that the update starts from (not taken from dynamic sampling's buffer).
    importance_PGT: probability by the learner over that by the sampler, not yet truncated; None with importance_cap 0.
    """

    rollout: Rollout
    is_fresh_PG: Any
    advantage_PGT: Any
    old_logp_PGT: Any
    ref_logp_PGT: Any
    importance_PGT: Any


def make_train_step(model: ModelDef, optimizer: optax.GradientTransformation, spec: UpdateSpec, mesh: Mesh) -> TrainStep:
    """Bind the static parts. The result is pure and jit-able; it does not jit itself, so that it composes."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        axis_name = row_axes(mesh)
        policies = dataclasses.replace(state, opt_state=None, pending=None, next_batch=None)
        parts = drop_mesh_axis(specs_of(policies, mesh, spec.fsdp_min_elements), "tensor")
        prepare = shard_map_over_batch(
            lambda state, batch: make_target(model, state, batch, spec, axis_name=axis_name), mesh, (parts, ROWS), ROWS
        )
        target = prepare(policies, constrain(batch, mesh, ROWS))
        cuts = (parts.params, parts.base) if axis_name else None

        def minibatch_step(carry, minibatch: Target):
            params, opt_state = carry
            grads, metrics = sharded_gradients(params, state.base, constrain(minibatch, mesh, ROWS))
            if spec.offload:
                opt_state = to_memory_space(opt_state, jax.memory.Space.Device)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            if spec.offload:
                opt_state = to_memory_space(opt_state, jax.memory.Space.Host)
            metrics["grad/norm"] = Mean(optax.tree.norm(grads), jnp.float32(1))
            return (optax.apply_updates(params, updates), opt_state), metrics

        sharded_gradients = shard_map_over_batch(
            lambda params, base, minibatch: compute_gradients(model, params, base, minibatch, spec, cuts),
            mesh,
            (parts.params, parts.base, ROWS),
            (parts.params, REPLICATED),
        )
        minibatches = split_minibatches(target, state.step, spec)
        (params, opt_state), stacked = jax.lax.scan(minibatch_step, (state.params, state.opt_state), minibatches)
        metrics = metrics_lib.reduce_stacked(stacked)
        # Only before the first optimizer step do sampler and learner hold the same weights.
        metrics["policy/sampler_logp_gap"] = jax.tree.map(lambda x: x[0], stacked["policy/sampler_logp_gap"])
        metrics.update(advantage_metrics(spec.objective, batch, target.rollout.mask_PGT, target.advantage_PGT))
        return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def make_target(
    model: ModelDef, state: TrainState, batch: Batch, spec: UpdateSpec, axis_name: AxisName | None = None
) -> Target:
    """Batch -> Target: credit and the log-probs that stay fixed. Runs on whole groups, before any split."""
    rollout, obj = batch.rollout, spec.objective
    rollout = dataclasses.replace(rollout, mask_PGT=trained_mask(rollout, spec.filter_truncated))
    P, G, _ = rollout.mask_PGT.shape
    is_fresh_PG = jnp.broadcast_to((batch.sampled_at_P == state.step)[:, None], (P, G))
    old_logp_PGT, entropy_PGT = rollout.sampler_logp_PGT, rollout.entropy_PGT
    if spec.old_logp == "learner":  # of groups that waited in the buffer the sampler was an older policy: its word stands
        scored = logprobs_in_microbatches(model, state.policy, rollout, spec)
        recorded = (old_logp_PGT, entropy_PGT)
        old_logp_PGT, entropy_PGT = (jnp.where(is_fresh_PG[..., None], *pair) for pair in zip(scored, recorded, strict=True))
    adv_PGT = batch_advantages(obj, batch, rollout.mask_PGT, entropy_PGT, axis_name)
    ref_logp_PGT = None
    if obj.has_kl:
        ref_logp_PGT, _ = logprobs_in_microbatches(*reference_policy(model, state), rollout, spec)
    importance_PGT = None
    if spec.importance_cap:  # exactly 1 where the two agree, so also on groups that waited in the buffer
        importance_PGT = jnp.exp(objectives.log_ratio(old_logp_PGT, rollout.sampler_logp_PGT, rollout.mask_PGT))
    return Target(rollout, is_fresh_PG, adv_PGT, old_logp_PGT, ref_logp_PGT, importance_PGT)


def reference_policy(model: ModelDef, state: TrainState) -> tuple[ModelDef, Params]:
    """The policy that the KL penalty pulls towards: a copy of the initial weights, or LoRA's base without its adapters."""
    ref_params = state.ref_params if model.lora is None else state.base
    assert ref_params is not None, "kl_coef > 0 without a reference model in the state"
    return dataclasses.replace(model, lora=None), ref_params


def logprobs_in_microbatches(model: ModelDef, params: Params, rollout: Rollout, spec: UpdateSpec):
    """`policy_logprobs` with the update's peak memory; -> (logp_PGT, entropy_PGT)."""
    shape = rollout.tokens_PGT.shape

    def score_piece(piece: Rollout):
        scored = policy_logprobs(model, params, piece, spec.sampling, spec.logprob_chunk_tokens)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, shape[-1] - x.shape[-1]))), scored)

    def at_own_width(piece: Rollout):
        return batching.run_at_bucket(score_piece, piece, piece.mask_PGT, spec.length_buckets)

    if spec.num_microbatches == 1:
        return at_own_width(rollout)
    order = batching.length_order(rollout.mask_PGT)
    ordered = jax.tree.map(lambda x: x[order], rollout)
    pieces = jax.lax.map(at_own_width, batching.split_microbatches(ordered, ordered, spec.num_microbatches))
    return jax.tree.map(lambda x: x.reshape(shape)[jnp.argsort(order)], pieces)


def compute_gradients(
    model: ModelDef, params: Params, base: Params | None, target: Target, spec: UpdateSpec, parts: tuple[Any, Any] | None = None
):
    """-> (gradient of the global loss by `params`, metrics), both summed over devices once, after all microbatches.

    parts: inside `shard_map_over_batch`, where rows are sharded, the specs of params and base. The gradient of a weight that
    fsdp shards is summed over that axis as it leaves its layer, in every microbatch.
    """
    axis_name = ROW_AXES if parts else None
    mask_PGT = target.rollout.mask_PGT
    T = mask_PGT.shape[-1]
    weight_BT, denom = objectives.weights(
        spec.objective,
        mask_PGT.reshape(-1, T),
        max_completion_length=spec.max_completion_tokens,
        axis_name=axis_name,
    )
    if parts:  # differentiate with respect to this device's copy: otherwise every microbatch would be psummed
        params, base = jax.tree.map(
            lambda x, spec: jax.lax.pcast(x, replicated_axes(spec), to="varying"), (params, base), parts
        )

    def gradients_of(piece_and_weight):
        piece, weight_PGT = piece_and_weight
        (loss, metrics), grads = jax.value_and_grad(
            lambda trained: microbatch_loss(model, join_params(base, trained), piece, weight_PGT, spec), has_aux=True
        )(params)
        metrics["loss/total"] = Mean(loss, jnp.zeros_like(loss))
        return grads, metrics

    def microbatch_gradients(piece_and_weight):
        return batching.run_at_bucket(gradients_of, piece_and_weight, piece_and_weight[0].rollout.mask_PGT, spec.length_buckets)

    pieces = (target, (weight_BT / denom).reshape(mask_PGT.shape))
    if spec.num_microbatches == 1:
        grads, metrics = microbatch_gradients(pieces)
    else:
        order = batching.length_order(mask_PGT)
        pieces = jax.tree.map(lambda x: x[order], pieces)
        pieces = batching.split_microbatches(pieces, target.rollout, spec.num_microbatches)
        shapes = jax.eval_shape(microbatch_gradients, jax.tree.map(lambda x: x[0], pieces))[0]
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        zeros = vary_like(zeros, target.rollout.tokens_PGT)

        def accumulate(total, piece):
            grads, metrics = microbatch_gradients(piece)
            return jax.tree.map(jnp.add, total, grads), metrics

        grads, stacked = jax.lax.scan(accumulate, zeros, pieces)
        metrics = metrics_lib.reduce_stacked(stacked)
    if parts:
        grads = jax.tree.map(lambda grad, spec: jax.lax.psum(grad, replicated_axes(spec)), grads, parts[0])
        metrics = metrics_lib.psum(metrics, ROW_AXES)
    metrics["loss/total"] = dataclasses.replace(metrics["loss/total"], count=jnp.float32(1))
    return grads, metrics


def replicated_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """The axes of rows that a weight is copied over."""
    return tuple(axis for axis in ROW_AXES if axis not in spec)


def microbatch_loss(model: ModelDef, params: Params, target: Target, weight_PGT, spec: UpdateSpec):
    """sum(loss * weight) of one microbatch, the weight being its share of the global loss; and its metrics."""
    rollout = target.rollout
    T = rollout.mask_PGT.shape[-1]
    logp_PGT, entropy_PGT = policy_logprobs(model, params, rollout, spec.sampling, spec.logprob_chunk_tokens)

    def rows(x: Any) -> Any:
        return None if x is None else x.reshape(-1, T)

    mask_BT = rows(rollout.mask_PGT)
    adv_PGT, importance_metrics = weight_by_importance(target, spec.importance_cap)
    loss_BT, aux = objectives.token_loss(
        spec.objective,
        rows(logp_PGT),
        rows(target.old_logp_PGT),
        rows(target.ref_logp_PGT),
        rows(adv_PGT),
        mask_BT,
    )
    gap_PGT = jnp.abs(jax.lax.stop_gradient(logp_PGT) - rollout.sampler_logp_PGT)
    is_fresh_PGT = target.is_fresh_PG[..., None] & (rollout.mask_PGT > 0)
    metrics: dict[str, Metric] = {
        **objectives.loss_metrics(aux, mask_BT),
        **importance_metrics,
        "policy/learner_entropy": Mean.of(entropy_PGT, rollout.mask_PGT),
        "policy/sampler_logp_gap": Max(jnp.where(is_fresh_PGT, gap_PGT, 0.0).max()),
    }
    return (loss_BT * rows(weight_PGT)).sum(), metrics


def weight_by_importance(target: Target, cap: float) -> tuple[Any, dict[str, Metric]]:
    """Truncated importance sampling: each token's policy loss weighs min(learner's / sampler's probability, cap).

    For a sampler of other numerics than the learner's (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"). The weight goes onto the advantage, in a positive factor of which every surrogate is linear.
    -> (advantage_PGT, metrics), as they are with cap 0.
    """
    if target.importance_PGT is None:
        return target.advantage_PGT, {}
    weight_PGT, mask_PGT = jnp.minimum(target.importance_PGT, cap), target.rollout.mask_PGT
    metrics: dict[str, Metric] = {
        "policy/importance_weight": Mean.of(weight_PGT, mask_PGT),
        "policy/importance_capped": Mean.of(target.importance_PGT > cap, mask_PGT),
    }
    return target.advantage_PGT * weight_PGT, metrics


def split_minibatches(target: Target, step, spec: UpdateSpec) -> Target:
    """[P, ...] -> [epochs * minibatches, P / minibatches, ...]: groups in a fresh order each epoch, none left out."""
    P = len(target.advantage_PGT)
    if spec.num_minibatches == 1:
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (spec.num_epochs, *x.shape)), target)
    keys = jax.random.split(key_for(spec.seed, "minibatches", step), spec.num_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, P))(keys)
    order = order.reshape(spec.num_epochs * spec.num_minibatches, P // spec.num_minibatches)
    return jax.tree.map(lambda x: x[order], target)
