"""Batch -> credit for its tokens: what the update is made with, and how it compares with plain GRPO's."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float

from grpo_jax import objectives
from grpo_jax.metrics import Correlation, Mean, Metric
from grpo_jax.objectives import Objective
from grpo_jax.objectives.one_of import OneOf
from grpo_jax.types import UNKNOWN, Arrays, AxisName, Batch

GRPO = objectives.get("grpo")
SAME = 1e-4  # advantages that differ by less than this share of the larger one are the same


def trained_mask(batch: Batch, filter_truncated: bool) -> Float[Arrays, "P G T"]:
    """Mask the completion tokens that are trained on: those of rows with a score, in groups that have two of them.

    filter_truncated: rows that the budget truncated are not.
    """
    mask_PGT = batch.rollout.mask_PGT
    if batch.is_scored_PG is not None:
        # One score alone says nothing about what is better. Masked and not given an advantage of 0, for under statistics of the
        # batch it would have another, and a KL would go on pulling at it.
        can_compare_P1 = batch.is_scored_PG.sum(-1, keepdims=True) > 1
        mask_PGT = mask_PGT * (batch.is_scored_PG & can_compare_P1)[..., None]
    if filter_truncated:
        mask_PGT = mask_PGT * ~batch.rollout.is_truncated_PG[..., None]
    return mask_PGT


def batch_advantages(
    obj: Objective,
    batch: Batch,
    mask_PGT: Float[Arrays, "P G T"],
    entropy_PGT: Float[Arrays, "P G T"],
    logp_PGT: Float[Arrays, "P G T"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "P G T"]:
    """Compute `objectives.advantages` of a batch of whole groups.

    The parts of the reward, where an advantage asks for them, are the task's reward and all that was added to it.

    Args:
      obj: the objective. batch: its rewards are read. mask_PGT: the trained tokens.
      entropy_PGT, logp_PGT: float32 nats, of the policy at the start of the update; logp_PGT: None where no filter reads it.
      axis_name: mesh axes that batch statistics go over, inside `shard_map`.
    Returns: float32, 0 where masked.
    """
    P, G, T = mask_PGT.shape
    parts = jnp.stack([batch.task_reward_PG, batch.reward_PG - batch.task_reward_PG], -1)
    adv_BT = objectives.advantages(
        obj,
        batch.reward_PG.reshape(-1),
        mask_PGT.reshape(-1, T),
        entropy_PGT.reshape(-1, T),
        group_size=G,
        task_rewards_B=batch.task_reward_PG.reshape(-1),
        reward_parts_BK=parts.reshape(P * G, -1),
        step_rewards_BT=None if batch.step_reward_PGT is None else batch.step_reward_PGT.reshape(-1, T),
        logp_BT=None if logp_PGT is None else logp_PGT.reshape(-1, T),
        axis_name=axis_name,
    )
    return adv_BT.reshape(P, G, T)


def subtract_kl(
    obj: Objective,
    batch: Batch,
    logp_PGT: Float[jax.Array, "P G T"],
    ref_logp_PGT: Float[jax.Array, "P G T"] | None,
    mask_PGT: Float[Arrays, "P G T"],
) -> Batch:
    """Take the KL off the shaped reward, by `objectives.rewards_with_kl`; the task's reward stays.

    Args:
      obj: with kl_in_reward = 0 the batch comes back as it is. batch: whole groups.
      logp_PGT, ref_logp_PGT: float32 nats, of the policy at the start of the update and of the reference (or None).
      mask_PGT: the trained tokens.
    Returns: the batch with these rewards.
    """
    if not obj.has_kl_in_reward:
        return batch
    assert ref_logp_PGT is not None, "a KL in the reward without a reference"
    T = mask_PGT.shape[-1]
    reward_B = objectives.rewards_with_kl(
        obj, batch.reward_PG.reshape(-1), logp_PGT.reshape(-1, T), ref_logp_PGT.reshape(-1, T), mask_PGT.reshape(-1, T)
    )
    return dataclasses.replace(batch, reward_PG=reward_B.reshape(batch.reward_PG.shape))


def advantages_with_grpo(
    obj: Objective, batch: Batch, filter_truncated: bool
) -> tuple[Float[jax.Array, "P G T"], Float[jax.Array, "P G"]]:
    """Compute the advantages of a batch from the recorded entropy, and plain GRPO's beside them.

    These are the update's own numbers, with three exceptions. A length exponent that is learned is the one after the update.
    With learner.old_logp = "learner" the update takes the entropy from a forward pass of its own, which differs from the
    sampler's by its numerics. And objective.kl_in_reward is not in them, for the reference's log-probabilities are known
    inside the update only.

    Args:
      obj: the objective. batch: that was trained on. filter_truncated: as in `trained_mask`.
    Returns: (float32 advantage of each token, plain GRPO's of each row).
    """
    mask_PGT, entropy_PGT = trained_mask(batch, filter_truncated), batch.rollout.entropy_PGT
    logp_PGT = batch.rollout.sampler_logp_PGT
    ours_PGT, grpo_PGT = (batch_advantages(each, batch, mask_PGT, entropy_PGT, logp_PGT) for each in (obj, GRPO))
    # GRPO's is the same for all tokens of a row, and every row that is not dropped has a first one.
    return ours_PGT, grpo_PGT[..., 0]


def advantage_metrics(
    obj: Objective | OneOf, batch: Batch, mask_PGT: Float[jax.Array, "P G T"], adv_PGT: Float[jax.Array, "P G T"]
) -> dict[str, Metric]:
    """Measure whether the advantages do what they should, over the trained tokens of a batch (on any number of devices).

    advantage/differs_from_grpo: share of tokens whose advantage is not plain GRPO's; 0 says that the variant's estimator
    changed nothing. advantage/success_correlation: Pearson's correlation of a token's advantage with the success (0 or 1)
    of its completion; 0 where one of them is the same everywhere. advantage/silent: share of tokens whose advantage is exactly
    0: groups of equal rewards, and what a filter of rows or tokens drops. advantage/credit_correlation, with a task that knows
    the tokens' true advantage: Pearson's correlation with it.

    Args:
      obj: the objective. batch: full. mask_PGT: the trained tokens. adv_PGT: the update's own advantages.
    Returns: the metrics by name.
    """
    grpo_PGT = batch_advantages(GRPO, batch, mask_PGT, batch.rollout.entropy_PGT)
    is_different_PGT = jnp.abs(adv_PGT - grpo_PGT) > SAME * jnp.maximum(jnp.abs(adv_PGT), jnp.abs(grpo_PGT))
    is_success_PG1 = (batch.task_reward_PG >= obj.success_threshold)[..., None]
    metrics: dict[str, Metric] = {
        "advantage/differs_from_grpo": Mean.of(is_different_PGT, mask_PGT),
        "advantage/silent": Mean.of(adv_PGT == 0, mask_PGT),
        "advantage/success_correlation": Correlation.of(adv_PGT, is_success_PG1 & (mask_PGT > 0), mask_PGT),
    }
    if batch.credit_PGT is not None:
        known_PGT = mask_PGT * (batch.credit_PGT != UNKNOWN)
        metrics["advantage/credit_correlation"] = Correlation.of(adv_PGT, batch.credit_PGT, known_PGT)
    return metrics
