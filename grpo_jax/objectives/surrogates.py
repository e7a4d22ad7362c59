"""The objective of each token, from ratio, log-probability and advantage: [B, T], nothing reduced over the batch.

Surrogates share one signature: (obj, terms) -> Surrogate, or any (value_BT, clipped_low_BT, clipped_high_BT).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from grpo_jax.objectives.functions import Function, find
from grpo_jax.objectives.ratios import Arrays, ratio_of, token_ratio
from grpo_jax.objectives.variants import Objective


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
    nowhere_BT = jnp.zeros_like(terms.adv_BT, bool)
    return Surrogate(terms.adv_BT * terms.logp_BT, nowhere_BT, nowhere_BT)


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
    }
)
CLIPPED_RATIO = ("ppo_clip", "token_clip")  # the gradient goes through the ratio, so a second bound on it means something


def surrogate_of(obj: Objective, terms: SurrogateInputs) -> Surrogate:
    """Compute the objective's surrogate."""
    return Surrogate(*find("surrogate", obj.surrogate, SURROGATES)(obj, terms))
