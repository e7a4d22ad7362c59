"""Rewards that fork, daemonise, scribble, kill and fill memory: the others keep their scores, and no process is left."""

import os
import random
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import RewardConfig, ScoringConfig
from grpo_jax.errors import RunError
from grpo_jax.rewards.pool import keeper, protocol
from grpo_jax.rewards.pool.pool import ScoringPool
from grpo_jax.rewards.pool.protocol import ProtocolError, Reply, one_line, pack_reply, read_reply
from grpo_jax.rewards.pool.worker import Worker
from grpo_jax.rewards.reward_function import RewardFunction
from tests.test_scoring import ends, is_alive

# --- what is believed of a worker


def test_replies_come_back_as_they_were_sent():
    for scores, text in (([1.5], ""), ([0.0, float("nan"), -3.0], ""), ([], "é\n" * 9)):
        data = bytearray(pack_reply(7, scores, text) + b"next")
        reply = read_reply(data, 7, len(scores) or 5)
        assert reply is not None and reply.scores == pytest.approx(scores, nan_ok=True)
        assert reply.text == text and data == b"next"


def test_the_last_reply_of_a_worker_says_so():
    for is_last in (False, True):
        assert read_reply(bytearray(pack_reply(7, [1.0], is_last=is_last)), 7, 1).is_last == is_last


def test_a_reply_in_pieces_is_waited_for():
    whole = pack_reply(7, [1.0], "text")
    for cut in range(len(whole)):
        assert read_reply(bytearray(whole[:cut]), 7, 1) is None


@pytest.mark.parametrize(
    "data, says",
    [
        (pack_reply(8, [1.0]), "to job 8, not to 7"),
        (pack_reply(7, [1.0, 1.0]), "2 scores for 1 completions"),
        (pack_reply(7, [float("inf")]), "not finite"),
        (b"garbage", "no reply"),
        (b"\x80\x04", "no reply"),
        (protocol.REPLY.pack(protocol.MARK, 7, 0, 1 << 30), "1073741824 bytes"),
        (protocol.REPLY.pack(protocol.MARK, 7, 0, 2) + b"\xff\xfe", "not UTF-8"),
    ],
)
def test_anything_else_is_refused(data, says):
    with pytest.raises(ProtocolError, match=says):
        read_reply(bytearray(data), 7, 1)


def test_no_bytes_make_more_of_a_reply_than_it_is():
    rng, whole, kinds = random.Random(0), pack_reply(7, [1.0, 2.0], "text"), set()
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            reply = read_reply(data, 7, 2)
        except ProtocolError as error:
            kinds.add(type(error))
        else:
            kinds.add(type(reply))
            assert reply is None or (len(reply.scores) in (0, 2) and not np.isinf(reply.scores).any())
    assert kinds == {ProtocolError, Reply, type(None)}


def test_errors_become_one_short_printable_line():
    line = one_line("a\nb\x1b[31m\x07\x9b" + "x" * 10**6)
    assert line.startswith(r"a b\x1b[31m\x07\x9bxxx") and line.isprintable() and len(line) == protocol.MAX_LINE
    reply = read_reply(bytearray(pack_reply(7, [], "é" * 10**6 + "end")), 7, 1)
    assert reply is not None and reply.text.endswith("end") and "characters left out" in reply.text


# --- through worker processes

HOSTILE = r'''
import ctypes, os, pickle, signal, struct, subprocess, sys, tempfile, threading, time

def good(completion):
    return float(completion.startswith("a"))

def counts_in_its_row(completion, item):
    item["count"] = item.get("count", 0) + 1
    if "hangs" in completion:
        time.sleep(1000)
    return good(completion) if item["count"] == 1 else -1.0

def forks(completion, item):
    os.fork()
    return good(completion)

def forks_unseen(completion, item):
    ctypes.CDLL(None).fork()
    return good(completion)

def daemonise(file):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            with open(file, "a") as log:
                log.write(f"{os.getpid()}\n")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        os._exit(0)

def daemons(completion, item):
    daemonise(item["file"])
    if completion == "b die":
        os._exit(3)
    return good(completion)

def pipes():
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("pipe:"):
                yield int(name)
        except OSError:
            pass

class Evil:
    def __init__(self, file):
        self.file = file
    def __reduce__(self):
        return (os.system, (f"touch {self.file}",))

def scribbles(completion, item):
    if "!" in completion:
        body = pickle.dumps(Evil(item["file"]))
        for text in (b"garbage" * 9, struct.pack("<Q", len(body)) + body, b"\xffGJ1" + struct.pack("<QIIf", 5, 1, 0, 9.0)):
            for descriptor in pipes():
                try:
                    os.write(descriptor, text)
                except OSError:
                    pass
    return good(completion)

def late_scribbles(completion, item):
    """Bytes that come after its own reply, as if the next job had sent them."""
    if "!" in completion:
        def later(found=[*pipes()]):
            time.sleep(0.05)
            for descriptor in found:
                try:
                    os.write(descriptor, b"late")
                except OSError:
                    pass
        threading.Thread(target=later).start()
    time.sleep(0.03)
    return good(completion)

def kills_its_parent(completion, item):
    if "!" in completion:
        os.kill(os.getppid(), signal.SIGKILL)
    return good(completion)

def stops_its_parent(completion, item):
    daemonise(item["file"])
    os.kill(os.getppid(), signal.SIGSTOP)
    return good(completion)

def closes_everything(completion, item):
    os.closerange(3, 100)
    return good(completion)

def fills_memory(completion, item):
    return good(completion) + 0 * len(bytearray(10 * 2**30 if "!" in completion else 1))

def fills_the_disk(completion, item):
    if "!" in completion:
        with open(os.path.join(tempfile.gettempdir(), "full"), "wb") as file:
            file.write(bytes(2**22))
    assert not os.listdir(tempfile.gettempdir())
    return good(completion)

def dies_later(completion, item):
    if "!" in completion:
        threading.Timer(0.2, os._exit, [1]).start()
    elif "slow" in completion:
        time.sleep(0.6)
    return good(completion)

def loud(completion, item):
    raise RuntimeError("\x1b[31mred\x1b[0m\x1b]0;title\x07" + "x" * 10**6)

def executes(completion, item):
    exec(completion, {})
    return 1.0
'''


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """hostile(function, **fields of ScoringConfig) -> a RewardFunction of one function above, beside the part `exact`."""
    (tmp_path / "hostile.py").write_text(HOSTILE)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def make(name, **scoring):
        config = ScoringConfig(**{"time_limit_secs": 30.0, **scoring})
        made.append(RewardFunction(RewardConfig(task=f"hostile:{name}", shaping="exact", scoring=config), "jsonl", 10))
        return made[-1]

    yield make
    for each in made:
        each.close()


def score(function, completions_PG, file):
    items = [{"answer": "1", "file": str(file)} for _ in completions_PG]
    return function(items, completions_PG, np.ones((len(completions_PG), len(completions_PG[0]))))


def grid(num, last=()):
    return [[*(f"{'ab'[(p + g) % 2]} {g}" for g in range(4)), *last] for p in range(num)]


def rights(completions_PG):
    return np.array([[float(text.startswith("a")) for text in row] for row in completions_PG])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["forks", "forks_unseen", "closes_everything"])
def test_every_score_is_the_right_one_all_the_same(hostile, tmp_path, caplog, name):
    completions_PG = grid(12)
    for _ in range(2):
        reward = score(hostile(name), completions_PG, tmp_path / "none")
        np.testing.assert_array_equal(reward.task_PG, rights(completions_PG))
        assert np.all(reward.is_scored_PG) and reward.shaping_PG.sum() == 12
    # A second answer, of a forked child, would have cost the worker.
    assert name == "closes_everything" or not [said for said in caplog.messages if "was ended" in said]


@pytest.fixture
def together(monkeypatch):
    """Workers get all jobs of a prompt in one message, as those of a quick scorer do."""
    sent = []

    def send(worker, jobs, frame):
        sent.append(len(jobs))
        return original(worker, jobs, frame)

    original = Worker.send
    monkeypatch.setattr(Worker, "send", send)
    monkeypatch.setattr(ScoringPool, "_num_together", lambda *_: 99)
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scribbles", "kills_its_parent", "fills_memory"])
def test_a_fault_costs_its_own_job_and_none_that_was_sent_with_it(hostile, tmp_path, together, name):
    test_a_fault_costs_its_own_job_and_no_other(hostile, tmp_path, name)
    assert max(together) == 4


@pytest.mark.slow
def test_jobs_that_are_sent_together_are_apart(hostile, tmp_path, together):
    """Each has its own row, and those behind one that hangs are done by others."""
    completions_PG = [["a", "b", "a hangs", "a", "b"], ["a", "a", "b", "b", "a"]]
    reward = score(hostile("counts_in_its_row", num_workers=1, time_limit_secs=1.0), completions_PG, tmp_path / "none")
    is_hung_PG = np.array([["hangs" in text for text in row] for row in completions_PG])
    np.testing.assert_array_equal(np.asarray(reward.is_scored_PG), ~is_hung_PG)
    np.testing.assert_array_equal(reward.task_PG, rights(completions_PG) * ~is_hung_PG)
    assert together[0] == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scribbles", "late_scribbles", "kills_its_parent", "fills_memory"])
def test_a_fault_costs_its_own_job_and_no_other(hostile, tmp_path, name):
    """Its own only where the worker has no reply any more; nothing that was written is executed."""
    completions_PG = grid(8)
    completions_PG[3][2] = completions_PG[6][1] = "a !"
    reward = score(hostile(name), completions_PG, tmp_path / "pwned")
    is_hostile_PG = np.array([["!" in text for text in row] for row in completions_PG])
    is_scored_PG = np.asarray(reward.is_scored_PG)
    assert is_scored_PG[~is_hostile_PG].all()
    # A worker whose keeper is killed may still answer before it follows.
    if name != "kills_its_parent":
        assert (is_scored_PG[is_hostile_PG] == (name == "late_scribbles")).all()
    expected_PG = np.where(is_scored_PG, rights(completions_PG), 0)
    np.testing.assert_array_equal(reward.task_PG, expected_PG)
    np.testing.assert_array_equal(reward.shaping_PG, [[float(text.endswith("1")) for text in row] for row in completions_PG])
    assert not (tmp_path / "pwned").exists()


@pytest.mark.slow
def test_a_job_is_not_to_blame_for_what_one_before_has_set_up(hostile, tmp_path):
    completions_PG = [["a !", "a slow", "b slow", "a !", "a slow"]]
    reward = score(hostile("dies_later", num_workers=1), completions_PG, tmp_path / "none")
    np.testing.assert_array_equal(reward.task_PG, rights(completions_PG))
    assert np.all(reward.is_scored_PG)


@pytest.mark.slow
def test_what_fills_the_disk_is_out_of_the_way_of_those_that_were_sent_with_it(hostile, tmp_path, together, monkeypatch):
    test_what_fills_the_disk_is_out_of_the_way_of_the_next(hostile, tmp_path, monkeypatch)
    assert together[0] == 6


@pytest.mark.slow
def test_what_fills_the_disk_is_out_of_the_way_of_the_next(hostile, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    function = hostile("fills_the_disk", num_workers=1, file_limit_mb=1)
    completions_PG = [["a", "b !", "a", "a !", "b", "a"]]
    reward = score(function, completions_PG, tmp_path / "none")
    is_hostile_PG = np.array([["!" in text for text in row] for row in completions_PG])
    np.testing.assert_array_equal(np.asarray(reward.is_scored_PG), ~is_hostile_PG)
    np.testing.assert_array_equal(reward.task_PG, rights(completions_PG) * ~is_hostile_PG)
    function.close()
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(("hostile", "__"))] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["daemons", "stops_its_parent"])
def test_no_daemon_outlives_the_pool(hostile, tmp_path, name, monkeypatch):
    """Nor one whose worker ended before, nor one whose keeper was stopped."""
    monkeypatch.setattr("grpo_jax.rewards.pool.worker.LEAVE_SECS", 1.0)
    function = hostile(name, num_workers=2)
    reward = score(function, grid(3, ["b die"]), tmp_path / "pids")
    np.testing.assert_array_equal(reward.task_PG, rights(grid(3, ["b die"])))
    function.close()
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert 12 <= len(pids) <= 18  # one may be killed before it has written its number; three jobs may be done twice
    assert all(ends(pid, within_secs=5.0) for pid in pids)


TRAINER = """
    import sys, time
    sys.path[:0] = {path!r}
    import numpy as np
    from grpo_jax.config import RewardConfig
    from grpo_jax.rewards.reward_function import RewardFunction
    function = RewardFunction(RewardConfig(task="hostile:daemons"), "jsonl", 10)
    function([{{"answer": "", "file": {file!r}}}], [["a", "b"]], np.ones((1, 2)))
    print("scored", flush=True)
    time.sleep(1000)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells a process of its parent's end")
def test_no_daemon_outlives_a_trainer_that_is_killed(hostile, tmp_path):
    code = TRAINER.format(path=[str(Path(__file__).parents[1]), str(tmp_path)], file=str(tmp_path / "pids"))
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None and trainer.stdout.readline() == "scored\n"
        time.sleep(0.2)
        pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 2 and all(map(is_alive, pids))
        trainer.send_signal(signal.SIGKILL)
    assert all(ends(pid, within_secs=10.0) for pid in pids)


@pytest.mark.slow
def test_what_a_reward_says_does_not_reach_the_terminal_as_it_is(hostile, tmp_path, caplog):
    function = hostile("loud")
    function.errors_folder = tmp_path / "errors"
    with pytest.raises(RunError) as caught:
        score(function, [["a", "b"]], tmp_path / "none")
    for text in (str(caught.value), *caplog.messages):
        assert text.isprintable() and len(text) < 700 and r"RuntimeError: \x1b[31mred" in text
    kept = (tmp_path / "errors" / "hostile_loud.txt").read_text()
    assert "in loud" in kept and "\x1b" not in kept and len(kept) < 50_000


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is read from /proc")
def test_a_limit_on_memory_below_the_configured_one_is_kept_and_said(hostile, tmp_path):
    """`ulimit -v`: every worker would have to raise it, which it may not."""
    code = """
        import resource, sys
        sys.path[:0] = {path!r}
        resource.setrlimit(resource.RLIMIT_AS, ({limit}, {limit}))
        import logging
        import numpy as np
        from grpo_jax.config import ScoringConfig
        from grpo_jax.rewards.pool.pool import Scorer, ScoringPool
        logging.basicConfig(format="%(message)s")
        pool = ScoringPool({{"it": Scorer("hostile:fills_memory", {{}})}}, ScoringConfig(num_workers=1, memory_limit_mb=8192))
        scored = pool.score([{{}}], [["a", "!", "b"]])
        print(scored.scores["it"].tolist(), scored.is_error_PG.tolist())
        pool.close()
    """
    code = code.format(path=[str(Path(__file__).parents[1]), str(tmp_path)], limit=6 * 2**30)
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, timeout=120)
    assert done.stdout == "[[1.0, 0.0, 0.0]] [[False, True, False]]\n", done.stderr
    assert "memory_limit_mb = 8192 is more than `ulimit -v` leaves: scoring processes have 6144 MiB each" in done.stderr


def test_a_process_without_an_environment_yet_may_be_one_of_a_worker():
    """Between fork and the new program's first step its environment is empty: the sweep after a killed keeper comes again."""
    sleepers = [subprocess.Popen(["/bin/sleep", "60"], env=env) for env in ({keeper.MARK: "mine"}, {})]
    found, deadline = ([], False), time.monotonic() + 20
    try:
        while found != ([sleepers[0].pid], True) and time.monotonic() < deadline:
            found = keeper.marked("mine")
    finally:
        for process in sleepers:
            process.kill()
            process.wait()
    assert found == ([sleepers[0].pid], True) and not keeper.marked("mine")[0]
