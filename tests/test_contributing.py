"""The examples of CONTRIBUTING.md, "Adding a variant": pasted where they say, they are whole variants that pass the tests."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.mutate import ROOT

SECTION = (ROOT / "CONTRIBUTING.md").read_text().split("## Adding a variant\n")[1].split("\n## ")[0]
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", SECTION, re.M | re.S)
PIECE = re.compile(r"^# (\S+), (in|above) (\w+)\n(.*?)(?=^# \S+, (?:in|above) \w+\n|\Z)", re.M | re.S)


def paste(folder, example):
    """Put each piece of an example where the comment above it says."""
    for name, where, anchor, piece in PIECE.findall(example):
        file = folder / name
        text = file.read_text()
        at = re.search(rf"^(class )?{anchor}\b", text, re.M).start()
        if where == "in":  # behind the last entry of a table, or the last field of a class
            at = re.compile(r"^ *\}|\n *def ", re.M).search(text, at).start()
        file.write_text(text[:at] + piece + text[at:])


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what the tests of objectives need, with all examples in it."""
    folder = tmp_path_factory.mktemp("clone")
    for part in ("grpo_jax", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for example in EXAMPLES:
        paste(folder, example)
    return folder


@pytest.mark.parametrize("example", EXAMPLES, ids=["advantage", "clip"])
def test_an_example_is_at_most_three_files_and_thirty_lines(example):
    pieces = PIECE.findall(example)
    assert len({file for file, *_ in pieces}) == 3
    assert sum(1 for *_, piece in pieces for line in piece.splitlines() if line.strip()) <= 30
    assert {anchor for _, _, anchor, _ in pieces} >= {"Objective", "ENTRIES"}


@pytest.mark.slow
def test_the_examples_are_variants_that_match_their_oracle(clone):
    names = [re.search(r'^        "(\w+)": Variant\(', example, re.M)[1] for example in EXAMPLES]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-q"]
    command += ["tests/test_objectives.py", "-k", f"({' or '.join(names)} or exp_utility) and not devices"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(clone)})
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 40
