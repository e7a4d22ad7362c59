"""The parts that ask others: programs run against tests, and an endpoint that judges, here one that the test starts."""

import contextlib
import http.server
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_jax.config import JudgeConfig, RewardConfig
from grpo_jax.errors import UserError
from grpo_jax.rewards.pool.pool import Context
from grpo_jax.rewards.reward_function import RewardFunction
from grpo_jax.rewards.scorers import sandbox
from grpo_jax.rewards.scorers.code import code_score, is_same, last_block, read_tests
from grpo_jax.rewards.scorers.judge import as_text, fill, judge_score, judge_scores
from tests import tiny
from tests.test_scoring import ends

# --- code: what is run, and by which tests


def block(code, before="Here it is.\n", language="python"):
    return f"{before}```{language}\n{code}\n```\n"


@pytest.mark.parametrize(
    "completion, code",
    [
        (block("x = 1"), "x = 1\n"),
        (block("x = 1") + "or rather\n" + block("x = 2", language=""), "x = 2\n"),
        (block("x = 1") + block("ls", language="bash"), "x = 1\n"),
        ("```python\nx = 1", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_the_last_block_is_the_program(completion, code):
    assert last_block(completion) == code


def test_tests_in_the_layouts_that_data_sets_have():
    assert read_tests("assert f(1) == 2").statements == ["assert f(1) == 2"]
    assert read_tests(["assert a", "assert b"]).num == 2 == read_tests('["assert a", "assert b"]').num
    pairs = [("1 2", "3"), ("4", "5")]
    assert read_tests([{"input": given, "output": out} for given, out in pairs]).pairs == pairs
    assert read_tests({"inputs": ["1 2", "4"], "outputs": ["3", "5"]}).pairs == pairs
    calls = read_tests({"fn_name": "f", "inputs": [[1, "a"], '2\n"b"'], "outputs": [[True], "null"]})
    assert calls.name == "f" and calls.pairs == [([1, "a"], [True]), ([2, "b"], None)]
    for wrong in ([], {}, {"inputs": ["1"], "outputs": []}, [1], [{"input": "1"}]):
        with pytest.raises(ValueError, match="no known form"):
            read_tests(wrong)


def test_values_are_compared_as_json_has_them():
    same = [(1, 1.0), (0.1 + 0.2, 0.3), ([1, [2]], [1, [2]]), ("a", "a"), (3, [3]), ({"a": 1}, {"a": 1}), (None, None)]
    other = [(True, 1), (1, "1"), ([1], [1, 2]), ([3], 3), (1, 1.001), (None, 0), (True, False)]
    assert all(is_same(*pair) for pair in same) and not any(is_same(*pair) for pair in other)


# --- code: what is run, and what it may do

linux = pytest.mark.skipif(not Path("/proc/self/ns").exists(), reason="namespaces are Linux's")


SETTINGS = {"column": "tests", "partial": True, "limit_secs": 10.0, "memory_limit_mb": 512, "allow_network": False}


def run(code, tests, **settings):
    return code_score(block(code), {"tests": tests}, **{**SETTINGS, **settings})


@pytest.mark.slow
@linux
def test_programs_are_scored_by_their_tests():
    f = "def f(x):\n    print('noise')\n    return (x + 1, [x])"
    assert run(f, ["assert f(1) == (2, [1])", "assert f(2) == 0", "assert f(3)[0] == 4"]) == pytest.approx(2 / 3)
    assert run(f, {"fn_name": "f", "inputs": [[1], [2]], "outputs": [[2, [1]], [0]]}) == 0.5
    assert run("class Solution:\n    def f(self, x): return -x", {"fn_name": "f", "inputs": ["1"], "outputs": ["-1"]}) == 1
    reads = "a, b = map(int, input().split())\nprint(a + b, end=' \\n\\n')"
    sums = [{"input": "1 2\n", "output": "3\n"}, {"input": "2 2", "output": "5"}, {"input": "x", "output": ""}]
    assert run(reads, sums) == pytest.approx(1 / 3)
    assert run(reads, sums, partial=False) == 0 and run(reads, sums[:1], partial=False) == 1
    assert code_score("no code", {"tests": sums}, **SETTINGS) == 0
    right = block("def f(x): return x")
    for text, tags, score in (
        (f"<think>no</think>{right}", ("<think>", "</think>"), 1),
        (f"<think>{right}</think> so", ("<think>", "</think>"), 0),
        (f"<think>{right}", ("<think>", "</think>"), 0),
        (f"<think>{right}", (), 1),
    ):
        assert code_score(text, {"tests": ["assert f(1) == 1"]}, reasoning_tags=tags, **SETTINGS) == score
    assert run("x = 1", None) is None


@pytest.mark.slow
@linux
@pytest.mark.parametrize(
    "code, test",
    [
        ("def f(:", "assert True"),
        ("import sys; sys.exit(0)", "assert False"),
        ("import os; os._exit(0)", "assert True"),
        ("import os; os._exit(97)", "assert True"),
        ("import os; os.write(1, b'[\"secret\", 0]\\n')", "assert False"),
        ("while True: pass", "assert True"),
        ("x = bytearray(10**10)", "assert True"),
        ("import socket\nsocket.create_connection(('127.0.0.1', PORT), 1)", "assert True"),
        ("import os; os.remove('FILE')", "assert True"),
        ("open('FILE', 'w')", "assert True"),
        ("open('big', 'wb').write(b'0' * 10**9)", "assert True"),
        ("import os, signal\nos.kill(PID, signal.SIGKILL)", "assert True"),
        ("import os\nwhile True: os.fork()", "assert True"),
    ],
)
def test_what_a_program_may_not_do_fails_its_tests(tmp_path, code, test):
    (tmp_path / "kept").write_text("text")
    with serving([]) as (url, seen):
        code = code.replace("FILE", str(tmp_path / "kept")).replace("PORT", url.split(":")[2].split("/")[0])
        assert run(code.replace("PID", str(os.getpid())), [test], limit_secs=2.0) == 0
        assert seen == []
    assert (tmp_path / "kept").read_text() == "text"


@pytest.mark.slow
@linux
def test_nothing_of_a_program_outlives_it(tmp_path):
    """Its number is known by the time that the program itself reads from outside of its namespace."""
    before = {path for path in Path("/proc").glob("[0-9]*")}
    code = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)\n"
    assert run(code, ["assert True"]) == 1
    new = [path for path in Path("/proc").glob("[0-9]*") if path not in before]
    for path in new:
        with contextlib.suppress(OSError):
            if b"sandbox.py" in (path / "cmdline").read_bytes():
                assert ends(int(path.name), within_secs=5.0)


@pytest.mark.slow
@linux
def test_code_is_a_part_of_a_reward():
    function = RewardFunction(RewardConfig(task="code"), "jsonl", 10)
    try:
        items = [{"answer": "", "tests": ["assert f(2) == 4"]}, {"answer": "", "tests": None}]
        texts = [block("def f(x): return 2 * x"), block("def f(x): return x"), "none"]
        reward = function(items, [texts, texts], np.ones((2, 3)))
    finally:
        function.close()
    np.testing.assert_array_equal(reward.task_PG, [[1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(reward.is_scored_PG, [[True] * 3, [False] * 3])


@pytest.mark.slow
@linux
def test_a_machine_that_cannot_take_the_network_away_is_named_before_training(monkeypatch, tmp_path):
    """As in a container without namespaces: here the sandbox is one that never gets them."""
    refused = tmp_path / "sandbox.py"
    refused.write_text(Path(sandbox.__file__).read_text().replace("if libc.unshare(", "if 1 or libc.unshare("))
    monkeypatch.setattr(sandbox, "__file__", str(refused))
    with pytest.raises(UserError, match=r"'code': this kernel allows no process without network .*allow_network = True"):
        RewardFunction(RewardConfig(task="code"), "jsonl", 10)
    assert run("x = 1", ["assert x == 1"], allow_network=True) == 1
    with pytest.raises(RuntimeError, match="no process without network"):
        run("x = 1", ["assert x == 1"])


# --- the judge


@contextlib.contextmanager
def serving(answers: Any):
    """An endpoint that takes its answers from a list: text of a reply, a status, or bytes -> (its URL, the requests it saw)."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers.get("Authorization"), body))
            answer: Any = answers(body) if callable(answers) else answers.pop(0)
            status, data = 200, b"busy"
            if isinstance(answer, int):
                status = answer
            elif isinstance(answer, str):
                data = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode()
            else:
                data = answer
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=lambda: server.serve_forever(0.01), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("grpo_jax.rewards.scorers.judge.FIRST_WAIT_SECS", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def settings_of(url, **changes):
    settings = {name: getattr(JudgeConfig(), name) for name in JudgeConfig.__dataclass_fields__}
    return {**settings, "url": url, "model": "m", **changes}


ITEM = {"answer": "42", "level": 3}


def test_the_judge_is_asked_as_its_interface_wants_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(["Let me see. Score: 0\nNo: Score: 0.75"]) as (url, seen):
        assert judge_score("it is 42", ITEM, "6 * 7?", **settings_of(url, max_tokens=9)) == 0.75
    ((path, authorization, body),) = seen
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0)
    (message,) = body["messages"]
    assert message["role"] == "user"
    assert all(text in message["content"] for text in ("6 * 7?", "Reference answer:\n42", "it is 42"))


def test_templates_hold_columns_and_braces_and_completions_cannot_ask_for_them():
    template = '{completion} of {level}, as {"score": 1} {unknown}'
    assert fill(template, {**ITEM, "completion": "{answer}"}) == '{answer} of 3, as {"score": 1} {unknown}'
    assert as_text([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]) == "user: a\n\nassistant: b"


def test_what_may_pass_is_tried_again_and_what_cannot_is_not():
    with serving([503, 429, b"{}", "Score: 1"]) as (url, seen):
        assert judge_score("a", ITEM, **settings_of(url)) == 1 and len(seen) == 4
    with serving([500, 500, 500]) as (url, seen), pytest.raises(ConnectionError, match="HTTP 500: busy"):
        judge_score("a", ITEM, **settings_of(url, retries=1))
    assert len(seen) == 2
    with serving([401]) as (url, seen), pytest.raises(ConnectionError, match="HTTP 401"):
        judge_score("b", ITEM, **settings_of(url))
    assert len(seen) == 1
    with pytest.raises(ConnectionError, match="refused"):
        judge_score("c", ITEM, **settings_of(url, retries=1))


@pytest.mark.parametrize(
    "reply, says", [("I cannot say", "has no score: 'I cannot say'"), ("Score: 7", "7 is not between 0 and 1")]
)
def test_a_reply_without_a_score_is_an_error_and_is_not_kept(tmp_path, reply, says):
    with serving([reply, "Score: 1"]) as (url, seen):
        settings = settings_of(url, cache=str(tmp_path / "kept"))
        with pytest.raises(ValueError, match=says):
            judge_score("a", ITEM, **settings)
        assert judge_score("a", ITEM, **settings) == 1 and len(seen) == 2


def test_scores_of_another_scale():
    with serving(["Rating: [[8]]"]) as (url, _):
        assert judge_score("a", ITEM, **settings_of(url, pattern=r"\[\[(\d+)\]\]", max_score=10.0)) == 0.8


def test_what_was_asked_before_is_not_asked_again(tmp_path):
    with serving(["Score: 1", "Score: 0", "Score: 0.5"]) as (url, seen):
        settings = settings_of(url, cache=str(tmp_path / "kept"))
        assert [judge_score(text, ITEM, **settings) for text in ("a", "a", "b", "a")] == [1, 1, 0, 1]
        judge_score.__globals__["_replies"].cache_clear()  # as another process would begin
        assert judge_score("a", ITEM, **settings) == 1 and len(seen) == 2
        assert judge_score("a", ITEM, **{**settings, "model": "other"}) == 0.5
    assert len(list((tmp_path / "kept").iterdir())) == 3


def test_several_are_asked_at_a_time_and_one_that_fails_costs_itself():
    barrier = threading.Barrier(3)  # three requests have to be there together

    def answer(body):
        text = body["messages"][0]["content"]
        if "bad" in text:
            return 400
        barrier.wait(20)
        return "Score: 1"

    with serving(answer) as (url, _):
        scores = judge_scores(["x", "bad", "y", "z"], ITEM, **settings_of(url, concurrency=4))
    assert [scores[i] for i in (0, 2, 3)] == [1, 1, 1] and isinstance(scores[1], ConnectionError)


@pytest.mark.slow
def test_the_judge_is_a_part_of_a_reward():
    """In another process: a completion whose request fails has no score, the others of its group have theirs."""

    def answer(body):
        text = body["messages"][0]["content"]
        return 400 if "bad" in text else f"Score: {float('judged good' in text and 'Who?' in text)}"

    with serving(answer) as (url, seen):
        config = JudgeConfig(**settings_of(url, template="{prompt} judged {completion}"))
        function = RewardFunction(RewardConfig(task="judge", judge=config), "jsonl", 10)
        try:
            reward = function([ITEM], [["good", "bad", "worse"]], np.ones((1, 3)), Context(["Who?"]))
        finally:
            function.close()
    np.testing.assert_array_equal(reward.task_PG, [[1, 0, 0]])
    np.testing.assert_array_equal(reward.is_scored_PG, [[True, False, True]])
    assert float(reward.metrics["reward/errors"].value()) == pytest.approx(1 / 3) and len(seen) == 3


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"reward.task": "judge"}, r"config\.reward\.judge\.url is empty"),
        ({"reward.task": "judge", "reward.judge.url": "http://a"}, r"judge\.model is empty"),
        ({"reward.task": "judge", "reward.judge.url": "a:80", "reward.judge.model": "m"}, "must begin with http"),
        ({"reward.task": "judge", "reward.judge.template": "{answer}"}, r"has no \{completion\}"),
        ({"reward.task": "judge", "reward.judge.pattern": "("}, "not a regular expression"),
        ({"reward.task": "judge", "reward.judge.pattern": "Score"}, "must have one group"),
        ({"reward.task": "code", "reward.code.limit_secs": 5.0}, r"code\.limit_secs = 5\.0: must be below"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, says):
    given = {"reward.judge.url": "http://a/v1", "reward.judge.model": "m"}
    if "is empty" in says or "begin" in says:
        given = {}
    with pytest.raises(UserError, match=says):
        tiny.config_of(changes={"task.name": "jsonl", "model.path": "unused", **given, **changes})
