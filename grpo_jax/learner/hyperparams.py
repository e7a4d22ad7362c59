"""The numbers of a config that are data of the state, and the rest of it, which is part of the compiled program.

A program is made from `static_key(config)`, where every traced field has the same blank value; the numbers themselves
travel in `TrainState.hyperparams`. So runs of one static key use the very same program, and jit's cache is shared.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, TypeVar, overload

import jax.numpy as jnp

from grpo_jax.config import Config
from grpo_jax.objectives import Objective, Params
from grpo_jax.objectives.adaptive import with_adapted
from grpo_jax.objectives.one_of import OneOf, needs_of
from grpo_jax.types import Adapted, Hyperparams

T = TypeVar("T")

# Field of Hyperparams -> field of the config: those that decide no shape and no branch of a program, so that one program serves
# a sweep over them. A field that decides one must be known when the program is traced.
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
    """Return the config's numbers as scalars: the seed int32, the others float32."""
    # As arrays with a dtype: jit would take Python numbers too, but as weakly typed ones, and compile for these once more.
    values = {name: value_of(config, dotted) for name, dotted in TRACED_FIELDS.items()}
    seed = jnp.asarray(values.pop("seed"), jnp.int32)
    params = {name: jnp.asarray(value, jnp.float32) for name, value in config.objective.params.items()}
    return Hyperparams(seed=seed, params=params, **{name: jnp.asarray(value, jnp.float32) for name, value in values.items()})


def static_key(config: Config) -> Config:
    """Return the config with its traced fields blanked: all that a compiled program depends on."""
    # kl_coef keeps whether it is 0: without a penalty there is no reference in the state and no forward pass of it, which is
    # another program. So it becomes 1 or 0, and not 0 like the others.
    blank = {dotted: type(value_of(config, dotted))(0) for dotted in TRACED_FIELDS.values()}
    blank |= {"objective.kl_coef": float(config.objective.has_kl)}
    # Of the numbers for functions of one's own the names are part of the program.
    return with_fields(config, blank | {"objective.params": dict.fromkeys(config.objective.params, 0.0)})


def joint_key(config: Config) -> Config:
    """Return the static key with no more of the objective than it needs of the model: what runs in one vmapped call share."""
    key = static_key(config)
    return dataclasses.replace(key, objective=needs_of(key.objective))


@overload
def with_hyperparams(obj: Objective, hyperparams: Hyperparams, adapted: Adapted | None = None) -> Objective: ...
@overload
def with_hyperparams(obj: Objective | OneOf, hyperparams: Hyperparams, adapted: Adapted | None = None) -> Objective | OneOf: ...
def with_hyperparams(obj: Objective | OneOf, hyperparams: Hyperparams, adapted: Adapted | None = None) -> Objective | OneOf:
    """Return the objective with its numbers taken from the state (they may be traced).

    Args:
      obj: of the static key, or one of several by `hyperparams.objective`.
      hyperparams: the config's. adapted: those that training moves; None: there are none.
    """
    if isinstance(obj, OneOf):
        assert hyperparams.objective is not None, "a program of several objectives needs to know which one is the run's"
        members = tuple(with_hyperparams(member, hyperparams, adapted) for member in obj.members)
        return OneOf(members, hyperparams.objective)
    obj = with_adapted(obj, adapted)
    # kl_coef stays a Python 0 without a KL, because `Objective.has_kl` is a branch, which a traced number cannot decide.
    return dataclasses.replace(
        obj,
        clip_low=hyperparams.clip_low,
        clip_high=hyperparams.clip_high,
        kl_coef=hyperparams.kl_coef if obj.has_kl else 0.0,
        entropy_weight=hyperparams.entropy_weight,
        params=Params(hyperparams.params),
    )


def value_of(config: Any, dotted: str) -> Any:
    """Return the field of a config, by its dotted name."""
    return functools.reduce(getattr, dotted.split("."), config)


def with_fields(config: T, values: Mapping[str, Any]) -> T:
    """Return the config with these fields, by their dotted names, replaced. Ranges are not checked again."""
    for dotted, value in values.items():
        first, _, rest = dotted.partition(".")
        inner = with_fields(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: inner})  # pyright: ignore[reportArgumentType, reportCallIssue]
    return config
