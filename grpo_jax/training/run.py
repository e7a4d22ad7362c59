"""A run's parts, built from its config, and its state: at step 0, or as a checkpoint has it."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.learner.advantage_diagnostics import advantages_with_grpo
from grpo_jax.learner.optimizer import make_optimizer
from grpo_jax.learner.train_step import TrainStep, make_train_step
from grpo_jax.models.lora import split_adapters
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import (
    REPLICATED,
    ROWS,
    check_divisible,
    make_mesh,
    num_row_shards,
    offload_to_host,
    shardings_of,
    with_shardings,
)
from grpo_jax.tasks import Task
from grpo_jax.training import build
from grpo_jax.training.checkpoint import Checkpointer, restore_params
from grpo_jax.training.dynamic_sampling import empty_buffer
from grpo_jax.training.evaluate import Evaluate, make_evaluate
from grpo_jax.training.iteration import Collect, Iteration, make_async_step, make_collect, make_iterations, make_rollout
from grpo_jax.types import Batch, Params, Rollout, TrainState, join_params


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, bound to one config. collect, update and iterate are compiled; each donates the state.

    async_step: with async_steps, instead of collect and update.

    abstract_state: shapes and shardings of the state. start: (weights, adapters or None) -> the state at step 0; donates them.
    advantage_diagnostics: `advantages_with_grpo` of a batch.
    weights: loads or warm-starts what the run begins with, without adapters.
    """

    config: Config
    mesh: Mesh
    task: Task
    model: ModelDef
    abstract_state: TrainState
    start: Callable[[Params, Params | None], TrainState]
    collect: Collect
    update: Any
    iterate: Any
    async_step: Iteration
    advantage_diagnostics: Any
    evaluate: Evaluate
    weights: Callable[[], Params]


class TrainFns(NamedTuple):
    """The functions of a run, not compiled yet. With a traceable task they are pure."""

    start: Callable[[Params, Params | None], TrainState]
    collect: Collect
    update: TrainStep
    iterate: Iteration
    advantage_diagnostics: Callable[[Batch], tuple[Any, Any]]


def make_run(config: Config) -> Run:
    """Config -> Run. Reads the task's data and the model's config.json; loads no weights. Raises UserError on bad input."""
    mesh = make_mesh(config.mesh.sizes)
    check_batch_divisible(config, mesh)
    task = build.make_task(config)
    return assemble(config, mesh, task, build.make_model(config, task.tokenizer))


def assemble(config: Config, mesh: Mesh, task: Task, model: ModelDef) -> Run:
    """Bind a config to a task and a model. Raises UserError if the task or the model cannot do what the config asks."""
    if config.async_steps and task.is_traceable:
        raise UserError(
            f"config.async_steps = {config.async_steps}: task {config.task.name!r} is scored on the device, there is "
            "nothing to wait for; set it to 0"
        )
    if config.steps_per_call and not task.is_traceable:
        raise UserError(
            f"config.steps_per_call = {config.steps_per_call}: task {config.task.name!r} is scored on the host, set it to 0"
        )
    check_divisible(model.arch.sharded_sizes, mesh)
    parts = make_train_fns(config, mesh, task, model)
    base, adapters = split_adapters(model.param_shapes())
    like = abstract_state_of(config, mesh, jax.eval_shape(parts.start, base, adapters or None))
    places = shardings_of(like)
    everywhere = NamedSharding(mesh, REPLICATED)
    sampled = (places, NamedSharding(mesh, ROWS), everywhere)  # where the state goes, and the batch and metrics beside it
    return Run(
        config=config,
        mesh=mesh,
        task=task,
        model=model,
        abstract_state=like,
        start=jax.jit(parts.start, donate_argnums=(0, 1), out_shardings=places),
        collect=jax.jit(parts.collect, donate_argnums=0, out_shardings=sampled) if task.is_traceable else parts.collect,
        update=jax.jit(parts.update, donate_argnums=0, out_shardings=(places, everywhere)),
        iterate=jax.jit(parts.iterate, donate_argnums=0, out_shardings=sampled),
        async_step=make_async_step(
            parts.collect,
            jax.jit(lambda state: parts.update(state, state.next_batch), donate_argnums=0, out_shardings=(places, everywhere)),
        ),
        advantage_diagnostics=jax.jit(parts.advantage_diagnostics),
        evaluate=make_evaluate(config, task, model, build.rollout_spec(config, task), mesh),
        weights=lambda: build.initial_params(config, model, task, shardings_of(base_of(like))),
    )


def make_train_fns(config: Config, mesh: Mesh, task: Task, model: ModelDef) -> TrainFns:
    """The functions that a run is made of."""
    optimizer = make_optimizer(config.optimizer, config.num_updates)
    run_rollout = make_rollout(model, build.rollout_spec(config, task), mesh)
    collect = make_collect(config, task, run_rollout, mesh)
    update = make_train_step(model, optimizer, build.update_spec(config), mesh)
    return TrainFns(
        start=functools.partial(
            make_initial_state, config, optimizer, functools.partial(example_batch, config, task, run_rollout)
        ),
        collect=collect,
        update=update,
        iterate=make_iterations(collect, update, max(config.steps_per_call, 1)),
        advantage_diagnostics=functools.partial(
            advantages_with_grpo, config.objective, filter_truncated=config.overlong.filter
        ),
    )


def abstract_state_of(config: Config, mesh: Mesh, shapes: TrainState) -> TrainState:
    """The shapes of a state with the places they belong to."""
    like = with_shardings(shapes, mesh, config.mesh.fsdp_min_elements)
    rows = NamedSharding(mesh, ROWS)
    return dataclasses.replace(
        like,
        opt_state=offload_to_host(like.opt_state) if config.optimizer.offload else like.opt_state,
        next_batch=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), like.next_batch),
    )


def base_of(state: TrainState) -> Params:
    """All of the policy's weights but adapters."""
    return state.params if state.base is None else state.base


def check_batch_divisible(config: Config, mesh: Mesh) -> None:
    """Every device gets as many whole groups as the others, in every minibatch and microbatch. Raises UserError."""
    prompts, learner = config.rollout.num_prompts, config.learner
    in_minibatch, shards = prompts // learner.num_minibatches, num_row_shards(mesh)
    if in_minibatch % shards:
        raise UserError(
            f"config.rollout.num_prompts = {prompts} in config.learner.num_minibatches = {learner.num_minibatches}: "
            f"{in_minibatch} groups do not divide over {shards} devices (mesh.data x mesh.fsdp); use a multiple, "
            "or set config.mesh.data"
        )
    groups, cuts = in_minibatch // shards, learner.num_microbatches
    if groups % cuts and (cuts % groups or config.rollout.group_size % (cuts // groups)):
        raise UserError(
            f"config.learner.num_microbatches = {cuts}: must divide a device's {groups} groups, "
            f"or be a multiple of them that also divides group_size = {config.rollout.group_size}"
        )


def initial_state(run: Run) -> TrainState:
    """The state at step 0: weights loaded or warm-started, each where it belongs."""
    weights = initial_weights(run)
    if run.model.lora is None:
        return run.start(weights, None)
    return run.start(weights, build.initial_adapters(run.config, run.model, shardings_of(run.abstract_state.params)))


def initial_weights(run: Run) -> Params:
    """All weights at step 0 but adapters, each where it belongs."""
    return jax.device_put(run.weights(), shardings_of(base_of(run.abstract_state)))


def restore_state(run: Run, checkpointer: Checkpointer, step: int) -> TrainState:
    """The state as it was after `step`: what changes is read from the checkpoint, what stays is had as at step 0."""
    state, like = checkpointer.restore(step, run.abstract_state), run.abstract_state
    if like.base is None and like.ref_params is None:
        return state
    weights = initial_weights(run)
    return dataclasses.replace(state, base=like.base and weights, ref_params=like.ref_params and weights)


def restore_policy(run: Run, workdir: pathlib.Path, step: int) -> Params:
    """The policy's weights after `step` of the run in `workdir`, and nothing else."""
    trained = restore_params(workdir, step, run.abstract_state.params)
    return join_params(None if run.model.lora is None else initial_weights(run), trained)


def make_initial_state(
    config: Config,
    optimizer: optax.GradientTransformation,
    example: Callable[[Params], Batch],
    weights: Params,
    adapters: Params | None,
) -> TrainState:
    """Step 0 with these weights; with adapters, it is the adapters that will be trained. example: `example_batch`."""
    base, trained = (None, weights) if adapters is None else (weights, adapters)
    batch = example(join_params(base, trained)) if config.dynamic_sampling.enabled or config.async_steps else None
    has_copy = config.objective.has_kl and adapters is None
    return TrainState(
        step=jnp.int32(0),
        params=trained,
        opt_state=optimizer.init(trained),
        base=base,
        ref_params=jax.tree.map(jnp.copy, weights) if has_copy else None,
        num_prompts_drawn=jnp.int32(0),
        pending=empty_buffer(batch) if batch and config.dynamic_sampling.enabled else None,
        next_batch=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), batch) if config.async_steps else None,
    )


def example_batch(config: Config, task: Task, run_rollout: Callable[..., Rollout], params: Params) -> Batch:
    """The shapes of a batch, without computing one."""
    P, G = config.rollout.num_prompts, config.rollout.group_size
    rollout = jax.eval_shape(run_rollout, params, task.train_prompts(0, P), jax.random.key(0))
    row = jax.ShapeDtypeStruct((P, G), jnp.float32)
    return Batch(rollout, row, row, jax.ShapeDtypeStruct((P,), jnp.int32))
