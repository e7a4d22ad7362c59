"""README and the pages of docs/: commands that the programs take, code that runs, links that lead somewhere, short enough."""

import importlib
import pathlib
import re
import shlex

import pytest
from absl import flags

from grpo_jax.config import Config, parse_config
from grpo_jax.knobs import walk
from grpo_jax.tools import cli
from grpo_jax.tools.main import COMMANDS

ROOT = pathlib.Path(__file__).parent.parent
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
FREE = ("reward.params.", "objective.params.", "task.params.")  # fields of any name


def commands_of(text):
    """The command lines of a page, from the program's name on; continued lines are joined, comments left out."""
    for _, body in FENCE.findall(text):
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            found = re.search(r"(?:^|[\s\"])(grpo-jax \w.*|python -m (?:experiments\.|grpo_jax )\w.*)", line)
            if found and not line.startswith(("error", "warning")):
                yield re.split(r" && |   +", found[1])[0].removesuffix('"')


def parsed(command):
    """-> (name of the command, its words)."""
    words = shlex.split(command, comments=True)
    if words[0] == "grpo-jax":
        return words[1], words[2:]
    if words[2] == "grpo_jax":
        return words[3], words[4:]
    return words[2].removeprefix("experiments."), words[3:]


def known_flags(name):
    module = importlib.import_module(COMMANDS[name][0])
    if hasattr(module, "parser"):
        return {each for action in module.parser()._actions for each in action.option_strings}
    own = flags.FLAGS.get_key_flags_for_module(module.__name__)
    return {f"--{flag.name}" for flag in own} | {"--config", "--workdir"} | {f"--no{flag.name}" for flag in own}


@pages
def test_every_command_is_one_that_the_program_takes(file):
    """Its name, its flags, its config and each field that it sets; the values where the config is a shipped one."""
    fields = {name for name, *_ in walk(Config())}
    for command in commands_of(file.read_text()):
        name, words = parsed(command)
        if name not in COMMANDS:
            assert importlib.util.find_spec(f"experiments.{name}"), command
            continue
        raw = None
        for word in words:
            flag, _, value = word.partition("=")
            if flag == "--config" and value != "..." and "<" not in value and not value.startswith("my/"):
                raw = cli.load_config(value, "--config")
            elif flag.startswith("--config."):
                field = flag.removeprefix("--config.")
                is_sweeps = name == "sweep" and hasattr(raw, field)
                assert field in fields or field.startswith(FREE) or is_sweeps, command
            elif flag.startswith("--"):
                assert flag in known_flags(name), command


@pages
def test_every_link_leads_to_a_file(file):
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", FENCE.sub("", file.read_text())):
        assert (file.parent / link).exists(), link


def test_the_readme_is_short_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    pages = {file.name for file in FILES[1:]} - {"index.md", "api.md"}
    assert pages == set(re.findall(r"docs/([\w.]+\.md)", text))
    index = (ROOT / "docs" / "index.md").read_text()
    assert pages <= set(re.findall(r"\]\(([\w.]+\.md)\)", index))


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3], ids=["a loop", "objectives"])
def test_the_code_of_the_python_page_runs(number, capsys):
    """The first two blocks start processes and load a model: tests/test_python.py has their like."""
    block = [body for kind, body in FENCE.findall((ROOT / "docs" / "python.md").read_text()) if kind == "python"][number]
    exec(compile(block, f"docs/python.md, block {number}", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == {2: 3, 3: 1}[number]


def test_the_settings_of_the_readmes_ten_lines_are_fields():
    text = (ROOT / "README.md").read_text()
    (block,) = [body for kind, body in FENCE.findall(text) if kind == "python"]
    assert len([line for line in block.splitlines() if line.strip()]) <= 12
    assert set(re.findall(r'"(\w+\.\w+)":', block)) <= {name for name, *_ in walk(Config())}
    assert parse_config(cli.load_config("gtpo:tiny", "variant"))
