"""Is what a tile computes the same program in the sampler and in the learner, as a chip's own compiler has made it?

    python -m experiments.studies.exact.hlo v5e 2x2
    python -m experiments.studies.exact.hlo h100 1x1x1

Needs grpo_jax[aot-tpu] or [aot-gpu], and no chip. Of the rollout and of the update (its forward pass) under
`model.numerics="exact"` it takes every result that is computed inside of a tile and writes it as an expression of its inputs'
types, without names, places and costs. Results of both programs are the same operations on the same shapes in the same layouts;
those of one alone are printed, with what they come to where layouts are left out.
"""

import argparse
import functools
import hashlib
import os
import re
import sys

import jax

from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.models.tiles import SCOPE
from grpo_jax.tools.plan import aot, chips, job
from grpo_jax.tools.plan.schedule import Instruction, Schedule

NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
LAYOUT = re.compile(r"\{[\d,]+(?::[^}]*)?\}")
PLACE = re.compile(r"S\(\d+\)")  # in memory
NO_NUMBERS = re.compile(r", (?:metadata|frontend_attributes|origin|backend_config|control-predecessors)=\{.*", re.DOTALL)
COMPUTES = ("fusion", "convolution", "dot", "custom-call", "reduce")


def job_of() -> job.Job:
    """Return a small job with all kinds of a decoder's products, in bfloat16."""
    raw = base.get_config("tiny", "dapo")
    model = {"dtype": "bfloat16", "numerics": "exact", "dim": 256, "ffn_dim": 512, "num_layers": 2}
    raw.update_from_flattened_dict(
        {
            **{f"model.{name}": value for name, value in {**model, "num_heads": 4, "num_kv_heads": 2}.items()},
            "mesh.data": 1,
            "rollout.num_prompts": 4,
            "rollout.group_size": 8,
            "rollout.max_completion_tokens": 96,
            "learner.bucket_tokens": 0,
            "learner.num_microbatches": 1,
        }
    )
    return job.make_job(parse_config(raw), "", 200, 1)


class Tiles:
    """The results that are computed inside of tiles of one program. found: {expression: how it is shown}."""

    def __init__(self, hlo: str, has_layouts: bool):
        self.computations, self.has_layouts = Schedule(hlo).computations, has_layouts
        self.by_name = {name: {each.name: each for each in body} for name, body in self.computations.items()}
        self.expression = functools.cache(self._expression)
        self.found: dict[str, str] = {}
        for computation, body in self.computations.items():
            for each in body:
                if is_in_tile(each):
                    self._add(computation, each)

    def _add(self, computation: str, each: Instruction) -> None:
        roots = [(computation, each)]
        if each.opcode == "fusion":  # each of its results by itself: the one program keeps more of them than the other
            called = CALLED.findall(each.rest)[0]
            root = self.computations[called][-1]
            roots = [(called, root)]
            if root.opcode == "tuple":
                roots = [(called, self.by_name[called][name]) for name in NAME.findall(root.rest.split(")")[0])]
        for place, root in roots:
            words = self.expression(place, root.name)
            self.found[words] = f"{root.opcode} {self._type(root.result)} of {words[:300]}"

    def _type(self, result: str) -> str:
        result = PLACE.sub("", result)
        return result if self.has_layouts else LAYOUT.sub("", result)

    def _expression(self, computation: str, name: str) -> str:
        """Write a result by what it is computed from; what comes from outside of the computation, or of a tile, by its type."""
        each = self.by_name[computation][name]
        if each.opcode in ("parameter", "get-tuple-element"):
            return self._type(each.result)
        rest = NO_NUMBERS.sub("", each.rest)
        if each.opcode == "constant":
            return f"{self._type(each.result)}={rest}"
        is_inner = "fused" in computation or computation.startswith("region")
        operands, _, attributes = rest.partition(")")
        inner = [
            self.expression(computation, operand) if is_inner else self._type(self.by_name[computation][operand].result)
            for operand in NAME.findall(operands)
        ]
        called = [self.expression(body, self.computations[body][-1].name) for body in CALLED.findall(attributes)]
        words = f"{each.opcode}:{self._type(each.result)}({'; '.join(inner)}){CALLED.sub('', attributes)}{called}"
        if len(words) < 2000:
            return words
        return f"{words[:300]}... {hashlib.sha256(words.encode()).hexdigest()}"


def is_in_tile(each: Instruction) -> bool:
    """Say if an operation is a tile's, of the forward pass."""
    operation = re.search(r'op_name="([^"]*)"', each.rest)
    if operation is None or each.opcode not in COMPUTES:
        return False
    return SCOPE in operation[1] and "transpose(" not in operation[1]


def compiled_texts(chip: str, topology: str) -> list[str]:
    """Return the texts of the rollout and of the update."""
    planned = job_of()
    mesh = aot.make_mesh(planned, aot.devices_of(chip, topology)[:1])
    programs = [aot.compile_program(name, planned, mesh, chips.find_chip(chip)) for name in ("rollout", "update")]
    for each in programs:
        if each.error:
            sys.exit(f"{each.name}: {each.error}")
    return [each.hlo for each in programs]


def main() -> None:
    """Print what both programs have, and what one has alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chip")
    parser.add_argument("topology")
    args = parser.parse_args()
    os.environ.update(aot.TPU_ENV)
    jax.config.update("jax_platforms", "cpu")
    aot.require_compiler(args.chip)
    texts = compiled_texts(args.chip, args.topology)
    for has_layouts in (True, False):
        sampler, learner = (Tiles(text, has_layouts) for text in texts)
        both = sampler.found.keys() & learner.found.keys()
        alone = [
            (name, words)
            for name, tiles, other in (("sampler", sampler, learner), ("learner", learner, sampler))
            for words in tiles.found.keys() - other.found.keys()
        ]
        print(
            f"{len(both)} results are in both programs, {len(alone)} in one alone"
            f"{'' if has_layouts else ', whatever their layouts'}; versions {aot.versions(args.chip)}"
        )
        for name, words in sorted(alone):
            print(f"  {name}: {(sampler if name == 'sampler' else learner).found[words]}")


if __name__ == "__main__":
    main()
