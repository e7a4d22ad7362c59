"""The loop around the pure core: calls of compiled functions, and between them evaluation, records and checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax import metrics as metrics_lib
from grpo_jax.config import Config
from grpo_jax.errors import RunError, UserError
from grpo_jax.learner.optimizer import learning_rates
from grpo_jax.metrics import Mean, Metric
from grpo_jax.parallel import hosts
from grpo_jax.tasks import data_metrics
from grpo_jax.tasks.host import REWARD_ERRORS, HostTask
from grpo_jax.training import build
from grpo_jax.training.callbacks import Callbacks
from grpo_jax.training.checkpoint import Checkpointer
from grpo_jax.training.completions import completion_rows
from grpo_jax.training.data_record import note_data, pin_template_date
from grpo_jax.training.disk import faults_in_one_line, require_place, require_room
from grpo_jax.training.evaluate import to_metrics
from grpo_jax.training.guard import SkippedSteps, find_fault
from grpo_jax.training.iteration import prefetch_first_batches
from grpo_jax.training.lock import Lock, held
from grpo_jax.training.memory import require_memory, require_memory_together
from grpo_jax.training.phases import announced_initial_state, phase, say_first_call
from grpo_jax.training.profiler import Profiler
from grpo_jax.training.run import Run, make_run
from grpo_jax.training.runlog import RunLog, read_metrics
from grpo_jax.training.settings import FROM_WHERE_IT_IS, Start, check_sources, init_workdir
from grpo_jax.training.signals import StopSignal
from grpo_jax.training.stacking import places_of, several_of, share_base, stack_states, unstack, with_place
from grpo_jax.training.summary import finalize_run
from grpo_jax.training.together import CollectTogether
from grpo_jax.training.trackers import make_callbacks
from grpo_jax.types import Batch, TrainState


def train(
    config: Config,
    workdir: pathlib.Path,
    start: Start = FROM_WHERE_IT_IS,
    *,
    profiled: range | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any] | None:
    """Run `config` in `workdir` from where it left off.

    SIGTERM, SIGHUP, SIGINT: saves after the iteration under way and returns; a second SIGINT ends at once. On several hosts
    only the first writes, checkpoints apart, and has a summary; a signal to any of them stops all.

    Args:
      config: of the run. workdir: its folder, new or that of the same run.
      start: what to go on from, in a folder that holds its beginning.
      profiled: steps whose calls jax.profiler traces into <workdir>/profile.
      callbacks: objects as `callbacks.Callback`, beside those that config.log names.
    Returns: the summary that is also written to summary.json; None on hosts that do not write.
    Raises: UserError on bad input, before anything is written.
    """
    run = make_run(pin_template_date(config, [workdir]))
    try:
        return train_run(run, workdir, start, profiled=profiled, callbacks=callbacks)
    finally:
        run.task.close()


def train_run(
    run: Run,
    workdir: pathlib.Path,
    start: Start = FROM_WHERE_IT_IS,
    *,
    profiled: range | None = None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any] | None:
    """`train` for a run that is built already.

    Args:
      run: from `make_run`. workdir, start, profiled, callbacks: as in `train`.
    Returns: the summary, or None on hosts that do not write.
    """
    if isinstance(run.task, HostTask):
        run.task.keep_errors_in(workdir / REWARD_ERRORS)
    if not hosts.is_first():
        profiled = None
    profiler = Profiler(workdir / "profile", profiled)
    return train_members(run, [run], [workdir], profiler, start, callbacks)[0]


def train_vmapped(runs: Sequence[Run], workdirs: Sequence[pathlib.Path]) -> list[str]:
    """`train` for runs of one joint key, in one program: every call advances all, and each leaves its own ordinary folder.

    A step takes as long as the slowest run of it, and its recorded seconds are the share of one run. SIGTERM saves all.

    Args:
      runs: from `Run.with_config`. workdirs: one for each.
    Returns: why each could not go on; "" for one that did.
    Raises: RunError if the runs are not all at one step; UserError if they do not fit together.
    """
    profiler = Profiler(workdirs[0], None)
    configs = [run.config for run in runs]
    fns = runs[0].vmapped(shares_base=share_base(configs), several=several_of(configs))
    require_memory_together(fns, len(runs))
    if not runs[0].task.is_traceable:
        fns = dataclasses.replace(fns, collect=CollectTogether(runs, workdirs, shares_base=fns.shares_base))
    summaries = train_members(fns, runs, workdirs, profiler, FROM_WHERE_IT_IS)
    return [(summary or {}).get("error", "") for summary in summaries]


def train_members(
    fns: Run,
    runs: Sequence[Run],
    workdirs: Sequence[pathlib.Path],
    profiler: Profiler,
    start: Start,
    callbacks: Sequence[Any] = (),
) -> list[dict[str, Any] | None]:
    """Open the folders of some runs, loop, and finish each.

    Args:
      fns: its functions advance them: the only run itself, or one that is vmapped. runs, workdirs: the members.
      profiler: of the calls. start, callbacks: as in `train`.
    Returns: their summaries; None for each on hosts that do not write, {"error": why} for one of several that cannot go on.
    Raises: RunError if the runs are not all at one step, or a single one cannot go on.
    """
    with contextlib.ExitStack() as stack:
        opened = []
        for run, workdir in zip(runs, workdirs, strict=True):
            member, state, step = stack.enter_context(open_run(run, workdir, start, callbacks))
            if fns.shares_base and opened:  # at once: there is never more than one copy beside the shared one
                state = dataclasses.replace(state, base=opened[0][1].base)
            opened.append((member, state, step))
        members, states, resumed = zip(*opened, strict=True)
        # One call advances all members, and the step of a call decides what is due after it: they must be at the same one.
        if len(set(resumed)) > 1:
            # One of them fell back on an older checkpoint: the next start puts runs of one step together.
            raise RunError(f"runs at different steps cannot go on together, {resumed}; start the sweep again")
        stop = stack.enter_context(StopSignal())
        stop.speaks = hosts.is_first()
        Loop(fns, members, stop, profiler).run(list(states), resumed[0])
    # Here logs and checkpoints are closed, which waits for saves under way: the summary reads records, and checkpoints may go.
    # Of several in one program, those that cannot go on stop no other, and each says why.
    if len(runs) == 1 and members[0].error:
        raise RunError(members[0].error)
    if not hosts.is_first():
        return [None] * len(runs)
    return [finalize_member(member, workdir) for member, workdir in zip(members, workdirs, strict=True)]


@contextlib.contextmanager
def open_run(
    run: Run, workdir: pathlib.Path, start: Start, callbacks: Sequence[Any]
) -> Iterator[tuple[Member, TrainState, int | None]]:
    """Open a run's files.

    Args:
      run: built. workdir: its folder. start, callbacks: as in `train`.
    Returns: (the run with its open files, its state, the step of the checkpoint it resumes from or None).
    Raises: UserError if there is nothing to resume from, the folder is another config's or another process's.
    """
    require_place(workdir)  # nobody wants to learn it after a warm start
    with faults_in_one_line(workdir, run.abstract_state), contextlib.ExitStack() as stack:
        told = Callbacks([])
        if hosts.is_first():
            told = make_callbacks(run.config.log, callbacks)
        # A fresh run's weights come first: if they are bad, nothing is written. A run that resumes does without them.
        require_memory(run)
        state = None
        if not is_begun(workdir):
            state = announced_initial_state(run)
        lock = None
        if hosts.is_first():
            lock = stack.enter_context(held(workdir))
        init_workdir(workdir, run.config.to_dict(), start)
        check_sources(workdir, build.sources_of(run.config), start, reads_again=run.reads_again)
        if hosts.is_first():
            note_data(workdir, run.task)
            require_room(workdir, run.abstract_state, run.config.checkpoint.keep)
        checkpointer = Checkpointer(workdir, run.config.checkpoint)
        stack.callback(checkpointer.close)
        resumed = None
        restore = functools.partial(run.restore_state, checkpointer)
        found = checkpointer.restore_newest(restore, start.step, is_strict=start.is_strict)
        if found is not None:
            resumed, state = found
        elif state is None:  # killed before its first checkpoint
            state = announced_initial_state(run)
        # The log is opened last, because this removes the records beyond the checkpoint, which must have been read.
        log = None
        if hosts.is_first():
            log = RunLog(workdir, -1 if resumed is None else resumed, run.config.num_steps, told)
            stack.callback(log.close)
            told.tell("on_start", run.config, workdir, resumed)
        member = Member(run, log, checkpointer, lock, told)
        if run.config.checkpoint.keep_best and resumed is not None:
            for record in read_metrics(workdir):
                evaluated = {name: value for name, value in record.items() if name.startswith("eval/")}
                if record["step"]:  # there is no checkpoint of step 0
                    member.note_best(int(record["step"]), evaluated)
        yield member, state, resumed


def is_begun(workdir: pathlib.Path) -> bool:
    """Tell if a folder may hold checkpoints. Raises UserError if it is that of a run that has ended and left none."""
    # All processes take the first one's word, since they compute the weights together and a file may show late on one host.
    names = ("checkpoints", "summary.json")
    has_checkpoints, is_ended = hosts.broadcast_from_process0(np.asarray([(workdir / name).exists() for name in names]))
    if is_ended and not has_checkpoints:
        raise UserError(
            f"--workdir={workdir}: its run has ended and its checkpoints are gone (config.checkpoint.keep = 0 keeps none), so "
            "there is nothing to go on from; use another folder"
        )
    return bool(has_checkpoints)


@dataclasses.dataclass
class PendingMetrics:
    """The steps of one call before they are in the records. timing: of each; evaluated: after the last."""

    last_step: int
    steps: list[dict[str, Metric]]
    timing: dict[str, float]
    evaluated: dict[str, float]


@dataclasses.dataclass
class Member:
    """A run with its open files. It writes between calls. log, lock: None on hosts that do not write.

    pending: the metrics of the newest call. They are read and written while the next one computes.
    skipped: its updates that were left out. error: why it cannot go on; "" while it can. It writes nothing from then on.
    saved: the step of its newest checkpoint, None before the first.
    """

    run: Run
    log: RunLog | None
    checkpointer: Checkpointer
    lock: Lock | None = None
    callbacks: Callbacks = dataclasses.field(default_factory=lambda: Callbacks([]))
    pending: PendingMetrics | None = None
    error: str = ""
    saved: int | None = None

    def __post_init__(self) -> None:
        self.skipped, self.best = SkippedSteps(self.run.config), -math.inf
        self.learning_rates = learning_rates(self.run.config)

    def begin(self, state: TrainState) -> TrainState:
        """Evaluate a fresh run before its first step; with async_steps sample its first batches, with nothing beside them."""
        with phase("held-out evaluation before training, sampling compiled"):
            values = {**data_metrics(self.run.task), **to_metrics(self.run.evaluate(state.policy))}
        if self.run.config.async_steps:
            state, sampled = prefetch_first_batches(self.run.collect, state)
            values |= metrics_lib.to_floats(sampled)
        self.write(0, values)
        return state

    def after_step(self, state: TrainState, batch: Batch, pending: PendingMetrics) -> None:
        """Do what is due after a call: completions, evaluation, saving.

        Args:
          state, batch: as the call left them. pending: its metrics; written here if the state is saved, else in the next call.
        """
        if self.error:
            return
        config, step = self.run.config, pending.last_step
        # Not read yet: the next call is put on the device's queue first, and then the host has time to write.
        self.pending = pending
        if config.log.completions_every and step % config.log.completions_every == 0:
            # In every process, though only the first writes: rows of all of them are gathered.
            adv_PGT, grpo_PG = self.run.advantages(batch, state.adapted)
            rows = completion_rows(batch, adv_PGT, grpo_PG, self.run.task.tokenizer, config.log.num_groups)
            if self.log:
                self.log.completions(step, rows)
        is_last = step == config.num_steps
        if is_last or (config.eval_every and step % config.eval_every == 0):
            pending.evaluated = to_metrics(self.run.evaluate(state.policy))
        # After the evaluation, because saving writes the pending record, and the evaluation belongs into it.
        is_best = self.note_best(step, pending.evaluated)
        if is_last or is_best or (config.checkpoint.every and step % config.checkpoint.every == 0):
            self.save(state)

    def note_best(self, step: int, values: Mapping[str, float]) -> bool:
        """Note the step if it is the best so far by config.checkpoint.keep_best, and tell if it is."""
        name = self.run.config.checkpoint.keep_best
        if name and values and name not in values:
            raise UserError(f"config.checkpoint.keep_best = {name!r}: not evaluated; there are: {', '.join(values)}")
        # NaN is above nothing. Of equal ones the first stays.
        is_best = bool(name) and values.get(name, -math.inf) > self.best
        if is_best:
            self.best, self.checkpointer.best.step = values[name], step
        return is_best

    def flush_pending(self) -> None:
        """Read the metrics of a call's steps off the device and write their records."""
        # Taken before it is written: `Loop.advance` and `save` both flush, and no record may be there twice.
        pending, self.pending = self.pending, None
        if pending is None or self.error:
            return
        first = pending.last_step - len(pending.steps) + 1
        for step, metrics in enumerate(pending.steps, first):
            lengths = metrics["completion/length_mean"]
            assert isinstance(lengths, Mean)  # its total is the number of tokens
            num_tokens = float(lengths.total)
            values = {**metrics_lib.to_floats(metrics), **pending.timing}
            values["tokens/s"] = num_tokens / pending.timing["time/step_secs"]
            values["optimizer/learning_rate"] = float(self.learning_rates[step])
            if step == pending.last_step:
                values |= pending.evaluated
            self.write(step, values)
            self.watch(step, values)

    def watch(self, step: int, values: dict[str, float]) -> None:
        """Say which updates were left out, and note when they are too many."""
        said = self.skipped.count(step, values)
        if said and self.log:
            self.log.note(said)
        if self.skipped.are_too_many and not self.error:
            num = self.skipped.num
            self.error = (
                f"{said}. Stopped: {num} step(s) in a row, as config.optimizer.max_skipped_steps = {num} asks; the weights are "
                f"those after step {step - num}, and no checkpoint was written since"
            )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Add a record."""
        if self.lock:
            self.lock.check()
        if self.log:
            self.log.metrics(step, values)

    def save(self, state: TrainState) -> None:
        """Put everything on disk."""
        # The log first, then the checkpoint. A kill between the two leaves records beyond the checkpoint, which the resumed run
        # removes and writes again; the other way round, the pending step would never have a record.
        self.flush_pending()
        step = int(state.step)
        # The last good checkpoint must not make room for a bad one.
        if self.error or not self.is_finite(step, state):
            return
        if self.log:
            self.log.flush()
        self.checkpointer.save(step, state, self.run.config.to_dict())
        # At its end, or after a signal, a run saves again what it may just have saved.
        if self.saved != step:
            self.saved = step
            self.callbacks.tell("on_save", self.saved)

    def is_finite(self, step: int, state: TrainState) -> bool:
        """Look at what would be saved, and say what is not finite; weights that are not end the run."""
        fault, is_lasting = ("", False) if self.saved == step else find_fault(state)
        if is_lasting:
            self.error = f"step {step}: {fault}. Stopped, and no checkpoint was written of it"
        elif fault and self.log:
            self.log.note(f"step {step}: not saved, {fault}")
        return not fault


@dataclasses.dataclass
class Loop:
    """Calls of compiled functions, with evaluation, logging and saving between them, for one run or for many in lockstep.

    fns: a run whose functions advance all members: with several of them, stacked on a leading axis.
    """

    fns: Run
    members: Sequence[Member]
    stop: StopSignal
    profiler: Profiler
    is_first_call: bool = True  # which compiles

    def run(self, states: list[TrainState], resumed: int | None) -> None:
        """Go from step `resumed` (None: the beginning) to the end, or to a SIGTERM."""
        if resumed is None:
            states = [member.begin(state) for member, state in zip(self.members, states, strict=True)]
        places = places_of([member.run.config for member in self.members], self.fns.several)
        state = stack_states(states, shares_base=self.fns.shares_base, places=places)
        del states  # the calls donate it
        done = resumed or 0
        for step in self.calls(resumed):
            # A signal reaches the processes at different times, or only one of them. One that left the loop by itself would
            # leave the others waiting in the next call's collectives, so all are asked, and all stop at the same step.
            if hosts.any_process(self.stop.is_set or any(member.callbacks.is_stop_asked for member in self.members)):
                break
            self.stop.doing = self.describe_wait(step)
            with self.profiler(step):
                state, batch, pending = self.advance(state, step, num_steps=step - done)
            done = step
            each = zip(self.members, self.states_of(state), self.unstack(batch), pending, strict=True)
            for member, member_state, member_batch, member_pending in each:
                member.after_step(member_state, member_batch, member_pending)
            if all(member.error for member in self.members):
                break
        # After a SIGTERM this is the save that was asked for; at the end of a run the step is saved already.
        for member, member_state in zip(self.members, self.states_of(state), strict=True):
            member.save(member_state)

    def calls(self, resumed: int | None) -> range:
        """Return the last step of each call: multiples of steps_per_call, for what is due between calls falls on these."""
        num = max(self.fns.config.steps_per_call, 1)
        return range(((resumed or 0) // num + 1) * num, self.fns.config.num_steps + 1, num)

    def describe_wait(self, step: int) -> str:
        """Say what one waits for who wants the run to end now."""
        config = self.fns.config
        if self.fns.task.is_traceable:
            return f"step {step}"
        limit = config.reward.scoring.time_limit_secs
        return (
            f"step {step} is sampled, scored and trained on (config.reward.scoring.time_limit_secs = {limit:g} for an answer)"
        )

    def advance(self, state: TrainState, step: int, num_steps: int) -> tuple[TrainState, Batch, list[PendingMetrics]]:
        """Make one call; metrics pending from the call before are written while the device works.

        Args:
          state: donated. step: the last one of the call. num_steps: in it; 1 without steps_per_call.
        Returns: (the state after it, the last batch, each member's metrics).
        """
        # Calls return as soon as they are queued. Reading this call's metrics would wait for it, and the device would be idle
        # while they are written; those of the call before are there already. So records are one call late, and are written
        # before the host blocks.
        config, began = self.fns.config, time.monotonic()
        timing: dict[str, float] = {}
        if config.steps_per_call:
            # Fewer where a run goes on from a step that no call ends at, for it had another steps_per_call before.
            iterate = self.fns.iterate if num_steps == config.steps_per_call else self.fns.iterate_once(num_steps)
            state, batch, metrics = iterate(state)
        elif config.async_steps:
            state, batch, metrics = self.fns.async_step(state)
        else:
            state, batch, sampled = self.fns.collect(state)
            self.flush_pending()
            # Only to time the halves apart: the update could be queued behind the rollout.
            jax.block_until_ready(batch)
            timing["time/rollout_secs"] = time.monotonic() - began
            state, updated = self.fns.update(state, batch)
            metrics = metrics_lib.merge(sampled, updated)
        self.flush_pending()
        # For the time of the step, and so that no more than one call is ever on the queue.
        jax.block_until_ready(state.step)
        secs = time.monotonic() - began
        if timing:
            timing["time/update_secs"] = secs - timing["time/rollout_secs"]
        if self.is_first_call:
            self.is_first_call = False
            say_first_call(timing, secs)
        timing["time/step_secs"] = secs / num_steps
        # Each member's record has its share, so that the seconds of a sweep's runs add up to what the sweep took.
        timing = {name: each / len(self.members) for name, each in timing.items()}
        return state, batch, [PendingMetrics(step, steps, timing, {}) for steps in self.steps_of(metrics, num_steps)]

    def steps_of(self, metrics: dict[str, Metric], num_steps: int) -> list[list[dict[str, Metric]]]:
        """Split the metrics of a call of num_steps: for each member, those of its steps."""
        is_chained = self.fns.config.steps_per_call > 0
        # Stacked ones are read in one transfer: on the device, each step of each metric would be a slice of its own.
        if is_chained or len(self.members) > 1:
            metrics = jax.device_get(metrics)
        each = self.unstack(metrics)
        if self.fns.several:  # of which each has metrics that others have not
            of_any = frozenset().union(*(member.run.update_metrics for member in self.members))
            others = [of_any - member.run.update_metrics for member in self.members]
            each = [{k: v for k, v in one.items() if k not in drop} for one, drop in zip(each, others, strict=True)]
        if not is_chained:
            return [[one] for one in each]
        return [metrics_lib.unstack_metrics(one, num_steps) for one in each]

    def flush_pending(self) -> None:
        """Flush the pending records of all members."""
        for member in self.members:
            member.flush_pending()

    def states_of(self, state: TrainState) -> list[TrainState]:
        """Split a stacked state into the members', each as its run alone would have it."""
        states = unstack(state, len(self.members), shares_base=self.fns.shares_base)
        return [with_place(state, None) for state in states]

    def unstack(self, tree: Any) -> list[Any]:
        """Split a stacked batch or metrics into the members'."""
        return unstack(tree, len(self.members))


def finalize_member(member: Member, workdir: pathlib.Path) -> dict[str, Any]:
    """Finish a run of which all files are closed; -> its summary, or {"error": why it could not go on}."""
    if member.error:
        return {"error": member.error}
    with faults_in_one_line(workdir, member.run.abstract_state):
        summary = finalize_run(member.run.config, workdir, member.callbacks.num_errors)
    member.callbacks.tell("on_end", summary)
    return summary
