"""What a handful of samples of each question say about a policy, with intervals: mean@k, pass@k, maj@k."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over questions and its bootstrap interval (`CONFIDENCE`)."""

    value: float
    low: float
    high: float


def estimate(values_P: Any, seed: int = 0) -> Estimate:
    """Mean of one value a question, with a percentile bootstrap over questions. Deterministic for a seed."""
    from scipy.stats import bootstrap

    values_P = np.asarray(values_P, float)
    mean = float(values_P.mean())
    if np.ptp(values_P) == 0:  # also a single question: resampling shows no spread
        return Estimate(mean, mean, mean)
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


def pass_at_k(num_right_P: Any, num_samples: int, k: int) -> np.ndarray:
    """Unbiased chance that at least one of k samples is right: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al., arXiv 2107.03374, eq. 1. num_right_P: int[P], c: right ones
    among the n = num_samples drawn. Returns float64[P]; k = 1 is the mean.
    Raises ValueError if k is not in 1..n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k = {k}: must be from 1 to the number of samples, {num_samples}")
    num_wrong_P1 = num_samples - np.asarray(num_right_P, int)[:, None]
    # C(n - c, k) / C(n, k) as a product of k ratios; one of them is 0 where fewer than k samples are wrong.
    drawn_1k = np.arange(k)[None]
    return 1.0 - (np.maximum(num_wrong_P1 - drawn_1k, 0) / (num_samples - drawn_1k)).prod(-1)


def majority(answers_PG: Sequence[Sequence[str]], is_right_PG: Any) -> np.ndarray:
    """maj@G (Wang et al., arXiv 2203.11171): is the answer given most often right? float64[P].

    Answers tied for the first place count by the share of them that is right; a sample without an answer ("") has no vote.
    An answer is as right as the samples that give it are on average, should the scorer tell them apart.
    """
    return np.asarray([_vote(answers_G, right_G) for answers_G, right_G in zip(answers_PG, is_right_PG, strict=True)])


def _vote(answers_G: Sequence[str], is_right_G: Any) -> float:
    votes = collections.defaultdict(list)
    for answer, is_right in zip(answers_G, is_right_G, strict=True):
        if answer:
            votes[answer].append(float(is_right))
    most = max(map(len, votes.values()), default=0)
    winners = [np.mean(rights) for rights in votes.values() if len(rights) == most]
    return float(np.mean(winners)) if winners else 0.0
