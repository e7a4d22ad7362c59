"""The code is written to be read: measured, so that it stays so. `python -m experiments.house` prints the table."""

from experiments import house


def test_the_package_keeps_its_measure():
    # Configs are pages of settings, and each is one function.
    found = house.measure(sorted(file for file in house.PACKAGE.rglob("*.py") if "configs" not in file.parts))
    assert found.lines > 10_000 and len(found.functions) > 500, "nothing was measured"
    assert found.comment_share >= 0.03
    assert found.conditional_rate <= 12
    assert found.questions == 0
    assert found.args_share >= 0.4
    assert [name for length, name in found.functions if length > 60] == []


def test_what_is_measured(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""What it is."""\n'
        "# why\n"
        "x = 1 if y else 2  # not on a line of its own\n"
        "def f(a, b, c):\n"
        '    """Add.\n\n    Args: three.\n    """\n'
        "    return a\n"
        "def g(self, a, b):\n"
        '    """Two parameters need no list."""\n'
        "def h(a, b, *, c):\n"
        '    """No list."""\n'
    )
    found = house.measure([file])
    assert (found.comments, found.conditionals, found.docstrings, found.questions) == (1, 1, 4, 1)
    assert (found.documented, found.with_args) == (2, 1)
    assert sorted(length for length, _ in found.functions) == [2, 2, 6]
