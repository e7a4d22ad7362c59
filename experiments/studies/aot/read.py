"""Say what a compiled text costs: python -m experiments.studies.aot.read TEXT v5e [lines]. Estimates, nothing was run."""

import pathlib
import sys

from grpo_jax.tools.plan import aot, chips
from grpo_jax.tools.plan.schedule import Schedule


def main(path: str, chip_name: str, num_lines: str = "20") -> None:
    chip = chips.find_chip(chip_name)
    schedule = Schedule(pathlib.Path(path).read_text(encoding="utf-8"))
    secs_of = aot.costs_on(schedule, chip)
    operations = schedule.operations(weigh=secs_of)
    total = sum(each.runs * secs_of(each) for each in operations)
    print(f"{total:.4f} s by {'the compiler, kernels by hand' if chip.clock_hz else 'a count'}")
    for kernel in aot.kernels_of(operations, secs_of):
        print(f"  {kernel.name}: {kernel.runs:g} runs, {kernel.flops / 1e12:.2f} TFLOP, {kernel.secs:.4f} s")
    for line in aot.dearest_of(schedule, operations, secs_of)[: int(num_lines)]:
        print(f"  {line.secs:.4f} s {line.share:6.1%} {line.source} {line.kernel}")


if __name__ == "__main__":
    main(*sys.argv[1:])
