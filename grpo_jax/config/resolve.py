"""Settings that say "auto": decided here once, so that config.json holds what the run really does."""

from __future__ import annotations

import dataclasses

from grpo_jax.config.schema import Config
from grpo_jax.errors import UserError

# Log-probs of one token by the sampler and by the learner differ by some hundredths of a nat in bfloat16. A clip range of that
# width would cut off rounding errors instead of steps that are too long.
NARROW_CLIP = 0.05


def resolve(config: Config) -> Config:
    """Return the config with learner.old_logp decided.

    Raises: UserError if it says "sampler" although the sampler's numerics would be clipped.
    """
    learner = config.learner
    clip = min(config.objective.clip_low, config.objective.clip_high)
    # With exact numerics the two do not differ at all.
    is_coarse = config.model.dtype == "bfloat16" and config.model.numerics != "exact" and clip < NARROW_CLIP
    old_logp = learner.old_logp
    if old_logp == "auto":
        # With async_steps the learner has moved on from the policy that sampled: without a weight the ratio has to know of it.
        is_learner = learner.importance_cap or (is_coarse and not config.async_steps)
        old_logp = "learner" if is_learner else "sampler"
    if is_coarse and old_logp == "sampler":
        raise UserError(
            f"config.learner.old_logp = {learner.old_logp!r}: in bfloat16 sampler and learner differ by more than the clip "
            f"range {clip:g}, which would clip tokens before the policy moves; set it to 'learner', or config.async_steps to 0"
        )
    return dataclasses.replace(config, learner=dataclasses.replace(learner, old_logp=old_logp))
