"""A run: a config bound to its task, its model and a mesh, with its compiled functions and its state."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float

from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.learner.advantage_diagnostics import advantages_with_grpo
from grpo_jax.learner.hyperparams import hyperparams_of, joint_key, static_key, with_hyperparams
from grpo_jax.learner.optimizer import make_optimizer
from grpo_jax.learner.train_step import TrainStep, buckets_of, make_train_step
from grpo_jax.metrics import Metric
from grpo_jax.models.lora import split_adapters
from grpo_jax.models.transformer import ModelDef
from grpo_jax.objectives.adaptive import initial_adapted
from grpo_jax.objectives.one_of import OneOf
from grpo_jax.parallel import context, hosts
from grpo_jax.parallel.hardware import hardware_of
from grpo_jax.parallel.sharding import (
    REPLICATED,
    ROWS,
    check_divisible,
    make_mesh,
    num_row_shards,
    num_sampling_shards,
    offload_to_host,
    shardings_of,
    with_shardings,
)
from grpo_jax.rollout.prompt_parts import without_long_rows
from grpo_jax.tasks import Task, knows_credit
from grpo_jax.training import build
from grpo_jax.training.checkpoint import Checkpointer, restore_params
from grpo_jax.training.dynamic_sampling import empty_buffer
from grpo_jax.training.evaluate import Evaluate, make_evaluate
from grpo_jax.training.fit import fit, with_microbatches
from grpo_jax.training.iteration import Collect, Collected, Iteration, make_async_step, make_iterations
from grpo_jax.training.samplers import DeviceSampler, make_sampler
from grpo_jax.training.stacking import axes_of, with_place
from grpo_jax.types import Adapted, Batch, Hyperparams, Params, TrainState, join_params


class CompiledUpdate(Protocol):
    """A jitted TrainStep. `lower` is for the planner, which compiles it for devices that are not there."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Metric]]:
        """Update on a batch; the state is donated."""
        ...

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """Trace for arrays or their shapes, without computing anything."""
        ...


class TrainFns:
    """The functions of a run before they are compiled. They depend on `static_key` of the config only.

    collect, update, iterate: the halves of a step, and num_steps whole ones in a call. With a traceable task all are pure.
    several: objectives in place of the config's, as `make_train_step` takes them.
    """

    def __init__(self, config: Config, mesh: Mesh, task: Task, model: ModelDef, several: OneOf | None = None):
        # From here on no traced number is in reach: one that a function read from the config would be a constant of the
        # program, and wrong for every other run that shares it.
        self.config, self.task = static_key(config), task
        self.optimizer = functools.partial(make_optimizer, self.config.optimizer, config.num_updates)
        self.sampler: DeviceSampler = make_sampler(self.config, task, model, mesh)
        self.collect = Collect(self.config, self.sampler)
        self.update: TrainStep = make_train_step(model, self.optimizer, self.config, mesh, several)
        self.iterate = self.chain_steps(max(config.steps_per_call, 1))

    def chain_steps(self, num_steps: int) -> Iteration:
        """Chain so many steps into one function."""
        return make_iterations(self.collect, self.update, num_steps)

    def init(self, weights: Params, adapters: Params | None, hyperparams: Hyperparams) -> TrainState:
        """Make the state at step 0.

        Args:
          weights: all weights but adapters. adapters: trained on frozen weights; None: the weights are trained.
          hyperparams: the run's numbers.
        Returns: the state, with every array that later ones have: compiled programs need one structure from the start.
        """
        config = self.config
        base, trained = None, weights
        if adapters is not None:
            base, trained = weights, adapters
        state = TrainState(
            step=jnp.int32(0),
            params=trained,
            opt_state=self.optimizer(hyperparams).init(trained),
            base=base,
            ref_params=None,
            num_prompts_drawn=jnp.int32(0),
            pending=None,
            hyperparams=hyperparams,
            adapted=initial_adapted(config.objective),
        )
        # A copy, because every call donates the state and no buffer can be given away twice. Without a KL there is none, and
        # with adapters the frozen base is the reference: either saves the memory of all weights.
        if config.learner.ref_every:
            state = dataclasses.replace(state, moving_ref=jax.tree.map(jnp.copy, trained))
        elif config.objective.needs_reference and adapters is None:
            state = dataclasses.replace(state, ref_params=jax.tree.map(jnp.copy, weights))
        if config.dynamic_sampling.enabled:
            state = dataclasses.replace(state, pending=empty_buffer(self.example_batch(state.policy)))
        if config.async_steps:
            blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.example_batch(state.policy))
            later = tuple(jax.tree.map(jnp.copy, blank) for _ in range(config.async_steps - 1))
            state = dataclasses.replace(state, next_batch=blank, later_batches=later)
        return state

    def example_batch(self, policy: Params) -> Batch:
        """Return the shapes of a batch, without computing one. policy: all weights, or their shapes."""
        P, G = self.config.rollout.num_prompts, self.config.rollout.group_size
        rolled = jax.eval_shape(self.sampler.run_rollout, policy, self.task.train_prompts(0, P), jax.random.key(0))
        row, is_scored = (jax.ShapeDtypeStruct((P, G), dtype) for dtype in (jnp.float32, jnp.bool_))
        credit = rolled.mask_PGT if knows_credit(self.task) else None
        steps = rolled.mask_PGT if self.config.objective.needs_step_rewards else None
        return Batch(rolled, row, row, jax.ShapeDtypeStruct((P,), jnp.int32), is_scored, credit, steps)

    def advantages(
        self, hyperparams: Hyperparams, adapted: Adapted | None, batch: Batch
    ) -> tuple[Float[jax.Array, "P G T"], Float[jax.Array, "P G"]]:
        """Compute `advantages_with_grpo` of a batch."""
        obj = with_hyperparams(self.config.objective, hyperparams, adapted)
        return advantages_with_grpo(obj, batch, filter_truncated=self.config.overlong.filter)


@dataclasses.dataclass(frozen=True)
class Run:
    """A config bound to a task, a model and a mesh.

    fns: the functions before they are compiled. abstract_state: shapes and shardings of the state.
    init, collect, update, iterate, async_step: compiled; each donates the state. Runs of one static key share them
    (`with_config`), and so jit's cache. compile_iteration: what made `iterate` of the one in `fns`.
    load_weights: loads or warm-starts all weights but adapters. shares_base, several: of a vmapped run, see there.
    """

    config: Config
    mesh: Mesh
    task: Task
    model: ModelDef
    fns: TrainFns
    abstract_state: TrainState
    init: Callable[[Params, Params | None, Hyperparams], TrainState]
    collect: Callable[[TrainState], Collected]
    update: CompiledUpdate
    iterate: Iteration
    compile_iteration: Callable[[Iteration], Iteration]
    async_step: Iteration
    load_weights: Callable[[], Params]
    _advantages: Callable[[Hyperparams, Adapted | None, Batch], tuple[Float[jax.Array, "P G T"], Float[jax.Array, "P G"]]]
    shares_base: bool = False
    several: OneOf | None = None

    @functools.cached_property
    def update_metrics(self) -> frozenset[str]:
        """Names of the metrics that an update gives; the objective decides some of them."""
        state = self.abstract_state
        return frozenset(jax.eval_shape(self.fns.update, state, self.fns.example_batch(state.policy))[1])

    @functools.cached_property
    def evaluate(self) -> Evaluate:
        """evaluate(params) -> {name: Estimate}; see `make_evaluate`."""
        return make_evaluate(self.config, self.task, self.model, self.mesh)

    @property
    def hyperparams(self) -> Hyperparams:
        """The config's numbers, on every device."""
        return jax.device_put(hyperparams_of(self.config), NamedSharding(self.mesh, REPLICATED))

    @property
    def reads_again(self) -> tuple[str, ...]:
        """The files that a run reads once more when it goes on, as `build.sources_of` names them."""
        has_frozen = self.abstract_state.base is not None or self.abstract_state.ref_params is not None
        return ("model.path", "model.path.tokenizer") if has_frozen else ("model.path.tokenizer",)

    def advantages(
        self, batch: Batch, adapted: Adapted | None = None
    ) -> tuple[Float[jax.Array, "P G T"], Float[jax.Array, "P G"]]:
        """Compute the advantages of a batch, and plain GRPO's of its rows; see `advantages_with_grpo`.

        adapted: of a state; None: the numbers that the objective begins with.
        """
        return self._advantages(self.hyperparams, adapted, batch)

    def iterate_once(self, num_steps: int) -> Iteration:
        """Return a function like `iterate`, of fewer steps than config.steps_per_call; compiled when it is called."""
        return self.compile_iteration(self.fns.chain_steps(num_steps))

    def with_config(self, config: Config) -> Run:
        """Return the run of another config of the same joint key. Of one static key it has the same compiled functions.

        With a task of the host, another seed has a task of its own, to be closed like this run's.

        Raises: ValueError if the joint keys differ.
        """
        if not config.learner.num_microbatches:  # this run has decided it
            config = with_microbatches(config, self.config.learner.num_microbatches)
        if joint_key(config) != joint_key(self.config):
            raise ValueError("these configs do not share a program: fields differ that are no hyperparams")
        task = self.task
        if not task.is_traceable and config.seed != self.config.seed:  # which its order of the data is made from
            task = build.make_task(config)
        if task is not self.task or static_key(config) != static_key(self.config):
            # A state begins the same all the same.
            return dataclasses.replace(assemble(config, self.mesh, task, self.model), init=self.init)
        load = functools.partial(load_weights, config, self.model, self.task, self.abstract_state)
        return dataclasses.replace(self, config=config, load_weights=load)

    def initial_weights(self) -> Params:
        """Return all weights at step 0 but adapters, each in its sharding."""
        return jax.device_put(self.load_weights(), shardings_of(base_of(self.abstract_state)))

    def initial_state(self) -> TrainState:
        """Return the state at step 0: weights loaded or warm-started, each in its sharding."""
        weights, adapters = self.initial_weights(), None
        if self.model.lora is not None:
            adapters = build.initial_adapters(self.config, self.model, shardings_of(self.abstract_state.params))
        return self.init(weights, adapters, self.hyperparams)

    def restore_state(self, checkpointer: Checkpointer, step: int) -> TrainState:
        """Read the state after `step` from its checkpoint, and the frozen weights from their source again."""
        like = self.abstract_state
        # The numbers are this config's: in a run that resumes with changed settings the new ones hold.
        state = dataclasses.replace(checkpointer.restore(step, like), hyperparams=self.hyperparams)
        # With nothing frozen there is no need to load weights, or to warm-start them once more.
        if like.base is None and like.ref_params is None:
            return state
        weights = self.initial_weights()
        return dataclasses.replace(state, base=like.base and weights, ref_params=like.ref_params and weights)

    def restore_policy(self, workdir: pathlib.Path, step: int) -> Params:
        """Read the policy's weights after `step` of the run in `workdir`, and nothing else."""
        trained = restore_params(workdir, step, self.abstract_state.params)
        if self.model.lora is None:
            return trained
        return join_params(self.initial_weights(), trained)

    def vmapped(self, *, shares_base: bool = False, several: OneOf | None = None) -> Run:
        """Return the same run with functions that advance many states of its joint key, stacked on a leading axis.

        Args:
          shares_base: frozen weights under adapters are in the stacked state once, without that axis, and are read for all.
          several: the objectives of its members, if they have more than one; the states then have `stacking.with_place`.
        """
        fns = self.fns if several is None else TrainFns(self.config, self.mesh, self.task, self.model, several)
        # The axis of members is not sharded: each device has its shards of all of them, laid out as for a single run.
        alone = with_place(shardings_of(self.abstract_state), NamedSharding(self.mesh, REPLICATED) if several else None)
        states = jax.tree.map(lambda sharding: sharding.update(spec=PartitionSpec(None, *sharding.spec)), alone)
        axes = axes_of(shares_base)
        if shares_base:
            states = dataclasses.replace(states, base=alone.base)
        collect = jax.vmap(fns.collect, in_axes=(axes,), out_axes=(axes, 0, 0))
        update = jax.vmap(fns.update, in_axes=(axes, 0), out_axes=(axes, 0))

        def compile_iteration(iterate: Iteration) -> Iteration:
            over_members = jax.vmap(iterate, in_axes=(axes,), out_axes=(axes, 0, 0))
            return jax.jit(over_members, donate_argnums=0, out_shardings=(states, None, None))

        return dataclasses.replace(
            self,
            fns=fns,
            shares_base=shares_base,
            several=several,
            compile_iteration=compile_iteration,
            collect=jax.jit(collect, donate_argnums=0, out_shardings=(states, None, None)),
            update=jax.jit(update, donate_argnums=0, out_shardings=(states, None)),
            iterate=compile_iteration(fns.iterate),
        )


def make_run(config: Config) -> Run:
    """Make the run of a config: read the task's data and the model's config.json, but no weights. Raises UserError."""
    # What fails fast comes first: a mesh that does not suit is known before data is read, and bad data before weights are.
    mesh = make_mesh(config.mesh.sizes)
    check_batch_divisible(config, mesh)
    task = build.make_task(config)
    return assemble(config, mesh, task, build.make_model(config, task.tokenizer))


def assemble(config: Config, mesh: Mesh, task: Task, model: ModelDef) -> Run:
    """Bind a config to a task and a model.

    Args:
      config: checked. mesh: of its sizes. task: where prompts and rewards come from. model: the decoder's static half.
    Returns: the run; nothing is compiled before its functions are called.
    Raises: UserError if the task or the model cannot do what the config asks.
    """
    check_task_suits(config, task)
    say_if_uncorrected(config)
    check_token_ids(config, task, model.arch.vocab_size)
    check_divisible(model.arch.sharded_sizes, mesh)
    check_context(config, mesh, model)
    model = dataclasses.replace(model, hardware=model.hardware or hardware_of(mesh))
    base, adapters = split_adapters(model.param_shapes())
    if adapters and config.model.path:  # as `build.initial_params` loads them
        base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), base)
    hyperparams = jax.eval_shape(functools.partial(hyperparams_of, config))
    # Its shapes are the same at any number of microbatches, which depends on its size.
    shapes = jax.eval_shape(TrainFns(config, mesh, task, model).init, base, adapters or None, hyperparams)
    like = abstract_state_of(config, mesh, shapes)
    config, model = fit(config, mesh, model, like, task.prompt_tokens)
    fns = TrainFns(config, mesh, task, model)
    states, everywhere = shardings_of(like), NamedSharding(mesh, REPLICATED)
    # Shardings of results are fixed, or the compiler would choose them: a state that came back in others would make the next
    # call compile once more, and could not take the place of the donated buffers.
    sampled = (states, NamedSharding(mesh, ROWS), everywhere)  # of the state, and the batch and metrics beside it
    compile_iteration = functools.partial(jax.jit, donate_argnums=0, out_shardings=sampled)
    # A host's sampler jits its own parts, for tokens and rewards pass through the host between them.
    collect: Callable[[TrainState], Collected] = fns.collect
    if task.is_traceable:
        collect = jax.jit(collect, donate_argnums=0, out_shardings=sampled)
    return Run(
        config=config,
        mesh=mesh,
        task=task,
        model=model,
        fns=fns,
        abstract_state=like,
        init=jax.jit(fns.init, donate_argnums=(0, 1), out_shardings=states),
        collect=collect,
        update=jax.jit(fns.update, donate_argnums=0, out_shardings=(states, everywhere)),
        iterate=compile_iteration(fns.iterate),
        compile_iteration=compile_iteration,
        async_step=make_async_step(
            fns.collect,
            jax.jit(functools.partial(update_ahead, fns.update), donate_argnums=0, out_shardings=(states, everywhere)),
        ),
        load_weights=functools.partial(load_weights, config, model, task, like),
        _advantages=jax.jit(fns.advantages),
    )


def update_ahead(update: TrainStep, state: TrainState) -> tuple[TrainState, dict[str, Metric]]:
    """Train on the batch that was sampled ahead; it stays in the state, without what it promised of its rows."""
    assert state.next_batch is not None
    return update(dataclasses.replace(state, next_batch=without_long_rows(state.next_batch)), state.next_batch)


def load_weights(config: Config, model: ModelDef, task: Task, abstract_state: TrainState) -> Params:
    """Make `build.initial_params` in the shardings of a state.

    Args:
      config, model, task: of the run. abstract_state: shapes and shardings.
    Returns: all weights but adapters.
    """
    # A warm start is compiled for one device and no mesh, where a kernel's rows could not be sharded.
    model = dataclasses.replace(model, hardware=None)
    return build.initial_params(config, model, task, shardings_of(base_of(abstract_state)))


def base_of(state: TrainState) -> Params:
    """Return all of the policy's weights but adapters."""
    return state.params if state.base is None else state.base


def abstract_state_of(config: Config, mesh: Mesh, shapes: TrainState) -> TrainState:
    """Give the shapes of a state their shardings.

    Args:
      config: fsdp_min_elements and offload are read. mesh: may be abstract. shapes: from `jax.eval_shape`.
    Returns: a state of ShapeDtypeStructs; with offload its optimizer state is in the host's memory.
    """
    like = with_shardings(shapes, mesh, config.mesh.fsdp_min_elements)
    if config.optimizer.offload:
        if mesh.size > 1 and jax.__version_info__ < (0, 8):
            raise UserError(
                f"config.optimizer.offload = True: the compiler of jax {jax.__version__} refuses it on several devices; "
                "install jax 0.10, or leave it out"
            )
        like = dataclasses.replace(like, opt_state=offload_to_host(like.opt_state))
    # A batch is no weight, so the table of parameters has no axes for it: its rows are sharded, as they were when sampled.
    rows = NamedSharding(mesh, ROWS)
    waiting = (like.next_batch, like.later_batches)
    next_batch, later = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), waiting)
    return dataclasses.replace(like, next_batch=next_batch, later_batches=later)


def check_task_suits(config: Config, task: Task) -> None:
    """Check that the task can be run as the config asks. Raises UserError naming the field."""
    # Not in config/validation.py: the task alone knows if it is traceable, and tests and programs bring tasks of their own.
    if config.objective.needs_step_rewards and not hasattr(task, "step_rewards"):
        raise UserError(
            f"config.objective.advantage = {config.objective.advantage!r}: task {config.task.name!r} gives no rewards for "
            "steps (`step_rewards`, as task chain does); use another advantage"
        )
    if config.async_steps and task.is_traceable and not config.steps_per_call:
        raise UserError(
            f"config.async_steps = {config.async_steps}: task {config.task.name!r} is scored on the device, where it wins "
            "no time; to study batches that are so old set config.steps_per_call to 1 or more, else async_steps to 0"
        )
    if config.steps_per_call and not task.is_traceable:
        raise UserError(
            f"config.steps_per_call = {config.steps_per_call}: task {config.task.name!r} is scored on the host, set it to 0"
        )


def say_if_uncorrected(config: Config) -> None:
    """Say that nothing corrects for the steps between sampling and training, where that is so."""
    if config.async_steps and config.learner.old_logp == "learner" and not config.learner.importance_cap:
        hosts.say(
            f"note: config.async_steps = {config.async_steps}, learner.old_logp = 'learner': nothing weighs how far the policy "
            "has moved since a batch was sampled; set learner.importance_cap, or old_logp to 'sampler'"
        )


def check_token_ids(config: Config, task: Task, vocab_size: int) -> None:
    """Check the ids of tokens that the rollout is told of.

    Args:
      config: its rollout is read. task: its end tokens are read.
      vocab_size: of the model.
    Raises: UserError naming the field.
    """
    # An id beyond the vocabulary would be read as another one, or never be met, and either without a word.
    for name in ("bad_ids", "bad_first_ids", "forced_prefix_ids", "stop_ids"):
        unknown = [token for token in getattr(config.rollout, name) if not 0 <= token < vocab_size]
        if unknown:
            raise UserError(f"config.rollout.{name}: {unknown[0]} is no token of the model, which has {vocab_size}")
    ends = sorted(set(config.rollout.forced_prefix_ids) & set(task.stop_ids))
    if ends:
        raise UserError(f"config.rollout.forced_prefix_ids: {ends[0]} ends a completion; leave it out")


def check_context(config: Config, mesh: Mesh, model: ModelDef) -> None:
    """Check that completions can be spread over the mesh axis `context`. Raises UserError naming the field and the fix."""
    refusals = {
        "the state of a gated delta net, which goes from token to token,": "gated_delta" in model.arch.mixers,
        "the tokens of a mixture of experts": bool(model.arch.num_experts),
        'model.numerics = "exact", whose blocks of keys are the sampler\'s,': config.model.numerics == "exact",
    }
    context.check(mesh.shape[context.AXIS], buckets_of(config), refusals)


def check_batch_divisible(config: Config, mesh: Mesh) -> None:
    """Check that in every rollout, minibatch and microbatch each device has equally many whole groups. Raises UserError."""
    # Not in config/validation.py: with mesh.data = -1 the machine decides how many devices there are.
    prompts, learner = config.rollout.num_prompts, config.learner
    in_minibatch, shards = prompts // learner.num_minibatches, num_row_shards(mesh)
    if in_minibatch % shards:
        raise UserError(
            f"config.rollout.num_prompts = {prompts} in config.learner.num_minibatches = {learner.num_minibatches}: "
            f"{in_minibatch} groups do not divide over {shards} devices (mesh.data x mesh.fsdp x mesh.expert); use a multiple, "
            "or set config.mesh.data"
        )
    if prompts % num_sampling_shards(mesh):
        raise UserError(
            f"config.rollout.num_prompts = {prompts}: does not divide over the {num_sampling_shards(mesh)} devices that sample "
            "(mesh.data x mesh.fsdp x mesh.expert x mesh.context); use a multiple"
        )
    groups, num = in_minibatch // shards, learner.microbatches
    # Microbatches may be smaller than a group, as each token's advantage and weight are known before the batch is split.
    if groups % num and (num % groups or config.rollout.group_size % (num // groups)):
        raise UserError(
            f"config.learner.num_microbatches = {num}: must divide a device's {groups} groups, "
            f"or be a multiple of them that also divides group_size = {config.rollout.group_size}"
        )
