"""Runs that differ in numbers only (seed, coefficients, learning rate) share their compiled programs: the numbers are data."""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.config import Config
from grpo_jax.parallel.sharding import REPLICATED, shardings_of
from grpo_jax.training import build
from grpo_jax.training.evaluate import make_evaluate
from grpo_jax.training.run import Run, TrainFns, base_of, make_run, make_train_fns

# What may be data of a compiled program. No shape and no branch depends on it, but for kl_coef = 0, which has no reference.
TRACED_FIELDS = (
    "seed",
    "objective.clip_low",
    "objective.clip_high",
    "objective.kl_coef",
    "objective.entropy_weight",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.max_grad_norm",
)


def static_key(config: Config) -> Config:
    """The config with its numbers blanked out: runs of equal shape may share a program."""
    blank = {name: type(value_of(config, name))(0) for name in TRACED_FIELDS}
    return with_fields(config, blank | {"objective.kl_coef": float(config.objective.has_kl)})


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled calls of runs of one shape. Each takes the numbers in which they differ first.

    names: fields that are data; the others are the same in all runs. template: a run of it, bound to the first config.
    """

    names: tuple[str, ...]
    template: Run
    collect: Callable[..., Any]
    update: Callable[..., Any]
    iterate: Callable[..., Any]
    advantage_diagnostics: Callable[..., Any]


def make_program(configs: Sequence[Config], *, is_vmapped: bool = False) -> Program:
    """What `configs`, all of one shape, share. The task must be traceable.

    is_vmapped: each call but `credit` advances many runs: numbers, state, batch and metrics have a leading axis of runs.
    """
    first = configs[0]
    names = tuple(name for name in TRACED_FIELDS if len({value_of(config, name) for config in configs}) > 1)
    like = make_run(first)
    places = shardings_of(like.abstract_state)
    if is_vmapped:
        places = jax.tree.map(lambda place: place.update(spec=PartitionSpec(None, *place.spec)), places)

    def with_numbers(part: Callable[[TrainFns], Callable[..., Any]]) -> Callable[..., Any]:
        def call(numbers: Mapping[str, Any], *args: Any) -> Any:
            config = with_fields(first, numbers)
            task: Any = copy.copy(like.task)
            task.seed = config.seed
            return part(make_train_fns(config, like.mesh, task, like.model))(*args)

        return call

    over_runs = jax.vmap if is_vmapped else lambda call: call
    collect, update, iterate = (over_runs(with_numbers(operator.attrgetter(part))) for part in ("collect", "update", "iterate"))
    return Program(
        names,
        like,
        collect=jax.jit(collect, donate_argnums=1, out_shardings=(places, None, None)),
        update=jax.jit(update, donate_argnums=1, out_shardings=(places, None)),
        iterate=jax.jit(iterate, donate_argnums=1, out_shardings=(places, None, None)),
        advantage_diagnostics=jax.jit(with_numbers(operator.attrgetter("advantage_diagnostics"))),
    )


def traced_values(program: Program, config: Config) -> dict[str, jax.Array]:
    """The data that make the program's calls those of `config`."""
    numbers = {name: jnp.asarray(value_of(config, name)) for name in program.names}
    return jax.device_put(numbers, NamedSharding(program.template.mesh, REPLICATED))


def run_of(program: Program, config: Config) -> Run:
    """The run of `config`, as `make_run` would give it, with the program's calls."""
    like, numbers = program.template, traced_values(program, config)
    return dataclasses.replace(
        like,
        config=config,
        collect=functools.partial(program.collect, numbers),
        update=functools.partial(program.update, numbers),
        iterate=functools.partial(program.iterate, numbers),
        advantage_diagnostics=functools.partial(program.advantage_diagnostics, numbers),
        evaluate=make_evaluate(config, like.task, like.model, build.rollout_spec(config, like.task), like.mesh),
        weights=lambda: build.initial_params(config, like.model, like.task, shardings_of(base_of(like.abstract_state))),
    )


def value_of(config: Any, dotted: str) -> Any:
    """The field of a config, by its dotted name."""
    return functools.reduce(getattr, dotted.split("."), config)


def with_fields(config: Any, values: Mapping[str, Any]) -> Any:
    """The config with these fields, by their dotted names, replaced. Nothing is validated: the values may be traced."""
    for dotted, value in values.items():
        first, _, rest = dotted.partition(".")
        config, outer = copy.copy(config), config
        object.__setattr__(config, first, with_fields(getattr(outer, first), {rest: value}) if rest else value)
    return config
