"""Numbers of an objective that training itself moves: from the value before an update to the one that it has, and the next.

They are data of the state (`types.Adapted`), so that a run that goes on has them, and one program serves all values.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Float, Shaped

from grpo_jax.objectives.advantages import length_weights
from grpo_jax.objectives.aggregation import token_weights
from grpo_jax.objectives.ratios import Arrays
from grpo_jax.objectives.variants import Objective
from grpo_jax.types import Adapted


def initial_adapted(obj: Objective) -> Adapted | None:
    """Return the numbers that training moves, as the objective has them; None if all are fixed."""
    entropy_coef = length_exponent = None
    if obj.entropy_target is not None:
        entropy_coef = jnp.float32(obj.entropy_coef)
    if obj.length_exponent_rate:
        length_exponent = jnp.float32(obj.length_exponent)
    if entropy_coef is None and length_exponent is None:
        return None
    return Adapted(entropy_coef, length_exponent)


def with_adapted(obj: Objective, adapted: Adapted | None) -> Objective:
    """Return the objective with these numbers in place of those it begins with (they may be traced)."""
    fields = {} if adapted is None else {field.name: getattr(adapted, field.name) for field in dataclasses.fields(adapted)}
    return dataclasses.replace(obj, **{name: value for name, value in fields.items() if value is not None})


def adapt_entropy_coef(obj: Objective, entropy: Float[Arrays, ""]) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """Steer the weight c of the entropy bonus towards a target entropy (Skywork-OR1, arXiv 2505.22312).

    While the entropy is at most the target, the bonus is on and c rises by a step; above it the bonus is off and c falls.

    Args:
      obj: `entropy_coef`, the weight so far, and the fields beside it are read. entropy: nats, mean over the batch's tokens of
        the policy that sampled.
    Returns: (weight in this update, c of the next one).
    """
    assert obj.entropy_target is not None, "validated with the objective"
    is_low = entropy <= obj.entropy_target
    step = jnp.where(is_low, obj.entropy_coef_step, -obj.entropy_coef_step)
    return jnp.where(is_low, obj.entropy_coef, 0.0), jnp.clip(obj.entropy_coef + step, 0.0, obj.entropy_coef_max)


def length_exponent_slope(
    obj: Objective,
    adv_BT: Float[Arrays, "B T"],
    mask_BT: Shaped[Arrays, "B T"],
    *,
    group_size: int,
    max_completion_length: int,
) -> Float[jax.Array, ""]:
    """Compute the derivative of the policy loss by lambda of "length_preference", at ratio 1 (lambda-GRPO, arXiv 2510.06870).

    -sum_i,t weight A d log f_i / d lambda: with one optimizer step a batch it is the loss's own. Differs from source: with
    several, lambda still moves once, by the loss that the first of them sees.

    Args:
      obj: its lambda is the one that adv_BT was made with. adv_BT, mask_BT: of the whole batch.
      group_size: G. max_completion_length: generation budget, tokens.
    Returns: float32 scalar.
    """
    lengths_PG = jnp.asarray(mask_BT, jnp.float32).sum(-1).reshape(-1, group_size)
    _, slope_PG = length_weights(obj, lengths_PG, lengths_PG > 0)
    weight_BT, denom = token_weights(obj, mask_BT, max_completion_length=max_completion_length)
    return -(weight_BT * adv_BT * slope_PG.reshape(-1, 1)).sum() / denom
