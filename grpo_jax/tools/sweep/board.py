"""The status of a sweep's runs while it goes on: shown as a live table or as plain lines, written to sweep.json."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from collections.abc import Sequence

from rich.console import Console, Group, JustifyMethod
from rich.live import Live
from rich.table import Table
from rich.text import Text

from grpo_jax.errors import UserError
from grpo_jax.files import note_once, read_json, write_atomically
from grpo_jax.tools.sweep.plan import RunSpec
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.runlog import read_metrics

STATUSES = ("running", "failed", "waiting", "finished")  # in the order of the table
JUSTIFY: dict[str, JustifyMethod] = {"run": "left", "status": "left"}  # of columns; numbers go to the right
PLAIN_LINE_EVERY_SECS = 30.0


class Board:
    """The status of every run. Each change goes to sweep.json, which grpo-jax report reads."""

    def __init__(self, specs: Sequence[RunSpec], workdir: pathlib.Path, num_at_once: int):
        self.specs, self.workdir, self.num_at_once = specs, workdir, num_at_once
        self.status = {spec.folder: resting_status(spec, workdir) for spec in specs}
        self.errors: dict[str, str] = {}
        self._records: dict[str, dict[str, float]] = {spec.folder: latest(workdir / spec.folder) for spec in specs}
        self._last_line = time.monotonic()
        self._steps_before = self.steps_done()
        self._pace_from: tuple[float, int] | None = None  # when the first steps were seen, and how many there were then
        self._secs_in_steps, self._secs_before = 0.0, dict.fromkeys(self.status, 0.0)
        # stderr, so that stdout holds the outcome only. No refreshing thread of its own: the sweep's loop comes by every second
        # anyway, and a thread would read the status while it changes.
        console = Console(file=sys.stderr)
        self._live: Live | None = None
        if console.is_terminal:
            self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Board:
        if self._live:
            self._live.start()
        self.save()
        return self

    def __exit__(self, *_: object) -> None:
        # Interrupted runs: sweep.json must not say "running" of a sweep that has ended.
        for folder, status in self.status.items():
            if status == "running":
                self.status[folder] = "waiting"
        self.save()
        if self._live:
            self.refresh()
            self._live.stop()

    def record_end(self, spec: RunSpec, error: str) -> None:
        """Note that a run has failed (error: why, in one line), gone to its end, or was stopped and can go on."""
        self._secs_in_steps += secs_in_steps(self.workdir / spec.folder) - self._secs_before[spec.folder]
        if error:
            self.errors[spec.folder] = error
            self.set(spec, "failed")
        else:
            # The files decide and not the process's word: a run that saved on a signal ends without an error too.
            self.set(spec, resting_status(spec, self.workdir))

    def set(self, spec: RunSpec, status: str) -> None:
        """Change a run's status, save it, and without a live table say so."""
        if status == "running":
            # The steps behind its last checkpoint are done once more, so their seconds count again.
            resumed = max(saved_steps(self.workdir / spec.folder), default=-1)
            self._secs_before[spec.folder] = secs_in_steps(self.workdir / spec.folder, up_to=resumed)
        self.status[spec.folder] = status
        self._records[spec.folder] = latest(self.workdir / spec.folder)
        self.save()
        if not self._live:
            _, step, reward, success, *_ = self.cells(spec)
            shown = ""
            if status in ("finished", "waiting"):
                shown = f"step {step}  reward {reward}  held-out {success}"
            self.say(f"{spec.folder.removeprefix('runs/')}: {status}  {self.errors.get(spec.folder, shown)}".rstrip())

    def save(self) -> None:
        """Write sweep.json."""
        fields = ("name", "variant", "settings", "seed", "folder")
        runs = [{field: getattr(spec, field) for field in fields} | {"status": self.status[spec.folder]} for spec in self.specs]
        write_atomically(self.workdir / "sweep.json", json.dumps({"runs": runs}, indent=1) + "\n")

    def refresh(self) -> None:
        """Read how far the running ones are, and show it."""
        # The pace counts from the first new step of any run: before it there is only starting and compiling.
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
        """Make a table of as many runs as fit into `height` lines, those that move first."""
        table = Table(box=None)
        for name in ("run", "step", "reward", "held-out", "left", "status"):
            table.add_column(name, justify=JUSTIFY.get(name, "right"))
        ordered = sorted(self.specs, key=lambda spec: STATUSES.index(self.status[spec.folder]))
        # Lines are left for the head and the summary: of a live table taller than the terminal, rich does not show the end.
        for spec in ordered[: max(height - 4, 1)]:
            table.add_row(*map(Text, self.cells(spec)))
        return Group(table, Text(self.summary()))

    def cells(self, spec: RunSpec) -> tuple[str, ...]:
        """Write a run's line of the table."""
        record, status = self._records[spec.folder], self.status[spec.folder]
        step, left = int(record["step"]), ""
        if status == "running" and "time/step_secs" in record:
            left = f"{(spec.config.num_steps - step) * record['time/step_secs']:.0f} s"
        shown = [two_digits(record, key) for key in ("reward/mean", "eval/success")]
        return (spec.folder.removeprefix("runs/"), f"{step}/{spec.config.num_steps}", *shown, left, status)

    def summary(self) -> str:
        """Count the runs of each status, and say how long the rest will take."""
        counts = ", ".join(f"{self.count(status)} {status}" for status in STATUSES if self.count(status))
        shown, left = f"{counts}; {self.num_at_once} at a time", self.secs_left()
        if left is None:
            return shown
        return f"{shown}; about {left / 60:.0f} min left"

    def secs_left(self) -> float | None:
        """Estimate the rest at the pace since the first steps were seen; None until there are more of them. Seconds."""
        since, first_steps = self._pace_from or (0.0, math.inf)
        # All runs together, for several go on side by side: one run's own pace would leave out those that wait.
        done = self.steps_done() - first_steps
        if done <= 0:
            return None
        to_do = sum(spec.config.num_steps for spec in self.specs if self.status[spec.folder] != "failed") - self.steps_done()
        return to_do * (time.monotonic() - since) / done

    def describe_time(self, secs: float) -> str:
        """Say where the time of the last `secs` seconds went."""
        if not self._secs_in_steps:
            return "Nothing was left to train."
        share = self._secs_in_steps / (secs * self.num_at_once)
        return f"{share:.0%} of the time was training steps; the rest went into starting, compiling, warm starts and evaluation"

    def count(self, status: str) -> int:
        return list(self.status.values()).count(status)

    def steps_done(self) -> int:
        """Count the steps of all runs that have not failed."""
        return sum(int(self._records[folder]["step"]) for folder, status in self.status.items() if status != "failed")


def is_finished(spec: RunSpec, workdir: pathlib.Path) -> bool:
    """Return True if the run went to its end."""
    # One that was stopped has a summary too, of fewer steps.
    path = workdir / spec.folder / "summary.json"
    if not path.exists():
        return False
    # A torn one must not stop the other runs: this run goes on from its last checkpoint, and writes the file anew.
    try:
        return read_json(path, "the run goes on from its last checkpoint").get("steps") == spec.config.num_steps
    except UserError as error:
        note_once(str(error))
        return False


def resting_status(spec: RunSpec, workdir: pathlib.Path) -> str:
    """Return the status of a run that nobody is at, from its files."""
    if is_finished(spec, workdir):
        return "finished"
    return "waiting"


def two_digits(record: dict[str, float], key: str) -> str:
    """Write a metric; empty for a run that has not begun or is never evaluated."""
    if key not in record:
        return ""
    return f"{record[key]:.2f}"


def secs_in_steps(folder: pathlib.Path, up_to: float = math.inf) -> float:
    """Add up the seconds of a run's steps, up to one of them."""
    records = read_metrics(folder)
    return sum(record["time/step_secs"] for record in records if "time/step_secs" in record and record["step"] <= up_to)


def latest(folder: pathlib.Path) -> dict[str, float]:
    """Return the newest value of every metric of a run; only the step, 0, if it has not begun."""
    # Records differ in their fields: a step between two evaluations has no success.
    values = {"step": 0.0}
    for record in read_metrics(folder):
        values |= record
    return values
