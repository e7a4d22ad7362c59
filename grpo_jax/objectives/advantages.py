"""Rewards -> per-token advantages [B, T]. Group statistics need whole groups: call this before any microbatch split.

Estimators share one signature: (obj, groups) -> [P, G, T], or [P, G, 1] if all tokens of a row have the same advantage. Their
values on masked tokens count for nothing, and no gradient flows through them. A function of one's own has the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Real, Shaped

from grpo_jax.masking import is_constant, masked_mean, masked_std, masked_sum, standardise
from grpo_jax.objectives.filters import ROW_FILTERS, TOKEN_FILTERS, high_covariance
from grpo_jax.objectives.functions import Function, find
from grpo_jax.objectives.groups import Groups, Tokens
from grpo_jax.objectives.ratios import Arrays, log_ratio
from grpo_jax.objectives.variants import Objective
from grpo_jax.types import UNKNOWN, AxisName

Advantage = Float[jax.Array, "P G T"] | Float[jax.Array, "P G 1"]
MIN_LENGTH = 0.01  # of 1 + r z in `length_preference`


def advantages(
    obj: Objective,
    rewards_B: Real[Arrays, " B"],
    mask_BT: Shaped[Arrays, "B T"],
    entropy_BT: Float[Arrays, "B T"] | None = None,
    *,
    group_size: int,
    task_rewards_B: Real[Arrays, " B"] | None = None,
    reward_parts_BK: Real[Arrays, "B K"] | None = None,
    step_rewards_BT: Real[Arrays, "B T"] | None = None,
    logp_BT: Float[Arrays, "B T"] | None = None,
    axis_name: AxisName | None = None,
) -> Float[jax.Array, "B T"]:
    """Compare each completion with the others of its group: how much better its tokens were than expected.

    Args:
      rewards_B: float32, the reward to maximise (shaping included). mask_BT: 1 on completion tokens, EOS included.
      entropy_BT: nats, of the sampling policy; may be None where the estimator does not read it.
      group_size: G; rows of a group are contiguous. task_rewards_B: decides O+ / O- (default: rewards_B).
      reward_parts_BK: what the rewards are made of, for "reward_parts"; None: the rewards are one part.
      step_rewards_BT: reward of a written step at its last token, UNKNOWN elsewhere; read by "step_returns" alone.
      logp_BT: nats, of the policy at the start of the update; may be None where no filter of tokens reads it.
      axis_name: mesh axis to take batch statistics over, inside `shard_map` (groups are never split over devices).
    Returns: float32[B, T], exactly 0 on masked tokens, dropped rows and what the filters drop; gradients are stopped.
    Raises: ValueError if B is not a multiple of G or a needed entropy or log-probability is missing.
    """
    B, T = mask_BT.shape
    if group_size < 1 or B % group_size:
        raise ValueError(f"{B} rows do not divide into groups of group_size = {group_size}")
    _check_given(obj, entropy_BT, logp_BT, step_rewards_BT)
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
        parts_PGK=_parts(reward_parts_BK, by_group),
        step_reward_PGT=None if step_rewards_BT is None else jnp.asarray(step_rewards_BT, jnp.float32).reshape(mask_PGT.shape),
    )
    if obj.row_filter != "all":
        kept_PG = find("row_filter", obj.row_filter, ROW_FILTERS)(obj, groups)
        mask_PGT = mask_PGT * kept_PG[..., None]
        groups = groups._replace(mask_PGT=mask_PGT, has_tokens_PG=groups.has_tokens_PG & kept_PG)
    adv_PGT = find("advantage", obj.advantage, ADVANTAGES)(obj, groups)
    adv_BT = jnp.where(mask_PGT > 0, adv_PGT, 0.0).reshape(B, T)
    if obj.token_filter != "all":
        tokens = Tokens(adv_BT, mask_PGT.reshape(B, T), _finite(entropy_BT, mask_BT), _finite(logp_BT, mask_BT), axis_name)
        adv_BT = jnp.where(find("token_filter", obj.token_filter, TOKEN_FILTERS)(obj, tokens), adv_BT, 0.0)
    return jax.lax.stop_gradient(adv_BT)


def _check_given(obj: Objective, entropy_BT, logp_BT, step_rewards_BT) -> None:
    """Raise ValueError if an array is None that the objective reads."""
    if obj.needs_entropy and entropy_BT is None:
        name = "token_filter 'top_entropy'" if obj.token_filter == "top_entropy" else f"advantage {obj.advantage!r}"
        raise ValueError(f"{name} needs the sampling policy's entropy_BT, got None")
    if obj.token_filter == "low_covariance" and logp_BT is None:
        raise ValueError(f"token_filter {obj.token_filter!r} needs logp_BT of the start of the update, got None")
    if obj.needs_step_rewards and step_rewards_BT is None:
        raise ValueError(
            f"advantage {obj.advantage!r} needs step_rewards_BT, the reward of each step at its last token, got None"
        )


def penalised_tokens(
    obj: Objective,
    adv_BT: Float[Arrays, "B T"],
    logp_BT: Float[Arrays, "B T"],
    mask_BT: Shaped[Arrays, "B T"],
    *,
    axis_name: AxisName | None = None,
) -> Bool[jax.Array, "B T"] | None:
    """Mark the tokens whose |log w| the loss penalises, by `cov_penalty` (KL-Cov, arXiv 2505.22617).

    Args:
      adv_BT: of `advantages`. logp_BT: nats, of the policy at the start of the update. mask_BT: 1 on completion tokens.
      axis_name: mesh axis of the batch, inside `shard_map`.
    Returns: bool[B, T] for `token_loss`; None where cov_penalty = 0.
    """
    if not obj.cov_penalty:
        return None
    kept_BT = jnp.asarray(mask_BT, jnp.float32)
    finite_BT = jnp.where(kept_BT > 0, jnp.asarray(adv_BT, jnp.float32), 0.0)
    return high_covariance(obj, Tokens(finite_BT, kept_BT, None, _finite(logp_BT, mask_BT), axis_name))


def _parts(reward_parts_BK, by_group: tuple[int, int]):
    """Parts of the rewards in group layout; None stays None."""
    if reward_parts_BK is None:
        return None
    return jnp.asarray(reward_parts_BK, jnp.float32).reshape(*by_group, -1)


def _finite(x_BT, mask_BT):
    """An array with 0 where masked, float32; None stays None."""
    return x_BT if x_BT is None else jnp.where(mask_BT > 0, jnp.asarray(x_BT, jnp.float32), 0.0)


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


def length_preference(obj: Objective, groups: Groups) -> Advantage:
    """A_i = f_i (r_i - mean_g) / (std_g + eps), f_i = G softmax((1 + r z_i)^lambda) (lambda-GRPO, arXiv 2510.06870).

    z_i is the standardised length of the row in its group, lambda `length_exponent`. The paper weighs rows of the loss; every
    surrogate is linear in a positive factor of A, so it is the same here, but a KL or an entropy bonus is not weighted.
    """
    weight_PG, _ = length_weights(obj, groups.mask_PGT.sum(-1), groups.has_tokens_PG)
    return group_norm(obj, groups) * weight_PG[..., None]


def length_weights(
    obj: Objective, lengths_PG: Float[Arrays, "P G"], rows_PG: Bool[Arrays, "P G"]
) -> tuple[Float[jax.Array, "P G"], Float[jax.Array, "P G"]]:
    """Compute the weights of rows by their length, whose mean over a group is 1, and how lambda moves them.

    Args:
      obj: `length_exponent` and `length_spread` are read. lengths_PG: tokens. rows_PG: False on rows that no statistic counts.
    Returns: (f_PG, d log f / d lambda), float32.
    """
    z_PG = standardise(lengths_PG, rows_PG, 1, ddof=obj.std_ddof, eps=obj.adv_eps)
    # Of a large group the shortest row may be further than 1 / r below the mean, where the power is not defined.
    log_h_PG = jnp.log(jnp.maximum(1.0 + obj.length_spread * z_PG, MIN_LENGTH))
    g_PG = jnp.exp(obj.length_exponent * log_h_PG)
    share_PG = jax.nn.softmax(g_PG, axis=1, where=rows_PG)
    slope_PG = g_PG * log_h_PG
    return share_PG * rows_PG.sum(1, keepdims=True), slope_PG - (share_PG * slope_PG).sum(1, keepdims=True)


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


def group_center_batch_std(obj: Objective, groups: Groups) -> Advantage:
    """A_i = (r_i - mean_g) / (std of the batch's rewards + eps): one scale for all prompts (Lite PPO, arXiv 2508.08221)."""
    std = masked_std(groups.reward_PG, groups.has_tokens_PG, axis_name=groups.axis_name, ddof=obj.std_ddof)
    # Without a spread in the whole batch every centred reward is 0, and so is the advantage.
    return group_center(obj, groups) / jnp.where(std > 0, std + obj.adv_eps, 1.0)


def group_mean_norm(obj: Objective, groups: Groups) -> Advantage:
    """A_i = (r_i - mean_g) / mean_g: with it the gradient is that of log p(right) (MaxRL, arXiv 2602.02710).

    For rewards of 0 and more; a group without any reward, whose mean is 0, gets 0.
    """
    mean_P11 = masked_mean(groups.reward_PG, groups.has_tokens_PG, 1, keepdims=True)[..., None]
    return jnp.where(mean_P11 > 0, group_center(obj, groups) / jnp.where(mean_P11 > 0, mean_P11, 1.0), 0.0)


def length_weighted_center(obj: Objective, groups: Groups) -> Advantage:
    """A_i = r_i - sum |o| r / sum |o| (OPO, arXiv 2505.23585).

    It is the baseline of least variance if the squared norm of a row's gradient is proportional to the row's length.
    """
    del obj
    rewards_PG, rows = groups.reward_PG, groups.has_tokens_PG
    lengths_PG = groups.mask_PGT.sum(-1)
    total_P1 = masked_sum(lengths_PG, rows, 1, keepdims=True)
    mean_P1 = masked_sum(lengths_PG * jnp.where(rows, rewards_PG, 0.0), rows, 1, keepdims=True) / jnp.maximum(total_P1, 1.0)
    return jnp.where(is_constant(rewards_PG, rows, 1), 0.0, rewards_PG - mean_P1)[..., None]


def group_center_rescaled(obj: Objective, groups: Groups) -> Advantage:
    """A_i = (r_i - mean_g) times groups / groups whose rewards differ, of the batch (GPG, arXiv 2504.02546).

    Differs from verl's: that divides by the number of rewards that are not 0, instead of groups.
    """
    rows = groups.has_tokens_PG
    counts = jnp.stack([rows.any(1).sum(), (~is_constant(groups.reward_PG, rows, 1)).sum()]).astype(jnp.float32)
    if groups.axis_name:
        counts = jax.lax.psum(counts, groups.axis_name)
    return group_center(obj, groups) * counts[0] / jnp.maximum(counts[1], 1.0)


def best_of_group(obj: Objective, groups: Groups) -> Advantage:
    """The best row gets r_1 - r_2, the others 0: the gradient of the group's maximum (arXiv 2503.19595; verl's "grpo_passk").

    Where two rows share the best reward nobody gets anything. Differs from verl's default: not divided by the group's std.
    """
    del obj
    rows = groups.has_tokens_PG
    rewards_PG = jnp.where(rows, groups.reward_PG, -jnp.inf)
    best_P1 = rewards_PG.max(1, keepdims=True)
    is_best_PG = rows & (rewards_PG == best_P1)
    second_P1 = jnp.where(is_best_PG, -jnp.inf, rewards_PG).max(1, keepdims=True)
    is_alone_P1 = (is_best_PG.sum(1, keepdims=True) == 1) & jnp.isfinite(second_P1)
    return jnp.where(is_best_PG & is_alone_P1, best_P1 - jnp.where(is_alone_P1, second_P1, 0.0), 0.0)[..., None]


def pass_at_k_analytic(obj: Objective, groups: Groups) -> Advantage:
    """Advantage of rows by the pass@k of subsets of the group that hold them (arXiv 2508.10751, its analytical form).

    With n rows, m of them wrong, C(m, k) / C(n, k) the share of subsets of `pass_k` without a right one, p = 1 minus it and
    s = sqrt(p (1 - p)): right rows get (1 - p) / s, wrong ones (1 - p - C(m - 1, k - 1) / C(n - 1, k - 1)) / s; 0 where s = 0.
    """
    rows = groups.has_tokens_PG
    total_P1 = rows.sum(1, keepdims=True).astype(jnp.float32)
    wrong_P1 = (rows & ~groups.is_success_PG).sum(1, keepdims=True).astype(jnp.float32)

    def share(wrong, total, k: int):  # of subsets of k rows in which all are wrong
        product = jnp.ones_like(total)
        for j in range(k):
            product *= jnp.maximum(wrong - j, 0.0) / jnp.maximum(total - j, 1.0)
        return product

    failed_P1 = share(wrong_P1, total_P1, obj.pass_k)
    scale_P1 = jnp.sqrt(failed_P1 * (1.0 - failed_P1))
    failed_with_it_P1 = share(wrong_P1 - 1, total_P1 - 1, obj.pass_k - 1)
    adv_PG = jnp.where(groups.is_success_PG, failed_P1, failed_P1 - failed_with_it_P1)
    return jnp.where(scale_P1 > 0, adv_PG / jnp.where(scale_P1 > 0, scale_P1, 1.0), 0.0)[..., None]


def reward_parts(obj: Objective, groups: Groups) -> Advantage:
    """Each part of the reward normalised in its group, weighted, added, divided by the batch's std (GDPO, arXiv 2601.05242).

    So a part counts by its weight, not by its spread. Without parts the whole reward is the only one.
    """
    parts_PGK = groups.reward_PG[..., None]
    if groups.parts_PGK is not None:
        parts_PGK = groups.parts_PGK
    weights = obj.part_weights or (1.0,) * parts_PGK.shape[-1]
    if len(weights) != parts_PGK.shape[-1]:
        raise ValueError(f"objective.part_weights = {obj.part_weights}: the reward has {parts_PGK.shape[-1]} parts")
    rows = groups.has_tokens_PG
    normed_PGK = standardise(parts_PGK, rows[..., None], 1, ddof=obj.std_ddof, eps=obj.adv_eps)
    total_PG = (normed_PGK * jnp.asarray(weights)[None, None]).sum(-1)
    std = masked_std(total_PG, rows, axis_name=groups.axis_name, ddof=obj.std_ddof)
    # The batch's mean, which the paper also takes off, is 0: each group's is. Left alone, a silent group stays exactly 0.
    return (total_PG / jnp.where(std > 0, std + obj.adv_eps, 1.0))[..., None]


def step_returns(obj: Objective, groups: Groups) -> Advantage:
    """A_i,t = the sum of (r_k - mean) / (std + eps) over the row's steps k that end at t or later.

    Mean and std are those of all steps of the group: GRPO with process supervision (arXiv 2402.03300, sec. 4.1.3). The rewards
    of whole rows are not read.
    """
    assert groups.step_reward_PGT is not None, "`advantages` checks it"
    is_step_PGT = (groups.step_reward_PGT != UNKNOWN) & (groups.mask_PGT > 0)
    normed_PGT = standardise(groups.step_reward_PGT, is_step_PGT, (1, 2), ddof=obj.std_ddof, eps=obj.adv_eps)
    normed_PGT = jnp.where(is_step_PGT, normed_PGT, 0.0)
    return jnp.cumsum(normed_PGT[..., ::-1], -1)[..., ::-1]


def token_entropy(obj: Objective, groups: Groups) -> Advantage:
    """GTPO (arXiv 2508.04349, eqs. 2-4): among successes an uncertain token earns more, among failures it loses less.

    At position t, over the active rows: r+ = a1 r + a2 d_t H / sum_O+ H and r- = -a1 - a2 h_t (1/H) / sum_O- (1/H). With
    entropy_share = "row_geometric" (sec. 2.4.1) r+ = a1 r + a2 H / (geometric mean of the row's H), r- by the inverses.
    """
    assert groups.entropy_PGT is not None, "`advantages` checks it"
    success_PGT = groups.is_success_PG[..., None] * groups.mask_PGT
    failure_PGT = groups.mask_PGT - success_PGT
    # The sums run over the rows of one position, not over a row: tokens compete with those that others wrote at the same t.
    share_up_PGT = _relative(groups.entropy_PGT, success_PGT, axis=1)
    share_down_PGT = _relative(1.0 / groups.entropy_PGT, failure_PGT, axis=1)
    if obj.entropy_share == "row_geometric":
        log_mean_PG1 = masked_mean(jnp.log(groups.entropy_PGT), groups.mask_PGT, -1, keepdims=True)
        share_up_PGT = groups.entropy_PGT / jnp.exp(log_mean_PG1)
        share_down_PGT = 1.0 / share_up_PGT
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
        "length_preference": length_preference,
        "group_center": group_center,
        "leave_one_out": leave_one_out,
        "batch_norm": batch_norm,
        "group_center_batch_norm": group_center_batch_norm,
        "group_center_batch_std": group_center_batch_std,
        "group_mean_norm": group_mean_norm,
        "length_weighted_center": length_weighted_center,
        "group_center_rescaled": group_center_rescaled,
        "best_of_group": best_of_group,
        "pass_at_k_analytic": pass_at_k_analytic,
        "reward_parts": reward_parts,
        "step_returns": step_returns,
        "token_entropy": token_entropy,
        "sequence_entropy": sequence_entropy,
    }
)
