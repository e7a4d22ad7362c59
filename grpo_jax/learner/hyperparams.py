"""Config -> what of it is data, and what is the compiled program's own.

A program is made from `static_key(config)`, where every traced field has the same blank value; the numbers themselves
travel in `TrainState.hyperparams`. So runs of one static key use the very same program, and jit's cache is shared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp

from grpo_jax.config import Config
from grpo_jax.objectives import Objective
from grpo_jax.types import Hyperparams

T = TypeVar("T")

# Field of Hyperparams -> field of the config.
TRACED_FIELDS: Mapping[str, str] = {
    "seed": "seed",
    "clip_low": "objective.clip_low",
    "clip_high": "objective.clip_high",
    "kl_coef": "objective.kl_coef",
    "entropy_weight": "objective.entropy_weight",
    "learning_rate": "optimizer.learning_rate",
    "weight_decay": "optimizer.weight_decay",
    "max_grad_norm": "optimizer.max_grad_norm",
}


def hyperparams_of(config: Config) -> Hyperparams:
    """The config's numbers as scalars: the seed int32, the others float32."""
    values = {name: value_of(config, dotted) for name, dotted in TRACED_FIELDS.items()}
    seed = jnp.asarray(values.pop("seed"), jnp.int32)
    return Hyperparams(seed=seed, **{name: jnp.asarray(value, jnp.float32) for name, value in values.items()})


def static_key(config: Config) -> Config:
    """The config with its traced fields blanked: all that a compiled program depends on.

    kl_coef keeps whether it is 0, for without a penalty there is no reference model.
    """
    blank = {dotted: type(value_of(config, dotted))(0) for dotted in TRACED_FIELDS.values()}
    return with_fields(config, blank | {"objective.kl_coef": float(config.objective.has_kl)})


def with_hyperparams(obj: Objective, hyperparams: Hyperparams) -> Objective:
    """The objective with its numbers taken from the state (they may be traced)."""
    return dataclasses.replace(
        obj,
        clip_low=hyperparams.clip_low,
        clip_high=hyperparams.clip_high,
        kl_coef=hyperparams.kl_coef if obj.has_kl else 0.0,
        entropy_weight=hyperparams.entropy_weight,
    )


def value_of(config: Any, dotted: str) -> Any:
    """The field of a config, by its dotted name."""
    return functools.reduce(getattr, dotted.split("."), config)


def with_fields(config: T, values: Mapping[str, Any]) -> T:
    """The config with these fields, by their dotted names, replaced. Ranges are not checked again."""
    for dotted, value in values.items():
        first, _, rest = dotted.partition(".")
        inner = with_fields(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: inner})  # pyright: ignore[reportArgumentType, reportCallIssue]
    return config
