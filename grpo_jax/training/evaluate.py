"""Held-out success: greedy, and what samples at the training temperature say. Deterministic for a seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from grpo_jax.analysis.estimates import Estimate, estimate, majority, pass_at_k
from grpo_jax.config import Config, RolloutConfig
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel import hosts
from grpo_jax.parallel.sharding import ROWS, num_row_shards
from grpo_jax.rng import key_for
from grpo_jax.rollout.rollout import EndTokens, greedy
from grpo_jax.tasks import Task
from grpo_jax.training.samplers import end_tokens, make_rollout, make_sampler_weights
from grpo_jax.types import Params, Rollout

Evaluate = Callable[[Params], dict[str, Estimate]]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Completions of all held-out prompts. is_right_PG: bool; lengths_PG: tokens; majority_P: `estimates.majority`."""

    is_right_PG: np.ndarray
    lengths_PG: np.ndarray
    majority_P: np.ndarray


def make_evaluate(config: Config, task: Task, model: ModelDef, mesh: Mesh) -> Evaluate:
    """-> evaluate(params) -> {name: Estimate over all held-out prompts}.

    "success": the greedy answer is right. "length_mean": of the greedy answers, tokens.
    With n = eval.num_samples > 0, from n samples of each prompt at the training temperature: "mean@n", "pass@k" for
    k = 2, 4, ... n, and "maj@n".
    Batches have one fixed shape; the last one is filled with repeats that are not counted. Of several hosts each judges the
    rows of its own devices.
    """
    prompts = jax.device_get(task.eval_prompts())
    num = len(prompts.tokens_PS)
    shards = num_row_shards(mesh)
    width = -(-min(config.eval.batch_size, num) // shards) * shards
    n = config.eval.num_samples
    sampler_weights = jax.jit(make_sampler_weights(config, mesh))
    ends = end_tokens(task)
    greedily = compiled_rollout(model, greedy(config.rollout), ends, mesh)
    sampled = compiled_rollout(model, dataclasses.replace(config.rollout, group_size=max(n, 1)), ends, mesh)

    def answer(rollout: Any, params: Params) -> Answers:
        batches = []
        for start in range(0, num, width):
            rows = np.minimum(np.arange(start, start + width), num - 1)
            batch = hosts.make_global_batch(lambda i, n: jax.tree.map(lambda x: x[rows[i : i + n]], prompts), width, mesh)  # noqa: B023
            rolled = rollout(params, batch, key_for(config.seed, "evaluate", start))
            batches.append(judged(rolled))
        return Answers(*(np.concatenate(each)[:num] for each in zip(*batches, strict=True)))

    def judged(rolled: Rollout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The fields of `Answers` for one batch."""
        rows, (answer, tokens, mask) = hosts.addressable_rows((rolled.prompts.answer, rolled.tokens_PGT, rolled.mask_PGT))
        is_right = np.asarray(task.reward(answer, tokens, mask).task_PG) >= config.objective.success_threshold
        own = is_right, mask.sum(-1), majority(task.final_answers(tokens, mask), is_right)
        return hosts.allgather_rows(rows, own, width)

    def evaluate(params: Params) -> dict[str, Estimate]:
        params = sampler_weights(params)
        best = answer(greedily, params)
        values = {"success": best.is_right_PG[:, 0], "length_mean": best.lengths_PG[:, 0]}
        if n:
            drawn = answer(sampled, params)
            num_right_P = drawn.is_right_PG.sum(-1)
            values[f"mean@{n}"] = drawn.is_right_PG.mean(-1)
            values |= {f"pass@{k}": pass_at_k(num_right_P, n, k) for k in ks(n)}
            values[f"maj@{n}"] = drawn.majority_P
        return {name: estimate(each, config.seed) for name, each in values.items()}

    return evaluate


@functools.lru_cache(maxsize=16)
def compiled_rollout(model: ModelDef, config: RolloutConfig, ends: EndTokens, mesh: Mesh) -> Callable[..., Any]:
    """`make_rollout`, compiled once for all runs of one process."""
    return jax.jit(make_rollout(model, config, ends, mesh), out_shardings=NamedSharding(mesh, ROWS))


def ks(num_samples: int) -> list[int]:
    """2, 4, 8, ... and the number of samples itself: the k of pass@k (pass@1 is the mean)."""
    return sorted({2**i for i in range(1, num_samples.bit_length()) if 2**i <= num_samples} | {num_samples} - {1})


def to_metrics(estimates: dict[str, Estimate]) -> dict[str, float]:
    """Flat, for a run's records: eval/<name>, eval/<name>_low, eval/<name>_high."""
    metrics = {}
    for name, each in estimates.items():
        metrics |= {f"eval/{name}": each.value, f"eval/{name}_low": each.low, f"eval/{name}_high": each.high}
    return metrics
