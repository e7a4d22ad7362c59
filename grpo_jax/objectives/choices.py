"""The names that each axis of an objective knows, and the variant of a name with fields replaced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from grpo_jax.objectives.advantages import ADVANTAGES
from grpo_jax.objectives.aggregation import AGGREGATIONS
from grpo_jax.objectives.ratios import KL_ESTIMATORS, RATIOS
from grpo_jax.objectives.surrogates import CLIPPED_RATIO, SURROGATES
from grpo_jax.objectives.variants import VARIANTS, Objective

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "advantage": tuple(ADVANTAGES),
        "ratio": tuple(RATIOS),
        "surrogate": tuple(SURROGATES),
        "kl_estimator": tuple(KL_ESTIMATORS),
        "aggregation": tuple(AGGREGATIONS),
    }
)


def get(variant: str, **overrides: Any) -> Objective:
    """Return the named variant, with any fields replaced. Raises ValueError listing what is known."""
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
    """Raise ValueError if a name is not in its axis's table, listing what is, or if two choices exclude each other."""
    for field, known in CHOICES.items():
        if getattr(obj, field) not in known:
            raise ValueError(f"objective.{field} = {getattr(obj, field)!r}: unknown; known: {', '.join(known)}")
    # A surrogate whose weight carries no gradient has nothing that the second bound could stop: taking it would look active.
    if obj.dual_clip is not None and obj.surrogate not in CLIPPED_RATIO:
        raise ValueError(
            f"objective.dual_clip = {obj.dual_clip!r}: surrogate {obj.surrogate!r} has no gradient through a ratio "
            "to bound, set it to None"
        )
