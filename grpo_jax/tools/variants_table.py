"""The tables of variants in README.md and the guide, made from the entries of grpo_jax/objectives/variants.py."""

from __future__ import annotations

import argparse
import csv
import pathlib
import re
from collections.abc import Callable, Sequence

from grpo_jax.config import ForksConfig
from grpo_jax.errors import UserError
from grpo_jax.objectives import ENTRIES, FAMILY, Objective, Variant
from grpo_jax.objectives.functions import Choice, name_of

BEGIN, END = "<!-- variants:begin -->", "<!-- variants:end -->"
README_VARIANTS = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
FAMILY_BEGIN, FAMILY_END = "<!-- family:begin -->", "<!-- family:end -->"
CREDIT = pathlib.PurePosixPath("experiments/studies/tasks/credit.csv")  # of the study, in a clone
ARXIV = re.compile(r"\d{4}\.\d{4,5}")


def readme_table(root: pathlib.Path) -> list[str]:
    """Lines of README's table: the variants that the package is about, each with its paper, its formula and its config."""
    credit = f"[credit]({CREDIT.parent}/README.md)"
    rows = [["variant", "in one line", "ratio", "clip low / high", "aggregation", "KL", credit, "`--config=`"]]
    measured = measured_credit(root)
    for name in README_VARIANTS:
        entry = ENTRIES[name]
        obj = entry.objective
        cells = [f"{entry.title} ({paper(entry)})", plain(entry.formula), code(obj.ratio), clip(obj), code(obj.aggregation)]
        rows.append([*cells, f"{obj.kl_coef:g}", measured.get(name, "-"), code(name)])
    return markdown(rows)


def measured_credit(root: pathlib.Path) -> dict[str, str]:
    """Read the correlation with true credit of each objective, on task `forks` with filler of its default entropy."""
    with (root / CREDIT).open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if float(row["filler_entropy"]) == ForksConfig().filler_entropy]
    return {row["objective"]: f"{float(row['mean']):.2f}" for row in rows}


def overview_table(root: pathlib.Path) -> list[str]:
    """Lines of the guide's overview: each variant's choice on each axis, linked to its section where there is one."""
    headings = re.findall(r"^## (.+)$", (root / "docs/variants.md").read_text(), re.M)
    rows = [["variant", "in one line", "advantage", "ratio", "surrogate", "clip low / high", "aggregation", "KL weight"]]
    for entry in ENTRIES.values():
        title, obj = entry.title, entry.objective
        if title in headings:
            title = f"[{title}](#{anchor(title)})"
        choices = [code(obj.advantage), code(obj.ratio), code(obj.surrogate), clip(obj), code(obj.aggregation)]
        rows.append([title, plain(entry.formula), *choices, f"{obj.kl_coef:g}"])
    return markdown(rows)


def family_table(root: pathlib.Path) -> list[str]:
    """Lines of the guide's table of the wider family: each with paper, formula and what it sets beside GRPO's fields."""
    del root
    grpo = Objective(kl_coef=0.0).to_dict()
    rows = [["name", "variant", "in one line", "set beside GRPO's"]]
    for name, entry in FAMILY.items():
        changes = [f"{field} = {value}" for field, value in entry.objective.to_dict().items() if value != grpo[field]]
        rows.append([code(name), f"{entry.title} ({paper(entry)})", plain(entry.formula), ", ".join(map(code, changes))])
    return markdown(rows)


FAMILY_PAGES = ("docs/variants.md", "docs/variants.zh.md")
TABLES: dict[str, Callable[[pathlib.Path], list[str]]] = {"README.md": readme_table, "docs/variants.md": overview_table}


def anchor(title: str) -> str:
    """The link target that GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def paper(entry: Variant) -> str:
    """The entry's source, a link if it is on arXiv."""
    if ARXIV.fullmatch(entry.paper):
        return f"[{entry.paper}](https://arxiv.org/abs/{entry.paper})"
    return entry.paper


def clip(obj: Objective) -> str:
    """The clip bounds, or "none" where no ratio is taken."""
    if obj.surrogate == "reinforce":
        return "none"
    return f"{obj.clip_low:.4g} / {obj.clip_high:.4g}"


def plain(text: str) -> str:
    """Text in which Markdown finds nothing to format: a formula may have stars, bars and underscores."""
    return re.sub(r"([\\`*_|<])", r"\\\1", text)


def code(choice: Choice) -> str:
    """A name as code."""
    return f"`{name_of(choice)}`"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]


def lines_between(text: str, page: str, begin: str = BEGIN, end: str = END) -> list[str]:
    """The lines between the page's markers.

    Args:
      text: of the page. page: its name, for the message. begin, end: the lines before and after the table.
    Raises: UserError if they are missing.
    """
    found = re.search(rf"^{begin}\n(.*?)^{end}$", text, re.M | re.S)
    if not found:
        raise UserError(f"{page}: no lines {begin} and {end} to put the table between")
    return found[1].splitlines()


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or without --write say which are out of date. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the tables (default: only compare)")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(), help="the clone (default: working directory)")
    args = parser.parse_args(argv)
    num_stale = 0
    tables = [(page, table, BEGIN, END) for page, table in TABLES.items()]
    tables += [(page, family_table, FAMILY_BEGIN, FAMILY_END) for page in FAMILY_PAGES]
    for page, table, begin, end in tables:
        file, lines = args.root / page, table(args.root)
        text = file.read_text()
        old = "\n".join([begin, *lines_between(text, page, begin, end), end])
        new = "\n".join([begin, *lines, end])
        if old == new:
            print(f"{page}: up to date")
        elif args.write:
            file.write_text(text.replace(old, new))
            print(f"{page}: written")
        else:
            num_stale += 1
            print(f"{page}: out of date; --write brings it up to date")
    return min(num_stale, 1)
