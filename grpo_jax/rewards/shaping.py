"""What happens to a task's reward before the objective sees it; the task reward itself is kept beside it, untouched."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from grpo_jax.types import Batch, Reward, Rollout


def soft_overlong(lengths, is_truncated, *, max_completion_tokens: int, cache_tokens: int):
    """Soft overlong punishment in [-1, 0], added to the reward (DAPO, arXiv 2503.14476, eq. 13). Lengths in tokens.

    0 up to L_max - L_cache, then linear down to -1 at L_max; -1 for a completion that hit L_max without a stop token.
    cache_tokens = 0: no punishment at all.
    """
    if cache_tokens == 0:
        return jnp.zeros_like(lengths, dtype=jnp.float32)
    beyond = (lengths - (max_completion_tokens - cache_tokens)) / cache_tokens
    return jnp.where(is_truncated, -1.0, -jnp.clip(beyond, 0.0, 1.0))


def is_informative(task_reward_PG):
    """bool[P]: the group's rewards differ, so it says something about what is better (DAPO, arXiv 2503.14476, eq. 11)."""
    return task_reward_PG.max(-1) > task_reward_PG.min(-1)


def shuffle_rewards(reward: Reward, key) -> Reward:
    """The control experiment: the same rewards, handed to the wrong rows (permuted over the whole batch)."""
    task_PG, shaping_PG = (
        jax.random.permutation(key, x_PG.reshape(-1)).reshape(x_PG.shape) for x_PG in (reward.task_PG, reward.shaping_PG)
    )
    return Reward(task_PG, shaping_PG, reward.metrics)


def make_batch(rollout: Rollout, reward: Reward, step, *, max_completion_tokens: int, cache_tokens: int) -> Batch:
    """Rollout + reward -> Batch, the shaped reward beside the task's. step: whose policy sampled it."""
    lengths_PG = rollout.mask_PGT.sum(-1)
    punishment_PG = soft_overlong(
        lengths_PG, rollout.is_truncated_PG, max_completion_tokens=max_completion_tokens, cache_tokens=cache_tokens
    )
    task_reward_PG = jnp.asarray(reward.task_PG, jnp.float32)
    sampled_at_P = jnp.full(len(task_reward_PG), step, jnp.int32)
    return Batch(rollout, task_reward_PG, task_reward_PG + reward.shaping_PG + punishment_PG, sampled_at_P)
