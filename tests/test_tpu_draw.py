"""The TPU's draw in one kernel, elsewhere as an interpreter runs it: against float64 sums and its own rows drawn elsewhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from grpo_jax.models.flash.call import Call
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.rollout import tpu_draw
from grpo_jax.rollout.sampling import Sampling, draw
from grpo_jax.rollout.search import uniforms
from grpo_jax.rollout.tpu_draw import LANES, SET, draw_tokens

TPU = Hardware("tpu", interpret=jax.default_backend() != "tpu")
run = jax.jit(functools.partial(draw_tokens, TPU))


def random_logits(num, vocab, seed=0):
    """Rows from nearly flat to nearly certain; of the second one most tokens are ruled out."""
    rng = np.random.default_rng(seed)
    logits_BV = rng.normal(size=(num, vocab)) * np.geomspace(0.1, 8, num)[:, None]
    logits_BV[1, vocab // 3 :] = -np.inf
    return logits_BV.astype(np.float32)


def numbers(num, seed=0):
    return uniforms(jax.random.split(jax.random.key(seed), num))


@pytest.mark.parametrize("vocab", [5, 300, 128 * 130 + 7, 40_000], ids=["one register", "three", "two sets", "three sets"])
def test_tokens_are_where_the_cumulated_distribution_passes_two_numbers(vocab):
    """First over the lanes of all sets, then over the registers of one lane."""
    num = 13  # no whole registers of rows
    logits_BV, uniform_B2 = random_logits(num, vocab), np.asarray(numbers(num), np.float64)
    token_B, logp_B, entropy_B = run(jnp.asarray(logits_BV), jnp.asarray(uniform_B2, jnp.float32))
    num_sets = -(-vocab // (SET * LANES))
    p_BV = np.exp(logits_BV.astype(np.float64) - logits_BV.max(-1, keepdims=True))
    p_BV /= p_BV.sum(-1, keepdims=True)
    for b in range(num):
        blocks_SJL = np.pad(p_BV[b], (0, num_sets * SET * LANES - vocab)).reshape(num_sets, SET, LANES)
        block = int(np.argmax(np.cumsum(blocks_SJL.sum(1)) > uniform_B2[b, 0]))
        inside_J = blocks_SJL[block // LANES, :, block % LANES]
        place = int(np.argmax(np.cumsum(inside_J) > uniform_B2[b, 1] * inside_J.sum()))
        assert int(token_B[b]) == (block // LANES * SET + place) * LANES + block % LANES
    np.testing.assert_allclose(logp_B, np.log(p_BV[np.arange(num), token_B]), atol=2e-5)
    with np.errstate(divide="ignore", invalid="ignore"):
        np.testing.assert_allclose(entropy_B, -np.nansum(p_BV * np.log(p_BV), -1), atol=2e-5)


def test_frequencies_are_the_probabilities():
    """Pearson's chi-square, five standard deviations wide, on a fixed key; through the cuts of `draw`."""
    num, vocab, sampling = 8000, 300, Sampling(temperature=0.7, top_k=40)
    logits_V = jnp.asarray(random_logits(2, vocab, 3)[0]) * 10
    keys_B = jax.random.split(jax.random.key(1), num)
    drawn = jax.jit(draw, static_argnums=(2, 6))(jnp.tile(logits_V, (num, 1)), keys_B, sampling, None, None, None, TPU)
    assert set(np.asarray(drawn.support_B)) == {40}
    p_V = np.zeros(vocab)
    best = np.argsort(-np.asarray(logits_V))[:40]
    p_V[best] = np.exp(np.asarray(logits_V, np.float64)[best] / 0.7)
    p_V /= p_V.sum()
    counts_V = np.bincount(drawn.token_B, minlength=vocab)
    assert counts_V[p_V == 0].sum() == 0
    kept = num * p_V > 5
    chi_square = ((counts_V[kept] - num * p_V[kept]) ** 2 / (num * p_V[kept])).sum()
    assert kept.sum() > 10 and chi_square < kept.sum() + 5 * np.sqrt(2 * kept.sum())


def test_a_rows_token_depends_on_its_own_numbers_only():
    logits_BV, uniform_B2 = jnp.asarray(random_logits(13, 300)), numbers(13)
    expected = run(logits_BV, uniform_B2)
    order = np.random.default_rng(0).permutation(13)[:5]
    for found, whole in zip(run(logits_BV[order], uniform_B2[order]), expected, strict=True):
        np.testing.assert_array_equal(found, whole[order])
    one_by_one = jax.vmap(lambda logits_V, uniform_2: run(logits_V[None], uniform_2[None])[0][0])(logits_BV, uniform_B2)
    np.testing.assert_array_equal(one_by_one, expected[0])


def test_ends_of_the_numbers_and_rows_of_one_possible_token():
    vocab = 200
    logits_BV = jnp.full((vocab, vocab), -jnp.inf).at[jnp.arange(vocab), jnp.arange(vocab)].set(3.0)
    for number in (2.0**-24, 1 - 2.0**-24):
        token_B, logp_B, entropy_B = run(logits_BV, jnp.full((vocab, 2), number, jnp.float32))
        np.testing.assert_array_equal(token_B, np.arange(vocab))
        np.testing.assert_allclose([logp_B, entropy_B], np.zeros((2, vocab)), atol=1e-6)


def test_broken_logits_give_a_token_of_the_vocabulary():
    """A NaN or an infinity says that training has failed; an id of V would be read as another row of the embedding."""
    rows = np.zeros((4, 200), np.float32)
    rows[0, 5], rows[1], rows[2, 2], rows[3] = np.nan, np.nan, np.inf, -np.inf
    token_B, logp_B, _ = run(jnp.asarray(rows), numbers(4))
    assert ((token_B >= 0) & (token_B < 200)).all()
    assert np.isnan(logp_B[:2]).all()


@pytest.mark.parametrize("num_rows", [8, 6], ids=["rows are shared", "each device has all rows"])
def test_a_vocabulary_that_is_spread_over_devices(num_rows):
    """Each device has all rows' logits of some tokens; the draws are those of one device."""
    vocab, mesh = 400, Mesh(np.array(jax.devices()[:4]), ("tensor",))
    logits_BV, uniform_B2 = jnp.asarray(random_logits(num_rows, vocab)), numbers(num_rows)
    rows = PartitionSpec("tensor") if num_rows % 4 == 0 else PartitionSpec()

    def of_device(logits_BV, uniform_B2):
        return tpu_draw._draw_here(vocab, Call(TPU, 0, None), (logits_BV, uniform_B2), ())

    specs = PartitionSpec(None, "tensor"), rows
    spread = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    for found, expected in zip(jax.jit(spread)(logits_BV, uniform_B2), run(logits_BV, uniform_B2), strict=True):
        np.testing.assert_array_equal(found.reshape(-1), expected)


def test_who_draws_by_the_kernel():
    assert tpu_draw.suits(TPU, 262_144) and not tpu_draw.suits(TPU, 500_000)
    assert not tpu_draw.suits(None, 100) and not tpu_draw.suits(Hardware("gpu"), 100)
