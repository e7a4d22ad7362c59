"""A program that nobody hears any more goes on: its terminal or reader is gone, its log is full, it never had any."""

import os
import pty
import subprocess
import sys
import threading

import pytest

from grpo_jax import files
from grpo_jax.tools import cli

# It speaks by Python and by the descriptor, then does what it is for.
PROGRAM = """
import contextlib, os, sys
from grpo_jax.screen import keep_standard_streams
keep_standard_streams()
sys.stdin and sys.stdin.readline()
for _ in range(3):
    for stream in (sys.stdout, sys.stderr):
        print("x" * 9999, file=stream, flush=True)
with open(sys.argv[1], "w") as file:
    file.write(f"went on, file {file.fileno()}")
with contextlib.suppress(OSError):
    os.write(2, b"by number")
"""


def start(path, **pipes):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], **pipes)


def test_without_a_reader_or_a_terminal(tmp_path):
    process = start(tmp_path / "pipe", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(30) == 0
    terminal, end = pty.openpty()
    process = start(tmp_path / "terminal", stdin=subprocess.PIPE, stdout=end, stderr=end)
    os.close(end)
    os.close(terminal)
    process.stdin.close()
    assert process.wait(30) == 0
    for name in ("pipe", "terminal"):
        assert (tmp_path / name).read_text().startswith("went on")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_with_a_log_that_is_full(tmp_path):
    with open("/dev/full", "wb") as full:
        assert start(tmp_path / "full", stdin=subprocess.DEVNULL, stdout=full, stderr=full).wait(30) == 0
    assert (tmp_path / "full").exists()


def test_what_is_closed_from_the_start_is_no_place_for_a_file(tmp_path):
    shell = f'exec "{sys.executable}" -c "$PROGRAM" {tmp_path}/closed 0<&- 1>&- 2>&-'
    subprocess.run(["sh", "-c", shell], env=dict(os.environ, PROGRAM=PROGRAM), check=True, timeout=30)
    said = (tmp_path / "closed").read_text()
    assert said.startswith("went on") and int(said.split()[-1]) > 2


def test_what_is_heard_is_heard(tmp_path):
    process = start(tmp_path / "heard", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=30)
    assert out == b"x" * 9999 + b"\n" + (b"x" * 9999 + b"\n") * 2 and err == out + b"by number"


def test_a_thread_that_meets_a_full_disk_says_so_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(files, "_said", set())
    fault = OSError(28, "No space left on device", "events.out")
    for error in (fault, ValueError("a bug")):
        cli._on_thread_fault(threading.ExceptHookArgs((type(error), error, error.__traceback__, threading.current_thread())))
        said = capsys.readouterr().err
        if error is fault:
            assert said == "note: a thread that writes in the background has ended: No space left on device (events.out)\n"
        else:
            assert "Exception in thread" in said and "a bug" in said
