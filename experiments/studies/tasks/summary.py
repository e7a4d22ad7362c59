"""One line a run of a sweep, as CSV: held-out success before and after, and what its records say of credit, entropy and length.

before, after: greedy; sampled: at the training temperature, of eval.num_samples.
    python -m experiments.studies.tasks.summary runs/forks > experiments/studies/tasks/forks.csv

Metrics other than held-out success are means over the last third of the steps; those of right completions leave out steps
that had none.
"""

import argparse
import csv
import pathlib
import sys

import numpy as np

from grpo_jax.errors import UserError
from grpo_jax.tools import cli
from grpo_jax.training.runlog import read_metrics
from grpo_jax.training.settings import read_config

METRICS = (
    "policy/entropy",
    "advantage/credit_correlation",
    "advantage/success_correlation",
    "policy/entropy_right",
    "policy/entropy_wrong",
    "completion/length_right",
    "completion/length_wrong",
    "groups/uninformative",
)
EVALS = ("before", "after", "sampled_before", "sampled_after")
COLUMNS = ("run", "seed", "steps", *EVALS, "entropy_first", *METRICS)


def line_of(run):
    """Return the values of one run's line, by column."""
    config, records = read_config(run), read_metrics(run)
    late = records[-(len(records) // 3) :]
    values = {"run": run.name.rpartition("-seed")[0], "seed": config.seed, "steps": records[-1]["step"]}
    for what, name in {"": "eval/success", "sampled_": f"eval/mean@{config.eval.num_samples}"}.items():
        found = [record[name] for record in records if name in record]
        values |= {f"{what}before": found[0], f"{what}after": found[-1]} if found else {}
    entropies = [record["policy/entropy"] for record in records if "policy/entropy" in record]
    values["entropy_first"] = entropies[0]
    for name in METRICS:
        found = [record[name] for record in late if name in record and (record[name] or not name.endswith(("right", "wrong")))]
        values[name] = np.mean(found) if found else ""
    return values


def main(args):
    """Print the CSV."""
    runs = sorted(path.parent for path in args.sweep.glob("runs/*/metrics.jsonl"))
    if not runs:
        raise UserError(f"{args.sweep}: no runs there; give the folder of a sweep")
    writer: csv.DictWriter[str] = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for run in runs:
        line = line_of(run)
        if line["steps"] < read_config(run).num_steps:
            print(f"{run}: not finished, left out", file=sys.stderr)
            continue
        writer.writerow({name: f"{value:.4f}" if isinstance(value, float) else value for name, value in line.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=pathlib.Path, help="folder of the sweep")
    cli.run(main, parser)
