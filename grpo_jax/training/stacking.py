"""States of several runs as one, for a vmapped program: stacked on a leading axis, frozen weights that all share once."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Int

from grpo_jax.config import Config
from grpo_jax.learner.hyperparams import static_key
from grpo_jax.objectives.one_of import OneOf
from grpo_jax.types import TrainState

# Of the fields of a stacked state, the axis of its members. A base under adapters has none: all members read the same one.
MEMBER_AXES = TrainState(*(0 for _ in dataclasses.fields(TrainState)))  # pyright: ignore[reportArgumentType]
SHARED_BASE_AXES = dataclasses.replace(MEMBER_AXES, base=None)


def axes_of(shares_base: bool) -> TrainState:
    """Return the axes of a stacked state's fields, as `vmap` takes them. shares_base: as `stack_states` takes it."""
    return SHARED_BASE_AXES if shares_base else MEMBER_AXES


def several_of(configs: Sequence[Config]) -> OneOf | None:
    """Return the objectives of runs of one joint key; None if they have only one."""
    members = tuple(dict.fromkeys(static_key(config).objective for config in configs))
    return OneOf(members) if len(members) > 1 else None


def places_of(configs: Sequence[Config], several: OneOf | None) -> list[Int[jax.Array, ""] | None]:
    """Return the place of each run's objective among several, int32; None for each if there is only one."""
    if several is None:
        return [None] * len(configs)
    return [jnp.int32(several.members.index(static_key(config).objective)) for config in configs]


def with_place(state: TrainState, place: Any) -> TrainState:
    """Return a state, or a tree like it, that says which of several objectives is the run's. place: None: there is only one."""
    assert state.hyperparams is not None
    return dataclasses.replace(state, hyperparams=dataclasses.replace(state.hyperparams, objective=place))


def share_base(configs: Sequence[Config]) -> bool:
    """Tell if runs of one joint key train adapters on the very same frozen weights.

    Weights of a folder are the same whatever the seed; fresh ones, and their warm start, are made from the seed.
    """
    first = configs[0]
    return bool(first.lora.rank) and bool(first.model.path or len({config.seed for config in configs}) == 1)


def stack_states(states: Sequence[TrainState], *, shares_base: bool, places: Sequence[Any] = ()) -> TrainState:
    """Stack the states of all members on a leading axis.

    Args:
      states: of one structure. shares_base: their bases are the same weights, of which the first's are taken.
      places: of their objectives, as `places_of` gives them; none: all have one.
    Returns: the stacked state; that of a single member as it is, since its programs were not vmapped.
    """
    if len(states) == 1:
        return states[0]
    if places:
        states = [with_place(*each) for each in zip(states, places, strict=True)]
    base = states[0].base
    if shares_base:
        states = [dataclasses.replace(state, base=None) for state in states]
    state = stack(states)
    return dataclasses.replace(state, base=base) if shares_base else state


def unstack(tree: Any, num: int, *, shares_base: bool = False) -> list[Any]:
    """Split a stacked tree into those of its members.

    Args:
      tree: a state, a batch or metrics. num: members; 1: it is not stacked. shares_base: it is a state with one base for all.
    Returns: a tree for each member.
    """
    if num == 1:
        return [tree]
    if not shares_base:
        return split_leading_axis(tree, num)
    members = split_leading_axis(dataclasses.replace(tree, base=None), num)
    return [dataclasses.replace(member, base=tree.base) for member in members]


@jax.jit
def stack(trees: Sequence[Any]) -> Any:
    """Stack trees of one structure on a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=1)
def split_leading_axis(tree: Any, num: int) -> list[Any]:
    """Split a tree of arrays [num, ...] into num trees."""
    # Under jit all slices are one call; a state has many leaves, and each would be dispatched num times.
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(num)]
