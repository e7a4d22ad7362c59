"""Changes of a task's reward before the objective sees it; the task reward itself is kept beside it, untouched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key, Real

from grpo_jax.config import OverlongConfig
from grpo_jax.types import Arrays, Batch, Reward, Rollout


def soft_overlong(
    lengths: Real[Arrays, "*axes"],
    is_truncated: Bool[Arrays, "*axes"],
    *,
    max_completion_tokens: int,
    cache_tokens: int,
) -> Float[jax.Array, "*axes"]:
    """Compute the soft overlong punishment, which is added to the reward (DAPO, arXiv 2503.14476, eq. 13).

    0 up to L_max - L_cache, then linear down to -1 at L_max; -1 for a completion that hit L_max without a stop token.

    Args:
      lengths: tokens. is_truncated: True where a completion has no stop token.
      max_completion_tokens: L_max. cache_tokens: L_cache; 0: no punishment at all.
    Returns: float32 in [-1, 0].
    """
    if cache_tokens == 0:
        return jnp.zeros_like(lengths, dtype=jnp.float32)
    beyond = (lengths - (max_completion_tokens - cache_tokens)) / cache_tokens
    return jnp.where(is_truncated, -1.0, -jnp.clip(beyond, 0.0, 1.0))


def num_cache_tokens(overlong: OverlongConfig, max_completion_tokens: int) -> int:
    """Return L_cache for a budget; 0: no punishment. A share is never rounded down to none."""
    if overlong.cache_tokens or not overlong.cache_share:
        return overlong.cache_tokens
    return max(1, int(overlong.cache_share * max_completion_tokens))


def is_informative(task_reward_PG: Real[Arrays, "P G"], is_scored_PG: Bool[Arrays, "P G"] | None = None) -> Bool[Arrays, " P"]:
    """Tell which groups have task rewards that differ, so that they say what is better (DAPO, arXiv 2503.14476, eq. 11).

    is_scored_PG: rows without a score say nothing; None: all have one.
    """
    if is_scored_PG is None:
        return task_reward_PG.max(-1) > task_reward_PG.min(-1)
    # Of no rows the highest is -inf and the lowest inf, and of one they are the same: neither group is informative.
    highest_P = jnp.where(is_scored_PG, task_reward_PG, -jnp.inf).max(-1)
    return highest_P > jnp.where(is_scored_PG, task_reward_PG, jnp.inf).min(-1)


def shuffle_rewards(reward: Reward, key: Key[jax.Array, ""]) -> Reward:
    """Permute the rewards over the whole batch: a control experiment, in which reward says nothing about a completion."""
    # One key for all arrays is one permutation for all, so that what belongs to a row's reward stays together.
    task_PG, shaping_PG, is_scored_PG = jax.tree.map(
        lambda x_PG: jax.random.permutation(key, x_PG.reshape(-1)).reshape(x_PG.shape),
        (reward.task_PG, reward.shaping_PG, reward.is_scored_PG),
    )
    return Reward(task_PG, shaping_PG, reward.metrics, is_scored_PG)


def make_batch(
    rollout: Rollout, reward: Reward, step: int | Int[Arrays, ""], *, max_completion_tokens: int, cache_tokens: int
) -> Batch:
    """Join a rollout and its reward, with the shaped reward beside the task's.

    Args:
      rollout: of P prompts. reward: [P, G]. step: the update whose policy sampled it.
      max_completion_tokens, cache_tokens: those of `soft_overlong`.
    Returns: a Batch of float32 rewards; a row without a score, or with one that is not finite, has 0 and is not `is_scored_PG`.
    """
    lengths_PG = rollout.mask_PGT.sum(-1)
    punishment_PG = soft_overlong(
        lengths_PG, rollout.is_truncated_PG, max_completion_tokens=max_completion_tokens, cache_tokens=cache_tokens
    )
    task_reward_PG = jnp.asarray(reward.task_PG, jnp.float32)
    reward_PG = task_reward_PG + reward.shaping_PG + punishment_PG
    # A task of a user's own may give NaN; here it becomes a row without a score, and no later stage can meet it.
    is_scored_PG = jnp.isfinite(reward_PG)
    if reward.is_scored_PG is not None:
        is_scored_PG &= reward.is_scored_PG
    task_reward_PG, reward_PG = (jnp.where(is_scored_PG, x_PG, 0.0) for x_PG in (task_reward_PG, reward_PG))
    sampled_at_P = jnp.full(len(task_reward_PG), step, jnp.int32)
    return Batch(rollout, task_reward_PG, reward_PG, sampled_at_P, is_scored_PG)
