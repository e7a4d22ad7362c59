"""Measure how the code is written: python -m experiments.house [folder ...]

For each folder (default: the package, room by room) one row: lines, lengths of functions, share of own-line comments,
conditional expressions, docstrings that begin with a question word, public functions of three parameters and more that have an
Args section. `tests/test_house.py` holds the package to its limits.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import pathlib
import re
import sys
import tokenize

from rich.console import Console
from rich.table import Column, Table

PACKAGE = pathlib.Path(__file__).parent.parent / "grpo_jax"
QUESTION = re.compile(r"(What|Whether|Which|How)\b")
MANY_PARAMETERS = 3  # from so many on, a reader wants them listed


@dataclasses.dataclass
class Measures:
    """Counts over some files.

    functions: (lines, name) of each. documented: public ones of many parameters that have a docstring; with_args of them.
    """

    lines: int = 0
    comments: int = 0
    conditionals: int = 0
    docstrings: int = 0
    questions: int = 0
    documented: int = 0
    with_args: int = 0
    functions: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    @property
    def comment_share(self) -> float:
        """Own-line comments of all lines."""
        return self.comments / self.lines

    @property
    def conditional_rate(self) -> float:
        """Conditional expressions in 1,000 lines."""
        return 1000 * self.conditionals / self.lines

    @property
    def args_share(self) -> float:
        """Public functions of many parameters whose docstring lists them; 1 if there are none."""
        return self.with_args / self.documented if self.documented else 1.0

    def length_at(self, share: float) -> int:
        """Lines of the function that is longer than this share of them."""
        lengths = sorted(length for length, _ in self.functions)
        return lengths[min(int(len(lengths) * share), len(lengths) - 1)] if lengths else 0


def measure(files: list[pathlib.Path]) -> Measures:
    """Count over Python files."""
    found = Measures()
    for file in files:
        text = file.read_text(encoding="utf-8")
        lines = text.split("\n")
        found.lines += len(lines)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            found.comments += token.type == tokenize.COMMENT and lines[token.start[0] - 1].lstrip().startswith("#")
        for node in ast.walk(ast.parse(text)):
            count_node(found, node, file)
    return found


def count_node(found: Measures, node: ast.AST, file: pathlib.Path) -> None:
    """Add one node of a syntax tree to the counts.

    Args:
      found: changed. node: of any kind. file: where it is, for the names of long functions.
    """
    found.conditionals += isinstance(node, ast.IfExp)
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
        return
    docstring = ast.get_docstring(node) or ""
    found.docstrings += bool(docstring)
    found.questions += bool(QUESTION.match(docstring))
    if not isinstance(node, ast.FunctionDef):
        return
    assert node.end_lineno is not None
    found.functions.append((node.end_lineno - node.lineno + 1, f"{file}:{node.name}"))
    parameters = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    is_listed = len(set(parameters) - {"self", "cls"}) >= MANY_PARAMETERS and not node.name.startswith("_")
    if is_listed and docstring:
        found.documented += 1
        found.with_args += "Args:" in docstring


def main() -> None:
    """Print the table."""
    folders = [pathlib.Path(each) for each in sys.argv[1:]]
    if not folders:
        folders = [PACKAGE, *sorted(each for each in PACKAGE.iterdir() if any(each.glob("*.py")))]
    columns = ("lines", "function lines: median / p90 / max", "comments", "a if c else b", "What, Whether", "Args")
    table = Table(Column("folder", no_wrap=True), *columns, box=None)
    for folder in folders:
        found = measure(sorted(folder.rglob("*.py")))
        lengths = " / ".join(str(found.length_at(share)) for share in (0.5, 0.9, 1.0))
        rate, args = f"{found.conditional_rate:.1f} in 1,000", f"{found.with_args} of {found.documented}"
        table.add_row(
            folder.resolve().name, str(found.lines), lengths, f"{found.comment_share:.1%}", rate, str(found.questions), args
        )
    Console().print(table)


if __name__ == "__main__":
    main()
