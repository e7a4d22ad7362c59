"""Importance ratios and KL estimators: all per token, [B, T], nothing reduced over the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp

from grpo_jax.masking import masked_mean

MAX_LOG_RATIO = 20.0  # e^20 is beyond any clip; keeps exp finite so that 0 * inf cannot arise


def log_ratio(logp_BT, other_BT, mask_BT):
    """logp - other in nats, clamped; exactly 0 where masked. Masking comes before any exp: NaN there stays out of gradients."""
    kept_BT = mask_BT > 0
    difference_BT = jnp.where(kept_BT, logp_BT, 0.0) - jnp.where(kept_BT, other_BT, 0.0)
    return jnp.clip(difference_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def token_ratio(log_ratio_BT, mask_BT):
    """w[i,t] = exp(logp - old_logp)."""
    del mask_BT
    return jnp.exp(log_ratio_BT)


def sequence_ratio(log_ratio_BT, mask_BT):
    """w_i = mean_t exp(logp - old_logp), repeated over the row (GRPO-S, arXiv 2508.04349, eq. 8)."""
    return jnp.broadcast_to(masked_mean(jnp.exp(log_ratio_BT), mask_BT, -1, keepdims=True), mask_BT.shape)


def sequence_ratio_geometric(log_ratio_BT, mask_BT):
    """w_i = exp(mean_t (logp - old_logp)), repeated over the row (GRPO-S sec. 2.4.1; GSPO, arXiv 2507.18071, eq. 7)."""
    return jnp.broadcast_to(jnp.exp(masked_mean(log_ratio_BT, mask_BT, -1, keepdims=True)), mask_BT.shape)


def kl_k1(logp_BT, ref_logp_BT, mask_BT):
    """logp - ref, in nats: unbiased for KL(policy || reference) as a number, but its gradient is 0 in expectation."""
    return log_ratio(logp_BT, ref_logp_BT, mask_BT)


def kl_k2(logp_BT, ref_logp_BT, mask_BT):
    """(logp - ref)^2 / 2 >= 0, in nats: biased as a number; on samples of the policy its gradient is that of the KL."""
    return 0.5 * jnp.square(log_ratio(logp_BT, ref_logp_BT, mask_BT))


def kl_k3(logp_BT, ref_logp_BT, mask_BT):
    """exp(ref - logp) - (ref - logp) - 1 >= 0, in nats: unbiased for KL(policy || reference), with a usable gradient.

    On samples of the policy that gradient is the one of KL(reference || policy): the same where the two agree.
    """
    log_BT = log_ratio(ref_logp_BT, logp_BT, mask_BT)
    return jnp.expm1(log_BT) - log_BT


RATIOS: Mapping[str, Callable[[Any, Any], Any]] = MappingProxyType(
    {"token": token_ratio, "sequence": sequence_ratio, "sequence_geometric": sequence_ratio_geometric}
)
SEQUENCE_RATIOS = ("sequence", "sequence_geometric")
KL_ESTIMATORS: Mapping[str, Callable[[Any, Any, Any], Any]] = MappingProxyType({"k1": kl_k1, "k2": kl_k2, "k3": kl_k3})
