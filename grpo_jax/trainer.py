"""The loop around the pure core: the only file that may know every other."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import signal
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from grpo_jax import build, credit, objectives
from grpo_jax import metrics as metrics_lib
from grpo_jax.checkpoint import Checkpointer, claim_workdir, write_atomically
from grpo_jax.completions import completion_rows
from grpo_jax.config import Config
from grpo_jax.dynamic_sampling import empty_buffer
from grpo_jax.errors import UserError
from grpo_jax.evaluate import Evaluate, make_evaluate
from grpo_jax.iteration import Collect, make_collect, make_iteration, make_rollout
from grpo_jax.models.transformer import ModelDef, init_params
from grpo_jax.optimizer import make_optimizer
from grpo_jax.plots import learning_curve
from grpo_jax.runlog import ProgressLine, RunLog, read_metrics
from grpo_jax.sharding import REPLICATED, make_mesh
from grpo_jax.tasks import Task
from grpo_jax.train_step import make_train_step
from grpo_jax.types import Batch, Params, TrainState


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run, bound to one config. collect, update and iterate are compiled; each donates the state."""

    config: Config
    mesh: Mesh
    task: Task
    model: ModelDef
    optimizer: optax.GradientTransformation
    collect: Collect
    update: Any
    iterate: Any
    evaluate: Evaluate


def make_run(config: Config) -> Run:
    """Config -> Run. Reads the task's data and the model's config.json; loads no weights. Raises UserError on bad input."""
    mesh = make_mesh(config.mesh)
    require_divisible(config, mesh)
    task = build.make_task(config)
    model = build.make_model(config, task.tokenizer)
    optimizer = make_optimizer(config.optimizer, config.num_updates)
    spec = build.rollout_spec(config, task)
    collect = make_collect(config, task, make_rollout(model, spec, mesh), mesh)
    train_step = make_train_step(model, optimizer, build.update_spec(config), mesh)
    everywhere = NamedSharding(mesh, REPLICATED)
    return Run(
        config=config,
        mesh=mesh,
        task=task,
        model=model,
        optimizer=optimizer,
        collect=jax.jit(collect, donate_argnums=0, out_shardings=(everywhere, None, None)) if task.is_traceable else collect,
        update=jax.jit(train_step, donate_argnums=0, out_shardings=(everywhere, None)),
        iterate=jax.jit(make_iteration(collect, train_step), donate_argnums=0, out_shardings=(everywhere, None, None)),
        evaluate=make_evaluate(config, task, model, spec, mesh),
    )


def require_divisible(config: Config, mesh: Mesh) -> None:
    """Every device gets as many whole groups as the others, in every minibatch and microbatch. Raises UserError."""
    prompts, learner = config.rollout.num_prompts, config.learner
    in_minibatch = prompts // learner.num_minibatches
    if in_minibatch % mesh.size:
        raise UserError(
            f"config.rollout.num_prompts = {prompts} in config.learner.num_minibatches = {learner.num_minibatches}: "
            f"{in_minibatch} groups do not divide over {mesh.size} devices; use a multiple, or set config.mesh.data"
        )
    groups, cuts = in_minibatch // mesh.size, learner.num_microbatches
    if groups % cuts and (cuts % groups or config.rollout.group_size % (cuts // groups)):
        raise UserError(
            f"config.learner.num_microbatches = {cuts}: must divide a device's {groups} groups, "
            f"or be a multiple of them that also divides group_size = {config.rollout.group_size}"
        )


def initial_state(run: Run) -> TrainState:
    """The state at step 0: weights loaded or warm-started, on every device."""
    everywhere = NamedSharding(run.mesh, REPLICATED)
    params = jax.device_put(build.initial_params(run.config, run.model, run.task), everywhere)
    return jax.device_put(state_around(run, params), everywhere)


def abstract_state(run: Run) -> TrainState:
    """Shapes and places of the state, to restore a checkpoint into: no weights are loaded, nothing is warm-started."""
    everywhere = NamedSharding(run.mesh, REPLICATED)
    shapes = jax.eval_shape(lambda key: state_around(run, init_params(run.model.arch, key)), jax.random.key(0))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)


def state_around(run: Run, params: Params) -> TrainState:
    """Step 0 with these parameters."""
    config = run.config
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=run.optimizer.init(params),
        ref_params=jax.tree.map(jnp.copy, params) if config.objective.kl_coef > 0 else None,
        num_prompts_drawn=jnp.int32(0),
        pending=empty_buffer(example_batch(run, params)) if config.dynamic_sampling.enabled else None,
    )


def example_batch(run: Run, params: Params) -> Batch:
    """The shapes of a batch, without computing one."""
    P, G = run.config.rollout.num_prompts, run.config.rollout.group_size
    rollout_fn = make_rollout(run.model, build.rollout_spec(run.config, run.task), run.mesh)
    rollout = jax.eval_shape(rollout_fn, params, run.task.train_prompts(0, P), jax.random.key(0))
    row = jax.ShapeDtypeStruct((P, G), jnp.float32)
    return Batch(rollout, row, row, jax.ShapeDtypeStruct((P,), jnp.int32))


def train(config: Config, workdir: pathlib.Path, *, allow_config_change: bool = False) -> dict[str, float]:
    """Run `config` in `workdir` from where it left off; -> the summary that is also written to summary.json.

    SIGTERM: saves after the iteration under way and returns. Raises: UserError on bad input, before anything is written.
    """
    run = make_run(config)
    try:
        # A fresh run's weights come first: if they are bad, nothing is written. A run that resumes does without them.
        state = None if (workdir / "checkpoints").is_dir() else announced_initial_state(run)
        claim_workdir(workdir, config.to_dict(), allow_config_change=allow_config_change)
        checkpointer = Checkpointer(workdir, config.checkpoint)
        resumed = checkpointer.latest_step()
        if resumed is not None:
            state = checkpointer.restore(resumed, abstract_state(run))
        elif state is None:  # killed before its first checkpoint
            state = announced_initial_state(run)
        start = resumed or 0
        log, progress = RunLog(workdir, start if resumed is not None else -1), ProgressLine(start, config.num_steps)
        try:
            with StopSignal() as stop:
                Loop(run, log, progress, checkpointer, stop).go(state, start, is_fresh=resumed is None)
        finally:
            progress.close()
            log.close()
            checkpointer.close()
    finally:
        run.task.close()
    return summarise(config, workdir)


def announced_initial_state(run: Run) -> TrainState:
    """`initial_state`, with a line for those who wait for it."""
    config = run.config
    what = "loading weights" if config.model.path else f"warm start, {config.warm_start.num_steps} supervised steps"
    print(f"{objectives.describe(config.objective)} on {run.mesh.size} device(s): {what}, then compiling", file=sys.stderr)
    return initial_state(run)


class StopSignal:
    """SIGTERM asks the loop to save and end; the handler itself only takes note."""

    def __enter__(self) -> StopSignal:
        self.is_set = False
        self._previous = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "is_set", True))
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)


@dataclasses.dataclass
class Loop:
    """Iterations, with evaluation, logging and saving between them."""

    run: Run
    log: RunLog
    progress: ProgressLine
    checkpointer: Checkpointer
    stop: StopSignal

    def go(self, state: TrainState, start: int, *, is_fresh: bool) -> None:
        """From step `start` to the end, or to a SIGTERM. The record of a step is written while the next one computes."""
        config = self.run.config
        recorded_advantages = jax.jit(
            functools.partial(credit.recorded_advantages, config.objective, filter_truncated=config.overlong.filter)
        )
        if is_fresh:
            self.write(0, self.run.evaluate(state.params))
        unwritten: tuple[int, dict[str, Any], dict[str, float]] | None = None
        for step in range(start + 1, config.num_steps + 1):
            if self.stop.is_set:
                break
            state, batch, metrics, timing = self.iterate(state, unwritten)
            unwritten = (step, metrics, timing)
            if config.log.completions_every and step % config.log.completions_every == 0:
                adv_PGT, grpo_PG = recorded_advantages(batch)
                rows = completion_rows(batch, adv_PGT, grpo_PG, self.run.task.tokenizer, config.log.num_groups)
                self.log.completions(step, rows)
            is_last = step == config.num_steps
            if is_last or (config.eval_every and step % config.eval_every == 0):
                timing.update(self.run.evaluate(state.params))
            if is_last or (config.checkpoint.every and step % config.checkpoint.every == 0) or self.stop.is_set:
                self.write_out(unwritten)
                unwritten = None
                self.save(state)
        self.write_out(unwritten)
        self.save(state)

    def iterate(self, state: TrainState, unwritten: Any):
        """One iteration; what was left unwritten is written while the device works."""
        began = time.monotonic()
        timing: dict[str, float] = {}
        if self.run.config.one_call and self.run.task.is_traceable:
            state, batch, metrics = self.run.iterate(state)
            self.write_out(unwritten)
            jax.block_until_ready(state.step)
        else:
            state, batch, sampled = self.run.collect(state)
            self.write_out(unwritten)
            jax.block_until_ready(batch)
            timing["time/rollout_secs"] = time.monotonic() - began
            state, updated = self.run.update(state, batch)
            jax.block_until_ready(state.step)
            timing["time/update_secs"] = time.monotonic() - began - timing["time/rollout_secs"]
            metrics = metrics_lib.merge(sampled, updated)
        timing["time/step_secs"] = time.monotonic() - began
        return state, batch, metrics, timing

    def write_out(self, unwritten: Any) -> None:
        """Read a step's metrics off the device and write its record."""
        if unwritten is None:
            return
        step, metrics, extra = unwritten
        num_tokens = float(metrics["completion/length_mean"].total)
        values = {**metrics_lib.to_floats(metrics), **extra, "tokens/s": num_tokens / extra["time/step_secs"]}
        self.write(step, values)

    def write(self, step: int, values: dict[str, float]) -> None:
        self.log.metrics(step, values)
        self.progress.update(step, values)
        if values.get("groups/missing", 0) > 0:
            self.progress.note(
                f"step {step}: {values['groups/missing']:.0%} of the groups are missing: all sampling rounds spent"
            )

    def save(self, state: TrainState) -> None:
        """The log first, then the checkpoint: a resumed run then never lacks a record."""
        self.log.flush()
        self.checkpointer.save(int(state.step), state, self.run.config.to_dict())


def summarise(config: Config, workdir: pathlib.Path) -> dict[str, float]:
    """Write summary.json and learning_curve.png from the run's records; -> the summary."""
    records = read_metrics(workdir)
    evaluated = [record for record in records if "eval/success" in record]
    summary = {
        "steps": records[-1]["step"] if records else 0,
        "success_before": evaluated[0]["eval/success"],
        "success_after": evaluated[-1]["eval/success"],
        "training_secs": sum(record.get("time/step_secs", 0.0) for record in records),
    }
    write_atomically(workdir / "summary.json", json.dumps(summary, indent=2) + "\n")
    learning_curve(records, objectives.describe(config.objective), workdir / "learning_curve.png")
    return summary
