"""Reading a compiled program's schedule: what runs how often, where it is from, and what a kernel is counted at."""

import dataclasses
import math

import pytest

from grpo_jax.errors import UserError
from grpo_jax.tools.plan import aot, chips, collectives
from grpo_jax.tools.plan.schedule import Schedule, array_bytes, kernel_flops, operation_secs

V5E = chips.find_chip("v5e")
# As XLA:TPU writes them: no counts of loops, layouts with brackets of their own, a kernel whose metadata has line breaks.
TPU = """HloModule jit_step, is_scheduled=true

FileNames
1 "/there/grpo_jax/learner/train_step.py"
2 "/lib/site-packages/optax/_src/update.py"

FunctionNames
1 "step"

FileLocations
1 {file_name_id=1 function_name_id=1 line=93 end_line=93 column=3 end_column=3}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=1}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=1}

%until.40 (p: (s32[], f32[8,4])) -> pred[] {
  %c = s32[]{:T(128)} constant(40), metadata={op_name="x"}
  ROOT %lt = pred[]{:T(512)} compare(%g, %c), direction=LT
}
%until.64 (p: (s32[], f32[8,4])) -> pred[] {
  %c = s32[]{:T(128)} constant(64)
  ROOT %lt = pred[]{:T(512)} compare(%g, %c), direction=LT
}
%body.1 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %f = f32[8,4]{1,0:T(8,128)S(1)} fusion(%p), calls=%fused,
metadata={op_name="a" stack_frame_id=2}, backend_config={"estimated_cycles":"300"}
}
%body.2 (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %f = f32[8,4]{1,0:T(8,128)S(1)} fusion(%p), calls=%fused,
metadata={op_name="a" stack_frame_id=1}, backend_config={"estimated_cycles":"500"}
  %g = (f32[4]{0:T(128)}, f32[16]{0:T(128)}) all-gather-start(%p), replica_groups={{0,1,2,3}}, dimensions={0}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %one = s32[]{:T(128)} constant(1)
  %t = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%one, %p)
  %while.1 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%t), condition=%until.40, body=%body.1
  %i = s32[]{:T(128)} get-tuple-element(%while.1), index=0
  %t2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) tuple(%i, %p)
  %while.2 = (s32[]{:T(128)}, f32[8,4]{1,0:T(8,128)}) while(%t2), condition=%until.64, body=%body.2
  %splash_mha_dkv_no_residuals.3 = (bf16[1,2,3,1024,64]{4,3,2,1,0:T(8,128)}, bf16[2,1,1024,64]{3,2,1,0}) custom-call(%q, %k),
custom_call_target="tpu_custom_call",
operand_layout_constraints={s8[1,2,1]{2,1,0}, bf16[2,3,1024,64]{3,2,1,0}, bf16[2,1,1024,64]{3,2,1,0}},
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q_dkv\\": 512, \\"block_kv_dkv\\": 512}"
}}, metadata={op_name="k" stack_frame_id=1}
}
"""


def test_loops_run_from_where_the_one_before_has_ended():
    schedule = Schedule(TPU)
    operations = schedule.operations()
    runs = {each.loops: each.runs for each in operations if each.instruction.name == "f"}
    assert runs == {("body.1",): 39, ("body.2",): 24}
    assert sum(each.runs * each.cycles for each in operations) == 39 * 300 + 24 * 500
    places = [schedule.source(each.instruction) for each in operations if each.cycles]
    assert places == ["learner/train_step.py:93"] * 2, "our own line, and not the library's that it calls"


# A product whose rows travel round 8 devices, as XLA:TPU writes it: two steps a turn, two pieces each, the counter last.
WINDOWED = """HloModule jit_step, is_scheduled=true

%windowed_dot_general_cond_ag (p: (bf16[8,4], u32[], u32[])) -> pred[] {
  %c = u32[]{:T(128)} constant(4)
  %p = (bf16[8,4]{1,0}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=2
  ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
}
%windowed_dot_general_body_ag (p: (bf16[8,4], u32[], u32[])) -> (bf16[8,4], u32[], u32[]) {
  %p = (bf16[8,4]{1,0}, u32[]{:T(128)}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %f = bf16[8,4]{1,0} fusion(%p), calls=%fused, backend_config={"estimated_cycles":"700"}
  %device = u32[]{:T(128)} get-tuple-element(%p), index=1
  %i = u32[]{:T(128)} get-tuple-element(%p), index=2
  %next = u32[]{:T(128)} add(%i, %two)
  ROOT %r = (bf16[8,4]{1,0}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%f, %device, %next)
}
ENTRY %main (p: bf16[8,4]) -> bf16[8,4] {
  %zero = u32[]{:T(128)} constant(0)
  %seven = u32[]{:T(128)} constant(7)
  %t = (bf16[8,4]{1,0}, u32[]{:T(128)}, u32[]{:T(128)}) tuple(%p, %seven, %zero)
  %while.1 = (bf16[8,4], u32[], u32[]) while(%t), condition=%windowed_dot_general_cond_ag, body=%windowed_dot_general_body_ag
}
"""


def test_a_loop_over_pieces_of_a_product_counts_its_turns():
    assert sum(each.runs * each.cycles for each in Schedule(WINDOWED).operations()) == 2 * 700


# A decoding loop as XLA:GPU writes it: the column's end is a constant of a fusion, beside whether all rows have ended.
FUSED = """HloModule jit_f, is_scheduled=true

%ended (p.1: pred[], p.2: s32[]) -> pred[] {
  %p.2 = s32[] parameter(1)
  %c = s32[] constant(1024)
  %lt = pred[] compare(%p.2, %c), direction=LT
  %p.1 = pred[] parameter(0)
  ROOT %and = pred[] and(%lt, %p.1)
}
%until (p.3: (pred[4], s32[])) -> pred[] {
  %p.3 = (pred[4]{0}, s32[]) parameter(0)
  %rows = pred[4]{0} get-tuple-element(%p.3), index=0
  %any = pred[] fusion(%rows), kind=kInput, calls=%reduced
  %t = s32[] get-tuple-element(%p.3), index=1
  ROOT %go_on = pred[] fusion(%any, %t), kind=kLoop, calls=%ended
}
%reduced (p.4: pred[4]) -> pred[] {
  %p.4 = pred[4]{0} parameter(0)
  ROOT %r = pred[] reduce(%p.4)
}
%body (p.5: (pred[4], s32[])) -> (pred[4], s32[]) {
  %f = bf16[8,4]{1,0} fusion(%p.5), calls=%drawn, backend_config={"estimated_cycles":"7"}
}
%unknown (p.6: (pred[4], s32[])) -> pred[] {
  ROOT %any.2 = pred[] fusion(%p.6), kind=kInput, calls=%reduced
}
ENTRY %main (p: pred[4]) -> pred[4] {
  %one = s32[] constant(1)
  %t.1 = (pred[4]{0}, s32[]) tuple(%p, %one)
  %while.1 = (pred[4]{0}, s32[]) while(%t.1), condition=%CONDITION, body=%body
}
"""


def test_a_loop_that_may_end_early_counts_all_its_turns_and_one_without_an_end_is_told():
    schedule = Schedule(FUSED.replace("CONDITION", "until"))
    assert sum(each.runs * each.cycles for each in schedule.operations()) == 1023 * 7
    assert schedule.num_unknown_loops == 0
    unknown = Schedule(FUSED.replace("CONDITION", "unknown"))
    assert sum(each.runs * each.cycles for each in unknown.operations()) == 7
    assert unknown.num_unknown_loops == 1


def test_a_collective_that_is_only_started_counts_its_result():
    assert collectives.traffic(TPU) == [collectives.Traffic("all-gather", 4, 24, 24 * 64 * 3 / 4)]


@pytest.mark.parametrize(
    "result",
    ["f32[4]{0}", "((f32[4]{0}), f32[4]{0})", "((f32[1]{0}, f32[3]{0}), (f32[1]{0}, f32[3]{0}))", "(f32[1]{0}, f32[3]{0})"],
)
def test_an_all_reduce_that_is_started_counts_its_results_in_every_notation(result):
    text = f"ENTRY %main (p: f32[4]) -> f32[4] {{\n  %s = {result} all-reduce-start(%p), replica_groups={{{{0,1,2,3}}}}\n}}\n"
    assert collectives.traffic(text) == [collectives.Traffic("all-reduce", 4, 1, 16 * 2 * 3 / 4)]


def test_a_kernel_is_counted_by_hand_from_its_shapes_and_blocks():
    (kernel,) = [each for each in Schedule(TPU).operations() if each.is_kernel]
    # Five products of every pair in the blocks that are not above the diagonal: three of four.
    flops = 5 * 2 * (2 * 3) * (0.75 * 1024 * 1024) * 64
    assert kernel_flops(kernel) == flops
    assert operation_secs(kernel, V5E) == pytest.approx(flops / (V5E.flops_per_s * 0.25))
    # Where its bytes take longer they count.
    slow = dataclasses.replace(V5E, hbm_bytes_per_s=1e6)
    moved = (6 + 2) * 1024 * 64 * 2 + 2 + (6 + 2) * 1024 * 64 * 2
    assert operation_secs(kernel, slow) == pytest.approx(moved / 0.75e6)


NEWEST = "attention_newest.3 = bf16[64,2,7,64]{3,2,1,0:T(8,128)}"
GPU_KERNEL = """
ENTRY %main.1 (q: bf16[1]) -> bf16[1] {
  %pallas_call.5 = (bf16[1,16,512,64]{3,2,1,0}, f32[1,16,512]{2,1,0}) custom-call(%q, %k),
 custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints={GIVEN, s32[1,1]{1,0}},
 metadata={op_name="jit(f)/NAME/pallas_call" stack_frame_id=1}
}
"""
ROWS, KEYS, NUMBERS = "bf16[1,16,512,64]{3,2,1,0}", "bf16[1,2,256,64]{3,2,1,0}", "f32[1,16,512]{2,1,0}"


@pytest.mark.parametrize(("name", "products"), [("forward", 2), ("backward_queries", 3), ("backward_keys", 4)])
def test_a_gpu_kernel_goes_by_its_own_name_and_counts_both_parts(name, products):
    given = [ROWS, ROWS, NUMBERS, NUMBERS, KEYS, KEYS]
    if name == "forward":
        given = [ROWS, KEYS, KEYS, ROWS, ROWS]
    text = GPU_KERNEL.replace("NAME", f"flash_{name}").replace("GIVEN", ", ".join(given))
    (kernel,) = [each for each in Schedule(text).operations() if each.is_kernel]
    assert kernel.kernel_name == f"flash_{name}"
    pairs = 512 * 256 + (512 * (512 + 64) / 2 if name == "forward" else 0)
    assert kernel_flops(kernel) == products * 2 * 16 * pairs * 64


def test_a_kernel_of_whole_rows_counts_its_blocks_of_both_parts():
    """Tokens are the last axis; blocks of 256 above the diagonal are not run."""
    rows, own, prompt, numbers = "bf16[8,14,64,1024]", "bf16[8,2,64,1024]", "bf16[1,2,64,256]", "f32[8,2,7,1024]"
    given = {"forward": [rows, prompt, prompt, own, own], "backward": [rows, rows, rows, numbers, prompt, prompt, own, own]}
    for name, products in (("forward", 2), ("backward", 5)):
        text = TPU.replace("splash_mha_dkv_no_residuals.3", f"vmap_attention_{name}_.3")
        old = text.split("operand_layout_constraints=")[1].split("\n")[0]
        arrays = ", ".join(f"{x}{{3,2,1,0}}" for x in given[name])
        schedule = Schedule(text.replace(old, f"{{s32[1,1]{{1,0}}, {arrays}}},"))
        (kernel,) = [each for each in schedule.operations() if each.is_kernel]
        flops = products * 2 * (8 * 14) * (1024 * 256 + 10 / 16 * 1024**2) * 64
        assert kernel_flops(kernel) == flops
        assert operation_secs(kernel, V5E) == pytest.approx(flops / (V5E.flops_per_s * 0.25))


def test_the_decoding_kernel_counts_half_of_the_caches():
    """They are its last two arrays; what it moves takes longer than its products."""
    text = TPU.replace(
        "splash_mha_dkv_no_residuals.3 = (bf16[1,2,3,1024,64]{4,3,2,1,0:T(8,128)}, bf16[2,1,1024,64]{3,2,1,0})", NEWEST
    )
    old = text.split("operand_layout_constraints=")[1].split("\n")[0]
    cache, prompt = "bf16[64,2,64,1024]{3,2,1,0}", "bf16[8,2,64,256]{3,2,1,0}"
    schedule = Schedule(
        text.replace(old, f"{{s32[2]{{0}}, bf16[64,2,7,64]{{3,2,1,0}}, {prompt}, {prompt}, {cache}, {cache}}},")
    )
    (kernel,) = [each for each in schedule.operations() if each.is_kernel]
    moved = 2 * (2 * 64 * 2 * 7 * 64 + 2 * 8 * 2 * 64 * 256 + 64 * 2 * 64 * 1024) + 8
    assert operation_secs(kernel, V5E) == pytest.approx(moved / (0.75 * V5E.hbm_bytes_per_s))


def test_bytes_of_types():
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, /*index=1*/s4[8]{0}, pred[5]{0})") == 12 + 4 + 5
    with pytest.raises(KeyError):
        array_bytes("f7[2]")


def test_clocks_follow_from_the_published_peaks():
    """Operations a cycle are those of a whole number of matrix units."""
    for name, units, side in (("v4", 8, 128), ("v5e", 4, 128), ("v5p", 8, 128), ("v6e", 4, 256), ("tpu7x", 4, 256)):
        chip = chips.find_chip(name)
        assert chip.flops_per_s / chip.clock_hz == pytest.approx(2 * units * side * side, rel=0.01), name


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (
            "Ran out of memory on HBM, the total memory required for HLO temporaries (15.75G) exceeds available HBM",
            15.75 * 2**30,
        ),
        ("Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm.", 17.5 * 2**30),
        ("Mosaic failed to compile", 0),
    ],
)
def test_what_a_refused_program_wanted_is_read(message, wanted):
    assert aot.wanted_bytes(message) == pytest.approx(wanted)


def test_a_missing_compiler_is_one_line(monkeypatch):
    monkeypatch.setattr(aot.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the compiler of v5e is not installed; pip install .grpo_jax\[aot-tpu\]"):
        aot.require_compiler("v5e")
    with pytest.raises(UserError, match=r"aot-gpu"):
        aot.require_compiler("h100")
    with pytest.raises(UserError, match="no compiler for --chip=a100"):
        aot.require_compiler("a100")


def test_without_an_estimate_there_is_no_share():
    assert aot.share_of(1.0, None) is None
    assert math.isclose(aot.share_of(1.0, 4.0) or 0, 0.25)
