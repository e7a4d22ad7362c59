"""AdamW with a warm-up, a schedule and clipping by global norm."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float, PyTree

from grpo_jax.config import Config, OptimizerConfig
from grpo_jax.types import Arrays, Hyperparams, Params


def is_decayed(params: Params) -> PyTree[bool]:
    """Tell which weights decay: matrices do, norms, biases, routers and rates of forgetting do not."""
    # By name, since layers are stacked: a norm's scale has two axes there, as a matrix has elsewhere. A router's decay would
    # make its choices more even by the step, and move one that is frozen. A gated delta net's rates are logarithms: to decay
    # them would make heads forget at one rate.

    def by_name(path: jax.tree_util.KeyPath, _: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return not any(word in name for word in ("norm", "bias", "router", "log_rate"))

    return jax.tree_util.tree_map_with_path(by_name, params)


def learning_rate(peak: float | Float[Arrays, ""], config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Schedule a linear warm-up to the peak over warmup_steps, then constant, or down to zero at the last update.

    Args:
      peak: the highest rate, a number or a traced scalar. config: its schedule and warmup_steps are read.
      num_updates: optimizer steps of the whole run.
    Returns: optimizer step -> rate.
    """
    # At least one step, also where the run ends within the warm-up: a cosine over none is an error.
    warmup, num_after = config.warmup_steps, max(num_updates - config.warmup_steps, 1)
    schedules = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, num_after),
        "cosine": optax.cosine_decay_schedule(peak, num_after),
    }
    # From peak / warmup and not from 0: at rate 0 the first update would be computed for nothing.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup, 1))
    return optax.join_schedules([rise, schedules[config.schedule]], [warmup])


def learning_rates(config: Config) -> Float[np.ndarray, " steps"]:
    """Compute the rate of each step's last update, by step; that of step 0 is 0.

    All at once, for a schedule asked step by step would wait for the device each time.
    """
    settings, updates_per_step = config.optimizer, config.learner.num_epochs * config.learner.num_minibatches
    last = np.arange(1, config.num_steps + 1) * updates_per_step - 1
    schedule = learning_rate(settings.learning_rate, settings, config.num_updates)
    return np.concatenate([[0.0], np.asarray(schedule(last))])


def make_optimizer(config: OptimizerConfig, num_updates: int, hyperparams: Hyperparams) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov and Hutter, arXiv 1711.05101).

    Args:
      config: schedule, warm-up, b1, b2 and eps. num_updates: optimizer steps of the run.
      hyperparams: learning rate, weight decay and the norm that gradients are clipped to; they may be traced.
    Returns: the transformation; its state holds moments and counts only.
    """
    # It is made inside the traced update, because its numbers are those of the state: made outside, they would be constants of
    # the program, and runs with other learning rates would not share it. optax's transformations are pure functions, so this
    # costs nothing, and as no number is in the optimizer's state, none is frozen into a checkpoint.
    return optax.chain(
        optax.clip_by_global_norm(hyperparams.max_grad_norm),
        optax.adamw(
            learning_rate(hyperparams.learning_rate, config, num_updates),
            config.b1,
            config.b2,
            config.eps,
            weight_decay=hyperparams.weight_decay,
            mask=is_decayed,
        ),
    )
