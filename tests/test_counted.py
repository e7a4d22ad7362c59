"""Seconds of XLA:GPU's programs: products, bytes and launches counted by hand, against numbers worked out here."""

import dataclasses

import pytest

from grpo_jax.tools.plan import chips
from grpo_jax.tools.plan.counted import BANDWIDTH_SHARE, KERNEL_BANDWIDTH_SHARE, LAUNCH_SECS, PRODUCT_SHARE, GpuCosts
from grpo_jax.tools.plan.schedule import GPU_KERNEL_SHARE, Schedule

H100 = chips.find_chip("h100")
TEXT = """HloModule jit_f, is_scheduled=true

%product (p.0: bf16[24,64,128], p.1: bf16[256,128], p.2: s32[]) -> f32[256,64] {
  %p.0 = bf16[24,64,128]{2,1,0} parameter(0)
  %p.1 = bf16[256,128]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %layer = bf16[1,64,128]{2,1,0} dynamic-slice(%p.0, %p.2, %zero, %zero), dynamic_slice_sizes={1,64,128}
  %w = bf16[64,128]{1,0} bitcast(%layer)
  ROOT %dot = f32[256,64]{1,0} dot(%p.1, %w), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
%write (q.0: bf16[24,256,64], q.1: bf16[1,256,64], q.2: s32[]) -> bf16[24,256,64] {
  %q.0 = bf16[24,256,64]{2,1,0} parameter(0)
  %q.1 = bf16[1,256,64]{2,1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  ROOT %put = bf16[24,256,64]{2,1,0} dynamic-update-slice(%q.0, %q.1, %q.2, %q.2, %q.2)
}
%body (b: (s32[], bf16[24,64,128])) -> (s32[], bf16[24,64,128]) {
  %b = (s32[], bf16[24,64,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %stack = bf16[24,64,128]{2,1,0} get-tuple-element(%b), index=1
  %x = bf16[256,128]{1,0} get-tuple-element(%b), index=2
  %kept = bf16[24,256,64]{2,1,0} get-tuple-element(%b), index=3
  %new = bf16[1,256,64]{2,1,0} get-tuple-element(%b), index=4
  %fusion.1 = f32[256,64]{1,0} fusion(%stack, %x, %i), kind=kCustom, calls=%product
  %fusion.2 = bf16[24,256,64]{2,1,0} fusion(%kept, %new, %i), kind=kLoop, calls=%write
  %cublas = (f32[256,64]{1,0}, s8[4096]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %fusion-start.1 = ((bf16[24,64,128]{2,1,0}, bf16[256,128]{1,0}, s32[]), f32[256,64]{1,0}, u32[]) fusion-start(%stack, %x, %i), kind=kCustom, calls=%product
  %fusion-done.1 = f32[256,64]{1,0} fusion-done(%fusion-start.1)
  %copy.1 = bf16[256,128]{1,0} copy(%x)
  %all-reduce-start.1 = f32[256,64]{1,0} all-reduce-start(%fusion.1), replica_groups={{0,1}}
}
%until (c: (s32[], bf16[24,64,128])) -> pred[] {
  %c = s32[] constant(24)
  ROOT %lt = pred[] compare(%j, %c), direction=LT
}
ENTRY %main (p: bf16[24,64,128]) -> bf16[24,64,128] {
  %start = s32[] constant(0)
  %t = (s32[], bf16[24,64,128]{2,1,0}) tuple(%start, %p)
  %while.1 = (s32[], bf16[24,64,128]{2,1,0}) while(%t), condition=%until, body=%body
  %attend = (bf16[256,14,64]{2,1,0}, bf16[256,2,64,1024]{3,2,1,0}, bf16[256,2,1024,64]{3,2,1,0}) custom-call(%q, %k, %v), custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints={bf16[256,14,64]{2,1,0}, bf16[256,2,64,1024]{3,2,1,0}, bf16[256,2,1024,64]{3,2,1,0}}, output_to_operand_aliasing={{1}: (1, {}), {2}: (2, {})}, metadata={op_name="jit(f)/attend_newest/pallas_call"}
  %forward = bf16[1,16,512,64]{3,2,1,0} custom-call(%q, %k), custom_call_target="__gpu$xla.gpu.triton", operand_layout_constraints={bf16[1,16,512,64]{3,2,1,0}, bf16[1,16,256,64]{3,2,1,0}}, metadata={op_name="jit(f)/flash_forward/pallas_call"}
}
"""  # noqa: E501 - as XLA writes it


def copied(num_bytes, share=BANDWIDTH_SHARE):
    return LAUNCH_SECS + num_bytes / (share * H100.hbm_bytes_per_s)


def multiplied(flops, share=PRODUCT_SHARE, chip=H100):
    return LAUNCH_SECS + flops / (share * chip.flops_per_s)


def costs_of(text, chip=H100):
    """-> {instruction: (runs, seconds of one)}."""
    schedule = Schedule(text)
    secs_of = GpuCosts(schedule, chip).secs
    return {each.instruction.name: (each.runs, secs_of(each)) for each in schedule.operations(weigh=secs_of)}


@pytest.fixture
def secs():
    return costs_of(TEXT)


def test_a_fusion_reads_the_layer_that_it_cuts_and_writes_the_slice_that_it_puts(secs):
    read = 64 * 128 * 2 + 256 * 128 * 2 + 4
    assert secs["fusion.1"] == (24, pytest.approx(copied(read + 256 * 64 * 4)))
    assert secs["fusion-start.1"] == secs["fusion.1"]
    assert secs["fusion.2"] == (24, pytest.approx(copied(2 * 256 * 64 * 2 + 4)))
    assert secs["copy.1"] == (24, pytest.approx(copied(2 * 256 * 128 * 2)))


def test_values_loops_and_collectives_take_no_time(secs):
    assert {secs[name][1] for name in ("start", "t", "while.1", "i", "stack", "all-reduce-start.1", "fusion-done.1")} == {0.0}


def test_products_count_where_they_take_longer_than_bytes():
    slow, flops = dataclasses.replace(H100, flops_per_s=1e9), 2 * 256 * 64 * 128
    found = costs_of(TEXT, slow)
    assert found["fusion.1"][1] == found["cublas"][1] == pytest.approx(multiplied(flops, chip=slow))
    wide = costs_of(TEXT.replace("bf16[256,128]", "f32[256,128]"), slow)
    assert wide["fusion.1"][1] == pytest.approx(multiplied(2 * flops, chip=slow)), "float32 has half the peak"


def test_a_kernel_reads_half_of_the_caches_that_it_changes_in_place_and_writes_none(secs):
    cache, heads = 256 * 2 * 64 * 1024 * 2, 256 * 14 * 64 * 2
    assert secs["attend"][1] == pytest.approx(copied(2 * cache / 2 + 2 * heads, KERNEL_BANDWIDTH_SHARE))
    flops = 2 * 2 * 16 * 512 * 256 * 64
    moved = (2 * 16 * 512 * 64 + 16 * 256 * 64) * 2
    assert secs["forward"][1] == pytest.approx(
        max(multiplied(flops, GPU_KERNEL_SHARE[64]), copied(moved, KERNEL_BANDWIDTH_SHARE))
    )
