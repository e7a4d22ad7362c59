"""The fields of a config: grpo-jax fields [prefix]

Lists every field under the prefix (`rollout`, `optimizer.b`; none: all) with default, unit, range and comment, as
grpo_jax/config/schema.py declares them. In a clone, --write brings the page of settings in configs/base.py up to date.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import textwrap
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from grpo_jax.errors import UserError
from grpo_jax.knobs import Knob, walk
from grpo_jax.tools import cli

LINE_LENGTH = 128
BEGIN, END = "    # fields: begin", "    # fields: end"
OBJECTIVE = "objective"  # a variant decides its fields: they are no assignments of the page


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = cli.make_parser("fields", __doc__)
    parser.add_argument("prefix", nargs="?", default="", help="of the fields' dotted names")
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE", help="bring the page of settings up to date, in a clone")
    return parser


def main(args: argparse.Namespace) -> None:
    """Print the list, or write the page. Raises UserError."""
    if args.write:
        write_page(args.write)
    else:
        Console().print(table(args.prefix))


def table(prefix: str) -> Table:
    """All fields whose name begins with the prefix. Raises UserError if there is none."""
    rows = [row for row in declared_fields() if row[0].startswith(prefix)]
    if not rows:
        raise UserError(f"{prefix!r}: no field's name begins like this; groups are {', '.join(groups())}")
    listed = Table(Column("field", no_wrap=True), "default", "unit", "range", "comment", box=None)
    for name, value, declared in rows:
        declared = declared or Knob("see docs/variants.md")
        listed.add_row(name, literal(value), declared.unit, declared.range, declared.about)
    return listed


def declared_fields() -> list[tuple[str, Any, Knob | None]]:
    """Name, default and declaration of every field of a config."""
    from grpo_jax.config import Config  # imports jax, which --help does without

    return list(walk(Config()))


def groups() -> list[str]:
    """The first parts of the fields' names, each once."""
    return list(dict.fromkeys(name.partition(".")[0] for name, _, _ in declared_fields()))


def write_page(file: pathlib.Path) -> None:
    """Replace the lines between the two markers of a config file. Raises UserError if it has no such markers."""
    text = file.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise UserError(f"--write={file}: has no lines {BEGIN.strip()!r} and {END.strip()!r}")
    first_line = rest.splitlines()[0]
    file.write_text(f"{before}{begin}{first_line}\n{page()}{end}{after}", encoding="utf-8")


def page() -> str:
    """One assignment for each field, a blank line between groups, the comment behind it or, if it is long, above it."""
    lines: list[str] = []
    made: set[str] = set()
    for name, value, declared in declared_fields():
        group = name.partition(".")[0]
        if group == OBJECTIVE:
            if group not in made:
                lines += ["", "    config.objective = objective_of(variant)"]
            made.add(group)
            continue
        *parents, _ = name.split(".")
        for depth in range(1, len(parents) + 1):
            parent = ".".join(parents[:depth])
            if parent not in made:
                lines += [*([""] if depth == 1 else []), f"    config.{parent} = ConfigDict()"]
                made.add(parent)
        lines += assignment(name, value, declared)
    return "\n".join(lines).lstrip("\n") + "\n"


def assignment(name: str, value: object, declared: Knob | None) -> list[str]:
    """The line that sets a field to its default, below its comment if both are too long for one."""
    code = f"    config.{name} = {literal(value)}"
    if declared is None:
        return [code]
    choices = f"{declared.range}; " * bool(declared.choices)
    unit = f" [{declared.unit}]" * (declared.unit not in declared.about)
    comment = f"# {choices}{declared.about}{unit}"
    line = f"{code}  {comment}"
    if len(line) <= LINE_LENGTH:
        return [line]
    return [*textwrap.wrap(comment, LINE_LENGTH, initial_indent="    ", subsequent_indent="    # "), code]


def literal(value: object) -> str:
    """Python's source of a default, in double quotes, raw where it has backslashes."""
    if isinstance(value, str):
        return f'r"{value}"' if "\\" in value else f'"{value}"'
    if isinstance(value, tuple):
        items = ", ".join(map(literal, value))
        return f"({items},)" if len(value) == 1 else f"({items})"
    if isinstance(value, int) and abs(value) >= 10_000 and not isinstance(value, bool):
        return f"{value:_}"
    return re.sub(r"^(.*)e-0(\d)$", r"\1e-\2", repr(value))


def command() -> None:
    """Run from the command line."""
    cli.run(main, parser())
