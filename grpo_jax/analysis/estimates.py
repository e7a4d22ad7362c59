"""Estimates of a policy from a handful of samples of each question, with intervals: mean@k, pass@k, maj@k."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over questions and its interval (`CONFIDENCE`)."""

    value: float
    low: float
    high: float


def estimate(values_P: ArrayLike, seed: int = 0) -> Estimate:
    """Average one value a question. Deterministic for a seed.

    The interval of a share, where all values are 0 or 1, is Wilson's (JASA 22, 1927); that of other values is a percentile
    bootstrap over questions.
    """
    from scipy.stats import binomtest, bootstrap

    values_P = np.asarray(values_P, float)
    mean = float(values_P.mean())
    # Resampling shows no spread where all questions agree, and would call 0 of 16 certain.
    if np.isin(values_P, (0.0, 1.0)).all():
        share = binomtest(int(values_P.sum()), len(values_P)).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(mean, min(float(share.low), mean), max(float(share.high), mean))
    if np.ptp(values_P) == 0:
        return Estimate(mean, mean, mean)
    # Questions are resampled, not samples: the interval says what other questions of this kind would give.
    interval = bootstrap(
        (values_P,),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        batch=100,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def pass_at_k(num_right_P: ArrayLike, num_samples: int, k: int) -> Float[np.ndarray, " P"]:
    """Estimate, without bias, the chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al., arXiv 2107.03374, eq. 1.

    Args:
      num_right_P: int, c, the samples of each question that are right. num_samples: n, the samples drawn of each.
      k: from 1 to n.
    Returns: float64 [P]; k = 1 is the mean.
    Raises: ValueError if k is not in 1..n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k}: must be from 1 to the number of samples, {num_samples}")
    num_wrong_P1 = num_samples - np.asarray(num_right_P, int)[:, None]
    # C(n - c, k) / C(n, k) as a product of k ratios, for the binomials themselves overflow; one of the ratios is 0 where fewer
    # than k samples are wrong.
    drawn_1k = np.arange(k)[None]
    return 1.0 - (np.maximum(num_wrong_P1 - drawn_1k, 0) / (num_samples - drawn_1k)).prod(-1)


def majority(
    answers_PG: Sequence[Sequence[str]], is_right_PG: Sequence[Sequence[float]] | np.ndarray
) -> Float[np.ndarray, " P"]:
    """Score the answer that is given most often, maj@G (Wang et al., arXiv 2203.11171).

    Answers tied for the first place count by the share of them that is right; a sample without an answer ("") has no vote.
    An answer is as right as the samples that give it are on average, should the scorer tell them apart.
    """
    return np.asarray([_vote(answers_G, right_G) for answers_G, right_G in zip(answers_PG, is_right_PG, strict=True)])


def _vote(answers_G: Sequence[str], is_right_G: Sequence[float] | np.ndarray) -> float:
    """Hold the vote on one question."""
    votes = collections.defaultdict(list)
    for answer, is_right in zip(answers_G, is_right_G, strict=True):
        if answer:
            votes[answer].append(float(is_right))
    most = max(map(len, votes.values()), default=0)
    winners = [np.mean(rights) for rights in votes.values() if len(rights) == most]
    if not winners:
        return 0.0
    return float(np.mean(winners))
