"""The objective of each token, from ratio, log-probability and advantage: [B, T], nothing reduced over the batch.

Surrogates share one signature: (obj, terms) -> Surrogate, or any (value_BT, clipped_low_BT, clipped_high_BT).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from grpo_jax.objectives.functions import Function, find
from grpo_jax.objectives.ratios import MAX_LOG_RATIO, Arrays, ratio_of, token_ratio
from grpo_jax.objectives.variants import Objective

MIN_LOG_PRODUCT = math.log(1e-8)  # of a row's ratio in `gamma_weight`, whose weight there is 0 in any case
PROBABILITY_FLOOR = 1e-8  # keeps log((1 - p) / (1 - q)) finite for certain tokens, as verl's does


class SurrogateInputs(NamedTuple):
    """The arrays that a surrogate is made of, all [B, T] and finite where masked.

    logp_BT, log_ratio_BT: nats, with gradient. ratio_BT: of the objective's level, per token or a row's one value repeated.
    adv_BT: without gradient, 0 where masked. mask_BT: 1 on completion tokens.
    """

    logp_BT: jax.Array
    log_ratio_BT: jax.Array
    ratio_BT: jax.Array
    adv_BT: jax.Array
    mask_BT: Arrays


class Surrogate(NamedTuple):
    """value_BT: to be maximised. clipped_low_BT, clipped_high_BT: bool, where the clip holds the ratio or the weight."""

    value_BT: jax.Array
    clipped_low_BT: jax.Array
    clipped_high_BT: jax.Array


def ppo_clip(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """min(w A, clip(w, 1 - clip_low, 1 + clip_high) A): pessimistic for either sign of A (PPO, arXiv 1707.06347, eq. 7)."""
    ratio_BT, adv_BT = terms.ratio_BT, terms.adv_BT
    clipped_BT = jnp.clip(ratio_BT, 1.0 - obj.clip_low, 1.0 + obj.clip_high)
    return Surrogate(jnp.minimum(ratio_BT * adv_BT, clipped_BT * adv_BT), *_clip_active(obj, ratio_BT, adv_BT))


def token_clip(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """Each token's ratio is clipped by itself, as pessimistically, before `ratio` combines a row's tokens: w' A.

    With ratio = "sequence_geometric" GMPO (Zhao et al., arXiv 2507.20673); with "token" it is `ppo_clip`.
    """
    log_ratio_BT, adv_BT = terms.log_ratio_BT, terms.adv_BT
    # In logs, because the geometric mean is taken of logs. A clip_low of 1 or more is no lower bound: log 0 = -inf.
    low = jnp.log(jnp.maximum(1.0 - obj.clip_low, 0.0))
    clipped_BT = jnp.clip(log_ratio_BT, low, jnp.log1p(obj.clip_high))
    # min(w A, clip(w) A) would be taken after the mean; before it, pessimism is the smaller log for A >= 0, else the larger.
    pessimistic_BT = jnp.where(adv_BT >= 0, jnp.minimum(log_ratio_BT, clipped_BT), jnp.maximum(log_ratio_BT, clipped_BT))
    value_BT = ratio_of(obj, pessimistic_BT, terms.mask_BT) * adv_BT
    return Surrogate(value_BT, *_clip_active(obj, token_ratio(obj, log_ratio_BT, terms.mask_BT), adv_BT))


def clipped_weight(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """sg(clip(w, 1 - clip_low, 1 + clip_high)) A logp: no token loses its gradient (CISPO, arXiv 2506.13585, eqs. 4-5)."""
    low, high = 1.0 - obj.clip_low, 1.0 + obj.clip_high
    # Without the stop the gradient of a token inside the bounds would be (1 + logp) w A, of the wrong sign below 1/e.
    weight_BT = jax.lax.stop_gradient(jnp.clip(terms.ratio_BT, low, high))
    return Surrogate(weight_BT * terms.adv_BT * terms.logp_BT, terms.ratio_BT < low, terms.ratio_BT > high)


def reinforce(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """A logp, whatever policy sampled: meant for one update a batch (Williams 1992; RLOO, arXiv 2402.14740)."""
    del obj
    return Surrogate(terms.adv_BT * terms.logp_BT, *_nowhere(terms))


def soft_gate(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """(4 / tau) sigmoid(tau (w - 1)) A, tau by the sign of A: a slope that fades instead of a clip (SAPO, arXiv 2511.20347)."""
    tau_BT = jnp.where(terms.adv_BT > 0, *obj.gate_sharpness)
    gate_BT = jax.nn.sigmoid(tau_BT * (terms.ratio_BT - 1.0)) * 4.0 / tau_BT
    return Surrogate(gate_BT * terms.adv_BT, *_nowhere(terms))


def trust_region_tv(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """sg(min(w, max_ratio)) A logp, while the token's probability has moved by at most the bound (DPPO, arXiv 2602.04879).

    The bounds are of pi - pi_old, clip_high for A > 0 and -clip_low for the others: a rare token may grow many times over, and
    a likely one may not fall by much. Binary total variation, as prime-rl's default loss and verl's "dppo_tv" take it.
    """
    moved_BT = jnp.exp(terms.logp_BT) - jnp.exp(terms.logp_BT - terms.log_ratio_BT)
    too_low_BT, too_high_BT = moved_BT < -obj.clip_low, moved_BT > obj.clip_high
    return _inside_trust_region(obj, terms, too_low_BT, too_high_BT)


def trust_region_kl(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """The same, while the KL from old to new of the token against all others is at most the bound (DPPO's binary KL)."""
    new_BT, old_BT = jnp.exp(terms.logp_BT), jnp.exp(terms.logp_BT - terms.log_ratio_BT)
    # Rounding may leave a log-probability a little above 0.
    rest_new_BT, rest_old_BT = jnp.maximum(1.0 - new_BT, 0.0), jnp.maximum(1.0 - old_BT, 0.0)
    others_BT = (rest_old_BT + PROBABILITY_FLOOR) / (rest_new_BT + PROBABILITY_FLOOR)
    kl_BT = -old_BT * terms.log_ratio_BT + rest_old_BT * jnp.log(others_BT)
    too_low_BT = (kl_BT > obj.clip_low) & (new_BT < old_BT)
    too_high_BT = (kl_BT > obj.clip_high) & (new_BT > old_BT)
    return _inside_trust_region(obj, terms, too_low_BT, too_high_BT)


def _inside_trust_region(obj: Objective, terms: SurrogateInputs, too_low_BT, too_high_BT):
    """Weigh A logp by the bounded ratio on tokens that the update has not moved too far towards where A asks."""
    is_low_BT, is_high_BT = too_low_BT & (terms.adv_BT < 0), too_high_BT & (terms.adv_BT > 0)
    weight_BT = jax.lax.stop_gradient(jnp.minimum(terms.ratio_BT, obj.max_ratio))
    value_BT = jnp.where(is_low_BT | is_high_BT, 0.0, weight_BT * terms.adv_BT * terms.logp_BT)
    return Surrogate(value_BT, is_low_BT, is_high_BT)


def gamma_weight(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """sg(phi(W)) A logp, phi(W) = W^k exp(lambda (1 - W)), W the whole row's ratio (VESPO, arXiv 2602.10693).

    phi is 1 at W = 1 and falls on both sides; k and lambda go by the sign of A. W is the product of the row's token ratios.
    """
    k_positive, lambda_positive, k_negative, lambda_negative = obj.gamma_weight
    log_w_B1 = jnp.clip(terms.log_ratio_BT.sum(-1, keepdims=True), MIN_LOG_PRODUCT, MAX_LOG_RATIO)
    k_BT = jnp.where(terms.adv_BT >= 0, k_positive, k_negative)
    lambda_BT = jnp.where(terms.adv_BT >= 0, lambda_positive, lambda_negative)
    phi_BT = jnp.exp(lambda_BT + k_BT * log_w_B1 - lambda_BT * jnp.exp(log_w_B1))
    return Surrogate(jax.lax.stop_gradient(phi_BT) * terms.adv_BT * terms.logp_BT, *_nowhere(terms))


def future_kl(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """`ppo_clip` times sg(clip(exp(sum_k gamma^k log w_(t+k)))): credit by what came after the token (FIPO, arXiv 2603.19835).

    gamma halves over `future_half_life` tokens. Differs from ms-swift's: no further bound for A < 0 with a large ratio.
    """
    decay = 2.0 ** (-1.0 / obj.future_half_life)

    def add(later_B, log_ratio_B):
        future_B = log_ratio_B + decay * later_B
        return future_B, future_B

    log_ratio_TB = jax.lax.stop_gradient(terms.log_ratio_BT).T
    _, future_TB = jax.lax.scan(add, 0.0 * log_ratio_TB[0], log_ratio_TB, reverse=True)
    value_BT, low_BT, high_BT = ppo_clip(obj, terms)
    return Surrogate(value_BT * jnp.clip(jnp.exp(future_TB.T), *obj.future_clip), low_BT, high_BT)


def importance(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """w A, bounded by nothing (the surrogate that KL-Cov, arXiv 2505.22617, penalises where it matters)."""
    del obj
    return Surrogate(terms.ratio_BT * terms.adv_BT, *_nowhere(terms))


def _nowhere(terms: SurrogateInputs):
    """No token is held by a bound, neither below nor above."""
    nowhere_BT = jnp.zeros_like(terms.adv_BT, bool)
    return nowhere_BT, nowhere_BT


def apply_dual_clip(
    value_BT: Float[jax.Array, "B T"], adv_BT: Float[jax.Array, "B T"], bound: float
) -> Float[jax.Array, "B T"]:
    """max(value, bound A) where A < 0: a bad token that became far likelier cannot dominate (Ye et al., arXiv 1912.09729).

    Args:
      value_BT: the surrogate. adv_BT: advantages. bound: c > 1, the largest ratio that counts.
    Returns: float32[B, T]; no gradient flows where the bound holds.
    """
    return jnp.where(adv_BT < 0, jnp.maximum(value_BT, bound * adv_BT), value_BT)


def _clip_active(obj: Objective, ratio_BT, adv_BT):
    """Mark where a pessimistic clip holds: too low already for A < 0, too high already for A > 0."""
    return (ratio_BT < 1.0 - obj.clip_low) & (adv_BT < 0), (ratio_BT > 1.0 + obj.clip_high) & (adv_BT > 0)


SURROGATES: Mapping[str, Function] = MappingProxyType(
    {
        "ppo_clip": ppo_clip,
        "token_clip": token_clip,
        "clipped_weight": clipped_weight,
        "reinforce": reinforce,
        "soft_gate": soft_gate,
        "trust_region_tv": trust_region_tv,
        "trust_region_kl": trust_region_kl,
        "gamma_weight": gamma_weight,
        "future_kl": future_kl,
        "importance": importance,
    }
)
# The gradient goes through the ratio, so a second bound on it means something.
CLIPPED_RATIO = ("ppo_clip", "token_clip", "importance")


def surrogate_of(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """Compute the objective's surrogate."""
    return Surrogate(*find("surrogate", obj.surrogate, SURROGATES)(obj, terms))
