"""One batch -> one update: a pure `train_step(state, batch) -> (state, metrics)` over a device mesh.

batch -> advantages (whole groups, global statistics), old and reference log-probs      once per update
      -> epochs x minibatches: weights and ONE denominator -> sum of microbatch gradients -> one psum -> AdamW

Rows are sharded over the mesh axes data, fsdp and expert, tokens over context. Weights that fsdp shards are gathered layer by
layer (`models.fsdp`), and their gradients are scattered again; AdamW works on shards.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int, PyTree

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.config import Config, LearnerConfig
from grpo_jax.learner import batching, microbatches
from grpo_jax.learner.adaptation import adapt, refresh_reference
from grpo_jax.learner.advantage_diagnostics import advantage_metrics, batch_advantages, subtract_kl, trained_mask
from grpo_jax.learner.hyperparams import with_hyperparams
from grpo_jax.learner.logprobs import logprobs_and_routing, policy_logprobs
from grpo_jax.metrics import Max, Mean, Metric, ShareEntropy, ShareMax
from grpo_jax.models.experts import Routing, share_elsewhere
from grpo_jax.models.transformer import ModelDef
from grpo_jax.objectives import Objective
from grpo_jax.objectives.one_of import OneOf, choose
from grpo_jax.parallel import context
from grpo_jax.parallel.hardware import target_platform
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
    vary_over,
)
from grpo_jax.rng import key_for
from grpo_jax.rollout.rollout import sampling_of
from grpo_jax.types import Arrays, AxisName, Batch, Hyperparams, Leaf, Params, Rollout, TrainState, join_params

MakeOptimizer = Callable[[Hyperparams], optax.GradientTransformation]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Metric]]]


@flax.struct.dataclass
class Target:
    """All that the loss needs beside the policy; fixed for the whole update.

    advantage_PGT: float32. old_logp_PGT, ref_logp_PGT: float32 nats; ref_logp_PGT is None without a KL.
    is_fresh_PG: sampled by the very policy that the update starts from (not taken from dynamic sampling's buffer).
    importance_PGT: probability by the learner over that by the sampler, at importance_level, not yet bounded; None with
      importance_cap 0.
    penalised_PGT: tokens whose |log w| the loss penalises; None without cov_penalty.
    """

    rollout: Rollout
    is_fresh_PG: Bool[Leaf, "P G"]
    advantage_PGT: Float[Leaf, "P G T"]
    old_logp_PGT: Float[Leaf, "P G T"]
    ref_logp_PGT: Float[Leaf, "P G T"] | None
    importance_PGT: Float[Leaf, "P G T"] | None
    penalised_PGT: Bool[Leaf, "P G T"] | None = None


def make_train_step(
    model: ModelDef, make_optimizer: MakeOptimizer, config: Config, mesh: Mesh, several: OneOf | None = None
) -> TrainStep:
    """Bind the static parts. The result is pure and jit-able; it does not jit itself, so that it composes.

    Args:
      model: decoder, with its adapters if only these are trained. make_optimizer: from the numbers in the state.
      config: objective, learner, rollout (distribution and budget), overlong.filter, optimizer.offload and
        mesh.fsdp_min_elements are read; the fields of `Hyperparams` are not, they come from the state.
      mesh: rows are sharded over its axes data and fsdp, weights over fsdp and tensor.
      several: objectives in place of the config's, of which `state.hyperparams.objective` names the one that holds.
    Returns: train_step(state, batch) -> (state, metrics of the update).
    """
    objective = config.objective if several is None else several
    axis_name = row_axes(mesh)
    min_elements = config.mesh.fsdp_min_elements

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        assert state.hyperparams is not None, "a state to train with has its hyperparams"
        optimizer = make_optimizer(state.hyperparams)
        # Into shard_map goes only what the log-probabilities read. Its specs name the axes that are manual there: data, fsdp.
        policies = dataclasses.replace(state, opt_state=None, pending=None, next_batch=None, later_batches=())
        parts = drop_mesh_axis(specs_of(policies, mesh, min_elements), "tensor")
        prepare = shard_map_over_batch(
            lambda state, batch: make_target(model, state, batch, config, axis_name, several), mesh, (parts, ROWS), ROWS
        )
        target = prepare(policies, constrain(batch, mesh, ROWS))
        obj = with_hyperparams(objective, state.hyperparams, state.adapted)
        trained = target.rollout.mask_PGT, target.rollout.entropy_PGT, target.advantage_PGT
        adapted, next_adapted, adapted_metrics = adapt(obj, state.adapted, *trained, config.rollout.max_completion_tokens)
        shards = (parts.params, parts.base) if axis_name else None

        def minibatch_step(carry, minibatch: Target):
            params, opt_state = carry
            numbers = state.hyperparams, adapted
            grads, metrics = sharded_gradients(params, state.base, numbers, constrain(minibatch, mesh, ROWS))
            loss = metrics["loss/total"].total
            carry, updated = apply_gradients(optimizer, (params, opt_state), grads, loss, is_offloaded=config.optimizer.offload)
            return carry, {**metrics, **updated}

        sharded_gradients = shard_map_over_batch(
            lambda params, base, numbers, minibatch: compute_gradients(
                model, params, base, minibatch, with_hyperparams(objective, *numbers), config, shards
            ),
            mesh,
            (parts.params, parts.base, REPLICATED, ROWS),
            (parts.params, REPLICATED),
        )
        # A scan, so that one minibatch is compiled and not all epochs x minibatches of them.
        minibatches = split_minibatches(target, state.hyperparams.seed, state.step, config.learner)
        (params, opt_state), stacked = jax.lax.scan(minibatch_step, (state.params, state.opt_state), minibatches)
        metrics = metrics_of_minibatches(stacked)
        metrics |= advantage_metrics(obj, batch, target.rollout.mask_PGT, target.advantage_PGT)
        moving_ref = refresh_reference(state.moving_ref, params, state.step + 1, config.learner)
        state = dataclasses.replace(state, params=params, opt_state=opt_state, adapted=next_adapted, moving_ref=moving_ref)
        return dataclasses.replace(state, step=state.step + 1), metrics | adapted_metrics

    return train_step


def metrics_of_minibatches(stacked: dict[str, Metric]) -> dict[str, Metric]:
    """Reduce the metrics of an update's minibatches, which are stacked, to one of each name."""
    metrics = metrics_lib.reduce_stacked(stacked)
    # Only before the first optimizer step do sampler and learner hold the same weights.
    for name in ("policy/sampler_logp_gap", "experts/sampler_differs"):
        if name in stacked:
            metrics[name] = jax.tree.map(lambda x: x[0], stacked[name])
    return metrics


def apply_gradients(
    optimizer: optax.GradientTransformation,
    carry: tuple[Params, PyTree],
    grads: Params,
    loss: Float[jax.Array, ""],
    *,
    is_offloaded: bool,
) -> tuple[tuple[Params, PyTree], dict[str, Metric]]:
    """Take one optimizer step, or leave everything as it was if the gradient's norm or the loss is not finite.

    Args:
      optimizer: of the carry's state. carry: (params, optimizer state). grads: like params. loss: that they are of.
      is_offloaded: the optimizer's state is in the host's memory.
    Returns: (the new carry, metrics: grad/norm, and update/skipped, 1 if nothing was done).
    """
    params, opt_state = carry
    # Adam's moments are twice the weights: with offload they visit the device for the update only.
    if is_offloaded:
        opt_state = to_memory_space(opt_state, jax.memory.Space.Device)
    norm = optax.tree.norm(grads)
    # Judged on the device, where the host need not wait for it, and by the gradient: the new weights would have to exist beside
    # the old ones until then. With a finite gradient, and settings in the ranges of `OptimizerConfig`, AdamW's update is finite
    # too.
    is_finite = jnp.isfinite(norm) & jnp.isfinite(loss)

    def update(params: Params, opt_state: PyTree) -> tuple[Params, PyTree]:
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    if target_platform() == "cpu":
        # A branch: XLA's CPU loops would hold new moments beside the old ones for a select, 14 % more for SmolLM2's shape.
        params, opt_state = jax.lax.cond(is_finite, update, lambda *kept: kept, params, opt_state)
    else:
        # A select: XLA:GPU copies what goes into a branch, weights and moments, a third of the memory of an update of
        # Qwen2.5-0.5B; here the loop that makes a new number writes it in place of the old one.
        new = update(params, opt_state)
        params, opt_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, (params, opt_state))
    if is_offloaded:
        opt_state = to_memory_space(opt_state, jax.memory.Space.Host)
    one = jnp.float32(1)
    metrics: dict[str, Metric] = {"grad/norm": Mean(norm, one), "update/skipped": Mean(1.0 - is_finite, one)}
    return (params, opt_state), metrics


def make_target(
    model: ModelDef,
    state: TrainState,
    batch: Batch,
    config: Config,
    axis_name: AxisName | None = None,
    several: OneOf | None = None,
) -> Target:
    """Compute what stays fixed during an update: advantages, old and reference log-probabilities.

    It runs on whole groups, before any split: a microbatch of one row must not turn a group statistic into another one.

    Args:
      model: decoder. state: the policy, its reference and the hyperparams. batch: whole groups, on this device.
      config, several: as in `make_train_step`. axis_name: mesh axes that batch statistics go over, inside `shard_map`.
    Returns: the Target of the batch.
    """
    assert state.hyperparams is not None
    obj = with_hyperparams(config.objective if several is None else several, state.hyperparams, state.adapted)
    # A smaller mask and not a smaller batch, whose shape is static: rows that are filtered out weigh nothing from here on.
    mask_PGT = trained_mask(batch, config.overlong.filter)
    rollout = dataclasses.replace(batch.rollout, mask_PGT=mask_PGT)
    P, G, _ = mask_PGT.shape
    is_fresh_PG = jnp.broadcast_to((batch.sampled_at_P == state.step)[:, None], (P, G))
    old_logp_PGT, entropy_PGT = rollout.sampler_logp_PGT, rollout.entropy_PGT
    if config.learner.old_logp == "learner":
        # Recomputed, they are the current policy's; `importance_cap` weighs what has changed since sampling (decoupled PPO,
        # Hilton et al. 2022). Groups that waited in the buffer have the ratio over the policy that sampled them: the recorded.
        is_due_P1 = (batch.sampled_at_P >= state.step - config.async_steps)[:, None]
        recomputed = logprobs_in_microbatches(model, state.policy, rollout, config)
        recorded = (old_logp_PGT, entropy_PGT)
        old_logp_PGT, entropy_PGT = (jnp.where(is_due_P1[..., None], *pair) for pair in zip(recomputed, recorded, strict=True))
    ref_logp_PGT = None
    if obj.needs_reference:
        ref_logp_PGT, _ = logprobs_in_microbatches(*reference_policy(model, state), rollout, config)

    def credit(obj: Objective) -> tuple[jax.Array, jax.Array | None]:
        # A KL in the reward is part of what the advantage is made of; success and O+/O- still look at the task's reward alone.
        paid_batch = subtract_kl(obj, batch, old_logp_PGT, ref_logp_PGT, mask_PGT)
        adv_PGT = batch_advantages(obj, paid_batch, mask_PGT, entropy_PGT, old_logp_PGT, axis_name)
        by_row = (x.reshape(P * G, -1) for x in (adv_PGT, old_logp_PGT, mask_PGT))
        penalised_BT = objectives.penalised_tokens(obj, *by_row, axis_name=axis_name)
        return adv_PGT, penalised_BT if penalised_BT is None else penalised_BT.reshape(mask_PGT.shape)

    adv_PGT, penalised_PGT = choose(obj, credit)
    importance_PGT = None
    if config.learner.importance_cap:  # exactly 1 where the two agree, so also on groups that waited in the buffer
        log_ratio_PGT = objectives.log_ratio(old_logp_PGT, rollout.sampler_logp_PGT, mask_PGT)
        importance_PGT = objectives.sampler_ratio(log_ratio_PGT, mask_PGT, config.learner.importance_level)
    return Target(rollout, is_fresh_PG, adv_PGT, old_logp_PGT, ref_logp_PGT, importance_PGT, penalised_PGT)


def reference_policy(model: ModelDef, state: TrainState) -> tuple[ModelDef, Params]:
    """The policy that the KL penalty pulls towards: an earlier one, the initial one, or LoRA's base without its adapters."""
    if state.moving_ref is not None:
        return model, join_params(state.base, state.moving_ref)
    ref_params = state.ref_params if model.lora is None else state.base
    assert ref_params is not None, "a KL without a reference model in the state"
    return dataclasses.replace(model, lora=None), ref_params


def logprobs_in_microbatches(
    model: ModelDef, params: Params, rollout: Rollout, config: Config
) -> tuple[Float[jax.Array, "P G T"], Float[jax.Array, "P G T"]]:
    """Compute `policy_logprobs` in microbatches, as the gradients are: it takes no more memory than they do.

    Args:
      model, params: the policy. rollout: completions [P, G, T] with their prompts.
      config: learner (microbatches, buckets, chunks) and the rollout's distribution are read.
    Returns: (logp_PGT, entropy_PGT), float32 nats.
    """
    shape = rollout.tokens_PGT.shape
    buckets = buckets_of(config)

    def logprobs_of(piece: Rollout) -> tuple[jax.Array, jax.Array]:
        # Padded to T again: the branches of a switch over buckets must give results of one shape.
        found = policy_logprobs(model, params, piece, sampling_of(config.rollout), config.learner.logprob_chunk_tokens)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, shape[-1] - x.shape[-1]))), found)

    def at_bucket(piece: Rollout) -> tuple[jax.Array, jax.Array]:
        return batching.run_at_bucket(logprobs_of, piece, piece.mask_PGT, buckets)

    def at_one_width(rollout: Rollout, num_microbatches: int) -> tuple[jax.Array, jax.Array]:
        if num_microbatches == 1:
            return at_bucket(rollout)
        order = batching.length_order(rollout.mask_PGT)
        ordered = jax.tree.map(lambda x: x[order], rollout)
        pieces = jax.lax.map(at_bucket, batching.split_microbatches(ordered, ordered, num_microbatches))
        # The inverse permutation: group p's values go back to the place of group p.
        return jax.tree.map(lambda x: x.reshape(rollout.tokens_PGT.shape)[jnp.argsort(order)], pieces)

    parts, pieces = batching.split_by_prompts(rollout, rollout, config.learner.microbatches)
    found = tuple(at_one_width(*each) for each in pieces)
    return found[0] if parts is None else parts.join(found)


def buckets_of(config: Config) -> tuple[int, ...]:
    """List the completion lengths, in tokens, that the update is compiled for."""
    return batching.length_buckets(config.rollout.max_completion_tokens, config.learner.bucket_tokens)


def compute_gradients(
    model: ModelDef,
    params: Params,
    base: Params | None,
    target: Target,
    obj: Objective | OneOf,
    config: Config,
    shards: tuple[PyTree[PartitionSpec], PyTree[PartitionSpec] | None] | None = None,
) -> tuple[Params, dict[str, Metric]]:
    """Differentiate the global loss by `params`: a sum over microbatches, then one sum over devices.

    Args:
      model, params, base: what is trained, and the frozen weights under adapters or None.
      target: this device's groups of a minibatch. obj: the objective with the state's numbers.
      config: as in `make_train_step`.
      shards: inside `shard_map_over_batch`, where rows are sharded, the specs of params and base; else None.
    Returns: (gradients like params, metrics), both of the global batch.
    """
    axis_name = ROW_AXES if shards else None
    mask_PGT = target.rollout.mask_PGT
    T = mask_PGT.shape[-1]
    # Weights and the one denominator depend on the mask alone, so they are global before anything is differentiated: how the
    # batch is split over microbatches and devices cannot change the result.
    weigh = functools.partial(
        objectives.weights,
        mask_BT=mask_PGT.reshape(-1, T),
        max_completion_length=config.rollout.max_completion_tokens,
        axis_name=axis_name,
    )
    weight_BT, denom = choose(obj, weigh)
    if shards:
        # Differentiate with respect to this device's copy: a gradient by the replicated weight would be summed over devices
        # in every microbatch. Weights that fsdp shards are summed over that axis anyway, as they leave their layer.
        params, base = jax.tree.map(lambda x, spec: vary_over(x, replicated_axes(spec)), (params, base), shards)

    def gradients_of(piece_and_weight: microbatches.Pieces, total: Params | None) -> tuple[Params, dict[str, Metric]]:
        piece, weight_PGT = piece_and_weight

        def loss_of(trained: Params, sums: Params | None = None) -> tuple[jax.Array, dict[str, Metric]]:
            return microbatch_loss(model, join_params(base, trained), piece, weight_PGT, obj, config, sums)

        (loss, metrics), grads = microbatches.add_gradients(loss_of, params, total, in_place=model.adds_gradients_in_place)
        # The loss is a sum over microbatches and devices, where other metrics are means: it is counted once, after all sums.
        metrics["loss/total"] = Mean(loss, jnp.zeros_like(loss))
        return grads, metrics

    pieces = (target, (weight_BT / denom).reshape(mask_PGT.shape))
    grads, metrics = microbatches.sum_over(gradients_of, pieces, config.learner.microbatches, buckets_of(config))
    if shards:
        # Over the axes that a weight is replicated over, and no other: along fsdp a sharded weight's gradient has been summed
        # and scattered already, as the transpose of its gather.
        grads = jax.tree.map(lambda grad, spec: jax.lax.psum(grad, replicated_axes(spec)), grads, shards[0])
        metrics = metrics_lib.psum(metrics, ROW_AXES)
    metrics["loss/total"] = dataclasses.replace(metrics["loss/total"], count=jnp.float32(1))
    return grads, metrics


def replicated_axes(spec: PartitionSpec) -> tuple[str, ...]:
    """Return the axes over which devices have a weight's gradient by rows or tokens of their own."""
    axes = (*ROW_AXES, context.AXIS) if context.num_devices_here() > 1 else ROW_AXES
    return tuple(axis for axis in axes if axis not in spec)


def microbatch_loss(
    model: ModelDef,
    params: Params,
    target: Target,
    weight_PGT: Float[jax.Array, "P G T"],
    obj: Objective | OneOf,
    config: Config,
    sums: Params | None = None,
) -> tuple[Float[jax.Array, ""], dict[str, Metric]]:
    """Compute sum(loss * weight) of one microbatch, the weight being its share of the global loss.

    Args:
      model, params: the policy. target: the microbatch. weight_PGT: float32, each token's weight over the global denominator.
      obj: the objective with the state's numbers. config: learner and the rollout's distribution are read.
      sums: as in `logprobs_and_routing`.
    Returns: (scalar, metrics by name).
    """
    rollout = target.rollout
    T = rollout.mask_PGT.shape[-1]
    logp_PGT, entropy_PGT, routing = logprobs_and_routing(
        model,
        params,
        rollout,
        sampling_of(config.rollout),
        config.learner.logprob_chunk_tokens,
        obj.has_entropy_bonus,
        sums,
    )

    def rows(x: Any) -> Any:
        return None if x is None else x.reshape(-1, T)

    mask_BT = rows(rollout.mask_PGT)
    adv_PGT, importance_metrics = weight_by_importance(target, config.learner)
    fixed = rows(target.old_logp_PGT), rows(target.ref_logp_PGT), rows(adv_PGT)

    def loss_of(obj: Objective, logp_BT: jax.Array, entropy_BT: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        more = {"entropy_BT": entropy_BT, "penalised_BT": rows(target.penalised_PGT)}
        return objectives.token_loss(obj, logp_BT, *fixed, mask_BT, **more)

    loss_BT, aux = choose(obj, loss_of, rows(logp_PGT), rows(entropy_PGT))
    # The gap between sampler and learner is their numerics only where both had the same weights: on fresh groups.
    gap_PGT = jnp.abs(jax.lax.stop_gradient(logp_PGT) - rollout.sampler_logp_PGT)
    is_fresh_PGT = target.is_fresh_PG[..., None] & (rollout.mask_PGT > 0)
    metrics: dict[str, Metric] = {
        **objectives.loss_metrics(aux, mask_BT),
        **importance_metrics,
        "policy/learner_entropy": Mean.of(jax.lax.stop_gradient(entropy_PGT), rollout.mask_PGT),
        "policy/sampler_logp_gap": Max(jnp.where(is_fresh_PGT, gap_PGT, 0.0).max()),
    }
    if routing is not None:
        metrics |= routing_metrics(routing, target, model.arch.experts_per_token)
    return (loss_BT * rows(weight_PGT)).sum(), metrics


def routing_metrics(routing: Routing, target: Target, experts_per_token: int) -> dict[str, Metric]:
    """Compute how evenly experts are loaded, and how often the learner chooses others than the sampler did.

    Args:
      routing: the learner's, of the microbatch. target: the microbatch, with the sampler's. experts_per_token: k.
    Returns: metrics by name.
    """
    metrics: dict[str, Metric] = {
        "experts/load_entropy": ShareEntropy(routing.load_LE),
        "experts/load_max": ShareMax(routing.load_LE),
    }
    sampled_PGTX, mask_PGT = target.rollout.experts_PGTX, target.rollout.mask_PGT
    if sampled_PGTX is not None:
        # The sampler read a token if there is one behind it. Older groups were sampled with other weights.
        is_read_PGT = target.is_fresh_PG[..., None] & (mask_PGT[..., 1:] > 0)
        sampled_BTX = sampled_PGTX[:, :, :-1].reshape(routing.chosen_BTX.shape)
        share_BT = share_elsewhere(routing.chosen_BTX, sampled_BTX, experts_per_token)
        metrics["experts/sampler_differs"] = Mean.of(share_BT, is_read_PGT.reshape(share_BT.shape))
    return metrics


def weight_by_importance(target: Target, config: LearnerConfig) -> tuple[Float[jax.Array, "P G T"], dict[str, Metric]]:
    """Weigh each token's policy loss by `objectives.sampler_weights`: learner's over sampler's probability, bounded.

    For a sampler of other numerics than the learner's (Yao et al. 2025, "Your efficient RL framework secretly brings you
    off-policy RL training"). The weight goes onto the advantage, in a positive factor of which every surrogate is linear.
    -> (advantage_PGT, metrics), as they are with importance_cap 0.
    """
    if target.importance_PGT is None:
        return target.advantage_PGT, {}
    low, high, mask_PGT = config.importance_floor, config.importance_cap, target.rollout.mask_PGT
    weight_PGT = objectives.sampler_weights(target.importance_PGT, config.importance_outside, low, high)
    metrics: dict[str, Metric] = {
        "policy/importance_weight": Mean.of(weight_PGT, mask_PGT),
        "policy/importance_capped": Mean.of((target.importance_PGT > high) | (target.importance_PGT < low), mask_PGT),
    }
    return target.advantage_PGT * weight_PGT, metrics


def split_minibatches(
    target: Target, seed: int | Int[Arrays, ""], step: int | Int[Arrays, ""], config: LearnerConfig
) -> Target:
    """Split [P, ...] into [epochs * minibatches, P / minibatches, ...]: groups in a fresh order each epoch, none left out.

    Args:
      target: full batch. seed, step: of the order (they may be traced). config: num_epochs and num_minibatches.
    Returns: the minibatches, on a leading axis to scan over.
    """
    P = len(target.advantage_PGT)
    # One minibatch holds all groups, and in a sum their order is of no account.
    if config.num_minibatches == 1:
        return jax.tree.map(lambda x: jnp.broadcast_to(x[None], (config.num_epochs, *x.shape)), target)
    keys = jax.random.split(key_for(seed, "minibatches", step), config.num_epochs)
    order = jax.vmap(lambda key: jax.random.permutation(key, P))(keys)
    order = order.reshape(config.num_epochs * config.num_minibatches, P // config.num_minibatches)
    return jax.tree.map(lambda x: x[order], target)
