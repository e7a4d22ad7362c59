"""Sampling rounds: prompts -> rollout -> reward -> batch, for tasks on the device and for tasks on the host.

Both samplers have one interface. A round is started, which puts its rollout on the device's queue and returns at once, and
finished, which takes the rewards. Between the two the host may put more work on the queue. With a traceable task all of it is
a pure function and can be part of one compiled call; a task on the host jits its own parts, and only tokens and rewards pass
through the host. Of several hosts each reads and scores its own rows; then all of them know all rewards, so that they decide
alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from grpo_jax import metrics as metrics_lib
from grpo_jax.config import Config, RolloutConfig
from grpo_jax.metrics import Max, Mean, Metric
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel import hosts
from grpo_jax.parallel.sharding import REPLICATED, ROWS, constrain, gather_params_for_decoding, shard_map_over_batch
from grpo_jax.rewards import shaping
from grpo_jax.rng import key_for
from grpo_jax.rollout.rollout import EndTokens, rollout, row_keys
from grpo_jax.tasks import Task, TraceableTask
from grpo_jax.types import Batch, Params, Prompts, Reward, Rollout, TrainState


class StartedRound(NamedTuple):
    """A rollout that may still be under way.

    weights: what it is sampled with, for further rounds. shuffle_key: of the control experiment. step: int32, whose policy
    samples.
    """

    weights: Params
    rollout: Rollout
    shuffle_key: Any
    step: Any


def make_rollout(
    model: ModelDef, config: RolloutConfig, ends: EndTokens, mesh: Mesh
) -> Callable[[Params, Prompts, Any], Rollout]:
    """Bind a rollout to a mesh. Each device leaves its decoding loop when its own rows have ended.

    Args:
      model: decoder. config: group size, budget, distribution. ends: stop and pad ids. mesh: rows are sharded over it.
    Returns: run(params, prompts, key) -> Rollout. params: as `gather_params_for_decoding` gives them; sharded over fsdp they
      would be gathered in every call.
    """
    sharded = shard_map_over_batch(
        lambda params, prompts, keys_PG: rollout(model, params, prompts, keys_PG, config, ends),
        mesh,
        (REPLICATED, ROWS, ROWS),
        ROWS,
    )

    def run(params: Params, prompts: Prompts, key: Any) -> Rollout:
        keys_PG = row_keys(key, len(prompts.tokens_PS), config.group_size)
        prompts, keys_PG = constrain((prompts, keys_PG), mesh, ROWS)
        return sharded(params, prompts, keys_PG)

    return run


def make_sampler_weights(config: Config, mesh: Mesh) -> Callable[[Params], Params]:
    """Bind `gather_params_for_decoding`: the policy -> its weights as rollouts read them, made once for a step."""
    dtype, min_elements = jnp.dtype(config.model.dtype), config.mesh.fsdp_min_elements
    return lambda policy: gather_params_for_decoding(policy, mesh, min_elements, dtype)


class DeviceSampler:
    """Rounds of a traceable task: every method is a pure JAX function."""

    while_loop = staticmethod(jax.lax.while_loop)

    def __init__(self, config: Config, task: Any, run_rollout: Callable[[Params, Prompts, Any], Rollout], mesh: Mesh):
        """Bind the static parts. task: a TraceableTask, or for a HostSampler any Task. run_rollout: from `make_rollout`."""
        self.config, self.task, self.mesh = config, task, mesh
        self.run_rollout = run_rollout
        self.sampler_weights = make_sampler_weights(config, mesh)

    def start(self, state: TrainState, weights: Params, number: Any) -> StartedRound:
        """Put a rollout on the device's queue.

        Args:
          state: its data position and hyperparams decide the prompts, its step the randomness.
          weights: from `sampler_weights`. number: int32, of the round within this step, from 0.
        """
        assert state.hyperparams is not None, "a state to sample with has its hyperparams"
        prompts = self.prompts(state, number)
        key, shuffle_key = (
            jax.random.fold_in(key_for(state.hyperparams.seed, purpose, state.step), number)
            for purpose in ("rollout", "shuffle")
        )
        return StartedRound(weights, self.run_rollout(weights, prompts, key), shuffle_key, state.step)

    def finish(self, started: StartedRound) -> tuple[Batch, dict[str, Metric]]:
        """Reward a round; -> (its Batch, metrics of all that was sampled)."""
        return self.make_batch(started.rollout, self.reward(started.rollout), started.shuffle_key, started.step)

    def prompts(self, state: TrainState, number: Any) -> Prompts:
        """The training prompts of a round."""
        P = self.config.rollout.num_prompts
        assert state.hyperparams is not None
        return self.task.train_prompts(state.num_prompts_drawn + number * P, P, state.hyperparams.seed)

    def reward(self, rolled: Rollout) -> Reward:
        """The task's word on every completion."""
        return self.task.reward(rolled.prompts.answer, rolled.tokens_PGT, rolled.mask_PGT)

    def make_batch(self, rolled: Rollout, reward: Reward, shuffle_key: Any, step: Any) -> tuple[Batch, dict[str, Metric]]:
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
            cache_tokens=self.config.overlong.cache_tokens,
        )
        metrics = {**sample_metrics(batch, self.config.objective.success_threshold), **reward.metrics}
        return constrain(batch, self.mesh, ROWS), metrics


class HostSampler(DeviceSampler):
    """Rounds of a task on the host: prompts and rewards are numpy arrays, the parts between them are jitted one by one."""

    def __init__(self, config: Config, task: Task, run_rollout: Callable[[Params, Prompts, Any], Rollout], mesh: Mesh):
        super().__init__(config, task, run_rollout, mesh)
        self.run_rollout = jax.jit(run_rollout, out_shardings=NamedSharding(mesh, ROWS))
        self.sampler_weights = jax.jit(self.sampler_weights)
        self.make_batch = jax.jit(self.make_batch)

    @staticmethod
    def while_loop(cond: Callable[[Any], Any], body: Callable[[Any], Any], carry: Any) -> Any:
        """`jax.lax.while_loop` for bodies that need the host."""
        while np.asarray(cond(carry)):
            carry = body(carry)
        return carry

    def prompts(self, state: TrainState, number: Any) -> Prompts:
        """The training prompts of a round; each process reads those of its own devices."""
        P = self.config.rollout.num_prompts
        start = int(state.num_prompts_drawn + number * P)
        return hosts.make_global_batch(lambda first, num: self.task.train_prompts(start + first, num), P, self.mesh)

    def reward(self, rolled: Rollout) -> Reward:
        """The task's word on every completion; each process scores its own rows, all of them get the whole."""
        return score_local_rows(self.task, rolled)


def end_tokens(task: Task) -> EndTokens:
    """The ids that completions of a task end with."""
    return EndTokens(task.stop_ids, task.tokenizer.pad_id)


def make_sampler(config: Config, task: Task | TraceableTask, model: ModelDef, mesh: Mesh) -> DeviceSampler:
    """Make the sampler that suits the task.

    Args:
      config: of the run, or its static key. task: traceable or on the host. model: decoder. mesh: rows are sharded over it.
    """
    run_rollout = make_rollout(model, config.rollout, end_tokens(task), mesh)
    if task.is_traceable:
        return DeviceSampler(config, task, run_rollout, mesh)
    return HostSampler(config, task, run_rollout, mesh)


def score_local_rows(task: Task, rolled: Rollout) -> Reward:
    """`task.reward` on this process's rows, then the rewards of all rows in every process."""
    rows, local = hosts.addressable_rows((rolled.prompts.answer, rolled.tokens_PGT, rolled.mask_PGT))
    reward = task.reward(*local)
    task_PG, shaping_PG = hosts.allgather_rows(rows, (reward.task_PG, reward.shaping_PG), len(rolled.tokens_PGT))
    return Reward(task_PG, shaping_PG, metrics_lib.reduce_stacked(hosts.process_allgather(reward.metrics)))


def sample_metrics(batch: Batch, success_threshold: float) -> dict[str, Metric]:
    """Metrics of the policy in a round, over all of its completions, kept or not."""
    rolled = batch.rollout
    lengths_PG = rolled.mask_PGT.sum(-1)
    return {
        "reward/mean": Mean.of(batch.reward_PG),
        "reward/success": Mean.of((batch.task_reward_PG >= success_threshold).astype(jnp.float32)),
        "policy/entropy": Mean.of(rolled.entropy_PGT, rolled.mask_PGT),
        "completion/length_mean": Mean.of(lengths_PG),
        "completion/length_max": Max(lengths_PG.max()),
        "completion/truncated": Mean.of(rolled.is_truncated_PG.astype(jnp.float32)),
        "groups/uninformative": Mean.of(1.0 - shaping.is_informative(batch.task_reward_PG)),
    }
