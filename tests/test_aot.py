"""Programs by the TPU's own compiler, on a machine without one: `make test-aot` installs it; elsewhere these are skipped."""

import dataclasses
import importlib.util
import math
import os

import pytest

from grpo_jax.learner import logprobs
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.tools.plan import aot, chips, job
from grpo_jax.tools.plan.schedule import Schedule, arrays_of
from tests import tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: make test-aot"),
]
V5E = chips.find_chip("v5e")
G, S, T, VOCAB = 8, 384, 128, 4096
# Layers enough for a loop; a prompt's length is no other size.
ARCH = Architecture(VOCAB, 128, 5, 4, 2, 64, 256, qk_norm=True)
LOCAL = dataclasses.replace(ARCH, sliding_window=200, local_layers=(0, 2, 4), local_rope=Rope(1e6), score_cap=30.0)
CASES = {
    "dapo": ("dapo", (4, 1, 1), {}, ARCH),
    "grpo, KL": ("grpo", (4, 1, 1), {"objective.kl_coef": 0.1}, ARCH),
    "dr_grpo, fsdp": ("dr_grpo", (1, 4, 1), {}, ARCH),
    "gtpo, tensor": ("gtpo", (2, 1, 2), {}, ARCH),
    "grpo_s, windows and capped scores": ("grpo_s", (2, 2, 1), {}, LOCAL),
    "LoRA": ("dapo", (1, 2, 2), {"lora.rank": 8}, ARCH),
}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(logprobs, "MAX_LOGITS", 2**20)  # or all logits of so small a batch would be one chunk


@pytest.fixture(scope="module")
def devices():
    os.environ.update(aot.TPU_ENV)
    return aot.devices_of("v5e", "2x2")


def job_of(variant, sizes, changes, arch):
    axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), sizes, strict=True))
    rollout = {"rollout.num_prompts": 8, "rollout.group_size": G, "rollout.max_completion_tokens": T}
    learner = {"learner.logprob_chunk_tokens": 0, "learner.num_microbatches": 2, "mesh.fsdp_min_elements": 65}
    config = tiny.config_of(variant, {**rollout, **learner, "model.dtype": "bfloat16", **axes, **changes})
    planned = job.make_job(config, "", S, math.prod(sizes))
    return dataclasses.replace(planned, model=dataclasses.replace(planned.model, arch=arch))


@pytest.mark.parametrize(("variant", "sizes", "changes", "arch"), CASES.values(), ids=CASES)
def test_the_update_compiles_with_its_kernels(devices, variant, sizes, changes, arch):
    planned = job_of(variant, sizes, changes, arch)
    mesh = aot.make_mesh(planned, devices)
    update = aot.compile_program("update", planned, mesh, V5E)
    assert not update.error
    names = {each.name for each in update.kernels}
    assert {"splash_mha_fwd_residuals", "splash_mha_fwd_segmented_residuals", "splash_mha_dkv_no_residuals"} <= names
    rows = 8 * G // (sizes[0] * sizes[1]) // 2
    arrays = [each for op in Schedule(update.hlo).operations() for each in arrays_of(op.instruction.result)]
    assert arrays
    logits = [shape for dtype, shape in arrays if dtype == "f32" and math.prod(shape) >= rows * T * VOCAB]
    assert not logits, "float32 logits of all rows"
    # Keys of a prompt for each of its completions; its slots are no other size. What is kept of all layers is one array.
    of_one_layer = [shape[shape[:1] == (ARCH.num_layers,) :] for _, shape in arrays]
    least = rows * ARCH.num_kv_heads * S * ARCH.head_dim
    copies = [shape for shape in of_one_layer if S in shape and math.prod(shape) >= least]
    assert not copies, "a prompt is repeated for its completions"


def test_the_rollout_compiles_and_a_report_has_its_fields(devices):
    planned = job_of(*CASES["dapo"])
    mesh = aot.make_mesh(planned, devices)
    programs = [aot.compile_program(name, planned, mesh, V5E) for name in ("update", "rollout")]
    assert not any(each.error for each in programs)
    assert "splash_mha_fwd_segmented_residuals" in {each.name for each in programs[1].kernels}, "prompts are read by it"
    found = aot.report(aot.on_hardware(planned, mesh), "v5e", V5E, "2x2", programs)
    assert found["fits"] and found["remat"] == "narrow" and found["free_bytes"] > 0.9 * V5E.hbm_bytes
    assert 0 < found["update_peak_share"] < 1 and 0 < found["token_memory_share"] < 1
    assert found["argument_bytes"] > 0 and found["temporary_bytes"] > 0 and found["kernels"]


def test_no_such_slice_is_one_line(devices):
    del devices
    with pytest.raises(aot.UserError, match="--topology=9x9: v5e has no such slice"):
        aot.devices_of("v5e", "9x9")
