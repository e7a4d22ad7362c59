"""Collecting for several runs of one vmapped call whose tasks are on the host."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.metrics import Metric
from grpo_jax.tasks.host import REWARD_ERRORS, HostTask
from grpo_jax.training.iteration import Collected
from grpo_jax.training.run import Run
from grpo_jax.training.samplers import HostSampler, StartedRound
from grpo_jax.training.stacking import axes_of, stack, unstack
from grpo_jax.training.widths import with_prompt_width
from grpo_jax.types import Batch, Prompts, Rollout, TrainState


class CollectTogether:
    """collect(state) -> (state, batch, metrics), all of them stacked; see `iteration.Collect`, which is of one run.

    One rollout samples for all runs, and reads once what they share. Then each run's completions are scored by its own task,
    one run after the other, so that the scorers of a run have the machine as they would alone.
    """

    def __init__(self, runs: Sequence[Run], workdirs: Sequence[pathlib.Path], *, shares_base: bool) -> None:
        """Bind the runs.

        Args:
          runs: of one joint key, without dynamic sampling or batches sampled ahead. workdirs: their folders.
          shares_base: as `Run.vmapped` takes it.
        """
        self.samplers, self.workdirs = [run.fns.sampler for run in runs], workdirs
        self.num_prompts = runs[0].config.rollout.num_prompts
        first = self.samplers[0]

        def sample(state: TrainState, prompts: Prompts) -> tuple[Rollout, jax.Array]:
            return first.sample(state, first.sampler_weights(state.policy), prompts, jnp.int32(0))

        self._sample = jax.jit(jax.vmap(sample, in_axes=(axes_of(shares_base), 0)))

    def __call__(self, state: TrainState) -> Collected:
        rolled, shuffle_keys = self._sample(state, self.prompts(np.asarray(state.num_prompts_drawn)))
        num = len(self.samplers)
        members = zip(unstack(rolled, num), unstack(shuffle_keys, num), unstack(state.step, num), strict=True)
        found = [self.score(place, StartedRound({}, *each)) for place, each in enumerate(members)]
        batch, metrics = stack(found)
        return dataclasses.replace(state, num_prompts_drawn=state.num_prompts_drawn + self.num_prompts), batch, metrics

    def prompts(self, positions: np.ndarray) -> Prompts:
        """Return the runs' prompts at their positions of the data, stacked, all as wide as the widest of them."""
        found = []
        for sampler, position in zip(self.samplers, positions, strict=True):
            assert isinstance(sampler, HostSampler)
            found.append(sampler.prompts_at(int(position)))
        width = max(prompts.tokens_PS.shape[1] for prompts in found)
        return stack([with_prompt_width(prompts, width) for prompts in found])

    def score(self, place: int, started: StartedRound) -> tuple[Batch, dict[str, Metric]]:
        """Score the completions of one run."""
        sampler = self.samplers[place]
        if isinstance(sampler.task, HostTask):  # runs of one seed have it in common
            sampler.task.keep_errors_in(self.workdirs[place] / REWARD_ERRORS)
        return sampler.finish(started)
