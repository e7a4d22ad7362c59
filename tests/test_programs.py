"""The programs' --help, and bad input to them: one clear line, status 2, nothing written."""

import re
import subprocess
import sys

import pytest

from grpo_jax.errors import UserError
from grpo_jax.tools import cli
from grpo_jax.tools.main import COMMANDS
from tests import programs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config=configs/ppo.py:tiny"], "no file configs/ppo.py; known here: configs/cispo.py, configs/dapo.py"),
        (
            ["--config=configs/dapo.py:galactic"],
            "unknown scale 'galactic' after the colon; known: tiny, llm, smollm2",
        ),
        (["--config=configs/dapo.py", "--config.rollout.num_promts=3"], "--config.rollout.num_promts: unknown field; did you"),
        (["--config=configs/dapo.py", "--config.seed=one"], "--config.seed=one"),
        (["--config=configs/dapo.py", "--config.rollout.group_size=1"], "config.rollout.group_size = 1"),
        (["--config=configs/dapo.py:smollm2", "--config.model.path=/no/such/folder"], "/no/such/folder"),
        ([], "--config is missing"),
    ],
)
def test_one_line_and_status_2(tmp_path, flags, says):
    workdir = tmp_path / "run"
    status, output = programs.run("experiments.train", *flags, f"--workdir={workdir}")
    lines = output.strip().splitlines()
    assert status == 2, output
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], output
    assert not workdir.exists()


def test_evaluating_a_folder_that_is_no_run(tmp_path):
    status, output = programs.run("experiments.evaluate", f"--workdir={tmp_path}")
    assert status == 2
    assert "must be the folder of a training run" in output


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_the_flags_and_does_not_wait_for_jax(command):
    show_imports = [sys.executable, "-X", "importtime", "-m", "grpo_jax", command, "--help"]
    done = subprocess.run(show_imports, cwd=programs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert not re.search(r"\| +(jax|transformers|orbax)$", done.stderr, re.M)
    assert f"grpo-jax {command}" in done.stdout
    flags = re.findall(r"^  --(\w+)", done.stdout, re.M)
    expected = {
        "train": ["config", "workdir", "allow_config_change", "coordinator", "distributed"],
        "evaluate": ["config", "workdir", "out", "step", "strict"],
        "export": ["config", "workdir", "adapter", "dtype", "max_shard_gb", "out", "push_to_hub", "step", "strict"],
        "sweep": ["config", "workdir", "launcher", "set", "submitit"],
        "report": ["baseline", "metric", "out", "readme"],
        "show": ["workdir", "out"],
    }.get(command, flags)
    assert flags[: len(expected)] == expected


def test_a_command_that_does_not_exist_names_those_that_do():
    status, output = programs.run("grpo_jax", "trian")
    assert status == 2
    assert output.startswith("error: 'trian' is no command; there are train, evaluate, ")


@pytest.mark.parametrize(
    ("name", "file", "argument"),
    [
        ("dapo:tiny", "dapo.py", "tiny"),
        ("gspo", "gspo.py", ""),
        ("dapo_paper:runlocal", "variant.py", "dapo_paper,runlocal"),
        ("trl_default", "variant.py", "trl_default"),
        ("sweeps/variants:tiny", "sweeps/variants.py", "tiny"),
        ("configs/dapo.py:tiny", "dapo.py", "tiny"),
    ],
)
def test_shipped_configs_are_found_by_name_and_from_any_folder(name, file, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.find_config(name) == (cli.SHIPPED / file, argument)


def test_a_config_that_is_not_shipped(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--config: no config 'ppo' is shipped; .* one of grpo, dapo, .*sweeps/variants$"):
        cli.find_config("ppo:tiny")
    (tmp_path / "mine.py").write_text("def get_config():\n    return 3\n")
    assert cli.load_config("mine.py", "--config") == 3
    with pytest.raises(UserError, match=r"^--config: no file my\.py; known here: mine\.py$"):
        cli.find_config("my.py")
