"""Killed at any step and started again, a run leaves the very records of one that was never disturbed."""

import json
import os
import random
import signal
import time

import jax
import pytest

from tests import programs

NUM_STEPS = 24


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def flags(workdir, variant="dapo"):
    return [
        f"--config=configs/{variant}.py:runlocal",
        f"--workdir={workdir}",
        f"--config.num_steps={NUM_STEPS}",
        "--config.eval_every=12",
        "--config.checkpoint.every=4",
    ]


def wait_for_step(process, workdir, step):
    """Until the run's log has reached `step`."""
    for _ in range(15_000):
        if (workdir / "metrics.jsonl").exists() and f'"step": {step},' in (workdir / "metrics.jsonl").read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


@pytest.mark.parametrize("num_devices", [1, 8])
def test_killed_and_resumed_is_bitwise_uninterrupted(tmp_path, cache, num_devices):
    """On 8 devices with weights, optimizer state and caches in parts."""
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.fsdp_min_elements=0"] if num_devices > 1 else []
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    status, output = programs.run("experiments.train", *flags(whole), *mesh, num_devices=num_devices, cache=cache)
    assert status == 0, output
    expected = programs.records(whole)
    assert [record["step"] for record in expected] == list(range(NUM_STEPS + 1))
    assert any(record.get("groups/pending", 0) > 0 for record in expected), "no groups were waiting: nothing is tested"

    kill_after = random.Random(os.urandom(8)).choice([4, 8, 12, 16])
    process = programs.start("experiments.train", *flags(torn), *mesh, num_devices=num_devices, cache=cache)
    wait_for_step(process, torn, kill_after)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    status, output = programs.run("experiments.train", *flags(torn), *mesh, num_devices=num_devices, cache=cache)
    assert status == 0, output
    assert programs.records(torn) == expected, f"killed after step {kill_after}"
    sampled = [(d / "completions.jsonl").read_text() for d in (whole, torn)]
    assert sampled[0] == sampled[1] and sampled[0].count("\n") > 100


def test_sigterm_saves_and_exits_zero_and_the_same_command_goes_on(tmp_path, cache):
    workdir = tmp_path / "run"
    process = programs.start("experiments.train", *flags(workdir), cache=cache)
    wait_for_step(process, workdir, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    stopped_at = programs.records(workdir)[-1]["step"]
    assert 5 <= stopped_at < NUM_STEPS
    assert (workdir / "checkpoints" / str(stopped_at)).is_dir()

    status, output = programs.run("experiments.train", *flags(workdir), cache=cache)
    assert status == 0, output
    assert [record["step"] for record in programs.records(workdir)] == list(range(NUM_STEPS + 1))
    for name in ("learning_curve.png", "summary.json", "config.json", "completions.jsonl", "tensorboard"):
        assert (workdir / name).exists(), name
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["steps"] == NUM_STEPS
    assert summary["devices"].startswith("1 x ") and summary["jax"] == jax.__version__

    status, output = programs.run("experiments.evaluate", f"--workdir={workdir}", cache=cache)
    assert status == 0, output
    results = json.loads((workdir / "evaluation.json").read_text())
    assert results["step"] == NUM_STEPS
    alone = results["estimates"]["success"]["value"]
    assert alone == summary["success_after"], "evaluation alone disagrees with the one in the loop"

    status, output = programs.run("experiments.train", *flags(workdir, "grpo"), cache=cache)
    assert status == 2
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert "written by another config" in line and "--allow_config_change" in line
