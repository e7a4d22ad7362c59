"""Programs by XLA:GPU's compiler for an H100, on a machine without one; skipped where jax[cuda12] is not installed."""

import dataclasses
import importlib.util
import math

import pytest

from experiments.studies.exact import hlo
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.tools.plan import aot, chips, job
from grpo_jax.tools.plan.schedule import CALLED, Schedule, arrays_of
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
        reason="jax[cuda12] is not installed",
    ),
]
G, S, T, VOCAB = 8, 384, 512, 4096  # lengths that are no other size
ARCH = Architecture(VOCAB, 128, 5, 4, 2, 64, 192, qk_norm=True)
LOCAL = dataclasses.replace(
    ARCH, head_dim=256, sliding_window=200, local_layers=(0, 2, 4), local_rope=Rope(1e6), score_cap=30.0
)


def compiled(variant, changes, arch, name, num_devices=1):
    sizes = {"rollout.num_prompts": 4, "rollout.group_size": G, "rollout.max_completion_tokens": T}
    learner = {"learner.num_microbatches": 2, "learner.logprob_chunk_tokens": 256, "model.dtype": "bfloat16"}
    planned = job.make_job(tiny.config_of(variant, {**sizes, **learner, **changes}), "", S, num_devices)
    planned = dataclasses.replace(planned, model=dataclasses.replace(planned.model, arch=arch))
    program = aot.compile_program(
        name, planned, aot.make_mesh(planned, aot.devices_of("h100", f"1x1x{num_devices}")), chips.find_chip("h100")
    )
    assert not program.error
    return program, {each.name for each in program.kernels}


@pytest.mark.parametrize(
    ("variant", "changes", "arch"),
    [("dapo", {}, ARCH), ("grpo", {"objective.kl_coef": 0.1, "lora.rank": 8}, LOCAL)],
    ids=["heads of 64", "windows, capped scores, heads of 256"],
)
def test_the_update_compiles_with_its_kernels(variant, changes, arch):
    update, names = compiled(variant, changes, arch, "update")
    assert {"flash_forward", "flash_backward_queries", "flash_backward_keys"} <= names
    arrays = [shape for op in Schedule(update.hlo).operations() for _, shape in arrays_of(op.instruction.result)]
    # A row's scores have two axes of tokens, its own or its prompt's.
    scores = [shape for shape in arrays if len([size for size in shape if size in (S, T)]) > 1]
    assert arrays and not scores


def test_completions_spread_over_devices_are_attended_to_by_the_kernels():
    update, names = compiled("gtpo", {"mesh.context": 2}, ARCH, "update", 2)
    assert {"flash_forward", "flash_backward_queries", "flash_backward_keys"} <= names
    assert "collective-permute" in update.hlo


@pytest.mark.parametrize("num_tensor", [1, 2])
def test_the_rollout_is_by_the_kernels(num_tensor):
    """One of attention a layer and token, and no weights that are put together in the loop."""
    rollout, names = compiled("dapo", {"mesh.data": 1, "mesh.tensor": num_tensor}, ARCH, "rollout", num_tensor)
    assert {"flash_forward", "attend_newest"} <= names
    assert rollout.secs > 0 and not rollout.num_unknown_loops
    schedule = Schedule(rollout.hlo)
    tokens = [op for op in schedule.operations() if op.loops and op.runs > T / 2]
    assert max(op.runs for op in tokens) < T, "a loop inside of a token's"
    assert sum(op.is_kernel and op.kernel_name == "attend_newest" for op in tokens) == ARCH.num_layers
    if num_tensor > 1:
        return  # there the products of queries, keys and values are XLA's to join
    inside = [each for op in tokens for name in CALLED.findall(op.instruction.rest) for each in schedule.computations[name]]
    sizes = [math.prod(shape) for each in inside if each.opcode == "concatenate" for _, shape in arrays_of(each.result)]
    assert max(sizes) < ARCH.dim**2


def test_exact_numbers_are_the_same_operations_in_sampler_and_learner():
    """Every result of a tile that the rollout computes, its operations, shapes and layouts, is in the update too."""
    sampler, learner = (hlo.Tiles(text, has_layouts=True).found for text in hlo.compiled_texts("h100", "1x1x1"))
    assert len(sampler) > 40
    assert not sampler.keys() - learner.keys()
