"""The lists of families in docs/models.md and README.md, made from the entries of grpo_jax/models/families.py."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
import re
from collections.abc import Sequence

from grpo_jax.errors import UserError
from grpo_jax.models.families import FAMILIES, TEXT_OF
from grpo_jax.tools.variants_table import markdown

PAGE, README = "docs/models.md", "README.md"
PUBLISHED = pathlib.PurePosixPath("tests/published.json")  # config.json files that the tests read, in a clone


def families_table(root: pathlib.Path) -> list[str]:
    """Lines of the table of families: each with its models, its parts beside Llama's, and published config.json files read."""
    published = num_published(root)
    rows = [["`model_type`", "models", "what it has beside Llama's parts", "published config.json files"]]
    for kind, family in FAMILIES.items():
        rows.append([f"`{kind}`", family.models, family.beside, str(published[kind] or "-")])
    return markdown(rows)


def texts_table(root: pathlib.Path) -> list[str]:
    """Lines of the table of models that do more than continue a text."""
    published = num_published(root)
    rows = [["`model_type`", "models", "becomes", "published config.json files"]]
    rows += [[f"`{kind}`", part.models, part.becomes, str(published[kind] or "-")] for kind, part in TEXT_OF.items()]
    return markdown(rows)


def num_published(root: pathlib.Path) -> collections.Counter[str]:
    """Count, by model_type, the published config.json files that the tests see accepted."""
    rows = json.loads((root / PUBLISHED).read_text()).values()
    return collections.Counter(row["config"]["model_type"] for row in rows if "numbers" in row)


def models_line() -> str:
    """README's list: of each family the models named first."""
    return ", ".join(family.models.split(",")[0] for family in FAMILIES.values())


def replace_between(text: str, page: str, name: str, content: str) -> str:
    """Put `content` between the markers of that name.

    Raises: UserError if the page, named for the message, has none.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if not re.search(rf"{begin}.*?{end}", text, re.S):
        raise UserError(f"{page}: no {begin} and {end} to put the families between")
    return re.sub(rf"{begin}.*?{end}", lambda _: f"{begin}{content}{end}", text, flags=re.S)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the lists, or without --write say whether they are out of date. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the lists (default: only compare)")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(), help="the clone (default: working directory)")
    args = parser.parse_args(argv)
    tables = {"families": families_table(args.root), "texts": texts_table(args.root)}
    contents = {PAGE: {name: "\n".join(["", *table, ""]) for name, table in tables.items()}, README: {"models": models_line()}}
    is_current = True
    for page, lists in contents.items():
        file = args.root / page
        before = text = file.read_text()
        for name, content in lists.items():
            text = replace_between(text, page, name, content)
        if text == before:
            print(f"{page}: up to date")
        elif args.write:
            file.write_text(text)
            print(f"{page}: written")
        else:
            is_current = False
            print(f"{page}: out of date; --write brings it up to date")
    return int(not is_current)
