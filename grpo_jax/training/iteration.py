"""One iteration of training: prompts -> rollout -> reward -> (more rounds, if groups said nothing) -> update.

With a traceable task the whole of it is pure and can be one compiled call with donated state. With a host reward the same
functions run stage by stage: `while_loop` is then a Python loop, and only tokens and rewards pass through the host. Of
several hosts each reads and judges its own rows; then all of them know all rewards, so that they decide alike.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from grpo_jax import metrics as metrics_lib
from grpo_jax.config import Config
from grpo_jax.learner.train_step import TrainStep
from grpo_jax.metrics import Max, Mean, Metric
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel import hosts
from grpo_jax.parallel.sharding import REPLICATED, ROWS, constrain, gather_params_for_decoding, shard_map_over_batch
from grpo_jax.rewards import shaping as rewards
from grpo_jax.rng import key_for
from grpo_jax.rollout.rollout import RolloutSpec, rollout, row_keys
from grpo_jax.tasks import Task
from grpo_jax.training import dynamic_sampling
from grpo_jax.types import Batch, GroupBuffer, Params, Prompts, Reward, Rollout, TrainState

Collect = Callable[..., tuple[TrainState, Batch, dict[str, Metric]]]
Iteration = Callable[[TrainState], tuple[TrainState, Batch, dict[str, Metric]]]


class SamplingCarry(NamedTuple):
    """What is carried from one sampling round to the next. rounds: int32, rounds done in this iteration."""

    buffer: GroupBuffer
    rounds: Any
    metrics: dict[str, Metric]


def make_rollout(model: ModelDef, spec: RolloutSpec, mesh: Mesh) -> Callable[[Params, Prompts, Any], Rollout]:
    """(params, prompts, key) -> Rollout, rows spread over the mesh; each device leaves its loop when its own rows ended.

    params: as `make_sampler_weights` gives them; in parts, they would be gathered in every call.
    """
    sharded = shard_map_over_batch(
        lambda params, prompts, keys: rollout(model, params, prompts, keys, spec), mesh, (REPLICATED, ROWS, ROWS), ROWS
    )

    def run(params: Params, prompts: Prompts, key: Any) -> Rollout:
        keys_PG = row_keys(key, len(prompts.tokens_PS), spec.group_size)
        prompts, keys_PG = constrain((prompts, keys_PG), mesh, ROWS)
        return sharded(params, prompts, keys_PG)

    return run


def make_sampler_weights(config: Config, mesh: Mesh) -> Callable[[Params], Params]:
    """The policy -> its weights as rollouts read them, to be made once for all rollouts of an iteration."""
    return functools.partial(
        gather_params_for_decoding, mesh=mesh, min_elements=config.mesh.fsdp_min_elements, dtype=jnp.dtype(config.model.dtype)
    )


def nothing() -> None:
    """What there is to do meanwhile."""


def make_collect(config: Config, task: Task, run_rollout: Callable[..., Rollout], mesh: Mesh) -> Collect:
    """-> collect(state) -> (state with its data position and buffer moved on, batch to train on, metrics of all sampled).

    Traceable if the task is; else it runs on the host, jits its own parts, and calls its second argument once the first
    completions are under way: what that sends to the device runs while the host judges them.
    """
    sample_round = make_sample_round(config, task, run_rollout, mesh)
    sampler_weights = make_sampler_weights(config, mesh)
    sampler_weights = sampler_weights if task.is_traceable else jax.jit(sampler_weights)
    P = config.rollout.num_prompts
    while_loop = jax.lax.while_loop if task.is_traceable else host_while_loop
    push, pop = jax.jit(dynamic_sampling.push), jax.jit(dynamic_sampling.pop, static_argnums=1)

    def gather(state: TrainState, meanwhile: Callable[[], Any] = nothing) -> tuple[TrainState, Batch, dict[str, Metric]]:
        """Rounds until the buffer holds a full batch of informative groups, or the cap is spent."""
        assert state.pending is not None, "dynamic sampling without a buffer in the state"
        weights = sampler_weights(state.policy)

        def add_round(done: SamplingCarry) -> SamplingCarry:
            batch, metrics = sample_round(state, weights, done.rounds)
            buffer = push(done.buffer, batch, rewards.is_informative(batch.task_reward_PG))
            return SamplingCarry(buffer, done.rounds + 1, metrics_lib.merge(done.metrics, metrics))

        def is_short(done: SamplingCarry):
            return (done.buffer.count < P) & (done.rounds < config.dynamic_sampling.max_sampling_rounds)

        # The first round stands before the loop: a full buffer from last time must not leave a step without samples.
        batch, metrics = sample_round(state, weights, jnp.int32(0), meanwhile)
        buffer = push(state.pending, batch, rewards.is_informative(batch.task_reward_PG))
        done = while_loop(is_short, add_round, SamplingCarry(buffer, jnp.int32(1), metrics))
        batch, buffer = pop(done.buffer, P)
        one = jnp.float32(1)
        metrics = {
            **done.metrics,
            "groups/missing": Mean.of((batch.rollout.mask_PGT.sum((1, 2)) == 0).astype(jnp.float32)),
            "groups/rounds": Mean(done.rounds.astype(jnp.float32), one),
            "groups/pending": Mean(buffer.count.astype(jnp.float32), one),
        }
        drawn = state.num_prompts_drawn + done.rounds * P
        return dataclasses.replace(state, pending=buffer, num_prompts_drawn=drawn), batch, metrics

    def sample_once(state: TrainState, meanwhile: Callable[[], Any] = nothing) -> tuple[TrainState, Batch, dict[str, Metric]]:
        batch, metrics = sample_round(state, sampler_weights(state.policy), jnp.int32(0), meanwhile)
        return dataclasses.replace(state, num_prompts_drawn=state.num_prompts_drawn + P), batch, metrics

    return gather if config.dynamic_sampling.enabled else sample_once


def make_iterations(collect: Collect, train_step: TrainStep, num_steps: int) -> Iteration:
    """num_steps times collect and update, for a traceable task: pure, to be jitted with donated state.

    -> iterate(state) -> (state, the last batch, metrics with a leading axis of steps).
    """

    def step(state: TrainState) -> tuple[TrainState, Batch, dict[str, Metric]]:
        state, batch, sampled = collect(state)
        state, updated = train_step(state, batch)
        return state, batch, metrics_lib.merge(sampled, updated)

    def iterate(state: TrainState) -> tuple[TrainState, Batch, dict[str, Metric]]:
        def next_step(carry: tuple[TrainState, Batch], _: None):
            state, batch, metrics = step(carry[0])
            return (state, batch), metrics

        no_batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, state)[1])
        (state, batch), metrics = jax.lax.scan(next_step, (state, no_batch), None, length=num_steps)
        return state, batch, metrics

    return iterate


def make_async_step(collect: Collect, update: Callable[[TrainState], tuple[TrainState, dict[str, Metric]]]) -> Iteration:
    """Collect and update side by side, for a task of the host: while the device trains on one batch, the next is judged.

    The next batch is sampled with the weights that this update begins with, so it is one step old when its turn comes; its
    old log-probs are its sampler's, and the ratio does the rest.

    update: trains on `state.next_batch` and donates the state. -> async_step(state) -> (state, the batch sampled now, metrics).
    """
    snapshot = jax.jit(sampling_state)

    def async_step(state: TrainState) -> tuple[TrainState, Batch, dict[str, Metric]]:
        trained: list[Any] = []
        seen, batch, sampled = collect(snapshot(state), lambda: trained.extend(update(state)))
        state, updated = trained
        del updated["policy/sampler_logp_gap"]  # the learner has moved on since: there is nothing to compare
        moved_on = {"num_prompts_drawn": seen.num_prompts_drawn, "pending": seen.pending, "next_batch": batch}
        return dataclasses.replace(state, **moved_on), batch, metrics_lib.merge(sampled, updated)

    return async_step


def prefetch_first_batch(collect: Collect, state: TrainState) -> tuple[TrainState, dict[str, Metric]]:
    """-> (the state at step 0 with its first batch, sampled with nothing beside it; metrics of all sampled)."""
    before = dataclasses.replace(state, step=state.step - 1)  # the randomness of step 0 is the next batch's
    after, batch, sampled = collect(before)
    return dataclasses.replace(after, step=state.step, next_batch=batch), sampled


def sampling_state(state: TrainState) -> TrainState:
    """A copy of what `collect` reads, which outlives the donated state."""
    read = dataclasses.replace(state, params=state.policy, base=None, opt_state=None, ref_params=None, next_batch=None)
    return jax.tree.map(jnp.copy, read)


def make_sample_round(config: Config, task: Task, run_rollout: Callable[..., Rollout], mesh: Mesh):
    """-> sample_round(state, sampler's weights, number of the round, meanwhile) -> (rewarded Batch, metrics of all sampled).

    meanwhile: called when the rollout is on its way and its rewards are not.
    """
    P = config.rollout.num_prompts
    run_rollout = run_rollout if task.is_traceable else jax.jit(run_rollout, out_shardings=NamedSharding(mesh, ROWS))
    train_prompts = task.train_prompts if task.is_traceable else functools.partial(local_prompts, task, mesh)
    reward = task.reward if task.is_traceable else functools.partial(score_local_rows, task)

    def finish(rolled: Rollout, reward: Reward, key, step) -> tuple[Batch, dict[str, Metric]]:
        if config.shuffle_rewards:
            reward = rewards.shuffle_rewards(reward, key)
        batch = rewards.make_batch(
            rolled,
            reward,
            step,
            max_completion_tokens=config.rollout.max_completion_tokens,
            cache_tokens=config.overlong.cache_tokens,
        )
        metrics = {**sample_metrics(batch, config.objective.success_threshold), **reward.metrics}
        return constrain(batch, mesh, ROWS), metrics

    finish = finish if task.is_traceable else jax.jit(finish)

    def sample_round(
        state: TrainState, weights: Params, number: Any, meanwhile: Callable[[], Any] = nothing
    ) -> tuple[Batch, dict[str, Metric]]:
        prompts = train_prompts(state.num_prompts_drawn + number * P, P)
        key, shuffle_key = (
            jax.random.fold_in(key_for(config.seed, purpose, state.step), number) for purpose in ("rollout", "shuffle")
        )
        rolled = run_rollout(weights, prompts, key)
        meanwhile()
        return finish(rolled, reward(prompts.answer, rolled.tokens_PGT, rolled.mask_PGT), shuffle_key, state.step)

    return sample_round


def local_prompts(task: Task, mesh: Mesh, position: Any, num_prompts: int) -> Prompts:
    """`task.train_prompts` of a task on the host: each process reads the prompts of its own devices."""
    start = int(position)
    return hosts.make_global_batch(lambda first, num: task.train_prompts(start + first, num), num_prompts, mesh)


def score_local_rows(task: Task, answer_P: Any, tokens_PGT: Any, mask_PGT: Any) -> Reward:
    """`task.reward` of a task on the host: each process judges its own rows, all of them get the whole."""
    rows, own = hosts.addressable_rows((answer_P, tokens_PGT, mask_PGT))
    reward = task.reward(*own)
    task_PG, shaping_PG = hosts.allgather_rows(rows, (reward.task_PG, reward.shaping_PG), len(tokens_PGT))
    return Reward(task_PG, shaping_PG, metrics_lib.reduce_stacked(hosts.process_allgather(reward.metrics)))


def sample_metrics(batch: Batch, success_threshold: float) -> dict[str, Metric]:
    """What the policy did in a round, over all of its completions, kept or not."""
    rolled = batch.rollout
    lengths_PG = rolled.mask_PGT.sum(-1)
    return {
        "reward/mean": Mean.of(batch.reward_PG),
        "reward/success": Mean.of((batch.task_reward_PG >= success_threshold).astype(jnp.float32)),
        "policy/entropy": Mean.of(rolled.entropy_PGT, rolled.mask_PGT),
        "completion/length_mean": Mean.of(lengths_PG),
        "completion/length_max": Max(lengths_PG.max()),
        "completion/truncated": Mean.of(rolled.is_truncated_PG.astype(jnp.float32)),
        "groups/uninformative": Mean.of(1.0 - rewards.is_informative(batch.task_reward_PG)),
    }


def host_while_loop(cond: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any) -> Any:
    """`jax.lax.while_loop` for bodies that need the host."""
    while np.asarray(cond(carry)):
        carry = body(carry)
    return carry
