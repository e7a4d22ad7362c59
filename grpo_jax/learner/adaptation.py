"""State that moves once an update beside the weights: numbers of the objective, and a reference that is refreshed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from grpo_jax.config import LearnerConfig
from grpo_jax.masking import masked_mean
from grpo_jax.metrics import Mean, Metric
from grpo_jax.objectives import Objective, adaptive
from grpo_jax.objectives.one_of import OneOf
from grpo_jax.types import Adapted, Arrays, Params


def adapt(
    obj: Objective | OneOf,
    adapted: Adapted | None,
    mask_PGT: Float[Arrays, "P G T"],
    entropy_PGT: Float[Arrays, "P G T"],
    adv_PGT: Float[Arrays, "P G T"],
    max_completion_tokens: int,
) -> tuple[Adapted | None, Adapted | None, dict[str, Metric]]:
    """Move the objective's own numbers by one batch.

    Args:
      obj: with the numbers of `adapted`. adapted: of the state; None: there are none, and nothing happens.
      mask_PGT: trained tokens. entropy_PGT: nats, of the policy that sampled. adv_PGT: the update's advantages, with
        `adapted`'s lambda in them. max_completion_tokens: the budget.
    Returns: (numbers of this update, numbers of the next one, metrics: policy/entropy_coef, advantage/length_exponent).
    """
    if adapted is None:
        return None, None, {}
    assert isinstance(obj, Objective), "an objective whose numbers training moves shares no program with another"
    now, later, one = adapted, adapted, jnp.float32(1)
    metrics: dict[str, Metric] = {}
    if adapted.entropy_coef is not None:
        coef, next_coef = adaptive.adapt_entropy_coef(obj, masked_mean(entropy_PGT, mask_PGT))
        now, later = dataclasses.replace(now, entropy_coef=coef), dataclasses.replace(later, entropy_coef=next_coef)
        metrics["policy/entropy_coef"] = Mean(coef, one)
    if adapted.length_exponent is not None:
        _, G, T = mask_PGT.shape
        slope = adaptive.length_exponent_slope(
            obj, adv_PGT.reshape(-1, T), mask_PGT.reshape(-1, T), group_size=G, max_completion_length=max_completion_tokens
        )
        exponent = adapted.length_exponent - obj.length_exponent_rate * slope
        later = dataclasses.replace(later, length_exponent=exponent)
        metrics["advantage/length_exponent"] = Mean(adapted.length_exponent, one)
    return now, later, metrics


def refresh_reference(
    moving_ref: Params | None, params: Params, num_updates: int | Int[Arrays, ""], config: LearnerConfig
) -> Params | None:
    """Move the reference towards the policy if it is time to: (1 - ref_mix) reference + ref_mix policy.

    Iterative GRPO (DeepSeekMath, arXiv 2402.03300, algorithm 1) takes the policy itself, TR-DPO (arXiv 2404.09656) a mixture.

    Args:
      moving_ref: None: it stays where it is, and so it does here. params: after the update.
      num_updates: int32, updates done. config: ref_every and ref_mix are read.
    Returns: the reference of the next update.
    """
    if moving_ref is None:
        return None

    def mix(reference: Params) -> Params:
        if config.ref_mix == 1:
            return params
        return jax.tree.map(lambda ref, new: ref + config.ref_mix * (new - ref), reference, params)

    # A branch and no select: in all other steps no weight is read.
    return jax.lax.cond(num_updates % config.ref_every == 0, mix, lambda reference: reference, moving_ref)
