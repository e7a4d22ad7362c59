"""Tables of the planner: memory, seconds, traffic, and what compiled programs say of them."""

from __future__ import annotations

import json
import sys
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.parallel import hosts
from grpo_jax.parallel.sharding import AXES
from grpo_jax.tools import cli
from grpo_jax.tools.plan import aot, collectives, compiled, memory, ranking, times
from grpo_jax.tools.plan.chips import Chip, find_chip
from grpo_jax.tools.plan.flags import (
    CHIP,
    COMPILE,
    DEVICES,
    HLO,
    ITERATION,
    JSON,
    PROMPT_TOKENS,
    SHAPE,
    SWEEP,
    SWEEP_MESHES,
    TOPOLOGY,
)
from grpo_jax.tools.plan.job import Job, make_job, require_allowed


def show() -> None:
    """Print the tables that the flags ask for. Raises UserError."""
    config = cli.config_from_flags()
    chip = find_chip(CHIP.value)
    if TOPOLOGY.value:
        compile_for_chip(config, chip)
        return
    if HLO.value or JSON.value:
        raise UserError("--hlo and --json: need --compile and --topology, for they are of the chip's compiler")
    job = make_job(config, SHAPE.value, PROMPT_TOKENS.value, DEVICES.value)
    if not SWEEP.value:
        require_allowed(job)  # a sweep leaves out such meshes by itself, and says so only if none is left
        job = memory.fitted(job, chip)
    console = make_console()
    if COMPILE.value:
        compiled.require_simulable(job.mesh.size)
        # JAX fixes the number of devices when it starts, before the flags are read: another process has to have more.
        if jax.device_count() < job.mesh.size:
            sys.exit(compiled.in_child(sys.argv[1:], job.mesh.size))
        console.print(*compare_with_compiled(job))
    elif SWEEP.value:
        console.print(sweep_table(job, chip))
    else:
        console.print(memory_table(job, chip), times_table(job, chip), traffic_table(job))


def compile_for_chip(config: Config, chip: Chip) -> None:
    """Compile update and rollout for absent devices and print what their compiler says. Raises UserError.

    config: of the run. chip: of --chip.
    """
    name = CHIP.value.lower()
    if not COMPILE.value:
        raise UserError("--topology: goes with --compile")
    if SWEEP.value and (HLO.value or ITERATION.value):
        raise UserError("--sweep: goes with neither --hlo nor --iteration, which are of one mesh")
    aot.require_compiler(name)
    if not aot.is_child():
        sys.exit(aot.in_child(sys.argv[1:], name))
    devices = aot.devices_of(name, TOPOLOGY.value)
    job = make_job(config, SHAPE.value, PROMPT_TOKENS.value, len(devices))
    if SWEEP.value:
        found = ranking.compile_meshes(job, name, chip, TOPOLOGY.value, SWEEP_MESHES.value, hosts.say)
        if JSON.value:
            print(json.dumps(found))
        else:
            make_console().print(ranked_table(job, found))
        return
    require_allowed(job)
    job, mesh = memory.fitted(job, chip), aot.make_mesh(job, devices)
    names = ("update", "rollout", *(["iteration"] if ITERATION.value else []))
    programs = [aot.compile_program(each, job, mesh, chip) for each in names]
    if HLO.value:
        aot.write_hlo(HLO.value, programs)
    found = aot.report(aot.on_hardware(job, mesh), name, chip, TOPOLOGY.value, programs)
    if JSON.value:
        print(json.dumps(found))
        return
    make_console().print(*chip_tables(job, found, programs))


def chip_tables(job: Job, found: dict[str, Any], programs: list[aot.Compiled]) -> list[Table]:
    """Show a report of `aot`: what fits, what is dear, what travels. All seconds are estimates.

    Args:
      job: what was compiled. found: of `aot.report`. programs: those that it was made of.
    """
    chip = f"{CHIP.value} {TOPOLOGY.value}"
    table = table_of(
        f"Compiled for {describe_job(job)} by the compiler of {chip}: estimates, nothing was run",
        "program",
        "arguments, GB",
        "working memory, GB",
        "held, GB",
        "estimated s",
        "share of the ceiling",
        "compiled in, s",
    )
    shares = {"update": found["update_peak_share"], "rollout": found["token_memory_share"]}
    for each in programs:
        if each.error:
            table.add_row(each.name, "", "", "", "", each.error, f"{each.compile_secs:.0f}")
            continue
        bytes_held = map(gigabytes, (each.argument_bytes, each.temporary_bytes, each.held_bytes))
        table.add_row(each.name, *bytes_held, number(each.secs), percent(shares.get(each.name)), f"{each.compile_secs:.0f}")
    table.add_section()
    table.add_row(
        "",
        "",
        verdict(found["fits"]),
        f"{gigabytes(found['free_bytes'])} free",
        f"{number(found['token_secs'])} a token",
        "",
        "",
    )
    if num_unknown := sum(each.num_unknown_loops for each in programs):
        table.caption = f"{num_unknown} loops end on data and are counted once: seconds, kernels and traffic are too small"
    chosen = ", ".join(f"{key} {found[key]}" for key in ("remat", "num_microbatches", "head_chunk_tokens", "head_vocab_tokens"))
    lines = table_of(f"Dearest source lines; {chosen}", "program", "line", "kernel, counted by hand", "estimated s", "share")
    traffic = table_of("Collectives of one call", "program", "kind", "devices", "count", "MB sent by a device")
    kernels = table_of("Kernels", "program", "name", "runs", "GFLOP by hand", "at a share of the peak of", "estimated s")
    for each in programs:
        for line in each.dearest:
            lines.add_row(each.name, line.source, line.kernel, number(line.secs), percent(line.share))
        for sent in each.sent:
            traffic.add_row(each.name, sent.kind, str(sent.group_size), f"{sent.count:g}", f"{sent.num_bytes / 1e6:,.3f}")
        for one in each.kernels:
            row = (one.name, f"{one.runs:g}", f"{one.flops / 1e9:,.1f}", percent(one.peak_share), number(one.secs))
            kernels.add_row(each.name, *row)
    return [table, lines, kernels, traffic]


def number(value: float | None) -> str:
    """Write seconds; a dash where the compiler says none."""
    return "-" if value is None else f"{value:.4g}"


def percent(value: float | None) -> str:
    """Write a share; a dash where there is none."""
    return "-" if value is None else f"{value:.0%}"


def make_console() -> Console:
    """Return a console as wide as the terminal; in a pipe wide enough that no line of the tables is folded."""
    if sys.stdout.isatty():
        return Console()
    return Console(width=160)


def memory_table(job: Job, chip: Chip) -> Table:
    """Show every part of a device's memory, and the peak."""
    parts = memory.parts_of(job)
    table = table_of(f"Memory of one of {describe_job(job)}", "phase", "what", "arithmetic", "GB")
    for part in parts:
        table.add_row(part.phase, part.what, part.how, gigabytes(part.num_bytes))
    table.add_section()
    peak = memory.peak_bytes(parts)
    table.add_row(
        "peak",
        f"{verdict(peak <= chip.hbm_bytes)}: {peak / chip.hbm_bytes:.0%} of {CHIP.value}",
        "state + the larger phase",
        gigabytes(peak),
    )
    return table


def times_table(job: Job, chip: Chip) -> Table:
    """Show the stages of an iteration."""
    stages = times.stages_of(job, chip)
    table = table_of(
        f"Seconds of an iteration on {CHIP.value}, at the least",
        "phase",
        "what",
        "compute",
        "memory",
        "links",
        "sum",
        "bound by",
    )
    for stage in stages:
        numbers = (stage.compute, stage.memory, stage.links, stage.secs)
        table.add_row(stage.phase, stage.what, *(f"{secs:.4g}" for secs in numbers), stage.bound)
    table.add_section()
    table.add_row("all", "max(compute, memory) + links", "", "", "", f"{times.iteration_secs(stages):.4g}", "")
    return table


def traffic_table(job: Job) -> Table:
    """Show the bytes that a device sends in an iteration."""
    table = table_of("Sent by a device in an iteration", "phase", "axis", "what", "arithmetic", "GB")
    for sent in times.sent_by(job):
        table.add_row(sent.phase, sent.axis, sent.what, sent.how, gigabytes(sent.num_bytes))
    return table


def sweep_table(job: Job, chip: Chip) -> Table:
    """Show all allowed meshes: those that fit, the quickest first, then the others."""
    columns = "microbatches", "remat", "GB", "of memory", "rollout s", "update s", "iteration s", ""
    table = table_of(f"Meshes of {job.mesh.size} {CHIP.value}", *AXES, *columns)
    for each in ranking.rank_meshes(job, chip):
        phases = (times.ROLLOUT, times.UPDATE)
        by_phase = [sum(stage.secs for stage in each.stages if stage.phase == phase) for phase in phases]
        peak, config = each.peak_bytes, each.job.config
        sizes = *map(str, each.job.mesh.shape.values()), str(config.learner.microbatches), each.job.model.remat_policy
        secs = (f"{secs:.4g}" for secs in (*by_phase, sum(by_phase)))
        table.add_row(*sizes, gigabytes(peak), f"{peak / chip.hbm_bytes:.0%}", *secs, verdict(peak <= chip.hbm_bytes))
    return table


def ranked_table(job: Job, found: list[dict[str, Any]]) -> Table:
    """Show reports of `ranking.compile_meshes`. All seconds are estimates."""
    table = table_of(
        f"Meshes of {CHIP.value} {TOPOLOGY.value} by their compiler, {describe_model(job)}: estimates, nothing was run",
        *AXES,
        "microbatches",
        "remat",
        "free, GB",
        "update s",
        "of the peak",
        "token ms",
        "of the bandwidth",
        "iteration s",
        "",
    )
    for each in found:
        token_ms = None if each["token_secs"] is None else 1e3 * each["token_secs"]
        table.add_row(
            *map(str, each["mesh"].values()),
            str(each["num_microbatches"]),
            each["remat"],
            gigabytes(each["free_bytes"]),
            number(each["update_secs"]),
            percent(each["update_peak_share"]),
            number(token_ms),
            percent(each["token_memory_share"]),
            number(ranking.iteration_secs(each) or None),
            verdict(each["fits"]),
        )
    return table


def verdict(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def compare_with_compiled(job: Job) -> list[Table]:
    """Show the compiled programs' memory beside the plan's, and their collectives."""
    parts = memory.parts_of(job)
    table = table_of(
        f"Compiled for {describe_job(job)} (simulated)", "program", "memory beside the state, GB", "planned", "ratio"
    )
    programs = {memory.UPDATE: compiled.compile_update(job), memory.ROLLOUT: compiled.compile_rollout(job)}
    traffic = table_of("Collectives of one call", "program", "kind", "devices", "count", "MB sent by a device")
    for name, program in programs.items():
        held, planned = compiled.temporary_bytes(program), memory.phase_bytes(parts, name)
        table.add_row(name, gigabytes(held), gigabytes(planned), f"{planned / held:.2f}")
        for each in collectives.traffic(compiled.hlo_text(program)):
            traffic.add_row(name, each.kind, str(each.group_size), f"{each.count:g}", f"{each.num_bytes / 1e6:,.3f}")
    return [table, traffic]


def describe_job(job: Job) -> str:
    sizes = " x ".join(f"{axis} {size}" for axis, size in job.mesh.shape.items())
    return f"{job.mesh.size} devices, {sizes}; {describe_model(job)}"


def describe_model(job: Job) -> str:
    return f"{SHAPE.value or job.config.model.path or 'config.model'}, {job.model.dtype}"


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    return table


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.3f}"
