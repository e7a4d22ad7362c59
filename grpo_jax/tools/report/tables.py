"""Tables of the results: Markdown, CSV with all digits, LaTeX with booktabs."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from grpo_jax.analysis.estimates import Estimate
from grpo_jax.tools.report.analysis import Comparison, Setting, Study
from grpo_jax.tools.report.verdict import format_number, format_signed, p_text

NOTHING = "\N{EN DASH}"
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{EN DASH}": "--",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}
LATEX_MATH = {"-": "$-$", "<": "$<$"}  # as text the first would be a hyphen, the second an inverted exclamation mark
NO_ESTIMATE = Estimate(math.nan, math.nan, math.nan)


def main_rows(study: Study) -> list[list[str]]:
    """Return a head and a row for each setting, the best mean first."""
    against = {each.ours.name: each for each in study.comparisons}
    head = ["setting", "seeds", "mean", "IQM", "area under curve", f"minus {study.baseline.name}", "p (Holm)", "effect"]
    head += ["P(better)", "tokens", "seconds"]
    return [head, *([*main_row(setting, against.get(setting.name))] for setting in study.settings)]


def main_row(setting: Setting, comparison: Comparison | None) -> list[str]:
    """Return the cells of one setting. comparison: with the baseline; None for the baseline itself."""
    return [
        setting.name,
        str(len(setting.runs)),
        format_estimate(setting.mean),
        format_estimate(setting.iqm),
        format_estimate(setting.area),
        *comparison_cells(comparison),
        count_text(setting.tokens),
        f"{setting.secs:.0f}",
    ]


def comparison_cells(comparison: Comparison | None) -> list[str]:
    """Return difference, p, effect and chance of being better; dashes without a common seed."""
    if comparison is None or comparison.result is None:
        return [NOTHING] * 4
    found = comparison.result
    # The effect is NaN for one seed and where the seeds' differences have no spread to measure it by.
    effect = NOTHING
    if math.isfinite(found.effect):
        effect = f"{found.effect:+.2f}"
    p = p_text(comparison.p).removeprefix("p ").removeprefix("= ")
    return [format_estimate(found.difference, format_signed), p, effect, f"{found.improvement:.2f}"]


def format_estimate(estimate: Estimate, form: Callable[[float], str] = format_number) -> str:
    """Write a value with its interval. form: how each number is written."""
    if not math.isfinite(estimate.low):  # one seed
        return form(estimate.value)
    # Seeds that tie have an interval of no width, which would look like certainty.
    if estimate.low == estimate.high:
        return f"{form(estimate.value)} (no spread)"
    return f"{form(estimate.value)} [{form(estimate.low)}, {form(estimate.high)}]"


def run_rows(study: Study) -> list[list[str]]:
    """Return a head and a row for each finished run."""
    rows = [["setting", "seed", "final", "area under curve", "tokens", "seconds"]]
    for setting in study.settings:
        for run, final, area in zip(setting.runs, setting.final_N, setting.area_N, strict=True):
            tokens, secs = run.cost[max(run.cost)]
            cells = [setting.name, str(run.seed), format_number(final), format_number(area)]
            rows.append([*cells, count_text(tokens), f"{secs:.0f}"])
    return rows


def count_text(num: float) -> str:
    """Write a number of tokens, large ones in millions."""
    if num < 1e5:
        return f"{num:.0f}"
    return f"{num / 1e6:.3g}M"


def markdown(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """Write a table; the first num_left columns are text, the others numbers."""
    rule = ["---"] * num_left + ["---:"] * (len(rows[0]) - num_left)
    lines = [[escape_markdown(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])) + "\n"


def escape_markdown(text: str) -> str:
    """Return text in which Markdown sees no signs of its own."""
    # Names of settings and folders are the user's: one with | or < would add a column or an element. A bracket is escaped only
    # where it would close a link, for intervals are in brackets and report.md is read as it is too.
    return re.sub(r"([\\`*<>|&]|\](?=[(\[]))", r"\\\1", " ".join(text.split()))


def latex(study: Study) -> str:
    """Write the columns of the main table that a paper needs: \\usepackage{booktabs}, \\input{results}."""
    head, *rows = (row[:7] for row in main_rows(study))
    lines = [" & ".join(latex_text(cell) for cell in row) + r" \\" for row in (head, *rows)]
    body = ["\\toprule", lines[0], "\\midrule", *lines[1:], "\\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", *body, r"\end{tabular}", ""])


def latex_text(text: str) -> str:
    """Escape text for LaTeX, with minus signs where a number follows."""
    # Only a dash that begins a number is a minus: the ones in names like a-b stay hyphens.
    escaped = "".join(LATEX_ESCAPES.get(c, c) for c in text)
    return re.sub(r"(?<![\w-])-(?=\d)|<", lambda match: LATEX_MATH[match[0]], escaped)


def results_csv(study: Study) -> str:
    """Write a line for each setting; cells without a value are empty."""
    against = {each.ours.name: each for each in study.comparisons}
    return write_csv(csv_record(setting, against.get(setting.name)) for setting in study.settings)


def csv_record(setting: Setting, comparison: Comparison | None) -> dict[str, Any]:
    """Return column -> value of one setting. comparison: with the baseline; None for the baseline itself."""
    difference = NO_ESTIMATE
    if comparison is not None and comparison.result is not None:
        difference = comparison.result.difference
    record: dict[str, Any] = {"setting": setting.name, "seeds": len(setting.runs)}
    record |= estimate_columns("mean", setting.mean)
    record |= estimate_columns("iqm", setting.iqm)
    record |= estimate_columns("area", setting.area)
    record |= estimate_columns("difference", difference)
    record |= comparison_columns(comparison)
    return record | {"tokens": setting.tokens, "seconds": setting.secs}


def estimate_columns(name: str, estimate: Estimate) -> dict[str, float]:
    """Return the value under the name, the ends of its interval under <name>_low and <name>_high."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def comparison_columns(comparison: Comparison | None) -> dict[str, Any]:
    """Return the columns on the comparison with the baseline, the same ones for every setting."""
    # Every column is there from the start: the head of the file is taken from its first line, which may be the baseline's.
    columns: dict[str, Any] = {"common_seeds": "", "p_uncorrected": math.nan, "p_holm": math.nan}
    columns |= {"effect": math.nan, "improvement": math.nan, "seeds_needed": ""}
    if comparison is not None:
        columns |= {"p_holm": comparison.p, "seeds_needed": comparison.seeds_needed or ""}
        found = comparison.result
        if found is not None:
            columns |= {"common_seeds": found.num, "p_uncorrected": found.p}
            columns |= {"effect": found.effect, "improvement": found.improvement}
    return columns


def runs_csv(study: Study) -> str:
    """Write a line for each finished run, for other programs."""

    def records() -> Iterable[dict[str, Any]]:
        for setting in study.settings:
            for run, final, area in zip(setting.runs, setting.final_N, setting.area_N, strict=True):
                tokens, secs = run.cost[max(run.cost)]
                yield dict(setting=run.name, seed=run.seed, final=final, area=area, tokens=tokens, seconds=secs)

    return write_csv(records())


def write_csv(records: Iterable[dict[str, Any]]) -> str:
    """Write records of the same columns, ten digits of every number; NaN becomes an empty cell."""
    records = [{k: csv_cell(v) for k, v in record.items()} for record in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def csv_cell(value: Any) -> Any:
    """Return a number with ten digits, empty if it is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    # Empty, because "nan" and "inf" make other programs read the column as text.
    if not math.isfinite(value):
        return ""
    return f"{value:.10g}"
