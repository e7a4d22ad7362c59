"""Killed at any step and started again, a run leaves the very records of one that was never disturbed."""

import json
import os
import random
import signal
import time

import jax
import pytest

from tests import programs

pytestmark = pytest.mark.slow

NUM_STEPS = 18
NUM_DEVICES = 8
IN_PARTS = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.fsdp_min_elements=0"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder of compiled programs: what one process has compiled, the next ones load."""
    return tmp_path_factory.mktemp("compiled")


def flags(workdir, variant="dapo"):
    return [
        f"--config=configs/{variant}.py:runlocal",
        f"--workdir={workdir}",
        f"--config.num_steps={NUM_STEPS}",
        "--config.eval_every=9",
        "--config.checkpoint.every=4",
        "--config.warm_start.num_steps=100",
        *IN_PARTS,
    ]


def wait_for_step(process, workdir, step):
    """Until the run's log has reached `step`."""
    for _ in range(15_000):
        if (workdir / "metrics.jsonl").exists() and f'"step": {step},' in (workdir / "metrics.jsonl").read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


def killed(workdir, step, cache):
    """Start the run, or go on with it, and kill it when it has come to `step`."""
    process = programs.start("experiments.train", *flags(workdir), num_devices=NUM_DEVICES, cache=cache)
    wait_for_step(process, workdir, step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def stopped(workdir, step, cache):
    """Go on with the run until SIGTERM after `step`; -> the step that it has saved."""
    process = programs.start("experiments.train", *flags(workdir), num_devices=NUM_DEVICES, cache=cache)
    wait_for_step(process, workdir, step)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    stopped_at = programs.records(workdir)[-1]["step"]
    assert step <= stopped_at < NUM_STEPS
    assert (workdir / "checkpoints" / str(stopped_at)).is_dir()
    return stopped_at


def ended(workdir, cache):
    """Go on with the run to its end."""
    status, output = programs.run("experiments.train", *flags(workdir), num_devices=NUM_DEVICES, cache=cache)
    assert status == 0, output


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """The folder of a run that nobody disturbs, on 8 devices with weights, optimizer state and caches in parts."""
    folder = tmp_path_factory.mktemp("whole")
    ended(folder, cache)
    return folder


@pytest.fixture(scope="module")
def torn(tmp_path_factory, whole, cache):
    """The folder of the same run, killed, stopped, killed and ended by the same command."""
    del whole  # comes first: it compiles
    folder, chance = tmp_path_factory.mktemp("torn"), random.Random(os.urandom(8))
    killed(folder, chance.choice([3, 4, 6]), cache)
    stopped_at = stopped(folder, 7, cache)
    killed(folder, min(stopped_at + chance.randint(1, 8), 14), cache)
    ended(folder, cache)
    return folder


def test_killed_and_stopped_and_resumed_is_bitwise_uninterrupted_in_parts(whole, torn):
    expected = programs.records(whole)
    assert [record["step"] for record in expected] == list(range(NUM_STEPS + 1))
    assert any(record.get("groups/pending", 0) > 0 for record in expected), "no groups were waiting: nothing is tested"
    assert programs.records(torn) == expected
    sampled = [(folder / "completions.jsonl").read_text() for folder in (whole, torn)]
    assert sampled[0] == sampled[1] and sampled[0].count("\n") > 100


def test_a_torn_run_leaves_all_files_and_evaluates_alone_as_in_the_loop(torn, cache):
    for name in ("learning_curve.png", "summary.json", "config.json", "completions.jsonl", "tensorboard"):
        assert (torn / name).exists(), name
    summary = json.loads((torn / "summary.json").read_text())
    assert summary["steps"] == NUM_STEPS
    assert summary["devices"].startswith(f"{NUM_DEVICES} x ") and summary["jax"] == jax.__version__

    status, output = programs.run("experiments.evaluate", f"--workdir={torn}", num_devices=NUM_DEVICES, cache=cache)
    assert status == 0, output
    results = json.loads((torn / "evaluation.json").read_text())
    assert results["step"] == NUM_STEPS
    alone = results["estimates"]["success"]["value"]
    assert alone == summary["success_after"], "evaluation alone disagrees with the one in the loop"


def test_another_config_is_refused_in_the_folder_of_a_run(torn, cache):
    status, output = programs.run("experiments.train", *flags(torn, "grpo"), num_devices=NUM_DEVICES, cache=cache)
    assert status == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "written by another config" in line and "--allow_config_change" in line
