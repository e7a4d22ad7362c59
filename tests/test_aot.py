"""Programs by the TPU's own compiler, on a machine without one: `make test-aot` installs it; elsewhere these are skipped.

Its estimates are compared with those in estimates.json, of the same versions: 10 % above is a failure. What is meant to be
dearer, or was compiled by another version, is recorded anew: GRPO_JAX_RECORD_ESTIMATES=1 make test-aot.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib

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
MAX_LOGITS = logprobs.MAX_LOGITS
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


@functools.cache
def compiled(name, program):
    """-> what the compiler says of a case's program; several tests ask."""
    planned = job_of(*CASES[name])
    return aot.compile_program(program, planned, aot.make_mesh(planned, aot.devices_of("v5e", "2x2")), V5E)


@pytest.mark.parametrize("name", CASES)
def test_the_update_compiles_with_its_kernels(devices, name):
    del devices
    _, sizes, *_ = CASES[name]
    update = compiled(name, "update")
    assert not update.error
    names = {each.name for each in update.kernels}
    assert names == {"attention_forward", "attention_backward"}
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


@pytest.mark.parametrize("tensor", [1, 2])
def test_where_no_rows_are_sharded_it_compiles(devices, tensor):
    """On one chip alone, say. No program is inside of `shard_map` then, but for its kernels and its head by parts."""
    del devices
    planned = job_of("dapo", (1, 1, tensor), {}, ARCH)
    mesh = aot.make_mesh(planned, aot.devices_of("v5e", f"1x{tensor}"))
    for name in ("update", "rollout", "iteration")[2 * (tensor == 1) :]:
        program = aot.compile_program(name, planned, mesh, V5E)
        assert not program.error and program.kernels


def test_completions_spread_over_devices_are_attended_to_by_kernels(devices):
    """Forward and backward round the ring: keys and values travel, and no device has a row's whole scores."""
    spread = {"mesh.tensor": 1, "mesh.context": 2, "rollout.max_completion_tokens": 8 * T, "learner.num_microbatches": 4}
    planned = job_of("gtpo", (2, 1, 2), spread, ARCH)
    update = aot.compile_program("update", planned, aot.make_mesh(planned, devices), V5E)
    assert not update.error and "collective-permute" in update.hlo
    names = {each.name for each in update.kernels}
    assert {"splash_mha_fwd_residuals", "splash_mha_fwd_segmented_residuals", "splash_mha_dkv_no_residuals"} <= names
    arrays = [shape for op in Schedule(update.hlo).operations() for _, shape in arrays_of(op.instruction.result)]
    assert arrays and not [shape for shape in arrays if len([size for size in shape if size in (4 * T, 8 * T)]) > 1]


def test_the_rollout_compiles_and_a_report_has_its_fields(devices):
    planned = job_of(*CASES["dapo"])
    mesh = aot.make_mesh(planned, devices)
    programs = [compiled("dapo", program) for program in ("update", "rollout")]
    assert not any(each.error for each in programs)
    assert {each.name for each in programs[1].kernels} == {"attention_forward", "attention_newest", "draw_tokens"}
    found = aot.report(aot.on_hardware(planned, mesh), "v5e", V5E, "2x2", programs)
    assert found["fits"] and found["remat"] == "narrow" and found["free_bytes"] > 0.9 * V5E.hbm_bytes
    assert 0 < found["update_peak_share"] < 1 and 0 < found["token_memory_share"] < 1
    assert found["argument_bytes"] > 0 and found["kernels"]
    assert programs[1].temporary_bytes > 0, "of so small an update all is in the cores' own memory"


@pytest.mark.parametrize("name", ["gtpo, tensor", "grpo_s, windows and capped scores", "LoRA"])
def test_rollouts_decode_and_draw_by_kernels(devices, name):
    """Where `tensor` spreads the vocabulary, each device gets some rows' logits: nobody gathers all of them, nor the head."""
    del devices
    rollout = compiled(name, "rollout")
    assert not rollout.error
    assert {"attention_newest", "draw_tokens"} <= {each.name for each in rollout.kernels}
    if CASES[name][1][2] > 1:
        gathered = [shape for line in rollout.hlo.splitlines() if "all-gather" in line for _, shape in arrays_of(line)]
        assert "all-to-all" in rollout.hlo and not [shape for shape in gathered if VOCAB in shape]


# ------------------------------------------------------------------------------------------- recorded estimates

RECORDED = pathlib.Path(__file__).parent / "estimates.json"
WORSE = 1.1
SLACK_BYTES = 2**21  # of small programs all may be in the cores' own memory, which is no working memory


def compare(chip, name, found):
    """Hold numbers to the recorded ones, or record them."""
    versions = aot.versions(chip)
    everything = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    recorded = everything.setdefault(chip, {})
    if os.environ.get("GRPO_JAX_RECORD_ESTIMATES"):
        if recorded.get("versions") != versions:
            recorded = everything[chip] = {"versions": versions, "estimates": {}}
        recorded["estimates"][name] = found
        RECORDED.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
        return
    if recorded.get("versions") != versions:
        pytest.skip(f"estimates.json is of {recorded.get('versions')}, here is {versions}: record anew, as said above")
    if name not in recorded["estimates"]:
        pytest.skip(f"no estimate of {name!r} is recorded")
    slack = {key: SLACK_BYTES * key.endswith("bytes") for key in found}
    estimates = recorded["estimates"][name]
    dearer = {key: (value, found[key]) for key, value in estimates.items() if found[key] > WORSE * value + slack[key]}
    assert not dearer, f"recorded, now: {dearer}"


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_not_dearer_than_recorded(devices, name):
    del devices
    update = compiled(name, "update")
    compare("v5e", name, {"update_secs": update.secs, "temporary_bytes": update.temporary_bytes})


def test_a_rollout_is_not_dearer_than_recorded(devices):
    del devices
    rollout = compiled("dapo", "rollout")
    compare("v5e", "rollout", {"rollout_secs": rollout.secs, "rollout_temporary_bytes": rollout.temporary_bytes})


@pytest.mark.nightly
def test_qwen_is_not_dearer_than_recorded(devices, monkeypatch):
    """Shape (a) of experiments/studies/aot, two minutes."""
    monkeypatch.setattr(logprobs, "MAX_LOGITS", MAX_LOGITS)
    rollout = {"rollout.num_prompts": 32, "rollout.group_size": 8, "rollout.max_completion_tokens": 1024}
    learner = {"learner.logprob_chunk_tokens": 0, "learner.old_logp": "sampler", "learner.num_microbatches": 8}
    config = tiny.config_of("dapo", {**rollout, **learner, "model.dtype": "bfloat16", "mesh.data": 4})
    planned = job.make_job(config, "qwen2.5-0.5b", 256, 4)
    mesh = aot.make_mesh(planned, devices)
    programs = [aot.compile_program(program, planned, mesh, V5E) for program in ("update", "rollout")]
    found = aot.report(aot.on_hardware(planned, mesh), "v5e", V5E, "2x2", programs)
    compare("v5e", "qwen2.5-0.5b", {key: found[key] for key in ("update_secs", "token_secs", "temporary_bytes")})


def test_no_such_slice_is_one_line(devices):
    del devices
    with pytest.raises(aot.UserError, match="--topology=9x9: v5e has no such slice"):
        aot.devices_of("v5e", "9x9")
