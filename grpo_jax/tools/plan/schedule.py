"""A compiled program's text -> its operations: how often each runs, XLA's estimate of its cycles, the source line it is from.

XLA:TPU writes `estimated_cycles` at every operation, but for Pallas kernels: their products are counted by hand from the shapes
that they are given, at a share of the peak that is an assumption. XLA:GPU writes none (see `counted`). All of it is the
compiler's and this module's estimate: nothing is measured.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator

from grpo_jax.models.flash import whole
from grpo_jax.tools.plan.chips import Chip

# A dtype that is missing here raises KeyError: counted as nothing it would make the traffic look small.
ITEMSIZE = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
ITEMSIZE |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "token": 0}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(?.*?\)?) ([a-z][\w\-]*)\((.*)$")
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,]*)\]")
CYCLES = re.compile(r'estimated_cycles["\\]*:["\\]*(\d+)')
# XLA writes the count of loops that it could analyse on CPUs and GPUs, and on TPUs none.
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
OPERANDS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
KERNELS = ('"tpu_custom_call', '"mosaic_gpu', '.gpu.triton"')  # targets
PALLAS_NAME = re.compile(r'/([^/"]+)/pallas_call"')
# Products of each pair of query and key in the kernels of `models.flash.gpu`, and which of their arrays are keys.
GPU_KERNELS = {
    "flash_forward": (2, slice(1, None, 2)),
    "flash_backward_queries": (3, slice(2, None, 2)),
    "flash_backward_keys": (4, slice(2, 3)),
}
GPU_BLOCK = 64  # what such a kernel takes of the diagonal at a time
WHOLE_KERNELS = {"attention_forward": 2, "attention_backward": 5}  # of `models.flash.whole`: the same
# The share of a matrix unit's peak that an attention kernel is taken to reach, by width of head: a width of 64 fills half of a
# 128 x 128 unit in both of its products.
KERNEL_SHARE = {64: 0.25, 128: 0.5}
GPU_KERNEL_SHARE = {64: 0.25, 128: 0.36}  # what those for GPUs reached on one H200 (experiments/studies/gpu)
KERNEL_WIDTH = 128
KERNEL_BANDWIDTH = 0.75  # the share of the memory's bandwidth that it is taken to reach
DECODING_KERNEL = "attention_newest"  # of `models.flash.tpu_newest`; what it moves takes longer than its products


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of the text. result: its type. rest: operands and attributes."""

    name: str
    result: str
    opcode: str
    rest: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """An instruction of the schedule as often as it runs. loops: the bodies that it is inside of, outermost first.

    where: the computation that it stands in.
    """

    instruction: Instruction
    runs: float
    loops: tuple[str, ...]
    where: str

    @property
    def cycles(self) -> float:
        """Estimated cycles of one run; 0 where the compiler says nothing."""
        found = CYCLES.search(self.instruction.rest)
        return float(found[1]) if found else 0.0

    @property
    def is_kernel(self) -> bool:
        """A kernel that was written by hand (Pallas, Triton), and not a product that XLA has a library for."""
        return self.instruction.opcode == "custom-call" and any(each in self.instruction.rest for each in KERNELS)

    @property
    def kernel_name(self) -> str:
        """Its name in the program, `vmap` taken off; XLA:GPU calls all kernels of Pallas alike, and keeps theirs beside."""
        name = re.sub(r"^vmap_(.*)_$", r"\1", self.instruction.name.split(".")[0])
        found = PALLAS_NAME.search(self.instruction.rest)
        return found[1] if found and name == "pallas_call" else name


def _cycles(operation: Operation) -> float:
    return operation.cycles


class Schedule:
    """The text of one compiled program, parsed once."""

    def __init__(self, hlo: str):
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        self._tables: dict[str, dict[int, str]] = collections.defaultdict(dict)
        name = table = ""
        for line in hlo.splitlines():
            if match := COMPUTATION.match(line):
                name, table = match[1], ""
                self.computations[name] = []
                if line.startswith("ENTRY"):
                    self.entry = name
            elif name and (match := INSTRUCTION.match(line)):
                self.computations[name].append(Instruction(*match.groups()))
            elif name and line not in ("", "}") and self.computations[name]:
                # A kernel's metadata has line breaks in it.
                last = self.computations[name][-1]
                self.computations[name][-1] = dataclasses.replace(last, rest=f"{last.rest}\n{line}")
            elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = line
            elif table and (match := re.match(r"(\d+) (.*)", line)):
                self._tables[table][int(match[1])] = match[2]

    def operations(self, weigh: Callable[[Operation], float] = _cycles) -> list[Operation]:
        """List what runs, loops and one branch of each conditional opened up: the one with the largest sum of `weigh`."""
        return list(self._walk(self.entry, 1.0, (), weigh))

    def _walk(self, name: str, runs: float, loops: tuple[str, ...], weigh: Callable[[Operation], float]) -> Iterator[Operation]:
        for each in self.computations[name]:
            yield Operation(each, runs, loops, name)
            if each.opcode == "while":
                body = attribute("body", each)
                yield from self._walk(body, runs * (self.num_trips(each, name) or 1.0), (*loops, body), weigh)
            elif each.opcode == "conditional":
                # Nobody knows which branch runs: the dearest is one that a run can reach.
                branches = [branch.strip().lstrip("%") for group in BRANCHES.findall(each.rest) for branch in group.split(",")]
                walks = [list(self._walk(branch, runs, loops, weigh)) for branch in branches or CALLED.findall(each.rest)]
                yield from max(walks, key=lambda walk: sum(weigh(op) * op.runs for op in walk))
            elif each.opcode in ("call", "async-start"):
                yield from self._walk(CALLED.findall(each.rest)[0], runs, loops, weigh)

    @property
    def num_unknown_loops(self) -> int:
        """Loops whose turns nobody can tell, for they end on data: `operations` counts them once."""
        loops = [(each, name) for name, body in self.computations.items() for each in body if each.opcode == "while"]
        return sum(self.num_trips(*each) is None for each in loops)

    def num_trips(self, loop: Instruction, where: str) -> float | None:
        """Return how often a loop runs: from its first number, which the one before may have left, to its last.

        Args:
          loop: the instruction. where: the computation that it is in.
        Returns: None where the text does not say.
        """
        if known := TRIPS.search(loop.rest):
            return float(known[1])
        index, last = self._end_of(loop)
        if last is None:
            return None
        return max(1.0, math.ceil((last - self._first_number(loop, index, where)) / self._step_of(loop, index)))

    def _end_of(self, loop: Instruction) -> tuple[int, float | None]:
        """Return which of the loop's values its condition compares, and with what number; None: with none that is known."""
        compared = self._comparisons(attribute("condition", loop))
        if not compared:
            return 0, None
        value, last = max(compared, key=lambda each: each[1])
        if value is None or value.opcode != "get-tuple-element":
            return 0, last
        return int(attribute("index", value)), last

    def _comparisons(self, name: str) -> list[tuple[Instruction | None, float]]:
        """List the values that a computation compares with numbers, those inside its fusions too."""
        by_name = {each.name: each for each in self.computations[name]}
        found: list[tuple[Instruction | None, float]] = []
        for each in by_name.values():
            operands = [by_name.get(operand) for operand in operand_names(each)]
            if each.opcode == "compare":
                numbers = [x for x in operands if x is not None and _is_number(x)]
                value = next((x for x in operands if x not in numbers), None)
                found += [(value, _number(number)) for number in numbers]
            elif each.opcode == "fusion":
                for value, number in self._comparisons(attribute("calls", each)):
                    # A fusion's parameter is the operand of that number.
                    if value is not None and value.opcode == "parameter":
                        value = operands[int(_number(value))]
                    found.append((value, number))
        return found

    def _step_of(self, loop: Instruction, index: int) -> float:
        """Return what a turn adds to the counter: XLA:TPU takes two at a time in loops that wait for collectives."""
        body = self.computations[attribute("body", loop)]
        by_name = {each.name: each for each in body}
        following = by_name.get(operand_names(body[-1])[index]) if body[-1].opcode == "tuple" else None
        while following is not None and following.opcode in ("copy", "bitcast"):
            following = by_name.get(operand_names(following)[0])
        if following is None or following.opcode != "add":
            return 1.0
        added = [by_name[name] for name in operand_names(following) if name in by_name and by_name[name].opcode == "constant"]
        return max(1.0, _number(added[0])) if added else 1.0

    def _first_number(self, loop: Instruction, index: int, where: str) -> float:
        """Follow the counter, a value of the loop, to a constant or to the loop before."""
        by_name = {each.name: each for each in self.computations[where]}
        at = by_name.get(operand_names(loop)[0])
        while at is not None:
            if at.opcode == "tuple":
                at = by_name.get(operand_names(at)[index])
            elif at.opcode == "get-tuple-element":
                index = int(attribute("index", at))
                at = by_name.get(operand_names(at)[0])
            elif at.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
                at = by_name.get(operand_names(at)[0])
            elif at.opcode == "while":
                return self._end_of(at)[1] or 0.0
            elif at.opcode == "constant":
                return _number(at)
            else:
                break
        return 0.0

    def source(self, each: Instruction) -> str:
        """Return the innermost line of our own code that an instruction is from, as folder/file.py:line."""
        frame = re.search(r"stack_frame_id=(\d+)", each.rest)
        if not frame:
            found = re.search(r'source_file="([^"]*)" source_line=(\d+)', each.rest)
            return f"{_short(found[1])}:{found[2]}" if found else ""
        at, seen, first = int(frame[1]), set(), ""
        while at not in seen and at in self._tables["StackFrames"]:
            seen.add(at)
            here, at = (int(n) for n in re.findall(r"=(\d+)", self._tables["StackFrames"][at])[:2])
            place = dict(re.findall(r"(\w+)=(\d+)", self._tables["FileLocations"][here]))
            file = self._tables["FileNames"][int(place["file_name_id"])].strip('"')
            first = first or f"{_short(file)}:{place['line']}"
            if "grpo_jax" in file:
                return f"{_short(file)}:{place['line']}"
        return first


def _short(path: str) -> str:
    return "/".join(path.split("/")[-2:])


def attribute(key: str, each: Instruction) -> str:
    """Return what stands behind `key=`, the name of a computation, say."""
    found = re.search(rf"\b{key}=%?([\w.\-]+)", each.rest)
    assert found is not None, f"{each.name}: no {key}"
    return found[1]


def _is_number(each: Instruction) -> bool:
    return each.opcode == "constant" and each.result[:4] in ("s32[", "u32[")


def _number(each: Instruction) -> float:
    """Read the number of a constant or of a parameter."""
    return float(each.rest.split(")")[0])


def operand_names(each: Instruction) -> list[str]:
    """List the values that an instruction is given."""
    return re.findall(r"%([\w.\-]+)", each.rest.split("), ")[0])


def arrays_of(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """List (dtype, shape) of the arrays that a type, or a text with types in it, names."""
    return [(dtype, tuple(int(n) for n in dims.split(",") if n)) for dtype, dims in ARRAY.findall(text) if dtype in ITEMSIZE]


def array_bytes(result: str) -> float:
    """Count the bytes of an array, or of all arrays in a tuple."""
    return sum(ITEMSIZE[dtype] * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in ARRAY.findall(result))


def kernel_flops(operation: Operation) -> float:
    """Count the products of one run of an attention kernel by hand, from the shapes of its queries and keys.

    Forward 2 products, backward in one kernel 5, else 4 (keys and values) and 3 (queries). Rows that see themselves skip the
    blocks above the diagonal.
    """
    arrays = _kernel_arrays(operation)
    if len(arrays) < 2:
        return 0.0
    if operation.kernel_name == DECODING_KERNEL:
        return 0.0
    if operation.kernel_name in GPU_KERNELS:
        return _gpu_kernel_flops(operation, [shape for shape in arrays if len(shape) == 4])
    if operation.kernel_name in WHOLE_KERNELS:
        return _whole_kernel_flops(operation, arrays)
    name, products = operation.instruction.name, 2
    if "dkv" in name:
        # In one kernel with the queries' gradient, which is its result with a leading axis of blocks of keys.
        products = 5 if any(len(shape) > len(arrays[0]) for _, shape in arrays_of(operation.instruction.result)) else 4
    elif "dq" in name:
        products = 3
    *rows, num_queries, width = arrays[0]
    return products * 2 * math.prod(rows) * _num_pairs(operation, num_queries, arrays[1][-2]) * width


def _gpu_kernel_flops(operation: Operation, arrays: list[tuple[int, ...]]) -> float:
    products, which = GPU_KERNELS[operation.kernel_name]
    *rows, T, width = arrays[0]
    pairs = sum(T * (T + GPU_BLOCK) / 2 if keys[-2] == T else T * keys[-2] for keys in arrays[which])
    return products * 2 * math.prod(rows) * pairs * width


def _whole_kernel_flops(operation: Operation, arrays: list[tuple[int, ...]]) -> float:
    """Rows' own keys are the last array, a prompt's stand before them."""
    products = WHOLE_KERNELS[operation.kernel_name]
    *rows, width, T = arrays[0]
    prompt = {"attention_forward": arrays[1:-2], "attention_backward": arrays[4:-2]}[operation.kernel_name]
    pairs = T * (T + whole.block_of(T)) / 2 + sum(T * keys[-1] for keys in prompt[:1])
    return products * 2 * math.prod(rows) * pairs * width


def _num_pairs(operation: Operation, num_queries: int, num_keys: int) -> float:
    """Count the pairs of query and key in the blocks that a kernel runs."""
    if num_queries != num_keys:
        return num_queries * num_keys
    sizes = {key: int(size) for key, size in re.findall(r"block_(\w+?)\W+: *(\d+)", operation.instruction.rest)}
    kind = "_dkv" if "dkv" in operation.instruction.name else "_dq" if "dq" in operation.instruction.name else ""
    rows, columns = sizes.get(f"q{kind}", 1), sizes.get(f"kv{kind}", 1)
    ends = range(rows, num_queries + 1, rows)
    return sum(rows * min(num_keys, math.ceil(end / columns) * columns) for end in ends)


def _kernel_arrays(operation: Operation) -> list[tuple[int, ...]]:
    """List the shapes of the queries, keys and other arrays with channels that a kernel is given."""
    given = OPERANDS.search(operation.instruction.rest)
    found = arrays_of(given[1]) if given else []
    return [shape for dtype, shape in found if dtype in ("bf16", "f32") and len(shape) >= 3]


def operation_secs(operation: Operation, chip: Chip) -> float:
    """Estimate the seconds of one run: its cycles at the chip's clock; of a kernel its products or its bytes.

    Args:
      operation: of a TPU's schedule. chip: clock and peaks.
    """
    if not operation.is_kernel or operation.cycles:
        return operation.cycles / (chip.clock_hz or math.inf)
    given = OPERANDS.search(operation.instruction.rest)
    moved = array_bytes(operation.instruction.result) + array_bytes(given[1] if given else "")
    if operation.kernel_name == DECODING_KERNEL:  # its last two arrays are caches, of which half is filled on average
        moved -= sum(map(array_bytes, re.findall(r"\w+\[[\d,]*\]", given[1] if given else "")[-2:])) / 2
    return max(
        kernel_flops(operation) / (chip.flops_per_s * kernel_share(operation)),
        moved / (KERNEL_BANDWIDTH * chip.hbm_bytes_per_s),
    )


def kernel_share(operation: Operation) -> float:
    """Return the share of the arithmetic peak that an attention kernel is taken to reach."""
    arrays = _kernel_arrays(operation)
    width = arrays[0][-2 if operation.kernel_name in WHOLE_KERNELS else -1] if arrays else KERNEL_WIDTH
    shares = GPU_KERNEL_SHARE if operation.kernel_name in GPU_KERNELS else KERNEL_SHARE
    return shares[64 if width <= KERNEL_WIDTH // 2 else 128]
