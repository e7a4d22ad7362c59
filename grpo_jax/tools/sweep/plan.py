"""A sweep's config -> its runs. Everything that can be wrong with it is found here, before anything runs."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from grpo_jax.analysis import statistics
from grpo_jax.config import Config, parse_config
from grpo_jax.config.aliases import upgrade_setting
from grpo_jax.config.strict import build
from grpo_jax.errors import UserError
from grpo_jax.tools import cli


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep as configs/sweeps/base.py describes it."""

    scale: str
    configs: tuple[str, ...]
    sets: dict[str, Mapping[str, Any]]
    more_sets: dict[str, Mapping[str, Mapping[str, Any]]]
    seeds: tuple[int, ...]
    num_processes: int
    cohort_size: int

    @classmethod
    def from_config_dict(cls, config: Any) -> Sweep:
        """Read a sweep's config. Raises UserError naming the field, its value and the fix."""
        sweep = build(cls, config.to_dict(), "config")
        for field in ("configs", "sets", "seeds"):
            if not getattr(sweep, field):
                raise UserError(f"config.{field} is empty: a sweep needs at least one")
        other = next((file for file in sweep.more_sets if file not in sweep.configs), None)
        if other is not None:
            raise UserError(f"config.more_sets: {other!r} is not among config.configs = {sweep.configs}")
        for field in ("num_processes", "cohort_size"):
            if getattr(sweep, field) < 0:
                raise UserError(f"config.{field} = {getattr(sweep, field)}: must be at least 0")
        return sweep

    def sets_of(self, file: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the sets of one config: those of all, and its own."""
        return {**self.sets, **self.more_sets.get(file, {})}


def too_few_seeds(sweep: Sweep) -> str | None:
    """Write a warning for a sweep of which no report could show a difference; None: there are seeds enough for one."""
    # A note and no error: a sweep of one seed is a fair way to try a config, as long as nobody compares what it gives.
    num_settings = sum(len(sweep.sets_of(file)) for file in sweep.configs)
    if num_settings < 2:
        return None
    least = statistics.fewest_seeds(num_settings - 1)  # each against the baseline, at the least
    if least is None or len(sweep.seeds) >= least:
        return None
    return (
        f"config.seeds holds {len(sweep.seeds)}; with fewer than {least} no difference between {num_settings} settings can be "
        "shown, however large, and small ones take more"
    )


@dataclasses.dataclass(frozen=True)
class RunSpec:
    """One run of a sweep. settings: what its set changes. folder: of the run, within the sweep's."""

    name: str
    variant: str
    settings: Mapping[str, Any]
    seed: int
    folder: str
    config: Config


def expand(sweep: Sweep, everywhere: Mapping[str, Any]) -> list[RunSpec]:
    """List every config file x set x seed, seeds innermost. everywhere: changes to all runs, by field.

    Raises UserError on a bad field or value, and if two runs would have one folder.
    """
    specs = []
    for file in sweep.configs:
        for label, settings in sweep.sets_of(file).items():
            variant = pathlib.Path(file).stem
            # A label may hold anything; a folder's name may not.
            name = "-".join(filter(None, (variant, re.sub(r"[^\w.,=+-]", "_", label))))
            raw = cli.load_config(f"{file}:{sweep.scale}", "config.configs")
            config = apply_changes(raw.to_dict(), {**everywhere, **settings}, f"{file}, set {label!r}")
            for seed in sweep.seeds:
                seeded = dataclasses.replace(config, seed=seed)
                specs.append(RunSpec(name, variant, settings, seed, f"runs/{name}-seed{seed}", seeded))
    # Two runs in one folder would resume from each other's checkpoints.
    folders = [spec.folder for spec in specs]
    twice = next((folder for folder in folders if folders.count(folder) > 1), None)
    if twice:
        raise UserError(f"config: two runs would have the folder {twice!r}; names of configs and sets and seeds must differ")
    return specs


def apply_changes(settings: dict[str, Any], changes: Mapping[str, Any], where: str) -> Config:
    """Change some fields of a config's settings, and validate all of them.

    Args:
      settings: nested, as a ConfigDict gives them; changed in place.
      changes: field -> value, dotted, by old names too.
      where: file and set, for messages.
    Raises: UserError on a field that does not exist or a value that does not fit.
    """
    # The seed is in the folder's name and in the pairing of runs in reports; a set that changed it would belie both.
    if "seed" in changes:
        raise UserError(f"{where}: 'seed' cannot be changed by a set; use config.seeds")
    for dotted, value in (upgrade_setting(*change) for change in changes.items()):
        *parents, last = dotted.split(".")
        node: Any = settings
        for parent in parents:
            if not isinstance(node, dict) or parent not in node:
                node = None  # from here on nothing is found, and the message below names the whole path
                break
            node = node[parent]
        # Settings for functions of one's own have names that no config lists.
        has_any_name = parents[-1:] == ["params"]
        if not isinstance(node, dict) or (last not in node and not has_any_name):
            raise UserError(f"{where}: {dotted!r} is no field; `grpo-jax fields` lists them all")
        node[last] = value
    try:
        return parse_config(settings)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ["num_steps=100", ...] as {"num_steps": 100, ...}; text that is no Python value stays text. Raises UserError."""
    changes = {}
    for assignment in assignments:
        field, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"--set={assignment}: expected <field>=<value>, for example --set=num_steps=100")
        try:
            changes[field] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            changes[field] = text
    return changes
