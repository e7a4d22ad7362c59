"""The cut distribution against a plain NumPy one, draws against its probabilities, and the learner's view of its support."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.rollout import sampling as sampling_module
from grpo_jax.rollout.sampling import GREEDY, Sampling, partition, support_like, support_threshold
from grpo_jax.rollout.search import BLOCK, argmax, block_sums, least_kept, pick_token, uniforms

V = 12
draw = jax.jit(sampling_module.draw, static_argnums=2)
CUTS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7),
    Sampling(top_k=1),
    Sampling(top_k=4),
    Sampling(top_k=50),
    Sampling(top_p=1e-6),
    Sampling(top_p=0.5),
    Sampling(top_p=0.9),
    Sampling(temperature=0.7, top_k=5, top_p=0.8),
    Sampling(temperature=1.5, top_k=8, top_p=0.6),
    Sampling(min_p=0.2),
    Sampling(temperature=0.8, top_p=0.95, min_p=0.3),
    Sampling(top_k=6, min_p=0.05),
    Sampling(min_p=1.0),
]
name_of = "t{0.temperature}-k{0.top_k}-p{0.top_p}-m{0.min_p}".format
every_cut = pytest.mark.parametrize("sampling", CUTS, ids=name_of)
only_cut = pytest.mark.parametrize("sampling", CUTS[3:], ids=name_of)


def reference(logits_V, sampling):
    """float64 probabilities, 0 outside the support: temperature, the k best, the fewest that reach top_p, min_p of the best."""
    tempered_V = np.asarray(logits_V, np.float64) / sampling.temperature
    best_first = np.argsort(-tempered_V)
    if sampling.top_k:
        best_first = best_first[: sampling.top_k]
    weights = np.exp(tempered_V[best_first] - tempered_V.max())
    mass = np.cumsum(weights / weights.sum())
    num_kept = 1 if sampling.top_p < 1 else len(mass)
    while mass[num_kept - 1] < sampling.top_p and num_kept < len(mass):
        num_kept += 1
    num_kept = min(num_kept, int((weights >= sampling.min_p * weights[0]).sum()))
    p_V = np.zeros(len(tempered_V))
    p_V[best_first[:num_kept]] = weights[:num_kept] / weights[:num_kept].sum()
    return p_V


def entropy_of(p_V):
    return -sum(p * np.log(p) for p in p_V if p > 0)


def random_logits(num=40, seed=0):
    """Rows from nearly flat to nearly certain."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num, V)) * np.geomspace(0.1, 8, num)[:, None]).astype(np.float32)


def keys_of(num, seed=0):
    return jax.random.split(jax.random.key(seed), num)


@every_cut
def test_draws_log_probs_entropy_and_support_are_those_of_the_cut_distribution(sampling):
    logits_BV = random_logits()
    p_BV = np.stack([reference(row, sampling) for row in logits_BV])
    drawn = draw(jnp.asarray(logits_BV), keys_of(len(logits_BV)), sampling)
    np.testing.assert_array_equal(drawn.support_B, (p_BV > 0).sum(-1))
    drawn_p_B = np.take_along_axis(p_BV, np.asarray(drawn.token_B)[:, None], -1)[:, 0]
    assert (drawn_p_B > 0).all()
    np.testing.assert_allclose(drawn.logp_B, np.log(drawn_p_B), atol=2e-5)
    np.testing.assert_allclose(drawn.entropy_B, [entropy_of(p_V) for p_V in p_BV], atol=2e-5)
    assert drawn.token_B.dtype == drawn.support_B.dtype == jnp.int32


@only_cut
def test_threshold_keeps_exactly_the_reference_support(sampling):
    logits_BV = random_logits(seed=1)
    tempered_BV = jnp.asarray(logits_BV) / sampling.temperature
    keep_BV = tempered_BV >= support_threshold(tempered_BV, sampling)[:, None]
    np.testing.assert_array_equal(keep_BV, np.stack([reference(row, sampling) for row in logits_BV]) > 0)


def test_top_p_is_taken_of_what_top_k_left():
    """Of 0.4, 0.3, 0.2, 0.1 the two best are 4/7 and 3/7: half of that mass is one token, half of the whole would be two."""
    logits_1V = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    assert int(draw(logits_1V, keys_of(1), Sampling(top_k=2, top_p=0.5)).support_B[0]) == 1
    assert int(draw(logits_1V, keys_of(1), Sampling(top_p=0.5)).support_B[0]) == 2


@pytest.mark.parametrize("sampling", [CUTS[0], CUTS[1], CUTS[4], CUTS[8], CUTS[10]], ids=name_of)
def test_frequencies_are_the_probabilities(sampling):
    """Pearson's chi-square, five standard deviations wide, on a fixed key."""
    num = 20_000
    logits_V = random_logits()[20]
    p_V = reference(logits_V, sampling)
    token_B = draw(jnp.broadcast_to(jnp.asarray(logits_V), (num, V)), keys_of(num, seed=3), sampling).token_B
    counts_V = np.bincount(token_B, minlength=V)
    kept = p_V > 0
    assert counts_V[~kept].sum() == 0 and kept.sum() > 2
    chi_square = ((counts_V[kept] - num * p_V[kept]) ** 2 / (num * p_V[kept])).sum()
    freedom = kept.sum() - 1
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_a_rows_token_depends_on_its_own_key_only():
    logits_BV, keys_B = jnp.asarray(random_logits()), keys_of(40)
    order = np.random.default_rng(0).permutation(40)
    token_B = draw(logits_BV, keys_B, Sampling()).token_B
    np.testing.assert_array_equal(draw(logits_BV[order], keys_B[order], Sampling()).token_B, token_B[order])
    assert (draw(logits_BV, keys_of(40, seed=1), Sampling()).token_B != token_B).any()


def test_greedy_takes_the_best_and_reports_temperature_one():
    logits_BV = random_logits()
    drawn = draw(jnp.asarray(logits_BV), keys_of(40), GREEDY)
    best_B = logits_BV.argmax(-1)
    np.testing.assert_array_equal(drawn.token_B, best_B)
    p_BV = np.stack([reference(row, Sampling()) for row in logits_BV])
    np.testing.assert_allclose(drawn.logp_B, np.log(p_BV.max(-1)), atol=2e-5)
    np.testing.assert_allclose(drawn.entropy_B, [entropy_of(p_V) for p_V in p_BV], atol=2e-5)
    np.testing.assert_array_equal(drawn.support_B, V)
    assert GREEDY.is_greedy and not GREEDY.is_cut and not Sampling().is_greedy


def test_bfloat16_logits_are_normalised_in_float32():
    logits_BV = jnp.asarray(random_logits(), jnp.bfloat16)
    drawn = draw(logits_BV, keys_of(40), Sampling())
    p_BV = np.stack([reference(row, Sampling()) for row in np.asarray(logits_BV.astype(jnp.float32))])
    np.testing.assert_allclose(drawn.entropy_B, [entropy_of(p_V) for p_V in p_BV], atol=2e-5)
    assert drawn.logp_B.dtype == drawn.entropy_B.dtype == jnp.float32


# ----------------------------------------------------------------------------------------------------- exactness


def two_step_inverse(weight_V, uniform_2):
    """(token, distance of each number to the nearest boundary, as a share of the whole) by float64 cumulated sums."""
    end = len(weight_V) - len(weight_V) % BLOCK
    choices, margin = [*np.arange(end).reshape(-1, BLOCK), *np.arange(end, len(weight_V))[:, None]], 1.0
    for u in uniform_2:
        mass = np.cumsum([weight_V[ids].sum() for ids in choices])
        margin = min(margin, np.abs(mass / mass[-1] - u).min())
        choices = choices[int(np.searchsorted(mass, u * mass[-1], side="right"))][:, None]
        if len(choices) == 1:
            break
    return int(choices[0, 0]), margin


@pytest.mark.parametrize("vocab", [2000, 150], ids=["many blocks", "one block and singles"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(top_k=100)], ids=name_of)
def test_a_token_is_the_inverse_cdf_at_its_rows_numbers(vocab, sampling):
    """Every row, but for those whose number is within float32's error of the boundary between two tokens."""
    num = 200
    rng = np.random.default_rng(5)
    logits_BV = (rng.normal(size=(num, vocab)) * np.geomspace(0.1, 6, num)[:, None]).astype(np.float32)
    keys_B = keys_of(num, seed=8)
    drawn = draw(jnp.asarray(logits_BV), keys_B, sampling)
    numbers_B2 = np.asarray(uniforms(keys_B), np.float64)
    assert len(np.unique(numbers_B2)) > 1.9 * num and (numbers_B2 > 0).all() and (numbers_B2 < 1).all()
    near = 0
    for row in range(num):
        expected, margin = two_step_inverse(reference(logits_BV[row], sampling), numbers_B2[row])
        near += margin < 1e-6
        assert margin < 1e-6 or int(drawn.token_B[row]) == expected
    assert near < num // 20


def test_the_ends_of_the_interval_give_tokens_of_some_probability():
    """Not the first or last token: those have none, nor has a whole block at either end."""
    vocab = 5 * BLOCK + 7
    logits_V = np.full(vocab, -np.inf, np.float32)
    logits_V[[BLOCK + 3, 3 * BLOCK, 4 * BLOCK - 1]] = 0.0, -80.0, 1.0
    weight_BV = jnp.exp(jnp.asarray(logits_V) - 1.0)[None]
    for number, expected in [(2.0**-24, BLOCK + 3), (1 - 2.0**-24, 4 * BLOCK - 1)]:
        token_B = pick_token(
            jnp.asarray(logits_V)[None], jnp.ones((1, 1)), block_sums(weight_BV), jnp.full((1, 2), number, jnp.float32)
        )
        assert int(token_B[0]) == expected


def test_rows_of_one_possible_token_and_of_nothing_but_singles():
    for vocab in (7, BLOCK + 1):
        logits_BV = jnp.full((vocab, vocab), -jnp.inf).at[jnp.arange(vocab), jnp.arange(vocab)].set(3.0)
        np.testing.assert_array_equal(draw(logits_BV, keys_of(vocab), Sampling()).token_B, np.arange(vocab))


@pytest.mark.parametrize("sampling", [*CUTS, GREEDY], ids=name_of)
def test_broken_logits_give_a_token_of_the_vocabulary(sampling):
    """A NaN or an infinity says that training has failed; an id of V would be read as another row of the embedding."""
    rows = np.zeros((4, 3 * BLOCK), np.float32)
    rows[0, 5], rows[1], rows[2, 2], rows[3] = np.nan, np.nan, np.inf, -np.inf
    drawn = draw(jnp.asarray(rows), keys_of(4), sampling)
    assert ((drawn.token_B >= 0) & (drawn.token_B < 3 * BLOCK)).all()
    assert np.isnan(drawn.logp_B[:2]).all()


def test_argmax_is_numpys_and_0_where_there_is_a_nan():
    logits_BV = random_logits()
    logits_BV[3, [2, 7]] = 50.0
    np.testing.assert_array_equal(argmax(jnp.asarray(logits_BV)), logits_BV.argmax(-1))
    logits_BV[:, 4] = np.nan
    np.testing.assert_array_equal(argmax(jnp.asarray(logits_BV)), 0)


def test_least_kept_is_what_sorting_finds():
    """Of either sign, tied, infinite, of all sizes; every rank."""
    rng = np.random.default_rng(2)
    logits_BV = (rng.normal(size=(30, V)) * np.geomspace(1e-30, 1e30, 30)[:, None]).astype(np.float32)
    logits_BV[3, :6], logits_BV[4, ::2], logits_BV[5, 1:4] = 1.5, -np.inf, 0.0
    best_first_BV = -np.sort(-logits_BV, -1)
    for num in range(1, V + 1):
        found_B = least_kept(
            jnp.asarray(logits_BV), lambda t_B1: (jnp.asarray(logits_BV) > t_B1).sum(-1), jnp.full(30, num, jnp.int32)
        )
        np.testing.assert_array_equal(logits_BV >= np.asarray(found_B)[:, None], logits_BV >= best_first_BV[:, num - 1 : num])
    everything_B = least_kept(jnp.asarray(logits_BV), lambda t_B1: jnp.zeros(30), jnp.ones(30))
    np.testing.assert_array_equal(everything_B, -np.inf)


# ----------------------------------------------------------------------------------- ids that are ruled out, and repeats

RULES = Sampling(bad_ids=(2, 5), bad_first_ids=(0, 7), forced_prefix_ids=(4, 4))


@pytest.mark.parametrize("sampling", [RULES, dataclasses.replace(RULES, temperature=0.0)], ids=["drawn", "greedy"])
def test_ids_that_are_ruled_out_have_probability_zero(sampling):
    logits_BV, t_B = random_logits(), np.arange(40) % 5
    logits_BV[:, 2] += 9.0  # the best token is a bad one
    drawn = draw(jnp.asarray(logits_BV), keys_of(40), sampling, jnp.asarray(t_B))
    bare = dataclasses.replace(sampling, forced_prefix_ids=())
    first = draw(jnp.asarray(logits_BV), keys_of(40), bare, jnp.zeros(40, jnp.int32))
    for of, place_B in [(drawn, t_B), (first, np.full(40, 9))]:
        allowed_BV = np.ones((40, V), bool)
        allowed_BV[:, [2, 5]] = False
        if of is first:
            allowed_BV[:, [0, 7]] = False
        allowed_BV[place_B < 2] = np.arange(V) == 4
        expected_BV = np.stack(
            [reference(np.where(a, x, -np.inf), Sampling()) for a, x in zip(allowed_BV, logits_BV, strict=True)]
        )
        p_B = np.take_along_axis(expected_BV, np.asarray(of.token_B)[:, None], -1)[:, 0]
        assert (p_B > 0).all()
        np.testing.assert_allclose(of.logp_B, np.log(p_B), atol=2e-5)
        np.testing.assert_allclose(of.entropy_B, [entropy_of(p_V) for p_V in expected_BV], atol=2e-5)
        np.testing.assert_array_equal(of.support_B, allowed_BV.sum(-1))
    np.testing.assert_array_equal(drawn.token_B[t_B < 2], 4)
    np.testing.assert_array_equal(drawn.logp_B[t_B < 2], 0.0)
    np.testing.assert_array_equal(drawn.entropy_B[t_B < 2], 0.0)


@pytest.mark.parametrize("sampling", CUTS[1:], ids=name_of)
def test_the_cuts_are_taken_of_what_is_not_ruled_out(sampling):
    logits_BV = random_logits()
    drawn = draw(jnp.asarray(logits_BV), keys_of(40), dataclasses.replace(sampling, bad_ids=(3, 8)), jnp.arange(40))
    rest_V = np.setdiff1d(np.arange(V), [3, 8])
    p_BV = np.stack([reference(row[rest_V], sampling) for row in logits_BV])
    np.testing.assert_array_equal(drawn.support_B, (p_BV > 0).sum(-1))
    p_B = [p_V[rest_V == token][0] for p_V, token in zip(p_BV, np.asarray(drawn.token_B), strict=True)]
    np.testing.assert_allclose(drawn.logp_B, np.log(p_B), atol=2e-5)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_penalty_divides_positive_logits_of_tokens_that_occurred_and_multiplies_negative_ones(penalty):
    logits_BV, seen_BV = random_logits(), np.random.default_rng(1).random((40, V)) < 0.4
    expected_BV = np.where(seen_BV, np.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)
    sampling = Sampling(temperature=0.7, repetition_penalty=penalty)
    drawn = draw(jnp.asarray(logits_BV), keys_of(40), sampling, seen_BV=jnp.asarray(seen_BV))
    p_BV = np.stack([reference(row, Sampling(temperature=0.7)) for row in expected_BV])
    p_B = np.take_along_axis(p_BV, np.asarray(drawn.token_B)[:, None], -1)[:, 0]
    np.testing.assert_allclose(drawn.logp_B, np.log(p_B), atol=2e-5)
    np.testing.assert_allclose(drawn.entropy_B, [entropy_of(p_V) for p_V in p_BV], atol=2e-5)


# ----------------------------------------------------------------------------------------------- the learner's support


@only_cut
def test_on_the_samplers_logits_the_learner_finds_the_samplers_support(sampling):
    logits_BV = random_logits()
    drawn = draw(jnp.asarray(logits_BV), keys_of(40), sampling)
    tempered_BV = jnp.asarray(logits_BV) / sampling.temperature
    keep_BV = support_like(tempered_BV, drawn.token_B, drawn.support_B, sampling.top_k)
    np.testing.assert_array_equal(keep_BV, np.stack([reference(row, sampling) for row in logits_BV]) > 0)
    log_z_B, entropy_B = partition(tempered_BV, keep_BV)[:2]
    logp_B = jnp.take_along_axis(tempered_BV, drawn.token_B[:, None], -1)[:, 0] - log_z_B
    np.testing.assert_allclose(logp_B, drawn.logp_B, atol=1e-6)
    np.testing.assert_allclose(entropy_B, drawn.entropy_B, atol=1e-6)


@pytest.mark.parametrize("top_k", [0, 5])
def test_a_target_that_fell_out_of_the_support_stays_with_its_best_rivals(top_k):
    logits_BV = random_logits()
    best_first_BV = np.argsort(-logits_BV, -1)
    for rank, support in [(0, 1), (3, 1), (11, 1), (1, 2), (7, 3), (11, 5)]:
        target_B = best_first_BV[:, rank]
        keep_BV = support_like(jnp.asarray(logits_BV), jnp.asarray(target_B), jnp.full(40, support), top_k)
        for row, target in enumerate(target_B):
            rivals = [v for v in best_first_BV[row] if v != target][: support - 1]
            assert set(np.flatnonzero(keep_BV[row])) == {target, *rivals}


def test_a_masked_position_stays_finite():
    """Beyond a row's end the recorded support is 0; the log-prob there must not be NaN."""
    keep_BV = support_like(jnp.asarray(random_logits()), jnp.zeros(40, jnp.int32), jnp.zeros(40, jnp.int32), 5)
    assert keep_BV[:, 0].all() and (keep_BV.sum(-1) == 1).all()


def test_partition_is_numpys_log_partition_and_entropy():
    logits_BV = random_logits() * 20
    keep_BV = np.random.default_rng(0).random(logits_BV.shape) < 0.5
    keep_BV[:, 0] = True
    log_z_B, entropy_B = partition(jnp.asarray(logits_BV), jnp.asarray(keep_BV))[:2]
    for row in range(40):
        kept = logits_BV[row][keep_BV[row]].astype(np.float64)
        expected = kept.max() + np.log(np.exp(kept - kept.max()).sum())
        np.testing.assert_allclose(log_z_B[row], expected, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(entropy_B[row], entropy_of(np.exp(kept - expected)), atol=2e-4)


def test_logits_tied_at_the_threshold_are_all_kept_by_sampler_and_learner():
    """More than top_k then; the learner must find as many, not run off the end of its ranking."""
    logits_BV = jnp.array([[2.0, 1.0, 1.0, 1.0, 1.0, -3.0]])
    drawn = draw(logits_BV, jax.random.split(jax.random.key(0), 1), Sampling(top_k=2))
    assert int(drawn.support_B[0]) == 5
    keep_CV = support_like(logits_BV, drawn.token_B, drawn.support_B, top_k=2)
    np.testing.assert_array_equal(keep_CV, [[True, True, True, True, True, False]])
