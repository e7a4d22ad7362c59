"""The planner: its bytes against real arrays and XLA's account, its traffic against compiled programs, its sums by hand."""

import collections
import dataclasses
import functools
import math
import signal
import subprocess

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from grpo_jax.errors import UserError
from grpo_jax.models import block
from grpo_jax.models.architecture import Delta
from grpo_jax.models.transformer import MAX_UNROLLED, ModelDef
from grpo_jax.parallel.sharding import with_shardings
from grpo_jax.tools.plan import aot, chips, collectives, compiled, job, memory, ranking, times
from grpo_jax.training import fit
from tests import programs, tiny

# Layers enough for a loop; wide enough that what is saved outweighs XLA's copies; all matrices are cut.
ARCH = job.Architecture(256, 64, MAX_UNROLLED + 1, 4, 2, 16, 192, tie_embeddings=False)
DELTA = dataclasses.replace(
    ARCH,
    num_layers=4,
    mixers=("gated_delta", "attention"),
    has_output_gate=True,
    delta=Delta(num_key_heads=2, num_value_heads=4, key_dim=16, value_dim=32, conv_width=4),
)
PUBLISHED = {
    "smollm2": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "llama3-70b": 70_553_706_496,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3.5-4b": 4_205_751_296,  # of its text, as transformers counts them
}
EXPERTS = dataclasses.replace(ARCH, ffn_dim=32, mlp="experts", num_experts=8, experts_per_token=2)
ONE, EIGHT = (1, 1, 1), (2, 2, 2)


def job_of(sizes, changes=None, arch=ARCH):
    """sizes: along data, fsdp, tensor, and along expert and context if there are more."""
    axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.expert", "mesh.context"), sizes, strict=False))
    small = {"rollout.max_completion_tokens": 33, "mesh.fsdp_min_elements": 65, "objective.kl_coef": 0.0}
    small |= {"model.dim": ARCH.dim, "model.num_heads": ARCH.num_heads, "model.num_kv_heads": ARCH.num_kv_heads}
    config = tiny.config_of("grpo", {**small, **axes, **(changes or {})})
    planned = job.make_job(config, "", 16, math.prod(sizes))
    return dataclasses.replace(planned, model=dataclasses.replace(planned.model, arch=arch))


@functools.cache
def update_on_eight():
    return compiled.compile_update(job_of(EIGHT))


# ------------------------------------------------------------------------------------------------------------- the tables


def test_shapes_have_the_published_numbers_of_parameters():
    counted = {name: sum(x.size for x in jax.tree.leaves(ModelDef(arch).param_shapes())) for name, arch in job.SHAPES.items()}
    assert counted == PUBLISHED


def test_chips_are_plausible_and_have_sources():
    for name, chip in chips.CHIPS.items():
        assert 100 < chip.flops_per_s / chip.hbm_bytes_per_s < 600, name  # operations a byte
        assert chip.host_bytes_per_s < chip.link_bytes_per_s < chip.hbm_bytes_per_s, name
        assert 10e9 < chip.hbm_bytes < 200e9 and chip.source, name


def test_an_axis_within_a_slice_has_its_links_and_one_beyond_it_the_hosts_network():
    chip, mesh = chips.find_chip("H100"), job.mesh_of({"data": 4, "fsdp": 4, "tensor": 2})
    rates = {axis: chips.axis_rate(chip, mesh, axis) for axis in mesh.shape}
    within = dict.fromkeys(("fsdp", "expert", "context", "tensor"), chip.link_bytes_per_s)
    assert rates == {"data": chip.host_bytes_per_s, **within}


# --------------------------------------------------------------------------------------------------------------- memory


NO_OFFLOAD = pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="refused on several devices there")


@pytest.mark.parametrize(
    "changes", [{"lora.rank": 4}, {"objective.kl_coef": 0.1}, pytest.param({"optimizer.offload": True}, marks=NO_OFFLOAD)]
)
@pytest.mark.slow
def test_the_state_is_as_large_as_real_arrays_on_a_device(changes):
    planned = job_of(EIGHT, {"dynamic_sampling.enabled": True, **changes})
    like = compiled.run_of(planned).abstract_state
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), like)
    numbers = (state.step, state.num_prompts_drawn, state.hyperparams)  # scalars, which the plan leaves out
    counters = sum(x.nbytes for x in jax.tree.leaves(numbers))
    there = [x for x in jax.tree.leaves(state) if x.sharding.memory_kind == "device"]
    real = sum(x.addressable_shards[0].data.nbytes for x in there) - counters
    assert real == sum(part.num_bytes for part in memory.state_parts(planned)) > 1e5


def assert_planned(planned, held):
    """Within 20 %; the compiler of jax 0.7 holds 21 % less in the update and 37 % more in a rollout with few live rows."""
    margin = 0.4 if jax.__version_info__ < (0, 8) else 0.2
    assert (1 - margin) * planned <= held <= (1 + margin) * planned


@pytest.mark.slow
def test_the_update_holds_what_was_planned():
    assert_planned(
        memory.phase_bytes(memory.parts_of(job_of(EIGHT)), memory.UPDATE), compiled.temporary_bytes(update_on_eight())
    )


@pytest.mark.slow
def test_an_update_of_few_rows_holds_little_but_gradients():
    """A wide decoder, everything recomputed: little else is there."""
    few = {"model.remat": "full", "rollout.num_prompts": 2, "rollout.group_size": 2, "rollout.max_completion_tokens": 5}
    planned = job_of(ONE, few, dataclasses.replace(ARCH, dim=128, head_dim=32, ffn_dim=512))
    expected = memory.phase_bytes(memory.parts_of(planned), memory.UPDATE)
    assert expected == pytest.approx(compiled.temporary_bytes(compiled.compile_update(planned)), rel=0.2)


@pytest.mark.parametrize(
    ("changes", "arch"), [({}, ARCH), ({"rollout.max_live_sequences": 20}, ARCH), ({}, DELTA)], ids=["all", "live", "delta"]
)
@pytest.mark.slow
def test_the_rollout_holds_what_was_planned(changes, arch):
    planned = job_of(ONE, changes, arch=dataclasses.replace(arch, num_layers=2))
    expected = memory.phase_bytes(memory.parts_of(planned), memory.ROLLOUT)
    assert_planned(expected, compiled.temporary_bytes(compiled.compile_rollout(planned)))


def test_what_is_saved_grows_with_rows_and_shrinks_with_remat():
    def saved(remat, **changes):
        kept = memory.saved_for_backward(job_of(ONE, {f"rollout.{name}": n for name, n in changes.items()}), remat)
        return sum(map(memory.num_bytes, kept))

    whole, twice = saved("none"), saved("none", num_prompts=8)
    assert twice == pytest.approx(2 * whole, rel=0.02)
    assert saved("full") < saved("dots") < whole


def shapes_of(tree, shape):
    return {path: shape(leaf) for path, leaf in flatten_dict(tree).items()}


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 4}])
@pytest.mark.parametrize(
    "arch", [dataclasses.replace(ARCH, vocab_size=vocab, qkv_bias=True) for vocab in (256, 255)] + [tiny.DELTA]
)
def test_the_model_of_one_device_has_the_shapes_of_its_shards(arch, changes):
    planned = job_of((1, 2, 2), changes, arch=arch)
    whole = with_shardings(planned.model.param_shapes(), job.mesh_of({"tensor": 2}), 0)
    shards = shapes_of(whole, lambda leaf: leaf.sharding.shard_shape(leaf.shape))
    assert shapes_of(planned.local_model.param_shapes(), lambda leaf: leaf.shape) == shards


@pytest.mark.parametrize("changes", [{}, {"lora.rank": 4}])
def test_the_model_of_one_device_has_its_experts_alone(changes):
    """But the router's rows, which are few: a device chooses among all."""
    planned = job_of((1, 2, 2, 4), changes, arch=EXPERTS)
    whole = with_shardings(planned.model.param_shapes(), job.mesh_of({"expert": 4, "tensor": 2}), 0)
    shards = shapes_of(whole, lambda leaf: leaf.sharding.shard_shape(leaf.shape))
    found = shapes_of(planned.local_model.param_shapes(), lambda leaf: leaf.shape)
    differ = {path: (shards[path][1], shape[1]) for path, shape in found.items() if shape != shards[path]}
    assert differ == {("layers", "mlp", "router", "weight"): (8, 2)}
    assert planned.local_batch.P == job_of((2, 4, 2), changes, arch=EXPERTS).local_batch.P


def test_the_estimate_counts_the_experts_of_one_device():
    experts = sum(leaf.size for path, leaf in flatten_dict(ModelDef(EXPERTS).param_shapes()).items() if leaf.ndim == 4)
    model, counted = ModelDef(EXPERTS), []
    for expert in (1, 4):
        counted.append(fit.num_weights(model, job.mesh_of({"data": 2, "expert": expert, "tensor": 2})))
    assert counted[0] == sum(x.size for x in jax.tree.leaves(model.param_shapes()))
    assert counted[0] - counted[1] == experts * 3 / 4


@pytest.mark.parametrize("arch", [ARCH, DELTA], ids=["attention", "delta"])
def test_caches_are_as_large_as_their_arithmetic_says(arch):
    """The bytes are the traced decoder's, the text beside them is written from the architecture."""
    for changes in ({}, {"rollout.max_live_sequences": 20}):
        parts = [part for part in memory.rollout_parts(job_of((1, 1, 2), changes, arch)) if " heads x " in part.how]
        for part in parts:
            factors = [int(word) for word in part.how.split() if word.isdigit()]
            assert math.prod(factors) == part.num_bytes, part
        assert sum(part.num_bytes > 0 for part in parts) == 2 + bool(changes)


def test_states_are_counted_for_every_prompt_and_row():
    """[K, V] in float32 for each value head, and three inputs of the convolution; of one device of two."""
    planned, delta = job_of((1, 1, 2), arch=DELTA), DELTA.delta
    state = 4 * (delta.num_value_heads * delta.key_dim * delta.value_dim + 3 * delta.num_channels) // 2
    parts = {part.what: part.num_bytes for part in memory.rollout_parts(planned)}
    batch = planned.sampled_batch
    of_layer = parts["prompts' states"] / batch.P, parts["completions' states"] / (batch.P * batch.G)
    assert of_layer == (state * DELTA.num_layers // 2,) * 2
    live = job_of((1, 1, 2), {"rollout.max_live_sequences": 20}, DELTA)
    parts = {part.what: part.num_bytes for part in memory.rollout_parts(live)}
    assert parts["prompts' states"] == of_layer[0] * (batch.P + 20) and parts["completions' states"] == of_layer[0] * 20


# --------------------------------------------------------------------------------------------------------- what travels


@pytest.mark.slow
def test_a_new_matrix_is_planned_with_the_rest(monkeypatch):
    """One [D, D] more in each layer, which no table shards: each device holds it in full, and reads it at every token."""

    class TwoGates(block.MLP):
        def __init__(self, arch, *, lora=None, rngs):
            super().__init__(arch, lora=lora, rngs=rngs)
            self.second = block.Linear(arch.dim, arch.dim, rngs=rngs)

        def __call__(self, x):
            y, chosen = super().__call__(x)
            return y * jax.nn.sigmoid(self.second(x)), chosen

    def planned(arch):
        changed = job_of(EIGHT, arch=arch)
        parts = {part.what: part.num_bytes for part in memory.parts_of(changed)}
        prompts, *_ = times.stages_of(changed, chips.find_chip("h100"))
        whole = next(sent for sent in times.sent_by(changed) if "whole weights" in sent.what)
        names = (
            "parameters",
            "decoding copy, gathered over fsdp",
            "decoding copy, layer by layer",
            "a layer's weights, gathered",
        )
        return [*(parts[name] for name in names), prompts.memory * chips.find_chip("h100").hbm_bytes_per_s, whole.num_bytes]

    before = planned(ARCH)
    monkeypatch.setitem(block.MLPS, "dense", TwoGates)
    after = planned(dataclasses.replace(ARCH, norm_eps=1e-4))  # counts are kept by the architecture: one of its own
    layer, all_layers = ARCH.dim**2 * 4, ARCH.dim**2 * 4 * ARCH.num_layers
    more = [all_layers, all_layers, all_layers, 2 * layer, all_layers, 2 * all_layers * 3 / 4]
    assert np.subtract(after, before) == pytest.approx(more)


@pytest.mark.slow
def test_collectives_of_the_update_are_those_of_its_layout():
    """Each layer's seven matrices in two passes, gradients in one; the head once; rows of the embedding there and back."""
    planned, found = job_of(EIGHT), collectives.traffic(update_on_eight().as_text())
    by_kind = {each.kind: each for each in found if each.kind in ("all-gather", "reduce-scatter", "all-to-all")}
    counts = {kind: each.count for kind, each in by_kind.items()}
    # Prompts and completions are looked up one after the other; two gathers are of the tokens that devices ask for.
    assert counts == {"all-gather": 2 * 7 * ARCH.num_layers + 3, "reduce-scatter": 7 * ARCH.num_layers + 1, "all-to-all": 4}
    sent = {each.what: each.num_bytes for each in times.sent_by(planned)}
    assert 1 < by_kind["all-gather"].num_bytes / sent["weights gathered"] < 1.02
    assert by_kind["all-to-all"].num_bytes == sent["rows of the embedding"]
    assert by_kind["reduce-scatter"].num_bytes == sent["gradients scattered"]
    summed = sum(each.num_bytes for each in found if each.kind == "all-reduce")
    planned_sums = sum(
        each.num_bytes for each in times.sent_by(planned) if each.phase == times.UPDATE and "summed" in each.what
    )
    assert planned_sums == pytest.approx(summed, rel=0.1)


PROGRAM = """HloModule m
%add (a: f32[], b: f32[]) -> f32[] {
}
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %g = bf16[8,4]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], f32[8,4]{1,0}) tuple(%i, %y)
}
%quiet (p: f32[2]) -> f32[2] {
  %r = f32[2]{0} all-reduce(%p), channel_id=2, replica_groups={{0,1},{2,3}}, to_apply=%add
}
%busy (p: f32[2]) -> f32[2] {
  %r = (f32[2]{0}, /*index=1*/f32[3]{0}) all-reduce(%p), replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a','b'}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %w = (s32[], f32[8,4]{1,0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %c = f32[2]{0} conditional(%k, %p, %p), branch_computations={%quiet, %busy}
  %s = f32[6]{0} reduce-scatter(%p), replica_groups={{0,1,2}}, dimensions={0}, to_apply=%add
  %n = f32[6]{0} all-reduce(%p), replica_groups={{0},{1}}, to_apply=%add
}
"""


def test_loops_count_as_often_as_they_run_and_of_branches_the_busiest():
    assert collectives.traffic(PROGRAM) == [
        collectives.Traffic("all-gather", 4, 5, 5 * 64 * 3 / 4),
        collectives.Traffic("reduce-scatter", 3, 1, 6 * 4 * 2),
        collectives.Traffic("all-reduce", 4, 1, 2 * 20 * 3 / 4),
    ]


@pytest.mark.slow
def test_tokens_that_visit_experts_are_counted():
    """In the compiled update of two devices along expert: gathers and scatters there and back, gradients of the rest summed."""
    planned = job_of((1, 1, 1, 2), {"model.remat": "none", "learner.num_microbatches": 1}, arch=EXPERTS)
    found, sent = collections.defaultdict(float), {}
    for each in collectives.traffic(compiled.compile_update(planned).as_text()):
        found[each.kind] += each.num_bytes
    for each in times.sent_by(planned):
        if each.phase == times.UPDATE:
            sent[each.what] = sent.get(each.what, 0) + each.num_bytes
    exchanged = found["all-gather"] + found["reduce-scatter"]
    assert exchanged == pytest.approx(sent["tokens to experts and back"], rel=0.05)
    assert found["all-reduce"] == pytest.approx(sent["gradients of whole weights summed"], rel=0.05)


@pytest.mark.parametrize("num_devices", [2, 4])
def test_keys_and_values_that_go_round_the_devices_of_context_are_counted(num_devices):
    """In the compiled update; and what each device holds is what was planned for its part of the tokens."""
    changes = {"model.remat": "none", "learner.num_microbatches": 2}
    changes |= {"rollout.max_completion_tokens": 256, "rollout.num_prompts": 8}
    planned, whole = job_of((1, 1, 1, 1, num_devices), changes), job_of((1, 1, 1), changes)
    update = compiled.compile_update(planned)
    found = collections.Counter({each.kind: each.num_bytes for each in collectives.traffic(update.as_text())})
    sent = {each.what: each.num_bytes for each in times.sent_by(planned) if each.phase == times.UPDATE}
    assert found["collective-permute"] == pytest.approx(sent["keys and values round the ring"], rel=0.05)
    # Beside them log-probabilities and entropies are summed, which no plan counts, and which beside so small a model are much.
    assert 1 <= found["all-reduce"] / sent["gradients of whole weights summed"] < 1.2
    assert_planned(memory.phase_bytes(memory.parts_of(planned), memory.UPDATE), compiled.temporary_bytes(update))
    assert (whole.local_batch.T / num_devices, whole.local_batch.P) == (planned.local_batch.T, planned.local_batch.P)
    assert (whole.sampled_batch.T, whole.sampled_batch.P / num_devices) == (planned.sampled_batch.T, planned.sampled_batch.P)


def test_what_a_device_sends_over_data_does_not_grow_with_the_devices():
    """Gradients of a fixed part, 2 (n - 1) / n of it: twice the part at most."""
    parts = [
        next(s for s in times.sent_by(job_of((n, 2, 1), {"rollout.num_prompts": 2 * n})) if s.axis == "data")
        for n in (2, 8, 64)
    ]
    assert [part.num_bytes / parts[0].num_bytes for part in parts] == pytest.approx([1, 7 / 4, 63 / 32])


# ------------------------------------------------------------------------------------------------------ times and sweeps


def test_a_stage_is_bound_by_what_takes_longest_and_links_are_added():
    stage = times.Stage(times.UPDATE, "", 3.0, 2.0, 0.5)
    assert (stage.secs, stage.bound) == (3.5, "compute")
    assert dataclasses.replace(stage, links=4.0).bound == "links"


def test_devices_share_the_arithmetic():
    chip, wide = chips.find_chip("v5e"), {"rollout.num_prompts": 8}
    one, eight = (sum(s.compute for s in times.stages_of(job_of(sizes, wide), chip)) for sizes in (ONE, EIGHT))
    assert one == pytest.approx(8 * eight)


@pytest.mark.slow
def test_a_sweep_leaves_out_what_cannot_be_cut_and_puts_first_what_fits():
    # Given, so that a mesh's memory does not decide them.
    planned = job_of(EIGHT, {"rollout.num_prompts": 8, "learner.num_microbatches": 1, "model.remat": "none"})
    peaks = {other.mesh: memory.peak_bytes(memory.parts_of(other)) for other in job.allowed_meshes(planned)}
    sizes = {tuple(mesh.shape.values()) for mesh in peaks}
    assert all(math.prod(each) == 8 for each in sizes)
    assert {t for *_, t in sizes} == {1, 2}, "two key/value heads are cut in two at most"
    chip = dataclasses.replace(chips.find_chip("h100"), hbm_bytes=float(np.median(list(peaks.values()))))
    ranked = ranking.rank_meshes(planned, chip)
    fits = [each.peak_bytes <= chip.hbm_bytes for each in ranked]
    secs = [times.iteration_secs(each.stages) for each in ranked]
    assert fits == sorted(fits, reverse=True) and 0 < sum(fits) < len(fits) == len(sizes)
    assert secs[: sum(fits)] == sorted(secs[: sum(fits)])


@pytest.mark.slow
def test_a_sweep_by_the_chips_compiler(monkeypatch):
    """A rollout for each mesh, an update for each of its microbatches and remats; what fits first, then the quickest."""
    ran, said = [], []

    def compile_program(name, planned, mesh, chip):
        way = planned.config.learner.num_microbatches, planned.model.remat
        ran.append((name, tuple(mesh.shape.values()), *(way if name == "update" else ())))
        if name == "rollout":
            return aot.Compiled(name, 0.0, secs=1.0, peak_bytes=1e9)
        if len(ran) < 4:  # of the mesh that the plan finds quickest
            return aot.Compiled(name, 0.0, error="RESOURCE_EXHAUSTED: too much")
        return aot.Compiled(name, 0.0, secs=10.0 - len(ran), peak_bytes=chip.hbm_bytes * (0.5 if len(ran) < 6 else 1.5))

    for name, stand_in in (
        ("compile_program", compile_program),
        ("devices_of", lambda *_: []),
        ("make_mesh", lambda planned, _: planned.mesh),
        ("on_hardware", lambda planned, _: planned),
    ):
        monkeypatch.setattr(aot, name, stand_in)
    chip = chips.find_chip("v5e")
    planned = job_of(EIGHT, {"rollout.num_prompts": 8, "model.remat": "auto", "learner.num_microbatches": 0})
    found = ranking.compile_meshes(planned, "v5e", chip, "2x4", 2, said.append)
    assert [each[0] for each in ran] == ["rollout", "update", "update"] * 2
    assert len({each[1] for each in ran}) == 2 and len({each[1:] for each in ran if each[0] == "update"}) == 4
    assert [each["fits"] for each in found] == [True, False, False, False]
    assert found[0]["update_secs"] == 5.0 and found[0]["free_bytes"] == 0.5 * chip.hbm_bytes
    assert [text.split(": ")[-1] for text in said[1:3]] == ["too much"] * 2 and "8.00 GB free" in said[3]


def test_a_compiler_that_ends_with_its_process_is_told(monkeypatch):
    monkeypatch.setattr(aot.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -signal.SIGSEGV))
    with pytest.raises(UserError, match=r"--chip=h100: its compiler ended by SIGSEGV; try other versions than jax \d"):
        aot.in_child(["--chip=h100"], "h100")


def test_bad_input_is_one_line():
    config = tiny.config_of("grpo", {"mesh.data": 4, "mesh.fsdp": 4})
    with pytest.raises(UserError, match="needs 16 devices, there are 8"):
        job.make_job(config, "", 16, 8)
    with pytest.raises(UserError, match="--shape=gpt: unknown; known: smollm2"):
        job.make_job(tiny.config_of(), "gpt", 16, 1)
    with pytest.raises(UserError, match="num_kv_heads = 3"):
        job.require_allowed(job.make_job(tiny.config_of("grpo", {"mesh.tensor": 9}), "smollm2", 16, 9))
    with pytest.raises(UserError, match="no mesh of so many suits"):
        job.allowed_meshes(job.make_job(tiny.config_of("grpo", {"mesh.data": 11}), "smollm2", 16, 11))
    with pytest.raises(UserError, match="--chip=b99: unknown"):
        chips.find_chip("b99")
    with pytest.raises(UserError, match="at most 256"):
        compiled.require_simulable(512)


@pytest.mark.slow
def test_the_command_prints_arithmetic():
    status, output = programs.run("experiments.plan", "--config=configs/dapo.py:runlocal", "--chip=v5e", "--devices=8")
    assert status == 0 and "fits" in output and "optimizer state" in output and "bound by" in output, output
