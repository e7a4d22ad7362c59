"""Meshes, microbatches and remat ranked: by the plan's own count, or by what the chip's compiler says of the real programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from grpo_jax.tools.plan import aot, memory, times
from grpo_jax.tools.plan.chips import Chip
from grpo_jax.tools.plan.job import Job, allowed_meshes

MARGIN = 1.5  # of the chip's memory, up to which the plan's count is not believed: the compiler is asked
WAYS = 2  # of microbatches and remat that are compiled for a mesh, where `auto` may choose them


@dataclasses.dataclass(frozen=True)
class Planned:
    """A job on one mesh, as the plan counts it. peak_bytes: of a device. stages: with their seconds."""

    job: Job
    peak_bytes: float
    stages: list[times.Stage]


def rank_meshes(job: Job, chip: Chip) -> list[Planned]:
    """Sort every allowed mesh by the plan's count: those that fit by seconds, then those that do not by bytes."""
    jobs = [memory.fitted_ways(other, chip, 1)[0] for other in allowed_meshes(job)]
    found = [Planned(other, memory.peak_bytes(memory.parts_of(other)), times.stages_of(other, chip)) for other in jobs]

    def order(each: Planned) -> tuple[bool, float]:
        # How fast a mesh would be that does not fit is of no use: there the question is how much is missing.
        if each.peak_bytes <= chip.hbm_bytes:
            return False, times.iteration_secs(each.stages)
        return True, each.peak_bytes

    return sorted(found, key=order)


def compile_meshes(
    job: Job, chip_name: str, chip: Chip, topology: str, num_meshes: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Compile the meshes that promise most by the plan's count, and rank them by what their compiler says.

    Args:
      job: what is compiled. chip_name, chip, topology: for what. num_meshes: of how many meshes at the most, each with the
        `WAYS` best microbatches and remats that the config leaves open. say: is told of each program when it is done.
    Returns: a report (`aot.report`) of each, those that fit first, the quickest iteration first.
    """
    devices = aot.devices_of(chip_name, topology)
    ranked = rank_meshes(job, chip)
    promising = [each for each in ranked if each.peak_bytes <= MARGIN * chip.hbm_bytes] or ranked[:1]
    promising = sorted(promising, key=lambda each: times.iteration_secs(each.stages))[:num_meshes]
    say(f"{len(promising)} of {len(ranked)} meshes are compiled, the quickest by the plan's count")
    found = []
    for planned in promising:
        mesh, rollout = aot.make_mesh(planned.job, devices), None
        for way in memory.fitted_ways(dataclasses.replace(job, mesh=planned.job.mesh), chip, WAYS):
            rollout = rollout or aot.compile_program("rollout", way, mesh, chip)  # the same whatever the update does
            update = aot.compile_program("update", way, mesh, chip)
            found.append(aot.report(aot.on_hardware(way, mesh), chip_name, chip, topology, [update, rollout]))
            say(describe(found[-1], update.compile_secs))
    return sorted(found, key=lambda each: (not each["fits"], iteration_secs(each)))


def iteration_secs(report: dict[str, Any]) -> float:
    """Return the seconds of a rollout and an update by the estimate; 0: one was refused."""
    return sum(program["secs"] or 0.0 for program in report["programs"])


def describe(report: dict[str, Any], compile_secs: float) -> str:
    """Return a line of one report."""
    sizes = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "one device"
    what = f"{sizes}: {report['num_microbatches']} microbatches, remat {report['remat']!r}"
    errors = [each["error"] for each in report["programs"] if each["error"]]
    if errors:
        return f"{what}: {errors[0]}"
    secs = ""
    if report["update_secs"]:
        secs = f"an update {report['update_secs']:.3g} s, a token {report['token_secs'] * 1e3:.3g} ms, "
    return f"{what}: {secs}{report['free_bytes'] / 1e9:.2f} GB free (compiled in {compile_secs:.0f} s)"
