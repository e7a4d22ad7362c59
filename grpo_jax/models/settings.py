"""Single settings of a config.json, checked: what is wrong is named with file, key and value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError

Settings = Mapping[str, Any]  # of a config.json
# More than this is damage, found before anything of such a size is made.
AT_MOST, MANY = {"num_hidden_layers": 1024}, 2**24
HUGE = 1e30


def unsupported(file: Path, key: str, value: Any, supported: Any) -> UserError:
    """Return the error for a setting that the decoder does not have.

    Args:
      file: config.json. key, value: of the setting. supported: what there may be instead.
    """
    return UserError(f"{file}: {key} = {json.dumps(value)} is not supported; supported: {supported}")


def read_integer(file: Path, config: Settings, key: str, default: int | None = None) -> int:
    """Read a positive integer.

    Args:
      file: config.json. config: its settings. key: of the one to read. default: where it is absent or null; None: an error.
    Raises: UserError.
    """
    value = config.get(key)
    if value is None:
        value = default
    # A bool is an int in Python, and true would be taken for 1.
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {key} = {json.dumps(value)}: expected a positive integer")
    if value > AT_MOST.get(key, MANY):
        raise UserError(f"{file}: {key} = {json.dumps(value)}: no model has more than {AT_MOST.get(key, MANY)}")
    return value


def read_number(file: Path, config: Settings, key: str) -> float:
    """Read a number above 0.

    Args:
      file: config.json. config: its settings. key: of the one to read.
    Raises: UserError.
    """
    return positive(config.get(key), f"{file}: {key}")


def positive(value: Any, where: str, purpose: str = "") -> float:
    """Return a number above 0.

    Args:
      value: what was found. where: names it. purpose: what it is for, ends the message.
    Raises: UserError.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < HUGE:
        raise UserError(f"{where} = {json.dumps(value)}: expected a finite number above 0{purpose}")
    return float(value)


def read_flag(file: Path, config: Settings, key: str) -> bool:
    """Read true or false.

    Args:
      file: config.json. config: its settings. key: of the one to read.
    Raises: UserError.
    """
    value = config.get(key)
    if not isinstance(value, bool):
        raise UserError(f"{file}: {key} = {json.dumps(value)}: expected true or false")
    return value
