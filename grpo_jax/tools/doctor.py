"""A look at all that a run would read, before it reads it: grpo-jax doctor runs/dapo

It is given a run's folder, a folder of a model (or its hub id), or a config as --config takes it, dapo:tiny.
Each part is looked at on its own, with the checks that a start makes, and what is wrong is said with what to do. Nothing is
changed. The exit status is 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import sys

from grpo_jax.files import printable
from grpo_jax.tools import cli

MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "wrong": "[red]wrong[/]"}


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = cli.make_parser("doctor", __doc__)
    parser.add_argument("what", help="a run's folder, a model's folder or hub id, or a config: dapo:tiny, my/dapo.py:tiny")
    return parser


def main(args: argparse.Namespace) -> None:
    """Look, show what was found, exit with 1 if something is wrong."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from grpo_jax.tools.examination import examine

    table, is_wrong = Table(box=None, show_header=False), False
    for finding in examine(args.what):
        is_wrong |= finding.kind == "wrong"
        table.add_row(MARKS[finding.kind], Text(printable(finding.part)), Text(printable(finding.said)))
    Console().print(table)
    sys.exit(int(is_wrong))


def command() -> None:
    """Run from the command line."""
    cli.run(main, parser())
