"""The text of report.md: verdict, table, pictures, how to read them, what was run."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from grpo_jax.analysis import statistics
from grpo_jax.errors import UserError
from grpo_jax.tools.report import tables
from grpo_jax.tools.report.analysis import Study
from grpo_jax.tools.report.runs import Run, differing_fields
from grpo_jax.tools.report.verdict import verdict

BEGIN, END = "<!-- report:begin -->", "<!-- report:end -->"
UNKNOWN = "not recorded"
CAPTIONS = {
    "final.png": "Every seed is a dot; above them the mean and its 95 % interval. Right: differences of equal seeds.",
    "learning_curves.png": "Mean over seeds; of up to seven settings with 95 % intervals, at each step by itself.",
    "cost.png": "The same curves over what they cost.",
    "training.png": "What training did: means over seeds, smoothed.",
}


def document(study: Study, pictures: Collection[str], command: str) -> str:
    """Write the whole report as Markdown.

    Args:
      study: the results.
      pictures: file names beside the report; a caption without its picture is left out.
      command: the command line that made the report.
    Returns: the text of report.md.
    """
    shown = [f"![{name}]({name})\n\n{CAPTIONS[name]}" for name in CAPTIONS if name in pictures]
    parts = [
        f"# Which setting is better? {tables.escape_markdown(study.metric)}",
        "\n".join(f"- {tables.escape_markdown(sentence)}" for sentence in verdict(study)),
        "## Results",
        main_table(study),
        *shown,
        "## How to read this",
        explain_columns(study),
        "## What was run",
        list_facts(study, command),
        *settings_part(study),
        "### Every run",
        tables.markdown(tables.run_rows(study)),
        *left_out_part(study),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main_table(study: Study) -> str:
    """Return the table of the settings in Markdown; a README can hold it too."""
    return tables.markdown(tables.main_rows(study))


def explain_columns(study: Study) -> str:
    """Say in short what the columns mean and how they were computed."""
    few = statistics.MIN_BOOTSTRAP
    lines = [
        f"`{study.metric}` at the last step, over seeds; brackets are 95 % intervals. IQM: mean of the middle half of them. "
        "Area under curve: mean over all steps, so high values mean learning early.",
        f"Means: the further of Student's t and the studentised bootstrap on each side (below {few} seeds Student's t alone, "
        "which covers less than 95 % where seeds are skewed). IQM: t of the trimmed mean. Neither can know of failures that "
        "no seed has shown.",
        "Differences are paired: equal seeds see the same prompts and begin with the same weights. p is that of the sign-flip "
        f"permutation test, corrected for {study.num_tests} comparison{'s' * (study.num_tests != 1)} by Holm's method; its "
        "smallest value for N seeds is 2 / 2^N before correction. A setting is called better or worse only if p is at most "
        "0.05 and the interval of the difference leaves out 0.",
        "Effect: mean difference in standard deviations of the differences (Cohen's d_z, Hedges' correction). P(better): "
        "chance that a seed of the setting beats one of the baseline. Numbers of seeds are for a chance of 80 %, by the paired "
        "t test.",
        "Tokens: completion tokens sampled. Seconds: in steps, compiling in the first of them included, warm start and "
        "evaluation not; they compare only if the runs had the machine alike.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def list_facts(study: Study, command: str) -> str:
    """List command, commit, machine, dates, seeds."""
    runs = [run for setting in study.settings for run in setting.runs]
    dates = sorted({str(run.summary.get("date", UNKNOWN)) for run in runs})
    finished = dates[0]
    if len(dates) > 1:
        finished += f" to {dates[-1]}"
    lines = [
        f"Commit of the runs: {list_values(runs, 'commit')}",
        f"Machine: {list_values(runs, 'devices')}; jax {list_values(runs, 'jax')}",
        f"Finished: {finished}",
        f"Seeds: {list_seeds(study)}",
    ]
    # The command stays as it is: between backticks Markdown would show the signs that escape it.
    return "\n".join([f"- Report: `{command}`", *(f"- {tables.escape_markdown(line)}" for line in lines)])


def list_seeds(study: Study) -> str:
    """List the seeds of each setting; once if they are the same for all."""
    listed = {s.name: f"{len(s.runs)} ({', '.join(str(run.seed) for run in s.runs)})" for s in study.settings}
    if len(set(listed.values())) == 1:
        return f"{next(iter(listed.values()))} of every setting"
    return "; ".join(f"{name}: {seeds}" for name, seeds in listed.items())


def list_values(runs: Sequence[Run], field: str) -> str:
    """List the values of a field in the runs' summaries; older runs have none."""
    return ", ".join(sorted({str(run.summary.get(field) or UNKNOWN) for run in runs}))


def settings_part(study: Study) -> list[str]:
    """Tabulate the config fields that differ between settings, a column for each setting."""
    # The first run can speak for all: `runs.load` has made sure that the seeds of a setting share their config.
    firsts = [setting.runs[0] for setting in study.settings]
    fields = differing_fields(firsts)
    if not fields:
        return []
    rows = [["field", *(run.name for run in firsts)]]
    rows += [[field, *(str(run.config.get(field, tables.NOTHING)) for run in firsts)] for field in fields]
    return ["### Settings that differ", tables.markdown(rows)]


def left_out_part(study: Study) -> list[str]:
    """Tabulate the runs that do not count, each with its reason."""
    if not study.left_out:
        return []
    rows = [["setting", "seed", "why"], *([each.name, str(each.seed), each.reason] for each in study.left_out)]
    return ["### Left out", tables.markdown(rows, num_left=3)]


def insert_table(text: str, table: str, name: str) -> str:
    """Put a table between the two markers of a text, in place of what was there.

    Args:
      text: of the file.
      table: Markdown, with a line break at its end.
      name: of the file, for the message.
    Returns: the new text.
    Raises: UserError without the markers.
    """
    # Markers count on lines of their own only, so that a text may name them. The line break put in front lets one on the first
    # line be found like any other; it goes again at the end.
    before, begin, rest = f"\n{text}".partition(f"\n{BEGIN}\n")
    # `rest` gets one as well: between two markers without a table there is nothing, and END would have no break before it.
    _, end, after = f"\n{rest}".partition(f"\n{END}\n")
    if not (begin and end):
        raise UserError(f"--readme={name}: no place for the table; write {BEGIN} and {END} on lines of their own")
    return f"{before}{begin}{table}{END}\n{after}".removeprefix("\n")
