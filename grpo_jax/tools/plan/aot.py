"""A job's programs by an accelerator's own compiler, which needs no accelerator: only the wheels that it comes in.

XLA:TPU with Mosaic is in `libtpu`, XLA:GPU in the wheels of JAX's CUDA plugin. They say if a program compiles at all, its
bytes, its collectives and kernels; XLA:TPU also what it takes each operation to cost, which for GPUs is counted (`counted`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from grpo_jax.errors import UserError
from grpo_jax.parallel.hardware import compiling_for, hardware_of
from grpo_jax.parallel.sharding import AXES
from grpo_jax.tools.plan import collectives, compiled
from grpo_jax.tools.plan.chips import Chip
from grpo_jax.tools.plan.counted import GpuCosts
from grpo_jax.tools.plan.job import Job
from grpo_jax.tools.plan.schedule import Operation, Schedule, kernel_flops, kernel_share, operation_secs
from grpo_jax.tools.plan.times import forward_of_update, num_scored
from grpo_jax.tools.roofline import decode_bytes

TPU_CHIPS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
# Of a process that has no device: libtpu asks the machine for none, and several may load it at once.
TPU_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
CHILD = "GRPO_JAX_PLAN_CHILD"
NUM_DEAREST = 12  # source lines that are listed
# XLA:GPU asks for a description of the device that is not there: NVIDIA's public figures of the H100 SXM 80 GB.
H100 = """gpu_device_info {
threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
registers_per_core_limit: 65536 registers_per_block_limit: 65536
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 patch: 0 } device_description_str: "NVIDIA H100 80GB HBM3\""""


@dataclasses.dataclass(frozen=True)
class Line:
    """A source line's share of a program. kernel: the name of a hand-written one, or "". secs: of one call, estimated."""

    source: str
    kernel: str
    secs: float
    share: float


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A hand-written kernel. runs: in one call. flops, peak_share: counted by hand, and the share of the peak assumed."""

    name: str
    runs: float
    flops: float
    peak_share: float
    secs: float


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program as a chip's compiler has made it; seconds are estimates, None where the compiler refused it.

    error: its refusal, "" if it compiled. *_bytes: of one device. peak_bytes: of its plan of buffers, arguments and results
    among them; temporary_bytes: without those, of which XLA:TPU counts more than it plans. sent: its collectives.
    num_unknown_loops: loops that were counted once, for nothing says how often they run.
    """

    name: str
    compile_secs: float
    error: str = ""
    hlo: str = ""
    argument_bytes: float = 0.0
    output_bytes: float = 0.0
    alias_bytes: float = 0.0
    temporary_bytes: float = 0.0
    peak_bytes: float = 0.0
    host_bytes: float = 0.0
    secs: float | None = None
    sent: tuple[collectives.Traffic, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    dearest: tuple[Line, ...] = ()
    num_unknown_loops: int = 0

    @property
    def held_bytes(self) -> float:
        """Bytes of a device at its fullest: arguments, results that take the place of none, working memory."""
        return self.peak_bytes or self.argument_bytes + self.output_bytes - self.alias_bytes + self.temporary_bytes


def require_compiler(chip_name: str) -> None:
    """Check that the chip's compiler is installed. Raises UserError."""
    if chip_name in TPU_CHIPS:
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(f'--topology: the compiler of {chip_name} is not installed; pip install "grpo_jax[aot-tpu]"')
    elif chip_name == "h100":
        if not any(importlib.util.find_spec(f"jax_cuda{n}_plugin") for n in (12, 13)):
            raise UserError('--topology: the compiler of h100 is not installed; pip install "grpo_jax[aot-gpu]"')
    else:
        raise UserError(f"--topology: no compiler for --chip={chip_name}; it has one for {', '.join(TPU_CHIPS)} and h100")


def in_child(argv: list[str], chip_name: str) -> int:
    """Run the same command in a process that is set up to compile for absent devices; -> its exit status.

    Raises UserError if a signal ends it, as a fault of the compiler does.
    """
    # JAX chooses its own devices, and the compilers read their settings, when they start.
    env = {**os.environ, "JAX_PLATFORMS": "cpu", CHILD: "1"}
    if chip_name in TPU_CHIPS:
        env = {**TPU_ENV, **env}
    else:
        flags = " --xla_gpu_autotune_level=0" + "".join(f" --xla_gpu_cuda_data_dir={place}" for place in cuda_folders()[:1])
        if jax.__version_info__[:2] == (0, 11):  # refuses products in Triton that it has no device to tune on
            flags += " --xla_gpu_enable_triton_gemm=false"
        env["XLA_FLAGS"] = flags + " " + os.environ.get("XLA_FLAGS", "")  # the user's come last, and so count
    status = subprocess.run([sys.executable, "-m", "grpo_jax", "plan", *argv], env=env, check=False).returncode
    if status < 0:
        used = ", ".join(f"{name} {version}" for name, version in versions(chip_name).items())
        raise UserError(
            f"--chip={chip_name}: its compiler ended by {signal.Signals(-status).name}; try other versions than {used}"
        )
    return status


def cuda_folders() -> list[str]:
    """List the folders of CUDA's compiler that are installed as wheels: by what its versions 12 and 13 call them."""
    found: list[str] = []
    for name in ("cuda_nvcc", "cu13"):
        try:
            spec = importlib.util.find_spec(f"nvidia.{name}")
        except ModuleNotFoundError:  # nothing of NVIDIA is installed
            return found
        found += spec.submodule_search_locations or [] if spec else []
    return found


def is_child() -> bool:
    """Say if this process was started by `in_child`."""
    return os.environ.get(CHILD) == "1"


def devices_of(chip_name: str, topology: str) -> list[Any]:
    """List the devices of a slice that is not there. Raises UserError if there is no such slice."""
    try:
        if chip_name in TPU_CHIPS:
            options = {}
            sizes = [int(size) for size in topology.split("x")]
            if math.prod(sizes) < 4:  # a host of fewer chips than most: of Colab's, say
                options["chips_per_host_bounds"] = (*sizes, 1, 1)[:3]
            name = f"{chip_name}:{topology}"
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
        made = topologies.get_topology_desc(platform="cuda", topology_name="h100", target_config=H100, topology=topology)
        return list(made.devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        raise UserError(f"--topology={topology}: {chip_name} has no such slice: {str(error).splitlines()[0]}") from None


def make_mesh(job: Job, devices: list[Any]) -> Mesh:
    """Make the job's mesh of absent devices, as `sharding.make_mesh` does of present ones."""
    sizes = tuple(job.mesh.shape[axis] for axis in AXES)
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[: math.prod(sizes)])


def compile_program(name: str, job: Job, mesh: Mesh, chip: Chip) -> Compiled:
    """Compile the update or the rollout and read what its compiler says.

    Args:
      name: "update", "rollout" or "iteration". job: what is compiled. mesh: of absent devices. chip: its peaks.
    Returns: the program's figures, or the compiler's refusal in `error`.
    """
    compilers = {
        "update": compiled.compile_update,
        "rollout": compiled.compile_rollout,
        "iteration": compiled.compile_iteration,
    }
    began = time.perf_counter()
    try:
        with compiling_for(mesh):
            program = compilers[name](job, mesh)
    except jax.errors.JaxRuntimeError as error:
        message = str(error).split("\n")[0]
        return Compiled(name, time.perf_counter() - began, error=message, temporary_bytes=wanted_bytes(message))
    secs = time.perf_counter() - began
    hlo, analysis = compiled.hlo_text(program), program.memory_analysis()
    assert analysis is not None, "this compiler gives no account of memory"
    schedule = Schedule(hlo)
    secs_of = costs_on(schedule, chip)
    operations = schedule.operations(weigh=secs_of)
    return Compiled(
        name,
        secs,
        hlo=hlo,
        argument_bytes=analysis.argument_size_in_bytes,
        output_bytes=analysis.output_size_in_bytes,
        alias_bytes=analysis.alias_size_in_bytes,
        temporary_bytes=analysis.temp_size_in_bytes,
        peak_bytes=analysis.peak_memory_in_bytes,
        host_bytes=analysis.host_temp_size_in_bytes,
        secs=sum(each.runs * secs_of(each) for each in operations),
        sent=tuple(collectives.traffic_of(schedule)),
        kernels=kernels_of(operations, secs_of),
        dearest=dearest_of(schedule, operations, secs_of),
        num_unknown_loops=schedule.num_unknown_loops,
    )


def costs_on(schedule: Schedule, chip: Chip) -> Callable[[Operation], float]:
    """Return what estimates the seconds of an operation: by XLA:TPU's cycles, or counted where there are none."""
    return functools.partial(operation_secs, chip=chip) if chip.clock_hz else GpuCosts(schedule, chip).secs


def wanted_bytes(message: str) -> float:
    """Read how much a program wanted from the refusal of one that does not fit; 0 if it does not say."""
    found = re.search(r"(?:HLO temporaries \(|Used |allocate )([\d.]+) ?([KMGT])?i?B?", message)
    if not found:
        return 0.0
    return float(found[1]) * 1024.0 ** (" KMGT".index(found[2] or " "))


def kernels_of(operations: list[Operation], secs_of: Callable[[Operation], float]) -> tuple[Kernel, ...]:
    """List the hand-written kernels by name; of XLA:GPU its libraries' and those that it writes in Triton, by kind."""
    found: dict[str, Kernel] = {}
    for each in operations:
        name = each.kernel_name
        target = re.search(r'(?:custom_call_target=|"kind":)"(__cu[^"]*|__triton[^"]*)"', each.instruction.rest)
        if not each.is_kernel and not target:
            continue
        if target:
            name = target[1]
        before = found.get(name, Kernel(name, 0, 0, kernel_share(each), 0))
        flops, secs = each.runs * kernel_flops(each), each.runs * secs_of(each)
        found[name] = dataclasses.replace(
            before, runs=before.runs + each.runs, flops=before.flops + flops, secs=before.secs + secs
        )
    return tuple(sorted(found.values(), key=lambda each: (-each.secs, each.name)))


def dearest_of(schedule: Schedule, operations: list[Operation], secs_of: Callable[[Operation], float]) -> tuple[Line, ...]:
    """Add the seconds up by source line, and list those that take most."""
    secs: dict[tuple[str, str], float] = {}
    for each in operations:
        kernel = each.kernel_name if each.is_kernel else ""
        key = schedule.source(each.instruction), kernel
        secs[key] = secs.get(key, 0.0) + each.runs * secs_of(each)
    total = sum(secs.values()) or 1.0
    order = sorted(secs, key=lambda key: -secs[key])[:NUM_DEAREST]
    return tuple(Line(*key, secs[key], secs[key] / total) for key in order if secs[key])


def report(job: Job, chip_name: str, chip: Chip, topology: str, programs: list[Compiled]) -> dict[str, Any]:
    """Put everything into one dict for scripts. Seconds and shares are estimates by the compiler.

    Args:
      job: what was compiled. chip_name, chip, topology: for what. programs: the update, the rollout, and the iteration if it
        was compiled.
    Returns: of numbers, texts and lists; None where the compiler refused a program.
    """
    update, rollout, *others = programs
    fullest = max(each.held_bytes for each in programs)
    token_secs = None if rollout.secs is None else rollout.secs / max(1, job.config.rollout.max_completion_tokens - 1)
    counted = "" if chip.clock_hz else " (seconds by a count)"
    return {
        "estimated_by": f"the chip's own compiler{counted}; nothing was run or measured",
        "versions": versions(chip_name),
        "chip": chip_name,
        "topology": topology,
        "mesh": dict(job.mesh.shape),
        **choices(job),
        "fits": not any(each.error for each in programs) and fullest <= chip.hbm_bytes,
        "free_bytes": chip.hbm_bytes - fullest,
        "argument_bytes": update.argument_bytes,
        "temporary_bytes": update.temporary_bytes,
        **{f"{each.name}_secs": each.secs for each in (update, *others)},
        "token_secs": token_secs,
        "update_peak_share": share_of(update_flops(job) / chip.flops_per_s, update.secs),
        "token_memory_share": share_of(least_token_secs(job, chip), token_secs),
        "kernels": [{"program": each.name, **dataclasses.asdict(kernel)} for each in programs for kernel in each.kernels],
        "programs": [program_report(each) for each in programs],
    }


def program_report(program: Compiled) -> dict[str, Any]:
    """Return a program's figures without its text."""
    return {**dataclasses.asdict(dataclasses.replace(program, hlo="")), "held_bytes": program.held_bytes}


def versions(chip_name: str) -> dict[str, str]:
    """Return the versions that the figures hang on."""
    wheels = (
        ("jax", "jaxlib", "libtpu") if chip_name in TPU_CHIPS else ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin")
    )
    found = {}
    for name in wheels:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def choices(job: Job) -> dict[str, Any]:
    """Return what was chosen for the update: by the config, or by `auto` for these devices."""
    learner, chunks = job.config.learner, job.chunks
    return {
        "remat": job.model.remat_policy,
        "num_microbatches": learner.microbatches,
        "head_chunk_tokens": chunks.tokens,
        "head_vocab_tokens": chunks.vocab,
    }


def on_hardware(job: Job, mesh: Mesh) -> Job:
    """Return the job with the model that a run on this mesh would make of it."""
    return dataclasses.replace(job, model=dataclasses.replace(job.model, hardware=hardware_of(mesh)))


def update_flops(job: Job) -> float:
    """Count the arithmetic of a device's update, once each: what is computed again does not count."""
    # Frozen weights need no gradient: a third less.
    passes = (3 - (job.model.lora is not None)) * job.config.learner.num_epochs + num_scored(job)
    return passes * forward_of_update(cpu_model(job))


def least_token_secs(job: Job, chip: Chip) -> float:
    """Return the seconds in which a device reads what a token needs: weights, prompts' caches, rows' own half full."""
    steps = max(1, job.config.rollout.max_completion_tokens - 1)
    return decode_bytes(cpu_model(job).local_model, job.live_batch, job.itemsize) / steps / chip.hbm_bytes_per_s


def cpu_model(job: Job) -> Job:
    """Return the job without hardware, to be traced and counted on no mesh."""
    return dataclasses.replace(job, model=dataclasses.replace(job.model, hardware=None))


def share_of(least: float, secs: float | None) -> float | None:
    """Return the share of the ceiling that is reached; None without an estimate."""
    return None if not secs else least / secs


def write_hlo(path: str, programs: list[Compiled]) -> None:
    """Write the compiled text of each program to `path`.update and `path`.rollout. Raises UserError."""
    for each in programs:
        try:
            pathlib.Path(f"{path}.{each.name}").write_text(each.hlo or each.error, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--hlo={path}: cannot be written: {error.strerror}") from None
