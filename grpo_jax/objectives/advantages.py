"""Rewards -> per-token advantages [B, T]. Group statistics need whole groups: call this before any microbatch split.

Estimators share one signature: (obj, groups) -> [P, G, T], or [P, G, 1] if all tokens of a row have the same advantage. Their
values on masked tokens count for nothing, and no gradient flows through them. A function of one's own has the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Real, Shaped

from grpo_jax.masking import is_constant, masked_mean, masked_sum, standardise
from grpo_jax.objectives.functions import Function, find
from grpo_jax.objectives.ratios import Arrays, log_ratio
from grpo_jax.objectives.variants import Objective
from grpo_jax.types import AxisName

Advantage = Float[jax.Array, "P G T"] | Float[jax.Array, "P G 1"]


class Groups(NamedTuple):
    """The inputs in group layout.

    reward_PG, mask_PGT: float32. entropy_PGT: float32, nats, bounded, 1 where masked; None if it was not given.
    is_success_PG: True in O+.
    has_tokens_PG: False on dropped rows, which no statistic counts. axis_name: mesh axis of batch statistics, or None.
    """

    reward_PG: jax.Array
    is_success_PG: jax.Array
    mask_PGT: jax.Array
    entropy_PGT: jax.Array | None
    has_tokens_PG: jax.Array
    axis_name: AxisName | None


def advantages(
    obj: Objective,
    rewards_B: Real[Arrays, " B"],
    mask_BT: Shaped[Arrays, "B T"],
    entropy_BT: Float[Arrays, "B T"] | None = None,
    *,
    group_size: int,
    task_rewards_B: Real[Arrays, " B"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "B T"]:
    """Compare each completion with the others of its group: how much better its tokens were than expected.

    Args:
      rewards_B: float32, the reward to maximise (shaping included). mask_BT: 1 on completion tokens, EOS included.
      entropy_BT: nats, of the sampling policy; may be None where the estimator does not read it.
      group_size: G; rows of a group are contiguous. task_rewards_B: decides O+ / O- (default: rewards_B).
      axis_name: mesh axis to take batch statistics over, inside `shard_map` (groups are never split over devices).
    Returns: float32[B, T], exactly 0 on masked tokens and dropped rows; gradients are stopped.
    Raises: ValueError if B is not a multiple of G or a needed entropy is missing.
    """
    B, T = mask_BT.shape
    if group_size < 1 or B % group_size:
        raise ValueError(f"{B} rows do not divide into groups of group_size = {group_size}")
    if obj.needs_entropy and entropy_BT is None:
        raise ValueError(f"advantage {obj.advantage!r} needs the sampling policy's entropy_BT, got None")
    # O+ is decided before shaping: a right answer that was punished for its length stays a success.
    if task_rewards_B is None:
        task_rewards_B = rewards_B
    by_group = (B // group_size, group_size)
    mask_PGT = jnp.asarray(mask_BT, jnp.float32).reshape(*by_group, T)
    groups = Groups(
        reward_PG=jnp.asarray(rewards_B, jnp.float32).reshape(by_group),
        is_success_PG=jnp.asarray(task_rewards_B).reshape(by_group) >= obj.success_threshold,
        mask_PGT=mask_PGT,
        entropy_PGT=_bound_entropy(obj, entropy_BT, mask_PGT),
        has_tokens_PG=mask_PGT.any(-1),
        axis_name=axis_name,
    )
    adv_PGT = find("advantage", obj.advantage, ADVANTAGES)(obj, groups)
    return jax.lax.stop_gradient(jnp.where(mask_PGT > 0, adv_PGT, 0.0).reshape(B, T))


def rewards_with_kl(
    obj: Objective,
    rewards_B: Real[Arrays, " B"],
    logp_BT: Float[Arrays, "B T"],
    ref_logp_BT: Float[Arrays, "B T"] | None,
    mask_BT: Shaped[Arrays, "B T"],
) -> Real[Arrays, " B"]:
    """r_i - kl_in_reward sum_t (logp - ref_logp): the KL as a part of the reward (RLOO, arXiv 2402.14740).

    Differs from source: REINFORCE++ (arXiv 2501.03262) charges a token only the terms from its own position on.

    Args:
      rewards_B: float32, shaping included. logp_BT, ref_logp_BT: nats, of the sampled tokens under the policy at the start
        of the update and under the frozen reference; the latter may be None, and is ignored, where kl_in_reward = 0.
      mask_BT: 1 on completion tokens, EOS included.
    Returns: float32[B], the rewards to hand to `advantages`; gradients are stopped. rewards_B itself where kl_in_reward = 0.
    Raises: ValueError if ref_logp_BT is None although kl_in_reward > 0.
    """
    if not obj.has_kl_in_reward:
        return rewards_B
    if ref_logp_BT is None:
        raise ValueError(
            f"objective.kl_in_reward = {obj.kl_in_reward} needs the reference's log-probabilities, got ref_logp_BT = None"
        )
    # A sum over the whole row keeps one reward a row, which is what group statistics compare. The terms before a token were
    # fixed before it was drawn, so charging them too adds variance but nothing to the expected gradient.
    kl_B = log_ratio(logp_BT, ref_logp_BT, mask_BT).sum(-1)
    return jax.lax.stop_gradient(jnp.asarray(rewards_B, jnp.float32) - obj.kl_in_reward * kl_B)


def _bound_entropy(obj: Objective, entropy_BT, mask_PGT):
    """H = max(entropy, floor), optionally clipped first; masked positions get 1 so that they stay finite. None stays None."""
    if entropy_BT is None:
        return None
    entropy_PGT = jnp.asarray(entropy_BT, jnp.float32).reshape(mask_PGT.shape)
    if obj.entropy_clip is not None:
        entropy_PGT = jnp.clip(entropy_PGT, *obj.entropy_clip)
    return jnp.where(mask_PGT > 0, jnp.maximum(entropy_PGT, obj.entropy_floor), 1.0)


def group_norm(obj: Objective, groups: Groups) -> Advantage:
    """A_i = (r_i - mean_g) / (std_g + eps) (arXiv 2402.03300, sec. 4.1.2)."""
    adv_PG = standardise(groups.reward_PG, groups.has_tokens_PG, 1, ddof=obj.std_ddof, eps=obj.adv_eps)
    return adv_PG[..., None]


def group_center(obj: Objective, groups: Groups) -> Advantage:
    """A_i = r_i - mean_g (Dr. GRPO, arXiv 2503.20783); exactly 0 if all rewards are equal."""
    del obj
    rewards_PG, rows = groups.reward_PG, groups.has_tokens_PG
    centred_PG = rewards_PG - masked_mean(rewards_PG, rows, 1, keepdims=True)
    # The float32 mean of n equal numbers is rarely that number. Left in, the difference is a push in a random direction.
    adv_PG = jnp.where(is_constant(rewards_PG, rows, 1), 0.0, centred_PG)
    return adv_PG[..., None]


def leave_one_out(obj: Objective, groups: Groups) -> Advantage:
    """A_i = r_i - mean of the others' rewards = G / (G - 1) (r_i - mean_g) (RLOO, arXiv 2402.14740).

    G counts the group's rows with tokens; a row that has no others gets 0.
    """
    size_P11 = groups.has_tokens_PG.sum(1)[:, None, None]
    return group_center(obj, groups) * size_P11 / jnp.maximum(size_P11 - 1, 1)


def batch_norm(obj: Objective, groups: Groups) -> Advantage:
    """A_i = (r_i - mean) / (std + eps) over all tokens of the batch (REINFORCE++, arXiv 2501.03262)."""
    return _standardise_over_batch(obj, groups, groups.reward_PG)


def group_center_batch_norm(obj: Objective, groups: Groups) -> Advantage:
    """The same of r_i - mean_g: a baseline of each prompt, one scale for the batch (arXiv 2501.03262, with baseline)."""
    return _standardise_over_batch(obj, groups, group_center(obj, groups)[..., 0])


def _standardise_over_batch(obj: Objective, groups: Groups, x_PG):
    """Standardise over the tokens of the global batch, as verl and OpenRLHF do: an advantage belongs to a token there.

    A long row therefore counts more often than a short one, in mean and std.
    """
    x_PGT = jnp.broadcast_to(x_PG[..., None], groups.mask_PGT.shape)
    return standardise(x_PGT, groups.mask_PGT, None, groups.axis_name, ddof=obj.std_ddof, eps=obj.adv_eps)


def token_entropy(obj: Objective, groups: Groups) -> Advantage:
    """GTPO (arXiv 2508.04349, eqs. 2-4): among successes an uncertain token earns more, among failures it loses less.

    At position t, over the active rows: r+ = a1 r + a2 d_t H / sum_O+ H and r- = -a1 - a2 h_t (1/H) / sum_O- (1/H).
    """
    assert groups.entropy_PGT is not None, "`advantages` checks it"
    success_PGT = groups.is_success_PG[..., None] * groups.mask_PGT
    failure_PGT = groups.mask_PGT - success_PGT
    # The sums run over the rows of one position, not over a row: tokens compete with those that others wrote at the same t.
    share_up_PGT = _relative(groups.entropy_PGT, success_PGT, axis=1)
    share_down_PGT = _relative(1.0 / groups.entropy_PGT, failure_PGT, axis=1)
    up_PGT = obj.base_weight * groups.reward_PG[..., None] + obj.entropy_weight * share_up_PGT
    down_PGT = -obj.base_weight - obj.entropy_weight * share_down_PGT
    return _normalise_sides(obj, groups, up_PGT, down_PGT, success_PGT, failure_PGT, group_axes=(1, 2))


def sequence_entropy(obj: Objective, groups: Groups) -> Advantage:
    """GRPO-S (arXiv 2508.04349, eq. 6): the same on whole sequences, with each row's mean entropy."""
    assert groups.entropy_PGT is not None, "`advantages` checks it"
    rows_PG = groups.has_tokens_PG.astype(jnp.float32)
    # A dropped row has no mean; 1 keeps its inverse finite, and its membership of 0 keeps it out of every sum.
    if obj.sequence_mean_kind == "geometric":
        mean_PG = jnp.exp(masked_mean(jnp.log(groups.entropy_PGT), groups.mask_PGT, -1))
    else:
        mean_PG = jnp.where(rows_PG > 0, masked_mean(groups.entropy_PGT, groups.mask_PGT, -1), 1.0)
    success_PG = groups.is_success_PG * rows_PG
    failure_PG = rows_PG - success_PG
    up_PG = obj.base_weight * groups.reward_PG + obj.entropy_weight * _relative(mean_PG, success_PG, axis=1)
    down_PG = -obj.base_weight - obj.entropy_weight * _relative(1.0 / mean_PG, failure_PG, axis=1)
    adv_PG = _normalise_sides(obj, groups, up_PG, down_PG, success_PG, failure_PG, group_axes=(1,))
    return adv_PG[..., None]


def _relative(x, members, axis: int):
    """Divide x by its mean among the members: count * x / sum x (1 where there is no member)."""
    total = masked_sum(x, members, axis, keepdims=True)
    count = masked_sum(jnp.ones_like(x), members, axis, keepdims=True)
    return jnp.where(total > 0, count * x / jnp.where(total > 0, total, 1.0), 1.0)


def _normalise_sides(obj: Objective, groups: Groups, up, down, success, failure, group_axes: tuple[int, ...]):
    """Eq. 4: (r+ - mean R+) / (std R+ + eps) on O+, likewise on O-.

    R+ holds an entry for *every* member of the scope, 0 on those in O-. With include_other_side = False it does not: then
    successes average to advantage 0 and the signal of correctness is gone. That reading is a mistake, there to be measured.
    """
    is_batch = obj.stat_scope == "batch"
    # Groups are never split over devices, so only statistics of the batch have to be summed over them.
    axis, axis_name = group_axes, None
    if is_batch:
        axis, axis_name = None, groups.axis_name
    everyone = success + failure
    up, down = jnp.where(success > 0, up, 0.0), jnp.where(failure > 0, down, 0.0)
    pools = (success, failure)
    if obj.include_other_side:
        pools = (everyone, everyone)
    up, down = (
        standardise(x, pool, axis, axis_name, ddof=obj.std_ddof, eps=obj.adv_eps)
        for x, pool in zip((up, down), pools, strict=True)
    )
    adv = jnp.where(success > 0, up, down)
    if is_batch:
        return adv
    # In a group of one side the shaped rewards differ by entropy alone; divided by their tiny std that would be of unit size.
    is_mixed = success.any(group_axes, keepdims=True) & failure.any(group_axes, keepdims=True)
    return jnp.where(is_mixed, adv, 0.0)


ADVANTAGES: Mapping[str, Function] = MappingProxyType(
    {
        "group_norm": group_norm,
        "group_center": group_center,
        "leave_one_out": leave_one_out,
        "batch_norm": batch_norm,
        "group_center_batch_norm": group_center_batch_norm,
        "token_entropy": token_entropy,
        "sequence_entropy": sequence_entropy,
    }
)
