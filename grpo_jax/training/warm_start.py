"""A few supervised steps on a careless teacher, so that a fresh decoder sometimes succeeds and has something to learn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int, Key

from grpo_jax.config import WarmStartConfig
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rng import key_for
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.types import Arrays, Params, Rollout


@functools.lru_cache(maxsize=4)
def make_warm_start(
    model: ModelDef, task: Any, config: WarmStartConfig, chunk_tokens: int
) -> Callable[[Params, int | Int[Arrays, ""]], Params]:
    """Bind a warm start: minimise the mean negative log-probability of the answers for `num_steps` Adam steps.

    The learning rate rises for a tenth of the steps, then falls to zero.

    Args:
      model: decoder without adapters. task: must offer `supervised(key, num_examples, label_noise)`.
      config: of the steps. chunk_tokens: as in `policy_logprobs`.
    Returns: warm_start(params, seed) -> params. The seed is data, so runs of all seeds share one compiled call.
    """
    rise = max(config.num_steps // 10, 1)
    rate = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, rise, max(config.num_steps, rise + 1))
    optimizer = optax.adam(rate, b2=0.98)

    def nll(params: Params, key: Key[jax.Array, ""]) -> Float[jax.Array, ""]:
        prompts, tokens_P1A, mask_P1A = task.supervised(key, config.batch_size, config.label_noise)
        # As a Rollout, so that the warm start uses the update's log-probabilities, which read prompts, tokens and mask alone.
        blank = jnp.zeros_like(mask_P1A)
        examples = Rollout(prompts, tokens_P1A, mask_P1A, blank, blank, None, blank[..., 0] > 0)
        logp_P1A, _ = policy_logprobs(model, params, examples, Sampling(), chunk_tokens)
        return -(logp_P1A * mask_P1A).sum() / mask_P1A.sum()

    @jax.jit
    def warm_start(params: Params, seed: int | Int[Arrays, ""]) -> Params:
        def step(carry, number):
            params, opt_state = carry
            grads = jax.grad(nll)(params, key_for(seed, "warm_start", number))
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(config.num_steps))[0][0]

    return warm_start
