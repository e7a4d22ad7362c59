"""The cut distribution against a plain NumPy one, draws against its probabilities, and the learner's view of its support."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.rollout.sampling import GREEDY, Sampling, draw, log_partition_and_entropy, support_like, support_threshold

V = 12
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
]
name_of = "t{0.temperature}-k{0.top_k}-p{0.top_p}".format
every_cut = pytest.mark.parametrize("sampling", CUTS, ids=name_of)
only_cut = pytest.mark.parametrize("sampling", CUTS[3:], ids=name_of)


def reference(logits_V, sampling):
    """float64 probabilities, 0 outside the support: temperature, then the k best, then the fewest that reach top_p."""
    tempered_V = np.asarray(logits_V, np.float64) / sampling.temperature
    best_first = np.argsort(-tempered_V)
    if sampling.top_k:
        best_first = best_first[: sampling.top_k]
    weights = np.exp(tempered_V[best_first] - tempered_V.max())
    mass = np.cumsum(weights / weights.sum())
    num_kept = 1 if sampling.top_p < 1 else len(mass)
    while mass[num_kept - 1] < sampling.top_p and num_kept < len(mass):
        num_kept += 1
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
    keep_BV = tempered_BV >= support_threshold(tempered_BV, sampling.top_k, sampling.top_p)[:, None]
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


# ----------------------------------------------------------------------------------------------- the learner's support


@only_cut
def test_on_the_samplers_logits_the_learner_finds_the_samplers_support(sampling):
    logits_BV = random_logits()
    drawn = draw(jnp.asarray(logits_BV), keys_of(40), sampling)
    tempered_BV = jnp.asarray(logits_BV) / sampling.temperature
    keep_BV = support_like(tempered_BV, drawn.token_B, drawn.support_B, sampling.top_k)
    np.testing.assert_array_equal(keep_BV, np.stack([reference(row, sampling) for row in logits_BV]) > 0)
    log_z_B, entropy_B = log_partition_and_entropy(tempered_BV, keep_BV)
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


def test_normalise_is_numpys_log_partition_and_entropy():
    logits_BV = random_logits() * 20
    keep_BV = np.random.default_rng(0).random(logits_BV.shape) < 0.5
    keep_BV[:, 0] = True
    log_z_B, entropy_B = log_partition_and_entropy(jnp.asarray(logits_BV), jnp.asarray(keep_BV))
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
