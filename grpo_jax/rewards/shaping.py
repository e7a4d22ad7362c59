"""Changes of a task's reward before the objective sees it; the task reward itself is kept beside it, untouched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key, Real, Shaped

from grpo_jax.config import OverlongConfig
from grpo_jax.masking import masked_mean
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


def group_overlong(
    lengths_PG: Real[Arrays, "P G"],
    is_right_PG: Bool[Arrays, "P G"],
    counts_PG: Bool[Arrays, "P G"],
    *,
    easy_share: float,
) -> Float[jax.Array, "P G"]:
    """Compute the group relative overlong punishment, which is added to the reward (GROP, arXiv 2508.04349, appendix).

    In an easy group, n / G >= easy_share, right answers get -1/2 (|o| - L) / L between L and 2 L and -1/2 beyond, L being
    max((shortest + longest) / 2, mean) of the right ones; in a hard one, n / G <= 1 - easy_share, nobody gets anything; in
    between, with L of all answers, the right ones if they are the majority, else the wrong ones.

    Args:
      lengths_PG: tokens. is_right_PG: successes of the task. counts_PG: False on rows that are out of the group.
      easy_share: from 0.5 to 1.
    Returns: float32 in [-0.5, 0].
    """
    right_PG, wrong_PG = counts_PG & is_right_PG, counts_PG & ~is_right_PG
    num_right_P1, num_P1 = right_PG.sum(-1, keepdims=True), counts_PG.sum(-1, keepdims=True)
    share_P1 = num_right_P1 / jnp.maximum(num_P1, 1)
    is_easy_P1 = share_P1 >= easy_share
    is_hard_P1 = ~is_easy_P1 & (share_P1 <= 1.0 - easy_share)
    bound_P1 = jnp.where(is_easy_P1, _middle(lengths_PG, right_PG), _middle(lengths_PG, counts_PG))
    punishes_right_P1 = is_easy_P1 | (2 * num_right_P1 > num_P1)
    punished_PG = jnp.where(punishes_right_P1, right_PG, wrong_PG) & ~is_hard_P1
    return jnp.where(punished_PG, -0.5 * jnp.clip((lengths_PG - bound_P1) / bound_P1, 0.0, 1.0), 0.0)


def _middle(lengths_PG, members_PG):
    """Compute max((shortest + longest) / 2, mean) of the members' lengths, at least 1."""
    shortest_P1 = jnp.where(members_PG, lengths_PG, jnp.inf).min(-1, keepdims=True)
    longest_P1 = jnp.where(members_PG, lengths_PG, -jnp.inf).max(-1, keepdims=True)
    mean_P1 = masked_mean(jnp.asarray(lengths_PG, jnp.float32), members_PG, -1, keepdims=True)
    # Of no members the first is inf - inf: NaN, which the comparison below turns into 1.
    middle_P1 = jnp.maximum((shortest_P1 + longest_P1) / 2, mean_P1)
    return jnp.where(middle_P1 >= 1.0, middle_P1, 1.0)


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
        lambda x_PG: shuffle_rows(x_PG, key), (reward.task_PG, reward.shaping_PG, reward.is_scored_PG)
    )
    return Reward(task_PG, shaping_PG, reward.metrics, is_scored_PG)


def shuffle_rows(x_PG: Shaped[Arrays, "P G *rest"], key: Key[jax.Array, ""]) -> Shaped[jax.Array, "P G *rest"]:
    """Permute the rows of a batch over all of its groups; what follows the row's axes stays together."""
    P, G = x_PG.shape[:2]
    return jax.random.permutation(key, x_PG.reshape(P * G, *x_PG.shape[2:])).reshape(x_PG.shape)


def make_batch(
    rollout: Rollout,
    reward: Reward,
    step: int | Int[Arrays, ""],
    *,
    max_completion_tokens: int,
    cache_tokens: int,
    easy_share: float = 0.0,
    success_threshold: float = 0.5,
) -> Batch:
    """Join a rollout and its reward, with the shaped reward beside the task's.

    Args:
      rollout: of P prompts. reward: [P, G]. step: the update whose policy sampled it.
      max_completion_tokens, cache_tokens: those of `soft_overlong`. easy_share: that of `group_overlong`; 0: none.
      success_threshold: a task reward from here on is right, for `group_overlong`.
    Returns: a Batch of float32 rewards; a row without a score, or with one that is not finite, has 0 and is not `is_scored_PG`.
    """
    lengths_PG = rollout.mask_PGT.sum(-1)
    punishment_PG = soft_overlong(
        lengths_PG, rollout.is_truncated_PG, max_completion_tokens=max_completion_tokens, cache_tokens=cache_tokens
    )
    task_reward_PG = jnp.asarray(reward.task_PG, jnp.float32)
    if easy_share:
        counts_PG = (lengths_PG > 0) & jnp.isfinite(task_reward_PG)
        if reward.is_scored_PG is not None:
            counts_PG &= reward.is_scored_PG
        is_right_PG = task_reward_PG >= success_threshold
        punishment_PG = punishment_PG + group_overlong(lengths_PG, is_right_PG, counts_PG, easy_share=easy_share)
    reward_PG = task_reward_PG + reward.shaping_PG + punishment_PG
    # A task of a user's own may give NaN; here it becomes a row without a score, and no later stage can meet it.
    is_scored_PG = jnp.isfinite(reward_PG)
    if reward.is_scored_PG is not None:
        is_scored_PG &= reward.is_scored_PG
    task_reward_PG, reward_PG = (jnp.where(is_scored_PG, x_PG, 0.0) for x_PG in (task_reward_PG, reward_PG))
    sampled_at_P = jnp.full(len(task_reward_PG), step, jnp.int32)
    return Batch(rollout, task_reward_PG, reward_PG, sampled_at_P, is_scored_PG)
