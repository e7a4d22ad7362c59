"""The loop around the pure core: the only file that may know every other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.parallel import hosts
from grpo_jax.training.checkpoint import Checkpointer, init_workdir, write_atomically
from grpo_jax.training.completions import completion_rows
from grpo_jax.training.evaluate import to_metrics
from grpo_jax.training.iteration import prefetch_first_batch
from grpo_jax.training.plots import learning_curve
from grpo_jax.training.provenance import provenance
from grpo_jax.training.run import Run, initial_state, make_run, restore_state
from grpo_jax.training.runlog import RunLog, read_metrics
from grpo_jax.types import Batch, TrainState


def train(
    config: Config, workdir: pathlib.Path, *, allow_config_change: bool = False, profiled: range | None = None
) -> dict[str, Any] | None:
    """Run `config` in `workdir` from where it left off; -> the summary that is also written to summary.json.

    profiled: steps whose calls jax.profiler traces into <workdir>/profile.
    SIGTERM: saves after the iteration under way and returns. Raises: UserError on bad input, before anything is written.
    On several hosts only the first writes, checkpoints apart, and has a summary; SIGTERM to any of them stops all.
    """
    run = make_run(config)
    try:
        return train_run(run, workdir, allow_config_change=allow_config_change, profiled=profiled)
    finally:
        run.task.close()


def train_run(
    run: Run, workdir: pathlib.Path, *, allow_config_change: bool = False, profiled: range | None = None
) -> dict[str, Any] | None:
    """`train` for a run that is built already."""
    profiler = Profiler(workdir / "profile", profiled if hosts.is_first() else None)
    with open_run(run, workdir, profiler, allow_config_change=allow_config_change) as (loop, state, resumed), loop.stop:
        loop.go(state, resumed)
    return finalize_run(run.config, workdir) if hosts.is_first() else None


@contextlib.contextmanager
def open_run(
    run: Run, workdir: pathlib.Path, profiler: Profiler, *, allow_config_change: bool
) -> Iterator[tuple[Loop, TrainState, int | None]]:
    """-> (the run's loop over its open files, its state, the step of the checkpoint that it goes on from or None)."""
    # A fresh run's weights come first: if they are bad, nothing is written. A run that resumes does without them.
    is_begun, is_ended = hosts.broadcast_from_process0(
        np.asarray([(workdir / name).exists() for name in ("checkpoints", "summary.json")])
    )
    if is_ended and not is_begun:
        raise UserError(
            f"--workdir={workdir}: its run has ended and its checkpoints are gone (config.checkpoint.keep = 0 keeps none), so "
            "there is nothing to go on from; use another folder"
        )
    state = None if is_begun else announce_and_make_initial_state(run)
    init_workdir(workdir, run.config.to_dict(), allow_config_change=allow_config_change)
    checkpointer = Checkpointer(workdir, run.config.checkpoint)
    resumed = checkpointer.latest_step()
    if resumed is not None:
        state = restore_state(run, checkpointer, resumed)
    elif state is None:  # killed before its first checkpoint
        state = announce_and_make_initial_state(run)
    log = RunLog(workdir, -1 if resumed is None else resumed, run.config.num_steps) if hosts.is_first() else None
    try:
        yield Loop(run, log, checkpointer, StopSignal(), profiler), state, resumed
    finally:
        if log:
            log.close()
        checkpointer.close()


def announce_and_make_initial_state(run: Run) -> TrainState:
    """`initial_state`, with a line for those who wait for it."""
    config = run.config
    what = "loading weights" if config.model.path else f"warm start, {config.warm_start.num_steps} supervised steps"
    if hosts.is_first():
        where = f"{run.mesh.size} device(s)" + (f" of {num} processes" if (num := jax.process_count()) > 1 else "")
        print(f"{objectives.describe(config.objective)} on {where}: {what}, then compiling", file=sys.stderr)
    return initial_state(run)


class StopSignal:
    """While it is entered, SIGTERM asks the loop to save and end; the handler itself only takes note."""

    is_set = False

    def __enter__(self) -> StopSignal:
        self._previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "is_set", True))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)


@dataclasses.dataclass
class Profiler:
    """Traces the calls that end with one of `steps`, each by itself."""

    folder: pathlib.Path
    steps: range | None

    def __call__(self, step: int) -> contextlib.AbstractContextManager[Any]:
        is_traced = self.steps is not None and step in self.steps
        return jax.profiler.trace(str(self.folder)) if is_traced else contextlib.nullcontext()


@dataclasses.dataclass
class PendingMetrics:
    """What is known of the steps of one call before it is in the records. timing: of each; evaluated: after the last."""

    last_step: int
    steps: list[dict[str, Any]]
    timing: dict[str, float]
    evaluated: dict[str, float]


@dataclasses.dataclass
class Loop:
    """Iterations, with evaluation, logging and saving between them. log: None on hosts that do not write."""

    run: Run
    log: RunLog | None
    checkpointer: Checkpointer
    stop: StopSignal
    profiler: Profiler

    def go(self, state: TrainState, resumed: int | None) -> None:
        """From step `resumed` (None: the beginning) to the end, or to a SIGTERM."""
        state = self.begin(state, resumed)
        unwritten: PendingMetrics | None = None
        for step in self.calls(resumed):
            if hosts.any_process(self.stop.is_set):
                break
            with self.profiler(step):
                state, batch, unwritten = self.iterate(state, step, unwritten)
            unwritten = self.after(state, batch, unwritten)
        self.end(state, unwritten)

    def calls(self, resumed: int | None) -> range:
        """The last step of each call."""
        num = max(self.run.config.steps_per_call, 1)
        return range((resumed or 0) + num, self.run.config.num_steps + 1, num)

    def begin(self, state: TrainState, resumed: int | None) -> TrainState:
        """A fresh run is evaluated before its first step; with async_steps its first batch is sampled, nothing beside it."""
        if resumed is not None:
            return state
        values = to_metrics(self.run.evaluate(state.policy))
        if self.run.config.async_steps:
            state, sampled = prefetch_first_batch(self.run.collect, state)
            values |= metrics_lib.to_floats(sampled)
        self.write(0, values)
        return state

    def after(self, state: TrainState, batch: Batch, unwritten: PendingMetrics) -> PendingMetrics | None:
        """What is due after a call: completions, evaluation, saving. -> its records, if they are left to be written.

        The record of a step is written while the next one computes.
        """
        config, step = self.run.config, unwritten.last_step
        if config.log.completions_every and step % config.log.completions_every == 0:
            adv_PGT, grpo_PG = self.run.advantage_diagnostics(batch)
            rows = completion_rows(batch, adv_PGT, grpo_PG, self.run.task.tokenizer, config.log.num_groups)
            if self.log:
                self.log.completions(step, rows)
        is_last = step == config.num_steps
        if is_last or (config.eval_every and step % config.eval_every == 0):
            unwritten.evaluated = to_metrics(self.run.evaluate(state.policy))
        if is_last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            self.end(state, unwritten)
            return None
        return unwritten

    def end(self, state: TrainState, unwritten: PendingMetrics | None) -> None:
        """Everything is on disk."""
        self.flush_pending(unwritten)
        self.save(state)

    def iterate(self, state: TrainState, step: int, unwritten: PendingMetrics | None):
        """One call, up to step `step`; what was left unwritten is written while the device works."""
        began = time.monotonic()
        timing: dict[str, float] = {}
        if self.run.config.steps_per_call:
            state, batch, metrics = self.run.iterate(state)
            self.flush_pending(unwritten)
            jax.block_until_ready(state.step)
            steps = metrics_lib.unstack_metrics(jax.device_get(metrics), self.run.config.steps_per_call)
        elif self.run.config.async_steps:
            state, batch, metrics = self.run.async_step(state)
            self.flush_pending(unwritten)
            jax.block_until_ready(state.step)
            steps = [metrics]
        else:
            state, batch, sampled = self.run.collect(state)
            self.flush_pending(unwritten)
            jax.block_until_ready(batch)
            timing["time/rollout_secs"] = time.monotonic() - began
            state, updated = self.run.update(state, batch)
            jax.block_until_ready(state.step)
            timing["time/update_secs"] = time.monotonic() - began - timing["time/rollout_secs"]
            steps = [metrics_lib.merge(sampled, updated)]
        timing["time/step_secs"] = (time.monotonic() - began) / len(steps)
        return state, batch, PendingMetrics(step, steps, timing, {})

    def flush_pending(self, unwritten: PendingMetrics | None) -> None:
        """Read the metrics of a call's steps off the device and write their records."""
        if unwritten is None:
            return
        first = unwritten.last_step - len(unwritten.steps) + 1
        for step, metrics in enumerate(unwritten.steps, first):
            num_tokens = float(metrics["completion/length_mean"].total)
            values = {**metrics_lib.to_floats(metrics), **unwritten.timing}
            values["tokens/s"] = num_tokens / unwritten.timing["time/step_secs"]
            self.write(step, values | unwritten.evaluated if step == unwritten.last_step else values)

    def write(self, step: int, values: dict[str, float]) -> None:
        if self.log:
            self.log.metrics(step, values)

    def save(self, state: TrainState) -> None:
        """The log first, then the checkpoint: a resumed run then never lacks a record."""
        if self.log:
            self.log.flush()
        self.checkpointer.save(int(state.step), state, self.run.config.to_dict())


def finalize_run(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """What is left to do for a run whose files are closed: its summary; checkpoints only for as long as they are wanted."""
    summary = summarise(config, workdir)
    if not config.checkpoint.keep and summary["steps"] == config.num_steps:
        shutil.rmtree(workdir / "checkpoints")
    return summary


def summarise(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Write summary.json and learning_curve.png from the run's records; -> the summary."""
    records = read_metrics(workdir)
    evaluated = [record for record in records if "eval/success" in record]
    summary: dict[str, Any] = {
        "steps": records[-1]["step"] if records else 0,
        "success_before": evaluated[0]["eval/success"],
        "success_after": evaluated[-1]["eval/success"],
        "training_secs": sum(record.get("time/step_secs", 0.0) for record in records),
        **provenance(),
    }
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    learning_curve(records, objectives.describe(config.objective), workdir / "learning_curve.png")
    return summary
