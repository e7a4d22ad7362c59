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
        "--config.warm_start.num_steps=100",
    ]


def wait_for_step(process, workdir, step):
    """Until the run's log has reached `step`."""
    for _ in range(15_000):
        if (workdir / "metrics.jsonl").exists() and f'"step": {step},' in (workdir / "metrics.jsonl").read_text():
            return
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.02)
    raise AssertionError(f"step {step} never came")


def unbroken(workdir, *args, **kwargs):
    """-> the records of a run that nobody disturbs."""
    status, output = programs.run("experiments.train", *flags(workdir), *args, **kwargs)
    assert status == 0, output
    expected = programs.records(workdir)
    assert [record["step"] for record in expected] == list(range(NUM_STEPS + 1))
    assert any(record.get("groups/pending", 0) > 0 for record in expected), "no groups were waiting: nothing is tested"
    return expected


def killed(workdir, step, *args, **kwargs):
    """Start the run, or go on with it, and kill it when it has come to `step`."""
    process = programs.start("experiments.train", *flags(workdir), *args, **kwargs)
    wait_for_step(process, workdir, step)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_same_run(torn, whole, expected):
    assert programs.records(torn) == expected
    sampled = [(folder / "completions.jsonl").read_text() for folder in (whole, torn)]
    assert sampled[0] == sampled[1] and sampled[0].count("\n") > 100


def test_killed_and_resumed_is_bitwise_uninterrupted_in_parts(tmp_path, cache):
    """On 8 devices with weights, optimizer state and caches in parts."""
    mesh = ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.mesh.fsdp_min_elements=0"]
    whole, torn, on_eight = tmp_path / "whole", tmp_path / "torn", {"num_devices": 8, "cache": cache}
    expected = unbroken(whole, *mesh, **on_eight)
    killed(torn, random.Random(os.urandom(8)).choice([4, 8, 12, 16]), *mesh, **on_eight)
    status, output = programs.run("experiments.train", *flags(torn), *mesh, **on_eight)
    assert status == 0, output
    assert_same_run(torn, whole, expected)


def test_sigterm_then_a_kill_and_the_same_command_ends_bitwise_as_uninterrupted(tmp_path, cache):
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    expected = unbroken(whole, cache=cache)
    process = programs.start("experiments.train", *flags(workdir), cache=cache)
    wait_for_step(process, workdir, 5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    stopped_at = programs.records(workdir)[-1]["step"]
    assert 5 <= stopped_at < NUM_STEPS
    assert (workdir / "checkpoints" / str(stopped_at)).is_dir()

    killed(workdir, min(stopped_at + random.Random(os.urandom(8)).randint(1, 10), 18), cache=cache)
    status, output = programs.run("experiments.train", *flags(workdir), cache=cache)
    assert status == 0, output
    assert_same_run(workdir, whole, expected)
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
