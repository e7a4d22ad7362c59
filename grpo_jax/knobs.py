"""A field of a config with everything that is known about it: default, comment, unit, range. Nothing else repeats these."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

from grpo_jax.imports import is_import

TINY, HUGE = 2.0**-126, 2.0**127  # of float32, those that are not rounded to 0 or infinity


class Settings(dict):
    """Settings whose names no schema knows: values of JSON by name. Hashable, as fields of a frozen config must be."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True, default=repr))


@dataclasses.dataclass(frozen=True)
class Knob:
    """Metadata of one field.

    about: what it sets, in a few words. unit: of its number. at_least, above, at_most, below: bounds, None for none.
    choices: the only values it may have; empty: any. or_import: "module:function" beside them.
    is_json: JSON in a string, empty for nothing; Python's own dict or list may be given for it.
    """

    about: str
    unit: str = ""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple[Any, ...] = ()
    or_import: bool = False
    is_json: bool = False

    def complaint(self, value: Any) -> str:
        """Say what is wrong with a value, as the end of a sentence; empty if nothing is. NaN is out of every range."""
        # Before the bounds, since a field may have none, and no field can be NaN or infinite.
        if isinstance(value, float) and not math.isfinite(value):
            return "must be a finite number"
        # What a program computes with is float32 and int32, where other numbers would be infinite, 0, or another one.
        if isinstance(value, float) and value and not TINY <= abs(value) <= HUGE:
            return f"float32 has numbers from {TINY:.1g} to {HUGE:.1g} alone"
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            return "must fit into 32 bits"
        if self.is_json and value:
            try:
                json.loads(str(value))
            except ValueError as error:
                return f"not JSON ({error})"
        if self.choices and value not in self.choices and not (self.or_import and is_import(value)):
            return f"unknown; known: {', '.join(map(str, self.choices))}" + ", and module:function" * self.or_import
        if self.at_least is not None and not value >= self.at_least:
            return f"must be at least {self.at_least}"
        if self.above is not None and not value > self.above:
            return f"must be above {self.above}"
        if self.at_most is not None and not value <= self.at_most:
            return f"must be at most {self.at_most}"
        if self.below is not None and not value < self.below:
            return f"must be below {self.below}"
        return ""

    @property
    def range(self) -> str:
        """The allowed values in short: ">= 0, < 1", "a | b"; empty if any will do."""
        if self.choices:
            return " | ".join(map(str, (*self.choices, *("module:function",) * self.or_import)))
        bounds = {">=": self.at_least, ">": self.above, "<=": self.at_most, "<": self.below}
        return ", ".join(f"{sign} {bound}" for sign, bound in bounds.items() if bound is not None)


def knob(default: Any, about: str, **limits: Any) -> Any:
    """Declare a field of a frozen dataclass; limits: the other fields of Knob."""
    # Any, as `dataclasses.field` is typed as its default: the field's own annotation says its type.
    return dataclasses.field(default=default, metadata={"knob": Knob(about, **limits)})


def walk(config: Any, where: str = "") -> Iterator[tuple[str, Any, Knob | None]]:
    """Yield (dotted name, value, its Knob or None) of every field of nested dataclasses, in the order they are declared."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{where}{field.name}.")
        else:
            yield f"{where}{field.name}", value, field.metadata.get("knob")
