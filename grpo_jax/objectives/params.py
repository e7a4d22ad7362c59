"""Numbers by name for functions of one's own: `obj.params["width"]`."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import jax

Number = float | jax.Array  # an array where it is a number of the state, inside a compiled step


class UnknownParamError(KeyError):
    """A number that was not given."""

    def __str__(self) -> str:
        return str(self.args[0])


class Params(Mapping[str, Number]):
    """A frozen mapping, name -> number, hashable like the objective that holds it.

    Inside a compiled step the numbers are data of the state, so that runs which differ in them alone share a program: they may
    be traced, and a function decides by them with `jnp.where`, not with `if`.
    """

    def __init__(self, numbers: Mapping[str, Any] | None = None) -> None:
        """Copy the numbers, sorted by name. Raises ValueError if a name is no identifier or a value no finite number."""
        self._numbers = {name: _number(name, value) for name, value in sorted((numbers or {}).items())}

    def __getitem__(self, name: str) -> Number:
        """Return one number. Raises UnknownParamError, a KeyError, listing those that are there."""
        try:
            return self._numbers[name]
        except KeyError:
            known = ", ".join(self._numbers) or "none"
            raise UnknownParamError(f"objective.params.{name} is not set; set are: {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __hash__(self) -> int:
        return hash(tuple(self._numbers.items()))

    def __repr__(self) -> str:
        return repr(self._numbers)


def read_params(value: Any) -> Params:
    """Make Params of a mapping or of its JSON text (empty: none). Raises ValueError."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except ValueError as error:
            raise ValueError(f"objective.params = {value!r}: not JSON ({error})") from None
    if not isinstance(value, Mapping):
        raise ValueError(f'objective.params = {value!r}: must be numbers by name, {{"width": 0.3}}')
    return Params(value)


def _number(name: Any, value: Any) -> Number:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"objective.params: {name!r} cannot be a name, use letters, digits and _")
    if isinstance(value, jax.Array):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"objective.params.{name} = {value!r}: must be a finite number")
    return float(value)
