"""Held-out success: greedy, and the mean over samples at the training temperature. Deterministic for a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import Config
from grpo_jax.iteration import make_rollout
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rng import key_for
from grpo_jax.rollout import RolloutSpec
from grpo_jax.sampling import GREEDY
from grpo_jax.tasks import Task
from grpo_jax.types import Params, Prompts

Evaluate = Callable[[Params], dict[str, float]]


def make_evaluate(config: Config, task: Task, model: ModelDef, spec: RolloutSpec, mesh: Mesh) -> Evaluate:
    """-> evaluate(params) -> {"eval/success", "eval/length_mean"[, "eval/success_sampled"]} over all held-out prompts.

    Batches have one fixed shape; the last one is filled with repeats that are not counted.
    """
    prompts = jax.device_get(task.eval_prompts())
    num = len(prompts.tokens_PS)
    width = -(-min(config.eval.batch_size, num) // mesh.size) * mesh.size
    greedy = jax.jit(make_rollout(model, dataclasses.replace(spec, group_size=1, sampling=GREEDY), mesh))
    sampled = jax.jit(make_rollout(model, dataclasses.replace(spec, group_size=max(config.eval.num_samples, 1)), mesh))

    def run(rollout, params: Params) -> tuple[float, float]:
        """-> (share of successes, mean length in tokens)."""
        successes, lengths = [], []
        for start in range(0, num, width):
            rows = np.minimum(np.arange(start, start + width), num - 1)
            batch: Prompts = jax.tree.map(lambda x: x[rows], prompts)  # noqa: B023
            rolled = rollout(params, batch, key_for(config.seed, "evaluate", start))
            tokens, mask = np.asarray(rolled.tokens_PGT), np.asarray(rolled.mask_PGT)
            task_reward = np.asarray(task.reward(batch.answer, tokens, mask).task_PG)
            kept = min(width, num - start)
            successes.append(task_reward[:kept] >= config.objective.success_threshold)
            lengths.append(mask[:kept].sum(-1))
        return float(np.concatenate(successes).mean()), float(np.concatenate(lengths).mean())

    def evaluate(params: Params) -> dict[str, float]:
        success, length = run(greedy, params)
        results = {"eval/success": success, "eval/length_mean": length}
        if config.eval.num_samples:
            results["eval/success_sampled"], _ = run(sampled, params)
        return results

    return evaluate
