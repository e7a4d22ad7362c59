"""AdamW with linear warm-up and clipping by global norm."""

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


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """clip by global norm -> AdamW (Loshchilov and Hutter, arXiv 1711.05101), rate rising linearly over warmup_steps."""
    rate = optax.linear_schedule(
        config.learning_rate / max(config.warmup_steps, 1), config.learning_rate, max(config.warmup_steps - 1, 0)
    )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=is_decayed),
    )
