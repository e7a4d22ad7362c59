"""Sampling rounds: prompts -> rollout -> reward -> batch, for tasks on the device and for tasks on the host.

Both samplers have one interface. A round is started, which puts its rollout on the device's queue and returns at once, and
finished, which takes the rewards. Between the two the host may put more work on the queue. With a traceable task all of it is
a pure function and can be part of one compiled call; a task on the host jits its own parts, and only tokens and rewards pass
through the host. Of several hosts each reads and scores its own rows; then all of them know all rewards, so that they decide
alike.
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
from jaxtyping import Int, Key

from grpo_jax import metrics as metrics_lib
from grpo_jax.config import Config, RolloutConfig
from grpo_jax.metrics import Max, Mean, Metric, Std
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel import hosts
from grpo_jax.parallel.sharding import (
    REPLICATED,
    ROWS,
    SAMPLED_ROWS,
    constrain,
    gather_params_for_decoding,
    held_specs,
    num_row_shards,
    num_sampling_shards,
    shard_map_over_batch,
)
from grpo_jax.rewards import shaping
from grpo_jax.rng import key_for
from grpo_jax.rollout.prompt_parts import without_long_rows
from grpo_jax.rollout.rollout import EndTokens, rollout, row_keys
from grpo_jax.rollout.stops import StopStrings, stop_strings
from grpo_jax.tasks import Task, Tokenizer, TraceableTask, knows_credit
from grpo_jax.tasks.host import HostTask
from grpo_jax.tasks.tokenizers import token_texts
from grpo_jax.training.widths import fit_prompts, prompt_buckets, prompt_lengths
from grpo_jax.types import Arrays, Batch, Params, Prompts, Reward, Rollout, TrainState

# (weights as `make_sampler_weights` gives them, prompts, key of the round) -> completions.
RunRollout = Callable[[Params, Prompts, Key[jax.Array, ""]], Rollout]


class StartedRound(NamedTuple):
    """A rollout that may still be under way.

    weights: those it is sampled with, for further rounds. shuffle_key: of the control experiment. step: int32, whose policy
    samples.
    """

    weights: Params
    rollout: Rollout
    shuffle_key: Key[jax.Array, ""]
    step: Int[Arrays, ""]


def make_rollout(model: ModelDef, config: RolloutConfig, ends: EndTokens, mesh: Mesh) -> RunRollout:
    """Bind a rollout to a mesh. Each device leaves its decoding loop when its own rows have ended.

    Args:
      model: decoder. config: group size, budget, distribution. ends: stop and pad ids. mesh: rows are sharded over it.
    Returns: run(params, prompts, key) -> Rollout. params: as `gather_params_for_decoding` gives them; sharded over fsdp they
      would be gathered in every call.
    """

    def run(params: Params, prompts: Prompts, key: Key[jax.Array, ""]) -> Rollout:
        # Made outside of `sharded`, where a row still has its number in the global batch: so the mesh changes no sample.
        keys_PG = row_keys(key, len(prompts.tokens_PS), config.group_size)
        prompts, keys_PG = constrain((prompts, keys_PG), mesh, SAMPLED_ROWS)
        # By hand and not by the compiler: its loop would run in all devices until the last row of all had ended, and agree on
        # that with a collective at every token.
        sharded = shard_map_over_batch(
            lambda params, prompts, keys_PG: rollout(model, params, prompts, keys_PG, config, ends),
            mesh,
            (held_specs(params, mesh), SAMPLED_ROWS, SAMPLED_ROWS),
            SAMPLED_ROWS,
        )
        return sharded(params, prompts, keys_PG)

    return run


def make_sampler_weights(config: Config, mesh: Mesh) -> Callable[[Params], Params]:
    """Bind `gather_params_for_decoding`: the policy -> its weights as rollouts read them."""
    # Apart from the rollout: all rounds of a step, or all batches of an evaluation, need one gather between them.
    dtype, min_elements = jnp.dtype(config.model.dtype), config.mesh.fsdp_min_elements
    return lambda policy: gather_params_for_decoding(policy, mesh, min_elements, dtype)


class DeviceSampler:
    """Rounds of a traceable task: every method is a pure JAX function."""

    while_loop = staticmethod(jax.lax.while_loop)

    def __init__(self, config: Config, task: Any, run_rollout: RunRollout, mesh: Mesh):
        """Bind the static parts.

        Args:
          config: of the run, or its static key. task: a TraceableTask, or for a HostSampler any Task.
          run_rollout: from `make_rollout`. mesh: rows are sharded over it.
        """
        self.config, self.task, self.mesh = config, task, mesh
        self.run_rollout = run_rollout
        self.sampler_weights = make_sampler_weights(config, mesh)

    def start(self, state: TrainState, weights: Params, number: Int[Arrays, ""]) -> StartedRound:
        """Put a rollout on the device's queue.

        Args:
          state: its data position and hyperparams decide the prompts, its step the randomness.
          weights: from `sampler_weights`. number: int32, of the round within this step, from 0.
        Returns: the round, to be finished. It returns at once; the device may be at work on something else still.
        """
        # A round is started and finished apart for `make_async_step`: the update goes on the queue between the two, and the
        # device works on it while the host computes the rewards.
        rolled, shuffle_key = self.sample(state, weights, self.prompts(state, number), number)
        return StartedRound(weights, rolled, shuffle_key, state.step)

    def sample(
        self, state: TrainState, weights: Params, prompts: Prompts, number: Int[Arrays, ""]
    ) -> tuple[Rollout, Key[jax.Array, ""]]:
        """Sample a round's completions of prompts; -> (them, `StartedRound.shuffle_key`). Others: as `start` takes them."""
        assert state.hyperparams is not None, "a state to sample with has its hyperparams"
        key, shuffle_key = (
            jax.random.fold_in(key_for(state.hyperparams.seed, purpose, state.step), number)
            for purpose in ("rollout", "shuffle")
        )
        return self.run_rollout(weights, prompts, key), shuffle_key

    def finish(self, started: StartedRound) -> tuple[Batch, dict[str, Metric]]:
        """Score a round; -> (its Batch, metrics of all that was sampled)."""
        reward = self.reward(started.rollout, started.step)
        return self.make_batch(started.rollout, reward, started.shuffle_key, started.step)

    def prompts(self, state: TrainState, number: Int[Arrays, ""]) -> Prompts:
        """Return the training prompts of a round."""
        P = self.config.rollout.num_prompts
        assert state.hyperparams is not None
        return self.task.train_prompts(state.num_prompts_drawn + number * P, P, state.hyperparams.seed)

    def narrow(self, batch: Batch) -> Batch:
        """Return the batch: its prompts have one width always, for they are part of a compiled program."""
        return batch

    def reward(self, rolled: Rollout, step: Int[Arrays, ""]) -> Reward:
        """Score every completion by the task's reward. step: int32, whose policy sampled."""
        del step
        return self.task.reward(rolled.prompts.answer, rolled.tokens_PGT, rolled.mask_PGT)

    def make_batch(
        self, rolled: Rollout, reward: Reward, shuffle_key: Key[jax.Array, ""], step: Int[Arrays, ""]
    ) -> tuple[Batch, dict[str, Metric]]:
        """Shape the rewards.

        Args:
          rolled: completions [P, G, T]. reward: the task's, [P, G]. shuffle_key: for shuffle_rewards.
          step: int32, whose policy sampled.
        Returns: (the Batch, rows sharded over the mesh; metrics of all that was sampled).
        """
        if self.config.shuffle_rewards:
            reward = shaping.shuffle_rewards(reward, shuffle_key)
        batch = shaping.make_batch(
            rolled,
            reward,
            step,
            max_completion_tokens=self.config.rollout.max_completion_tokens,
            cache_tokens=shaping.num_cache_tokens(self.config.overlong, self.config.rollout.max_completion_tokens),
            easy_share=self.config.overlong.easy_share,
            success_threshold=self.config.objective.success_threshold,
        )
        if knows_credit(self.task):
            sampled = rolled.tokens_PGT, rolled.mask_PGT, rolled.sampler_logp_PGT
            batch = dataclasses.replace(batch, credit_PGT=self.task.token_credit(rolled.prompts.answer, *sampled))
        if self.config.objective.needs_step_rewards:
            step_reward_PGT = self.task.step_rewards(rolled.prompts.answer, rolled.tokens_PGT, rolled.mask_PGT)
            if self.config.shuffle_rewards:
                step_reward_PGT = shaping.shuffle_rows(step_reward_PGT, shuffle_key)
            batch = dataclasses.replace(batch, step_reward_PGT=step_reward_PGT)
        metrics = {**sample_metrics(batch, self.config.objective.success_threshold), **reward.metrics}
        return constrain(batch, self.mesh, ROWS), metrics


class HostSampler(DeviceSampler):
    """Rounds of a task on the host: prompts and rewards are numpy arrays, the parts between them are jitted one by one."""

    def __init__(self, config: Config, task: Task, run_rollout: RunRollout, mesh: Mesh):
        super().__init__(config, task, run_rollout, mesh)
        # No program holds a whole round, since prompts and rewards need the host, so each of the parts is one. The sharding of
        # the rollout is fixed: `addressable_rows` asks which rows are this process's.
        self.run_rollout = jax.jit(run_rollout, out_shardings=NamedSharding(mesh, SAMPLED_ROWS))
        self.sampler_weights = jax.jit(self.sampler_weights)
        self.make_batch = jax.jit(self.make_batch)
        self._prompt_lengths = jax.jit(prompt_lengths, out_shardings=NamedSharding(mesh, REPLICATED))

    @staticmethod
    def while_loop(cond: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any) -> Any:
        """Loop like `jax.lax.while_loop`, for bodies that need the host."""
        # The condition reads rewards, which all processes have in full: so all of them decide alike, and come to the same
        # number of rollouts. If one left the loop alone, the others would wait for it in a collective.
        while np.asarray(cond(carry)):
            carry = body(carry)
        return carry

    def prompts(self, state: TrainState, number: Int[Arrays, ""]) -> Prompts:
        """Return the training prompts of a round; each process reads those of its own devices."""
        return self.prompts_at(int(state.num_prompts_drawn + number * self.config.rollout.num_prompts))

    def prompts_at(self, start: int) -> Prompts:
        """Return a batch of training prompts from a position of the data on."""
        P = self.config.rollout.num_prompts
        read = hosts.make_global_batch(lambda first, num: self.task.train_prompts(start + first, num), P, self.mesh)
        return self._fit(read)

    def narrow(self, batch: Batch) -> Batch:
        """Cut the prompts of a batch, which waited at the task's width, to their bucket."""
        prompts = self._fit(batch.rollout.prompts)
        return dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, prompts=prompts))

    def _fit(self, prompts: Prompts) -> Prompts:
        """Give prompts the width of their bucket, and say which rows are long."""
        buckets = prompt_buckets(self.config, prompts.tokens_PS.shape[1])
        if len(buckets) == 1:
            return prompts
        # Widths decide which program runs, so all processes must take the same ones: each is told all lengths.
        prompts = fit_prompts(
            prompts, np.asarray(self._prompt_lengths(prompts.mask_PS)), num_sampling_shards(self.mesh), buckets
        )
        if num_sampling_shards(self.mesh) > num_row_shards(self.mesh):
            # The few long ones are counted by shards of a rollout, and an update's are larger.
            prompts = without_long_rows(prompts)
        return prompts

    def reward(self, rolled: Rollout, step: Int[Arrays, ""]) -> Reward:
        """Score every completion: each process its own rows, and all processes get the rewards of all."""
        if isinstance(self.task, HostTask):
            self.task.step = int(step)
        return score_local_rows(self.task, rolled)


def end_tokens(task: Task) -> EndTokens:
    """Return what completions of a task end with."""
    automaton = None
    if strings := getattr(task, "stop_strings", ()):
        automaton = _automaton(task.tokenizer, strings)
    return EndTokens(task.stop_ids, task.tokenizer.pad_id, automaton)


@functools.lru_cache(maxsize=4)
def _automaton(tokenizer: Tokenizer, strings: tuple[str, ...]) -> StopStrings:
    """Make the automaton of stop strings. With a large vocabulary that takes a second, so it is kept for the evaluation."""
    return stop_strings(strings, token_texts(tokenizer))


def make_sampler(config: Config, task: Task | TraceableTask, model: ModelDef, mesh: Mesh) -> DeviceSampler:
    """Make the sampler that suits the task.

    Args:
      config: of the run, or its static key. task: traceable or on the host. model: decoder. mesh: rows are sharded over it.
    Returns: a DeviceSampler for a traceable task, else a HostSampler.
    """
    run_rollout = make_rollout(model, config.rollout, end_tokens(task), mesh)
    if task.is_traceable:
        return DeviceSampler(config, task, run_rollout, mesh)
    return HostSampler(config, task, run_rollout, mesh)


def score_local_rows(task: Task, rolled: Rollout) -> Reward:
    """Call `task.reward` on this process's rows, and gather the rewards of all rows in every process."""
    # Scoring is what takes the host's time, so no row is scored twice. Rewards decide which groups are kept and if another
    # round is needed, and every process must decide that alike: so all of them get all rewards, a few numbers for each row.
    rows, local = hosts.addressable_rows((rolled.prompts.answer, rolled.tokens_PGT, rolled.mask_PGT))
    reward = task.reward(*local)
    own = (reward.task_PG, reward.shaping_PG, reward.is_scored_PG)
    task_PG, shaping_PG, is_scored_PG = hosts.allgather_rows(rows, own, len(rolled.tokens_PGT))
    metrics = metrics_lib.reduce_stacked(hosts.process_allgather(reward.metrics))
    return Reward(task_PG, shaping_PG, metrics, is_scored_PG)


def sample_metrics(batch: Batch, success_threshold: float) -> dict[str, Metric]:
    """Compute metrics of the policy in a round, over all of its completions, kept or not."""
    # Of the kept groups alone they would say how well the filter works: each has right and wrong answers in it. A row without a
    # score is in no mean of rewards, as it is in no statistic of the update; `reward/unscored` is its count.
    rolled = batch.rollout
    lengths_PG, is_scored_PG = rolled.mask_PGT.sum(-1), batch.is_scored_PG
    if is_scored_PG is None:
        is_scored_PG = jnp.ones_like(batch.task_reward_PG, bool)
    is_right_PG = is_scored_PG & (batch.task_reward_PG >= success_threshold)
    is_wrong_PG = is_scored_PG & ~is_right_PG
    right_PGT, wrong_PGT = (rolled.mask_PGT * each[..., None] for each in (is_right_PG, is_wrong_PG))
    return {
        "reward/mean": Mean.of(batch.reward_PG, is_scored_PG),
        "reward/std": Std.of(batch.reward_PG, is_scored_PG),
        "reward/success": Mean.of(is_right_PG.astype(jnp.float32), is_scored_PG),
        "reward/unscored": Mean.of(1.0 - is_scored_PG),
        "policy/entropy": Mean.of(rolled.entropy_PGT, rolled.mask_PGT),
        "policy/entropy_right": Mean.of(rolled.entropy_PGT, right_PGT),
        "policy/entropy_wrong": Mean.of(rolled.entropy_PGT, wrong_PGT),
        "completion/length_mean": Mean.of(lengths_PG),
        "completion/length_right": Mean.of(lengths_PG, is_right_PG),
        "completion/length_wrong": Mean.of(lengths_PG, is_wrong_PG),
        "completion/length_max": Max(lengths_PG.max()),
        "completion/truncated": Mean.of(rolled.is_truncated_PG.astype(jnp.float32)),
        "groups/uninformative": Mean.of(1.0 - shaping.is_informative(batch.task_reward_PG, is_scored_PG)),
    }
