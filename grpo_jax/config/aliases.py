"""Configs of older versions: names that fields had before are taken for one release, with a warning that says the new one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.config.schema import Config


def _as_it_is(value: Any) -> Any:
    return value


# Old name -> (new name, old value -> new value).
RENAMED: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "rollout.live_rows": ("rollout.max_live_sequences", _as_it_is),
    "warm_start.careless_rate": ("warm_start.label_noise", _as_it_is),
    "objective.shaped_zeros": ("objective.include_other_side", lambda value: value != "left_out"),
}


def upgrade(values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Replace old names in a nested mapping of settings by new ones; a setting under its new name stays.

    Args:
      values: settings, nested as a Config is. where: their dotted path, empty for a whole config.
    """
    new = {}
    for name, value in values.items():
        dotted = f"{where}{name}"
        # A renamed field keeps its group, so its new name belongs into the same mapping.
        if dotted in RENAMED:
            name, value = upgrade_setting(dotted, value)
            new.setdefault(name.rpartition(".")[2], value)
        else:
            new[name] = upgrade(value, f"{dotted}.") if isinstance(value, Mapping) else value
    return new


def complete(values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring the settings of an older version's config.json to today's names, with newer fields at their defaults."""
    # Only for files that a run wrote itself: it had no such field, and did what the default does. In a person's config a
    # missing field is a mistake, and `strict.build` says so.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # nobody can write it otherwise
        return _filled(upgrade(values), Config().to_dict())


def _filled(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Add to the values what only the defaults have, at every depth."""
    filled = {**defaults, **values}
    for name, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(filled[name], Mapping):
            filled[name] = _filled(filled[name], default)
    return filled


def upgrade_setting(name: str, value: Any) -> tuple[str, Any]:
    """Return one setting, by its dotted name, under its new name. Warns (FutureWarning) if the name is an old one."""
    if name not in RENAMED:
        return name, value
    new_name, convert = RENAMED[name]
    warnings.warn(f"config.{name} is now config.{new_name}; the old name goes with the next release", FutureWarning, 2)
    return new_name, convert(value)
