"""Nested mapping -> nested frozen dataclasses, strictly: every key known, every field present, every type right."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.knobs import Settings
from grpo_jax.objectives import Params
from grpo_jax.objectives.params import read_params


def build(cls: type, values: Any, where: str) -> Any:
    """Build one dataclass from a mapping, exactly.

    Args:
      cls: the dataclass. values: of all of its fields, and of no other. where: its dotted path, for messages.
    Raises: UserError naming the field.
    """
    # Everything that reads a config relies on this and checks nothing itself. A misspelt field must end here: otherwise the one
    # that was meant would silently keep its default.
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: expected a group of fields ({', '.join(field_names(cls))}), got {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise UserError(f"{where}.{unknown[0]}: unknown field; known here: {', '.join(field_names(cls))}")
    # The dataclasses' defaults are for configs/base.py, which every config starts from. A field missing here is a mistake.
    missing = [name for name in field_names(cls) if name not in values]
    if missing:
        raise UserError(f"{where}.{missing[0]}: missing; start from configs/base.py, which sets every field")
    built = {
        field.name: convert(hints[field.name], _as_text(field, values[field.name]), f"{where}.{field.name}")
        for field in dataclasses.fields(cls)
    }
    # A dataclass may check its own fields, as `Objective` does: the library is used without configs too.
    try:
        return cls(**built)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where.rpartition('.')[0]}.{error}") from None  # the message begins with the last part of `where`


def _as_text(field: dataclasses.Field, value: Any) -> Any:
    """Write a dict or a list as JSON, where a field is declared to hold that."""
    # A Config is hashed, so that programs can be shared: a dict could not be in it.
    declared = field.metadata.get("knob")
    if declared is not None and declared.is_json and isinstance(value, Mapping | list | tuple):
        return json.dumps(value) if value else ""
    return value


def field_names(cls: type) -> list[str]:
    """List the fields of a dataclass as they are declared."""
    return [field.name for field in dataclasses.fields(cls)]


def convert(hint: Any, value: Any, where: str) -> Any:
    """Convert one value to a field's type.

    Args:
      hint: the type: a dataclass, a tuple of one type, a plain type, a mapping of numbers; or one of these, None or a function.
      value: as it was written. where: its dotted path, for messages.
    Returns: the value; an int becomes a float where one is expected, a list a tuple.
    Raises: UserError naming the field if the type is wrong.
    """
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is Mapping:
        return _params(value, where)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        if callable(value) and any(typing.get_origin(arg) is Callable for arg in typing.get_args(hint)):
            return value
        if value is None and type(None) in typing.get_args(hint):
            return None
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    if value is None:  # a placeholder of the config file, for what only the user can know
        raise UserError(f"{where} is not set: give it a value, for example --{where}=...")
    origin = typing.get_origin(hint) or hint
    if origin is Settings:
        return _settings(value, where)
    wrong = UserError(f"{where} = {value!r}: expected {getattr(hint, '__name__', hint)}, got {type(value).__name__}")
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise wrong
        item = typing.get_args(hint)[0]
        return tuple(convert(item, each, f"{where}[{i}]") for i, each in enumerate(value))
    # `1` for 1.0 is what people write. True is an int to Python, but for a number it is a mistake.
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (isinstance(value, bool) and origin is not bool) or not isinstance(value, origin):
        raise wrong
    return value


def _params(value: Any, where: str) -> Params:
    """Make Params of a mapping, its JSON text or Params. Raises UserError naming the field."""
    try:
        return read_params(value)
    except ValueError as error:
        raise UserError(f"{where.rpartition('.')[0].rpartition('.')[0]}.{error}") from None


def _settings(value: Any, where: str) -> Settings:
    """Check settings of any names: they must survive config.json. Raises UserError naming the one that does not."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} = {value!r:.80}: expected settings by name, {{name: value}}")
    for name, each in value.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"{where}.{name}: not the name of a parameter")
        try:
            json.dumps(each, allow_nan=False)
        except (TypeError, ValueError):
            raise UserError(
                f"{where}.{name} = {each!r:.80}: must be text, a number, a bool, or lists or dicts of these"
            ) from None
    # As JSON has them, so that a run that resumes from its config.json is given the very same values.
    return Settings(json.loads(json.dumps(value)))
