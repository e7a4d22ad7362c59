"""What a handful of seeds say about a setting, and about the difference of two: intervals, a paired test, power.

Arrays of seeds have the seeds last, `N` of them; `x` stands for any axes before them. All of it is deterministic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from grpo_jax.analysis.estimates import CONFIDENCE, Estimate

ALPHA = 1 - CONFIDENCE
POWER = 0.8  # "four times out of five"
TRIM = 0.25  # of the seeds, on each side: what the interquartile mean leaves out
NUM_RESAMPLES = 4000
NUM_SIMULATED = 200_000  # to find the critical value of the interquartile mean
MIN_BOOTSTRAP = 5  # seeds; the studentised bootstrap of fewer is as wide as it likes
MAX_FLIPS = 2**14  # all sign flips are tried up to here (14 seeds), beyond it this many random ones
MAX_SEEDS = 1000  # where the search for a number of seeds gives up
LARGEST_EFFECT = 10.0  # standard deviations of differences; nobody needs to tell larger ones apart


def mean_interval(values_xN: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds -> (mean_x, low_x, high_x), a `CONFIDENCE` interval; bounds are NaN for one seed.

    On each side the further of two: Student's t, and from MIN_BOOTSTRAP seeds on the studentised bootstrap (Efron and
    Tibshirani, 1993, section 12.5), which follows skew. Seeds near a success of 1 are skewed, and t alone covers too little
    there (about 0.90 for beta(9, 1)); the bootstrap alone does where seeds tie. Simulated coverage with 5 to 12 seeds is
    0.93 to 0.98, with 3 or 4 (t alone) 0.90 to 0.97; seeds of which some collapse altogether need more than this can give.
    """
    values_xN = np.asarray(values_xN, float)
    num = values_xN.shape[-1]
    mean_x = values_xN.mean(-1)
    if num == 1:
        return mean_x, np.full_like(mean_x, np.nan), np.full_like(mean_x, np.nan)
    error_x = values_xN.std(-1, ddof=1) / math.sqrt(num)
    below_x = above_x = np.full_like(mean_x, _student(num))
    if num >= MIN_BOOTSTRAP:
        least_x, most_x = _studentised_quantiles(values_xN - mean_x[..., None])
        below_x, above_x = np.maximum(below_x, most_x), np.maximum(above_x, -least_x)
    return mean_x, mean_x - below_x * error_x, mean_x + above_x * error_x


def iqm_interval(values_xN: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Interquartile mean over seeds, the middle half as `scipy.stats.trim_mean` has it -> (iqm_x, low_x, high_x).

    The error is that of the trimmed mean (Tukey and McLaughlin, 1963; Yuen, 1974). Its t distribution is only roughly right
    for a few seeds, so the critical value is the one that covers normal seeds exactly. Simulated coverage with 5 to 20
    seeds is 0.92 to 0.97, but for U-shaped ones (0.90). Below 4 seeds nothing is trimmed: the mean with Student's t.
    """
    iqm_x, error_x = _trimmed(np.asarray(values_xN, float))
    reach_x = _trimmed_critical(np.shape(values_xN)[-1]) * error_x
    return iqm_x, iqm_x - reach_x, iqm_x + reach_x


def area_under_curve(steps_E: Any, values_xE: Any) -> np.ndarray:
    """Mean height of a learning curve over its steps, by trapezoids; one point: its value."""
    from scipy.integrate import trapezoid

    steps_E, values_xE = np.asarray(steps_E, float), np.asarray(values_xE, float)
    if len(steps_E) == 1:
        return values_xE[..., 0]
    return np.asarray(trapezoid(values_xE, steps_E, axis=-1)) / (steps_E[-1] - steps_E[0])


@dataclasses.dataclass(frozen=True)
class Paired:
    """One setting against another on the seeds they share.

    num: of seeds. difference: mean of ours - theirs, with the paired t interval. p: of the sign-flip test, two-sided.
    std: of the differences. effect: Cohen's d_z with Hedges' correction. improvement: chance that a seed of ours beats a
    seed of theirs, ties counting half (Agarwal et al., arXiv 2108.13264). NaN where one seed does not say, or no spread.
    """

    num: int
    difference: Estimate
    p: float
    std: float
    effect: float
    improvement: float


def paired(ours_N: Any, theirs_N: Any) -> Paired:
    """Compare two settings, seed by seed; at least one seed."""
    from scipy.stats import mannwhitneyu

    ours_N, theirs_N = np.asarray(ours_N, float), np.asarray(theirs_N, float)
    diff_N = ours_N - theirs_N
    num, mean = len(diff_N), float(diff_N.mean())
    std = float(diff_N.std(ddof=1)) if num > 1 else math.nan
    reach = _student(num) * std / math.sqrt(num)
    return Paired(
        num=num,
        difference=Estimate(mean, mean - reach, mean + reach),
        p=float(sign_flip_p(diff_N)),
        std=std,
        effect=hedges(num) * mean / std if std > 0 else math.nan,
        improvement=float(mannwhitneyu(ours_N, theirs_N).statistic) / num**2,
    )


def sign_flip_p(diff_xN: Any) -> np.ndarray:
    """Two-sided p of the paired permutation test: how often would random signs give a mean as far from 0?

    Exact up to 14 seeds, MAX_FLIPS random flips beyond. It needs no normal seeds, only that under the null a difference is
    as likely as its negative. Never below `smallest_p`.
    """
    from scipy.stats import permutation_test

    diff_xN = np.asarray(diff_xN, float)
    if diff_xN.shape[-1] == 1:
        return np.ones(diff_xN.shape[:-1])
    found = permutation_test(
        (diff_xN,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=MAX_FLIPS,
        axis=-1,
        rng=np.random.default_rng(0),
    )
    return np.asarray(found.pvalue)


def smallest_p(num: int) -> float:
    """The smallest p that the sign-flip test can give: all seeds on one side, 2 of 2^N flips. 5 seeds: 0.0625."""
    return 2.0 ** (1 - num)


def holm(p_K: Any) -> np.ndarray:
    """p of K tests -> p corrected for there being K of them (Holm, 1979): below `ALPHA` they are right all at once."""
    p_K = np.asarray(p_K, float)
    order = np.argsort(p_K)
    adjusted = np.maximum.accumulate(np.arange(len(p_K), 0, -1) * p_K[order])
    return np.minimum(adjusted, 1.0)[np.argsort(order)]


def hedges(num: int) -> float:
    """What Cohen's d of `num` differences is multiplied by to be unbiased (Hedges, 1981): J(num - 1), exact."""
    free = num - 1
    return math.exp(math.lgamma(free / 2) - math.lgamma((free - 1) / 2)) / math.sqrt(free / 2) if free > 1 else math.nan


def power(effect: Any, num: Any, alpha: float = ALPHA) -> np.ndarray:
    """Chance that the paired test on `num` seeds shows a true difference of `effect` standard deviations of differences.

    By the noncentral t, at the level that the sign-flip test can reach: with few seeds p moves in steps of 2 / 2^N. Where
    one step is all that alpha leaves, the chance that every seed points the right way, which is exact for normal ones.
    """
    from scipy.stats import nct, norm, t

    num, effect = np.asarray(num), np.minimum(np.abs(effect), LARGEST_EFFECT)
    steps = np.floor(alpha / smallest_p(num))
    by_t = nct.sf(t.isf(steps * smallest_p(num) / 2, num - 1), num - 1, effect * np.sqrt(num))
    return np.select([steps > 1, steps == 1], [by_t, norm.cdf(effect) ** num], 0.0)


def seeds_needed(effect: float, alpha: float = ALPHA) -> int | None:
    """The fewest seeds that show such a difference with a chance of `POWER`; None: more than MAX_SEEDS."""
    nums = np.arange(2, MAX_SEEDS + 1)
    enough = nums[power(effect, nums, alpha) >= POWER]
    return int(enough[0]) if len(enough) else None


def fewest_seeds(num_tests: int) -> int | None:
    """Fewer show nothing, however large, in so many comparisons corrected for one another; None: more than MAX_SEEDS."""
    return seeds_needed(math.inf, ALPHA / num_tests)


def detectable_effect(num: int, alpha: float = ALPHA) -> float:
    """The smallest effect that `num` seeds show with a chance of `POWER`; NaN: they cannot show any."""
    from scipy.optimize import brentq

    if num < 2 or power(LARGEST_EFFECT, num, alpha) < POWER:
        return math.nan
    found: Any = brentq(lambda effect: float(power(effect, num, alpha)) - POWER, 0, LARGEST_EFFECT)
    return float(found)


def _student(num: int) -> float:
    """Two-sided critical value of the mean of `num` values; NaN for one."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, num - 1))


@functools.cache
def _resamples(num: int) -> np.ndarray:
    """float64[R, N]: how often each of N seeds is in a bootstrap resample, as a share."""
    return np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), NUM_RESAMPLES) / num


def _studentised_quantiles(centred_xN: np.ndarray) -> np.ndarray:
    """[2, x]: bounds of the middle `CONFIDENCE` of bootstrapped t statistics. Resamples without spread count as t = 0."""
    num = centred_xN.shape[-1]
    shares_NR = _resamples(num).T
    mean_xR = centred_xN @ shares_NR
    square_xN = centred_xN**2
    variance_xR = square_xN @ shares_NR - mean_xR**2
    has_spread = variance_xR > 1e-9 * square_xN.mean(-1, keepdims=True)  # rounding leaves a little of nothing
    t_xR = np.where(has_spread, mean_xR, 0.0) / np.sqrt(np.where(has_spread, variance_xR, 1.0) / (num - 1))
    return np.quantile(t_xR, [ALPHA / 2, 1 - ALPHA / 2], axis=-1)


def _trimmed(values_xN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Interquartile mean and its standard error (NaN for one seed), from the winsorised sum of squares."""
    from scipy.stats import trim_mean

    num = values_xN.shape[-1]
    cut = int(TRIM * num)
    kept = num - 2 * cut
    mean_x = np.asarray(trim_mean(values_xN, TRIM, axis=-1))
    if num == 1:
        return mean_x, np.full_like(mean_x, np.nan)
    ordered_xN = np.sort(values_xN, -1)
    winsorised_xN = np.clip(ordered_xN, ordered_xN[..., cut : cut + 1], ordered_xN[..., num - cut - 1 : num - cut])
    return mean_x, np.sqrt(winsorised_xN.var(-1) * num / (kept * (kept - 1)))


@functools.cache
def _trimmed_critical(num: int) -> float:
    """What |IQM - truth| / error stays below with a chance of `CONFIDENCE` if seeds are normal."""
    if int(TRIM * num) == 0:
        return _student(num)
    iqm, error = _trimmed(np.random.default_rng(0).normal(size=(NUM_SIMULATED, num)))
    return float(np.quantile(np.abs(iqm) / error, CONFIDENCE))
