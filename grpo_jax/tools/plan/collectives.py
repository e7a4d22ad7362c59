"""The collectives of a compiled program: how often each kind runs, and how many bytes a device sends."""

from __future__ import annotations

import collections
import dataclasses
import math
import re

from grpo_jax.tools.plan.schedule import Instruction, Operation, Schedule, array_bytes, arrays_of

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# The ways in which XLA writes them: [groups,size]<=..., {{0,1},{2,3}}, mesh['a'=2,'b'=4] {'b'} (in an order of its own).
GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]<=|\{\{([\d,]*)\}|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kind over groups of one size: runs in one call of the program, and bytes that a device sends in them.

    A ring's bytes: all-gather and reduce-scatter move (n - 1)/n of the full array, an all-reduce twice that.
    """

    kind: str
    group_size: int
    count: float
    num_bytes: float


def traffic(hlo: str) -> list[Traffic]:
    """List the collectives of a compiled program's text, largest first; those of loops as often as they run.

    A loop without a known number of trips counts once. Of a conditional's branches the busiest one counts.
    """
    return traffic_of(Schedule(hlo))


def traffic_of(schedule: Schedule) -> list[Traffic]:
    """List the collectives of a parsed program, as `traffic` does."""
    totals: dict[tuple[str, int], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for each in schedule.operations(weigh=_sent):
        if kind := kind_of(each.instruction):
            size = group_size(each.instruction.rest)
            totals[kind, size][0] += each.runs
            totals[kind, size][1] += each.runs * sent_bytes(kind, result_bytes(each.instruction), size)
    # XLA leaves collectives over groups of one device in the text; they send nothing.
    found = [Traffic(kind, size, count, sent) for (kind, size), (count, sent) in totals.items() if size > 1]
    return sorted(found, key=lambda each: -each.num_bytes)


def _sent(each: Operation) -> float:
    kind = kind_of(each.instruction)
    if not kind:
        return 0.0
    return sent_bytes(kind, result_bytes(each.instruction), group_size(each.instruction.rest))


def kind_of(instruction: Instruction) -> str:
    """Return the kind of a collective, which may be started here and done later; "" for anything else."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in KINDS:
        return opcode
    return ""


def result_bytes(instruction: Instruction) -> float:
    """Count the bytes of a collective's result on one device."""
    # Where it is only started, its operands stand beside its results in one tuple; an all-reduce's do so since jax 0.11 only,
    # in a tuple of their own.
    is_alone = instruction.opcode == "all-reduce-start" and not instruction.result.startswith("((")
    if not instruction.opcode.endswith("-start") or is_alone:
        return array_bytes(instruction.result)
    arrays = arrays_of(instruction.result)
    if instruction.opcode == "collective-permute-start":
        arrays = arrays[:2]  # behind them are numbers of its own
    names = [f"{dtype}[{','.join(map(str, shape))}]" for dtype, shape in arrays[len(arrays) // 2 :]]
    return sum(map(array_bytes, names))


def group_size(rest: str) -> int:
    """Read the number of devices that exchange with each other; 2 for a permutation, which names pairs."""
    if "source_target_pairs=" in rest:
        return 2
    match = GROUPS.search(rest)
    # Guessing a size would make the bytes wrong in silence; XLA has three notations already.
    assert match is not None, f"replica groups written in a new way: {rest[:200]}"
    if match[1] or match[2]:
        return int(match[1] or 0) or len(match[2].split(","))
    sizes = dict(axis.split("=") for axis in match[3].split(","))
    return math.prod(int(sizes[axis.strip()]) for axis in match[4].split(","))


def sent_bytes(kind: str, result_bytes: float, size: int) -> float:
    """Count the bytes that each device sends around a ring.

    Args:
      kind: one of KINDS.
      result_bytes: of the collective's result on one device.
      size: devices of the ring.
    """
    share = (size - 1) / size
    full = result_bytes
    if kind == "reduce-scatter":
        full *= size  # its result is one shard; all other kinds end with the full array
    return full * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
