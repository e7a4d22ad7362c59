"""The records of a run: metrics.jsonl (one object a step), completions.jsonl, a progress line, and who else is told."""

from __future__ import annotations

import pathlib
import re
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from grpo_jax.files import note_once, printable
from grpo_jax.training.callbacks import Callbacks
from grpo_jax.training.records import RecordFile, read_records

PLAIN_LINE_EVERY_SECS = 10.0
# What is read of a completion's record, and its kind.
COMPLETION_FIELDS: Mapping[str, Any] = {
    "group": int,
    "task_reward": int | float,
    "reward": int | float,
    "is_truncated": bool,
    "entropy": int | float,
    "grpo_advantage": int | float,
}
TOKEN_FIELDS = ("token_text", "token_entropy", "token_advantage")


class RunLog:
    """Appends a run's records and shows its progress. Records beyond `step` are removed, so that none appears twice.

    step: of the checkpoint that the run resumes from; -1: none. num_steps: of the whole run. callbacks: told of all of it.
    """

    def __init__(self, workdir: pathlib.Path, step: int, num_steps: int, callbacks: Callbacks | None = None):
        self._workdir = workdir
        self._progress = ProgressLine(max(step, 0), num_steps)
        self._metrics = RecordFile(workdir / "metrics.jsonl", step, metrics_fault)
        self._completions = RecordFile(workdir / "completions.jsonl", step, completion_fault)
        say_what_is_lost(self._metrics, step)
        self.callbacks = callbacks or Callbacks([])

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line in metrics.jsonl, and show the step."""
        self._metrics.write({"step": step, **values})
        self.callbacks.tell("on_step", step, values)
        evaluated = {name: value for name, value in values.items() if name.startswith("eval/")}
        if evaluated:
            self.callbacks.tell("on_eval", step, evaluated)
        self._progress.update(step, values)
        if values.get("groups/missing", 0) > 0:
            missing = values["groups/missing"]
            self._progress.note(f"step {step}: {missing:.0%} of the groups are missing: all sampling rounds spent")

    def completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write sampled completions, a line each."""
        for row in rows:
            self._completions.write({"step": step, **row})
        self.callbacks.tell("on_samples", step, rows)

    def note(self, text: str) -> None:
        """Show a line above the progress."""
        self._progress.note(f"{self._workdir}: {text}", is_rare=True)

    def flush(self) -> None:
        """Put all records so far on disk."""
        # Called before a checkpoint: the log may be ahead of it, and is cut off on resuming, but never behind. A crash of the
        # machine would lose lines that are in the system's memory alone, while the checkpoint survives.
        self._metrics.sync()
        self._completions.sync()

    def close(self) -> None:
        self._progress.close()
        self.flush()
        self._metrics.close()
        self._completions.close()


def say_what_is_lost(metrics: RecordFile, step: int) -> None:
    """Say which records a resumed run does again, and which are missing although its checkpoint is behind them.

    Args:
      metrics: opened. step: of the checkpoint; -1: none.
    """
    if metrics.end.dropped:
        first, last = metrics.end.dropped
        why = f"behind the checkpoint of step {step}" if step >= 0 else "there without a checkpoint"
        note_once(f"{metrics.path}: records of steps {first} to {last} are {why}: these steps are done again")
    kept = -1 if metrics.end.kept is None else metrics.end.kept
    if kept < step:
        note_once(f"{metrics.path}: no records of steps {kept + 1} to {step}, although the checkpoint is of step {step}")


def metrics_fault(record: Mapping[str, Any]) -> str:
    """Say what is wrong with a record of metrics.jsonl; "" if nothing is."""
    for name, value in record.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"{printable(name, 40)!r} is no number"
    return ""


def completion_fault(record: Mapping[str, Any]) -> str:
    """Say what is wrong with a record of completions.jsonl; "" if nothing is."""
    lists = [record[name] for name in TOKEN_FIELDS if name in record]
    if not lists:  # an older version's has none of them
        return ""
    for name, kinds in COMPLETION_FIELDS.items():
        value = record.get(name)
        # A completion without a score says so, and its rewards are null.
        if name in record and value is None and record.get("is_scored") is False:
            continue
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            return f"{name!r} is missing or of another kind"
    is_whole = len(lists) == len(TOKEN_FIELDS) and all(isinstance(each, list) for each in lists)
    if not is_whole or len({len(each) for each in lists}) > 1:
        return "its tokens' lists do not fit together"
    texts, *numbers = lists
    are_texts = all(isinstance(x, str) for x in texts)
    are_numbers = all(isinstance(x, int | float) for each in numbers for x in each)
    return "" if are_texts and are_numbers else "its tokens' lists hold something else"


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Read the records of metrics.jsonl, in order; lines that are none are named on stderr and left out."""
    return list(read_records(workdir / "metrics.jsonl", metrics_fault))


def read_completions(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Read the records of completions.jsonl as `read_metrics` does; their fields: `completions.completion_rows`, and `step`."""
    return list(read_records(workdir / "completions.jsonl", completion_fault))


def points(records: Iterable[Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """List (step, value) of each record that has the metric. "@" is for any number: eval/mean@ finds eval/mean@4."""
    pattern = re.compile(re.escape(name).replace("@", r"@\d+"))
    return [(record["step"], record[key]) for record in records for key in record if pattern.fullmatch(key)]


class ProgressLine:
    """One live line on a terminal (step, reward, success, entropy, tokens/s, time left); else a plain line now and then."""

    FIELDS = (
        ("reward", "reward/mean", "{:.2f}"),
        ("success", "reward/success", "{:.2f}"),
        ("held-out", "eval/success", "{:.2f}"),
        ("entropy", "policy/entropy", "{:.2f}"),
        ("tok/s", "tokens/s", "{:.0f}"),
    )

    def __init__(self, start: int, total: int):
        console = Console(file=sys.stderr)
        self._is_live = console.is_terminal
        columns = (BarColumn(20), MofNCompleteColumn(), TextColumn("{task.fields[say]}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=console, disable=not self._is_live)
        self._bar = self._progress.add_task("", total=total, completed=start, say="compiling")
        self._start, self._total, self._last_line = start, total, -PLAIN_LINE_EVERY_SECS
        self._warm: tuple[int, float] | None = None  # the first step that was seen and when: compiling was before it
        self._seen: dict[str, float] = {}
        self._last_note = -PLAIN_LINE_EVERY_SECS
        self._progress.start()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show step `step`; values not in this step's record keep their last reading."""
        self._seen.update(values)
        say = "  ".join(f"{label} {form.format(self._seen[key])}" for label, key, form in self.FIELDS if key in self._seen)
        self._progress.update(self._bar, completed=step, say=say)
        now = time.monotonic()
        # The first step compiles, which may take longer than all others: time left counts from the end of it.
        if self._warm is None and step > self._start:
            self._warm = step, now
        if not self._is_live and (now - self._last_line >= PLAIN_LINE_EVERY_SECS or step in (self._start, self._total)):
            self._last_line = now
            left = ""
            if self._warm is not None and step > self._warm[0]:
                left = f"  left {(now - self._warm[1]) / (step - self._warm[0]) * (self._total - step):.0f} s"
            print(f"step {step}/{self._total}  {say}{left}", file=sys.stderr, flush=True)

    def note(self, text: str, *, is_rare: bool = False) -> None:
        """Print a line above the live one; what is not rare at most once every PLAIN_LINE_EVERY_SECS."""
        now = time.monotonic()
        if is_rare or now - self._last_note >= PLAIN_LINE_EVERY_SECS:
            self._last_note = self._last_note if is_rare else now
            # As plain text: brackets in it are no markup.
            self._progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
