"""Five variants x seeds on the embedded task, each once more with its rewards shuffled; then the table.

    python -m experiments.studies.tiny_variants.run --workdir=runs/tiny_variants --num_parallel=2

Finished runs are kept, so the command can be repeated. The table goes to <workdir>/table.md.
"""

from __future__ import annotations

import json
import pathlib
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from absl import app, flags

VARIANTS = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
WORKDIR = flags.DEFINE_string("workdir", "runs/tiny_variants", "folder of all runs")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of each variant")
NUM_PARALLEL = flags.DEFINE_integer("num_parallel", 1, "runs at a time")


def run_one(variant: str, seed: str, is_shuffled: bool) -> dict[str, float]:
    """Train in a process of its own (unless that was done before); -> its summary."""
    workdir = pathlib.Path(WORKDIR.value) / f"{variant}-seed{seed}{'-shuffled' * is_shuffled}"
    summary = workdir / "summary.json"
    if not summary.exists():
        command = [sys.executable, "-m", "experiments.train", f"--config=configs/{variant}.py:tiny", f"--workdir={workdir}"]
        command += [f"--config.seed={seed}", f"--config.shuffle_rewards={is_shuffled}"]
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "output.txt").open("w") as output:
            subprocess.run(command, check=True, stdout=output, stderr=subprocess.STDOUT)
    return json.loads(summary.read_text())


def table(results: dict[tuple[str, str, bool], dict[str, float]]) -> str:
    """Mean ± standard deviation over seeds of held-out greedy success."""

    def column(variant: str, field: str, is_shuffled: bool) -> list[float]:
        return [results[variant, seed, is_shuffled][field] for seed in SEEDS.value]

    def mean_std(values: list[float]) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.3f} ± {spread:.3f}"

    lines = [
        "| variant | before | after | smallest rise | after, rewards shuffled | largest rise, shuffled | training seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        before, after = column(variant, "success_before", False), column(variant, "success_after", False)
        control_before, control = column(variant, "success_before", True), column(variant, "success_after", True)
        rise = min(b - a for a, b in zip(before, after, strict=True))
        drift = max(b - a for a, b in zip(control_before, control, strict=True))
        secs = mean_std(column(variant, "training_secs", False))
        cells = (variant, mean_std(before), mean_std(after), f"{rise:+.3f}", mean_std(control), f"{drift:+.3f}", secs)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
    jobs = [(variant, seed, is_shuffled) for is_shuffled in (False, True) for seed in SEEDS.value for variant in VARIANTS]
    with ThreadPoolExecutor(NUM_PARALLEL.value) as pool:
        results = dict(zip(jobs, pool.map(lambda job: run_one(*job), jobs), strict=True))
    text = table(results)
    (pathlib.Path(WORKDIR.value) / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    app.run(main)
