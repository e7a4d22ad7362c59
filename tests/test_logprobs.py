"""Chunked log-probabilities and their handwritten gradient against a dense float64 reference, and what memory they take."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.learner.logprobs import token_logprobs
from grpo_jax.models.linear import head_logits
from grpo_jax.rollout.sampling import Sampling, draw

N, V, D = 37, 29, 8  # N is prime: no chunk but 1 and 37 divides it
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


def value_and_grad(sampling, chunk, hidden_ND, head_VD, targets_N, support_N, d_logp_N, cap=None):
    def weighted(hidden_ND, head_VD):
        logp_N, entropy_N = token_logprobs(hidden_ND, head_VD, targets_N, support_N, sampling, chunk, cap)
        return (d_logp_N * logp_N).sum(), (logp_N, entropy_N)

    grads, values = jax.grad(weighted, (0, 1), has_aux=True)(hidden_ND, head_VD)
    return *values, *grads


@every_sampling
def test_value_and_gradient_are_those_of_the_dense_reference(sampling):
    given = problem(sampling)
    got = jax.jit(functools.partial(value_and_grad, sampling, 10))(*given)
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
    got = jax.jit(functools.partial(value_and_grad, sampling, 10, cap=1.5))(*given)
    expected = dense(*given, sampling.temperature, cap=1.5)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
    np.testing.assert_allclose(got[0], drawn.logp_B, atol=1e-5)
    np.testing.assert_allclose(got[1], drawn.entropy_B, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 36, 37, 1000])
def test_chunk_size_changes_nothing(chunk):
    sampling = SAMPLINGS[2]
    given = problem(sampling)
    got = jax.jit(functools.partial(value_and_grad, sampling, chunk))(*given)
    for x, y in zip(got, dense(*given, sampling.temperature), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)


def test_entropy_carries_no_gradient():
    hidden_ND, head_VD, targets_N, support_N, weight_N = problem()

    def of(hidden_ND, head_VD, with_logp):
        logp_N, entropy_N = token_logprobs(hidden_ND, head_VD, targets_N, support_N, Sampling(), 10, None)
        return (weight_N * entropy_N).sum() + with_logp * logp_N.sum()

    for grad in jax.grad(of, (0, 1))(hidden_ND, head_VD, 0.0):
        np.testing.assert_array_equal(grad, 0.0)
    for grad in jax.grad(of, (0, 1))(hidden_ND, head_VD, 1.0):
        assert (grad != 0).any()


@pytest.mark.parametrize("cap", [None, 1.5])
def test_the_gradient_of_an_entropy_that_is_asked_for_is_the_dense_one(cap):
    """Beside that of the log-probability, in chunks that do not divide the positions."""
    hidden_ND, head_VD, targets_N, _, weight_N = problem()
    sampling = Sampling(temperature=0.7)

    def chunked(hidden_ND, head_VD):
        logp_N, entropy_N = token_logprobs(hidden_ND, head_VD, targets_N, None, sampling, 10, cap, True)
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
    got = value_and_grad(sampling, 10, *given)
    for x, y in zip(got, dense(*given, 1.0), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5)
    assert (np.abs(got[2]).max(-1) > 1e-3).all()


def test_bfloat16_inputs_are_normalised_in_float32():
    hidden_ND, head_VD, *rest = problem()
    rounded = hidden_ND.astype(jnp.bfloat16), head_VD.astype(jnp.bfloat16)
    logp_N, entropy_N, d_hidden_ND, d_head_VD = value_and_grad(Sampling(), 10, *rounded, *rest)
    expected = dense(*(x.astype(jnp.float32) for x in rounded), *rest, 1.0)
    assert logp_N.dtype == entropy_N.dtype == jnp.float32 and d_hidden_ND.dtype == d_head_VD.dtype == jnp.bfloat16
    np.testing.assert_allclose(logp_N, expected[0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(entropy_N, expected[1], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(d_hidden_ND.astype(jnp.float32), expected[2], atol=0.05)
    np.testing.assert_allclose(d_head_VD.astype(jnp.float32), expected[3], atol=0.1)


# -------------------------------------------------------------------------------------------------------------- memory


def naive_logprobs(hidden_ND, head_VD, targets_N, support_N, sampling, chunk_tokens, cap):
    del support_N, sampling, chunk_tokens, cap
    log_p_NV = jax.nn.log_softmax(head_logits(hidden_ND, head_VD, None))
    return jnp.take_along_axis(log_p_NV, targets_N[:, None], -1)[:, 0], None


def largest_float_buffer(logprobs, sampling, num, vocab, dim, chunk):
    """Elements of the largest float32 array that the compiled gradient speaks of."""

    def loss(hidden_ND, head_VD, targets_N, support_N):
        return logprobs(hidden_ND, head_VD, targets_N, support_N, sampling, chunk, None)[0].mean()

    ints = jax.ShapeDtypeStruct((num,), jnp.int32)
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in [(num, dim), (vocab, dim)]]
    given = *floats, ints, ints if sampling.is_cut else None
    text = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*given).compile().as_text()
    return max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[(\d[\d,]*)\]", text))


def test_no_buffer_of_all_logits():
    sizes = dict(num=2048, vocab=8192, dim=16, chunk=128)
    # The scan does find them where they are.
    assert largest_float_buffer(naive_logprobs, Sampling(), **sizes) >= sizes["num"] * sizes["vocab"]
    for sampling in (SAMPLINGS[0], SAMPLINGS[2]):
        assert largest_float_buffer(token_logprobs, sampling, **sizes) <= sizes["chunk"] * sizes["vocab"]
