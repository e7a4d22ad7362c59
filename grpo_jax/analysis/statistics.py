"""Statistics of a handful of seeds, of a setting and of the difference of two: intervals, a paired test, power.

Arrays of seeds have the seeds last, `M` of them; `x` means any axes before them. All of it is deterministic.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from grpo_jax.analysis.estimates import CONFIDENCE, Estimate

ALPHA = 1 - CONFIDENCE
POWER = 0.8  # "four times out of five"
TRIM = 0.25  # of the seeds, on each side: what the interquartile mean leaves out
NUM_RESAMPLES = 4000
NUM_SIMULATED = 200_000  # to find the critical value of the interquartile mean
MIN_BOOTSTRAP = 5  # seeds; the studentised bootstrap of fewer is as wide as it likes
MAX_FLIPS = 2**14  # all sign flips are tried up to here (14 seeds), beyond it this many random ones
MAX_SEEDS = 1000  # where the search for a number of seeds gives up
Interval = tuple[Float[np.ndarray, "*x"], Float[np.ndarray, "*x"], Float[np.ndarray, "*x"]]  # value, low, high
LARGEST_EFFECT = 10.0  # standard deviations of differences; nobody needs to tell larger ones apart


def mean_interval(values_xM: ArrayLike) -> Interval:
    """Average over seeds -> (mean_x, low_x, high_x), a `CONFIDENCE` interval; bounds are NaN for one seed.

    On each side the further of two: Student's t, and from MIN_BOOTSTRAP seeds on the studentised bootstrap (Efron and
    Tibshirani, 1993, section 12.5), which follows skew. Seeds near a success of 1 are skewed, and t alone covers too little
    there (about 0.90 for beta(9, 1)); the bootstrap alone does where seeds tie. Simulated coverage with 5 to 12 seeds is
    0.93 to 0.98, with 3 or 4 (t alone) 0.90 to 0.97; seeds of which some collapse altogether need more than this can give.
    """
    values_xM = np.asarray(values_xM, float)
    num = values_xM.shape[-1]
    mean_x = values_xM.mean(-1)
    if num == 1:
        return mean_x, np.full_like(mean_x, np.nan), np.full_like(mean_x, np.nan)
    error_x = values_xM.std(-1, ddof=1) / math.sqrt(num)
    # A high quantile of t = (mean - truth) / error says how far the mean may be above the truth: it makes the lower bound.
    below_x = above_x = np.full_like(mean_x, _student(num))
    if num >= MIN_BOOTSTRAP:
        least_x, most_x = _studentised_quantiles(values_xM - mean_x[..., None])
        below_x, above_x = np.maximum(below_x, most_x), np.maximum(above_x, -least_x)
    return mean_x, mean_x - below_x * error_x, mean_x + above_x * error_x


def iqm_interval(values_xM: ArrayLike) -> Interval:
    """Average the middle half of the seeds as `scipy.stats.trim_mean` does -> (iqm_x, low_x, high_x).

    The error is that of the trimmed mean (Tukey and McLaughlin, 1963; Yuen, 1974). Its t distribution is only roughly right
    for a few seeds, so the critical value is the one that covers normal seeds exactly. Simulated coverage with 5 to 20
    seeds is 0.92 to 0.97, but for U-shaped ones (0.90). Below 4 seeds nothing is trimmed: the mean with Student's t.
    """
    iqm_x, error_x = _trimmed(np.asarray(values_xM, float))
    reach_x = _trimmed_critical(np.shape(values_xM)[-1]) * error_x
    return iqm_x, iqm_x - reach_x, iqm_x + reach_x


def area_under_curve(steps_E: ArrayLike, values_xE: ArrayLike) -> Float[np.ndarray, "*x"]:
    """Compute the mean height of a learning curve over its steps, by trapezoids; one point: its value."""
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


def paired(ours_M: ArrayLike, theirs_M: ArrayLike) -> Paired:
    """Compare two settings, seed by seed; at least one seed."""
    from scipy.stats import mannwhitneyu

    ours_M, theirs_M = np.asarray(ours_M, float), np.asarray(theirs_M, float)
    diff_M = ours_M - theirs_M
    num, mean = len(diff_M), float(diff_M.mean())
    std = effect = math.nan
    if num > 1:
        std = float(diff_M.std(ddof=1))
    if std > 0:
        effect = hedges(num) * mean / std
    reach = _student(num) * std / math.sqrt(num)
    return Paired(
        num=num,
        difference=Estimate(mean, mean - reach, mean + reach),
        p=float(sign_flip_p(diff_M)),
        std=std,
        effect=effect,
        # Mann and Whitney's U counts the pairs that ours win, over all pairs of seeds and not only those of one seed.
        improvement=float(mannwhitneyu(ours_M, theirs_M).statistic) / num**2,
    )


def sign_flip_p(diff_xM: ArrayLike) -> Float[np.ndarray, "*x"]:
    """Test if differences are 0 on average: p, two-sided, is how often random signs give a mean as far from 0.

    Exact up to 14 seeds, MAX_FLIPS random flips beyond. It needs no normal seeds, only that under the null a difference is
    as likely as its negative. Never below `smallest_p`.
    """
    from scipy.stats import permutation_test

    diff_xM = np.asarray(diff_xM, float)
    if diff_xM.shape[-1] == 1:  # both flips of one seed are as far from 0
        return np.ones(diff_xM.shape[:-1])
    found = permutation_test(
        (diff_xM,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=MAX_FLIPS,
        axis=-1,
        rng=np.random.default_rng(0),
    )
    return np.asarray(found.pvalue)


def smallest_p(num: int) -> float:
    """Return the smallest p that the sign-flip test can give: all seeds on one side, 2 of 2^M flips. 5 seeds: 0.0625."""
    return 2.0 ** (1 - num)


def holm(p_values: ArrayLike) -> Float[np.ndarray, " tests"]:
    """Correct the p of several tests for their number (Holm, 1979): those below `ALPHA` are then right all at once."""
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values)
    # The smallest is multiplied by the number of tests, the next by one less. Corrected values keep their order, so none is
    # below one that was smaller before.
    adjusted = np.maximum.accumulate(np.arange(len(p_values), 0, -1) * p_values[order])
    return np.minimum(adjusted, 1.0)[np.argsort(order)]


def hedges(num: int) -> float:
    """Return the factor that makes Cohen's d of `num` differences unbiased (Hedges, 1981): J(num - 1), exact."""
    free = num - 1
    if free <= 1:
        return math.nan
    return math.exp(math.lgamma(free / 2) - math.lgamma((free - 1) / 2)) / math.sqrt(free / 2)


def power(effect: ArrayLike, num: ArrayLike, alpha: float = ALPHA) -> Float[np.ndarray, "*x"]:
    """Compute the chance that the paired test on `num` seeds shows a true difference.

    By the noncentral t, at the level that the sign-flip test can reach: with few seeds p moves in steps of 2 / 2^M. Where
    one step is all that alpha leaves, the chance that every seed points the right way, which is exact for normal ones.

    Args:
      effect: the true difference, in standard deviations of differences. num: of seeds.
      alpha: level of the test.
    Returns: float64 in [0, 1], of the shape that effect and num broadcast to.
    """
    from scipy.stats import nct, norm, t

    nums: Any = np.asarray(num)  # `smallest_p` works on arrays too
    effect = np.minimum(np.abs(effect), LARGEST_EFFECT)
    steps = np.floor(alpha / smallest_p(nums))
    # The level is rounded down to a whole number of steps: at alpha itself the t test would promise more than flips can show.
    by_t = nct.sf(t.isf(steps * smallest_p(nums) / 2, nums - 1), nums - 1, effect * np.sqrt(nums))
    return np.select([steps > 1, steps == 1], [by_t, norm.cdf(effect) ** nums], 0.0)


def seeds_needed(effect: float, alpha: float = ALPHA) -> int | None:
    """Find the fewest seeds that show such a difference with a chance of `POWER`; None: more than MAX_SEEDS."""
    nums = np.arange(2, MAX_SEEDS + 1)
    # The first of all that are enough, not a bisection: p moves in steps, so that power does not rise with every seed.
    enough = nums[power(effect, nums, alpha) >= POWER]
    if not len(enough):
        return None
    return int(enough[0])


def fewest_seeds(num_tests: int) -> int | None:
    """Find the number of seeds below which even the largest effect shows in none of `num_tests` corrected comparisons.

    None: more than MAX_SEEDS.
    """
    return seeds_needed(math.inf, ALPHA / num_tests)


def detectable_effect(num: int, alpha: float = ALPHA) -> float:
    """Find the smallest effect that `num` seeds show with a chance of `POWER`; NaN: they cannot show any."""
    from scipy.optimize import brentq

    if num < 2 or power(LARGEST_EFFECT, num, alpha) < POWER:
        return math.nan
    # A root is bracketed: power is next to nothing at 0, and POWER is reached at the largest effect.
    found: Any = brentq(lambda effect: float(power(effect, num, alpha)) - POWER, 0, LARGEST_EFFECT)
    return float(found)


def _student(num: int) -> float:
    """Return the two-sided critical value of the mean of `num` values; NaN for one."""
    from scipy.stats import t

    return float(t.ppf((1 + CONFIDENCE) / 2, num - 1))


@functools.cache
def _resamples(num: int) -> np.ndarray:
    """Draw float64 [Z, M]: how often each of M seeds is in a bootstrap resample, as a share."""
    # Shares instead of indices: means over resamples are then one matrix product for any number of curves. Cached, and with a
    # fixed seed, so that equal values have equal intervals.
    return np.random.default_rng(0).multinomial(num, np.full(num, 1 / num), NUM_RESAMPLES) / num


def _studentised_quantiles(centred_xM: np.ndarray) -> np.ndarray:
    """Compute [2, x], the bounds of the middle `CONFIDENCE` of bootstrapped t statistics.

    Resamples without spread count as t = 0.
    """
    num = centred_xM.shape[-1]
    shares_MZ = _resamples(num).T
    mean_xZ = centred_xM @ shares_MZ
    square_xM = centred_xM**2
    variance_xZ = square_xM @ shares_MZ - mean_xZ**2
    has_spread = variance_xZ > 1e-9 * square_xM.mean(-1, keepdims=True)  # rounding leaves a little of nothing
    t_xZ = np.where(has_spread, mean_xZ, 0.0) / np.sqrt(np.where(has_spread, variance_xZ, 1.0) / (num - 1))
    return np.quantile(t_xZ, [ALPHA / 2, 1 - ALPHA / 2], axis=-1)


def _trimmed(values_xM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute the interquartile mean and its standard error (NaN for one seed), from the winsorised sum of squares."""
    from scipy.stats import trim_mean

    num = values_xM.shape[-1]
    cut = int(TRIM * num)
    kept = num - 2 * cut
    mean_x = np.asarray(trim_mean(values_xM, TRIM, axis=-1))
    if num == 1:
        return mean_x, np.full_like(mean_x, np.nan)
    # Seeds that were left out count for the error at the value of the last one kept: it depends on how many they are and not on
    # how far out.
    ordered_xM = np.sort(values_xM, -1)
    winsorised_xM = np.clip(ordered_xM, ordered_xM[..., cut : cut + 1], ordered_xM[..., num - cut - 1 : num - cut])
    return mean_x, np.sqrt(winsorised_xM.var(-1) * num / (kept * (kept - 1)))


@functools.cache
def _trimmed_critical(num: int) -> float:
    """Simulate the value that |IQM - truth| / error stays below with a chance of `CONFIDENCE` if seeds are normal."""
    if int(TRIM * num) == 0:
        return _student(num)
    iqm, error = _trimmed(np.random.default_rng(0).normal(size=(NUM_SIMULATED, num)))
    return float(np.quantile(np.abs(iqm) / error, CONFIDENCE))


def smoothing_window(num_steps: int) -> int:
    """Return the steps that a curve of training is averaged over: a twentieth of it."""
    return max(1, num_steps // 20)


def running_mean(values_E: np.ndarray, window: int) -> np.ndarray:
    """Return float64 [E - window + 1], means of `window` neighbours; none reaches over the ends."""
    return np.convolve(values_E, np.full(window, 1 / window), mode="valid")
