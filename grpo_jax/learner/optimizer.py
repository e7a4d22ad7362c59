"""AdamW with a warm-up, a schedule and clipping by global norm."""

from __future__ import annotations

from typing import Any

import jax
import optax

from grpo_jax.config import OptimizerConfig


def is_decayed(params: Any) -> Any:
    """Weight decay is for matrices: norms and biases are left out (by name, since stacked layers add an axis)."""

    def by_name(path: Any, _: Any) -> bool:
        name = jax.tree_util.keystr(path)
        return "norm" not in name and "bias" not in name

    return jax.tree_util.tree_map_with_path(by_name, params)


def learning_rate(config: OptimizerConfig, num_updates: int) -> optax.Schedule:
    """Linear warm-up over warmup_steps, then constant, or down to zero at the last of num_updates (linear, cosine)."""
    rate, warmup = config.learning_rate, config.warmup_steps
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, 0.0, max(num_updates - warmup, 1)),
        "cosine": optax.cosine_decay_schedule(rate, max(num_updates - warmup, 1)),
    }[config.schedule]
    return optax.join_schedules([optax.linear_schedule(rate / max(warmup, 1), rate, max(warmup, 1)), after], [warmup])


def make_optimizer(config: OptimizerConfig, num_updates: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov and Hutter, arXiv 1711.05101). num_updates: optimizer steps of the run."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            learning_rate(config, num_updates),
            config.b1,
            config.b2,
            config.eps,
            weight_decay=config.weight_decay,
            mask=is_decayed,
        ),
    )
