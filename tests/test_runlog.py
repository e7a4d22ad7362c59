"""What is said while a run goes on."""

import pytest

from grpo_jax.training import runlog


def test_the_time_left_leaves_out_what_compiling_took(monkeypatch, capsys):
    """One step that compiles for 100 s, then 2 s each, on a screen that is none."""
    now = [0.0]
    monkeypatch.setattr(runlog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(runlog, "PLAIN_LINE_EVERY_SECS", 4.0)
    line = runlog.ProgressLine(10, 20)
    line.update(10, {"eval/success": 0.25})
    for step in range(11, 21):
        now[0] += 100.0 if step == 11 else 2.0
        line.update(step, {"reward/mean": 0.5})
    line.close()
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == "step 10/20  held-out 0.25" and shown[1] == "step 11/20  reward 0.50  held-out 0.25"
    assert [text.rpartition("  left ")[2] for text in shown[2:]] == ["14 s", "10 s", "6 s", "2 s", "0 s"]


@pytest.mark.parametrize("start", [0, 5])
def test_a_run_that_ends_at_once_has_nothing_left(capsys, start):
    line = runlog.ProgressLine(start, start + 1)
    line.update(start + 1, {"reward/mean": 1.0})
    line.close()
    assert capsys.readouterr().err.splitlines() == [f"step {start + 1}/{start + 1}  reward 1.00"]
