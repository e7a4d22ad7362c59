"""The saving of refilled rows where completions differ in length: one rollout with all rows side by side, and with fewer rows.

    python -m experiments.studies.speed.refill            # prints a table; some minutes

The benchmark's `tiny` decoder with random weights; one token in so many is a stop token, so that lengths are geometric. The
completions are the same in every row of the table.
"""

from __future__ import annotations

import statistics
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.peers import workload
from experiments.synthetic import architecture
from grpo_jax.config import RolloutConfig, parse_config
from grpo_jax.configs import base
from grpo_jax.models.transformer import ModelDef, init_params
from grpo_jax.parallel.sharding import make_mesh
from grpo_jax.rollout.rollout import EndTokens
from grpo_jax.tools.plan.compiled import temporary_bytes
from grpo_jax.tools.plan.fixed_task import FixedTask
from grpo_jax.training.samplers import make_rollout

P, G, S, T = 32, 8, 64, 512
MEAN_TOKENS = 64
# Rows that are decoded side by side; 0: all of them, and the loop ends with the longest.
ROWS = (0, 128, 64, 32, 16)


def measure(max_live_sequences: int, repeats: int = 3) -> tuple[float, Any, float]:
    """Time a rollout; -> (median seconds, int[P, G] lengths, MB that the compiled call works in)."""
    arch = architecture("tiny")
    raw: Any = base.get_config()
    raw.mesh.data = 1
    # Random weights give every token about the same chance, so this share of stop tokens ends a completion after MEAN_TOKENS.
    stop_ids = tuple(range(arch.vocab_size // MEAN_TOKENS))
    config = RolloutConfig(group_size=G, max_completion_tokens=T, max_live_sequences=max_live_sequences)
    ends = EndTokens(stop_ids, pad_id=0)
    prompts = FixedTask(workload.random_ids(P, S, arch.vocab_size, seed=0), workload.PAD).train_prompts(0, P)
    run = jax.jit(make_rollout(ModelDef(arch), config, ends, make_mesh(parse_config(raw).mesh.sizes)))
    params = jax.jit(lambda key: init_params(arch, key))(jax.random.key(0))
    # Compiled ahead, because only a compiled program knows its memory.
    compiled = run.lower(params, prompts, jax.random.key(0)).compile()
    lengths: list[Any] = []

    def call(_: int) -> None:
        rollout = jax.block_until_ready(compiled(params, prompts, jax.random.key(0)))
        lengths[:] = [np.asarray(rollout.mask_PGT.sum(-1), int)]

    timing = workload.timed(call, lambda _: 0.0, warmup=1, repeats=repeats)
    return statistics.median(timing.secs), lengths[0], temporary_bytes(compiled) / 1e6


def main() -> None:
    """Print the table, after checking that all rows of it drew the same completions."""
    results = {rows: measure(rows) for rows in ROWS}
    lengths = results[0][1]
    assert all((lengths == other).all() for _, other, _ in results.values())
    table = Table(
        title=f"{lengths.size} completions of {lengths.min()} to {lengths.max()} tokens, {lengths.mean():.0f} in the mean"
    )
    for name in ("max_live_sequences", "seconds", "times as fast", "working memory, MB"):
        table.add_column(name, justify="right")
    for rows, (secs, _, megabytes) in results.items():
        table.add_row(str(rows), f"{secs:.2f}", f"{results[0][0] / secs:.2f}", f"{megabytes:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
