"""Seconds of a program that XLA:GPU has compiled, which gives no cycles: counted from its text, launch by launch.

Each launch takes as long as its products at a share of the arithmetic peak, or as what it reads and writes at a share of the
bandwidth, and a launch's own time besides. The shares are what large products, copies and kernels reached on one H200
(experiments/studies/gpu). A count, not a measurement: experiments/studies/aot says how far off it was.
"""

from __future__ import annotations

import math
import re

from grpo_jax.tools.plan.chips import Chip
from grpo_jax.tools.plan.collectives import kind_of
from grpo_jax.tools.plan.schedule import (
    OPERANDS,
    Instruction,
    Operation,
    Schedule,
    array_bytes,
    arrays_of,
    attribute,
    kernel_flops,
    kernel_share,
    operand_names,
)

LAUNCH_SECS = 2e-6
PRODUCT_SHARE = 0.7  # of the peak in bfloat16; products in float32 have half the peak
BANDWIDTH_SHARE = 0.8
KERNEL_BANDWIDTH_SHARE = 0.6  # by the kernel that decodes
CACHES_READ = 0.5  # of the slots of the rows' caches, on average: they fill up while a row is decoded
# What is no launch: names of values, control flow, and the second half of what was started before.
NO_LAUNCH = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all")
FUSIONS = ("fusion", "fusion-start")  # the latter on a stream of its own, and counted as if it waited
CONTRACTED = re.compile(r'lhs_contracting_dim(?:ensions|s)"?[=:][{\[]([\d,"]*)[}\]]')
IN_PLACE = re.compile(r"\{(\d*)\}: \(\d+, \{\}\)")  # results that take the place of operands


class GpuCosts:
    """The launches of one program, each with its products and bytes."""

    def __init__(self, schedule: Schedule, chip: Chip):
        """Bind a parsed program and the chip's peaks."""
        self.chip = chip
        self.computations = {name: {each.name: each for each in body} for name, body in schedule.computations.items()}

    def secs(self, operation: Operation) -> float:
        """Estimate the seconds of one run. Collectives take none here: links are counted apart."""
        each = operation.instruction
        is_half = each.opcode.endswith(("-start", "-done")) and each.opcode not in FUSIONS
        if each.opcode in NO_LAUNCH or is_half or kind_of(each):
            return 0.0
        if operation.is_kernel:
            flops, moved = kernel_flops(operation), _kernel_bytes(operation)
            shares = kernel_share(operation), KERNEL_BANDWIDTH_SHARE
        else:
            flops, moved = self._products(each, operation.where), self._moved(each, operation.where)
            shares = PRODUCT_SHARE, BANDWIDTH_SHARE
        return LAUNCH_SECS + max(flops / (shares[0] * self.chip.flops_per_s), moved / (shares[1] * self.chip.hbm_bytes_per_s))

    def _products(self, each: Instruction, where: str) -> float:
        """Count the floating-point operations of the products in an instruction; those of float32 twice."""
        if each.opcode in FUSIONS:
            called = attribute("calls", each)
            return sum(self._products(inner, called) for inner in self.computations[called].values())
        is_library = each.opcode == "custom-call" and "gemm_backend_config" in each.rest
        contracted = CONTRACTED.search(each.rest) if each.opcode == "dot" or is_library else None
        if contracted is None:
            return 0.0
        left = self.computations[where].get(operand_names(each)[0])
        if left is None:
            return 0.0
        dtype, shape = arrays_of(left.result)[0]
        summed = math.prod(shape[int(axis)] for axis in re.findall(r"\d+", contracted[1]))
        return 2 * math.prod(arrays_of(each.result)[0][1]) * summed * (2 if dtype == "f32" else 1)

    def _moved(self, each: Instruction, where: str) -> float:
        """Count the bytes that a launch reads and writes."""
        here = self.computations[where]
        given = [here.get(name) for name in operand_names(each)]
        if each.opcode in FUSIONS:
            return self._moved_by_fusion(attribute("calls", each), given)
        if each.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * array_bytes(each.result)
        if each.opcode in ("dynamic-update-slice", "scatter"):
            return 2 * (array_bytes(given[1].result) if given[1] else 0.0)
        return array_bytes(each.result) + sum(array_bytes(one.result) for one in given if one)

    def _moved_by_fusion(self, called: str, given: list[Instruction | None]) -> float:
        """Count what a fusion reads of its operands and writes: of an array that it cuts or writes into, that part alone."""
        body = self.computations[called]
        users: dict[str, list[tuple[Instruction, int]]] = {}
        for each in body.values():
            for place, name in enumerate(operand_names(each)):
                users.setdefault(name, []).append((each, place))

        def read(name: str, full: float) -> float:
            """Bytes that are read of a value inside, by what is done with it."""
            parts = []
            for each, place in users.get(name, []):
                if each.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
                    parts.append(array_bytes(each.result))
                elif each.opcode == "bitcast":
                    parts.append(read(each.name, full))
                elif each.opcode == "dynamic-update-slice" and place == 0:
                    parts.append(0.0)
                else:
                    return full
            return min(full, sum(parts))

        def written(each: Instruction) -> float:
            operands = [body[name] for name in operand_names(each) if name in body]
            if each.opcode == "tuple":
                return sum(map(written, operands))
            if each.opcode == "bitcast" and operands:
                return written(operands[0])
            if each.opcode == "dynamic-update-slice":
                return array_bytes(operands[1].result)
            return array_bytes(each.result)

        total = written(list(body.values())[-1])
        for each in body.values():
            if each.opcode == "parameter":
                outer = given[int(each.rest.split(")")[0])]
                total += read(each.name, array_bytes((outer or each).result))
        return total


def _kernel_bytes(operation: Operation) -> float:
    """Count what a kernel of ours reads and writes; arrays that it changes in place are caches: a token's slot of each row."""
    found = OPERANDS.search(operation.instruction.rest)
    given = [array_bytes(each) for each in re.findall(r"\w+\[[\d,]*\]", found[1] if found else "")]
    made = [array_bytes(each) for each in re.findall(r"\w+\[[\d,]*\]", operation.instruction.result)]
    in_place = {int(index or 0) for index in IN_PLACE.findall(operation.instruction.rest)}
    if not in_place:
        return sum(given) + sum(made)
    caches = sum(made[index] for index in in_place)
    return sum(given) + sum(made) - (2 - CACHES_READ) * caches
