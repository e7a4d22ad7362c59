"""The objectives in float64 NumPy, row by row and token by token: slow, obvious, sharing no line with the library.

`obj` is anything with the fields of an objective. Masked positions are never read, so they may hold anything.
A row without tokens takes part in nothing. Gradients are derived by hand; tests compare them with finite differences.
"""

import math

import numpy as np

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-20 before exp; a clamped one has no gradient


def advantages(obj, rewards_B, mask_BT, entropy_BT, group_size, task_rewards_B=None):
    """float64[B, T], 0 where masked."""
    rewards_B = np.asarray(rewards_B, np.float64)
    task_rewards_B = rewards_B if task_rewards_B is None else np.asarray(task_rewards_B, np.float64)
    is_active_BT = np.asarray(mask_BT) > 0
    threshold = float(np.float32(obj.success_threshold))  # rewards are float32: compare with what they compare with
    starts = range(0, len(rewards_B), group_size)
    groups = [[i for i in range(start, start + group_size) if is_active_BT[i].any()] for start in starts]
    plus = {i for rows in groups for i in rows if task_rewards_B[i] >= threshold}

    if obj.advantage in OF_A_GROUP:
        return _by_group(OF_A_GROUP[obj.advantage], obj, rewards_B, is_active_BT, groups)
    return OF_A_BATCH[obj.advantage](obj, rewards_B, is_active_BT, entropy_BT, groups, plus)


def rewards_with_kl(obj, rewards_B, logp_BT, ref_logp_BT, mask_BT):
    """Each row's reward minus kl_in_reward times the sum of logp - ref over its tokens."""
    rewards_B = [float(reward) for reward in rewards_B]
    for i, t in zip(*np.nonzero(np.asarray(mask_BT) > 0), strict=True):
        log_ratio = min(max(float(logp_BT[i, t]) - float(ref_logp_BT[i, t]), -MAX_LOG_RATIO), MAX_LOG_RATIO)
        rewards_B[i] -= obj.kl_in_reward * log_ratio
    return np.array(rewards_B)


def _standardise(x, pool, obj):
    """(x - mean(pool)) / (std(pool) + eps); 0 where the pool is constant or too small for its std."""
    n = len(pool)
    if n < obj.std_ddof + 1 or max(pool) == min(pool):
        return 0.0
    mean = math.fsum(pool) / n
    std = math.sqrt(math.fsum((y - mean) ** 2 for y in pool) / (n - obj.std_ddof))
    return (x - mean) / (std + obj.adv_eps)


def _by_group(advantage, obj, rewards_B, is_active_BT, groups):
    """advantage(obj, a completion's reward, the rewards of its group), on all of the completion's tokens."""
    adv_BT = np.zeros(is_active_BT.shape)
    for rows in groups:
        pool = [rewards_B[k] for k in rows]
        for i in rows:
            adv_BT[i, is_active_BT[i]] = advantage(obj, rewards_B[i], pool)
    return adv_BT


def _group_norm(obj, reward, pool):
    return _standardise(reward, pool, obj)


def _group_center(obj, reward, pool):
    return 0.0 if max(pool) == min(pool) else reward - math.fsum(pool) / len(pool)


def _leave_one_out(obj, reward, pool):
    others = list(pool)
    others.remove(reward)
    return reward - math.fsum(others) / len(others) if others else 0.0


# Advantages that the rewards of a completion's own group decide: (obj, its reward, the group's rewards) -> number.
OF_A_GROUP = {
    "group_norm": _group_norm,
    "group_center": _group_center,
    "leave_one_out": _leave_one_out,
}


def _batch_norm(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    return _over_tokens(obj, rewards_B[:, None] * is_active_BT, is_active_BT)


def _group_center_batch_norm(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    return _over_tokens(obj, _by_group(_group_center, obj, rewards_B, is_active_BT, groups), is_active_BT)


def _over_tokens(obj, x_BT, is_active_BT):
    """Standardised over every token of the batch."""
    adv_BT = np.zeros(is_active_BT.shape)
    pool = list(x_BT[is_active_BT])
    for i, t in zip(*np.nonzero(is_active_BT), strict=True):
        adv_BT[i, t] = _standardise(x_BT[i, t], pool, obj)
    return adv_BT


def _entropies(obj, entropy_BT, is_active_BT):
    """H on active tokens: clipped first (if asked for), then floored."""
    H_BT = np.zeros(is_active_BT.shape)
    for i, t in zip(*np.nonzero(is_active_BT), strict=True):
        H = float(entropy_BT[i, t])
        if obj.entropy_clip is not None:
            low, high = obj.entropy_clip
            H = min(max(H, low), high)
        H_BT[i, t] = max(H, obj.entropy_floor)
    return H_BT


def _token_entropy(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    """GTPO, eqs. 2-4."""
    H_BT = _entropies(obj, entropy_BT, is_active_BT)
    B, T = is_active_BT.shape
    a1, a2 = obj.base_weight, obj.entropy_weight
    shaped_plus_BT, shaped_minus_BT = np.zeros((B, T)), np.zeros((B, T))  # the zeros stay on the other set's tokens
    for rows in groups:
        for t in range(T):
            plus_t = [i for i in rows if i in plus and is_active_BT[i, t]]
            minus_t = [j for j in rows if j not in plus and is_active_BT[j, t]]
            d, h = len(plus_t), len(minus_t)
            for i in plus_t:
                shaped_plus_BT[i, t] = a1 * rewards_B[i] + a2 * d * H_BT[i, t] / sum(H_BT[k, t] for k in plus_t)
            for j in minus_t:
                shaped_minus_BT[j, t] = -a1 - a2 * h * (1 / H_BT[j, t]) / sum(1 / H_BT[k, t] for k in minus_t)

    adv_BT = np.zeros((B, T))
    for rows in groups:
        pool_rows = rows if obj.stat_scope == "group" else [k for other in groups for k in other]
        pool = [(k, t) for k in pool_rows for t in range(T) if is_active_BT[k, t]]
        keeps = obj.include_other_side
        R_plus = [shaped_plus_BT[k, t] for k, t in pool if keeps or k in plus]
        R_minus = [shaped_minus_BT[k, t] for k, t in pool if keeps or k not in plus]
        if obj.stat_scope == "group" and len({i in plus for i in rows}) < 2:
            continue  # wholly in O+ or wholly in O-
        for i in rows:
            shaped_BT, R = (shaped_plus_BT, R_plus) if i in plus else (shaped_minus_BT, R_minus)
            for t in range(T):
                if is_active_BT[i, t]:
                    adv_BT[i, t] = _standardise(shaped_BT[i, t], R, obj)
    return adv_BT


def _sequence_entropy(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    """GRPO-S, eq. 6."""
    H_BT = _entropies(obj, entropy_BT, is_active_BT)
    B, T = is_active_BT.shape
    b1, b2 = obj.base_weight, obj.entropy_weight
    Hs = {}
    for rows in groups:
        for i in rows:
            H_row = H_BT[i, is_active_BT[i]]
            is_geometric = obj.sequence_mean_kind == "geometric"
            Hs[i] = math.exp(np.log(H_row).mean()) if is_geometric else H_row.mean()

    shaped_plus_B, shaped_minus_B = np.zeros(B), np.zeros(B)
    for rows in groups:
        plus_g = [i for i in rows if i in plus]
        minus_g = [j for j in rows if j not in plus]
        n, m = len(plus_g), len(minus_g)
        for i in plus_g:
            shaped_plus_B[i] = b1 * rewards_B[i] + b2 * n * Hs[i] / sum(Hs[k] for k in plus_g)
        for j in minus_g:
            shaped_minus_B[j] = -b1 - b2 * m * (1 / Hs[j]) / sum(1 / Hs[k] for k in minus_g)

    adv_BT = np.zeros((B, T))
    for rows in groups:
        pool_rows = rows if obj.stat_scope == "group" else [k for other in groups for k in other]
        if obj.stat_scope == "group" and len({i in plus for i in rows}) < 2:
            continue
        for i in rows:
            shaped_B = shaped_plus_B if i in plus else shaped_minus_B
            pool = [shaped_B[k] for k in pool_rows if obj.include_other_side or (k in plus) == (i in plus)]
            adv_BT[i, is_active_BT[i]] = _standardise(shaped_B[i], pool, obj)
    return adv_BT


# The others: (obj, rewards, mask, entropies, rows of each group, rows in O+) -> [B, T].
OF_A_BATCH = {
    "batch_norm": _batch_norm,
    "group_center_batch_norm": _group_center_batch_norm,
    "token_entropy": _token_entropy,
    "sequence_entropy": _sequence_entropy,
}


def loss_and_grad(obj, logp, old_logp, ref_logp, adv, mask, max_completion_length):
    """(loss, d loss / d logp [B, T]); 0 and zeros when no token is active. ref_logp may be None when kl_coef is 0."""
    is_active_BT = np.asarray(mask) > 0
    rows = [i for i in range(len(is_active_BT)) if is_active_BT[i].any()]
    N, num_tokens = len(rows), int(is_active_BT.sum())
    loss, grad_BT = 0.0, np.zeros(is_active_BT.shape)
    for i in rows:
        tokens = np.flatnonzero(is_active_BT[i])
        n = len(tokens)
        logp_n, old_n, adv_n = (np.asarray(x[i], np.float64)[tokens] for x in (logp, old_logp, adv))
        if obj.surrogate in WEIGHT:
            objective_n, slope_n = _weighted_logp(obj, logp_n, old_n, adv_n)
        elif obj.ratio == "token":
            objective_n, slope_n = _token_surrogate(obj, logp_n, old_n, adv_n)
        else:
            objective, slope_n = _sequence_surrogate(obj, logp_n, old_n, adv_n)
            # One value a row, written as n equal shares: the row's mean of them is that value again.
            objective_n, slope_n = np.full(n, objective), n * slope_n
        if obj.kl_coef != 0:
            kl_n, kl_slope_n = KL[obj.kl_estimator](logp_n, np.asarray(ref_logp[i], np.float64)[tokens])
            objective_n = objective_n - obj.kl_coef * kl_n
            slope_n = slope_n - obj.kl_coef * kl_slope_n

        aggregation = obj.aggregation if obj.ratio == "token" else "sequence_mean"
        weight = TOKEN_WEIGHT[aggregation](n, N, num_tokens, max_completion_length)
        loss -= weight * objective_n.sum()
        grad_BT[i, tokens] = -weight * slope_n
    return loss, grad_BT


# What a token counts: (tokens of its row, rows, tokens of the batch, budget) -> number.
TOKEN_WEIGHT = {
    "sequence_mean": lambda n, N, num_tokens, budget: 1 / (N * n),
    "token_mean": lambda n, N, num_tokens, budget: 1 / num_tokens,
    "constant": lambda n, N, num_tokens, budget: 1 / (N * budget),
    "sequence_sum": lambda n, N, num_tokens, budget: 1 / N,
}


def _ppo_clip(obj, w, A):
    """min(w A, clip(w) A), whose derivative is 0 exactly where the clipped branch is the smaller one."""
    clipped_w = min(max(w, 1 - obj.clip_low), 1 + obj.clip_high)
    return (clipped_w * A, 0.0) if clipped_w * A < w * A else (w * A, A)


# Surrogates that are a function of the ratio, of a token or a row: (obj, w, A) -> (value, its derivative in w). With a token's
# ratio clipping first is the same; with a row's `_product_of_clipped` computes it.
OF_A_RATIO = {
    "ppo_clip": _ppo_clip,
    "token_clip": _ppo_clip,
}


def _clipped_weight(obj, w, A):
    return min(max(w, 1 - obj.clip_low), 1 + obj.clip_high) * A


def _reinforce(obj, w, A):
    return A


# Surrogates that are a number times logp: (obj, w, A) -> that number, through which no gradient flows.
WEIGHT = {
    "clipped_weight": _clipped_weight,
    "reinforce": _reinforce,
}


def _with_dual_clip(obj, w, A):
    """The surrogate and its derivative in w, bounded from below for A < 0."""
    if obj.dual_clip is not None and A < 0 and w > obj.dual_clip:
        return obj.dual_clip * A, 0.0
    return OF_A_RATIO[obj.surrogate](obj, w, A)


def _mean_ratio(log_ratio_n):
    w_n = np.exp(np.clip(log_ratio_n, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return w_n.mean(), np.where(np.abs(log_ratio_n) <= MAX_LOG_RATIO, w_n, 0.0) / len(w_n)


def _geometric_mean_ratio(log_ratio_n):
    mean = log_ratio_n.mean()
    w = math.exp(min(max(mean, -MAX_LOG_RATIO), MAX_LOG_RATIO))
    return w, np.full(len(log_ratio_n), w / len(log_ratio_n) if abs(mean) <= MAX_LOG_RATIO else 0.0)


# Ratios of a whole row: its tokens' log-ratios -> (w, its derivative in each of the row's logp).
OF_A_ROW = {
    "sequence": _mean_ratio,
    "sequence_geometric": _geometric_mean_ratio,
}


def _weighted_logp(obj, logp_n, old_n, adv_n):
    """weight A logp of each token, and its derivative in logp: the weight is a number, not a function."""
    w_n = np.exp(np.clip(logp_n - old_n, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    if obj.ratio != "token":
        w_n = np.full(len(w_n), OF_A_ROW[obj.ratio](logp_n - old_n)[0])
    weight_n = np.array([WEIGHT[obj.surrogate](obj, w, A) for w, A in zip(w_n, adv_n, strict=True)])
    return weight_n * logp_n, weight_n


def _token_surrogate(obj, logp_n, old_n, adv_n):
    objective_n, slope_n = np.zeros(len(logp_n)), np.zeros(len(logp_n))
    for t, log_ratio in enumerate(logp_n - old_n):
        w = math.exp(min(max(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO))
        objective_n[t], dw = _with_dual_clip(obj, w, adv_n[t])
        slope_n[t] = dw * w if abs(log_ratio) <= MAX_LOG_RATIO else 0.0  # dw/dlogp = w
    return objective_n, slope_n


def _sequence_surrogate(obj, logp_n, old_n, adv_n):
    """The row's objective (one number) and its derivative in each of the row's logp."""
    assert np.ptp(adv_n) == 0, "a sequence ratio needs one advantage a row"
    log_ratio_n = logp_n - old_n
    if obj.surrogate == "token_clip":
        return _product_of_clipped(obj, log_ratio_n, adv_n[0])
    w, dw_n = OF_A_ROW[obj.ratio](log_ratio_n)
    objective, dw = _with_dual_clip(obj, w, adv_n[0])
    return objective, dw * dw_n


def _product_of_clipped(obj, log_ratio_n, A):
    """GMPO: |o|-th root of the product of token ratios, each the smaller of w and clip(w) for A > 0, the larger for A < 0."""
    assert obj.ratio == "sequence_geometric"
    product, is_free_n = 1.0, np.zeros(len(log_ratio_n), bool)
    for t, log_ratio in enumerate(log_ratio_n):
        w = math.exp(min(max(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO))
        clipped_w = min(max(w, 1 - obj.clip_low), 1 + obj.clip_high)
        used = min(w, clipped_w) if A >= 0 else max(w, clipped_w)
        is_free_n[t] = used == w and abs(log_ratio) <= MAX_LOG_RATIO
        product *= used ** (1 / len(log_ratio_n))
    if obj.dual_clip is not None and A < 0 and product > obj.dual_clip:
        return obj.dual_clip * A, np.zeros(len(log_ratio_n))
    return product * A, is_free_n * product * A / len(log_ratio_n)


def _k3(logp_n, ref_n):
    """exp(d) - d - 1 with d = ref - logp, and its derivative in logp: 1 - exp(d). Only the exp is clamped."""
    d_n = ref_n - logp_n
    exp_n = np.exp(np.clip(d_n, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    return exp_n - d_n - 1, 1 - np.where(np.abs(d_n) <= MAX_LOG_RATIO, exp_n, 0.0)


# Penalties of the loss: (logp, ref) of a row's tokens -> (the penalty, its derivative in logp).
KL = {
    "k1": lambda logp_n, ref_n: (logp_n - ref_n, np.ones(len(logp_n))),
    "k2": lambda logp_n, ref_n: ((logp_n - ref_n) ** 2 / 2, logp_n - ref_n),
    "k3": _k3,
}
