"""Signals: the first one lets the loop save, a second Ctrl-C ends at once, and what was ignored stays ignored."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.signals import StopSignal
from tests import programs, signals_program
from tests.campaigns.common import write_host_data
from tests.test_resume import wait_for_step

PROGRAM = """
import os, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background
from grpo_jax.training.signals import StopSignal
with StopSignal() as stop:
    stop.doing = "step 7"
    os.kill(os.getpid(), signal.{first})
    assert stop.is_set
    print("noted", flush=True)
    os.kill(os.getpid(), signal.{second})
    time.sleep(0.1)
print("went on")
"""


@pytest.fixture(autouse=True)
def nothing_ignored():
    """A shell has what it starts in the background ignore SIGINT, and nohup SIGHUP."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_taken_note_of_and_says_what_is_waited_for(capfd, number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        stop.doing = "step 41 is scored"
        assert not stop.is_set
        os.kill(os.getpid(), number)
        assert stop.is_set
    assert signal.getsignal(number) == before
    assert f"{number.name}: saves and ends after step 41 is scored; Ctrl-C from now on ends at once" in capfd.readouterr().err


def test_what_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.is_set
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("first", "second", "status", "printed"),
    [("SIGINT", "SIGINT", -signal.SIGINT, "noted\n"), ("SIGTERM", "SIGTERM", 0, "noted\nwent on\n")],
)
def test_a_second_ctrl_c_ends_at_once_and_a_second_sigterm_does_not(first, second, status, printed):
    command = [sys.executable, "-c", PROGRAM.format(first=first, second=second)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, printed), done.stderr


@pytest.mark.slow
def test_a_real_run_saves_and_ends_at_the_first_signal_and_at_once_at_the_second_ctrl_c(tmp_path):
    """SIGINT, SIGHUP, then SIGTERM and SIGINT while a reward hangs."""
    (tmp_path / "settings.json").write_text(json.dumps(write_host_data(tmp_path)))
    process = programs.start("tests.signals_program", str(tmp_path), "interrupted", "left", "hung")
    lines = iter(process.stdout.readline, "")
    for name, number in (("interrupted", signal.SIGINT), ("left", signal.SIGHUP)):
        wait_for_step(process, tmp_path / name, 2)
        process.send_signal(number)
        said = list(itertools.takewhile(lambda line, end=f"{name}: saved": not line.startswith(end), lines))
        last = programs.records(tmp_path / name)[-1]["step"]
        assert saved_steps(tmp_path / name) == [last] and 2 <= last < signals_program.NUM_STEPS
        assert programs.summary(tmp_path / name)["steps"] == last
        assert any(f"{number.name}: saves and ends after step" in line for line in said)
    wait_for_step(process, tmp_path / "hung", 2)
    (tmp_path / "hang").touch()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    said = next(line for line in lines if line.startswith("SIGTERM"))
    assert "is sampled, scored and trained on (config.reward.scoring.time_limit_secs = 600 for an answer)" in said
    time.sleep(0.5)
    assert process.poll() is None, "it did not wait"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == -signal.SIGINT
    process.stdout.close()
    assert saved_steps(tmp_path / "hung") == []
