"""The scoring pool under scorers that raise, print, crash, hang and lie; no fault may cost more than its own item."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_jax.config import ScoringConfig
from grpo_jax.errors import UserError
from grpo_jax.rewards.pool.pool import Scorer, ScoringPool

pytestmark = pytest.mark.slow

SCORERS = '''
import os, sys, time

def length(completion, item):
    """The scorer most tests use: a number that tells items apart, and every fault on demand."""
    if completion == "raise":
        raise RuntimeError("two\\nlines")
    if completion == "crash":
        os._exit(7)
    if completion == "leave":
        sys.exit("no more")
    if completion == "hang":
        while True:
            time.sleep(60)
    if completion == "return":
        return item["value"]
    if completion == "print":
        print("\\0" * 50_000, flush=True)
        os.write(1, b"\\xff" * 50_000)
        input_is_empty = sys.stdin.read() == ""
        return float(input_is_empty)
    return len(completion) + item.get("plus", 0.0)

def pid(completion, item):
    return os.getpid()

def slow_pid(completion, item):
    time.sleep(0.5)
    return os.getpid()

def has_jax(completion, item):
    return "jax" in sys.modules

def pid_to_file(completion, item):
    with open(item["file"], "w") as file:
        file.write(str(os.getpid()))
    while True:
        time.sleep(60)

def hang(completion, item):
    time.sleep(1000)

def text_first(text, item):
    return 1.0

not_a_function = 3
'''


class OneScorer:
    """A pool of one scorer, asked about lists of items with one completion each."""

    def __init__(self, function: str, num_workers: int = 2, time_limit_secs: float = 30.0, memory_limit_mb: int = 4096) -> None:
        config = ScoringConfig(num_workers=num_workers, time_limit_secs=time_limit_secs, memory_limit_mb=memory_limit_mb)
        self.pool = ScoringPool({"it": Scorer(function, {})}, config)

    def score(self, items: Sequence[Any], completions: Sequence[str]) -> tuple[np.ndarray, int, int]:
        """-> (scores, number of errors, number of timeouts)"""
        scored = self.pool.score(items, [[completion] for completion in completions])
        return scored.scores["it"].reshape(-1), int(scored.is_error_PG.sum()), int(scored.is_timeout_PG.sum())

    def close(self) -> None:
        self.pool.close()


MakePool = Callable[..., OneScorer]


@pytest.fixture
def make_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakePool]:
    """Builds pools over the scorers above and closes them."""
    (tmp_path / "scorers_under_test.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    pools = []

    def make(function: str = "length", **settings: Any) -> OneScorer:
        pools.append(OneScorer(f"scorers_under_test:{function}", **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for yet (state Z, seen on Linux) does not."""
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat")
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def ends(pid: int, within_secs: float) -> bool:
    deadline = time.monotonic() + within_secs
    while time.monotonic() < deadline:
        if not is_alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_scores_are_in_order_whatever_the_number_of_workers(make_pool: MakePool) -> None:
    completions = ["x" * (i * 37 % 101) for i in range(200)]
    completions[17] = completions[99] = "raise"
    items = [{"plus": float(i)} for i in range(200)]
    expected = [0.0 if text == "raise" else len(text) + i for i, text in enumerate(completions)]
    for num_workers in (1, 2, 5):
        scores, num_errors, num_timeouts = make_pool(num_workers=num_workers).score(items, completions)
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(scores, expected)
        assert (num_errors, num_timeouts) == (2, 0)


def test_no_items_start_no_process(make_pool: MakePool) -> None:
    scores, num_errors, num_timeouts = make_pool().score([], [])
    assert scores.shape == (0,) and (num_errors, num_timeouts) == (0, 0)


def test_large_and_odd_text_arrives_whole(make_pool: MakePool) -> None:
    completions = ["x" * (1 << 20), "\0" * 7, "", "\ud800", "\u2028\r\n", "é" * 200_000]
    scores, num_errors, num_timeouts = make_pool().score([{}] * 6, completions)
    np.testing.assert_array_equal(scores, [1 << 20, 7, 0, 1, 3, 200_000])
    assert (num_errors, num_timeouts) == (0, 0)


def test_exceptions_crashes_and_exits_cost_one_item_each(make_pool: MakePool) -> None:
    pool = make_pool()
    completions = ["a", "raise", "bb", "crash", "ccc", "leave", "dddd", "crash", "eeeee"]
    for _ in range(2):
        scores, num_errors, num_timeouts = pool.score([{}] * 9, completions)
        np.testing.assert_array_equal(scores, [1, 0, 2, 0, 3, 0, 4, 0, 5])
        assert (num_errors, num_timeouts) == (4, 0)


def test_what_is_no_finite_number_is_an_error(make_pool: MakePool) -> None:
    values = [float("nan"), float("inf"), 1e300, {}, "1", b"1", [1.0], 1j, True, 2, np.float32(0.5), np.int64(3)]
    scores, num_errors, _ = make_pool().score([{"value": value} for value in values], ["return"] * len(values))
    np.testing.assert_array_equal(scores, [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0.5, 3])
    assert num_errors == 8


def test_none_is_no_opinion_and_no_error(make_pool: MakePool) -> None:
    values = [None, {"score": None}, {"score": 2, "acc": 1}, 0.0]
    scored = make_pool().pool.score([{"value": value} for value in values], [["return"]] * len(values))
    np.testing.assert_array_equal(scored.scores["it"][:, 0], [0, 0, 2, 0])
    np.testing.assert_array_equal(scored.is_abstained_PG[:, 0], [True, True, False, False])
    assert not scored.is_error_PG.any() and not scored.is_timeout_PG.any()


def test_prints_do_not_reach_the_frames(make_pool: MakePool, capfd: pytest.CaptureFixture[str]) -> None:
    completions = ["print", "abc"] * 5
    scores, num_errors, _ = make_pool(num_workers=1).score([{}] * 10, completions)
    np.testing.assert_array_equal(scores, [1, 3] * 5)
    assert num_errors == 0
    captured = capfd.readouterr()
    assert captured.out == "" and len(captured.err) >= 5 * 50_000


def test_failures_are_named_once(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool()
    pool.score([{}] * 3, ["raise", "crash", "raise"])
    pool.score([{}], ["raise"])
    assert len(caplog.messages) == 1
    assert "RuntimeError" in caplog.text or "exit code 7" in caplog.text


def test_hung_item_times_out_and_the_rest_is_scored(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=1, time_limit_secs=1.0)
    for _ in range(2):
        scores, num_errors, num_timeouts = pool.score([{}] * 4, ["a", "hang", "ccc", "dddd"])
        np.testing.assert_array_equal(scores, [1, 0, 3, 4])
        assert (num_errors, num_timeouts) == (0, 1)


def test_hung_items_are_waited_out_side_by_side(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=2, time_limit_secs=1.5)
    completions = ["hang" if i % 20 == 3 else "ab" for i in range(400)]
    began = time.monotonic()
    scores, num_errors, num_timeouts = pool.score([{}] * 400, completions)
    elapsed_secs = time.monotonic() - began
    assert (num_errors, num_timeouts) == (0, 20)
    np.testing.assert_array_equal(scores, [0 if text == "hang" else 2 for text in completions])
    assert elapsed_secs < 12.0  # one after the other on two workers: 15 s


def test_scorer_that_always_hangs_costs_a_bounded_time(make_pool: MakePool) -> None:
    began = time.monotonic()
    scores, num_errors, num_timeouts = make_pool("hang", time_limit_secs=0.5).score([{}] * 2000, ["a"] * 2000)
    assert (num_errors, num_timeouts) == (0, 2000) and not scores.any()
    assert time.monotonic() - began < 60.0  # one after the other: 500 s


def test_processes_are_kept_and_the_number_returns_to_num_workers(make_pool: MakePool) -> None:
    pool = make_pool("pid", num_workers=2)
    pids = {pid for _ in range(5) for pid in pool.score([{}] * 50, ["a"] * 50)[0]}
    assert 1 <= len(pids) <= 2 and all(pids)
    slow_pool = make_pool("slow_pid", num_workers=2, time_limit_secs=2.0)
    pids = {int(pid) for pid in slow_pool.score([{}] * 10, ["a"] * 10)[0]}
    assert len(pids) > 2 and all(pids)  # slow enough for spare workers
    assert sum(map(is_alive, pids)) <= 2


def test_idle_process_killed_from_outside_costs_nothing(make_pool: MakePool) -> None:
    pool = make_pool("pid", num_workers=1)
    (pid,) = pool.score([{}], ["a"])[0]
    os.kill(int(pid), signal.SIGKILL)
    assert ends(int(pid), within_secs=10.0)
    scores, num_errors, num_timeouts = pool.score([{}] * 3, ["a"] * 3)
    assert (num_errors, num_timeouts) == (0, 0)
    assert scores.all() and pid not in scores


def test_a_worker_does_not_import_jax(make_pool: MakePool) -> None:
    assert make_pool("has_jax").score([{}], ["a"])[0] == [0.0]


def test_thread_that_asked_may_end(make_pool: MakePool) -> None:
    pool, pids = make_pool("pid", num_workers=1), []
    for _ in range(2):
        thread = threading.Thread(target=lambda: pids.append(pool.score([{}], ["a"])[0][0]))
        thread.start()
        thread.join()
        time.sleep(0.1)
    assert len(pids) == 2 and pids[0] == pids[1]


def test_close_leaves_no_process(make_pool: MakePool) -> None:
    pool = make_pool("pid", num_workers=3)
    pids = {int(pid) for pid in pool.score([{}] * 300, ["a"] * 300)[0]}
    assert pids and all(map(is_alive, pids))
    pool.close()
    pool.close()
    assert not any(map(is_alive, pids))
    with pytest.raises(UserError, match="closed"):
        pool.score([{}], ["a"])


def test_forgotten_pool_leaves_no_process(make_pool: MakePool, tmp_path: Path) -> None:
    pool = OneScorer("scorers_under_test:pid", num_workers=1)
    pid = int(pool.score([{}], ["a"])[0][0])
    del pool
    assert ends(pid, within_secs=10.0)


PARENT = """
    import sys, threading
    sys.path[:0] = [{root!r}, {scorers!r}]
    from tests.test_scoring import OneScorer
    pool = OneScorer("scorers_under_test:" + sys.argv[1], num_workers=1, time_limit_secs=1000.0)
    if sys.argv[1] == "pid":
        print(int(pool.score([{{}}], ["a"])[0][0]), flush=True)
    else:
        pool.score([{{"file": {file!r}}}], ["a"])
"""


def parent_process(function: str, tmp_path: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[1]
    code = textwrap.dedent(PARENT).format(root=str(root), scorers=str(tmp_path), file=str(tmp_path / "pid"))
    return subprocess.Popen([sys.executable, "-c", code, function], stdout=subprocess.PIPE, text=True)


def test_exit_of_the_interpreter_leaves_no_process(make_pool: MakePool, tmp_path: Path) -> None:
    with parent_process("pid", tmp_path) as parent:
        output = parent.communicate(timeout=60)[0]
    assert parent.returncode == 0
    assert ends(int(output), within_secs=10.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can end a process with its parent")
def test_hung_worker_dies_with_a_killed_parent(make_pool: MakePool, tmp_path: Path) -> None:
    with parent_process("pid_to_file", tmp_path) as parent:
        deadline = time.monotonic() + 60.0
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        parent.kill()
    assert ends(int((tmp_path / "pid").read_text()), within_secs=10.0)


@pytest.mark.parametrize(
    "scorer, reason",
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("scorers_under_test:no_such_function", "no_such_function"),
        ("scorers_under_test:not_a_function", "not a function"),
        ("scorers_under_test:text_first", "call it `completion`"),
    ],
)
def test_scorer_that_cannot_be_imported_is_named(make_pool: MakePool, scorer: str, reason: str) -> None:
    pool = OneScorer(scorer, num_workers=1)
    with pytest.raises(UserError, match=reason) as caught:
        pool.score([{}] * 3, ["a"] * 3)
    assert scorer in str(caught.value) and "\n" not in str(caught.value)
    pool.close()


def test_scorer_whose_import_ends_the_process_is_named(make_pool: MakePool, tmp_path: Path) -> None:
    (tmp_path / "ends_at_import.py").write_text("import os\nos._exit(9)\n")
    pool = OneScorer("ends_at_import:f", num_workers=1)
    with pytest.raises(UserError, match="exit code 9"):
        pool.score([{}], ["a"])
    pool.close()


def test_item_that_cannot_travel_leaves_the_pool_usable(make_pool: MakePool) -> None:
    pool = make_pool(num_workers=1)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pool.score([{}, {"f": threading.Lock()}], ["a", "b"])
    np.testing.assert_array_equal(pool.score([{}], ["abc"])[0], [3])
