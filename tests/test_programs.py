"""The programs' --help, and bad input to them: one clear line, status 2, nothing written."""

import pytest

from tests import programs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config=configs/ppo.py:tiny"], "no file configs/ppo.py; known here: configs/cispo.py, configs/dapo.py"),
        (["--config=configs/dapo.py:galactic"], "unknown scale 'galactic' after the colon; known: tiny, smollm2, runlocal"),
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


def test_help_says_what_the_program_does_and_lists_its_flags():
    status, output = programs.run("experiments.evaluate", "--help")
    assert status in (0, 1), output
    assert output.startswith("Held-out success of a run, a model or an adapter, with 95 % intervals:\n\n    python -m")
    for flag in ("--config:", "--workdir:", "--step:", "--out:"):
        assert f"\n  {flag}" in output, flag
