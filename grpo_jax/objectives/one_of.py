"""Several objectives in one program: every run of a vmapped call has its own, and the forward pass of the model is common.

Which one is a run's is data of its state. All of them are computed, on arrays [B, T], and one is kept: little beside a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int

from grpo_jax.objectives.adaptive import initial_adapted
from grpo_jax.objectives.variants import Objective


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Objectives that need the same of the model, and the place of the one that holds.

    It has what they have in common and nothing else: code that would read a choice of one of them goes through `choose`.

    members: alike by `needs_of`. place: int32, possibly traced.
    """

    members: tuple[Objective, ...]
    place: Int[jax.Array, ""] | int = 0

    def __post_init__(self) -> None:
        if len({needs_of(obj) for obj in self.members}) != 1:
            raise ValueError("these objectives do not need the same of the model")

    @property
    def needs_reference(self) -> bool:
        """As `Objective.needs_reference`."""
        return self.members[0].needs_reference

    @property
    def has_entropy_bonus(self) -> bool:
        """As `Objective.has_entropy_bonus`."""
        return self.members[0].has_entropy_bonus

    @property
    def success_threshold(self) -> float:
        """As `Objective.success_threshold`."""
        return self.members[0].success_threshold


def needs_of(obj: Objective) -> Objective:
    """Return an objective with all that decides a pass of the model, or an array of the state or the batch, and else GRPO's.

    Objectives of equal needs can share a program. One whose numbers training moves has needs that no other has.
    """
    if initial_adapted(obj) is not None:
        return obj
    return Objective(
        advantage="step_returns" if obj.needs_step_rewards else "group_norm",
        kl_coef=float(obj.needs_reference),
        entropy_coef=float(obj.has_entropy_bonus),
        success_threshold=obj.success_threshold,
        params=dict.fromkeys(obj.params, 0.0),
    )


def choose(obj: Objective | OneOf, function: Callable[..., Any], *live: jax.Array | None) -> Any:
    """Call a function of an objective; of several, keep the result of the one that holds.

    Args:
      obj: one objective, or several. function: (objective, *live) -> tuple of arrays, None, or dicts of arrays.
      live: arrays with gradient; no gradient comes from an objective that does not hold, not even NaN.
    Returns: function's result. What an objective does not give, None or a name of a dict, is zeros where another gives it.
    """
    if isinstance(obj, Objective):
        return function(obj, *live)
    found = []
    for place, member in enumerate(obj.members):
        holds = jnp.equal(obj.place, place)
        own = (None if x is None else jnp.where(holds, x, jax.lax.stop_gradient(x)) for x in live)
        found.append(function(member, *own))
    return tuple(_pick(obj.place, values) for values in zip(*found, strict=True))


def _pick(place: Int[jax.Array, ""] | int, values: Sequence[Any]) -> Any:
    """Keep the value at a place, of arrays of one shape, dicts of them, or None."""
    given = next((value for value in values if value is not None), None)
    if given is None:
        return None
    if isinstance(given, Mapping):
        names = dict.fromkeys(name for value in values for name in value)
        return {name: _pick(place, [value.get(name) for value in values]) for name in names}
    return jax.lax.select_n(jnp.int32(place), *(jnp.zeros_like(given) if value is None else value for value in values))
