"""Iterations of `arithmetic` a second: k in one compiled call, one at a time, and stage by stage from Python.

    python -m experiments.studies.speed.one_call            # prints a table; about two minutes

Stage by stage: prompts, rollout, reward and update are calls of their own with tokens and rewards passing through the host, as
a task that is scored on the host runs (by the same functions of `iteration`). All three do the same work on the same prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from typing import Any

import jax
import numpy as np
from rich.console import Console, JustifyMethod
from rich.table import Table

from experiments.benchmark import sizes_of
from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.parallel.sharding import make_mesh
from grpo_jax.tasks.arithmetic import ArithmeticTask
from grpo_jax.tools import roofline
from grpo_jax.training import build
from grpo_jax.training.run import assemble
from grpo_jax.types import Prompts, Reward

STEPS_PER_CALL, NUM_STEPS, REPEATS = 20, 40, 7
JUSTIFY: dict[str, JustifyMethod] = {"scale": "left", "how": "left"}


class Staged:
    """The arithmetic task as one of the host: its functions take and give numpy arrays."""

    is_traceable = False

    def __init__(self, task: ArithmeticTask):
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    @functools.cached_property
    def _calls(self) -> tuple[Any, Any]:
        # Compiled, as the functions of a host task are quick as well: only the way through the host is to be compared.
        return jax.jit(self._task.train_prompts, static_argnums=1), jax.jit(self._task.reward)

    def train_prompts(self, position: int, num_prompts: int) -> Prompts:
        return jax.tree.map(np.asarray, self._calls[0](position, num_prompts))

    def reward(self, answer: Any, tokens_PGT: Any, mask_PGT: Any) -> Reward:
        reward = jax.tree.map(np.asarray, self._calls[1](answer, tokens_PGT, mask_PGT))
        return dataclasses.replace(reward, metrics={})


def measure(scale: str, steps_per_call: int, *, is_staged: bool) -> tuple[float, float]:
    """Time iterations of the arithmetic task.

    Args:
      scale: of configs/base.py.
      steps_per_call: iterations in one compiled call; 0: rollout and update are calls of their own.
      is_staged: prompts and rewards pass through the host.
    Returns: (seconds an iteration, the median over blocks of NUM_STEPS; floating-point operations that it needs).
    """
    raw: Any = base.get_config(scale)
    raw.update_from_flattened_dict({"steps_per_call": steps_per_call, "warm_start.num_steps": 0, "mesh.data": 1})
    # A block of NUM_STEPS is nothing but iterations: these come after its end.
    for name in ("num_steps", "eval_every", "checkpoint.every", "log.completions_every"):
        raw.update_from_flattened_dict({name: 100})
    config = parse_config(raw)
    task: Any = build.make_task(config)
    model = build.make_model(config, task.tokenizer)
    if is_staged:
        task = Staged(task)
    run = assemble(config, make_mesh(config.mesh.sizes), task, model)
    held: list[Any] = [run.initial_state()]

    def block() -> None:
        for _ in range(NUM_STEPS // max(steps_per_call, 1)):
            if steps_per_call:
                held[:] = run.iterate(held[0])
            else:
                state, batch, metrics = run.collect(held[0])
                held[:] = [run.update(state, batch)[0], batch, metrics]
        # Once a block and not each step: the trainer does not wait for a step either before it sends off the next.
        jax.block_until_ready(held)

    block()  # compiles
    secs = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        block()
        secs.append((time.perf_counter() - began) / NUM_STEPS)
    # One forward pass is the rollout's, three are the update's.
    return statistics.median(secs), 4 * roofline.forward_flops(run.model, sizes_of(held[1].rollout))


def main() -> None:
    """Print the table."""
    rate = roofline.measure_ceilings("float32", 1 << 20).flops_per_s
    table = Table(title=f"arithmetic, matrix products at {rate / 1e9:.0f} GFLOP/s")
    for name in ("scale", "how", "ms an iteration", "times as fast as staged", "share of the matrix rate"):
        table.add_column(name, justify=JUSTIFY.get(name, "right"))
    for scale in ("tiny", "runlocal"):
        ways = {
            "stage by stage": measure(scale, 0, is_staged=True),
            "rollout and update apart": measure(scale, 0, is_staged=False),
            f"{STEPS_PER_CALL} in one call": measure(scale, STEPS_PER_CALL, is_staged=False),
        }
        staged = ways["stage by stage"][0]
        for how, (secs, flops) in ways.items():
            table.add_row(scale, how, f"{secs * 1e3:.2f}", f"{staged / secs:.2f}", f"{flops / secs / rate:.0%}")
    Console().print(table)


if __name__ == "__main__":
    main()
