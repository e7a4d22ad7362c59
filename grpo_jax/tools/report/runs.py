"""Reading of runs: folders -> the finished runs in them, and the others with the reason why they do not count."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from grpo_jax.errors import UserError
from grpo_jax.files import note_once, read_json
from grpo_jax.training.runlog import read_metrics
from grpo_jax.training.settings import read_settings


@dataclasses.dataclass(frozen=True)
class ListedRun:
    """A run by name, before anything of it is read. status: as in sweep.json."""

    name: str
    seed: int
    folder: pathlib.Path
    status: str


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run. config: flat, {"objective.kl_coef": 0.04, ...}. records: of metrics.jsonl. summary: of summary.json."""

    name: str
    seed: int
    folder: pathlib.Path
    config: dict[str, Any]
    records: list[dict[str, float]]
    summary: dict[str, Any]

    def curve(self, metric: str) -> dict[int, float]:
        """Return step -> value, where the metric was recorded and is finite; empty if it never was."""
        return {int(each["step"]): each[metric] for each in self.records if math.isfinite(each.get(metric, math.nan))}

    @property
    def cost(self) -> dict[int, tuple[float, float]]:
        """Running totals: step -> (completion tokens sampled, seconds spent in steps) so far."""
        # A record has the rate and the time, not the number of tokens: their product is it. Step 0 is the evaluation before
        # training, which has neither, but keeps its entry, for curves over cost begin there.
        tokens = secs = 0.0
        so_far = {}
        for each in self.records:
            if "tokens/s" in each:
                tokens += each["tokens/s"] * each["time/step_secs"]
                secs += each["time/step_secs"]
            so_far[int(each["step"])] = tokens, secs
        return so_far


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A run that does not count, and why."""

    name: str
    seed: int
    reason: str


def load(folders: Sequence[pathlib.Path], metric: str) -> tuple[list[Run], list[LeftOut]]:
    """Read the runs of a sweep's folder, or plain run folders, grouped by their config without the seed.

    Runs of one name are the seeds of one setting, in the order of sweep.json or of the folders.

    Raises: UserError if no run is finished, if none recorded the metric, or if runs of one name differ in more than the seed,
      or not in it.
    """
    listed = list_sweep(folders[0]) if (folders[0] / "sweep.json").exists() else list_by_config(folders)
    read = [read_run(each, metric) for each in listed]
    runs = [each for each in read if isinstance(each, Run)]
    left_out = [each for each in read if isinstance(each, LeftOut)]
    if not runs:
        raise UserError(f"{folders[0]}: no run to report on; {left_out[0].name}, seed {left_out[0].seed}: {left_out[0].reason}")
    require_seeds_of_one_setting(runs)
    return runs, left_out


def list_sweep(workdir: pathlib.Path) -> list[ListedRun]:
    """List the runs of sweep.json; their folders are relative to its own."""
    path, advice = workdir / "sweep.json", "start the sweep again, it writes the file anew and keeps finished runs"
    runs: Any = read_json(path, advice).get("runs")
    try:
        return [ListedRun(each["name"], each["seed"], workdir / each["folder"], each["status"]) for each in runs]
    except (KeyError, TypeError):
        raise UserError(f"{path}: no list of runs with name, seed, folder and status; {advice}") from None


def list_by_config(folders: Sequence[pathlib.Path]) -> list[ListedRun]:
    """List runs so that configs equal but for the seed share a name: the first one's folder, without a -seed0 at its end."""
    names: dict[str, str] = {}
    listed = []
    for folder in folders:
        if not (folder / "config.json").exists():
            raise UserError(f"{folder}: neither a sweep's folder (no sweep.json) nor a run's (no config.json)")
        config = read_config(folder)
        seed = config.pop("seed")
        # As text the config can be a key although it holds lists, and sorted it does not depend on the order of the fields.
        name = names.setdefault(json.dumps(config, sort_keys=True), re.sub(r"[-_.]*seed[-_=]?\d+$", "", folder.name))
        listed.append(ListedRun(name, seed, folder, "finished"))
    return listed


def read_run(listed: ListedRun, metric: str) -> Run | LeftOut:
    """Read a run, or say why it does not count: it has not come to its end, or the metric has no finite value there.

    Raises: UserError if the run came to its end and never recorded the metric.
    """
    name, seed, folder = listed.name, listed.seed, listed.folder
    # The order matters: a run that failed or waits may have no folder, and one that has just begun no records.
    if listed.status != "finished":
        return LeftOut(name, seed, listed.status)
    records = read_metrics(folder)
    if not records:
        return LeftOut(name, seed, f"no records in {folder}")
    # One damaged file leaves out one run: the others can be compared all the same.
    try:
        config = read_config(folder)
    except UserError as error:
        return LeftOut(name, seed, str(error))
    run = Run(name, seed, folder, config, records, read_summary(folder))
    last, num_steps = int(records[-1]["step"]), run.config["num_steps"]
    if last < num_steps:
        return LeftOut(name, seed, f"stopped at step {last} of {num_steps}")
    # A name that was never recorded is most likely a typing error, so it ends the report and lists the known names. NaN at the
    # last step is the run's own doing, so it leaves out that run and the report says so.
    if not any(metric in record for record in records):
        known = sorted({key for record in records for key in record if key.startswith("eval/")})
        raise UserError(f"--metric={metric}: not recorded in {folder}/metrics.jsonl; there are: {', '.join(known)}")
    if last not in run.curve(metric):
        return LeftOut(name, seed, f"{metric} has no finite value at the last step")
    return run


def read_summary(folder: pathlib.Path) -> dict[str, Any]:
    """Read summary.json; empty if there is none."""
    path = folder / "summary.json"
    if not path.exists():
        return {}
    # It says where the results come from, and none of them: date, commit and machine are unknown then.
    try:
        return read_json(path, "its date, commit and machine are not known")
    except UserError as error:
        note_once(str(error))
        return {}


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Read config.json, flat: {"objective.kl_coef": 0.04, ...}."""
    # Not through `Config`: a run of an older version lacks fields of it, and its results can be compared all the same.
    settings = flatten_dict(read_settings(folder), sep=".")
    for field in ("seed", "num_steps"):
        if not isinstance(settings.get(field), int):
            raise UserError(f"{folder}/config.json: {field} = {settings.get(field)!r}, an integer is expected")
    return settings


def require_seeds_of_one_setting(runs: Sequence[Run]) -> None:
    """Check that runs of one name have different seeds and are otherwise alike.

    Raises: UserError naming the first run that breaks this.
    """
    # Without this the mean of a name would mix settings, or count a seed twice, and the intervals would be too narrow.
    first: dict[str, Run] = {}
    seen: dict[tuple[str, int], Run] = {}
    for run in runs:
        twin = seen.setdefault((run.name, run.seed), run)
        if twin is not run:
            raise UserError(f"{run.folder}: also called {run.name}, seed {run.seed}, as is {twin.folder}; leave one out")
        like = first.setdefault(run.name, run)
        differing = differing_fields([like, run])
        if differing:
            field = differing[0]
            raise UserError(
                f"{run.folder}: called {run.name} like {like.folder}, but {field} is {run.config.get(field)!r}, "
                f"there {like.config.get(field)!r}; give it another name"
            )


def differing_fields(runs: Sequence[Run]) -> list[str]:
    """Return the config fields that are not the same in all of the runs, but for the seed."""
    # Values are compared as text because lists cannot be in a set. A field that an older run lacks counts as null.
    fields = dict.fromkeys(field for run in runs for field in run.config)
    values = {field: {json.dumps(run.config.get(field), sort_keys=True) for run in runs} for field in fields}
    return [field for field, each in values.items() if len(each) > 1 and field != "seed"]
