"""The tables of families in docs/models.md, made from the entries of grpo_jax/models/families.py."""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from grpo_jax.models.families import FAMILIES, TEXT_OF
from grpo_jax.tools.variants_table import lines_between, markdown

PAGE = "docs/models.md"


def families_table() -> list[str]:
    """Lines of the table of families: each with its models, and its parts beside Llama's."""
    rows = [["`model_type`", "models", "what it has beside Llama's parts"]]
    rows += [[f"`{kind}`", family.models, family.beside] for kind, family in FAMILIES.items()]
    return markdown(rows)


def texts_table() -> list[str]:
    """Lines of the table of models that do more than continue a text."""
    rows = [["`model_type`", "models", "becomes"]]
    rows += [[f"`{kind}`", part.models, part.becomes] for kind, part in TEXT_OF.items()]
    return markdown(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tables, or without --write say whether they are out of date. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the tables (default: only compare)")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(), help="the clone (default: working directory)")
    args = parser.parse_args(argv)
    file = args.root / PAGE
    before = text = file.read_text()
    for name, table in (("families", families_table()), ("texts", texts_table())):
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        old = "\n".join([begin, *lines_between(text, PAGE, begin, end), end])
        text = text.replace(old, "\n".join([begin, *table, end]))
    if text == before:
        print(f"{PAGE}: up to date")
        return 0
    if args.write:
        file.write_text(text)
        print(f"{PAGE}: written")
        return 0
    print(f"{PAGE}: out of date; --write brings it up to date")
    return 1
