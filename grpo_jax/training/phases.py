"""Lines on stderr for what takes long before the first step: minutes of silence look like a process that hangs."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

import jax

from grpo_jax import objectives
from grpo_jax.parallel import hosts
from grpo_jax.training.run import Run
from grpo_jax.types import TrainState

SHORT_SECS = 2.0  # what took less is not worth a line


@contextlib.contextmanager
def phase(what: str) -> Iterator[None]:
    """Say how long a phase took, when it has ended; on the first host alone."""
    began = time.monotonic()
    yield
    secs = time.monotonic() - began
    if secs >= SHORT_SECS and hosts.is_first():
        print(f"{what}: {secs:.0f} s", file=sys.stderr, flush=True)


def say_first_call(timing: Mapping[str, float], secs: float) -> None:
    """Say how long the first call took, compilation included.

    timing: of its halves, where they are called apart. secs: of the whole call.
    """
    if secs < SHORT_SECS or not hosts.is_first():
        return
    halves = ""
    if timing:
        halves = f" ({timing['time/rollout_secs']:.0f} s sampling and scoring, {timing['time/update_secs']:.0f} s update)"
    print(f"first step, compilation included: {secs:.0f} s{halves}", file=sys.stderr, flush=True)


def announced_initial_state(run: Run) -> TrainState:
    """Make `Run.initial_state`, with a line on the console for those who wait for it."""
    config = run.config
    what = f"warm start, {config.warm_start.num_steps} supervised steps"
    if config.model.path:
        what = "loading weights"
    if hosts.is_first():
        num = jax.process_count()
        where = f"{run.mesh.size} device(s)" + f" of {num} processes" * (num > 1)
        print(f"{objectives.describe(config.objective)} on {where}: {what}, then compiling", file=sys.stderr)
    with phase(what):
        state = run.initial_state()
        jax.block_until_ready(state.params)
    return state
