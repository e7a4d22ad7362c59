"""One HTML file of some runs that needs nothing else: the template, its style and script, and the runs as JSON inside it."""

from __future__ import annotations

import dataclasses
import importlib.resources
import itertools
import json
import math
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from grpo_jax import objectives
from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.objectives.functions import name_of
from grpo_jax.tools.show.health import Record, health
from grpo_jax.training.runlog import points, read_completions, read_metrics
from grpo_jax.training.settings import read_config

Item = TypeVar("Item")
Row = Mapping[str, Any]  # of completions.jsonl

MAX_POINTS = 800  # of a curve; more cannot be told apart
MAX_TOKENS = 250_000  # of sampled text in a run, about 4 MB; beyond it some of the recorded steps are left out
PER_UNIT = 1000  # entropies and advantages are written as whole thousandths
SCALE_SHARE = 0.98  # the colour scale ends where this share of the values is below

# title, unit, (metric, name in the legend)
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Success",
        "share",
        (("reward/success", "training"), ("eval/success", "held-out, greedy"), ("eval/mean@", "held-out, sampled")),
    ),
    ("Reward", "with shaping", (("reward/mean", "reward"),)),
    ("Entropy", "nats", (("policy/entropy", "sampling policy"),)),
    ("Length", "tokens", (("completion/length_mean", "mean"), ("completion/length_max", "longest"))),
    ("Clipped tokens", "share", (("policy/clip_fraction_low", "below"), ("policy/clip_fraction_high", "above"))),
    ("Groups", "share", (("groups/uninformative", "say nothing"), ("groups/missing", "missing"))),
    ("Sampler against learner", "nats", (("policy/sampler_logp_gap", "largest gap"),)),
    (
        "Credit",
        "share, correlation",
        (("advantage/differs_from_grpo", "unlike GRPO's"), ("advantage/success_correlation", "with success")),
    ),
    ("KL to the reference", "nats", (("policy/kl_ref", "k3"),)),
    ("Gradient norm", "before clipping", (("grad/norm", "norm"),)),
)  # fmt: skip


def page(workdirs: Sequence[pathlib.Path]) -> str:
    """Write the whole file. Raises UserError for a folder that is not a run's, or has no record yet."""
    files = importlib.resources.files("grpo_jax.tools.show")
    template = string.Template(files.joinpath("page.html").read_text(encoding="utf-8"))
    style, script = (files.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return template.substitute(style=style, script=script, data=embed_json([run_data(workdir) for workdir in workdirs]))


def embed_json(data: Any) -> str:
    """Write JSON for the inside of <script>: no character of it can end the element, and any of them survives UTF-8."""
    # Sampled text is data from outside: </script> or <!-- in it would end the element or change how the browser reads the rest.
    # Half of a surrogate pair cannot be written as UTF-8, and JavaScript before 2019 took U+2028 for the end of a line. As \u
    # escapes, which JSON.parse undoes, all of them are harmless. allow_nan: NaN is no JSON, a browser would refuse the page.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text)


def run_data(workdir: pathlib.Path) -> dict[str, Any]:
    """Collect all that the page shows of one run. Raises UserError."""
    config, records = read_config(workdir), read_metrics(workdir)
    if not records:
        raise UserError(f"{workdir}/metrics.jsonl: no records yet; they come after the first evaluation")
    rows = read_completions(workdir)
    if any("token_text" not in row for row in rows):
        raise UserError(f"{workdir}/completions.jsonl: it has no token_text, an older version wrote it; train again")
    recorded = group_by_step(rows)
    shown = thin_steps(recorded)
    return {
        "name": workdir.name,
        "title": objectives.describe(config.objective),
        "facts": list_facts(config, records),
        "checks": [dataclasses.asdict(check) for check in health(config, records)],
        "panels": panels(records),
        "perUnit": PER_UNIT,
        # Of all rows, also those that are left out: colours mean the same on every step.
        "scales": {name: colour_scale([x for row in rows for x in row[f"token_{name}"]]) for name in ("entropy", "advantage")},
        "numRecorded": len(recorded),
        "steps": [step_data(step, rows, config.objective.success_threshold) for step, rows in shown],
    }


def list_facts(config: Config, records: Sequence[Record]) -> list[tuple[str, str]]:
    """List what was run and how it came out: label, value."""
    obj, rollout, model = config.objective, config.rollout, config.model
    task = config.task.name
    if config.shuffle_rewards:
        task += ", rewards shuffled (control)"
    size = f"{model.num_layers} layers of width {model.dim}"
    seconds = sum(record["time/step_secs"] for record in records if "time/step_secs" in record)
    return [
        ("Steps", f"{records[-1]['step']} of {config.num_steps}"),
        ("Held-out success", describe_success(records)),
        ("Time in steps", f"{seconds:.0f} s"),
        ("Model", f"{pathlib.PurePath(model.path).name or size}, {model.dtype}"),
        ("Task", task),
        ("Batch", f"{rollout.num_prompts} prompts x {rollout.group_size} completions"),
        ("Budget", f"{rollout.max_completion_tokens} tokens a completion"),
        ("Learning rate", f"{config.optimizer.learning_rate:g}, {config.optimizer.schedule}"),
        ("Seed", str(config.seed)),
        ("Advantage", f"{name_of(obj.advantage)}, ratio by {name_of(obj.ratio)}"),
        ("Clip", f"{obj.clip_low:g} below, {obj.clip_high:g} above"),
        ("Averaged by", name_of(obj.aggregation)),
        ("KL", f"{obj.kl_coef:g}"),
    ]


def describe_success(records: Sequence[Record]) -> str:
    """Write the first and the last held-out success."""
    evaluated = [record["eval/success"] for record in records if "eval/success" in record]
    if not evaluated:
        return "not evaluated yet"
    return f"{evaluated[0]:.3f} → {evaluated[-1]:.3f}"


def panels(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Collect the curves of the recorded metrics; a panel without any is left out."""
    drawn = []
    for title, unit, curves in PANELS:
        series = []
        for metric, name in curves:
            finite = [(step, value) for step, value in points(records, metric) if math.isfinite(value)]
            # Thinned after NaN is gone, or the points that are kept could be the broken ones. Four digits are finer than a
            # pixel of the curve and less than half of what a float needs in JSON.
            if finite:
                steps, values = zip(*spread_evenly(finite, MAX_POINTS), strict=True)
                series.append({"name": name, "steps": steps, "values": [float(f"{value:.4g}") for value in values]})
        if series:
            drawn.append({"title": title, "unit": unit, "series": series})
    return drawn


def spread_evenly(items: Sequence[Item], limit: int) -> list[Item]:
    """Return at most `limit` of the items, evenly spread, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(limit - 1, 1))] for i in range(limit)]


def group_by_step(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """Return (step, its records), in order."""
    return [(step, list(group)) for step, group in itertools.groupby(rows, lambda row: row["step"])]


def thin_steps(steps: list[tuple[int, list[Row]]]) -> list[tuple[int, list[Row]]]:
    """Return as many of the steps, evenly spread, as MAX_TOKENS allows; at least one."""
    # Steps go, not groups or rows: a group is only understood as a whole, and how it differs from early to late is the point.
    num_tokens = sum(len(row["token_text"]) for _, rows in steps for row in rows)
    return spread_evenly(steps, max(1, len(steps) * MAX_TOKENS // max(num_tokens, 1)))


def step_data(step: int, rows: Sequence[Row], success_threshold: float) -> dict[str, Any]:
    """Collect one step's groups, each with its prompt once.

    Args:
      step: its number.
      rows: its records, those of a group one after the other.
      success_threshold: task reward from which on a completion counts as right.
    Returns: JSON object.
    """
    groups = []
    for number, group in itertools.groupby(rows, lambda row: row["group"]):
        members = list(group)
        completions = [completion_data(row, success_threshold) for row in members]
        groups.append({"number": number, "prompt": members[0]["prompt"], "completions": completions})
    return {"step": step, "groups": groups}


def completion_data(row: Row, success_threshold: float) -> dict[str, Any]:
    """Collect one completion; an advantage that is the same on all tokens is written once."""
    # Most variants give all tokens of a row one advantage: written once, it spares the page one of three lists of tokens.
    advantage: Any = quantise(row["token_advantage"])
    if len(set(advantage)) == 1:
        advantage = advantage[0]
    # Records of older versions have no such field: there, every row had a score.
    is_scored = row.get("is_scored", True)
    return {
        "isScored": is_scored,
        "reward": finite_or_none(row["reward"]) if is_scored else None,
        "taskReward": finite_or_none(row["task_reward"]) if is_scored else None,
        "isSuccess": is_scored and row["task_reward"] >= success_threshold,
        "isTruncated": row["is_truncated"],
        "meanEntropy": finite_or_none(row["entropy"]),
        "grpo": finite_or_none(row["grpo_advantage"]),
        "text": row["token_text"],
        "entropy": quantise(row["token_entropy"]),
        "advantage": advantage,
    }


def quantise(values: Sequence[float]) -> list[int | None]:
    """Return whole thousandths, which are shorter in JSON than floats; None for what is not finite."""
    return [round(x * PER_UNIT) if math.isfinite(x) else None for x in values]


def finite_or_none(x: float) -> float | None:
    """Return a finite number as it is, None for NaN and infinity, which JSON does not have."""
    return x if math.isfinite(x) else None


def colour_scale(values: Sequence[float]) -> float:
    """Return where the colours end: most of the values are between minus this and this."""
    # Not at the largest value: entropies have a long tail, and one token of it would leave all others pale.
    ordered = sorted(abs(x) for x in values if math.isfinite(x))
    if not ordered:
        return 1.0
    return max(ordered[int(SCALE_SHARE * (len(ordered) - 1))], 1 / PER_UNIT)
