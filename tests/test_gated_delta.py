"""A gated delta net beside its recurrence in float64; padding leaves no trace; a prompt's state serves all its completions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

from grpo_jax.config import RolloutConfig
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.learner.optimizer import is_decayed
from grpo_jax.models.gated_delta import (
    CHUNK_TOKENS,
    Convolution,
    DeltaState,
    chunk_size,
    invert_triangular,
    run_chunks,
    run_token,
    unit,
)
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rollout.rollout import EndTokens, rollout, row_keys, sampling_of
from tests import tiny

EXACT = jax.lax.Precision.HIGHEST
B, J, M, K, V = 2, 2, 2, 4, 3


def inputs_of(num_tokens, seed=0, kept=0.5, strength=None):
    """(q, k, v, log_decay, strength, state) in float64; the state is not empty."""
    rng = np.random.default_rng(seed)
    q, k = (np.asarray(unit(jnp.asarray(rng.normal(size=(B, num_tokens, J, K))))) for _ in range(2))
    v, state = rng.normal(size=(B, num_tokens, J, M, V)), rng.normal(size=(B, J, M, K, V))
    log_decay = np.log(rng.uniform(kept, 1.0, (B, num_tokens, J, M)))
    if strength is None:
        strength = rng.uniform(0, 1, log_decay.shape)
    return q, k, v, log_decay, np.broadcast_to(strength, log_decay.shape), state


def numpy_recurrence(q, k, v, log_decay, strength, state):
    """The two lines of the paper, a token and a head at a time."""
    out, state = np.zeros_like(v), state.copy()
    for b, j, m in np.ndindex(B, J, M):
        S = state[b, j, m]
        for t in range(q.shape[1]):
            a, s = np.exp(log_decay[b, t, j, m]), strength[b, t, j, m]
            key = k[b, t, j]
            S = a * (S - s * np.outer(key, key @ S)) + s * np.outer(key, v[b, t, j, m])
            out[b, t, j, m] = S.T @ q[b, t, j]
        state[b, j, m] = S
    return out, state


@jax.jit
def token_by_token(q, k, v, log_decay, strength, state):
    def step(state, each):
        out, state = run_token(*(x[:, None] for x in each), state, EXACT)
        return state, out[:, 0]

    state, out = jax.lax.scan(step, state, tuple(x.swapaxes(0, 1) for x in (q, k, v, log_decay, strength)))
    return out.swapaxes(0, 1), state


in_chunks = jax.jit(functools.partial(run_chunks, precision=EXACT))


@pytest.mark.parametrize(
    ("num_tokens", "changes"),
    [(1, {}), (5, {}), (CHUNK_TOKENS, {}), (2 * CHUNK_TOKENS + 7, {}), (70, {"kept": 1.0, "strength": 1.0})],
    ids=["one", "few", "a chunk", "chunks and a rest", "nothing fades"],
)
def test_chunks_and_single_steps_are_the_recurrence(num_tokens, changes):
    exact = inputs_of(num_tokens, **changes)
    expected = numpy_recurrence(*exact)
    assert np.abs(expected[0]).max() > 0.5
    for way in (in_chunks, token_by_token):
        for ours, theirs in zip(way(*(jnp.asarray(x, jnp.float32) for x in exact)), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_keys_that_are_all_the_same_do_not_blow_up():
    """Then each chunk's system has ones below its diagonal: a series in its powers would be lost in rounding."""
    q, _, v, log_decay, _, state = inputs_of(CHUNK_TOKENS, kept=1.0)
    k = np.broadcast_to(np.eye(K)[0], q.shape)
    exact = q, k, v, log_decay, np.ones_like(log_decay), state
    for ours, theirs in zip(in_chunks(*(jnp.asarray(x, jnp.float32) for x in exact)), numpy_recurrence(*exact), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_the_gradient_of_chunks_is_that_of_single_steps():
    inputs = [jnp.asarray(x, jnp.float32) for x in inputs_of(CHUNK_TOKENS + 9)]

    def gradients(way):
        def loss(inputs):
            out, state = way(*inputs)
            return jnp.sin(3 * out).sum() + jnp.sin(state).sum()

        return jax.jit(jax.grad(loss))(inputs)

    ours, theirs = gradients(in_chunks), gradients(token_by_token)
    assert min(float(jnp.abs(x).max()) for x in theirs) > 0.1
    assert tiny.largest_difference(ours, theirs) < 1e-5


def test_the_inverse_is_one_and_so_is_its_gradient():
    below = np.tril(np.random.default_rng(0).normal(size=(3, 8, 8)), -1)
    inverse = invert_triangular(jnp.asarray(below, jnp.float32), EXACT)
    np.testing.assert_allclose(inverse, np.linalg.inv(np.eye(8) + below), atol=1e-4)

    def ours(below):
        return jnp.sin(invert_triangular(jnp.tril(below, -1), EXACT)).sum()

    def theirs(below):
        return jnp.sin(jnp.linalg.inv(jnp.eye(8)[None] + jnp.tril(below, -1))).sum()

    left, right = (jax.grad(loss)(jnp.asarray(0.3 * below, jnp.float32)) for loss in (ours, theirs))
    np.testing.assert_allclose(left, right, atol=1e-4)


def test_a_chunk_is_a_power_of_two_no_longer_than_needed():
    assert [chunk_size(n) for n in (0, 1, 2, 3, 5, 64, 1000)] == [1, 1, 2, 4, 8, 64, 64]


def test_the_convolution_sees_its_tail_and_no_later_token():
    delta = tiny.DELTA.delta
    conv = Convolution(delta, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=(2, 9, delta.num_channels)).astype(np.float32)
    empty = DeltaState.empty(2, delta, jnp.float32).tail
    whole, tail = conv(jnp.asarray(x), empty)
    first, middle = conv(jnp.asarray(x[:, :2]), empty)
    second, last = conv(jnp.asarray(x[:, 2:]), middle)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, atol=1e-6)
    np.testing.assert_array_equal(tail, x[:, -3:])
    np.testing.assert_array_equal(tail, last)
    padded, weight = np.pad(x, ((0, 0), (3, 0), (0, 0))), np.asarray(conv.weight[...])
    exact = sum(padded[:, w : w + 9] * weight[:, w] for w in range(4))
    np.testing.assert_allclose(whole, exact / (1 + np.exp(-exact)), atol=1e-5)


# --------------------------------------------------------------------------------------------------------- in the decoder


P, G, S, T = 3, 2, 7, 6
ARCH = dataclasses.replace(tiny.DELTA, num_layers=3)
MODEL = ModelDef(ARCH)


def test_left_padding_leaves_convolution_and_state_at_zero():
    """The prompts' states are those of the same prompts without padding; of an empty prompt they are zero."""
    params, prompts = tiny.random_params(ARCH), tiny.random_prompts(P, S)
    encode = jax.jit(lambda params, *prompts: MODEL.bind(params).encode_prompts(*prompts)[1].cache)
    padded = encode(params, prompts.tokens_PS, prompts.mask_PS)
    kinds = [type(each).__name__ for each in padded]
    assert kinds == ["DeltaState", "DeltaState", "KVCache"]
    for p in range(P):
        length = int(prompts.mask_PS[p].sum())
        alone = encode(params, prompts.tokens_PS[p : p + 1, S - length :], jnp.ones((1, length), bool))
        for left, right in zip(padded[:2], alone[:2], strict=True):
            np.testing.assert_allclose(left.state[:, p], right.state[:, 0], atol=3e-5)
            np.testing.assert_allclose(left.tail[:, p], right.tail[:, 0], atol=3e-5)
    assert np.abs(padded[0].state).max() > 0.1
    nothing = encode(params, jnp.ones((1, S), jnp.int32), jnp.zeros((1, S), bool))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing[:2]))


@functools.cache
def sampled(max_live_sequences):
    config = RolloutConfig(group_size=G, max_completion_tokens=T, max_live_sequences=max_live_sequences)

    @jax.jit
    def sample_and_score(params, prompts, keys_PG):
        drawn = rollout(MODEL, params, prompts, keys_PG, config, EndTokens((3, 5, 8, 13), 0))
        return drawn, policy_logprobs(MODEL, params, drawn, sampling_of(config), 16)

    arguments = tiny.random_params(ARCH), tiny.random_prompts(P, S), row_keys(jax.random.key(0), P, G)
    return jax.device_get(sample_and_score(*arguments))


@pytest.mark.slow
def test_rows_that_are_refilled_begin_with_their_own_prompts_state():
    refilled, side_by_side = sampled(2)[0], sampled(0)[0]
    np.testing.assert_array_equal(refilled.tokens_PGT, side_by_side.tokens_PGT)
    np.testing.assert_allclose(refilled.sampler_logp_PGT, side_by_side.sampler_logp_PGT, atol=5e-5)
    assert 0 < side_by_side.mask_PGT.mean() < 1 and len(np.unique(side_by_side.tokens_PGT)) > 5


@pytest.mark.slow
def test_sampler_and_learner_agree():
    drawn, (logp_PGT, entropy_PGT) = sampled(0)
    mask_PGT = drawn.mask_PGT > 0
    np.testing.assert_allclose(logp_PGT[mask_PGT], drawn.sampler_logp_PGT[mask_PGT], atol=5e-5)
    np.testing.assert_allclose(entropy_PGT[mask_PGT], drawn.entropy_PGT[mask_PGT], atol=5e-5)


def test_the_samplers_cast_of_the_weights_changes_nothing_that_the_learner_computes():
    """In bfloat16 a rate of forgetting is rounded in both, or their states would drift apart token by token."""
    model = ModelDef(dataclasses.replace(ARCH, norm_plus_one=False), dtype="bfloat16")
    params, prompts = tiny.random_params(model.arch), tiny.random_prompts(P, S)
    forward = jax.jit(lambda params: model.bind(params)(prompts.tokens_PS, prompts.mask_PS))
    np.testing.assert_array_equal(forward(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)), forward(params))


def test_rates_of_forgetting_do_not_decay():
    decayed = flatten_dict(is_decayed(MODEL.param_shapes()))
    of_delta = {path[-1 - (path[-1] == "weight")]: value for path, value in decayed.items() if path[:2] == ("layers", "0")}
    assert not any(of_delta[name] for name in ("log_rate", "rate_bias", "norm", "attn_norm"))
    assert all(of_delta[name] for name in ("qkv", "conv", "strength", "rate", "output_gate", "out", "gate"))
