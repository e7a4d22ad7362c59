"""pass@k against enumeration, majority votes by hand, and intervals that cover what they should."""

import itertools
import math

import numpy as np
import pytest

from grpo_jax.analysis.estimates import Estimate, estimate, majority, pass_at_k
from grpo_jax.training.evaluate import ks, to_metrics


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for k in range(1, n + 1):
        expected = []
        for num_right in range(n + 1):
            is_right = [i < num_right for i in range(n)]
            subsets = list(itertools.combinations(is_right, k))
            expected.append(sum(map(any, subsets)) / len(subsets))
            closed = 1 - math.comb(n - num_right, k) / math.comb(n, k)
            assert math.isclose(expected[-1], closed, abs_tol=1e-12)
        np.testing.assert_allclose(pass_at_k(np.arange(n + 1), n, k), expected, atol=1e-12)
    np.testing.assert_allclose(pass_at_k(np.arange(n + 1), n, 1), np.arange(n + 1) / n)


def test_pass_at_k_stays_exact_where_binomials_overflow():
    np.testing.assert_allclose(pass_at_k([1, 500], 1000, 500)[0], 0.5, rtol=1e-12)
    assert pass_at_k([501], 1000, 500)[0] == 1.0
    with pytest.raises(ValueError, match="k = 3"):
        pass_at_k([1], 2, 3)


def test_majority():
    answers = [
        ["4", "4", "5", "6"],  # the most frequent is right
        ["4", "5", "5", "6"],  # is wrong
        ["4", "4", "5", "5"],  # two tie, one of them right
        ["", "", "", "4"],  # samples without an answer have no vote
        ["", "", "", ""],
        ["4", "4", "4", "5"],  # the scorer accepts the same answer once out of three times
    ]
    is_right = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 1]]
    np.testing.assert_allclose(majority(answers, np.array(is_right)), [1, 0, 0.5, 1, 0, 1 / 3])


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = []
    for seed in range(100):
        each = estimate(rng.random(60) < 0.3, seed)
        assert each.low <= each.value <= each.high
        covered.append(each.low <= 0.3 <= each.high)
    assert 85 <= sum(covered) <= 100, "a binomial(100, 0.95) lies in here but for one time in ten thousand"


def test_the_interval_is_deterministic_and_narrows():
    values = np.arange(400) % 4 == 0
    assert estimate(values, 1) == estimate(values, 1)
    assert estimate(values * 0.5, 1) == estimate(values * 0.5, 1) != estimate(values * 0.5, 2), "no share: resampled"
    wide, narrow = estimate(values[:25]), estimate(values)
    expected = 2 * 1.96 * math.sqrt(0.25 * 0.75 / 400)
    np.testing.assert_allclose(narrow.high - narrow.low, expected, rtol=0.15)
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)
    assert estimate([6.0, 6.0]) == Estimate(6.0, 6.0, 6.0)


@pytest.mark.parametrize(("num_right", "num"), [(0, 16), (16, 16), (1, 16), (5, 8)])
def test_a_share_has_wilsons_interval(num_right, num):
    """0 of 16 is not known to be 0. The closed form, by hand."""
    z, p = 1.959964, num_right / num
    middle, width = (p + z**2 / (2 * num)) / (1 + z**2 / num), z / (1 + z**2 / num)
    spread = width * math.sqrt(p * (1 - p) / num + z**2 / (4 * num**2))
    got = estimate(np.arange(num) < num_right)
    assert got.value == p
    np.testing.assert_allclose([got.low, got.high], [middle - spread, middle + spread], atol=1e-6)
    assert got.high - got.low > 0.15


def test_ks_and_flat_names():
    assert [ks(n) for n in (1, 2, 4, 6)] == [[], [2], [2, 4], [2, 4, 6]]
    flat = to_metrics({"maj@4": Estimate(0.5, 0.4, 0.6)})
    assert flat == {"eval/maj@4": 0.5, "eval/maj@4_low": 0.4, "eval/maj@4_high": 0.6}
