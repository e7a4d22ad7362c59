"""Comparisons -> plain sentences that claim no more than was shown.

"better" or "worse" is said only if the corrected p is at most 0.05 and the interval leaves out 0. Everything else is open,
and the sentence says why: no spread, one seed, too few seeds for the test to show anything, or a difference too small.
"""

from __future__ import annotations

import math

from grpo_jax.analysis import statistics
from grpo_jax.analysis.estimates import Estimate
from grpo_jax.analysis.statistics import Paired
from grpo_jax.tools.report.analysis import Comparison, Setting, Study

UNBEGUN = ("waiting", "running")  # reasons for leaving out a run that say nothing bad of its setting


def verdict(study: Study) -> list[str]:
    """The sentences at the top of the report: the best first, then each setting against the baseline."""
    sentences = [best(study), *(against(each, study.num_tests) for each in study.comparisons)]
    broken = [each.name for each in study.left_out if each.reason not in UNBEGUN]
    if broken:
        listed = ", ".join(f"{broken.count(name)} of {name}" for name in dict.fromkeys(broken))
        sentences.append(
            f"Runs that did not come to their end are left out ({listed}): "
            "if it was training itself that broke them, the numbers flatter those settings."
        )
    return sentences


def best(study: Study) -> str:
    """Which setting has the highest mean, and whether it is told apart from the second."""
    if study.top_two is None:
        return f"There is one setting only, {study.baseline.name}: nothing to compare it with."
    (first, second), comparison = study.settings[:2], study.top_two
    if first.mean.value == second.mean.value:
        shared = f"{first.name} and {second.name} share the highest mean, {number(first.mean.value)}"
        return f"No setting is shown to be the best: {shared}."
    if comparison.result is not None and is_shown(comparison, comparison.result) and is_ahead(first, comparison):
        return (
            f"Best: {first.name}, with a mean of {number(first.mean.value)}. The evidence separates it from the second, "
            f"{second.name}: {size(comparison.result.difference)}, {p_text(comparison.p)}."
        )
    why = "they have no seed in common"
    if comparison.result is not None:
        is_hopeless = comparison.smallest_p > statistics.ALPHA
        why = f"{seeds(comparison.result)} cannot separate any two" if is_hopeless else p_text(comparison.p)
        why += "" if is_ahead(first, comparison) else f", and {first.name} is not ahead on the seeds they share"
    return (
        f"No setting is shown to be the best: {first.name} has the highest mean, {number(first.mean.value)}, then "
        f"{second.name}, {number(second.mean.value)}, and the evidence does not separate the two ({why})."
    )


def against(comparison: Comparison, num_tests: int) -> str:
    """One setting against another. num_tests: differences tested in the report, which p is corrected for."""
    ours, theirs, result = comparison.ours.name, comparison.theirs.name, comparison.result
    if result is None:
        return f"{ours} cannot be compared with {theirs}: they have no seed in common."
    seen = result.difference
    if result.num == 1:
        return (
            f"{ours} against {theirs} is open: {signed(seen.value)} on the one seed they share, which says nothing of others."
        )
    if result.std == 0 and seen.value == 0:
        return f"{ours} and {theirs} came out the same on each of {seeds(result)}: nothing here tells them apart."
    if is_shown(comparison, result):
        better = "better" if seen.value > 0 else "worse"
        return f"{ours} is {better} than {theirs} by {size(seen)}, {p_text(comparison.p)}, {seeds(result)}."
    if comparison.smallest_p > statistics.ALPHA:
        return too_few(comparison, result, num_tests)
    return not_shown(comparison, result, num_tests)


def too_few(comparison: Comparison, result: Paired, num_tests: int) -> str:
    """On so few seeds no result at all could have been significant."""
    least = statistics.fewest_seeds(num_tests)
    corrected = f", corrected for {num_tests} comparisons," if num_tests > 1 else ""
    return (
        f"{comparison.ours.name} against {comparison.theirs.name} is open: {seeds(result)} cannot show a difference of any "
        f"size, for the smallest p that the test can give{corrected} is {comparison.smallest_p:.2g}. Seen: "
        f"{signed(result.difference.value)} ({interval(result.difference)}). At least {least} seeds are needed; it would take "
        f"{wanted(comparison, result)}."
    )


def not_shown(comparison: Comparison, result: Paired, num_tests: int) -> str:
    """The test could have shown a difference and did not."""
    seen = result.difference
    if leaves_out_zero(seen):
        why = f"corrected for {num_tests} comparisons" if num_tests > 1 else "by the sign-flip test"
        allowed = (
            f"the interval by itself, {signed(seen.low)} to {signed(seen.high)}, leaves out 0, but {why} that is not enough"
        )
    else:
        allowed = f"the interval still allows from {signed(seen.low)} to {signed(seen.high)}"
    finds = ""
    if math.isfinite(comparison.detectable):
        finds = f"; {seeds(result)} find a true difference of {number(comparison.detectable)} four times out of five"
    return (
        f"No difference shown between {comparison.ours.name} and {comparison.theirs.name}: {signed(seen.value)}, "
        f"{p_text(comparison.p)}; {allowed}. It would take {wanted(comparison, result)}{finds}."
    )


def wanted(comparison: Comparison, result: Paired) -> str:
    """How many seeds the difference would take, were it truly as large as it looks."""
    if comparison.seeds_needed is None:
        return f"more than {statistics.MAX_SEEDS} seeds to show a difference of the size seen"
    num = max(comparison.seeds_needed, result.num + 1)  # as many as there are have just failed to show it
    return f"about {num} seeds to show a difference of the size seen, if that is its true size"


def is_shown(comparison: Comparison, result: Paired) -> bool:
    """Both the corrected test and the interval say that there is a difference."""
    return comparison.p <= statistics.ALPHA and leaves_out_zero(result.difference)


def is_ahead(setting: Setting, comparison: Comparison) -> bool:
    """Whether the setting is the better one on common seeds; its mean, over all of its seeds, may say otherwise."""
    gap = comparison.result.difference.value if comparison.result else 0.0
    return gap > 0 if setting is comparison.ours else gap < 0


def leaves_out_zero(seen: Estimate) -> bool:
    return seen.low > 0 or seen.high < 0


def size(seen: Estimate) -> str:
    """0.032 (95 % interval 0.010 to 0.054): a difference whose interval leaves out 0, without its sign."""
    low, high = sorted((abs(seen.low), abs(seen.high)))
    return f"{number(abs(seen.value))} (95 % interval {number(low)} to {number(high)})"


def interval(seen: Estimate) -> str:
    return f"95 % interval {signed(seen.low)} to {signed(seen.high)}"


def seeds(result: Paired) -> str:
    return f"{result.num} seed{'s' * (result.num > 1)}"


def number(x: float) -> str:
    return f"{x:.3f}"


def signed(x: float) -> str:
    return f"{x:+.3f}"


def p_text(p: float) -> str:
    """Two digits that matter; never rounded across 0.05."""
    if p < 0.001:
        return "p < 0.001"
    text = f"{p:.2g}"
    return f"p = {p:.3g}" if (float(text) <= statistics.ALPHA) != (p <= statistics.ALPHA) else f"p = {text}"
