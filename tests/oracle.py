"""The objectives in float64 NumPy, row by row and token by token: slow, obvious, sharing no line with the library.

`obj` is anything with the fields of an objective. Masked positions are never read, so they may hold anything.
A row without tokens takes part in nothing. Gradients are derived by hand; tests compare them with finite differences.
"""

import math

import numpy as np

MAX_LOG_RATIO = 20.0  # log-ratios are clamped to +-20 before exp; a clamped one has no gradient


def advantages(
    obj, rewards_B, mask_BT, entropy_BT, group_size, task_rewards_B=None, logp_BT=None, parts_BK=None, steps_BT=None
):
    """float64[B, T], 0 where masked and where a filter drops."""
    rewards_B = np.asarray(rewards_B, np.float64)
    task_rewards_B = rewards_B if task_rewards_B is None else np.asarray(task_rewards_B, np.float64)
    is_active_BT = np.asarray(mask_BT) > 0
    threshold = float(np.float32(obj.success_threshold))  # rewards are float32: compare with what they compare with
    starts = range(0, len(rewards_B), group_size)
    groups = [[i for i in range(start, start + group_size) if is_active_BT[i].any()] for start in starts]
    plus = {i for rows in groups for i in rows if task_rewards_B[i] >= threshold}

    if obj.row_filter != "all":
        groups = [_kept_rows(obj, rows, rewards_B, is_active_BT) for rows in groups]
        kept = [i in {k for rows in groups for k in rows} for i in range(len(rewards_B))]
        is_active_BT = is_active_BT & np.array(kept)[:, None]
    if obj.advantage in OF_A_GROUP:
        adv_BT = _by_group(OF_A_GROUP[obj.advantage], obj, rewards_B, is_active_BT, groups)
    elif obj.advantage == "step_returns":
        adv_BT = _step_returns(obj, steps_BT, is_active_BT, groups)
    elif obj.advantage == "reward_parts":
        adv_BT = _reward_parts(obj, rewards_B[:, None] if parts_BK is None else parts_BK, is_active_BT, groups)
    else:
        adv_BT = OF_A_BATCH[obj.advantage](obj, rewards_B, is_active_BT, entropy_BT, groups, plus)
    if obj.token_filter == "top_entropy":
        return _top_entropy(obj, adv_BT, is_active_BT, entropy_BT)
    if obj.token_filter == "low_covariance":
        low, high = obj.cov_range
        cov = {place: x for place, x in _covariances(adv_BT, logp_BT, is_active_BT).items() if low < x < high}
        for place in _highest(cov, obj.cov_share, is_active_BT):
            adv_BT[place] = 0.0
    return adv_BT


def penalised(obj, adv_BT, logp_BT, mask_BT):
    """bool[B, T]: the tokens that KL-Cov penalises."""
    is_active_BT = np.asarray(mask_BT) > 0
    chosen_BT = np.zeros(is_active_BT.shape, bool)
    for place in _highest(_covariances(adv_BT, logp_BT, is_active_BT), obj.cov_share, is_active_BT):
        chosen_BT[place] = True
    return chosen_BT


def _kept_rows(obj, rows, rewards_B, is_active_BT):
    """The keep_rows shortest, or most efficient, rows of a group, all that tie with the last of them included."""

    def key(i):
        length = int(is_active_BT[i].sum())
        return length if obj.row_filter == "shortest" else -float(np.float32(rewards_B[i]) / np.float32(length))

    if not rows:
        return rows
    bound = sorted(map(key, rows))[min(obj.keep_rows, len(rows)) - 1]
    return [i for i in rows if key(i) <= bound]


def _top_entropy(obj, adv_BT, is_active_BT, entropy_BT):
    values = np.asarray(entropy_BT)[is_active_BT]
    bound = np.quantile(values, 1 - obj.token_share) if len(values) else 0.0
    return np.where(is_active_BT & (np.asarray(entropy_BT) >= np.float32(bound)), adv_BT, 0.0)


def _covariances(adv_BT, logp_BT, is_active_BT):
    """Place of each token -> (A - mean A)(logp - mean logp)."""
    places = list(zip(*np.nonzero(is_active_BT), strict=True))
    advs = [float(adv_BT[place]) for place in places]
    logps = [float(logp_BT[place]) for place in places]
    mean_adv, mean_logp = math.fsum(advs) / max(len(advs), 1), math.fsum(logps) / max(len(logps), 1)
    return {place: (a - mean_adv) * (x - mean_logp) for place, a, x in zip(places, advs, logps, strict=True)}


def _highest(values, share, is_active_BT):
    """The places of the highest values: as many as are `share` of all tokens, and at least one."""
    num = max(int(share * is_active_BT.sum()), 1)
    return sorted(values, key=values.get, reverse=True)[:num]


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


def _group_mean_norm(obj, reward, pool):
    mean = math.fsum(pool) / len(pool)
    return 0.0 if mean <= 0 or max(pool) == min(pool) else (reward - mean) / mean


def _best_of_group(obj, reward, pool):
    others = list(pool)
    others.remove(reward)
    return reward - max(others) if others and reward > max(others) else 0.0


# Advantages that the rewards of a completion's own group decide: (obj, its reward, the group's rewards) -> number.
OF_A_GROUP = {
    "group_norm": _group_norm,
    "group_center": _group_center,
    "leave_one_out": _leave_one_out,
    "group_mean_norm": _group_mean_norm,
    "best_of_group": _best_of_group,
}


def _batch_norm(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    return _over_tokens(obj, rewards_B[:, None] * is_active_BT, is_active_BT)


def _group_center_batch_norm(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    return _over_tokens(obj, _by_group(_group_center, obj, rewards_B, is_active_BT, groups), is_active_BT)


def _by_row(advantage_of, is_active_BT, groups):
    """advantage_of(row, rows of its group) on all of the row's tokens."""
    adv_BT = np.zeros(is_active_BT.shape)
    for rows in groups:
        for i in rows:
            adv_BT[i, is_active_BT[i]] = advantage_of(i, rows)
    return adv_BT


def _is_flat(rewards_B, rows):
    return len({rewards_B[i] for i in rows}) < 2


def _std(values, ddof):
    mean = math.fsum(values) / max(len(values), 1)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - ddof)) if len(values) > ddof else 0.0


def _length_preference(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    """GRPO's advantage times G softmax((1 + r z)^lambda)."""
    adv_BT = _by_group(_group_norm, obj, rewards_B, is_active_BT, groups)
    for rows in groups:
        lengths = [int(is_active_BT[i].sum()) for i in rows]
        powers = [(1 + obj.length_spread * _standardise(n, lengths, obj)) ** obj.length_exponent for n in lengths]
        total = sum(math.exp(power) for power in powers)
        for i, power in zip(rows, powers, strict=True):
            adv_BT[i] *= len(rows) * math.exp(power) / total
    return adv_BT


def _group_center_batch_std(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    std = _std([rewards_B[i] for rows in groups for i in rows], obj.std_ddof)

    def of(i, rows):
        centred = _group_center(obj, rewards_B[i], [rewards_B[k] for k in rows])
        return centred / (std + obj.adv_eps) if std else 0.0

    return _by_row(of, is_active_BT, groups)


def _length_weighted_center(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    def of(i, rows):
        lengths = {k: int(is_active_BT[k].sum()) for k in rows}
        baseline = sum(lengths[k] * rewards_B[k] for k in rows) / sum(lengths.values())
        return 0.0 if _is_flat(rewards_B, rows) else rewards_B[i] - baseline

    return _by_row(of, is_active_BT, groups)


def _group_center_rescaled(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    all_groups = [rows for rows in groups if rows]
    differ = sum(not _is_flat(rewards_B, rows) for rows in all_groups)

    def of(i, rows):
        return _group_center(obj, rewards_B[i], [rewards_B[k] for k in rows]) * len(all_groups) / max(differ, 1)

    return _by_row(of, is_active_BT, groups)


def _pass_at_k_analytic(obj, rewards_B, is_active_BT, entropy_BT, groups, plus):
    k = obj.pass_k

    def of(i, rows):
        n, m = len(rows), sum(j not in plus for j in rows)
        if n < k:
            return 0.0
        p = 1 - math.comb(m, k) / math.comb(n, k)
        if p * (1 - p) == 0:
            return 0.0
        without = 0 if i in plus else math.comb(m - 1, k - 1) / math.comb(n - 1, k - 1)
        return (1 - p - without) / math.sqrt(p * (1 - p))

    return _by_row(of, is_active_BT, groups)


def _reward_parts(obj, parts_BK, is_active_BT, groups):
    weights = obj.part_weights or (1.0,) * len(parts_BK[0])
    total = {
        i: sum(w * _standardise(parts_BK[i][k], [parts_BK[j][k] for j in rows], obj) for k, w in enumerate(weights))
        for rows in groups
        for i in rows
    }
    std = _std(list(total.values()), obj.std_ddof)
    mean = math.fsum(total.values()) / max(len(total), 1)
    return _by_row(lambda i, rows: (total[i] - mean) / (std + obj.adv_eps) if std else 0.0, is_active_BT, groups)


def _step_returns(obj, steps_BT, is_active_BT, groups):
    """Of each token: the sum of the normalised rewards of the steps that end at it or after it. -1e9: no step ends."""
    adv_BT = np.zeros(is_active_BT.shape)
    for rows in groups:
        ends = {i: [t for t in np.flatnonzero(is_active_BT[i]) if steps_BT[i][t] != -1e9] for i in rows}
        pool = [float(steps_BT[i][t]) for i in rows for t in ends[i]]
        for i in rows:
            for t in np.flatnonzero(is_active_BT[i]):
                adv_BT[i, t] = sum(_standardise(float(steps_BT[i][end]), pool, obj) for end in ends[i] if end >= t)
    return adv_BT


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
                share = d * H_BT[i, t] / sum(H_BT[k, t] for k in plus_t)
                if obj.entropy_share == "row_geometric":
                    share = H_BT[i, t] / math.exp(np.log(H_BT[i, is_active_BT[i]]).mean())
                shaped_plus_BT[i, t] = a1 * rewards_B[i] + a2 * share
            for j in minus_t:
                share = h * (1 / H_BT[j, t]) / sum(1 / H_BT[k, t] for k in minus_t)
                if obj.entropy_share == "row_geometric":
                    share = 1 / H_BT[j, t] / math.exp(np.log(1 / H_BT[j, is_active_BT[j]]).mean())
                shaped_minus_BT[j, t] = -a1 - a2 * share

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
    "length_preference": _length_preference,
    "group_center_batch_norm": _group_center_batch_norm,
    "group_center_batch_std": _group_center_batch_std,
    "length_weighted_center": _length_weighted_center,
    "group_center_rescaled": _group_center_rescaled,
    "pass_at_k_analytic": _pass_at_k_analytic,
    "token_entropy": _token_entropy,
    "sequence_entropy": _sequence_entropy,
}


def loss_and_grad(obj, logp, old_logp, ref_logp, adv, mask, max_completion_length, entropy=None, is_penalised=None):
    """(loss, d loss / d logp [B, T]); 0 and zeros when no token is active. ref_logp may be None when kl_coef is 0."""
    is_active_BT = np.asarray(mask) > 0
    rows = [i for i in range(len(is_active_BT)) if is_active_BT[i].any()]
    N, num_tokens = len(rows), int(is_active_BT.sum())
    loss, grad_BT = 0.0, np.zeros(is_active_BT.shape)
    for i in rows:
        tokens = np.flatnonzero(is_active_BT[i])
        n = len(tokens)
        logp_n, old_n, adv_n = (np.asarray(x[i], np.float64)[tokens] for x in (logp, old_logp, adv))
        if obj.surrogate in WEIGHT or obj.surrogate in WEIGHT_OF_A_ROW:
            objective_n, slope_n = _weighted_logp(obj, logp_n, old_n, adv_n)
        elif obj.ratio not in OF_A_ROW:
            objective_n, slope_n = _token_surrogate(obj, logp_n, old_n, adv_n)
        else:
            objective, slope_n = _sequence_surrogate(obj, logp_n, old_n, adv_n)
            # One value a row, written as n equal shares: the row's mean of them is that value again.
            objective_n, slope_n = np.full(n, objective), n * slope_n
        log_ratio_n = np.clip(logp_n - old_n, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        is_free_n = np.abs(logp_n - old_n) <= MAX_LOG_RATIO
        if obj.max_off_policy_kl is not None and -log_ratio_n.mean() > obj.max_off_policy_kl:
            objective_n, slope_n = np.where(adv_n < 0, 0.0, objective_n), np.where(adv_n < 0, 0.0, slope_n)
        if obj.entropy_coef:
            objective_n = objective_n + obj.entropy_coef * np.asarray(entropy[i], np.float64)[tokens]
        if obj.drift_coef:
            objective_n = objective_n - obj.drift_coef * log_ratio_n**2
            slope_n = slope_n - 2 * obj.drift_coef * log_ratio_n * is_free_n
        if obj.cov_penalty:
            penalty_n = obj.cov_penalty * is_penalised[i][tokens]
            objective_n = objective_n - penalty_n * np.abs(log_ratio_n)
            slope_n = slope_n - penalty_n * np.sign(log_ratio_n) * is_free_n
        if obj.kl_coef != 0:
            kl_n, kl_slope_n = KL[obj.kl_estimator](logp_n, np.asarray(ref_logp[i], np.float64)[tokens])
            if obj.kl_by_ratio:
                kl_slope_n = np.exp(log_ratio_n) * (kl_slope_n + kl_n * is_free_n)
                kl_n = kl_n * np.exp(log_ratio_n)
            objective_n = objective_n - obj.kl_coef * kl_n
            slope_n = slope_n - obj.kl_coef * kl_slope_n

        aggregation = obj.aggregation
        if obj.ratio in OF_A_ROW and aggregation != "sequence_sum":
            aggregation = "sequence_mean"
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
    "future_kl": _ppo_clip,
    "soft_gate": lambda obj, w, A: _soft_gate(obj.gate_sharpness[int(A <= 0)], w, A),
    "importance": lambda obj, w, A: (w * A, A),
}


def _soft_gate(tau, w, A):
    x = tau * (w - 1)
    gate = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
    return 4 / tau * gate * A, 4 * gate * (1 - gate) * A


def _clipped_weight(obj, w, A):
    return min(max(w, 1 - obj.clip_low), 1 + obj.clip_high) * A


def _reinforce(obj, w, A):
    return A


# Surrogates that are a number times logp: (obj, w, A) -> that number, through which no gradient flows.
WEIGHT = {
    "clipped_weight": _clipped_weight,
    "reinforce": _reinforce,
}


def _trust_region(is_too_far):
    """Weights of a row's tokens: the bounded ratio; 0 where `is_too_far`, given new and old probability, says so."""

    def weights(obj, logp_n, old_n, adv_n):
        weight_n = np.zeros(len(logp_n))
        for t, A in enumerate(adv_n):
            w = math.exp(min(max(logp_n[t] - old_n[t], -MAX_LOG_RATIO), MAX_LOG_RATIO))
            p = math.exp(logp_n[t])
            weight_n[t] = 0.0 if is_too_far(obj, p, p / w, A) else min(w, obj.max_ratio) * A
        return weight_n

    return weights


def _too_far_by_tv(obj, p, q, A):
    return p - q > obj.clip_high if A > 0 else q - p > obj.clip_low


def _too_far_by_kl(obj, p, q, A):
    rest_p, rest_q = max(1 - p, 0.0), max(1 - q, 0.0)
    kl = q * math.log(q / p) + rest_q * math.log((rest_q + 1e-8) / (rest_p + 1e-8))
    return (kl > obj.clip_high and p > q) if A > 0 else (kl > obj.clip_low and p < q)


def _gamma_weight(obj, logp_n, old_n, adv_n):
    log_w = min(max(np.clip(logp_n - old_n, -MAX_LOG_RATIO, MAX_LOG_RATIO).sum(), math.log(1e-8)), MAX_LOG_RATIO)
    weight_n = np.zeros(len(logp_n))
    for t, A in enumerate(adv_n):
        k, lam = obj.gamma_weight[:2] if A >= 0 else obj.gamma_weight[2:]
        weight_n[t] = math.exp(max(lam + k * log_w - lam * math.exp(log_w), -700.0)) * A
    return weight_n


# Weights that need more than the ratio: (obj, logp, old, A of a row's tokens) -> what each logp is multiplied with.
WEIGHT_OF_A_ROW = {
    "trust_region_tv": _trust_region(_too_far_by_tv),
    "trust_region_kl": _trust_region(_too_far_by_kl),
    "gamma_weight": _gamma_weight,
}


def _influence(obj, log_ratio_n):
    """FIPO: exp of the discounted sum of the log-ratios from each token on, clipped."""
    gamma, (low, high) = 2 ** (-1 / obj.future_half_life), obj.future_clip
    sums = [sum(gamma ** (k - t) * log_ratio_n[k] for k in range(t, len(log_ratio_n))) for t in range(len(log_ratio_n))]
    return np.array([min(max(math.exp(min(x, 700.0)), low), high) for x in sums])


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
    if obj.surrogate in WEIGHT_OF_A_ROW:
        weight_n = WEIGHT_OF_A_ROW[obj.surrogate](obj, logp_n, old_n, adv_n)
        return weight_n * logp_n, weight_n
    w_n = np.exp(np.clip(logp_n - old_n, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    if obj.ratio in OF_A_ROW:
        w_n = np.full(len(w_n), OF_A_ROW[obj.ratio](logp_n - old_n)[0])
    weight_n = np.array([WEIGHT[obj.surrogate](obj, w, A) for w, A in zip(w_n, adv_n, strict=True)])
    return weight_n * logp_n, weight_n


def _token_surrogate(obj, logp_n, old_n, adv_n):
    objective_n, slope_n = np.zeros(len(logp_n)), np.zeros(len(logp_n))
    for t, log_ratio in enumerate(logp_n - old_n):
        w = math.exp(min(max(log_ratio, -MAX_LOG_RATIO), MAX_LOG_RATIO))
        if obj.ratio == "sequence_token":
            w = _geometric_mean_ratio(logp_n - old_n)[0]
        objective_n[t], dw = _with_dual_clip(obj, w, adv_n[t])
        slope_n[t] = dw * w if abs(log_ratio) <= MAX_LOG_RATIO else 0.0  # dw/dlogp = w
    if obj.surrogate == "future_kl":
        influence_n = _influence(obj, np.clip(logp_n - old_n, -MAX_LOG_RATIO, MAX_LOG_RATIO))
        return objective_n * influence_n, slope_n * influence_n
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
