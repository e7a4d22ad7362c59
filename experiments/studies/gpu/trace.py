"""The dearest kernels of a rollout or an update on the GPU that is here: measured seconds, launches, source lines.

    python -m experiments.studies.gpu.trace --what=update --model=qwen --dtype=bfloat16 --prompts=32 --out=update.json

Flags are those of experiments.benchmark. One call is traced by JAX's profiler, after those that warm up. `busy_secs` is the
time in which at least one kernel runs: what is missing to `span_secs` is the device waiting for its next launch.
"""

import argparse
import collections
import dataclasses
import gzip
import json
import pathlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax

from experiments import benchmark
from experiments.synthetic import random_batch
from grpo_jax.tools.plan.schedule import Schedule
from grpo_jax.training.samplers import end_tokens, make_rollout

WARMUP = 2


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One launch. op: the instruction of XLA's program that it is from, "" where it does not say."""

    name: str
    op: str
    start_ns: float
    end_ns: float


def kernels_of(data: Any) -> list[Kernel]:
    """List the launches of a trace (jax.profiler.ProfileData), by their start."""
    found = []
    for plane in data.planes:
        if not plane.name.startswith("/device:GPU"):
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue  # the lines that the profiler derives count everything once more
            for event in line.events:
                stats = dict(event.stats)
                found.append(
                    Kernel(event.name, str(stats.get("hlo_op", "")), event.start_ns, event.start_ns + event.duration_ns)
                )
    return sorted(found, key=lambda kernel: kernel.start_ns)


def busy_ns(kernels: Iterable[Kernel]) -> float:
    """Length of the union of the launches, which must be in the order of their starts."""
    total, until = 0.0, float("-inf")
    for kernel in kernels:
        total += max(0.0, kernel.end_ns - max(kernel.start_ns, until))
        until = max(until, kernel.end_ns)
    return total


def prepare(args: argparse.Namespace) -> tuple[Callable[[int], Any], jax.stages.Compiled]:
    """Return (a call of what is to be traced, its program)."""
    run, state = benchmark.prepare(args)
    if args.what == "rollout":
        prompts = run.task.train_prompts(0, run.config.rollout.num_prompts)
        rollout = jax.jit(make_rollout(run.model, run.config.rollout, end_tokens(run.task), run.mesh))
        program = rollout.lower(state.policy, prompts, jax.random.key(0)).compile()
        return lambda i: program(state.policy, prompts, jax.random.key(i)), program
    if args.what != "update":
        raise SystemExit("--what: rollout or update")
    batch = random_batch(run)
    program = run.update.lower(state, batch).compile()
    held: list[Any] = [state]

    def call(_: int) -> Any:
        held[:] = [program(held[0], batch)[0]]
        return held

    return call, program


def _plain(name: str) -> str:
    return re.sub(r"[.\-]", "_", name)


def table(kernels: list[Kernel], schedule: Schedule, top: int) -> list[dict[str, Any]]:
    """List the dearest instructions: seconds of all their launches, how many, the line of our code that they are from."""
    # A graph of launches hides the instructions of its kernels, but XLA names these after them.
    by_name = {_plain(each.name): each for instructions in schedule.computations.values() for each in instructions}
    groups: dict[tuple[str, str], list[Kernel]] = collections.defaultdict(list)
    for kernel in kernels:
        groups[kernel.op, kernel.name].append(kernel)
    lines = []
    for (op, name), launches in groups.items():
        instruction = by_name.get(_plain(op)) or by_name.get(re.sub(r"__\d+$", "", name))
        lines.append(
            {
                "secs": sum(each.end_ns - each.start_ns for each in launches) / 1e9,
                "launches": len(launches),
                "op": op,
                "kernel": name[:60],
                "result": instruction.result[:60] if instruction else "",
                "source": schedule.source(instruction) if instruction else "",
            }
        )
    return sorted(lines, key=lambda line: -line["secs"])[:top]


def main() -> None:
    """Trace a call and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument(
        "--out", type=pathlib.Path, help="a JSON file for what is printed, and FILE.hlo.gz for the program's text"
    )
    parser.add_argument("--top", type=int, default=45)
    ours, rest = parser.parse_known_args()
    args = benchmark.parse(rest)
    call, program = prepare(args)
    for i in range(WARMUP):
        jax.block_until_ready(call(i))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call(WARMUP))
        file = next(pathlib.Path(folder).rglob("*.xplane.pb"))
        kernels = kernels_of(jax.profiler.ProfileData.from_file(str(file)))
    if not kernels:
        raise SystemExit("the profiler recorded no kernel of a GPU")
    hlo, planned = program.as_text() or "", program.memory_analysis()
    assert planned is not None
    lines = table(kernels, Schedule(hlo), ours.top)
    span = (max(each.end_ns for each in kernels) - kernels[0].start_ns) / 1e9
    whole = {
        "span_secs": span,
        "busy_secs": busy_ns(kernels) / 1e9,
        "launches": len(kernels),
        # What the compiler plans for this program, beside the most that the process has held since its start, this program's
        # arguments among it.
        "argument_gb": planned.argument_size_in_bytes / 1e9,
        "temporary_gb": planned.temp_size_in_bytes / 1e9,
        "peak_gb": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9,
        "device": jax.devices()[0].device_kind,
        "argv": sys.argv[1:],
    }
    print(json.dumps(whole))
    for line in lines:
        where = f"{line['op'][:24]:24} {line['source']:30} {line['result'][:44]:44}"
        print(f"{line['secs']:.4f} {line['launches']:7d}  {where} {line['kernel']}")
    if ours.out:
        ours.out.write_text(json.dumps({**whole, "kernels": lines}, indent=1))
        with gzip.open(ours.out.with_suffix(".hlo.gz"), "wt") as file:
            file.write(hlo)


if __name__ == "__main__":
    main()
