"""Held-out success: greedy, and what samples at the training temperature say. Deterministic for a seed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float

from grpo_jax.analysis.estimates import Estimate, estimate, majority, pass_at_k
from grpo_jax.config import Config, RolloutConfig
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel import hosts
from grpo_jax.parallel.sharding import SAMPLED_ROWS, num_sampling_shards
from grpo_jax.rng import key_for
from grpo_jax.rollout.rollout import EndTokens, greedy
from grpo_jax.tasks import Task
from grpo_jax.training.samplers import end_tokens, make_rollout, make_sampler_weights
from grpo_jax.training.widths import bucket_of, prompt_buckets, prompt_lengths, with_prompt_width
from grpo_jax.types import Params, Prompts, Reward, Rollout

Evaluate = Callable[[Params], dict[str, Estimate]]


@dataclasses.dataclass(frozen=True)
class Answers:
    """Completions of all held-out prompts.

    is_scored_PG: False where scoring failed, came late or had no opinion. lengths_PG: tokens.
    majority_P: of `estimates.majority`.
    """

    is_right_PG: Bool[np.ndarray, "P G"]
    is_scored_PG: Bool[np.ndarray, "P G"]
    lengths_PG: Float[np.ndarray, "P G"]
    majority_P: Float[np.ndarray, " P"]


def make_evaluate(config: Config, task: Task, model: ModelDef, mesh: Mesh) -> Evaluate:
    """Bind an evaluation on the held-out prompts.

    "success": the greedy answer is right. "length_mean": of the greedy answers, tokens. "unscored", where that happens:
    the greedy answer has no score. Such an answer, and such a sample, counts as not right.
    With n = eval.num_samples > 0, from n samples of each prompt at the training temperature: "mean@n", "pass@k" for
    k = 2, 4, ... n, and "maj@n". Of several hosts each scores the rows of its own devices.

    Args:
      config: seed, eval, rollout (distribution and budget) and success_threshold are read.
      task: of the prompts and the reward. model: decoder. mesh: rows are sharded over it.
    Returns: evaluate(params) -> {name: Estimate over all held-out prompts}. params: all weights of the policy.
    """
    prompts = jax.device_get(task.eval_prompts())
    num = len(prompts.tokens_PS)
    # One width for all batches, so that the rollout compiles once, and a multiple of the shards, so that rows divide evenly.
    # The last batch is filled up with repeats of the last prompt; `answer` drops them before anything is averaged.
    shards = num_sampling_shards(mesh)
    width = -(-min(config.eval.batch_size, num) // shards) * shards
    buckets = prompt_buckets(config, prompts.tokens_PS.shape[1])
    if task.is_traceable:
        buckets = buckets[-1:]  # few tokens, and the training's programs have this width
    n = config.eval.num_samples
    sampler_weights = jax.jit(make_sampler_weights(config, mesh))
    ends = end_tokens(task)
    greedily = compiled_rollout(model, greedy(config.rollout), ends, mesh)
    sampled = compiled_rollout(model, dataclasses.replace(config.rollout, group_size=max(n, 1)), ends, mesh)

    def answer(rollout: Callable[..., Rollout], params: Params) -> Answers:
        batches = []
        for start in range(0, num, width):
            # The step is in no key: evaluations along a run draw with the same noise, so that their differences are the
            # policy's.
            rows = np.minimum(np.arange(start, start + width), num - 1)
            batch = take_rows(prompts, rows, buckets)
            batch = hosts.make_global_batch(lambda i, n, batch=batch: jax.tree.map(lambda x: x[i : i + n], batch), width, mesh)
            rolled = rollout(params, batch, key_for(config.seed, "evaluate", start))
            batches.append(score(rolled))
        return Answers(*(np.concatenate(each)[:num] for each in zip(*batches, strict=True)))

    def score(rolled: Rollout) -> tuple[np.ndarray, ...]:
        """Compute the fields of `Answers` for one batch."""
        rows, (answer, tokens, mask) = hosts.addressable_rows((rolled.prompts.answer, rolled.tokens_PGT, rolled.mask_PGT))
        is_scored, is_right = judge(task.reward(answer, tokens, mask), config.objective.success_threshold)
        own = is_right, is_scored, mask.sum(-1), majority(task.final_answers(tokens, mask), is_right)
        return hosts.allgather_rows(rows, own, width)

    def evaluate(params: Params) -> dict[str, Estimate]:
        # Once for all batches: the rollout would gather sharded weights in each of its calls.
        params = sampler_weights(params)
        values = values_of_greedy(answer(greedily, params))
        if n:
            values |= values_of_samples(answer(sampled, params))
        return {name: estimate(each, config.seed) for name, each in values.items()}

    return evaluate


def values_of_greedy(best: Answers) -> dict[str, np.ndarray]:
    """Return the values of each prompt, [P], from its greedy answer."""
    values = {"success": best.is_right_PG[:, 0], "length_mean": best.lengths_PG[:, 0]}
    if not best.is_scored_PG.all():
        values["unscored"] = ~best.is_scored_PG[:, 0]
    return values


def values_of_samples(drawn: Answers) -> dict[str, np.ndarray]:
    """Return the values of each prompt, [P], from its samples."""
    n, num_right_P = drawn.is_right_PG.shape[1], drawn.is_right_PG.sum(-1)
    values = {f"mean@{n}": drawn.is_right_PG.mean(-1)}
    values |= {f"pass@{k}": pass_at_k(num_right_P, n, k) for k in ks(n)}
    return {**values, f"maj@{n}": drawn.majority_P}


def judge(reward: Reward, success_threshold: float) -> tuple[Bool[np.ndarray, "P G"], Bool[np.ndarray, "P G"]]:
    """Tell which completions have a score of the task's own, and which are successes: none without a score is."""
    # Not left out: a mean over other questions could not be compared with the one before. What shaping says does not matter.
    is_scored_PG = np.isfinite(reward.task_PG)
    if reward.has_task_score_PG is not None:
        is_scored_PG &= np.asarray(reward.has_task_score_PG)
    return is_scored_PG, is_scored_PG & (np.asarray(reward.task_PG) >= success_threshold)


def take_rows(prompts: Prompts, rows: np.ndarray, buckets: tuple[int, ...]) -> Prompts:
    """Take a batch of prompts, at the width of its bucket.

    Args:
      prompts: numpy arrays of all. rows: of the batch.
      buckets: from `prompt_buckets`.
    Returns: numpy arrays.
    """
    batch = jax.tree.map(lambda x: x[rows], prompts)
    return jax.tree.map(np.asarray, with_prompt_width(batch, bucket_of(int(prompt_lengths(batch.mask_PS).max()), buckets)))


@functools.lru_cache(maxsize=16)
def compiled_rollout(model: ModelDef, config: RolloutConfig, ends: EndTokens, mesh: Mesh) -> Callable[..., Rollout]:
    """Jit `make_rollout`, once for all runs of one process.

    Args:
      model, config, ends, mesh: as there; all hashable.
    Returns: run(params, prompts, key) -> Rollout, its rows sharded over the mesh.
    """
    # The runs of a sweep in this process differ in numbers that no rollout depends on; jit's cache belongs to the function.
    return jax.jit(make_rollout(model, config, ends, mesh), out_shardings=NamedSharding(mesh, SAMPLED_ROWS))


def ks(num_samples: int) -> list[int]:
    """List the k of pass@k: 2, 4, 8, ... and the number of samples itself (pass@1 is the mean)."""
    return sorted({2**i for i in range(1, num_samples.bit_length()) if 2**i <= num_samples} | {num_samples} - {1})


def to_metrics(estimates: dict[str, Estimate]) -> dict[str, float]:
    """Flatten estimates for a run's records: eval/<name>, eval/<name>_low, eval/<name>_high."""
    metrics = {}
    for name, each in estimates.items():
        metrics |= {f"eval/{name}": each.value, f"eval/{name}_low": each.low, f"eval/{name}_high": each.high}
    return metrics
