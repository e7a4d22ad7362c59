"""Does the update cost what its work costs? Seconds against completion length, group size, vocabulary and padding.

    python -m experiments.studies.speed.scaling          # writes scaling.json and scaling.png beside this file; some minutes

The benchmark's `tiny` model and batch with one size changed at a time. A line of slope 1 goes through the largest size: small
sizes lie above it by what every call costs. Padding: completions of 64 tokens in a batch that is ever wider.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from configs import base
from experiments import roofline
from experiments.benchmark import sizes_of
from experiments.peers import workload
from experiments.synthetic import RandomTask, architecture, random_batch
from grpo_jax.config import Config
from grpo_jax.models.transformer import ModelDef
from grpo_jax.run import assemble, initial_state
from grpo_jax.sharding import make_mesh

HERE = pathlib.Path(__file__).parent
AXES = {
    "completion tokens": ("completion", (32, 64, 128, 256, 512)),
    "group size G": ("group_size", (2, 4, 8, 16, 32)),
    "vocabulary": ("vocab_size", (512, 2048, 8192, 16_384, 32_768)),
    "padded completion slots, 64 of them real": ("padded", (64, 128, 256, 512)),
}


@dataclasses.dataclass(frozen=True)
class Point:
    """What is updated. padded: completion slots; None: as many as tokens."""

    completion: int = 128
    group_size: int = 8
    vocab_size: int = 512
    padded: int | None = None


def measure(point: Point, num_prompts: int = 4, repeats: int = 9) -> dict[str, float]:
    """Median seconds of an update, and the arithmetic that it needs."""
    raw: Any = base.get_config()
    raw.update_from_flattened_dict(
        {
            "warm_start.num_steps": 0,
            "eval.num_samples": 0,
            "mesh.data": 1,
            "objective.kl_coef": 0.0,
            "rollout.num_prompts": num_prompts,
            "rollout.group_size": point.group_size,
            "rollout.max_completion_tokens": point.padded or point.completion,
        }
    )
    config = Config.from_config_dict(raw)
    arch = dataclasses.replace(architecture("tiny"), vocab_size=point.vocab_size)
    task = RandomTask(workload.random_ids(num_prompts, 64, point.vocab_size, seed=0))
    run = assemble(config, make_mesh(config.mesh), task, ModelDef(arch))
    batch = random_batch(run)
    is_real_T = jnp.arange(batch.rollout.mask_PGT.shape[-1]) < point.completion
    rollout = dataclasses.replace(batch.rollout, mask_PGT=batch.rollout.mask_PGT * is_real_T[None, None])
    batch = dataclasses.replace(batch, rollout=rollout)
    held: list[Any] = [initial_state(run)]

    def call(_: int) -> None:
        held[:] = run.update(held[0], batch)
        jax.block_until_ready(held)

    timing = workload.timed(call, lambda _: 0.0, warmup=2, repeats=repeats)
    return {"secs": statistics.median(timing.secs), "gflops": 3 * roofline.forward_flops(arch, sizes_of(rollout)) / 1e9}


def draw(records: dict[str, list[dict[str, float]]]) -> None:
    """One panel an axis: measured seconds, and the arithmetic's share of them if all of it cost what it costs at the end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (label, points) in zip(figure.subplots(1, len(records)), records.items(), strict=True):
        sizes = [point["size"] for point in points]
        rate = points[-1]["secs"] / points[-1]["gflops"]
        axes.loglog(sizes, [point["secs"] for point in points], "o-", label="measured")
        axes.loglog(sizes, [rate * point["gflops"] for point in points], "--", color="grey", label="as its arithmetic")
        axes.set(xlabel=label, ylabel="seconds an update", xticks=sizes, xticklabels=[f"{size:g}" for size in sizes])
        axes.minorticks_off()
    axes.legend()
    figure.savefig(HERE / "scaling.png", dpi=110)


def main() -> None:
    records: dict[str, list[dict[str, float]]] = {}
    for label, (field, sizes) in AXES.items():
        fixed = {"completion": 64} if field == "padded" else {}
        records[label] = []
        for size in sizes:
            records[label].append({"size": size, **measure(Point(**{**fixed, field: size}))})
            print(label, json.dumps(records[label][-1]), flush=True)
        (HERE / "scaling.json").write_text(json.dumps(records, indent=1) + "\n")
    draw(records)


if __name__ == "__main__":
    main()
