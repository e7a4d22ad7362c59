"""Compare finished runs: grpo-jax report runs/sweep [--baseline=grpo] [--metric=eval/success] [--out=folder]

Takes the folder of a sweep, or the folders of finished runs, which are grouped by their config without the seed. Writes
report.md, report.html (one file, opens anywhere), pictures, results.csv, runs.csv, results.tex, and tensorboard/ for the
HParams tab. With --readme=README.md it also puts the main table between the two report markers of that file.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys

from grpo_jax.tools import cli


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = cli.make_parser("report", __doc__)
    parser.add_argument("folders", nargs="+", type=pathlib.Path, metavar="folder", help="of a sweep, or of finished runs")
    parser.add_argument("--baseline", help="setting that the others are compared with; default: grpo, or else the first")
    parser.add_argument("--metric", default="eval/success", help="what is compared; more is better")
    parser.add_argument("--out", type=pathlib.Path, help="folder to write; default: report in the first folder")
    parser.add_argument("--readme", type=pathlib.Path, help="file whose main table is brought up to date")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the report, and print its verdict. Raises UserError."""
    from grpo_jax.files import write_atomically
    from grpo_jax.tools.report import files
    from grpo_jax.tools.report.analysis import analyse
    from grpo_jax.tools.report.runs import load
    from grpo_jax.tools.report.verdict import verdict

    study = analyse(*load(args.folders, args.metric), args.metric, args.baseline)
    out = args.out or args.folders[0] / "report"
    # Made before anything is written: a README without a place for the table must not leave a report behind.
    readme = None
    if args.readme:
        readme = files.render_readme(args.readme, study)
    files.write(study, out, f"grpo-jax report {shlex.join(sys.argv[1:])}")
    if readme:
        write_atomically(args.readme, readme)
    print("\n".join(verdict(study)))
    print(f"written: {out}/report.html")


def command() -> None:
    """Run from the command line."""
    cli.run(main, parser())
