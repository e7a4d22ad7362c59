"""Runs -> what is known of each setting, and of each pair that the report compares."""

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
SHARES = ("eval/success", "eval/mean@", "eval/pass@", "eval/maj@", "reward/success")  # metrics that lie in [0, 1]


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ in the seed only, in its order.

    final_N, area_N: the metric at the last step, and its mean over the learning curve, of each seed. mean, iqm, area: over
    seeds. tokens, secs: completion tokens sampled and seconds spent in steps, mean over seeds.
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

    result: None without a common seed. p: corrected for all comparisons of the report, and smallest_p: what p would be if
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
    """Raises UserError if the baseline has no finished run. baseline None: grpo if there, else the first."""
    order = list(dict.fromkeys(run.name for run in runs))
    if baseline is None:
        baseline = DEFAULT_BASELINE if DEFAULT_BASELINE in order else order[0]
    if baseline not in order:
        raise UserError(f"--baseline={baseline}: no finished run of it; there are: {', '.join(order)}")
    settings = [setting_of(name, [run for run in runs if run.name == name], metric) for name in order]
    settings.sort(key=lambda setting: -setting.mean.value)
    base = next(setting for setting in settings if setting.name == baseline)
    pairs = [(setting, base) for setting in settings if setting is not base]
    if len(settings) > 1 and base not in settings[:2]:
        pairs.append((settings[0], settings[1]))
    compared = compare(pairs)
    against_base = compared[: len(settings) - 1]
    top_two = next((each for each in compared if {each.ours.name, each.theirs.name} == {s.name for s in settings[:2]}), None)
    num_tests = sum(is_tested(each.result) for each in compared)
    return Study(metric, base, settings, against_base, top_two, num_tests, list(left_out), order)


def setting_of(name: str, runs: Sequence[Run], metric: str) -> Setting:
    """Summarise the seeds of one setting."""
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
        mean=within(metric, *statistics.mean_interval(final_N)),
        iqm=within(metric, *statistics.iqm_interval(final_N)),
        area=within(metric, *statistics.mean_interval(area_N)),
        tokens=float(np.mean(tokens_N)),
        secs=float(np.mean(secs_N)),
    )


def within(metric: str, value: np.ndarray, low: np.ndarray, high: np.ndarray) -> Estimate:
    """An interval does not reach beyond what the metric can be."""
    lowest, highest = limits(metric)
    return Estimate(float(value), float(np.maximum(low, lowest)), float(np.minimum(high, highest)))


def limits(metric: str) -> tuple[float, float]:
    return (0.0, 1.0) if metric.startswith(SHARES) else (-np.inf, np.inf)


def compare(pairs: Sequence[tuple[Setting, Setting]]) -> list[Comparison]:
    """Paired comparisons, corrected for one another (Holm).

    The best is compared with the second without more ado: choosing that pair after seeing the results does not make a false
    difference likelier, for the first two lie closer together than two that were chosen before (Gutmann and Maymin, 1987).
    """
    results = [paired_by_seed(*pair) for pair in pairs]
    tested = [result for result in results if is_tested(result)]
    corrected = iter(statistics.holm([result.p for result in tested]))
    smallest = iter(statistics.holm([statistics.smallest_p(result.num) for result in tested]))
    alpha = statistics.ALPHA / max(len(tested), 1)  # what Holm asks of the first difference
    comparisons = []
    for (ours, theirs), result in zip(pairs, results, strict=True):
        if is_tested(result):
            needed = statistics.seeds_needed(effect_seen(result), alpha)
            detectable = statistics.detectable_effect(result.num, alpha) * result.std
            comparisons.append(Comparison(ours, theirs, result, next(corrected), next(smallest), needed, detectable))
        else:
            comparisons.append(Comparison(ours, theirs, result, 1.0, 1.0, None, math.nan))
    return comparisons


def is_tested(result: statistics.Paired | None) -> TypeGuard[statistics.Paired]:
    """One seed is no test, so the others need no correction for it."""
    return result is not None and result.num > 1


def effect_seen(result: statistics.Paired) -> float:
    """Mean difference in standard deviations of differences; infinite if all seeds differ by the same."""
    if result.std > 0:
        return result.difference.value / result.std
    return math.inf if result.difference.value else 0.0


def paired_by_seed(ours: Setting, theirs: Setting) -> statistics.Paired | None:
    """On the seeds that both have: equal seeds see the same prompts and begin with the same weights."""
    their_final = {run.seed: value for run, value in zip(theirs.runs, theirs.final_N, strict=True)}
    pairs = [
        (value, their_final[run.seed]) for run, value in zip(ours.runs, ours.final_N, strict=True) if run.seed in their_final
    ]
    return statistics.paired(*zip(*pairs, strict=True)) if pairs else None
