"""The records of a run: metrics.jsonl (one object a step), completions.jsonl, TensorBoard events, a progress line."""

from __future__ import annotations

import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Mapping
from typing import IO, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from grpo_jax.config import Config, parse_config
from grpo_jax.config.aliases import complete
from grpo_jax.errors import UserError

PLAIN_LINE_EVERY_SECS = 10.0
_EVENTS: Any = event_pb2  # message classes made at run time, which a type checker cannot see
_SUMMARIES: Any = summary_pb2


class RunLog:
    """Appends a run's records and shows its progress. Records beyond `step` are removed, so that none appears twice.

    step: of the checkpoint that the run resumes from; -1: none. num_steps: of the whole run.
    """

    def __init__(self, workdir: pathlib.Path, step: int, num_steps: int):
        self._progress = ProgressLine(max(step, 0), num_steps)
        self._metrics = _reopen(workdir / "metrics.jsonl", step)
        self._completions = _reopen(workdir / "completions.jsonl", step)
        self._events = EventFileWriter(str(workdir / "tensorboard"))
        # An event file cannot be truncated; this event tells TensorBoard to drop the points of earlier files from its step on.
        restart = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
        self._events.add_event(_EVENTS.Event(wall_time=time.time(), step=step + 1, session_log=restart))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write a line in metrics.jsonl and a point on each TensorBoard curve, and show the step."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        summary = _SUMMARIES.Summary(
            value=[_SUMMARIES.Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        )
        self._events.add_event(_EVENTS.Event(wall_time=time.time(), step=step, summary=summary))
        self._progress.update(step, values)
        if values.get("groups/missing", 0) > 0:
            missing = values["groups/missing"]
            self._progress.note(f"step {step}: {missing:.0%} of the groups are missing: all sampling rounds spent")

    def completions(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Write sampled completions, a line each."""
        for row in rows:
            self._completions.write(json.dumps({"step": step, **row}, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Put all records so far on disk."""
        # Called before a checkpoint: the log may be ahead of it, and is truncated on resuming, but never behind. fsync, because
        # flush alone leaves lines in the system's memory, which a crash of the machine may lose while the checkpoint survives.
        for file in (self._metrics, self._completions):
            file.flush()
            os.fsync(file.fileno())
        self._events.flush()

    def close(self) -> None:
        self._progress.close()
        self.flush()
        self._metrics.close()
        self._completions.close()
        self._events.close()


def _reopen(path: pathlib.Path, step: int) -> IO[str]:
    """Open for appending after the last record of `step`; a line that a kill left unfinished goes too."""
    # Steps beyond the checkpoint are done again. And behind an unfinished line the next record would not begin on its own line.
    kept = [line for line, record in _records(path) if record["step"] <= step]
    path.write_text("".join(kept), encoding="utf-8")
    return path.open("a", encoding="utf-8", buffering=1)  # a line at a time, for those who look while the run goes on


def _records(path: pathlib.Path):
    """Yield (line, record) of each complete line."""
    if not path.exists():
        return
    # A kill may leave the last line unfinished, even inside of a character: that must be no error of decoding.
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield line, json.loads(line)
            except json.JSONDecodeError:
                return


def read_metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
    """Read the records of metrics.jsonl, in order."""
    return [record for _, record in _records(workdir / "metrics.jsonl")]


def read_completions(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Read the records of completions.jsonl, in order; their fields: `completions.completion_rows`, and `step`."""
    return [record for _, record in _records(workdir / "completions.jsonl")]


def read_config(workdir: pathlib.Path) -> Config:
    """Read the config that the run was started with. Raises UserError if the folder is not that of a run."""
    path = workdir / "config.json"
    if not path.exists():
        raise UserError(f"{path}: no such file; --workdir must be the folder of a training run")
    return parse_config(complete(json.loads(path.read_text())))


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

    def note(self, text: str) -> None:
        """Print a line above the live one, at most once every PLAIN_LINE_EVERY_SECS."""
        now = time.monotonic()
        if now - self._last_note >= PLAIN_LINE_EVERY_SECS:
            self._last_note = now
            self._progress.console.print(text)

    def close(self) -> None:
        self._progress.stop()
