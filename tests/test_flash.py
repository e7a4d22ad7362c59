"""The kernel form of attention against plain operations, forward and backward: as an interpreter runs it on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import flash
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.models.attention import KVCache, Prefix, attend
from grpo_jax.models.flash import attend as flash_attend
from grpo_jax.models.flash import seen, tpu, whole
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.tasks.embedded import tokenizer_of
from grpo_jax.training.build import make_model
from tests import tiny

TPU, GPU = (Hardware(platform, interpret=platform != jax.default_backend()) for platform in ("tpu", "gpu"))
LONG = "tpu, rows that no core's memory holds"
P, G, K, R = 2, 2, 1, 2
B = P * G


@pytest.fixture(params=["tpu", LONG, "gpu"])
def hardware(request, monkeypatch):
    """Each set of kernels in turn."""
    if request.param == LONG:
        monkeypatch.setattr(whole, "MAX_BYTES", 0)
    return GPU if request.param == "gpu" else TPU


def arch_of(head_dim, window=None, cap=None):
    local = () if window is None else (0,)
    return Architecture(tiny.VOCAB, 16, 1, K * R, K, head_dim, 24, sliding_window=window, local_layers=local, score_cap=cap)


def inputs(S, T, H, seed=0):
    """Arrays (q, own keys and values, the prompts'), and a mask of prompts padded on the left; one has no padding."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, K * R, H), (B, T, K, H), (B, T, K, H), (P, S, K, H), (P, S, K, H)]
    mask_PS = np.arange(S)[None] >= np.array([[S // 3], [0]])
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes), jnp.asarray(mask_PS)


def views_of(arch, mask_BT, prefix, hardware):
    """What the decoder's layers see."""
    model = ModelDef(arch, hardware=hardware)
    return model.bind(tiny.random_params(arch))._views(mask_BT, prefix)[0]


def value_and_grads(arch, hardware, arrays, mask_PS, weight_BTNH, has_prompt=True):
    """(sum of weighted outputs, gradients by all arrays) of completions of full length on top of their prompts."""
    T = arrays[0].shape[1]

    def weighted(q_BTNH, own_k, own_v, prompt_k, prompt_v):
        prefix = Prefix.of(None, mask_PS) if has_prompt else None
        view = views_of(arch, jnp.ones((B, T), bool), prefix, hardware)
        cache = KVCache.of(prompt_k, prompt_v) if has_prompt else None
        out_BTNH = attend(q_BTNH, KVCache.of(own_k, own_v), view, cache, arch.attention_scale, arch.score_cap)
        return (out_BTNH * weight_BTNH).sum(), out_BTNH

    grads, out = jax.jit(jax.grad(weighted, tuple(range(5)), has_aux=True))(*arrays)
    return out, *grads


def assert_same(got, expected, tolerance=1e-5):
    for x, y in zip(got, expected, strict=True):
        scale = max(1.0, float(jnp.abs(y).max()))
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(
    ("S", "T", "H", "window", "cap"),
    [(40, 130, 64, None, None), (128, 128, 80, None, 1.5), (150, 140, 64, 9, None), (40, 130, 8, 100, 2.0)],
    ids=["any length", "any width, capped scores", "a window", "a window over the prompt's end, capped scores"],
)
@pytest.mark.slow
def test_outputs_and_gradients_are_those_of_plain_operations(hardware, S, T, H, window, cap):
    arch, (arrays, mask_PS) = arch_of(H, window, cap), inputs(S, T, H)
    weight_BTNH = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32)
    given = arrays, mask_PS, weight_BTNH
    assert_same(value_and_grads(arch, hardware, *given), value_and_grads(arch, None, *given))


@pytest.mark.slow
def test_several_blocks_are_one_row(monkeypatch):
    """Blocks of keys whose parts of the queries' gradient are added up; one kernel for each gradient where they are many."""
    monkeypatch.setattr(whole, "MAX_BYTES", 0)
    monkeypatch.setattr(tpu, "BLOCKS", {128: 1.0})
    monkeypatch.setattr(tpu, "MIN_BACKWARD_KEYS", 128)
    arch, (arrays, mask_PS) = arch_of(64, 200), inputs(260, 380, 64)
    given = arrays, mask_PS, jnp.ones_like(arrays[0]).at[:, ::2].set(-0.5)
    expected = value_and_grads(arch, None, *given)
    assert_same(value_and_grads(arch, TPU, *given), expected)
    assert_same(value_and_grads(arch, GPU, *given), expected)
    monkeypatch.setattr(tpu, "MAX_PARTIAL_DQ", 1)
    assert_same(value_and_grads(arch, TPU, *given), expected)


@pytest.mark.slow
def test_rows_that_are_padded_on_the_left(hardware):
    """Prompts as they are read: no keys but their own, and padding before them that no token sees."""
    arch, (arrays, _) = arch_of(64, 100), inputs(8, 260, 64)
    mask_BT = jnp.arange(260)[None] >= jnp.array([[0], [70], [130], [259]])
    weight_BTNH = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.float32) * mask_BT[..., None, None]

    def value_and_grads(hardware):
        def weighted(q_BTNH, k_BTKH, v_BTKH):
            view = views_of(arch, mask_BT, None, hardware)
            out_BTNH = attend(q_BTNH, KVCache.of(k_BTKH, v_BTKH), view, None, arch.attention_scale)
            return (out_BTNH * weight_BTNH).sum(), out_BTNH * mask_BT[..., None, None]

        grads, out = jax.jit(jax.grad(weighted, (0, 1, 2), has_aux=True))(*arrays[:3])
        return out, *grads

    assert_same(value_and_grads(hardware), value_and_grads(None))


@pytest.mark.slow
def test_several_blocks_are_one_row_in_one_kernel(monkeypatch):
    """Blocks without a mask, those that a window's end or the diagonal cuts, and a group's sums of a prompt's gradients."""
    monkeypatch.setattr(whole, "BLOCK", 128)
    for window, cap in ((None, None), (200, 2.0)):
        arch, (arrays, mask_PS) = arch_of(64, window, cap), inputs(260, 640, 64)
        given = arrays, mask_PS, jnp.ones_like(arrays[0]).at[:, ::2].set(-0.5)
        assert_same(value_and_grads(arch, TPU, *given), value_and_grads(arch, None, *given))


def test_long_rows_are_not_for_a_core():
    """Of heads of 128 channels in bfloat16 about 3,000 tokens fit."""

    def fits(num_tokens):
        q, k = (jax.ShapeDtypeStruct((8, *shape), jnp.bfloat16) for shape in ((num_tokens, 4, 128), (2, num_tokens, 128)))
        prompt = jax.ShapeDtypeStruct((1, 2, 256, 128), jnp.bfloat16)
        return whole.fits(q, (k, k), (prompt, prompt))

    assert fits(2048) and not fits(4096)


def test_a_block_of_padding_is_not_run():
    """Blocks before the first token, above the diagonal and beyond the window; what is left covers every pair that is seen."""
    for part, begin in ((seen.Part(96, 0, None), 40), (seen.Part(50, 50, 20), 17), (seen.Part(50, 50, None), 0)):
        T, U = 96, -(-part.num // 16) * 16
        seen_TU = np.asarray(part.sees(jnp.arange(T)[:, None], jnp.arange(U)[None], begin))
        of_queries, of_keys = np.zeros_like(seen_TU), np.zeros_like(seen_TU)
        for start in range(0, T, 32):
            first, end = map(int, part.keys_seen(jnp.int32(start), 32, 16, begin))
            of_queries[start : start + 32, first * 16 : end * 16] = True
        for start in range(0, U, 16):
            first, end = map(int, part.queries_seeing(jnp.int32(start), 32, 16, begin, T))
            of_keys[first * 32 : max(first, end) * 32, start : start + 16] = True
        assert (of_queries | ~seen_TU).all() and (of_keys | ~seen_TU).all()
        for start in range(0, T, 32):
            first, end = map(int, part.keys_seen_by_all(jnp.int32(start), 32, 16, begin))
            assert seen_TU[start : start + 32, first * 16 : end * 16].all()
        tiles = seen_TU.reshape(T // 32, 32, U // 16, 16).any((1, 3))
        for run in (of_queries, of_keys):
            assert (run.reshape(T // 32, 32, U // 16, 16).any((1, 3)) == tiles).all(), "no block is run for nothing"


@pytest.mark.slow
@pytest.mark.parametrize("hardware", [TPU, GPU], ids=["tpu", "gpu"])
def test_the_cotangent_of_each_part_is_that_of_the_whole(monkeypatch, hardware):
    """Two calls that are merged outside of one derivative: the output is right, gradients are not. Ours must not be those."""
    monkeypatch.setattr(whole, "MAX_BYTES", 0)  # its one kernel has no parts
    arch, (arrays, mask_PS) = arch_of(64), inputs(128, 128, 64)
    given = arrays, mask_PS, jnp.ones_like(arrays[0]).at[..., ::2].set(-0.5)
    expected = value_and_grads(arch, None, *given)
    assert_same(value_and_grads(arch, hardware, *given), expected)
    kernels = flash_attend._kernels(hardware)
    gradients = kernels.backward

    def of_parts_alone(call, arrays, masks):
        """What a kernel's own derivative gives: each part's output and log-sum-exp in place of the whole's."""
        (q, own, prompt), _, lse, d_out = arrays
        own_out, own_lse = kernels.forward(call, (q, own, None), masks)
        d_own_out = d_out * jnp.exp(own_lse - lse)[..., None]
        dq, d_own, _ = gradients(call, ((q, own, None), own_out, own_lse, d_own_out), masks)
        return dq, d_own, jax.tree.map(jnp.zeros_like, prompt)

    monkeypatch.setattr(kernels, "backward", of_parts_alone)
    trapped = value_and_grads(arch, hardware, *given)
    assert_same(trapped[:1], expected[:1])
    assert all(float(jnp.abs(x - y).max()) > 0.01 for x, y in zip(trapped[1:3], expected[1:3], strict=True))


GEMMA = Architecture(  # a local layer below a global one: the compiled program tells them apart
    tiny.VOCAB, 16, 2, 2, 1, 8, 24, query_scale=0.3, sliding_window=50, local_layers=(0,), local_rope=Rope(100.0)
)


@pytest.mark.slow
def test_a_decoder_has_the_same_gradients(hardware):
    """Prompts and completions through all layers, one completion with little; remat keeps what the kernel gave."""
    S, T = 130, 128
    rng = np.random.default_rng(0)
    tokens_PS, tokens_BT = (jnp.asarray(rng.integers(1, tiny.VOCAB, shape)) for shape in ((1, S), (G, T)))
    mask_PS, mask_BT = jnp.arange(S)[None] >= 90, jnp.arange(T)[None] < jnp.array([[T], [1]])
    params = tiny.random_params(GEMMA)

    def summed(model, params):
        last_PD, hidden_BTD, _ = model.bind(params).forward_with_prefix(tokens_PS, mask_PS, tokens_BT, mask_BT)
        return (last_PD * 0.3).sum() + (hidden_BTD**2 * mask_BT[..., None]).sum()

    def run(**changes):
        return jax.jit(jax.value_and_grad(functools.partial(summed, ModelDef(GEMMA, **changes))))(params)

    value, grads = run()
    found, found_grads = run(hardware=hardware, remat="narrow")
    np.testing.assert_allclose(found, value, rtol=1e-5)
    assert tiny.largest_difference(found_grads, grads) < 1e-5


def test_plain_attention_is_a_setting():
    prompt_PS, mask_BT = jnp.ones((P, 8), bool), jnp.ones((B, 128), bool)
    for attention, has_rows in (("auto", True), ("plain", False)):
        model = ModelDef(GEMMA, hardware=GPU, attention=attention)
        view = model.bind(tiny.random_params(GEMMA))._views(mask_BT, Prefix.of(None, prompt_PS))[0]
        assert (view.rows is not None) == has_rows
    config = tiny.config_of("grpo", {"model.attention": "plain"})
    assert make_model(config, tokenizer_of(config)).attention == "plain"


def test_who_has_a_kernel():
    rows = flash.CausalRows(jnp.ones((B, 128), jnp.int32), None, None, None, False, TPU)
    assert flash.suits(rows, 128, 128)
    assert not flash.suits(None, 128, 128)
    assert not flash.suits(rows, 127, 127) and not flash.suits(rows, 1, 128)
    assert flash.suits(dataclasses.replace(rows, hardware=Hardware("gpu")), 128, 128)
    assert not flash.suits(dataclasses.replace(rows, hardware=Hardware("rocm")), 128, 128)
    assert not flash.suits(dataclasses.replace(rows, window=1), 128, 128)


@pytest.mark.parametrize(("num", "block", "length"), [(1, 128, 128), (256, 256, 256), (1023, 512, 1024), (640, 384, 768)])
def test_blocks_cover_any_length(num, block, length):
    assert (tpu.block_of(num), tpu.padded_length(num)) == (block, length)
