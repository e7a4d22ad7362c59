"""Chunked log-probabilities and their handwritten gradient against a dense float64 reference, and what memory they take."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.learner.logprobs import CPU_CHUNK_TOKENS, Chunks, Past, token_logprobs
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.linear import head_logits
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.rollout import sampling as sampling_module
from grpo_jax.rollout.sampling import Sampling

N, V, D = 37, 29, 8  # N is prime: no chunk but 1 and 37 divides it
draw = jax.jit(sampling_module.draw, static_argnums=2)
SAMPLINGS = [Sampling(), Sampling(temperature=0.6), Sampling(temperature=0.7, top_k=9, top_p=0.8), Sampling(top_p=0.7)]
every_sampling = pytest.mark.parametrize("sampling", SAMPLINGS, ids="t{0.temperature}-k{0.top_k}-p{0.top_p}".format)


@functools.cache
def problem(sampling=SAMPLINGS[0]):
    """(hidden, head, targets, support or None, cotangent): what `draw` gives for these logits, except that some targets
    are any token at all and some positions are blank, as the rollout leaves them (target 0, support 0)."""
    rng = np.random.default_rng(0)
    hidden_ND, head_VD = rng.normal(size=(N, D)), rng.normal(size=(V, D)) * 0.7
    hidden_ND, head_VD = jnp.asarray(hidden_ND, jnp.float32), jnp.asarray(head_VD, jnp.float32)
    drawn = draw(head_logits(hidden_ND, head_VD, None), jax.random.split(jax.random.key(1), N), sampling)
    targets_N = drawn.token_B.at[30:].set(jnp.asarray(rng.integers(0, V, N - 30))).at[33:].set(0)
    support_N = drawn.support_B.at[33:].set(0) if sampling.is_cut else None
    return hidden_ND, head_VD, targets_N, support_N, jnp.asarray(rng.normal(size=N), jnp.float32)


def dense(hidden_ND, head_VD, targets_N, support_N, d_logp_N, temperature, cap=None):
    """float64, a position at a time: (logp_N, entropy_N, d sum(d_logp * logp) / d hidden, the same / d head)."""
    hidden_ND, head_VD = np.asarray(hidden_ND, np.float64), np.asarray(head_VD, np.float64)
    logp_N, entropy_N, d_hidden_ND, d_head_VD = np.zeros(N), np.zeros(N), np.zeros((N, D)), np.zeros((V, D))
    for n, target in enumerate(np.asarray(targets_N)):
        logits_V = head_VD @ hidden_ND[n]
        slope_V = np.ones(V) if cap is None else np.cosh(logits_V / cap) ** -2.0
        logits_V = (logits_V if cap is None else cap * np.tanh(logits_V / cap)) / temperature
        rivals = [v for v in np.argsort(-logits_V) if v != target]
        kept = [target, *(rivals if support_N is None else rivals[: max(int(support_N[n]) - 1, 0)])]
        log_p = logits_V[kept] - np.log(np.exp(logits_V[kept] - logits_V[kept].max()).sum()) - logits_V[kept].max()
        logp_N[n], entropy_N[n] = log_p[0], -(np.exp(log_p) * log_p).sum()
        d_logits = -np.exp(log_p)
        d_logits[0] += 1
        d_logits *= slope_V[kept] * float(d_logp_N[n]) / temperature
        d_hidden_ND[n] = d_logits @ head_VD[kept]
        d_head_VD[kept] += d_logits[:, None] * hidden_ND[n]
    return logp_N, entropy_N, d_hidden_ND, d_head_VD


def value_and_grad(sampling, chunks, hidden_ND, head_VD, targets_N, support_N, d_logp_N, cap=None):
    def weighted(hidden_ND, head_VD):
        logp_N, entropy_N = token_logprobs(hidden_ND, head_VD, targets_N, support_N, sampling, chunks, cap)
        return (d_logp_N * logp_N).sum(), (logp_N, entropy_N)

    grads, values = jax.grad(weighted, (0, 1), has_aux=True)(hidden_ND, head_VD)
    return *values, *grads


@every_sampling
def test_value_and_gradient_are_those_of_the_dense_reference(sampling):
    given = problem(sampling)
    got = jax.jit(functools.partial(value_and_grad, sampling, Chunks(10)))(*given)
    expected = dense(*given, sampling.temperature)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
    assert all(np.abs(y).max() > 0.1 for y in expected)


@pytest.mark.parametrize("sampling", SAMPLINGS[1:3])
def test_value_and_gradient_of_capped_logits(sampling):
    """A cap that bends every logit: the sampler's distribution, the reference's, and the gradient through tanh."""
    hidden_ND, head_VD, _, _, weight_N = problem(sampling)
    drawn = draw(head_logits(hidden_ND, head_VD, 1.5), jax.random.split(jax.random.key(1), N), sampling)
    given = hidden_ND, head_VD, drawn.token_B, drawn.support_B if sampling.is_cut else None, weight_N
    got = jax.jit(functools.partial(value_and_grad, sampling, Chunks(10), cap=1.5))(*given)
    expected = dense(*given, sampling.temperature, cap=1.5)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(got[0], drawn.logp_B, atol=1e-5)
    np.testing.assert_allclose(got[1], drawn.entropy_B, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1000])
def test_chunk_size_changes_nothing(chunk):
    sampling = SAMPLINGS[2]
    given = problem(sampling)
    got = jax.jit(functools.partial(value_and_grad, sampling, Chunks(chunk)))(*given)
    for x, y in zip(got, dense(*given, sampling.temperature), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


RULED = Sampling(temperature=0.8, bad_ids=(2, 3), bad_first_ids=(5,), forced_prefix_ids=(7, 1))


@pytest.mark.parametrize(
    "sampling",
    [RULED, Sampling(repetition_penalty=1.5), Sampling(0.7, 0, 0.9, 0.0, 0.8, (2,)), Sampling(min_p=0.3, bad_ids=(0,))],
    ids=["ruled out", "penalty", "penalty and cut", "min_p"],
)
@pytest.mark.parametrize("cap", [None, 1.5])
def test_value_and_gradient_where_the_past_counts(sampling, cap):
    """A position at a time: the tokens that occurred before it in its row, those ruled out there, and the sampler's support."""
    rng = np.random.default_rng(3)
    hidden_ND, head_VD, _, _, weight_N = problem()
    rows, width, prompt = 5, 12, 4
    tokens_BX, mask_BX = rng.integers(0, V, (rows, width)), rng.random((rows, width)) < 0.8
    row_N, t_N = rng.integers(0, rows, N), rng.integers(0, width - prompt, N)
    past = Past(*map(jnp.asarray, (t_N, row_N, t_N + prompt, tokens_BX, mask_BX)))
    seen_NV = np.zeros((N, V), bool)
    for n in range(N):
        before = slice(0, t_N[n] + prompt)
        seen_NV[n, tokens_BX[row_N[n], before][mask_BX[row_N[n], before]]] = True
    drawn = draw(
        head_logits(hidden_ND, head_VD, cap), jax.random.split(jax.random.key(1), N), sampling, t_N, jnp.asarray(seen_NV)
    )
    support_N = drawn.support_B if sampling.is_cut else None

    def weighted(hidden_ND, head_VD):
        logp_N, entropy_N = token_logprobs(hidden_ND, head_VD, drawn.token_B, support_N, sampling, Chunks(10), cap, past)
        return (weight_N * logp_N).sum(), (logp_N, entropy_N)

    grads, (logp_N, entropy_N) = jax.jit(jax.grad(weighted, (0, 1), has_aux=True))(hidden_ND, head_VD)
    np.testing.assert_allclose(logp_N, drawn.logp_B, atol=1e-5)
    np.testing.assert_allclose(entropy_N, drawn.entropy_B, atol=1e-5)

    def plain(hidden_ND, head_VD):
        """The same by JAX's own derivatives, on dense logits; what is kept is known from the draw's threshold."""
        logits_NV = head_logits(hidden_ND, head_VD, cap) / sampling.temperature
        factor_NV = jnp.where(logits_NV > 0, 1 / sampling.repetition_penalty, sampling.repetition_penalty)
        logits_NV = jnp.where(seen_NV, logits_NV * factor_NV, logits_NV)
        allowed_NV = ~np.isin(np.arange(V), sampling.bad_ids)[None] & ~(
            (t_N == 0)[:, None] & np.isin(np.arange(V), sampling.bad_first_ids)[None]
        )
        for t, forced in enumerate(sampling.forced_prefix_ids):
            allowed_NV = np.where((t_N == t)[:, None], np.arange(V)[None] == forced, allowed_NV)
        ranked_NV = jnp.argsort(jnp.argsort(-jnp.where(allowed_NV, logits_NV, -jnp.inf)))
        kept_NV = allowed_NV & (ranked_NV < drawn.support_B[:, None])
        log_p_NV = jax.nn.log_softmax(jnp.where(kept_NV, logits_NV, -1e30))
        return (weight_N * jnp.take_along_axis(log_p_NV, drawn.token_B[:, None], -1)[:, 0]).sum()

    for x, y in zip(grads, jax.grad(plain, (0, 1))(hidden_ND, head_VD), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
    is_forced_N = t_N < len(sampling.forced_prefix_ids)
    np.testing.assert_array_equal(grads[0][is_forced_N], 0.0)
    assert (np.abs(grads[0][~is_forced_N & (drawn.support_B > 1)]).max(-1) > 0).all()


def test_a_masked_position_that_holds_a_token_which_is_ruled_out_stays_finite():
    hidden_ND, head_VD = problem()[:2]
    past = Past(
        *map(jnp.asarray, (np.zeros(N, int), np.zeros(N, int), np.zeros(N, int), np.zeros((1, 3), int), np.zeros((1, 3), bool)))
    )
    for sampling in (RULED, dataclasses.replace(RULED, top_p=0.5)):
        values = token_logprobs(hidden_ND, head_VD, jnp.full(N, 2), jnp.zeros(N, jnp.int32), sampling, Chunks(10), None, past)
        assert all(np.isfinite(x).all() for x in values)


def test_entropy_carries_no_gradient():
    hidden_ND, head_VD, targets_N, support_N, weight_N = problem()

    def of(hidden_ND, head_VD, with_logp):
        logp_N, entropy_N = token_logprobs(hidden_ND, head_VD, targets_N, support_N, Sampling(), Chunks(10), None)
        return (weight_N * entropy_N).sum() + with_logp * logp_N.sum()

    for grad in jax.grad(of, (0, 1))(hidden_ND, head_VD, 0.0):
        np.testing.assert_array_equal(grad, 0.0)
    for grad in jax.grad(of, (0, 1))(hidden_ND, head_VD, 1.0):
        assert (grad != 0).any()


@pytest.mark.parametrize("chunks", [Chunks(10), Chunks(10, 7)], ids=["positions", "vocabulary"])
@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_gradient_of_an_entropy_that_is_asked_for_is_the_dense_one(cap, chunks):
    """Beside that of the log-probability, in chunks that do not divide the positions, or the vocabulary."""
    hidden_ND, head_VD, targets_N, _, weight_N = problem()
    sampling = Sampling(temperature=0.7)

    def chunked(hidden_ND, head_VD):
        logp_N, entropy_N = token_logprobs(
            hidden_ND, head_VD, targets_N, None, sampling, chunks, cap, has_entropy_gradient=True
        )
        return (weight_N * entropy_N).sum() + (logp_N * jnp.arange(len(logp_N))).sum() / 10

    def whole(hidden_ND, head_VD):
        log_p_NV = jax.nn.log_softmax(head_logits(hidden_ND, head_VD, cap) / sampling.temperature)
        logp_N = jnp.take_along_axis(log_p_NV, targets_N[:, None], -1)[:, 0]
        entropy_N = -(jnp.exp(log_p_NV) * log_p_NV).sum(-1)
        return (weight_N * entropy_N).sum() + (logp_N * jnp.arange(len(logp_N))).sum() / 10

    got, expected = (jax.jit(jax.value_and_grad(of, (0, 1)))(hidden_ND, head_VD) for of in (chunked, whole))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4, rtol=1e-4)


def test_the_target_that_fell_out_of_the_support_has_a_finite_log_prob_and_a_gradient():
    """The policy moved since the sample: the ratio must stay finite, and must still push."""
    sampling = Sampling(top_k=3)
    hidden_ND, head_VD, _, _, weight_N = problem()
    worst_N = head_logits(hidden_ND, head_VD, None).argmin(-1)
    given = hidden_ND, head_VD, worst_N, jnp.full(N, 3), weight_N
    got = value_and_grad(sampling, Chunks(10), *given)
    for x, y in zip(got, dense(*given, 1.0), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
    assert (np.abs(got[2]).max(-1) > 1e-3).all()


def test_bfloat16_inputs_are_normalised_in_float32():
    hidden_ND, head_VD, *rest = problem()
    rounded = hidden_ND.astype(jnp.bfloat16), head_VD.astype(jnp.bfloat16)
    logp_N, entropy_N, d_hidden_ND, d_head_VD = value_and_grad(Sampling(), Chunks(10), *rounded, *rest)
    expected = dense(*(x.astype(jnp.float32) for x in rounded), *rest, 1.0)
    assert logp_N.dtype == entropy_N.dtype == jnp.float32 and d_hidden_ND.dtype == d_head_VD.dtype == jnp.bfloat16
    np.testing.assert_allclose(logp_N, expected[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(entropy_N, expected[1], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(d_hidden_ND.astype(jnp.float32), expected[2], atol=0.05)
    np.testing.assert_allclose(d_head_VD.astype(jnp.float32), expected[3], atol=0.1)


# -------------------------------------------------------------------------------------------------------------- memory


def naive_logprobs(hidden_ND, head_VD, targets_N, support_N, sampling, chunks, cap):
    del support_N, sampling, chunks, cap
    log_p_NV = jax.nn.log_softmax(head_logits(hidden_ND, head_VD, None))
    return jnp.take_along_axis(log_p_NV, targets_N[:, None], -1)[:, 0], None


def largest_float_buffer(logprobs, sampling, num, vocab, dim, chunks):
    """Elements of the largest float32 array that the compiled gradient speaks of."""

    def loss(hidden_ND, head_VD, targets_N, support_N):
        return logprobs(hidden_ND, head_VD, targets_N, support_N, sampling, chunks, None)[0].mean()

    ints = jax.ShapeDtypeStruct((num,), jnp.int32)
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(num, dim), (vocab, dim)]]
    given = *floats, ints, ints if sampling.is_cut else None
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*given).compile().as_text()
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[(\d[\d,]*)\]", text))


def test_no_buffer_of_all_logits():
    sizes = dict(num=2048, vocab=8192, dim=16, chunks=Chunks(128))
    # The scan does find them where they are.
    assert largest_float_buffer(naive_logprobs, Sampling(), **sizes) >= sizes["num"] * sizes["vocab"]
    for sampling in (SAMPLINGS[0], SAMPLINGS[2], SAMPLINGS[3]):
        assert largest_float_buffer(token_logprobs, sampling, **sizes) <= 128 * sizes["vocab"]
    assert largest_float_buffer(token_logprobs, Sampling(), **{**sizes, "chunks": Chunks(128, 512)}) <= 2048 * 512


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("vocab_tokens", [1, 7, 28, 29])
def test_the_gradient_by_parts_of_the_vocabulary_is_the_same(vocab_tokens, cap):
    """Parts that do and do not divide it, in chunks that do not divide the positions."""
    sampling = SAMPLINGS[1]
    hidden_ND, head_VD, targets_N, _, weight_N = problem()
    given = hidden_ND, head_VD, targets_N, None, weight_N
    got = jax.jit(functools.partial(value_and_grad, sampling, Chunks(10, vocab_tokens), cap=cap))(*given)
    for x, y in zip(got, dense(*given, sampling.temperature, cap=cap), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


def test_chunks_follow_from_the_hardware_unless_they_are_given():
    arch = Architecture(151_936, 896, 24, 14, 2, 64, 4864)
    tpu = ModelDef(arch, hardware=Hardware("tpu"))
    assert Chunks.of(tpu, 64, 8192, Sampling()) == Chunks(64)
    assert Chunks.of(ModelDef(arch), 0, 8192, Sampling()) == Chunks(CPU_CHUNK_TOKENS)
    assert Chunks.of(tpu, 0, 8192, Sampling()) == Chunks(512, 8192)
    # Not by parts: where a position's logits are ranked, and where the vocabulary is short beside the positions.
    assert Chunks.of(tpu, 0, 8192, Sampling(top_p=0.9)) == Chunks(512)
    short = ModelDef(dataclasses.replace(arch, vocab_size=512), hardware=Hardware("tpu"))
    assert Chunks.of(short, 0, 8192, Sampling()) == Chunks(8192)
