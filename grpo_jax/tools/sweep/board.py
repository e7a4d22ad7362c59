"""What a sweep shows and writes about its runs while it goes on: a live table, or plain lines; and sweep.json."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpo_jax.tools.sweep.plan import RunSpec
from grpo_jax.training.checkpoint import saved_steps, write_atomically
from grpo_jax.training.runlog import read_metrics

STATUSES = ("running", "failed", "waiting", "finished")  # in the order of the table
PLAIN_LINE_EVERY_SECS = 30.0


class Board:
    """The status of every run. Each change goes to sweep.json, which experiments.report reads."""

    def __init__(self, specs: Sequence[RunSpec], workdir: pathlib.Path, num_at_once: int):
        self.specs, self.workdir, self.num_at_once = specs, workdir, num_at_once
        self.status = {spec.folder: "finished" if is_finished(spec, workdir) else "waiting" for spec in specs}
        self.errors: dict[str, str] = {}
        self._records: dict[str, dict[str, float]] = {spec.folder: latest(workdir / spec.folder) for spec in specs}
        self._last_line = time.monotonic()
        self._steps_before = self.steps_done()
        self._pace_from: tuple[float, int] | None = None  # when the first steps were seen, and how many there were then
        self._secs_in_steps, self._secs_before = 0.0, dict.fromkeys(self.status, 0.0)
        console = Console(file=sys.stderr)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        self.save()
        return self

    def __exit__(self, *_: object) -> None:
        for folder, status in self.status.items():
            self.status[folder] = "waiting" if status == "running" else status  # interrupted
        self.save()
        if self._live:
            self.refresh()
            self._live.stop()

    def ended(self, spec: RunSpec, error: str) -> None:
        """A run has failed (error: why, in one line), gone to its end, or was stopped and can go on."""
        self._secs_in_steps += secs_in_steps(self.workdir / spec.folder) - self._secs_before[spec.folder]
        if error:
            self.errors[spec.folder] = error
        self.set(spec, "failed" if error else "finished" if is_finished(spec, self.workdir) else "waiting")

    def set(self, spec: RunSpec, status: str) -> None:
        """A run's status has changed."""
        if status == "running":  # what lies behind its checkpoint will be done once more
            resumed = max(saved_steps(self.workdir / spec.folder), default=-1)
            self._secs_before[spec.folder] = secs_in_steps(self.workdir / spec.folder, up_to=resumed)
        self.status[spec.folder] = status
        self._records[spec.folder] = latest(self.workdir / spec.folder)
        self.save()
        if not self._live:
            _, step, reward, success, *_ = self.cells(spec)
            shown = f"step {step}  reward {reward}  held-out {success}" if status in ("finished", "waiting") else ""
            self.say(f"{spec.folder.removeprefix('runs/')}: {status}  {self.errors.get(spec.folder, shown)}".rstrip())

    def save(self) -> None:
        """Write sweep.json."""
        fields = ("name", "variant", "settings", "seed", "folder")
        runs = [{field: getattr(spec, field) for field in fields} | {"status": self.status[spec.folder]} for spec in self.specs]
        write_atomically(self.workdir / "sweep.json", json.dumps({"runs": runs}, indent=1) + "\n")

    def refresh(self) -> None:
        """Look how far the running ones are, and show it."""
        if self._pace_from is None and self.steps_done() > self._steps_before:
            self._pace_from = time.monotonic(), self.steps_done()
        if not self._live and time.monotonic() - self._last_line < PLAIN_LINE_EVERY_SECS:
            return
        for spec in self.specs:
            if self.status[spec.folder] == "running":
                self._records[spec.folder] = latest(self.workdir / spec.folder)
        if self._live:
            self._live.update(self.table(self._live.console.height), refresh=True)
        else:
            self._last_line = time.monotonic()
            self.say(self.summary())

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def table(self, height: int) -> Group:
        """As many runs as fit into so many lines, those that move first."""
        table = Table(box=None)
        for name in ("run", "step", "reward", "held-out", "left", "status"):
            table.add_column(name, justify="left" if name in ("run", "status") else "right")
        ordered = sorted(self.specs, key=lambda spec: STATUSES.index(self.status[spec.folder]))
        for spec in ordered[: max(height - 4, 1)]:
            table.add_row(*self.cells(spec))
        return Group(table, Text(self.summary()))

    def cells(self, spec: RunSpec) -> tuple[str, ...]:
        record, status = self._records[spec.folder], self.status[spec.folder]
        step, left = int(record["step"]), ""
        if status == "running" and "time/step_secs" in record:
            left = f"{(spec.config.num_steps - step) * record['time/step_secs']:.0f} s"
        shown = [f"{record[key]:.2f}" if key in record else "" for key in ("reward/mean", "eval/success")]
        return (spec.folder.removeprefix("runs/"), f"{step}/{spec.config.num_steps}", *shown, left, status)

    def summary(self) -> str:
        """How many runs are at what, and how long the rest will take."""
        counts = ", ".join(f"{self.count(status)} {status}" for status in STATUSES if self.count(status))
        left = self.secs_left()
        return f"{counts}; {self.num_at_once} at a time" + ("" if left is None else f"; about {left / 60:.0f} min left")

    def secs_left(self) -> float | None:
        """At the pace since the first steps were seen: what came before them was starting and compiling."""
        since, first_steps = self._pace_from or (0.0, math.inf)
        done = self.steps_done() - first_steps
        if done <= 0:
            return None
        to_do = sum(spec.config.num_steps for spec in self.specs if self.status[spec.folder] != "failed") - self.steps_done()
        return to_do * (time.monotonic() - since) / done

    def what_bounds_it(self, secs: float) -> str:
        """Where the time of the last `secs` seconds went."""
        if not self._secs_in_steps:
            return "Nothing was left to train."
        share = self._secs_in_steps / (secs * self.num_at_once)
        return f"{share:.0%} of the time was training steps; the rest went into starting, compiling, warm starts and evaluation"

    def count(self, status: str) -> int:
        return list(self.status.values()).count(status)

    def steps_done(self) -> int:
        """Of all runs that have not failed."""
        return sum(int(self._records[folder]["step"]) for folder, status in self.status.items() if status != "failed")


def is_finished(spec: RunSpec, workdir: pathlib.Path) -> bool:
    """Whether the run went to its end; one that was stopped has a summary too, of fewer steps."""
    path = workdir / spec.folder / "summary.json"
    return path.exists() and json.loads(path.read_text())["steps"] == spec.config.num_steps


def secs_in_steps(folder: pathlib.Path, up_to: float = math.inf) -> float:
    """What the steps of a run have taken, up to one of them."""
    records = read_metrics(folder)
    return sum(record["time/step_secs"] for record in records if "time/step_secs" in record and record["step"] <= up_to)


def latest(folder: pathlib.Path) -> dict[str, float]:
    """The newest value of every metric of a run; only the step, 0, if it has not begun."""
    values = {"step": 0.0}
    for record in read_metrics(folder):
        values |= record
    return values
