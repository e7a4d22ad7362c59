"""Statistics of the runs: an estimate for each setting, a paired test for each two that the report compares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeGuard

import numpy as np

from grpo_jax.analysis import statistics
from grpo_jax.analysis.estimates import Estimate
from grpo_jax.errors import UserError
from grpo_jax.tools.report.runs import LeftOut, Run

DEFAULT_BASELINE = "grpo"
SHARES = ("eval/success", "eval/mean@", "eval/pass@", "eval/maj@", "reward/success")  # metrics between 0 and 1


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ in the seed only, in its order.

    final_N, area_N: float64, the metric at the last step, and its mean over the learning curve, of each of N seeds. mean, iqm,
    area: over seeds. tokens, secs: completion tokens sampled and seconds spent in steps, mean over seeds.
    """

    name: str
    runs: tuple[Run, ...]
    final_N: np.ndarray
    area_N: np.ndarray
    mean: Estimate
    iqm: Estimate
    area: Estimate
    tokens: float
    secs: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`ours` against `theirs` on their common seeds.

    result: None without a common seed. p: corrected for all comparisons of the report, and smallest_p: the value of p if
    every seed of every comparison pointed one way. seeds_needed: to show a difference of the size seen (None: beyond
    statistics.MAX_SEEDS). detectable: difference that this number of seeds shows (NaN: none). Both four times out of five.
    """

    ours: Setting
    theirs: Setting
    result: statistics.Paired | None
    p: float
    smallest_p: float
    seeds_needed: int | None
    detectable: float


@dataclasses.dataclass(frozen=True)
class Study:
    """Everything the report says. settings: best mean first. comparisons: against the baseline, in that order.

    top_two: the best against the second; None if there is only one setting. num_tests: of differences, corrected for.
    order: names of the settings as the runs list them, which fixes their colours and legends.
    """

    metric: str
    baseline: Setting
    settings: list[Setting]
    comparisons: list[Comparison]
    top_two: Comparison | None
    num_tests: int
    left_out: list[LeftOut]
    order: list[str]


def analyse(runs: Sequence[Run], left_out: Sequence[LeftOut], metric: str, baseline: str | None) -> Study:
    """Compare the settings of finished runs.

    Args:
      runs: seeds of all settings, those of one setting under one name; at least one.
      left_out: runs that do not count; the report lists them.
      metric: name in metrics.jsonl of what is compared; more is better.
      baseline: name of the setting that the others are compared with; None: grpo if it is there, else the first.
    Returns: the study, settings sorted by their mean.
    Raises: UserError if the baseline has no finished run.
    """
    order = list(dict.fromkeys(run.name for run in runs))
    if baseline is None:
        baseline = default_baseline(order)
    if baseline not in order:
        raise UserError(f"--baseline={baseline}: no finished run of it; there are: {', '.join(order)}")
    settings = [summarise_setting(name, [run for run in runs if run.name == name], metric) for name in order]
    settings.sort(key=lambda setting: -setting.mean.value)
    base = next(setting for setting in settings if setting.name == baseline)
    pairs = [(setting, base) for setting in settings if setting is not base]
    # The best two are a pair of their own only if the baseline is neither: listed twice, the test would be corrected for twice,
    # and every p of the report would be larger than it need be. It comes last, so that the pairs with the baseline are a slice.
    if len(settings) > 1 and base not in settings[:2]:
        pairs.append((settings[0], settings[1]))
    compared = compare(pairs)
    against_base = compared[: len(settings) - 1]
    top_two = next((each for each in compared if {each.ours.name, each.theirs.name} == {s.name for s in settings[:2]}), None)
    num_tests = sum(is_tested(each.result) for each in compared)
    return Study(metric, base, settings, against_base, top_two, num_tests, list(left_out), order)


def default_baseline(order: Sequence[str]) -> str:
    """Return grpo if it was run, else the first setting."""
    if DEFAULT_BASELINE in order:
        return DEFAULT_BASELINE
    return order[0]


def summarise_setting(name: str, runs: Sequence[Run], metric: str) -> Setting:
    """Summarise the seeds of one setting.

    Args:
      name: of the setting.
      runs: its seeds, in any order; each has the metric at its last step (`runs.load` sees to that).
      metric: name in metrics.jsonl.
    Returns: the estimates over seeds, with intervals that keep to the metric's limits.
    """
    # A sweep lists runs as they were planned, plain folders come as they were typed: sorted, the tables do not depend on it,
    # nor does the bootstrap, whose resamples are drawn by position.
    runs = sorted(runs, key=lambda run: run.seed)
    curves = [run.curve(metric) for run in runs]
    final_N = np.array([curve[max(curve)] for curve in curves])
    area_N = np.array([statistics.area_under_curve(list(curve), list(curve.values())) for curve in curves])
    tokens_N, secs_N = zip(*(run.cost[max(run.cost)] for run in runs), strict=True)
    return Setting(
        name=name,
        runs=tuple(runs),
        final_N=final_N,
        area_N=area_N,
        mean=bound_estimate(metric, *statistics.mean_interval(final_N)),
        iqm=bound_estimate(metric, *statistics.iqm_interval(final_N)),
        area=bound_estimate(metric, *statistics.mean_interval(area_N)),
        tokens=float(np.mean(tokens_N)),
        secs=float(np.mean(secs_N)),
    )


def bound_estimate(metric: str, value: np.ndarray, low: np.ndarray, high: np.ndarray) -> Estimate:
    """Keep an interval within what the metric can be.

    Args:
      metric: name, which decides the limits.
      value, low, high: float64 [], the estimate and the ends of its interval; the ends are NaN for one seed.
    Returns: the estimate with its ends moved to the limits where they were beyond them.
    """
    # Student's t knows no limits: near a success of 1 its interval would promise more than 1. np.maximum, unlike max, hands on
    # the NaN of a single seed whichever argument it is.
    lowest, highest = limits(metric)
    return Estimate(float(value), float(np.maximum(low, lowest)), float(np.minimum(high, highest)))


def limits(metric: str) -> tuple[float, float]:
    """Return the least and the greatest value that the metric can have."""
    if metric.startswith(SHARES):
        return 0.0, 1.0
    return -np.inf, np.inf


def compare(pairs: Sequence[tuple[Setting, Setting]]) -> list[Comparison]:
    """Compare settings pair by pair on equal seeds, corrected for one another (Holm).

    The best is compared with the second without more ado: choosing that pair after seeing the results does not make a false
    difference likelier, for the first two lie closer together than two that were chosen before (Gutmann and Maymin, 1987).
    """
    results = [pair_by_seed(*pair) for pair in pairs]
    tested = [result for result in results if is_tested(result)]
    corrected = iter(statistics.holm([result.p for result in tested]))
    # The smallest p is corrected like the others: with several comparisons even unanimous seeds can stay above 0.05, and the
    # verdict then has to say that there were too few seeds, not that no difference was found.
    smallest = iter(statistics.holm([statistics.smallest_p(result.num) for result in tested]))
    # The level that Holm asks of the first difference. Later ones have it easier, but which come first is only known once all
    # p are, so the numbers of seeds are for the strictest level: rather too many than too few.
    alpha = statistics.ALPHA / max(len(tested), 1)
    comparisons = []
    for (ours, theirs), result in zip(pairs, results, strict=True):
        if is_tested(result):
            needed = statistics.seeds_needed(observed_effect(result), alpha)
            detectable = statistics.detectable_effect(result.num, alpha) * result.std
            comparisons.append(Comparison(ours, theirs, result, next(corrected), next(smallest), needed, detectable))
        else:
            comparisons.append(Comparison(ours, theirs, result, 1.0, 1.0, None, math.nan))
    return comparisons


def is_tested(result: statistics.Paired | None) -> TypeGuard[statistics.Paired]:
    """Return True for two seeds or more: one seed is no test, so the others need no correction for it."""
    return result is not None and result.num > 1


def observed_effect(result: statistics.Paired) -> float:
    """Return the mean difference in standard deviations of differences; infinite if all seeds differ by the same."""
    if result.std > 0:
        return result.difference.value / result.std
    if result.difference.value:
        return math.inf
    return 0.0


def pair_by_seed(ours: Setting, theirs: Setting) -> statistics.Paired | None:
    """Compare two settings on the seeds that both have; None if there is no such seed.

    Equal seeds see the same prompts and begin with the same weights, which takes that part of the noise out of the difference.
    """
    # By the seed's number, not by its place: where a seed of one setting failed, places would pair different seeds.
    their_final = {run.seed: value for run, value in zip(theirs.runs, theirs.final_N, strict=True)}
    pairs = [
        (value, their_final[run.seed]) for run, value in zip(ours.runs, ours.final_N, strict=True) if run.seed in their_final
    ]
    if not pairs:
        return None
    return statistics.paired(*zip(*pairs, strict=True))
