"""The results as tables: Markdown, CSV with all digits, LaTeX with booktabs."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from grpo_jax.analysis.estimates import Estimate
from grpo_jax.tools.report.analysis import Comparison, Setting, Study
from grpo_jax.tools.report.verdict import number, p_text, signed

NOTHING = "\N{EN DASH}"
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\N{EN DASH}": "--",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def main_rows(study: Study) -> list[list[str]]:
    """A head and a row for each setting, the best mean first."""
    against = {each.ours.name: each for each in study.comparisons}
    head = ["setting", "seeds", "mean", "IQM", "area under curve", f"minus {study.baseline.name}", "p (Holm)", "effect"]
    head += ["P(better)", "tokens", "seconds"]
    return [head, *([*row_of(setting, against.get(setting.name))] for setting in study.settings)]


def row_of(setting: Setting, comparison: Comparison | None) -> list[str]:
    found = comparison.result if comparison else None
    return [
        setting.name,
        str(len(setting.runs)),
        with_interval(setting.mean),
        with_interval(setting.iqm),
        with_interval(setting.area),
        with_interval(found.difference, signed) if found else NOTHING,
        p_text(comparison.p).removeprefix("p ").removeprefix("= ") if comparison and found else NOTHING,
        f"{found.effect:+.2f}" if found and math.isfinite(found.effect) else NOTHING,
        f"{found.improvement:.2f}" if found else NOTHING,
        f"{setting.tokens / 1e6:.3g}M",
        f"{setting.secs:.0f}",
    ]


def with_interval(estimate: Estimate, form: Any = number) -> str:
    if not math.isfinite(estimate.low):  # one seed
        return form(estimate.value)
    if estimate.low == estimate.high:
        return f"{form(estimate.value)} (no spread)"
    return f"{form(estimate.value)} [{form(estimate.low)}, {form(estimate.high)}]"


def run_rows(study: Study) -> list[list[str]]:
    """A head and a row for each finished run."""
    rows = [["setting", "seed", "final", "area under curve", "tokens", "seconds"]]
    for setting in study.settings:
        for run, final, area in zip(setting.runs, setting.final_N, setting.area_N, strict=True):
            tokens, secs = run.cost[max(run.cost)]
            rows.append([setting.name, str(run.seed), number(final), number(area), f"{tokens / 1e6:.3g}M", f"{secs:.0f}"])
    return rows


def markdown(rows: Sequence[Sequence[str]], num_left: int = 1) -> str:
    """A table; the first num_left columns are text, the others numbers."""
    rule = ["---"] * num_left + ["---:"] * (len(rows[0]) - num_left)
    lines = [[plain(cell) for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:])) + "\n"


def plain(text: str) -> str:
    """Text in which Markdown sees no signs of its own."""
    return re.sub(r"([\\`*<>|&]|\](?=[(\[]))", r"\\\1", " ".join(text.split()))


def latex(study: Study) -> str:
    """What a paper needs of the main table: \\usepackage{booktabs}, \\input{results}."""
    head, *rows = (row[:7] for row in main_rows(study))
    lines = [" & ".join(latex_text(cell) for cell in row) + r" \\" for row in (head, *rows)]
    body = ["\\toprule", lines[0], "\\midrule", *lines[1:], "\\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", *body, r"\end{tabular}", ""])


def latex_text(text: str) -> str:
    escaped = "".join(LATEX_ESCAPES.get(c, c) for c in text)
    return re.sub(r"(?<![\w-])-(?=\d)|<", lambda match: "$-$" if match[0] == "-" else "$<$", escaped)


def results_csv(study: Study) -> str:
    """A line for each setting; empty where there is nothing to say."""
    against = {each.ours.name: each for each in study.comparisons}
    return as_csv(csv_record(setting, against.get(setting.name)) for setting in study.settings)


def csv_record(setting: Setting, comparison: Comparison | None) -> dict[str, Any]:
    record: dict[str, Any] = {"setting": setting.name, "seeds": len(setting.runs)}
    estimates = {"mean": setting.mean, "iqm": setting.iqm, "area": setting.area}
    found = comparison.result if comparison else None
    estimates["difference"] = found.difference if found else Estimate(math.nan, math.nan, math.nan)
    for name, estimate in estimates.items():
        record.update({name if k == "value" else f"{name}_{k}": v for k, v in dataclasses.asdict(estimate).items()})
    record.update(
        common_seeds=found.num if found else "",
        p_uncorrected=found.p if found else math.nan,
        p_holm=comparison.p if comparison else math.nan,
        effect=found.effect if found else math.nan,
        improvement=found.improvement if found else math.nan,
        seeds_needed=(comparison.seeds_needed if comparison else None) or "",
        tokens=setting.tokens,
        seconds=setting.secs,
    )
    return record


def runs_csv(study: Study) -> str:
    """A line for each finished run, for other programs."""

    def records() -> Iterable[dict[str, Any]]:
        for setting in study.settings:
            for run, final, area in zip(setting.runs, setting.final_N, setting.area_N, strict=True):
                tokens, secs = run.cost[max(run.cost)]
                yield dict(setting=run.name, seed=run.seed, final=final, area=area, tokens=tokens, seconds=secs)

    return as_csv(records())


def as_csv(records: Iterable[dict[str, Any]]) -> str:
    """Ten digits of every number; NaN becomes an empty cell."""
    records = [{k: cell(v) for k, v in record.items()} for record in records]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.10g}" if math.isfinite(value) else ""
    return value
