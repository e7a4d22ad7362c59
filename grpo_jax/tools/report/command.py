"""Compare finished runs: python -m experiments.report runs/sweep [--baseline=grpo] [--metric=eval/success] [--out=folder]

Takes the folder of a sweep, or the folders of finished runs, which are grouped by their config without the seed. Writes
report.md, report.html (one file, opens anywhere), pictures, results.csv, runs.csv, results.tex, and tensorboard/ for the
HParams tab. With --readme=README.md it also puts the main table between the two report markers of that file.
"""

from __future__ import annotations

import argparse
import pathlib
import shlex
import sys

from grpo_jax.errors import UserError
from grpo_jax.files import write_atomically
from grpo_jax.tools import cli
from grpo_jax.tools.report import document, figures, hparams, page, tables
from grpo_jax.tools.report.analysis import Study, analyse
from grpo_jax.tools.report.runs import load
from grpo_jax.tools.report.verdict import verdict


def main() -> None:
    """Run the command line; bad input ends with one line on stderr and status 2."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=pathlib.Path, metavar="folder", help="of a sweep, or of finished runs")
    parser.add_argument("--baseline", help="setting that the others are compared with; default: grpo, or else the first")
    parser.add_argument("--metric", default="eval/success", help="what is compared; more is better")
    parser.add_argument("--out", type=pathlib.Path, help="folder to write; default: report in the first folder")
    parser.add_argument("--readme", type=pathlib.Path, help="file whose main table is brought up to date")
    args = parser.parse_args()
    try:
        study = analyse(*load(args.folders, args.metric), args.metric, args.baseline)
        out = args.out or args.folders[0] / "report"
        # Made before anything is written: a README without a place for the table must not leave a report behind.
        readme = None
        if args.readme:
            readme = render_readme(args.readme, study)
        write(study, out, f"python -m experiments.report {shlex.join(sys.argv[1:])}")
        if readme:
            write_atomically(args.readme, readme)
    except UserError as error:
        cli.fail(str(error))
    print("\n".join(verdict(study)))
    print(f"written: {out}/report.html")


def write(study: Study, out: pathlib.Path, command: str) -> None:
    """Write all of the report's files.

    Args:
      study: the results.
      out: folder to write to; made if it is absent.
      command: the command line, which report.md tells.
    Raises: UserError if the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out={out}: cannot be written ({error.strerror}); choose another folder") from error
    light, dark = (figures.draw(study, theme) for theme in ("light", "dark"))
    text = document.document(study, light, command)
    texts = {
        "report.md": text,
        "report.html": page.page(text, light, dark),
        "results.csv": tables.results_csv(study),
        "runs.csv": tables.runs_csv(study),
        "results.tex": tables.latex(study),
    }
    # The dark pictures are inside report.html only: report.md is read where the page's colours are not known, and one picture
    # of each name is enough there.
    for name, drawn in light.items():
        (out / name).write_bytes(drawn)
    for name, each in texts.items():
        write_atomically(out / name, each)
    hparams.write(study, out / "tensorboard")


def render_readme(readme: pathlib.Path, study: Study) -> str:
    """Return the file's text with the study's main table in it. Raises UserError if it has no place for one."""
    if not readme.is_file():
        raise UserError(f"--readme={readme}: no such file")
    return document.insert_table(readme.read_text(encoding="utf-8"), document.main_table(study), str(readme))
