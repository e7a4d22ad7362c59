"""The lock of a run's folder: one process has it, the dead and the silent lose it, and nobody takes it from the living."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from grpo_jax import files
from grpo_jax.errors import RunError, UserError
from grpo_jax.training import lock as lock_lib
from grpo_jax.training.disk import require_place
from grpo_jax.training.lock import NAME, Owner, held


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files, "_said", set())
    monkeypatch.setattr(lock_lib, "BEAT_SECS", 0.02)
    monkeypatch.setattr(lock_lib, "SILENT_SECS", 0.3)


def write_owner(folder, **changes):
    (folder / NAME).write_text(json.dumps(dataclasses.asdict(dataclasses.replace(Owner.myself(), **changes))))


def test_a_held_folder_is_refused_and_a_released_one_is_not(tmp_path):
    with held(tmp_path / "run"):
        with pytest.raises(UserError, match=rf"run/lock: process {os.getpid()} on .* is at work"), held(tmp_path / "run"):
            pass
        assert [path.name for path in (tmp_path / "run").iterdir()] == [NAME]
    assert not list((tmp_path / "run").iterdir())
    with held(tmp_path / "run"):
        pass


def test_a_dead_owner_loses_it_at_once_also_if_his_pid_came_again(tmp_path, capsys):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True)
    for changes in ({"pid": int(done.stdout)}, {"start": "1"}):
        write_owner(tmp_path, **changes)
        with held(tmp_path):
            pass
        assert "is gone without having removed it" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\xff"])
def test_a_damaged_lock_is_the_silent_one_of_nobody(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    with held(tmp_path):
        assert (tmp_path / NAME).read_bytes() != content  # it is ours now
    assert not (tmp_path / NAME).exists()


def test_an_owner_elsewhere_keeps_it_while_he_touches_it(tmp_path):
    write_owner(tmp_path, machine="elsewhere", host="node7")
    stop = threading.Event()

    def beat():
        while not stop.wait(0.05):
            os.utime(tmp_path / NAME)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="on node7 is at work in this folder"), held(tmp_path):
            pass
    finally:
        stop.set()
        thread.join()
    with held(tmp_path):  # he is silent now
        pass


def test_one_who_was_taken_for_dead_notices_and_leaves_the_new_owners_lock_alone(tmp_path):
    with held(tmp_path) as lock:
        lock.check()
        write_owner(tmp_path, host="node7")
        lock._thread.join(0.2)
        with pytest.raises(RunError, match="another process took this folder"):
            lock.check()
    assert "node7" in (tmp_path / NAME).read_text()


def test_of_many_who_break_one_dead_owners_lock_one_has_it(tmp_path):
    write_owner(tmp_path, start="1")
    results, everybody = [], threading.Barrier(8)

    def grab():
        everybody.wait()
        try:
            with held(tmp_path):
                results.append("had it")
                # Until all others were refused: on a busy machine they may be late.
                end = time.monotonic() + 60
                while len(results) < len(threads) and time.monotonic() < end:
                    time.sleep(0.01)
        except UserError:
            results.append("refused")

    threads = [threading.Thread(target=grab) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(results) == ["had it"] + ["refused"] * 7
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named_before_anything_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    for name, reason in (
        ("file", "file is no folder"),
        ("file/run", "file is no folder"),
        ("run", "metrics.jsonl there is a folder"),
        ("a" * 300, "File name too long"),
    ):
        with pytest.raises(UserError, match=rf"^--workdir=.*: cannot be written \(.*{reason}\); choose another folder$"):
            require_place(tmp_path / name)
    require_place(tmp_path / "new" / "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
