"""The objectives: five published variants (and GSPO) as points on five axes.

    obj = objectives.get("gtpo")
    adv_BT = objectives.advantages(obj, rewards_B, mask_BT, entropy_BT, group_size=G)
    loss, metrics = objectives.loss(obj, logp_BT, old_logp_BT, ref_logp_BT, adv_BT, mask_BT, max_completion_length=L)

The train step uses `token_loss` and `weights`, the parts that `loss` is made of: there is no second implementation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from grpo_jax.metrics import Mean
from grpo_jax.objectives.advantages import Arrays, advantages
from grpo_jax.objectives.aggregation import token_weights
from grpo_jax.objectives.ratios import RATIOS, SEQUENCE_RATIOS, clipped_surrogate, kl_k3, log_ratio
from grpo_jax.objectives.spec import VARIANTS, Objective, describe, get

__all__ = ["VARIANTS", "Objective", "advantages", "describe", "get", "loss", "loss_metrics", "token_loss", "weights"]


def token_loss(
    obj: Objective,
    logp_BT: Float[Arrays, "B T"],
    old_logp_BT: Float[Arrays, "B T"],
    ref_logp_BT: Float[Arrays, "B T"] | None,
    adv_BT: Float[Arrays, "B T"],
    mask_BT: Shaped[Arrays, "B T"],
) -> tuple[Float[jax.Array, "B T"], dict[str, Shaped[jax.Array, "B T"]]]:
    """The unreduced loss, and what there is to say about it.

    Args: log-probabilities in nats, float32[B, T]; gradient flows through logp_BT only. ref_logp_BT may be None, and is
        ignored, where kl_coef = 0.
    Returns: loss_BT (0 where masked; sequence-level ratios repeat the row's value over its tokens), and
      {"ratio", "is_clipped_low", "is_clipped_high", "kl_ref"} as [B, T] arrays (kl_ref only where kl_coef > 0).
    """
    if ref_logp_BT is None and obj.has_kl:
        raise ValueError(f"objective.kl_coef = {obj.kl_coef} needs the reference's log-probabilities, got ref_logp_BT = None")
    adv_BT = jax.lax.stop_gradient(jnp.where(mask_BT > 0, adv_BT, 0.0))
    old_logp_BT = jax.lax.stop_gradient(old_logp_BT)
    ratio_BT = RATIOS[obj.ratio](log_ratio(logp_BT, old_logp_BT, mask_BT), mask_BT)
    loss_BT = -clipped_surrogate(ratio_BT, adv_BT, obj.clip_low, obj.clip_high)
    aux = {
        "ratio": ratio_BT,
        "is_clipped_low": (ratio_BT < 1.0 - obj.clip_low) & (adv_BT < 0),
        "is_clipped_high": (ratio_BT > 1.0 + obj.clip_high) & (adv_BT > 0),
    }
    if ref_logp_BT is not None and obj.has_kl:
        aux["kl_ref"] = kl_k3(logp_BT, jax.lax.stop_gradient(ref_logp_BT), mask_BT)
        loss_BT = loss_BT + obj.kl_coef * aux["kl_ref"]
    return jnp.where(mask_BT > 0, loss_BT, 0.0), aux


def weights(
    obj: Objective, mask_BT: Shaped[Arrays, "B T"], *, max_completion_length: int, axis_name: str | None = None
) -> tuple[Float[jax.Array, "B T"], Float[jax.Array, ""]]:
    """-> (weight_BT, denom) with loss = sum(loss_BT * weight_BT) / denom. A sequence-level ratio always averages rows."""
    aggregation = "sequence_mean" if obj.ratio in SEQUENCE_RATIOS else obj.aggregation
    return token_weights(aggregation, mask_BT, max_completion_length=max_completion_length, axis_name=axis_name)


def loss_metrics(aux, mask_BT) -> dict[str, Mean]:
    """What happened to the ratio, over completion tokens: the clipped fractions, its mean, and the KL in nats."""
    names = {
        "policy/clip_fraction_low": "is_clipped_low",
        "policy/clip_fraction_high": "is_clipped_high",
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
    axis_name: str | None = None,
) -> tuple[Float[jax.Array, ""], dict[str, Mean]]:
    """The scalar to minimise and its metrics; inside `shard_map` with `axis_name` both are global.

    Raises: ValueError if ref_logp_BT is None although kl_coef > 0.
    """
    loss_BT, aux = token_loss(obj, logp_BT, old_logp_BT, ref_logp_BT, adv_BT, mask_BT)
    weight_BT, denom = weights(obj, mask_BT, max_completion_length=max_completion_length, axis_name=axis_name)
    total = (loss_BT * weight_BT).sum() / denom
    metrics = loss_metrics(aux, mask_BT)
    if axis_name:
        total = jax.lax.psum(total, axis_name)
        metrics = {name: metric.psum(axis_name) for name, metric in metrics.items()}
    return total, metrics
