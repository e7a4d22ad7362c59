"""The collectives of a compiled program: how often each kind runs, and how many bytes a device sends."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
# A dtype that is missing here raises KeyError: counted as nothing it would make the traffic look small.
ITEMSIZE = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# XLA writes the count only of loops that it could analyse; a scan over layers is one of them.
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
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
    bodies, entry = computations(hlo)
    totals = totals_of(entry, bodies, {})
    # XLA leaves collectives over groups of one device in the text; they send nothing.
    found = [Traffic(kind, size, count, sent) for (kind, size), (count, sent) in totals.items() if size > 1]
    return sorted(found, key=lambda each: -each.num_bytes)


def computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Split a program's text into ({name: lines of the computation}, the entry's name)."""
    bodies: dict[str, list[str]] = {}
    name = entry = ""
    for line in hlo.splitlines():
        if match := COMPUTATION.match(line):
            name = match[1]
            bodies[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif name:
            bodies[name].append(line)
    return bodies, entry


Totals = dict[tuple[str, int], tuple[float, float]]


def totals_of(name: str, bodies: dict[str, list[str]], known: dict[str, Totals]) -> Totals:
    """Add up one run of a computation, with everything that it calls.

    Args:
      name: of the computation.
      bodies: name -> lines, of all computations.
      known: totals that were found before, by name; the new ones are added.
    Returns: {(kind, size of groups): (count, bytes that a device sends)}.
    """
    # Computations are shared (a layer's body is called forward and backward), so each is parsed only once.
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
        # Nobody knows which branch runs. The busiest one is an upper bound that a run can reach, the sum of all is none.
        elif branches := BRANCHES.search(rest):
            each = [totals_of(branch.strip().lstrip("%"), bodies, known) for branch in branches[1].split(",")]
            add(max(each, key=lambda branch: sum(sent for _, sent in branch.values())), 1)
        elif opcode in ("while", "call", "fusion", "conditional", "async-start"):
            for called in CALLED.findall(rest):
                add(totals_of(called, bodies, known), num_trips(rest))
    known[name] = {key: (count, sent) for key, (count, sent) in totals.items()}
    return known[name]


def num_trips(rest: str) -> float:
    """Read how often a loop runs; 1 if the text does not say, and for everything that is no loop."""
    trips = TRIPS.search(rest)
    if trips is None:
        return 1
    return float(trips[1])


def instructions(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield (result's type, opcode, the rest of the line)."""
    for line in lines:
        if match := INSTRUCTION.match(line):
            yield match[1], match[2], match[3]


def array_bytes(result: str) -> float:
    """Count the bytes of an array, or of all arrays in a tuple."""
    return sum(ITEMSIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in ARRAY.findall(result))


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
