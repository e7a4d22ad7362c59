"""Intervals that cover what they say with a handful of seeds, tests and effects against scipy, power as promised."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from grpo_jax.analysis import statistics

NUM_STUDIES = 2000  # simulated; a share of 0.95 of them is known to 0.005
SEEDS = {  # how final success may be spread over seeds: scipy's distributions
    "normal": scipy.stats.norm(0.8, 0.05),
    "bounded": scipy.stats.beta(20, 5),
    "near 1": scipy.stats.beta(30, 2),
    "at 1": scipy.stats.beta(9, 1),
    "skewed": scipy.stats.gamma(4),
    "long tail": scipy.stats.lognorm(0.5),
}


def simulated(name, num_seeds, num_studies=NUM_STUDIES):
    return SEEDS[name].rvs((num_studies, num_seeds), random_state=np.random.default_rng(num_seeds))


def coverage(interval, truth):
    return np.mean((interval[1] <= truth) & (truth <= interval[2]))


# ----------------------------------------------------------------------------------------------------------- intervals


@pytest.mark.parametrize("num_seeds", [5, 8])
@pytest.mark.parametrize("name", SEEDS)
@pytest.mark.slow
def test_95_percent_intervals_cover_from_five_seeds_on(name, num_seeds):
    values_xN, spread = simulated(name, num_seeds), SEEDS[name]
    middle = spread.ppf((np.arange(20000) + 0.5) / 40000 + 0.25).mean()
    assert 0.93 <= coverage(statistics.mean_interval(values_xN), spread.mean()) <= 0.975
    assert 0.92 <= coverage(statistics.iqm_interval(values_xN), middle) <= 0.97


def test_what_the_usual_intervals_cover_with_five_seeds():
    """Why it is not the percentile bootstrap, nor Student's t alone."""
    values_xN = simulated("at 1", 5)
    percentile = scipy.stats.bootstrap(
        (values_xN[:500],), np.mean, axis=-1, n_resamples=500, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    student = scipy.stats.ttest_1samp(values_xN, 0, axis=-1).confidence_interval()
    assert coverage((None, *percentile), 0.9) < 0.85
    assert coverage((None, *student), 0.9) < 0.92


def test_below_five_seeds_it_is_students_t():
    values_N = np.array([0.7, 0.9, 0.85, 0.8])
    expected = scipy.stats.ttest_1samp(values_N, 0).confidence_interval()
    np.testing.assert_allclose(statistics.mean_interval(values_N), [values_N.mean(), *expected])
    expected = scipy.stats.ttest_1samp(values_N[:3], 0).confidence_interval()
    np.testing.assert_allclose(statistics.iqm_interval(values_N[:3]), [values_N[:3].mean(), *expected])
    _, low, high = statistics.mean_interval([0.7])
    assert math.isnan(low) and math.isnan(high) and np.isnan(statistics.iqm_interval([0.7])[1:]).all()


def test_the_studentised_bootstrap_is_that_of_all_resamples():
    values_N = np.array([0.1, 0.5, 0.6, 0.65, 0.68])
    resampled_RN = np.array(list(itertools.product(values_N, repeat=5)))
    std_R = resampled_RN.std(-1, ddof=1)
    t_R = np.where(std_R > 1e-9, (resampled_RN.mean(-1) - values_N.mean()) / (np.where(std_R > 1e-9, std_R, 1) / 5**0.5), 0)
    least, most = np.quantile(t_R, [0.025, 0.975])
    assert most > scipy.stats.t.ppf(0.975, 4) > -least  # so one side is the bootstrap's and the other Student's
    mean, low, high = statistics.mean_interval(values_N)
    error = values_N.std(ddof=1) / 5**0.5
    np.testing.assert_allclose((mean - low) / error, most, rtol=0.1)
    np.testing.assert_allclose((high - mean) / error, scipy.stats.t.ppf(0.975, 4))


@pytest.mark.parametrize("interval", [statistics.mean_interval, statistics.iqm_interval])
def test_intervals_follow_units_and_signs_and_know_no_order(interval):
    values_N = np.array([0.91, 0.99, 0.97, 0.98, 0.95, 0.985])
    value, low, high = interval(values_N)
    assert low < value < high
    np.testing.assert_allclose(interval(100 * values_N + 7), 100 * np.array([value, low, high]) + 7)
    np.testing.assert_allclose(interval(-values_N), [-value, -high, -low])
    many = interval(np.stack([values_N, values_N + 1]))
    np.testing.assert_allclose(np.transpose(many), [[value, low, high], [value + 1, low + 1, high + 1]])
    np.testing.assert_array_equal(interval(np.ones(6)), [1, 1, 1])


def test_seeds_tied_at_the_top_do_not_make_an_interval_without_a_lower_side():
    student = scipy.stats.ttest_1samp([1, 1, 1, 1, 0.9], 0).confidence_interval()
    _, low, _ = statistics.mean_interval([1, 1, 1, 1, 0.9])
    assert low <= student.low + 1e-12  # the studentised bootstrap alone would say 0.98


@pytest.mark.parametrize("num", [4, 5, 8, 13])
def test_the_interquartile_mean_and_its_error_are_scipys(num):
    ours_N, theirs_N = np.random.default_rng(num).gamma(2, size=(2, num))
    (mine, my_error), (other, other_error) = statistics._trimmed(ours_N), statistics._trimmed(theirs_N)
    np.testing.assert_allclose(mine, scipy.stats.trim_mean(ours_N, 0.25))
    yuen = scipy.stats.ttest_ind(ours_N, theirs_N, trim=0.25, equal_var=False)
    np.testing.assert_allclose((mine - other) / math.hypot(my_error, other_error), yuen.statistic)


def test_the_area_under_a_curve_is_its_mean_height():
    assert statistics.area_under_curve([0, 10, 40], [0.0, 1.0, 0.5]) == pytest.approx((10 * 0.5 + 30 * 0.75) / 40)
    np.testing.assert_allclose(statistics.area_under_curve([5, 6], [[0.2, 0.2], [0, 1]]), [0.2, 0.5])
    assert statistics.area_under_curve([7], [0.3]) == 0.3


# ------------------------------------------------------------------------------------------------------------- paired


def test_a_paired_comparison_is_scipys():
    rng = np.random.default_rng(0)
    ours_N, theirs_N = rng.normal(0.9, 0.02, 8), rng.normal(0.88, 0.03, 8)
    found, expected = statistics.paired(ours_N, theirs_N), scipy.stats.ttest_rel(ours_N, theirs_N)
    diff_N = ours_N - theirs_N
    interval = expected.confidence_interval()
    np.testing.assert_allclose([found.difference.low, found.difference.high], [interval.low, interval.high])
    assert (found.num, found.difference.value, found.std) == (8, diff_N.mean(), diff_N.std(ddof=1))
    np.testing.assert_allclose(found.effect, (1 - 3 / (4 * 7 - 1)) * expected.statistic / 8**0.5, rtol=1e-3)
    flips = np.array(list(itertools.product([-1, 1], repeat=8))) @ diff_N
    assert found.p == np.mean(np.abs(flips) >= abs(diff_N.sum()) - 1e-12)


def test_the_chance_of_improvement_counts_pairs_and_half_the_ties():
    ours_N, theirs_N = [0.9, 0.8, 1.0], [0.8, 0.8, 0.95]
    pairs = [(a > b) + 0.5 * (a == b) for a in ours_N for b in theirs_N]
    assert statistics.paired(ours_N, theirs_N).improvement == pytest.approx(np.mean(pairs))


def test_comparisons_without_spread_or_of_one_seed():
    tied = statistics.paired([1.0] * 6, [1.0] * 6)
    assert (tied.p, tied.std, tied.improvement) == (1.0, 0.0, 0.5) and math.isnan(tied.effect)
    one = statistics.paired([0.9], [0.8])
    assert one.p == 1.0 and math.isnan(one.difference.low) and math.isnan(one.std)


@pytest.mark.parametrize("name", ["normal", "at 1", "long tail"])
@pytest.mark.slow
def test_the_sign_flip_test_is_wrong_in_one_of_twenty(name):
    for num_seeds, steps in ((5, 0), (6, 1), (8, 6), (9, 12)):  # of 2 / 2^N, below 0.05
        ours_xN, theirs_xN = np.split(simulated(name, 2 * num_seeds, 8000), 2, axis=-1)
        shown = np.mean(statistics.sign_flip_p(ours_xN - theirs_xN) <= 0.05)
        assert abs(shown - steps * 2.0 ** (1 - num_seeds)) <= (0.008 if steps else 0), (num_seeds, shown)


def test_the_smallest_p_is_that_of_seeds_that_all_agree():
    for num in (2, 5, 6, 11):
        assert statistics.sign_flip_p(np.arange(1.0, num + 1)) == pytest.approx(statistics.smallest_p(num))
    assert statistics.smallest_p(5) > 0.05 > statistics.smallest_p(6)


def test_many_seeds_are_flipped_at_random_and_the_same_each_time():
    diff_N = np.random.default_rng(1).normal(0.3, 1, 30)
    p = statistics.sign_flip_p(diff_N)
    assert p == statistics.sign_flip_p(diff_N)
    np.testing.assert_allclose(p, scipy.stats.ttest_1samp(diff_N, 0).pvalue, atol=0.02)


def test_holm():
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm([0.5, 0.9]), [1, 1])
    assert statistics.holm([]).shape == (0,)


@pytest.mark.slow
def test_no_false_claim_in_nineteen_of_twenty_reports():
    """Five settings that are all the same: each against the first, and the best against the second chosen afterwards."""
    rng = np.random.default_rng(3)
    finals_xSN = rng.normal(0.8, 0.05, (NUM_STUDIES, 5, 8))
    pairs = finals_xSN[:, 1:] - finals_xSN[:, :1]
    order = np.argsort(-finals_xSN.mean(-1), axis=1)[:, :2]
    first, second = (np.take_along_axis(finals_xSN, order[:, i, None, None], 1) for i in (0, 1))
    p_xK = statistics.sign_flip_p(np.concatenate([pairs, first - second], 1))
    false = np.mean([np.min(statistics.holm(p_K)) <= 0.05 for p_K in p_xK])
    assert 0.005 < false <= 0.05
    assert np.mean(p_xK[:, -1] <= 0.05) <= 0.05, "the best against the second needs no correction for having been chosen"


# -------------------------------------------------------------------------------------------------------------- power


@pytest.mark.parametrize(("effect", "num"), [(0.2, 199), (0.5, 34), (0.3, 90)])
def test_numbers_of_seeds_are_those_of_the_paired_t_test(effect, num):
    assert statistics.seeds_needed(effect) == num == statistics.seeds_needed(-effect)  # published tables, two-sided 0.05


@pytest.mark.parametrize(("effect", "alpha"), [(1.8, 0.05), (1.2, 0.05), (1.0, 0.05), (2.5, 0.0125)])
@pytest.mark.slow
def test_the_promised_number_of_seeds_shows_the_difference_four_times_out_of_five(effect, alpha):
    num = statistics.seeds_needed(effect, alpha)
    shown = {
        n: np.mean(statistics.sign_flip_p(np.random.default_rng(n).normal(effect, 1, (NUM_STUDIES, n))) <= alpha)
        for n in (num - 1, num)
    }
    assert shown[num] >= 0.79 and shown[num - 1] < 0.83, shown
    assert abs(statistics.power(effect, num, alpha) - shown[num]) < 0.04


def test_power_has_a_floor_of_seeds_and_a_limit_to_the_search():
    assert statistics.seeds_needed(math.inf) == 6  # 2 / 2^5 is above 0.05
    assert statistics.seeds_needed(math.inf, 0.05 / 4) == 8
    assert statistics.seeds_needed(0.0) is None and statistics.seeds_needed(0.01) is None
    assert statistics.power(5.0, 5) == 0.0
    assert all(math.isnan(statistics.detectable_effect(num)) for num in (1, 2, 5))
    for num in (6, 10, 40):
        effect = statistics.detectable_effect(num)
        assert statistics.power(effect, num) == pytest.approx(0.8)
        assert statistics.seeds_needed(effect * 1.001) == num
