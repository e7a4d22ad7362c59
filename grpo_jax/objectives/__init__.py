"""The objectives: published variants as points on a few independent axes.

    obj = objectives.get("gtpo")
    adv_BT = objectives.advantages(obj, rewards_B, mask_BT, entropy_BT, group_size=G)
    loss, metrics = objectives.loss(obj, logp_BT, old_logp_BT, ref_logp_BT, adv_BT, mask_BT, max_completion_length=L)

The train step uses `token_loss` and `weights`, the parts that `loss` is made of: there is no second implementation.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from grpo_jax.metrics import Mean
from grpo_jax.objectives.advantages import advantages, penalised_tokens, rewards_with_kl
from grpo_jax.objectives.aggregation import token_weights
from grpo_jax.objectives.choices import check_choices, get, sources
from grpo_jax.objectives.family import FAMILY, PRESETS, VARIANTS, describe
from grpo_jax.objectives.functions import find
from grpo_jax.objectives.params import Params
from grpo_jax.objectives.ratios import (
    KL_ESTIMATORS,
    Arrays,
    kl_k3,
    log_ratio,
    off_policy_rows,
    ratio_of,
    sampler_ratio,
    sampler_weights,
    token_ratio,
)
from grpo_jax.objectives.surrogates import SurrogateInputs, apply_dual_clip, surrogate_of
from grpo_jax.objectives.variants import ENTRIES, Objective, Variant
from grpo_jax.types import AxisName

__all__ = [
    "ENTRIES",
    "FAMILY",
    "PRESETS",
    "VARIANTS",
    "Objective",
    "Params",
    "Variant",
    "advantages",
    "check_choices",
    "describe",
    "get",
    "log_ratio",
    "loss",
    "loss_metrics",
    "penalised_tokens",
    "rewards_with_kl",
    "sampler_ratio",
    "sampler_weights",
    "sources",
    "token_loss",
    "weights",
]


def token_loss(
    obj: Objective,
    logp_BT: Float[Arrays, "B T"],
    old_logp_BT: Float[Arrays, "B T"],
    ref_logp_BT: Float[Arrays, "B T"] | None,
    adv_BT: Float[Arrays, "B T"],
    mask_BT: Shaped[Arrays, "B T"],
    *,
    entropy_BT: Float[Arrays, "B T"] | None = None,
    penalised_BT: Shaped[Arrays, "B T"] | None = None,
) -> tuple[Float[jax.Array, "B T"], dict[str, Shaped[jax.Array, "B T"]]]:
    """Compute the unreduced loss of each token, and the arrays that its metrics are made of.

    Args:
      logp_BT, old_logp_BT, ref_logp_BT: float32, nats, of the sampled tokens; gradient flows through logp_BT only.
        ref_logp_BT may be None where kl_coef = 0.
      adv_BT: float32, of `advantages`. mask_BT: 1 on completion tokens; the others may hold anything.
      entropy_BT: nats, of the policy being trained, with its gradient; may be None where entropy_coef = 0.
      penalised_BT: bool, of `penalised_tokens`; may be None where cov_penalty = 0.
    Returns: loss_BT (0 where masked; sequence-level ratios repeat the row's value over its tokens), and
      {"ratio", "is_clipped_low", "is_clipped_high", "is_clipped_dual", "is_off_policy", "is_penalised", "kl_ref"} as [B, T]
      arrays: those of dual_clip, max_off_policy_kl and cov_penalty only with these, kl_ref only where a KL is taken, in the
      loss or in the reward (always k3, so that runs compare).
    Raises: ValueError if ref_logp_BT, entropy_BT or penalised_BT is None though kl_coef, entropy_coef or cov_penalty is > 0.
    """
    if obj.has_entropy_bonus and entropy_BT is None:
        raise ValueError(f"objective.entropy_coef = {obj.entropy_coef} needs the policy's entropy_BT, got None")
    if obj.cov_penalty and penalised_BT is None:
        raise ValueError(f"objective.cov_penalty = {obj.cov_penalty} needs penalised_BT of `penalised_tokens`, got None")
    if ref_logp_BT is None and obj.has_kl:
        raise ValueError(f"objective.kl_coef = {obj.kl_coef} needs the reference's log-probabilities, got ref_logp_BT = None")
    # Masked entries become numbers before anything is computed from them, so that a NaN there is in no value or gradient.
    kept_BT = mask_BT > 0
    adv_BT = jax.lax.stop_gradient(jnp.where(kept_BT, adv_BT, 0.0))
    log_ratio_BT = log_ratio(logp_BT, jax.lax.stop_gradient(old_logp_BT), mask_BT)
    ratio_BT = ratio_of(obj, log_ratio_BT, mask_BT)
    terms = SurrogateInputs(jnp.where(kept_BT, logp_BT, 0.0), log_ratio_BT, ratio_BT, adv_BT, mask_BT)
    value_BT, clipped_low_BT, clipped_high_BT = surrogate_of(obj, terms)
    aux = {"ratio": ratio_BT, "is_clipped_low": clipped_low_BT, "is_clipped_high": clipped_high_BT}
    if obj.dual_clip is not None:
        aux["is_clipped_dual"] = (adv_BT < 0) & (value_BT < obj.dual_clip * adv_BT)
        value_BT = apply_dual_clip(value_BT, adv_BT, obj.dual_clip)
    if obj.max_off_policy_kl is not None:
        aux["is_off_policy"] = off_policy_rows(log_ratio_BT, adv_BT, mask_BT, obj.max_off_policy_kl)
        value_BT = jnp.where(aux["is_off_policy"], 0.0, value_BT)
    if penalised_BT is not None and obj.cov_penalty:
        aux["is_penalised"] = jnp.logical_and(kept_BT, penalised_BT > 0)
    loss_BT = _penalties(obj, log_ratio_BT, aux) - value_BT
    if entropy_BT is not None and obj.has_entropy_bonus:
        loss_BT = loss_BT - obj.entropy_coef * jnp.where(kept_BT, entropy_BT, 0.0)
    if ref_logp_BT is not None and obj.needs_reference:
        logps = logp_BT, jax.lax.stop_gradient(ref_logp_BT), mask_BT
        aux["kl_ref"] = kl_k3(obj, *logps)
        if obj.has_kl:
            penalty_BT = find("kl_estimator", obj.kl_estimator, KL_ESTIMATORS)(obj, *logps)
            if obj.kl_by_ratio:
                penalty_BT = penalty_BT * token_ratio(obj, log_ratio_BT, mask_BT)
            loss_BT = loss_BT + obj.kl_coef * penalty_BT
    return jnp.where(kept_BT, loss_BT, 0.0), aux


def _penalties(
    obj: Objective, log_ratio_BT: Float[jax.Array, "B T"], aux: Mapping[str, Shaped[jax.Array, "B T"]]
) -> Float[jax.Array, "B T"] | float:
    """Compute what holds the policy near the one that sampled, beside the surrogate's own bounds."""
    total_BT = 0.0
    if "is_penalised" in aux:
        total_BT += obj.cov_penalty * jnp.where(aux["is_penalised"], jnp.abs(log_ratio_BT), 0.0)
    if obj.drift_coef:
        total_BT += obj.drift_coef * jnp.square(log_ratio_BT)
    return total_BT


def weights(
    obj: Objective, mask_BT: Shaped[Arrays, "B T"], *, max_completion_length: int, axis_name: AxisName | None = None
) -> tuple[Float[jax.Array, "B T"], Float[jax.Array, ""]]:
    """Turn a mask into weights: loss = sum(loss_BT * weight_BT) / denom. A sequence-level ratio averages or sums rows.

    Args:
      mask_BT: 1 on completion tokens. max_completion_length: generation budget, tokens.
      axis_name: mesh axis to count over, inside `shard_map`.
    Returns: (weight_BT float32, denom float32 scalar: global, at least 1).
    """
    return token_weights(obj, mask_BT, max_completion_length=max_completion_length, axis_name=axis_name)


def loss_metrics(aux: Mapping[str, Shaped[jax.Array, "B T"]], mask_BT: Shaped[Arrays, "B T"]) -> dict[str, Mean]:
    """Summarise `token_loss`'s arrays over completion tokens: the clipped fractions, the mean ratio, and the KL in nats."""
    names = {
        "policy/clip_fraction_low": "is_clipped_low",
        "policy/clip_fraction_high": "is_clipped_high",
        "policy/clip_fraction_dual": "is_clipped_dual",
        "policy/off_policy_fraction": "is_off_policy",
        "policy/penalised_fraction": "is_penalised",
        "policy/ratio": "ratio",
        "policy/kl_ref": "kl_ref",
    }
    return {name: Mean.of(jax.lax.stop_gradient(aux[key]), mask_BT) for name, key in names.items() if key in aux}


def loss(
    obj: Objective,
    logp_BT: Float[Arrays, "B T"],
    old_logp_BT: Float[Arrays, "B T"],
    ref_logp_BT: Float[Arrays, "B T"] | None,
    adv_BT: Float[Arrays, "B T"],
    mask_BT: Shaped[Arrays, "B T"],
    *,
    max_completion_length: int,
    entropy_BT: Float[Arrays, "B T"] | None = None,
    penalised_BT: Shaped[Arrays, "B T"] | None = None,
    axis_name: AxisName | None = None,
) -> tuple[Float[jax.Array, ""], dict[str, Mean]]:
    """Compute the scalar to minimise and its metrics; inside `shard_map` with `axis_name` both are global.

    Args:
      logp_BT, old_logp_BT, ref_logp_BT, adv_BT, mask_BT, entropy_BT, penalised_BT: as `token_loss` takes them.
      max_completion_length: generation budget, tokens. axis_name: mesh axis to add up over.
    Returns: (loss, a float32 scalar; name -> metric).
    Raises: ValueError if ref_logp_BT is None although kl_coef > 0.
    """
    arrays = logp_BT, old_logp_BT, ref_logp_BT, adv_BT, mask_BT
    loss_BT, aux = token_loss(obj, *arrays, entropy_BT=entropy_BT, penalised_BT=penalised_BT)
    weight_BT, denom = weights(obj, mask_BT, max_completion_length=max_completion_length, axis_name=axis_name)
    total = (loss_BT * weight_BT).sum() / denom
    metrics = loss_metrics(aux, mask_BT)
    if axis_name:
        total = jax.lax.psum(total, axis_name)
        metrics = {name: metric.psum(axis_name) for name, metric in metrics.items()}
    return total, metrics
