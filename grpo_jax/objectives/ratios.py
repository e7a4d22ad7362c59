"""Importance ratios and KL estimators: all per token, [B, T], nothing reduced over the batch.

A ratio is (obj, log_ratio_BT, mask_BT) -> [B, T], a KL estimator (obj, logp_BT, ref_logp_BT, mask_BT) -> [B, T]. A function of
one's own that gives one value a row, and so wants rows averaged, says so by an attribute: `my_ratio.is_per_row = True`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Shaped

from grpo_jax.masking import masked_mean
from grpo_jax.objectives.functions import Function, find

if TYPE_CHECKING:
    from grpo_jax.objectives.variants import Objective

Arrays = jax.Array | np.ndarray

# e^20 is beyond any clip; bounding the log keeps exp finite, so that 0 * inf cannot arise in value or gradient.
MAX_LOG_RATIO = 20.0


def log_ratio(
    logp_BT: Float[Arrays, "*B T"], other_BT: Float[Arrays, "*B T"], mask_BT: Shaped[Arrays, "*B T"]
) -> Float[jax.Array, "*B T"]:
    """logp - other, clamped to +-MAX_LOG_RATIO; exactly 0 where masked.

    Args:
      logp_BT, other_BT: float32, nats, of the same sampled tokens; gradient flows through both. Any leading axes.
      mask_BT: 1 on completion tokens; the others may hold anything, NaN included.
    Returns: float32[..., T], nats.
    """
    # Masking comes before any exp: where(mask, exp(x), 0) has a NaN gradient if exp(x) overflows.
    kept_BT = mask_BT > 0
    difference_BT = jnp.where(kept_BT, logp_BT, 0.0) - jnp.where(kept_BT, other_BT, 0.0)
    return jnp.clip(difference_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_ratio(obj: Objective, log_ratio_BT: Float[Arrays, "B T"], mask_BT: Shaped[Arrays, "B T"]) -> Float[jax.Array, "B T"]:
    """w[i,t] = exp(logp - old_logp)."""
    del obj, mask_BT
    return jnp.exp(log_ratio_BT)


def sequence_ratio(
    obj: Objective, log_ratio_BT: Float[Arrays, "B T"], mask_BT: Shaped[Arrays, "B T"]
) -> Float[jax.Array, "B T"]:
    """w_i = mean_t exp(logp - old_logp), repeated over the row (GRPO-S, arXiv 2508.04349, eq. 8)."""
    del obj
    return jnp.broadcast_to(masked_mean(jnp.exp(log_ratio_BT), mask_BT, -1, keepdims=True), mask_BT.shape)


def sequence_ratio_geometric(
    obj: Objective, log_ratio_BT: Float[Arrays, "B T"], mask_BT: Shaped[Arrays, "B T"]
) -> Float[jax.Array, "B T"]:
    """w_i = exp(mean_t (logp - old_logp)), repeated over the row (GRPO-S sec. 2.4.1; GSPO, arXiv 2507.18071, eq. 7)."""
    del obj
    return jnp.broadcast_to(jnp.exp(masked_mean(log_ratio_BT, mask_BT, -1, keepdims=True)), mask_BT.shape)


def sequence_token_ratio(
    obj: Objective, log_ratio_BT: Float[Arrays, "B T"], mask_BT: Shaped[Arrays, "B T"]
) -> Float[jax.Array, "B T"]:
    """sg(s_i) w / sg(w) with the geometric s_i: a row's value, each token's own gradient (GSPO-token, 2507.18071, eq. 14).

    So a row may have several advantages; with one, value and gradient are `sequence_ratio_geometric`'s.
    """
    of_row_BT = jax.lax.stop_gradient(sequence_ratio_geometric(obj, log_ratio_BT, mask_BT))
    return of_row_BT * jnp.exp(log_ratio_BT - jax.lax.stop_gradient(log_ratio_BT))


def kl_k1(
    obj: Objective, logp_BT: Float[Arrays, "B T"], ref_logp_BT: Float[Arrays, "B T"], mask_BT: Shaped[Arrays, "B T"]
) -> Float[jax.Array, "B T"]:
    """logp - ref: unbiased for KL(policy || reference) as a number, but its gradient is 0 in expectation.

    Args:
      obj: not read. logp_BT, ref_logp_BT: float32, nats, of the sampled tokens. mask_BT: 1 on completion tokens.
    Returns: float32[B, T], nats, 0 where masked.
    """
    del obj
    return log_ratio(logp_BT, ref_logp_BT, mask_BT)


def kl_k2(
    obj: Objective, logp_BT: Float[Arrays, "B T"], ref_logp_BT: Float[Arrays, "B T"], mask_BT: Shaped[Arrays, "B T"]
) -> Float[jax.Array, "B T"]:
    """(logp - ref)^2 / 2 >= 0: biased as a number; on samples of the policy its gradient is that of the KL.

    Args:
      obj: not read. logp_BT, ref_logp_BT: float32, nats, of the sampled tokens. mask_BT: 1 on completion tokens.
    Returns: float32[B, T], nats squared, 0 where masked.
    """
    del obj
    return 0.5 * jnp.square(log_ratio(logp_BT, ref_logp_BT, mask_BT))


def kl_k3(
    obj: Objective, logp_BT: Float[Arrays, "B T"], ref_logp_BT: Float[Arrays, "B T"], mask_BT: Shaped[Arrays, "B T"]
) -> Float[jax.Array, "B T"]:
    """exp(ref - logp) - (ref - logp) - 1 >= 0: unbiased for KL(policy || reference), with a usable gradient.

    On samples of the policy that gradient is the one of KL(reference || policy): the same where the two agree.

    Args:
      obj: not read. logp_BT, ref_logp_BT: float32, nats, of the sampled tokens. mask_BT: 1 on completion tokens.
    Returns: float32[B, T], nats, 0 where masked.
    """
    del obj
    log_BT = log_ratio(ref_logp_BT, logp_BT, mask_BT)
    # Near 0, where a run begins, exp(x) - 1 - x would cancel to rounding noise; expm1 keeps x^2 / 2.
    return jnp.expm1(log_BT) - log_BT


def off_policy_rows(
    log_ratio_BT: Float[jax.Array, "B T"],
    adv_BT: Float[jax.Array, "B T"],
    mask_BT: Shaped[Arrays, "B T"],
    bound: float,
) -> Bool[jax.Array, "B T"]:
    """Mark tokens with A < 0 in rows whose mean log(old / new) is above the bound (OPSM of DeepSeek-V3.2, arXiv 2512.02556).

    Args:
      log_ratio_BT: nats, new over old. adv_BT: advantages. mask_BT: 1 on completion tokens. bound: nats a token.
    Returns: bool[B, T], without gradient.
    """
    kl_B1 = masked_mean(-log_ratio_BT, mask_BT, -1, keepdims=True)
    return (adv_BT < 0) & (jax.lax.stop_gradient(kl_B1) > bound)


def sampler_ratio(log_ratio: Float[Arrays, "*B T"], mask: Shaped[Arrays, "*B T"], level: str) -> Float[jax.Array, "*B T"]:
    """Compute how much likelier the learner finds what the sampler drew: a token, a whole row, or the mean of a row's logs.

    Args:
      log_ratio: nats, learner over sampler, 0 where masked. mask: 1 on completion tokens.
      level: "token", "sequence" (the product of the row's tokens) or "sequence_geometric"; a row's value is repeated.
    Returns: float32[..., T].
    """
    if level == "token":
        return jnp.exp(log_ratio)
    total = log_ratio.sum(-1, keepdims=True)
    if level == "sequence_geometric":
        total = masked_mean(log_ratio, mask, -1, keepdims=True)
    return jnp.broadcast_to(jnp.exp(jnp.clip(total, -MAX_LOG_RATIO, MAX_LOG_RATIO)), log_ratio.shape)


def sampler_weights(ratio: Float[Arrays, "*B T"], outside: str, low: float, high: float) -> Float[jax.Array, "*B T"]:
    """Bound the ratio of `sampler_ratio` to a weight of the policy loss.

    Truncated by tokens it is TIS (Yao et al. 2025); masked by tokens IcePop (Ring-1T, arXiv 2510.18855) and token MIS; masked
    by rows sequence and geometric MIS (Liu et al. 2025, "When speed kills stability").

    Args:
      ratio: of `sampler_ratio`. outside: "truncate", the bound counts beyond it, or "mask", nothing does.
      low, high: the bounds, which belong to the inside.
    Returns: float32[..., T], in [low, high] or 0.
    """
    if outside == "truncate":
        return jnp.clip(ratio, low, high)
    return jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0)


RATIOS: Mapping[str, Function] = MappingProxyType(
    {
        "token": token_ratio,
        "sequence": sequence_ratio,
        "sequence_geometric": sequence_ratio_geometric,
        "sequence_token": sequence_token_ratio,
    }
)
# These have one value a row, so rows are averaged whatever `aggregation` says, and a row needs one advantage.
SEQUENCE_RATIOS = ("sequence", "sequence_geometric")
KL_ESTIMATORS: Mapping[str, Function] = MappingProxyType({"k1": kl_k1, "k2": kl_k2, "k3": kl_k3})


def ratio_of(obj: Objective, log_ratio_BT: Float[Arrays, "B T"], mask_BT: Shaped[Arrays, "B T"]) -> Float[jax.Array, "B T"]:
    """Compute the importance ratio at the objective's level.

    Args:
      obj: its `ratio` is read. log_ratio_BT: nats, 0 where masked. mask_BT: 1 on completion tokens.
    Returns: float32[B, T], a row's one value repeated where the ratio is of whole rows.
    """
    return find("ratio", obj.ratio, RATIOS)(obj, log_ratio_BT, mask_BT)


def is_per_row(obj: Objective) -> bool:
    """Tell if the objective's ratio has one value a row, so that rows are averaged and a row needs one advantage."""
    return getattr(find("ratio", obj.ratio, RATIOS), "is_per_row", obj.ratio in SEQUENCE_RATIOS)
