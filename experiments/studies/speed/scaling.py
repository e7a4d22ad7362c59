"""Does the update cost what its work costs? Seconds against completion length, group size, vocabulary and padding.

    python -m experiments.studies.speed.scaling          # writes scaling.json and scaling.png beside this file; some minutes
    python -m experiments.studies.speed.scaling padded   # only this axis again

The benchmark's `tiny` model and batch with one size changed at a time. The dashed line is what the arithmetic would cost at the
largest size's rate. Padding: completions of 64 tokens in a batch that is ever wider. The sizes of an axis take turns, call by
call, for a machine drifts.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark import sizes_of
from experiments.peers import workload
from experiments.synthetic import architecture, random_batch
from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import make_mesh
from grpo_jax.tools import roofline
from grpo_jax.tools.plan.fixed_task import FixedTask
from grpo_jax.training.run import assemble

HERE = pathlib.Path(__file__).parent
NUM_PROMPTS, WARMUP, REPEATS = 4, 2, 9
AXES = {
    "completion tokens": ("completion", (32, 64, 128, 256, 512)),
    "group size G": ("group_size", (2, 4, 8, 16, 32)),
    "vocabulary": ("vocab_size", (512, 2048, 8192, 16_384, 32_768)),
    "completion slots, 64 real": ("padded", (64, 128, 256, 512)),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """Sizes of an update. padded: completion slots; None: as many as tokens."""

    completion: int = 128
    group_size: int = 8
    vocab_size: int = 512
    padded: int | None = None


def prepare(point: Point) -> tuple[Callable[[], None], float]:
    """Make (an update, to be called again and again; the floating-point operations that it needs)."""
    raw: Any = base.get_config()
    raw.update_from_flattened_dict(
        {
            "warm_start.num_steps": 0,
            "eval.num_samples": 0,
            "mesh.data": 1,
            "objective.kl_coef": 0.0,
            "rollout.num_prompts": NUM_PROMPTS,
            "rollout.group_size": point.group_size,
            "rollout.max_completion_tokens": point.padded or point.completion,
        }
    )
    config = parse_config(raw)
    arch = dataclasses.replace(architecture("tiny"), vocab_size=point.vocab_size)
    task = FixedTask(workload.random_ids(NUM_PROMPTS, 64, point.vocab_size, seed=0), workload.PAD)
    run = assemble(config, make_mesh(config.mesh.sizes), task, ModelDef(arch))
    batch = random_batch(run)
    is_real_T = jnp.arange(batch.rollout.mask_PGT.shape[-1]) < point.completion
    # Only the mask says which tokens are real: the update has to find the padding by itself, in order to leave it out.
    rollout = dataclasses.replace(batch.rollout, mask_PGT=batch.rollout.mask_PGT * is_real_T[None, None])
    batch = dataclasses.replace(batch, rollout=rollout)
    held: list[Any] = [run.initial_state()]

    def call() -> None:
        held[:] = run.update(held[0], batch)
        jax.block_until_ready(held)

    # Forward, by activations, by weights; without a KL penalty there is no reference pass.
    return call, 3 * roofline.forward_flops(run.model, sizes_of(rollout))


def measure(points: Sequence[Point]) -> list[dict[str, float]]:
    """Measure the median seconds of each update, the median of its ratio to the first one's, and its arithmetic."""
    calls = [prepare(point) for point in points]
    # The list of calls is repeated and not each call: so the sizes take turns.
    for call, _ in calls * WARMUP:
        call()
    clock = [time.perf_counter()]
    for call, _ in calls * REPEATS:
        call()
        clock.append(time.perf_counter())
    # The ratio is taken round by round and then its median: a machine that is slow for a while slows both.
    secs = np.diff(clock).reshape(REPEATS, len(calls))
    medians, ratios = np.median(secs, 0).tolist(), np.median(secs / secs[:, :1], 0).tolist()
    return [{"secs": medians[i], "of_first": ratios[i], "gflops": flops / 1e9} for i, (_, flops) in enumerate(calls)]


def draw(records: dict[str, list[dict[str, float]]]) -> None:
    """Draw one panel an axis: measured seconds, and what the arithmetic would take at the largest size's rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (label, points) in zip(figure.subplots(1, len(records), sharey=True), records.items(), strict=True):
        sizes = [point["size"] for point in points]
        # At the largest size the fixed costs of a call are smallest beside its arithmetic.
        rate = points[-1]["secs"] / points[-1]["gflops"]
        axes.loglog(sizes, [point["secs"] for point in points], "o-", label="measured")
        axes.loglog(sizes, [rate * point["gflops"] for point in points], "--", color="grey", label="as its arithmetic")
        axes.set(xlabel=label, xticks=sizes, xticklabels=[f"{size:g}" for size in sizes], ylim=(0.1, 10))
        axes.tick_params(axis="x", labelsize=7, rotation=30)
        axes.minorticks_off()
    figure.axes[0].set_ylabel("seconds an update")
    figure.axes[0].legend(loc="upper left")
    figure.savefig(HERE / "scaling.png", dpi=110)


def main() -> None:
    """Measure all axes, or those that are named, whose records replace the old ones; then draw."""
    file = HERE / "scaling.json"
    records: dict[str, list[dict[str, float]]] = {}
    if sys.argv[1:]:
        records = json.loads(file.read_text())
    for label, (field, sizes) in AXES.items():
        if sys.argv[1:] and field not in sys.argv[1:]:
            continue
        fixed = Point()
        if field == "padded":
            fixed = Point(completion=64)  # real tokens, in ever more slots
        measured = measure([dataclasses.replace(fixed, **{field: size}) for size in sizes])
        records[label] = [{"size": size, **each} for size, each in zip(sizes, measured, strict=True)]
        print(label, *map(json.dumps, records[label]), sep="\n", flush=True)
        file.write_text(json.dumps(records, indent=1) + "\n")
    draw(records)


if __name__ == "__main__":
    main()
