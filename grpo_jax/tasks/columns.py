"""Columns of a row of data, those inside of others by a path with dots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ABSENT = object()


def find_column(row: Mapping[str, Any], name: str) -> Any:
    """Find a column by its name, or by the path to it, as `reward_model.ground_truth`; ABSENT if there is none."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value


def column_names(row: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """List the columns of a row, with those inside of others. before: goes in front of each name."""
    for name in sorted(row, key=str):
        yield f"{before}{name}"
        if isinstance(row[name], Mapping):
            yield from column_names(row[name], f"{before}{name}.")
