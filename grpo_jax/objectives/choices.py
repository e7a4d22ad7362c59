"""The names that each axis of an objective knows, and the variant of a name with fields replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.objectives.advantages import ADVANTAGES
from grpo_jax.objectives.aggregation import AGGREGATIONS
from grpo_jax.objectives.family import VARIANTS
from grpo_jax.objectives.filters import ROW_FILTERS, TOKEN_FILTERS
from grpo_jax.objectives.functions import Function, find, name_of, signature, source_hash
from grpo_jax.objectives.groups import Groups, Tokens
from grpo_jax.objectives.ratios import KL_ESTIMATORS, RATIOS
from grpo_jax.objectives.surrogates import CLIPPED_RATIO, SURROGATES, SurrogateInputs
from grpo_jax.objectives.variants import Objective

TABLES: Mapping[str, Mapping[str, Function]] = MappingProxyType(
    {
        "advantage": ADVANTAGES,
        "ratio": RATIOS,
        "surrogate": SURROGATES,
        "kl_estimator": KL_ESTIMATORS,
        "aggregation": AGGREGATIONS,
        "row_filter": ROW_FILTERS,
        "token_filter": TOKEN_FILTERS,
    }
)
FILTERS = ("row_filter", "token_filter")  # "all" is none of them
CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType({field: tuple(table) for field, table in TABLES.items()})


def get(variant: str, **overrides: Any) -> Objective:
    """Return the named variant, with any fields replaced. Raises ValueError listing what is known.

    A function of your own may take the place of a name, itself or as "module:function": get("grpo", advantage=mine).
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    fields = [field.name for field in dataclasses.fields(Objective)]
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise ValueError(f"unknown objective field {unknown[0]!r}; known: {', '.join(fields)}")
    obj = dataclasses.replace(VARIANTS[variant], **overrides)
    check_choices(obj)
    return obj


def check_choices(obj: Objective) -> None:
    """Raise ValueError if a choice is no name of its axis and no fitting function, or if two choices exclude each other."""
    for field, table in TABLES.items():
        choice = getattr(obj, field)
        if choice == "all" and field in FILTERS:
            continue
        others = ("all",) * (field in FILTERS)
        function = find(field, choice, table, others)
        if choice not in CHOICES[field]:
            _try(obj, field, function)
    # A surrogate whose weight carries no gradient has nothing that the second bound could stop: taking it would look active.
    if obj.dual_clip is not None and obj.surrogate in SURROGATES and obj.surrogate not in CLIPPED_RATIO:
        raise ValueError(
            f"objective.dual_clip = {obj.dual_clip!r}: surrogate {obj.surrogate!r} has no gradient through a ratio "
            "to bound, set it to None"
        )


def sources(obj: Objective) -> dict[str, str]:
    """Return what identifies the code of the objective's own functions: {"my_module:mad": sha256 of its file}.

    The package's own functions are not in it: they are identified by its version.
    """
    own = [(field, getattr(obj, field)) for field in TABLES if getattr(obj, field) not in (*CHOICES[field], "all")]
    return {name_of(choice): source_hash(field, choice) for field, choice in own}


def _try(obj: Objective, field: str, function: Function) -> None:
    """Trace a function of one's own on arrays of no values, so that what is wrong with it is said before anything runs."""
    P, G, T = 3, 2, 5
    of_rows = jax.ShapeDtypeStruct((P * G, T), jnp.float32)
    of_groups = jax.ShapeDtypeStruct((P, G, T), jnp.float32)
    one = jax.ShapeDtypeStruct((P, G), jnp.float32)

    def groups(reward_PG: jax.Array, x_PGT: jax.Array) -> Groups:
        return Groups(reward_PG, reward_PG > 0, x_PGT, x_PGT, reward_PG > 0, None, step_reward_PGT=x_PGT)

    def advantage(reward_PG: jax.Array, x_PGT: jax.Array) -> jax.Array:
        return jnp.broadcast_to(function(obj, groups(reward_PG, x_PGT)), (P, G, T))

    def row_filter(reward_PG: jax.Array, x_PGT: jax.Array) -> jax.Array:
        return jnp.broadcast_to(function(obj, groups(reward_PG, x_PGT)), (P, G))

    def surrogate(x_BT: jax.Array) -> list[jax.Array]:
        value_BT, low_BT, high_BT = function(obj, SurrogateInputs(x_BT, x_BT, x_BT, x_BT, x_BT))
        return [jnp.broadcast_to(each, (P * G, T)) for each in (value_BT, low_BT, high_BT)]

    def aggregation(x_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        weight_BT, denom = function(obj, x_BT, T)
        return jnp.broadcast_to(weight_BT, (P * G, T)), jnp.broadcast_to(denom, ())

    trials: Mapping[str, Callable[[], Any]] = {
        "advantage": lambda: jax.eval_shape(advantage, one, of_groups),
        "ratio": lambda: jax.eval_shape(lambda x: jnp.broadcast_to(function(obj, x, x), x.shape), of_rows),
        "surrogate": lambda: jax.eval_shape(surrogate, of_rows),
        "kl_estimator": lambda: jax.eval_shape(lambda x: jnp.broadcast_to(function(obj, x, x, x), x.shape), of_rows),
        "aggregation": lambda: jax.eval_shape(aggregation, of_rows),
        "row_filter": lambda: jax.eval_shape(row_filter, one, of_groups),
        "token_filter": lambda: jax.eval_shape(
            lambda x: jnp.broadcast_to(function(obj, Tokens(x, x, x, x, None)), x.shape), of_rows
        ),
    }
    try:
        trials[field]()
    except Exception as error:
        said = " ".join(str(error).split("\n\n")[0].split())
        raise ValueError(
            f"objective.{field} = {name_of(getattr(obj, field))!r}: called as {signature(field)} it raised "
            f"{type(error).__name__}: {said[:300]}"
        ) from error
