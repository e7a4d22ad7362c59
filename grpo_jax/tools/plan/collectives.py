"""The collectives of a compiled program: how often each kind runs, and how many bytes a device sends."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# The ways in which XLA writes them: [groups,size]<=..., {{0,1},{2,3}}, mesh['a'=2,'b'=4] {'b'} (in an order of its own).
GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]<=|\{\{([\d,]*)\}|mesh\[([^\]]*)\][^{]*\{([^}]*)\})")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Of one kind over groups of one size: runs in one call of the program, and bytes that a device sends in them.

    A ring's bytes: all-gather and reduce-scatter move (n - 1)/n of the whole, an all-reduce twice that.
    """

    kind: str
    group_size: int
    count: float
    num_bytes: float


def traffic(hlo: str) -> list[Traffic]:
    """The collectives of a compiled program's text, largest first; those of loops as often as they run.

    A loop without a known number of trips counts once. Of a conditional's branches the busiest one counts.
    """
    bodies, entry = computations(hlo)
    totals = totals_of(entry, bodies, {})
    found = [Traffic(kind, size, count, sent) for (kind, size), (count, sent) in totals.items() if size > 1]
    return sorted(found, key=lambda each: -each.num_bytes)


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """-> ({name: lines of the computation}, the entry's name)."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            entry = name if line.startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)
    return bodies, entry


Totals = dict[tuple[str, int], tuple[float, float]]


def totals_of(name: str, bodies: dict[str, list[str]], known: dict[str, Totals]) -> Totals:
    """{(kind, size of groups): (count, bytes)} of one run of a computation, with all that it calls."""
    if name in known:
        return known[name]
    totals: dict[tuple[str, int], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

    def add(more: Totals, times: float) -> None:
        for key, (count, sent) in more.items():
            totals[key][0] += times * count
            totals[key][1] += times * sent

    for result, opcode, rest in instructions(bodies[name]):
        if opcode in KINDS:
            size = group_size(rest)
            add({(opcode, size): (1, sent_bytes(opcode, array_bytes(result), size))}, 1)
        elif branches := BRANCHES.search(rest):
            each = [totals_of(branch.strip().lstrip("%"), bodies, known) for branch in branches[1].split(",")]
            add(max(each, key=lambda branch: sum(sent for _, sent in branch.values())), 1)
        elif opcode in ("while", "call", "fusion", "conditional", "async-start"):
            trips = TRIPS.search(rest)
            for called in CALLED.findall(rest):
                add(totals_of(called, bodies, known), float(trips[1]) if trips else 1)
    known[name] = {key: (count, sent) for key, (count, sent) in totals.items()}
    return known[name]


def instructions(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """(result's type, opcode, the rest of the line)."""
    for line in lines:
        if match := INSTRUCTION.match(line):
            yield match[1], match[2], match[3]


def array_bytes(result: str) -> float:
    """Of an array, or of all in a tuple."""
    return sum(ITEMSIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in ARRAY.findall(result))


def group_size(rest: str) -> int:
    """How many devices exchange with each other; 2 for a permutation, which names pairs."""
    if "source_target_pairs=" in rest:
        return 2
    match = GROUPS.search(rest)
    assert match is not None, f"replica groups written in a new way: {rest[:200]}"
    if match[1] or match[2]:
        return int(match[1] or 0) or len(match[2].split(","))
    sizes = dict(axis.split("=") for axis in match[3].split(","))
    return math.prod(int(sizes[axis.strip()]) for axis in match[4].split(","))


def sent_bytes(kind: str, result_bytes: float, size: int) -> float:
    """What each device sends around a ring of `size` devices."""
    share = (size - 1) / size
    whole = result_bytes * (size if kind == "reduce-scatter" else 1)
    return whole * {"all-reduce": 2 * share, "collective-permute": 1.0}.get(kind, share)
