"""One iteration of training: collect a batch (more rounds, if groups say nothing), then update on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from grpo_jax import metrics as metrics_lib
from grpo_jax.config import Config
from grpo_jax.learner.train_step import TrainStep
from grpo_jax.metrics import Mean, Metric
from grpo_jax.rewards.shaping import is_informative
from grpo_jax.training import dynamic_sampling
from grpo_jax.training.samplers import DeviceSampler, StartedRound
from grpo_jax.training.widths import resize_batch, with_prompt_width
from grpo_jax.types import Arrays, Batch, GroupBuffer, TrainState

Collected = tuple[TrainState, Batch, dict[str, Metric]]
Iteration = Callable[[TrainState], Collected]


class SamplingCarry(NamedTuple):
    """Carried from one sampling round to the next. rounds: int32, rounds done in this iteration."""

    buffer: GroupBuffer
    rounds: Int[Arrays, ""]
    metrics: dict[str, Metric]


class Collect:
    """collect(state) -> (state with its data position and buffer moved on, batch to train on, metrics of all sampled).

    `start` puts the first rollout on the device's queue and `finish` does the rest, for callers that have work for the device
    in between. Traceable if the sampler's task is.
    """

    def __init__(self, config: Config, sampler: DeviceSampler):
        self.config, self.sampler = config, sampler
        # Each is one program where the task is the host's, too. Operation by operation many programs would be under way behind
        # a collective, and on CPUs of several processes they can take the threads that it needs: all wait for ever.
        self._add_round, self._is_short, self._take = map(jax.jit, (add_round, self.is_short, self.take))

    def __call__(self, state: TrainState) -> Collected:
        return self.finish(state, self.start(state))

    def start(self, state: TrainState) -> StartedRound:
        """Put the first round of the step on the device's queue."""
        # The weights are gathered over fsdp here; they stay in the StartedRound, and further rounds of the step use them again.
        return self.sampler.start(state, self.sampler.sampler_weights(state.policy), jnp.int32(0))

    def finish(self, state: TrainState, started: StartedRound) -> Collected:
        """Collect the batch that begins with a started round. state: the one it was started with."""
        if self.config.dynamic_sampling.enabled:
            return self.collect_informative(state, started)
        batch, metrics = self.sampler.finish(started)
        drawn = state.num_prompts_drawn + self.config.rollout.num_prompts
        return dataclasses.replace(state, num_prompts_drawn=drawn), batch, metrics

    def collect_informative(self, state: TrainState, started: StartedRound) -> Collected:
        """Sample rounds until the buffer holds a full batch of informative groups, or the cap is spent."""
        assert state.pending is not None, "dynamic sampling without a buffer in the state"

        def sample_round(done: SamplingCarry) -> SamplingCarry:
            # The state stays that of the step's beginning: the round's number alone sets prompts and keys apart.
            return self._add_round(done, *self.sampler.finish(self.sampler.start(state, started.weights, done.rounds)))

        # The first round is before the loop: a full buffer from last time must not leave a step without samples. It also gives
        # the loop's carry its metrics, whose names and shapes must be known before a traced loop begins.
        first = self._add_round(SamplingCarry(state.pending, jnp.int32(0), {}), *self.sampler.finish(started))
        done = self.sampler.while_loop(self._is_short, sample_round, first)
        batch, buffer, metrics = self._take(done)
        drawn = state.num_prompts_drawn + done.rounds * self.config.rollout.num_prompts
        return dataclasses.replace(state, pending=buffer, num_prompts_drawn=drawn), self.sampler.narrow(batch), metrics

    def is_short(self, done: SamplingCarry) -> Bool[Arrays, ""]:
        """Tell if another round is needed and may be sampled."""
        max_rounds = self.config.dynamic_sampling.max_sampling_rounds
        return (done.buffer.count < self.config.rollout.num_prompts) & (done.rounds < max_rounds)

    def take(self, done: SamplingCarry) -> tuple[Batch, GroupBuffer, dict[str, Metric]]:
        """Take a batch out of the buffer; -> (the batch, what is left in the buffer, metrics of the rounds)."""
        # With all rounds spent there may be fewer than P groups; shapes are static, so the missing ones come out masked.
        batch, buffer = dynamic_sampling.pop(done.buffer, self.config.rollout.num_prompts)
        one = jnp.float32(1)
        metrics = {
            **done.metrics,
            "groups/missing": Mean.of((batch.rollout.mask_PGT.sum((1, 2)) == 0).astype(jnp.float32)),
            "groups/rounds": Mean(done.rounds.astype(jnp.float32), one),
            "groups/pending": Mean(buffer.count.astype(jnp.float32), one),
        }
        return batch, buffer, metrics


def add_round(done: SamplingCarry, batch: Batch, metrics: dict[str, Metric]) -> SamplingCarry:
    """Put the informative groups of a round into the buffer, whose prompts may be wider than the round's."""
    batch_wide = with_prompt_width(batch, width_of(done.buffer.batch))
    buffer = dynamic_sampling.push(done.buffer, batch_wide, is_informative(batch.task_reward_PG, batch.is_scored_PG))
    return SamplingCarry(buffer, done.rounds + 1, metrics_lib.merge(done.metrics, metrics))


def width_of(batch: Batch) -> int:
    """Return the width of a batch's prompts."""
    return batch.rollout.prompts.tokens_PS.shape[1]


def make_iterations(collect: Callable[[TrainState], Collected], train_step: TrainStep, num_steps: int) -> Iteration:
    """Chain num_steps times collect and update, for a traceable task: pure, to be jitted with donated state.

    Args:
      collect, train_step: the two halves of a step. num_steps: steps in a call.
    Returns: iterate(state) -> (state, the batch sampled last, metrics with a leading axis of steps).
    """

    def step(state: TrainState) -> Collected:
        state, sampled_batch, sampled = collect(state)
        batch = sampled_batch
        if state.next_batch is not None:
            state, batch = take_oldest(state, sampled_batch)
        state, updated = train_step(state, batch)
        if state.next_batch is not None:
            del updated["policy/sampler_logp_gap"]  # as in `make_async_step`
        return state, sampled_batch, metrics_lib.merge(sampled, updated)

    def iterate(state: TrainState) -> Collected:
        def next_step(carry: tuple[TrainState, Batch], _: None):
            state, batch, metrics = step(carry[0])
            return (state, batch), metrics

        # The batch is carried and not stacked: only the last one is looked at, and all of them would take num_steps times the
        # memory. A carry needs a first value of the right shapes, which costs no computation this way.
        no_batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(step, state)[1])
        (state, batch), metrics = jax.lax.scan(next_step, (state, no_batch), None, length=num_steps)
        return state, batch, metrics

    return iterate


def make_async_step(collect: Collect, update: Callable[[TrainState], tuple[TrainState, dict[str, Metric]]]) -> Iteration:
    """Collect and update side by side, for a task of the host: while the device trains on one batch, the next is scored.

    A batch is sampled with the weights that this update begins with, so it is config.async_steps old when its turn comes. Its
    old log-probs are its sampler's, and the ratio corrects for the steps between (or its weight, see learner.old_logp).

    Args:
      collect: of a host's sampler. update: trains on `state.next_batch` and donates the state.
    Returns: async_step(state) -> (state, the batch sampled now, metrics).
    """
    snapshot = jax.jit(copy_sampling_state)

    def async_step(state: TrainState) -> Collected:
        # The update donates the state, and its buffers may be overwritten while further rounds still sample with them.
        seen = snapshot(state)
        assert state.next_batch is not None
        # Before the rollout is on the queue: the width of the batch is read from the device.
        width = width_of(state.next_batch)
        state = dataclasses.replace(state, next_batch=collect.sampler.narrow(state.next_batch))
        # Dispatch is asynchronous: the rollout and the update are on the device's queue, one behind the other, before the
        # host waits for the completions and scores them. So the update runs while the rewards are computed.
        started = collect.start(seen)
        state, updated = update(state)
        seen, batch, sampled = collect.finish(seen, started)
        del updated["policy/sampler_logp_gap"]  # the learner has moved on since: there is nothing to compare
        state, _ = take_oldest(state, resize_batch(batch, width))
        state = dataclasses.replace(state, num_prompts_drawn=seen.num_prompts_drawn, pending=seen.pending)
        return state, batch, metrics_lib.merge(sampled, updated)

    return async_step


def take_oldest(state: TrainState, newest: Batch) -> tuple[TrainState, Batch]:
    """Take the batch whose turn it is from those that wait, and put the newest behind them."""
    assert state.next_batch is not None
    oldest, following, *later = (state.next_batch, *state.later_batches, newest)
    return dataclasses.replace(state, next_batch=following, later_batches=tuple(later)), oldest


def prefetch_first_batches(
    collect: Callable[[TrainState], Collected], state: TrainState
) -> tuple[TrainState, dict[str, Metric]]:
    """Sample the first batches of an async run by themselves; -> (the state at step 0 with them, metrics of all sampled)."""
    assert state.next_batch is not None
    width, metrics = width_of(state.next_batch), {}
    # Sampled as if before step 0, which samples with its own randomness. It also marks them as old as all later ones are.
    for early in range(1 + len(state.later_batches), 0, -1):
        after, batch, sampled = collect(dataclasses.replace(state, step=state.step - early))
        state, _ = take_oldest(dataclasses.replace(after, step=after.step + early), resize_batch(batch, width))
        metrics = metrics_lib.merge(metrics, sampled)
    return state, metrics


def copy_sampling_state(state: TrainState) -> TrainState:
    """Copy the part of a state that `Collect` reads; the copy outlives the donated state."""
    # No rollout reads Adam's moments and the reference, and where all weights are trained they are three times the policy.
    unread = dict.fromkeys(("base", "opt_state", "ref_params", "moving_ref", "next_batch"))
    read = dataclasses.replace(state, params=state.policy, later_batches=(), **unread)
    return jax.tree.map(jnp.copy, read)
