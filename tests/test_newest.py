"""Attention of a row's newest token by the kernels, against plain operations: as an interpreter runs them on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from grpo_jax.config import RolloutConfig
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.models.attention import KVCache, Prefix, attend, make_views
from grpo_jax.models.flash import attend_filled, attend_newest, call, single, tpu_newest
from grpo_jax.models.lora import LoRA
from grpo_jax.models.rope import rope_tables
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import make_mesh, with_shardings
from grpo_jax.rollout.rollout import EndTokens, rollout, row_keys
from grpo_jax.tools.plan import collectives
from tests import tiny

GPU, TPU = (Hardware(platform, interpret=platform != jax.default_backend()) for platform in ("gpu", "tpu"))
of_each = pytest.mark.parametrize("hardware", [GPU, TPU], ids=["gpu", "tpu"])
P, G, K, R = 3, 4, 2, 3
B = P * G
SLOTS = [0, 63, 64, 100, 127, 1, 5, 70, 3, 2, 1, 126]
WINDOWS = {"sliding_window": 70, "local_layers": (0, 2), "local_rope": Rope(100.0)}
LAYERS = Architecture(tiny.VOCAB, 16, 3, 4, 2, 16, 24, **WINDOWS, score_cap=5.0, qkv_bias=True)


def drawn(rng, dtype, *shape):
    return jnp.asarray(rng.normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("slots", "window", "cap", "widths"),
    [
        ([5] * B, None, None, (40,)),
        (SLOTS, None, 3.0, (130,)),
        (SLOTS, 70, None, (10, 100)),
        ([90] * B, 1, None, (64,)),
    ],
    ids=["one slot", "slots of their own, capped", "a window, prompts in parts", "itself alone"],
)
@pytest.mark.parametrize("rows", [1, 4])
@of_each
def test_outputs_and_caches_are_those_of_plain_operations(hardware, dtype, slots, window, cap, widths, rows, monkeypatch):
    """Empty slots hold anything; of the cache only the newest token's slot changes, in place of what was there."""
    monkeypatch.setattr(single, "_rows_at_a_time", lambda *_: rows)
    monkeypatch.setattr(tpu_newest, "MAX_PROGRAM_HEADS", rows)
    monkeypatch.setattr(tpu_newest, "BLOCK", 64)  # two blocks
    rng, H, U = np.random.default_rng(0), 32, 128
    lengths_P = jnp.asarray([1, 7, 10])
    parts = [slice(0, P)] if len(widths) == 1 else [slice(0, 1), slice(1, P)]
    masks = [jnp.arange(S)[None] >= S - lengths_P[part, None] for S, part in zip(widths, parts, strict=True)]
    if len(widths) == 1:
        masks = [masks[0].at[2].set(True)]  # a prompt without padding
        lengths_P = lengths_P.at[2].set(widths[0])
    prompts = [KVCache(drawn(rng, dtype, len(m), K, H, m.shape[1]), drawn(rng, dtype, len(m), K, m.shape[1], H)) for m in masks]
    cache = KVCache(drawn(rng, dtype, B, K, H, U), drawn(rng, dtype, B, K, U, H))
    q_BNH, new = drawn(rng, dtype, B, K * R, H), tuple(drawn(rng, dtype, B, K, H) for _ in range(2))
    slot_B = jnp.asarray(slots)

    whole = [each.pad_to(single.round_prompt(hardware, each.num_slots)) for each in prompts]
    given = [(each.k, each.v) for each in whole], single.newest_tokens(hardware, slot_B, masks, lengths_P, window)
    filled = cache.update(KVCache.of(new[0][:, None], new[1][:, None]), slot_B)
    if hardware == GPU:
        out_BNH, found = jax.jit(attend_newest, static_argnums=(5, 6))(q_BNH, new, (cache.k, cache.v), *given, 0.5, cap)
    else:
        found = filled.k, filled.v
        out_BNH = jax.jit(attend_filled, static_argnums=(4, 5))(q_BNH, found, *given, 0.5, cap)

    local = {} if window is None else {"sliding_window": window, "local_layers": (0,)}
    arch = Architecture(tiny.VOCAB, 16, 1, K * R, K, H, 24, **local)
    in_parts = len(widths) > 1
    prefix = Prefix(None, tuple(masks) if in_parts else masks[0], lengths_P)
    length_B1, slots_1U = jnp.repeat(lengths_P, G)[:, None], jnp.arange(U)[None]
    mask_B1U = (slots_1U <= slot_B[:, None])[:, None]
    view = make_views(arch, length_B1 + slot_B[:, None], length_B1 + slots_1U, mask_B1U, prefix)[0]
    expected = attend(q_BNH[:, None], filled, view, tuple(prompts) if in_parts else prompts[0], 0.5, cap)[:, 0]

    scale = 1e-5 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(out_BNH.astype(jnp.float32), expected.astype(jnp.float32), atol=scale, rtol=scale)
    np.testing.assert_array_equal(found[0], filled.k)
    np.testing.assert_array_equal(found[1], filled.v)


@functools.cache
def sampled(hardware, live, long_rows, arch=LAYERS, attention="auto"):
    """Completions of a few prompts, two of them long, of 80 tokens."""
    prompts = tiny.random_prompts(4, 70)
    if long_rows:
        mask_PS = prompts.mask_PS & (jnp.arange(70)[None] >= jnp.asarray([62, 0, 60, 0])[:, None])
        prompts = dataclasses.replace(prompts, mask_PS=mask_PS, long_rows=(2, 10))
    config = RolloutConfig(group_size=2, max_completion_tokens=80, temperature=1.0, max_live_sequences=live)
    model = ModelDef(arch, hardware=hardware, attention=attention)
    run = jax.jit(lambda params, prompts, keys: rollout(model, params, prompts, keys, config, EndTokens((9,), 0)))
    return run(tiny.random_params(arch), prompts, row_keys(jax.random.key(0), 4, 2))


@pytest.mark.slow
@pytest.mark.parametrize("long_rows", [False, True], ids=["one width", "two widths"])
@pytest.mark.parametrize("live", [0, 3], ids=["side by side", "one after the other"])
@of_each
def test_a_rollout_by_the_kernel_draws_the_same_tokens(hardware, live, long_rows):
    found, expected = sampled(hardware, live, long_rows), sampled(None, 0, long_rows)
    np.testing.assert_array_equal(found.tokens_PGT, expected.tokens_PGT)
    np.testing.assert_allclose(found.sampler_logp_PGT, expected.sampler_logp_PGT, atol=2e-5)
    assert expected.mask_PGT.sum(-1).max() > 64  # beyond a block of slots


@pytest.mark.slow
def test_states_beside_keys_and_values():
    """Of gated delta nets the prompts' states are handed on as they are."""
    arch = dataclasses.replace(tiny.DELTA, head_dim=16)
    expected = sampled(None, 0, False, arch)
    for hardware in (GPU, TPU):
        np.testing.assert_array_equal(sampled(hardware, 0, False, arch).tokens_PGT, expected.tokens_PGT)


def over(num_devices):
    return dataclasses.replace(GPU, mesh=AbstractMesh((num_devices,), ("tensor",)))


@pytest.mark.parametrize("norms", [{}, {"qk_norm": True}], ids=["biases", "norms of heads"])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_products_of_the_same_rows_are_one(num_devices, norms):
    """In the first layer of a stack, the outputs of several devices each with its own."""
    arch = dataclasses.replace(LAYERS, **norms)
    x_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 16)), jnp.float32)
    rope = rope_tables(jnp.arange(3)[None], arch.rope, arch.head_dim)
    decoder = ModelDef(arch, hardware=over(num_devices)).bind(tiny.random_params(arch))
    (joined,) = decoder._decoding_places()
    assert joined.attn.k is None and joined.mlp.up is None
    plain = ModelDef(arch, hardware=Hardware("tpu"), attention="plain").bind(tiny.random_params(arch))
    (of_plain,) = plain._decoding_places()
    assert of_plain.attn.k is not None and of_plain.mlp.up is None

    def outputs(layers):
        graphdef, stacks = nnx.split(layers)
        block = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], stacks))
        return *block.attn.project(x_BTD, rope, None)[:3], block.mlp(x_BTD)[0]

    for found, expected in zip(outputs(joined), outputs(decoder.layers), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_what_is_joined_stays_with_the_devices_that_have_it():
    """Nothing travels: neither when the matrices are put together nor when their outputs are taken apart."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "expert": 1, "context": 1, "tensor": 2})
    model = ModelDef(LAYERS, hardware=dataclasses.replace(GPU, mesh=mesh))

    def project(params, x_BTD):
        graphdef, stacks = nnx.split(model.bind(params)._decoding_places()[0])
        block = nnx.merge(graphdef, jax.tree.map(lambda x: x[0], stacks))
        q, k, v, _ = block.attn.project(x_BTD, rope_tables(jnp.zeros((2, 1), jnp.int32), LAYERS.rope, 16), None)
        return q, k, v, block.mlp.gate(x_BTD)

    weights = with_shardings(model.param_shapes(), mesh, 0)
    rows = jax.ShapeDtypeStruct((2, 1, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    heads, channels = (NamedSharding(mesh, PartitionSpec(None, None, *axes)) for axes in (("tensor", None), ("tensor",)))
    program = jax.jit(project, out_shardings=(heads, heads, heads, channels)).lower(weights, rows).compile()
    assert not collectives.traffic(program.as_text())


def test_products_that_stay_apart():
    model = ModelDef(LAYERS, hardware=GPU, lora=LoRA(2, 4.0, ("k_proj", "up_proj")))
    tree = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), model.param_shapes())
    (layers,) = model.bind(tree)._decoding_places()
    assert layers.attn.k is not None and layers.mlp.up is not None


@of_each
def test_runs_that_one_call_advances(hardware):
    """As a sweep does: the kernel under vmap."""
    rng, H, U, members = np.random.default_rng(1), 16, 64, 2
    q_XBNH, *new = (drawn(rng, jnp.float32, members, B, heads, H) for heads in (K * R, K, K))
    cache = drawn(rng, jnp.float32, members, B, K, H, U), drawn(rng, jnp.float32, members, B, K, U, H)
    prompt = drawn(rng, jnp.float32, members, P, K, H, U), drawn(rng, jnp.float32, members, P, K, U, H)
    told = single.newest_tokens(hardware, jnp.arange(B), [jnp.ones((P, U), bool)], jnp.full(P, U), None)

    def one(q_BNH, new, cache, prompt):
        if hardware == TPU:
            return attend_filled(q_BNH, cache, [prompt], told, 1.0)
        return attend_newest(q_BNH, new, cache, [prompt], told, 1.0)

    found = jax.jit(jax.vmap(one))(q_XBNH, tuple(new), cache, prompt)
    for member in range(members):
        expected = one(*jax.tree.map(lambda x, member=member: x[member], (q_XBNH, tuple(new), cache, prompt)))
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(x[member], y, atol=1e-6)


def test_rows_of_a_program():
    """As many of a group as fill a product of 16, if there are programs enough without."""
    sizes = {(8, 7, 512): 1, (8, 7, 2048): 2, (8, 2, 2048): 4, (8, 2, 1 << 20): 8, (6, 4, 1 << 20): 3, (1, 1, 1 << 20): 1}
    assert {given: single._rows_at_a_time(*given) for given in sizes} == sizes


def test_a_jax_without_the_kernels(monkeypatch, caplog):
    """One day Pallas for Triton is gone: plain operations, and a line that says so once."""
    monkeypatch.setattr(call.importlib.util, "find_spec", lambda _: None)
    call.has_kernels.cache_clear()
    try:
        assert not single.suits(GPU, 64) and not call.has_kernels("gpu")
        assert call.has_kernels("tpu") and not call.has_kernels("cpu")
        assert [record.message.split(":")[0] for record in caplog.records] == ["attention by plain operations"]
    finally:
        call.has_kernels.cache_clear()


def test_who_decodes_by_the_kernel():
    assert single.suits(GPU, 64) and single.suits(GPU, 16)
    assert single.suits(TPU, 80)
    assert not single.suits(None, 64) and not single.suits(TPU, 8)
    assert not single.suits(GPU, 80) and not single.suits(GPU, 8)
    for changes in ({"attention": "plain"}, {"numerics": "exact"}):
        assert not ModelDef(LAYERS, hardware=GPU, **changes).bind(tiny.random_params(LAYERS)).decodes_by_kernel


def test_a_cache_that_no_core_holds_is_attended_to_in_plain_operations(monkeypatch, caplog):
    call.say_once.cache_clear()
    expected = sampled(None, 0, False)
    monkeypatch.setattr(tpu_newest, "MAX_BYTES", 0)
    sampled.cache_clear()
    np.testing.assert_array_equal(sampled(TPU, 0, False).tokens_PGT, expected.tokens_PGT)
    sampled.cache_clear()
    said = "decoding attends by plain operations: a core's memory does not hold prompts of 70 tokens"
    assert caplog.messages == [said]


def test_programs_of_a_tpu():
    """Rows of a group and heads of keys for about a megabyte at a time."""

    def sizes(group_size, K, H, U):
        return dataclasses.astuple(tpu_newest.Sizes.of(group_size, jax.ShapeDtypeStruct((1, K, H, U), jnp.bfloat16)))

    assert sizes(8, 2, 64, 1024) == (8, 2, 256)
    assert sizes(8, 8, 128, 1024) == (1, 8, 256)
    assert sizes(6, 1, 128, 384) == (6, 1, 128)
    assert sizes(1, 2, 16, 40) == (1, 2, 40)
