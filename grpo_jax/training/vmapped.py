"""Many runs in one program: every compiled call advances all of them, and each leaves its own ordinary folder."""

from __future__ import annotations

import contextlib
import functools
import operator
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax import metrics as metrics_lib
from grpo_jax.training.run import Run
from grpo_jax.training.shared_program import Program, traced_values
from grpo_jax.training.trainer import PendingMetrics, Profiler, StopSignal, finalize_run, open_run


def train_vmapped(program: Program, runs: Sequence[Run], workdirs: Sequence[pathlib.Path]) -> None:
    """`trainer.train` for runs of one vmapped program, from the step that all of them left off at.

    A step takes as long as the slowest run of it, and `time/step_secs` is the share of one run. SIGTERM: saves all and
    returns. Raises ValueError if the runs stand at different steps.
    """
    numbers = tree_stack([traced_values(program, run.config) for run in runs])
    with contextlib.ExitStack() as stack:
        entered = [
            stack.enter_context(open_run(run, workdir, Profiler(workdir, None), allow_config_change=False))
            for run, workdir in zip(runs, workdirs, strict=True)
        ]
        loops, states, resumed = zip(*entered, strict=True)
        if len(set(resumed)) > 1:
            raise ValueError(f"runs at different steps cannot go on together: {resumed}")
        stop = stack.enter_context(StopSignal())
        for loop, state in zip(loops, states, strict=True):
            loop.stop = stop
            loop.begin(state, resumed[0])
        state, unwritten = tree_stack(states), [None] * len(loops)
        for step in loops[0].calls(resumed[0]):
            if stop.is_set:
                break
            state, batch, records = advance(program, numbers, state, step, len(loops))
            for loop, each in zip(loops, unwritten, strict=True):
                loop.write_out(each)
            members = zip(loops, tree_unstack(state, len(loops)), tree_unstack(batch, len(loops)), records, strict=True)
            unwritten = [loop.after(*each) for loop, *each in members]
        for loop, each, left in zip(loops, tree_unstack(state, len(loops)), unwritten, strict=True):
            loop.end(each, left)
    for run, workdir in zip(runs, workdirs, strict=True):
        finalize_run(run.config, workdir)


def advance(program: Program, numbers: Any, state: Any, step: int, num_runs: int) -> tuple[Any, Any, list[PendingMetrics]]:
    """One call for all runs, up to step `step`; -> (stacked state, stacked batch, each run's records)."""
    began = time.monotonic()
    num_steps = program.template.config.steps_per_call
    if num_steps:
        state, batch, metrics = program.iterate(numbers, state)
    else:
        state, batch, sampled = program.collect(numbers, state)
        state, updated = program.update(numbers, state, batch)
        metrics = metrics_lib.merge(sampled, updated)
    each = tree_unstack(jax.device_get(metrics), num_runs)
    timing = {"time/step_secs": (time.monotonic() - began) / max(num_steps, 1) / num_runs}
    steps = [metrics_lib.unstack_metrics(one, num_steps) if num_steps else [one] for one in each]
    return state, batch, [PendingMetrics(step, of_run, timing, {}) for of_run in steps]


def tree_stack(trees: Sequence[Any]) -> Any:
    """Trees of one structure -> one, with a leading axis of runs."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@functools.partial(jax.jit, static_argnums=1)
def tree_unstack(tree: Any, num_runs: int) -> list[Any]:
    """The inverse of `tree_stack`."""
    return [jax.tree.map(operator.itemgetter(i), tree) for i in range(num_runs)]
