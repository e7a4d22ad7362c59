"""The planner's memory beside XLA's account of the compiled programs: SmolLM2's shape and a small mesh.

XLA_FLAGS="--xla_force_host_platform_device_count=8" JAX_PLATFORMS=cpu python -m experiments.studies.scale.off
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.models.architecture import Architecture
from grpo_jax.tools.plan import compiled, memory
from grpo_jax.tools.plan.job import Job, make_job

SMALL = Architecture(2048, 256, 6, 8, 4, 32, 704)
MB = 1e6


def job_of(changes: Mapping[str, Any], shape: str, prompt_tokens: int) -> Job:
    """Make a job without reference and warm start.

    Args:
      changes: to configs/base.py, by field.
      shape: of `plan.job.SHAPES`; empty: the config's own model.
      prompt_tokens: S.
    """
    raw: Any = base.get_config()
    raw.update_from_flattened_dict({"warm_start.num_steps": 0, "objective.kl_coef": 0.0, "mesh.data": 1, **changes})
    return make_job(parse_config(raw), shape, prompt_tokens, 8)


def small(changes: Mapping[str, Any]) -> Job:
    """Make a job that eight simulated devices of a CPU compile quickly, with sizes that divide by every mesh below."""
    sizes = {"rollout.num_prompts": 8, "rollout.group_size": 4, "rollout.max_completion_tokens": 64}
    job = job_of({**sizes, **changes}, "", 32)
    return dataclasses.replace(job, model=dataclasses.replace(job.model, arch=SMALL))


def smol(changes: Mapping[str, Any]) -> Job:
    """Make a job of SmolLM2's shape."""
    sizes = {"rollout.num_prompts": 2, "rollout.group_size": 4, "rollout.max_completion_tokens": 128}
    return job_of({**sizes, **changes}, "smollm2", 64)


def row(name: str, job: Job) -> str:
    """Write a line of the table: planned and XLA's MB, and their ratio, of update and rollout."""
    parts, cells = memory.parts_of(job), []
    for phase, compile_it in ((memory.UPDATE, compiled.compile_update), (memory.ROLLOUT, compiled.compile_rollout)):
        planned, found = memory.phase_bytes(parts, phase), compiled.temporary_bytes(compile_it(job))
        cells += [f"{planned / MB:,.1f}", f"{found / MB:,.1f}", f"{planned / found:.2f}"]
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table, line by line: each takes a compilation or two."""
    print("| job | update, planned MB | XLA MB | ratio | rollout, planned MB | XLA MB | ratio |")
    print("|---|---|---|---|---|---|---|")
    for remat in ("none", "dots", "full"):
        print(row(f"smol, `remat={remat}`", smol({"model.remat": remat})), flush=True)
    # Long completions: beyond 128 queries attention goes block by block, and its scores are computed again whatever remat says.
    for remat in ("dots", "full"):
        long = smol({"model.remat": remat, "rollout.max_completion_tokens": 512})
        print(row(f"smol, completions of 512, `remat={remat}`", long), flush=True)
    print(row("smol, 2 microbatches", smol({"learner.num_microbatches": 2})), flush=True)
    # One device, eight along data, eight along fsdp, and all three axes at once.
    for sizes in ((1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2)):
        cut: dict[str, Any] = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
        print(row(f"small, {' x '.join(map(str, sizes))}", small(cut)), flush=True)
    axes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "learner.num_microbatches": 2, "model.remat": "full"}
    print(row("small, 2 x 2 x 2, `remat=full`, 2 microbatches", small(axes)), flush=True)


if __name__ == "__main__":
    main()
