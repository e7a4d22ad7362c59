"""The guide to the variants: its examples run, its tables are the code's, and the translation's code is the guide's.

What has a section, a row or a translation is checked; a new variant needs none of them.
"""

import ast
import doctest
import html
import importlib
import pathlib
import re

import numpy as np
import pytest

from grpo_jax import objectives
from grpo_jax.config import parse_config
from grpo_jax.errors import UserError
from grpo_jax.tools import variants_table
from grpo_jax.tools.advantages import EXAMPLE, TITLES, credit
from grpo_jax.tools.show.health import RULES
from tests.test_config import leaf_fields
from tests.test_objectives import AS_PUBLISHED

ROOT = pathlib.Path(__file__).parent.parent
PAGES = {name: (ROOT / "docs" / name).read_text() for name in ("variants.md", "variants.zh.md")}
ENGLISH, CHINESE = PAGES.values()
pages = pytest.mark.parametrize("text", PAGES.values(), ids=PAGES)

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
DISPLAY = re.compile(r"^\$\$(.+?)\$\$$", re.M)
INLINE = re.compile(r"(?<!\$)\$([^$\n]+)\$(?!\$)")
CODE = re.compile(r"`([^`\n]+)`")


def blocks(text, language):
    return [body for name, body in FENCE.findall(text) if name == language]


def prose(text):
    return FENCE.sub("", text)


def formulas(text):
    """-> (displayed, in the line)."""
    return DISPLAY.findall(prose(text)), INLINE.findall(CODE.sub("", DISPLAY.sub("", prose(text))))


def sections(text, level):
    """[(heading, what follows it up to the next heading of that level or above)]."""
    parts = re.split(rf"^(#{{1,{level}}}) (.+)$", text, flags=re.M)
    found = zip(parts[1::3], parts[2::3], parts[3::3], strict=True)
    return [(title, body) for marks, title, body in found if len(marks) == level]


def section_of(variant, text):
    return dict(sections(text, 2))[TITLES[variant]]


def tables(text):
    """Every table as rows of cells, its head and rule left out."""
    found = re.findall(r"(?:^\|.*\|\n)+", prose(text), re.M)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]] for table in found]


# ----------------------------------------------------------------------------------------------- formulas and examples


@pytest.mark.slow
def test_the_examples_compute_what_the_page_says():
    source = "\n".join(blocks(ENGLISH, "python"))
    test = doctest.DocTestParser().get_doctest(source, {}, "docs/variants.md", None, 0)
    runner = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF)
    said = []
    runner.run(test, out=said.append, clear_globs=False)
    assert runner.failures == 0 and runner.tries > 80, "".join(said)
    group = {name: test.globs[name] for name in ("rewards_B", "lengths_B", "mask_BT", "entropy_BT", "L")}
    of_figure = (EXAMPLE.rewards_B, EXAMPLE.lengths_B, EXAMPLE.mask_BT, EXAMPLE.entropy_BT, EXAMPLE.budget)
    for (name, ours), theirs in zip(group.items(), of_figure, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    for variant, name in {"grpo": "adv_BT", "dr_grpo": "centred_BT", "gtpo": "gtpo_BT", "grpo_s": "grpo_s_BT"}.items():
        drawn_BT = np.where(EXAMPLE.mask_BT > 0, credit(EXAMPLE, variant)[0], 0)
        np.testing.assert_array_equal(drawn_BT, test.globs[name] * EXAMPLE.mask_BT, err_msg=variant)


@pages
def test_after_every_formula_comes_its_code(text):
    seen = 0
    for title, body in sections(text, 3):
        for formula in DISPLAY.finditer(body):
            rest = body[formula.end() :]
            assert "\n```python\n" in rest, f"{title}: {formula[0]}"
            seen += 1
    assert seen == len(formulas(text)[0]) > 20


def documented(text):
    """The variants that have a section of their own."""
    headings = {title for title, _ in sections(text, 2)}
    return [variant for variant, title in TITLES.items() if title in headings]


@pages
def test_the_published_variants_have_a_section_with_an_example_of_their_own(text):
    assert set(documented(text)) >= set(AS_PUBLISHED)
    for variant in documented(text):
        assert f'"{variant}"' in "\n".join(blocks(section_of(variant, text), "python")), variant


# ------------------------------------------------------------------------------------------------- tables against code


@pytest.mark.parametrize("page", variants_table.TABLES)
def test_the_generated_tables_are_current(page):
    """Each row that is there is as the entries make it now. A variant of your own may be missing: --write adds it."""
    lines = variants_table.lines_between((ROOT / page).read_text(), page)
    wanted = variants_table.TABLES[page](ROOT)
    assert lines == [line for line in wanted if line in lines], "run python -m experiments.variants_table --write"
    names = variants_table.README_VARIANTS if page == "README.md" else AS_PUBLISHED
    titles = [entry.title for name, entry in objectives.ENTRIES.items() if name in names]
    assert all(any(title in line for line in lines) for title in titles) and len(lines) >= 2 + len(titles)


@pytest.mark.parametrize("page", variants_table.FAMILY_PAGES)
def test_the_table_of_the_family_is_current(page):
    text = (ROOT / page).read_text()
    lines = variants_table.lines_between(text, page, variants_table.FAMILY_BEGIN, variants_table.FAMILY_END)
    assert lines == variants_table.family_table(ROOT), "run python -m experiments.variants_table --write"
    assert len(lines) == 2 + len(objectives.FAMILY) > 20


def test_the_tables_are_written_in_place_and_then_are_current(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    for page in variants_table.TABLES:
        text = (ROOT / page).read_text()
        (tmp_path / page).write_text(text.replace("0.2 / 0.28", "0.2 / 0.3"))
    for page in ("configs", "experiments", "docs/variants.zh.md"):
        (tmp_path / page).symlink_to(ROOT / page)
    assert variants_table.main(["--root", str(tmp_path)]) == 1
    assert variants_table.main(["--root", str(tmp_path), "--write"]) == 0
    assert variants_table.main(["--root", str(tmp_path)]) == 0
    for page, table in variants_table.TABLES.items():
        assert variants_table.lines_between((tmp_path / page).read_text(), page) == table(ROOT)
    own = objectives.Variant("Mine", "a talk", "A = r * |r|", objectives.get("rloo"))
    monkeypatch.setattr(variants_table, "ENTRIES", {"mine": own})
    monkeypatch.setattr(variants_table, "README_VARIANTS", ["mine"])
    assert variants_table.readme_table(ROOT)[2:] == [
        r"| Mine (a talk) | A = r \* \|r\| | `token` | none | `sequence_sum` | 0 | - | `mine` |"
    ]
    (tmp_path / "README.md").write_text("no markers")
    with pytest.raises(UserError, match=r"README.md: no lines <!-- variants:begin -->"):
        variants_table.main(["--root", str(tmp_path)])


def test_the_translated_overview_is_the_table_of_variants():
    (overview,) = [table for table in tables(CHINESE) if "`group_norm`" in table[0]]
    rows = {re.match(r"\[(.+)\]", row[0])[1]: row[1:7] for row in overview}
    names = {title: name for name, title in TITLES.items()}
    assert len(rows) >= 10
    for title, cells in rows.items():
        obj = objectives.get(names[title])
        advantage, ratio, surrogate, clip, aggregation, kl = (cell.strip("`") for cell in cells)
        expected = obj.advantage, obj.ratio, obj.surrogate, obj.aggregation
        assert (advantage, ratio, surrogate, aggregation) == expected, title
        assert [float(bound) for bound in clip.split("/")] == pytest.approx([obj.clip_low, obj.clip_high], rel=2e-4), title
        assert float(kl) == obj.kl_coef, title


@pages
def test_the_table_of_constants_is_the_presets(text):
    (table,) = [table for table in tables(text) if "`trl_default`" in [row[0] for row in table]]
    assert [row[0].strip("`") for row in table] == list(objectives.PRESETS)
    for name, _, ddof, eps, kl, aggregation, clip, _ in table:
        obj = objectives.get(name.strip("`"))
        assert (int(ddof), float(eps), aggregation.strip("`")) == (obj.std_ddof, obj.adv_eps, obj.aggregation), name
        assert [float(bound) for bound in clip.split("/")] == [obj.clip_low, obj.clip_high], name
        assert kl == (f"{obj.kl_coef} {obj.kl_estimator}" if obj.kl_coef else "0"), name


@pages
def test_the_limits_are_those_of_the_health_checks(text):
    titles = {rule.title: rule for rule in RULES}
    (table,) = [table for table in tables(text) if table[0][0] in titles]
    assert [row[0] for row in table] == list(titles)
    for title, _, orange, red, _ in table:
        rule = titles[title]
        for cell, limit in ((orange, rule.warn), (red, rule.bad)):
            sign, number = cell.split()
            assert (sign, float(number)) == (">" if rule.worse == "high" else "≤", limit), title


def known_metrics():
    """Names that the package writes: string constants like "policy/entropy"."""
    for file in (ROOT / "grpo_jax").glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[a-z]+/\w+", node.value):
                yield node.value


@pages
def test_every_metric_field_and_file_exists(text):
    metrics, fields = set(known_metrics()), set(leaf_fields()) | {f"objective.{name}" for name in vars(objectives.get("grpo"))}
    groups = {field.split(".")[0] for field in fields if "." in field}
    seen = {"metric": 0, "field": 0, "file": 0}
    for code in CODE.findall(prose(text)):
        name = code.removeprefix("--config.").split("=")[0]
        if re.fullmatch(r"[a-z]+/\w+", name):
            seen["metric"] += 1
            assert name in metrics, code
        elif re.fullmatch(r"[\w/]+\.(py|md)", name):
            seen["file"] += 1
            assert (ROOT / name).is_file(), code
        elif name.split(".")[0] in groups and "." in name:
            seen["field"] += 1
            assert name in fields, code
    assert min(seen.values()) >= 5, seen
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / "docs" / link).is_file(), link
    anchors = {variants_table.anchor(title) for title, _ in sections(text, 2)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def config_of_command(command):
    """The Config that a training command of the page asks for."""
    name, scale = re.search(r"--config=(?:configs/)?(\w+)(?:\.py)?:(\w+)", command).groups()
    raw = importlib.import_module(f"grpo_jax.configs.{name}").get_config(scale)
    changes = re.findall(r'--config\.([\w.]+)=("[^"]*"|\S+)', command)
    raw.update_from_flattened_dict({field: literal(value.strip('"')) for field, value in changes})
    return parse_config(raw)


def literal(value):
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def test_the_commands_train_the_variant_of_their_section():
    seen = 0
    for variant in documented(ENGLISH):
        (block,) = blocks(section_of(variant, ENGLISH), "bash")
        for command in re.sub(r"\\\n\s*", "", block).splitlines():
            described = objectives.describe(config_of_command(command).objective).split(" + ")[0]
            assert described in (variant, f"{variant}_paper", f"{variant}_baseline", f"{variant}_geometric"), command
            seen += 1
    assert seen > 12
    (gspo,) = blocks(section_of("gspo", ENGLISH), "bash")
    assert config_of_command(gspo).objective == objectives.get("gspo")


# ---------------------------------------------------------------------------------------------- languages and rendering


def test_code_and_formulas_of_the_translation_are_the_guides():
    """Letter by letter and in the same order. It may lack sections that the guide got after it was translated."""
    parts = {"code": FENCE.findall, "displayed formulas": lambda text: formulas(text)[0]}
    for name, part in parts.items():
        of_guide = iter(part(ENGLISH))
        missing = [item for item in part(CHINESE) if item not in of_guide]  # `in` consumes: this is a subsequence
        assert missing == [] and len(part(CHINESE)) > 20, name
    assert set(formulas(CHINESE)[1]) <= set(formulas(ENGLISH)[1])
    assert re.search(r"commit [0-9a-f]{7}", CHINESE.split("## ")[0]), "at its top: the commit it was translated at"


@pages
def test_markdown_leaves_the_formulas_alone(text):
    """GitHub reads Markdown before it reads formulas."""
    from markdown_it import MarkdownIt

    rendered = html.unescape(MarkdownIt("commonmark").enable("table").render(text))
    displayed, inline = formulas(text)
    assert len(displayed) > 20 and len(inline) > 50
    for formula in displayed + inline:
        assert f"${formula}$" in rendered, formula
        assert not re.search(r"\\operatorname|\\[^a-zA-Z]|[<>|*]", formula), formula


@pages
def test_the_formulas_are_latex(text):
    """matplotlib's parser knows a part of LaTeX: balanced braces, known commands."""
    from matplotlib.mathtext import MathTextParser

    parser = MathTextParser("path")
    for formula in {formula for kind in formulas(text) for formula in kind}:
        parser.parse(f"${formula.replace(chr(92) + 'lt', '<').replace(chr(92) + 'qquad', chr(92) + 'quad')}$")


def test_the_readme_links_to_both():
    assert all(f"(docs/{name})" in (ROOT / "README.md").read_text() for name in PAGES)
