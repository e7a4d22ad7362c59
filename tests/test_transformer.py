"""The decoder against a NumPy one written from the papers; prefix, cache, remat and scan are only other ways to compute it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.models import attention, rope, transformer
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.models.attention import AttentionView, KVCache, attend
from grpo_jax.models.transformer import ModelDef
from tests import tiny

P, G, S, T = 3, 2, 5, 6
B = P * G
SIZE = dict(vocab_size=tiny.VOCAB, dim=16, num_layers=2, num_heads=4, ffn_dim=24)
ARCHS = {
    "llama": Architecture(**SIZE, num_kv_heads=2, head_dim=4, tie_embeddings=False, norm_eps=1e-5),
    "qwen2": Architecture(**SIZE, num_kv_heads=1, head_dim=4, qkv_bias=True, rope=Rope(1e6)),
    "qwen3": Architecture(**SIZE, num_kv_heads=2, head_dim=6, qk_norm=True, rope=Rope(1e6)),
}
GEMMA = Architecture(  # all that tells the families apart: a local layer below a global one, windows ending anywhere
    **SIZE,
    num_kv_heads=2,
    head_dim=6,
    qk_norm=True,
    rope=Rope(1e4),
    activation="gelu_tanh",
    norm_plus_one=True,
    post_norms=True,
    embed_scale=4.0,
    query_scale=0.3,
    sliding_window=3,
    local_layers=(0,),
    local_rope=Rope(100.0),
)
DEEP = dataclasses.replace(ARCHS["llama"], num_layers=transformer.MAX_UNROLLED + 1)  # scanned, not unrolled
every_arch = pytest.mark.parametrize("arch", ARCHS.values(), ids=ARCHS)
with_gemma = pytest.mark.parametrize("arch", [*ARCHS.values(), GEMMA, tiny.DELTA], ids=[*ARCHS, "gemma", "delta"])
with_delta = pytest.mark.parametrize("arch", [*ARCHS.values(), tiny.DELTA], ids=[*ARCHS, "delta"])


def atol_of(arch):
    """Six layers with norms that are twice as large as usual, two of three over a state's answers: more digits are lost.

    Computed in float64 throughout, the forms that are compared here agree to 4e-14. In float32 each is up to 4.6e-5 from
    that (jax 0.10.2 and 0.12.0.1, another form each time), so two of them may be twice as far from each other.
    """
    return 1e-5 if arch.delta is None else 1e-4


def make_inputs(seed=0):
    """Prompts with left padding, completions with right padding; one completion row has no token at all."""
    rng = np.random.default_rng(seed)
    prompts = tiny.random_prompts(P, S, seed=seed)
    lengths_B = np.array([T, 3, 1, 5, 0, T])
    mask_BT = np.arange(T)[None] < lengths_B[:, None]
    tokens_BT = np.where(mask_BT, rng.integers(1, tiny.VOCAB, (B, T)), 0)
    return prompts.tokens_PS, prompts.mask_PS, jnp.asarray(tokens_BT), jnp.asarray(mask_BT)


def concatenated(tokens_PS, mask_PS, tokens_BT, mask_BT):
    """The same as one plain sequence a row, [B, S + T]: left padding, prompt, completion, right padding."""
    tokens_BX = jnp.concatenate([jnp.repeat(tokens_PS, G, axis=0), tokens_BT], 1)
    return tokens_BX, jnp.concatenate([jnp.repeat(mask_PS, G, axis=0), mask_BT], 1)


@functools.cache
def plain(model):
    return jax.jit(lambda params, tokens_BX, mask_BX: model.bind(params)(tokens_BX, mask_BX))


def continued(model, params, tokens_PS, mask_PS, tokens_BT, mask_BT):
    """Hidden states of the completions, computed on top of their prompts' cache."""
    decoder = model.bind(params)
    return decoder.forward_with_prefix(tokens_PS, mask_PS, tokens_BT, mask_BT)[:2]


@functools.cache
def with_prefix(model):
    return jax.jit(functools.partial(continued, model))


# ----------------------------------------------------------------------------------------------- the NumPy transformer


def numpy_norm(x_TD, weight_D, arch):
    return x_TD / np.sqrt((x_TD**2).mean(-1, keepdims=True) + arch.norm_eps) * (weight_D + arch.norm_plus_one)


def numpy_activation(x, name):
    if name == "silu":
        return x / (1 + np.exp(-x))
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_rotate(x_H, position, theta):
    """Each pair (channel i, channel i + H/2) as a complex number, turned by position * theta^(-2i/H)."""
    half = len(x_H) // 2
    turned = (x_H[:half] + 1j * x_H[half:]) * np.exp(1j * position * theta ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag])


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_rotary_pairs_turn_in_either_order_of_operations(platform, monkeypatch):
    """On TPUs by whole heads, elsewhere by halves."""
    monkeypatch.setattr(rope, "target_platform", lambda: platform)
    positions_BT = jnp.array([[0, 3, 1000]])
    x_BTNH = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 2, 6)), jnp.float32)
    found = rope.rotate(x_BTNH, rope.rope_tables(positions_BT, Rope(1e4), 6))
    for t, position in enumerate([0, 3, 1000]):
        for n in range(2):
            np.testing.assert_allclose(found[0, t, n], numpy_rotate(np.asarray(x_BTNH)[0, t, n], position, 1e4), atol=2e-4)


def numpy_attention(q_TNH, k_TKH, v_TKH, scale, window):
    """Causal, over the last `window` keys (None: all); query head n reads key/value head n // (N / K)."""
    num, N, _ = q_TNH.shape
    out_TNH = np.zeros_like(q_TNH)
    for t in range(num):
        seen = slice(0 if window is None else max(t + 1 - window, 0), t + 1)
        for n in range(N):
            kv = n * k_TKH.shape[1] // N
            scores = k_TKH[seen, kv] @ q_TNH[t, n] * scale
            p = np.exp(scores - scores.max())
            out_TNH[t, n] = p @ v_TKH[seen, kv] / p.sum()
    return out_TNH


def numpy_decoder(params, arch, tokens):
    """float64 hidden states [T, D] of one row without padding."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x_TD = params["embed"][tokens] * arch.embed_scale
    scale = arch.head_dim**-0.5 if arch.query_scale is None else arch.query_scale
    for layer in range(arch.num_layers):
        w = jax.tree.map(lambda x: x[layer], params["layers"])  # noqa: B023
        attn, mlp, is_local = w["attn"], w["mlp"], layer in arch.local_layers
        theta = (arch.local_rope if is_local else arch.rope).theta
        h_TD = numpy_norm(x_TD, w["attn_norm"]["weight"], arch)
        q, k, v = (
            (h_TD @ attn[name]["weight"].T + attn[name].get("bias", 0.0)).reshape(len(tokens), -1, arch.head_dim)
            for name in "qkv"
        )
        if arch.qk_norm:
            q = numpy_norm(q, attn["q_norm"]["weight"], arch)
            k = numpy_norm(k, attn["k_norm"]["weight"], arch)
        q, k = (np.array([[numpy_rotate(head, t, theta) for head in row] for t, row in enumerate(x)]) for x in (q, k))
        out_TNH = numpy_attention(q, k, v, scale, arch.sliding_window if is_local else None)
        out_TD = out_TNH.reshape(len(tokens), -1) @ attn["o"]["weight"].T
        x_TD = x_TD + (numpy_norm(out_TD, w["attn_post_norm"]["weight"], arch) if arch.post_norms else out_TD)
        h_TD = numpy_norm(x_TD, w["mlp_norm"]["weight"], arch)
        gate_TF = h_TD @ mlp["gate"]["weight"].T
        up_TF = h_TD @ mlp["up"]["weight"].T
        out_TD = (numpy_activation(gate_TF, arch.activation) * up_TF) @ mlp["down"]["weight"].T
        x_TD = x_TD + (numpy_norm(out_TD, w["mlp_post_norm"]["weight"], arch) if arch.post_norms else out_TD)
    return numpy_norm(x_TD, params["final_norm"]["weight"], arch)


@pytest.mark.parametrize("arch", [*ARCHS.values(), GEMMA, DEEP], ids=[*ARCHS, "gemma", "deep"])
def test_forward_is_the_numpy_transformer(arch):
    """Prompt and completion as one row, padding on both sides: padding must not even shift the positions."""
    params = tiny.random_params(arch)
    tokens_BX, mask_BX = concatenated(*make_inputs())
    hidden_BXD = plain(ModelDef(arch))(params, tokens_BX, mask_BX)
    assert np.isfinite(hidden_BXD).all()
    for tokens_X, mask_X, hidden_XD in zip(*map(np.asarray, (tokens_BX, mask_BX, hidden_BXD)), strict=True):
        np.testing.assert_allclose(hidden_XD[mask_X], numpy_decoder(params, arch, tokens_X[mask_X]), atol=2e-5)


def test_head_is_the_embedding_only_where_tied():
    for arch in ARCHS.values():
        params = tiny.random_params(arch)
        expected_VD = params["embed"] if arch.tie_embeddings else params["head"]
        np.testing.assert_array_equal(ModelDef(arch).bind(params).head_VD, expected_VD)
        assert ("head" in params) != arch.tie_embeddings


# -------------------------------------------------------------------------------------------- other ways to compute it


@with_gemma
def test_prefix_and_completions_are_the_concatenated_forward(arch):
    params, inputs = tiny.random_params(arch), make_inputs()
    last_PD, hidden_BTD = with_prefix(ModelDef(arch))(params, *inputs)
    whole_BXD = plain(ModelDef(arch))(params, *concatenated(*inputs))
    np.testing.assert_allclose(last_PD, whole_BXD[::G, S - 1], atol=atol_of(arch))
    is_token_BT = np.asarray(inputs[3])
    np.testing.assert_allclose(hidden_BTD[is_token_BT], whole_BXD[:, S:][is_token_BT], atol=atol_of(arch))
    assert np.isfinite(hidden_BTD).all()


@with_gemma
def test_a_chain_of_decode_steps_is_the_forward(arch):
    """The cache is wider than the completions: slots that are not written yet must not be seen."""
    params, (tokens_PS, mask_PS, tokens_BT, _) = tiny.random_params(arch), make_inputs()
    full_BT = jnp.ones_like(tokens_BT)

    @jax.jit
    def chain(params):
        decoder = ModelDef(arch).bind(params)
        _, prefix = decoder.encode_prompts(tokens_PS, mask_PS)
        layers = decoder.unstack_layers()
        junk = jax.tree.map(lambda x: x + 7.0, decoder.empty_caches(B, T + 2))

        def step(caches, slot):
            hidden_BD, caches, _ = decoder.decode_step(layers, caches, tokens_BT[:, slot], slot, prefix)
            return caches, hidden_BD

        _, hidden_TBD = jax.lax.scan(step, junk, jnp.arange(T))
        return hidden_TBD.swapaxes(0, 1)

    _, expected_BTD = with_prefix(ModelDef(arch))(params, tokens_PS, mask_PS, tokens_BT, full_BT)
    np.testing.assert_allclose(chain(params), expected_BTD, atol=atol_of(arch))


def value_and_grads(model, params, inputs):
    shape_BTD = (*inputs[2].shape, model.arch.dim)
    direction_BTD = jax.random.normal(jax.random.key(1), shape_BTD) * inputs[3][..., None]
    return jax.jit(jax.value_and_grad(lambda p: (continued(model, p, *inputs)[1] * direction_BTD).sum()))(params)


@pytest.mark.slow
def test_remat_scan_and_unrolled_layers_agree(monkeypatch):
    arch, inputs = GEMMA, make_inputs()
    params = tiny.random_params(arch)
    unrolled = value_and_grads(ModelDef(arch), params, inputs)
    monkeypatch.setattr(transformer, "MAX_UNROLLED", arch.num_layers - 1)
    as_scan = value_and_grads(ModelDef(arch), params, inputs)
    with_remat = value_and_grads(ModelDef(arch, remat="full"), params, inputs)
    for other in (with_remat, as_scan):
        assert tiny.largest_difference(other, unrolled) < 1e-5
    assert float(unrolled[0]) != 0 and min(float(jnp.abs(g).max()) for g in jax.tree.leaves(unrolled[1])) > 0


@pytest.mark.slow
def test_remat_recomputes_and_few_layers_are_unrolled():
    tokens, mask = jnp.ones((2, 3), jnp.int32), jnp.ones((2, 3), bool)

    def jaxpr_of(arch, remat="none"):
        params = jax.eval_shape(lambda: transformer.init_params(arch, jax.random.key(0)))
        model = ModelDef(arch, remat=remat)
        return str(jax.make_jaxpr(jax.grad(lambda p: model.bind(p)(tokens, mask).sum()))(params))

    few = dataclasses.replace(ARCHS["llama"], num_layers=transformer.MAX_UNROLLED)
    assert "remat" in jaxpr_of(few, remat="full") and "remat" not in jaxpr_of(few)
    num_products = [jaxpr_of(few, remat=name).count("dot_general") for name in ("none", "dots", "full")]
    assert num_products[0] <= num_products[1] < num_products[2]  # dots: products of activations are all that comes again
    assert set(re.findall(r"unroll=(\d+)", jaxpr_of(few))) == {str(transformer.MAX_UNROLLED)}
    assert set(re.findall(r"unroll=(\d+)", jaxpr_of(DEEP))) == {"1"}


@every_arch
def test_bfloat16_is_close(arch):
    params, inputs = tiny.random_params(arch), make_inputs()
    last_PD, hidden_BTD = with_prefix(ModelDef(arch))(params, *inputs)
    last16_PD, hidden16_BTD = with_prefix(ModelDef(arch, dtype="bfloat16"))(params, *inputs)
    assert last16_PD.dtype == hidden16_BTD.dtype == jnp.bfloat16
    for low, high in ((last16_PD, last_PD), (hidden16_BTD, hidden_BTD)):
        error = np.asarray(low.astype(jnp.float32) - high)
        assert 0 < np.sqrt((error**2).mean()) < 0.03 * np.sqrt((np.asarray(high) ** 2).mean())


# ------------------------------------------------------------------------------------------------------------- padding


@with_delta
def test_padding_has_no_influence(arch):
    """Other token ids under the padding: the same bits everywhere else. More padding on the left: the same values."""
    params, run = tiny.random_params(arch), with_prefix(ModelDef(arch))
    tokens_PS, mask_PS, tokens_BT, mask_BT = make_inputs()
    last_PD, hidden_BTD = run(params, tokens_PS, mask_PS, tokens_BT, mask_BT)
    other_PS, other_BT = jnp.where(mask_PS, tokens_PS, 9), jnp.where(mask_BT, tokens_BT, 11)
    assert (other_PS != tokens_PS).any() and (other_BT != tokens_BT).any()
    other_last_PD, other_hidden_BTD = run(params, other_PS, mask_PS, other_BT, mask_BT)
    np.testing.assert_array_equal(other_last_PD, last_PD)
    np.testing.assert_array_equal(other_hidden_BTD[mask_BT], hidden_BTD[mask_BT])

    wider = [jnp.pad(x, ((0, 0), (3, 0))) for x in (tokens_PS, mask_PS)]
    wide_last_PD, wide_hidden_BTD = run(params, *wider, tokens_BT, mask_BT)
    np.testing.assert_allclose(wide_last_PD, last_PD, atol=atol_of(arch))
    np.testing.assert_allclose(wide_hidden_BTD[mask_BT], hidden_BTD[mask_BT], atol=atol_of(arch))


def test_an_empty_prompt_stays_finite():
    """A batch that dynamic sampling could not fill has rows with nothing in them."""
    arch = ARCHS["llama"]
    nothing_PS, nothing_BT = jnp.zeros((P, S), jnp.int32), jnp.zeros((B, T), jnp.int32)
    last_PD, hidden_BTD = with_prefix(ModelDef(arch))(
        tiny.random_params(arch), nothing_PS, nothing_PS > 0, nothing_BT, nothing_BT > 0
    )
    assert np.isfinite(last_PD).all() and np.isfinite(hidden_BTD).all()


# ----------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("scale", [1.0, 300.0], ids=["soft", "hard"])
def test_attention_over_prefix_and_own_keys_is_one_softmax(scale):
    """Hand-written, a query at a time. Scores in the thousands: the two blocks must share their maximum."""
    N, K, H = 6, 2, 4
    rng = np.random.default_rng(0)
    q_BTNH = rng.normal(size=(B, T, N, H)) * scale
    own_k, own_v, pre_k, pre_v = (rng.normal(size=s) for s in [(B, T, K, H)] * 2 + [(P, S, K, H)] * 2)
    mask_PS, mask_BT = np.arange(S)[None] >= np.array([0, 2, 4])[:, None], rng.random((B, T)) < 0.7
    mask_BTU = np.tril(np.ones((T, T), bool))[None] & mask_BT[:, None]

    expected_BTNH = np.zeros_like(q_BTNH)
    for b, t, n in np.ndindex(B, T, N):
        kv, prompt = n // (N // K), b // G
        keys = np.concatenate([pre_k[prompt, mask_PS[prompt], kv], own_k[b, mask_BTU[b, t], kv]])
        values = np.concatenate([pre_v[prompt, mask_PS[prompt], kv], own_v[b, mask_BTU[b, t], kv]])
        scores = keys @ q_BTNH[b, t, n] / np.sqrt(H)
        weights = np.exp(scores - scores.max())
        expected_BTNH[b, t, n] = weights @ values / weights.sum()

    own, cache = (KVCache.of(*(jnp.asarray(x, jnp.float32) for x in kv)) for kv in ((own_k, own_v), (pre_k, pre_v)))
    view = AttentionView(None, jnp.asarray(mask_BTU), jnp.asarray(mask_PS)[:, None, None])
    out_BTNH = attend(jnp.asarray(q_BTNH, jnp.float32), own, view, cache, H**-0.5)
    np.testing.assert_allclose(out_BTNH, expected_BTNH, atol=2e-6 * scale, rtol=1e-4)


@pytest.mark.parametrize("arch", [ARCHS["qwen3"], GEMMA], ids=["qwen3", "gemma"])
@pytest.mark.slow
def test_long_rows_in_blocks_are_the_same_and_hold_no_square_of_scores(arch, monkeypatch):
    """Blocks that do not divide the rows, beside prompts and windows."""
    params = tiny.random_params(arch)
    tokens_PS, mask_PS, tokens_BT, mask_BT = make_inputs()

    def summed(params):
        last_PD, hidden_BTD = continued(ModelDef(arch), params, tokens_PS, mask_PS, tokens_BT, mask_BT)
        return (last_PD * 0.3).sum() + (hidden_BTD**2 * mask_BT[..., None]).sum()

    def run():
        program = jax.jit(jax.value_and_grad(summed)).lower(params)
        scores = {shape for shape in re.findall(r"tensor<([\dx]+)xf32>", program.as_text()) if f"x{T}x" in f"x{shape}x"}
        return program.compile()(params), scores

    (value, grads), whole = run()
    monkeypatch.setattr(attention, "BLOCK_QUERIES", 4)
    (blocked, blocked_grads), parts = run()
    K, R = arch.num_kv_heads, arch.num_heads // arch.num_kv_heads
    square = f"{B}x{K}x{T}x{R}x{T}"
    assert square in whole and square not in parts and f"{B}x{K}x4x{R}x4" in parts
    np.testing.assert_allclose(blocked, value, rtol=1e-6)
    assert tiny.largest_difference(blocked_grads, grads) < 1e-5


def test_prompts_are_not_copied_for_their_completions():
    """No array of the prefix's keys with a row for every completion, in the update or in a decode step."""
    arch, (tokens_PS, mask_PS, tokens_BT, mask_BT) = ARCHS["qwen2"], make_inputs()
    model, params = ModelDef(arch), tiny.random_params(arch)

    def update(params):
        return continued(model, params, tokens_PS, mask_PS, tokens_BT, mask_BT)[1].sum()

    def decode(params):
        decoder = model.bind(params)
        _, prefix = decoder.encode_prompts(tokens_PS, mask_PS)
        return decoder.decode_step(decoder.unstack_layers(), decoder.empty_caches(B, T), tokens_BT[:, 0], 0, prefix)

    K, H = arch.num_kv_heads, arch.head_dim
    for function in (jax.grad(update), decode):
        text = str(jax.make_jaxpr(function)(params))
        for one in (f"{K},{S},{H}]", f"{K},{H},{S}]"):  # a prompt's keys, its values
            assert f"[{P},{one}" in text
            assert f"[{B},{one}" not in text and f"[{P},{G},{one}" not in text
