"""Sentences on the comparisons, in plain words that claim no more than was shown.

"better" or "worse" is said only if the corrected p is at most 0.05 and the interval leaves out 0. Everything else is open,
and the sentence says why: no spread, one seed, too few seeds for the test to show anything, or a difference too small.
"""

from __future__ import annotations

import math

from grpo_jax.analysis import statistics
from grpo_jax.analysis.estimates import Estimate
from grpo_jax.analysis.statistics import Paired
from grpo_jax.tools.report.analysis import Comparison, Setting, Study
from grpo_jax.tools.report.runs import differing_fields

EVALUATED = ("eval.num_prompts", "reward.task", "objective.success_threshold")  # beside those of task
UNBEGUN = ("waiting", "running")  # reasons for leaving out a run that say nothing bad of its setting


def verdict(study: Study) -> list[str]:
    """Write the sentences at the top of the report: the best first, then each setting against the baseline."""
    sentences = [describe_best(study), *(describe_comparison(each, study.num_tests) for each in study.comparisons)]
    others = differing_questions(study)
    if others:
        differ = f"Careful: the settings differ in what is evaluated ({', '.join(others)})"
        sentences.insert(0, f"{differ}, so their numbers are of different questions.")
    broken = [each.name for each in study.left_out if each.reason not in UNBEGUN]
    if broken:
        listed = ", ".join(f"{broken.count(name)} of {name}" for name in dict.fromkeys(broken))
        sentences.append(
            f"Runs that did not come to their end are left out ({listed}): "
            "if it was training itself that broke them, the numbers flatter those settings."
        )
    return sentences


def differing_questions(study: Study) -> list[str]:
    """List the fields that decide what is evaluated, and are not the same in all settings."""
    fields = differing_fields([run for setting in study.settings for run in setting.runs])
    return [field for field in fields if field.startswith("task.") or field in EVALUATED]


def describe_best(study: Study) -> str:
    """Name the setting with the highest mean, and say if it is told apart from the second."""
    if study.top_two is None:
        return f"There is one setting only, {study.baseline.name}: nothing to compare it with."
    (first, second), comparison = study.settings[:2], study.top_two
    tied = [each.name for each in study.settings if each.mean.value == first.mean.value]
    if len(tied) > 1:
        names = f"{', '.join(tied[:-1])} and {tied[-1]}"
        return f"No setting is shown to be the best: {names} share the highest mean, {format_number(first.mean.value)}."
    result = comparison.result
    # The first is ahead by its mean over all of its seeds, the test is on common seeds. Where a setting has more seeds than the
    # other these can point different ways, and a small p then speaks against the first.
    if result is not None and is_shown(comparison, result) and is_ahead(first, comparison):
        return (
            f"Best: {first.name}, with a mean of {format_number(first.mean.value)}. The evidence separates it from the second, "
            f"{second.name}: {format_size(result.difference)}, {p_text(comparison.p)}."
        )
    return (
        f"No setting is shown to be the best: {first.name} has the highest mean, {format_number(first.mean.value)}, then "
        f"{second.name}, {format_number(second.mean.value)}, and the evidence does not separate the two "
        f"({explain_no_best(first, comparison)})."
    )


def explain_no_best(first: Setting, comparison: Comparison) -> str:
    """Say why the evidence does not separate the setting of the highest mean from the second."""
    if comparison.result is None:
        return "they have no seed in common"
    why = p_text(comparison.p)
    if comparison.smallest_p > statistics.ALPHA:
        why = f"{format_seeds(comparison.result)} cannot separate any two"
    elif comparison.p <= statistics.ALPHA and not leaves_out_zero(comparison.result.difference):
        why += f", but the interval of their difference, {format_span(comparison.result.difference)}, holds 0"
    if not is_ahead(first, comparison):
        why += f", and {first.name} is not ahead on the seeds they share"
    return why


def describe_comparison(comparison: Comparison, num_tests: int) -> str:
    """Say what is known of one setting against another. num_tests: differences of the report, which p is corrected for."""
    ours, theirs, result = comparison.ours.name, comparison.theirs.name, comparison.result
    # First what no test can speak of: with one seed, or without spread, p is 1, and the last case would make of it that no
    # difference was found.
    if result is None:
        return f"{ours} cannot be compared with {theirs}: they have no seed in common."
    seen = result.difference
    if result.num == 1:
        return (
            f"{ours} against {theirs} is open: {format_signed(seen.value)} on the one seed they share, "
            "which says nothing of others."
        )
    if result.std == 0 and seen.value == 0:
        return f"{ours} and {theirs} came out the same on each of {format_seeds(result)}: nothing here tells them apart."
    if is_shown(comparison, result):
        better = "better" if seen.value > 0 else "worse"
        return f"{ours} is {better} than {theirs} by {format_size(seen)}, {p_text(comparison.p)}, {format_seeds(result)}."
    if comparison.smallest_p > statistics.ALPHA:
        return explain_too_few(comparison, result, num_tests)
    return explain_not_shown(comparison, result, num_tests)


def explain_too_few(comparison: Comparison, result: Paired, num_tests: int) -> str:
    """Say that on so few seeds no result at all could have been significant, and how many would do.

    Args:
      comparison: the two settings.
      result: its test on two or more common seeds.
      num_tests: differences of the report, which p is corrected for.
    Returns: two sentences.
    """
    least = statistics.fewest_seeds(num_tests)
    corrected = f", corrected for {num_tests} comparisons," if num_tests > 1 else ""
    return (
        f"{comparison.ours.name} against {comparison.theirs.name} is open: {format_seeds(result)} cannot show a difference of "
        f"any size, for the smallest p that the test can give{corrected} is {comparison.smallest_p:.2g}. Seen: "
        f"{format_signed(result.difference.value)} ({format_interval(result.difference)}). At least {least} seeds are needed; "
        f"it would take {format_seeds_needed(comparison, result)}."
    )


def explain_not_shown(comparison: Comparison, result: Paired, num_tests: int) -> str:
    """Say that the test could have shown a difference and did not.

    Args:
      comparison: the two settings.
      result: its test on two or more common seeds.
      num_tests: differences of the report, which p is corrected for.
    Returns: two sentences: what may still be, and how many seeds would tell.
    """
    seen = result.difference
    # The interval is of this difference alone, p is corrected for all: the interval can leave out 0 where p is too large. That
    # is said, or else a reader of the interval would take the verdict for an error.
    allowed = f"the interval still allows from {format_signed(seen.low)} to {format_signed(seen.high)}"
    if leaves_out_zero(seen):
        why = f"corrected for {num_tests} comparisons" if num_tests > 1 else "by the sign-flip test"
        allowed = f"the interval by itself, {format_span(seen)}, leaves out 0, but {why} that is not enough"
    elif comparison.p <= statistics.ALPHA:
        allowed = f"that alone would do, but the interval, {format_span(seen)}, holds 0, and both must agree"
    finds = ""
    if math.isfinite(comparison.detectable):
        detectable = format_number(comparison.detectable)
        finds = f"; {format_seeds(result)} find a true difference of {detectable} four times out of five"
    return (
        f"No difference shown between {comparison.ours.name} and {comparison.theirs.name}: {format_signed(seen.value)}, "
        f"{p_text(comparison.p)}; {allowed}. It would take {format_seeds_needed(comparison, result)}{finds}."
    )


def format_span(estimate: Estimate) -> str:
    """Write the two ends of a difference's interval."""
    return f"{format_signed(estimate.low)} to {format_signed(estimate.high)}"


def format_seeds_needed(comparison: Comparison, result: Paired) -> str:
    """Write how many seeds the difference would take, were it truly as large as it looks."""
    if comparison.seeds_needed is None:
        return f"more than {statistics.MAX_SEEDS} seeds to show a difference of the size seen"
    num = max(comparison.seeds_needed, result.num + 1)  # as many as there are have just failed to show it
    return f"about {num} seeds to show a difference of the size seen, if that is its true size"


def is_shown(comparison: Comparison, result: Paired) -> bool:
    """Return True if both the corrected test and the interval say that there is a difference."""
    return comparison.p <= statistics.ALPHA and leaves_out_zero(result.difference)


def is_ahead(setting: Setting, comparison: Comparison) -> bool:
    """Return True if the setting is the better one on common seeds; its mean, over all of its seeds, may say otherwise."""
    if comparison.result is None:
        return False
    gap = comparison.result.difference.value
    if setting is comparison.theirs:
        gap = -gap
    return gap > 0


def leaves_out_zero(seen: Estimate) -> bool:
    """Return True if 0 is outside the interval."""
    return seen.low > 0 or seen.high < 0


def format_size(seen: Estimate) -> str:
    """Write a difference whose interval leaves out 0, without its sign: 0.032 (95 % interval 0.010 to 0.054)."""
    low, high = sorted((abs(seen.low), abs(seen.high)))
    return f"{format_number(abs(seen.value))} (95 % interval {format_number(low)} to {format_number(high)})"


def format_interval(seen: Estimate) -> str:
    """Write the ends with their signs: 95 % interval +0.010 to +0.054."""
    return f"95 % interval {format_signed(seen.low)} to {format_signed(seen.high)}"


def format_seeds(result: Paired) -> str:
    """Write the number of common seeds: 8 seeds, or 1 seed."""
    return f"{result.num} seed{'s' * (result.num > 1)}"


def format_number(x: float) -> str:
    """Write three decimals."""
    return f"{x:.3f}"


def format_signed(x: float) -> str:
    """Write the sign and three decimals."""
    return f"{x:+.3f}"


def p_text(p: float) -> str:
    """Write p with two digits that matter; never rounded across 0.05."""
    if p < 0.001:
        return "p < 0.001"
    # 0.0504 would become 0.05, which the reader takes for significant and the verdict does not: then a third digit.
    text = f"{p:.2g}"
    if (float(text) <= statistics.ALPHA) != (p <= statistics.ALPHA):
        text = f"{p:.3g}"
    return f"p = {text}"
