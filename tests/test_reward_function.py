"""Rewards as sums of parts, and what a bad part may cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_jax.config import Config, reward_expression
from grpo_jax.errors import UserError
from grpo_jax.rewards.reward_function import RewardFunction
from grpo_jax.types import Reward
from tests import tiny
from tests.test_scoring import is_alive

# --- expressions


def test_expressions_are_sums_of_weighted_parts() -> None:
    def parsed(text: str) -> dict[str, float]:
        return dict(reward_expression.parse(text, "f"))

    assert parsed("") == parsed("  ") == {}
    assert parsed("math_verify") == {"math_verify": 1}
    assert parsed(" -length+ .5 *exact-1e-2*a.b:c ") == {"length": -1, "exact": 0.5, "a.b:c": -0.01}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"task": "math_verfy"}, r"config\.reward\.task = 'math_verfy': no part 'math_verfy'; there are math_verify"),
        ({"shaping": "0.2 format"}, r"config\.reward\.shaping = '0\.2 format': cannot read"),
        ({"shaping": "format length"}, r"cannot read 'length'"),
        ({"shaping": "format + "}, r"cannot read '\+ '"),
        ({"shaping": "format + 2*format"}, r"'format' stands in it twice"),
        ({"shaping": "regex"}, r"config\.reward\.regex\.pattern is empty"),
        ({"format__pattern": "("}, r"config\.reward\.format\.pattern = '\(': not a regular expression"),
        ({"reasoning_tags": ("<think>",)}, r"config\.reward\.reasoning_tags = \('<think>',\): an opening and a closing tag"),
        ({"choice__answer": "number"}, r"config\.reward\.choice\.answer = 'number': unknown; known: label, index"),
        ({"repetition__ngram_size": 0}, r"config\.reward\.repetition\.ngram_size = 0: must be at least 1"),
        ({"task": "reasoning_gym"}, r"only questions of task 'reasoning_gym'"),
    ],
)
def test_expressions_that_cannot_be_are_named(changes: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        config_of(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"reward.shaping": "format"}, {"task.system_prompt": "S"}, {"task.num_shots": 1}])
def test_the_embedded_task_takes_no_settings_of_the_others(changes: dict[str, Any]) -> None:
    (field,) = changes
    with pytest.raises(UserError, match=rf"config\.{field} = .*: task 'arithmetic'"):
        tiny.config_of(changes=changes)


# --- the reward function


def config_of(**changes: Any) -> Config:
    fields = {f"reward.{name.replace('__', '.')}": value for name, value in changes.items()}
    return tiny.config_of(changes={"task.name": "jsonl", "model.path": "unused", **fields})


MakeRewardFunction = Callable[..., Callable[..., Reward]]


@pytest.fixture
def reward_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeRewardFunction]:
    """reward_function(expression, ...) -> a RewardFunction; its users' functions are in `my_rewards`."""
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def make(task: str = "", shaping: str = "", **scoring: Any) -> RewardFunction:
        settings = {f"scoring__{name}": value for name, value in scoring.items()}
        made.append(RewardFunction(config_of(task=task, shaping=shaping, **settings).reward, "jsonl", 10))
        return made[-1]

    yield make
    for each in made:
        each.close()


MY_REWARDS = r"""
import os, re, signal, subprocess, sys, time

def brevity(completion, item):
    return 1 / len(completion)

def rank(completions: list[str], item: dict) -> list[float]:
    if "bad" in completions:
        raise ValueError("no")
    if "short" in completions:
        return [1.0]
    return [sorted(completions).index(text) + item["level"] for text in completions]

def sleeps(completion, item):
    if completion != "awake":
        time.sleep(1e6)
    return 0.0

def stubborn(completion, item):
    if completion == "loop":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            pass
    return 1.0

def hoards(completion, item):
    return len([0] * (10**8 if completion == "big" else 10)) / 10

STAY = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1e6)"

def litters(completion, item):
    children = [subprocess.Popen([sys.executable, "-c", STAY], start_new_session=new) for new in (False, True)]
    with open(item["file"], "a") as file:
        file.writelines(f"{child.pid}\n" for child in children)
    if completion == "hang":
        time.sleep(1e6)
    return 1.0
"""


def values(reward: Reward) -> dict[str, float]:
    return {name: float(metric.value()) for name, metric in reward.metrics.items()}


def lengths(completions_PG: Sequence[Sequence[str]]) -> np.ndarray:
    return np.array([[len(text) for text in row] for row in completions_PG])


def test_parts_are_scored_apart_and_summed_by_weight(reward_function: MakeRewardFunction) -> None:
    completions_PG = [["<think></think><answer>4</answer>", "4"], ["5", "<think></think><answer>6</answer>"]]
    items = [{"answer": "4"}, {"answer": "6"}]
    lengths_PG = np.array([[10, 1], [5, 8]])
    reward = reward_function("exact", "0.5*format - 2*length + exact")(items, completions_PG, lengths_PG)
    np.testing.assert_array_equal(reward.task_PG, [[1, 1], [0, 1]])
    np.testing.assert_allclose(reward.shaping_PG, [[1.5 - 0, 1 - 1.8], [0 - 1.0, 1.5 - 0.4]], rtol=1e-6)
    assert reward.task_PG.dtype == reward.shaping_PG.dtype == np.float32
    expected = {"exact": 0.75, "format": 0.5, "length": 0.4}
    counts = dict.fromkeys(("reward/errors", "reward/timeouts", "reward/abstained"), 0)
    assert values(reward) == pytest.approx({**counts, **{f"reward/part/{name}": mean for name, mean in expected.items()}})
    assert np.all(reward.is_scored_PG)


def test_math_verify_is_what_an_empty_expression_means(reward_function: MakeRewardFunction) -> None:
    reward = reward_function()([{"answer": "\\frac{1}{2}"}], [["\\boxed{0.5}", "\\boxed{2}"]], np.ones((1, 2)))
    np.testing.assert_array_equal(reward.task_PG, [[1, 0]])
    np.testing.assert_array_equal(reward.shaping_PG, [[0, 0]])


def test_users_functions_for_one_completion_and_for_a_group(reward_function: MakeRewardFunction) -> None:
    completions_PG = [["bb", "a", "cccc"], ["a", "bad", "cc"], ["z", "short", "y"], ["b", "c", "a"]]
    items = [{"answer": "", "level": level} for level in (10, 20, 30, 40)]
    expected_PG = [[11, 10, 12], [0, 0, 0], [0, 0, 0], [41, 42, 40]]
    for num_workers in (1, 3):
        reward = reward_function("my_rewards:rank", "my_rewards:brevity", num_workers=num_workers)(
            items, completions_PG, lengths(completions_PG)
        )
        np.testing.assert_array_equal(reward.task_PG, expected_PG)
        np.testing.assert_allclose(reward.shaping_PG, 1 / lengths(completions_PG), rtol=1e-6)
        assert values(reward)["reward/errors"] == 0.5


@pytest.mark.parametrize("name", ["my_rewards:absent", "no_such_file:f"])
def test_users_functions_that_are_not_there_are_named_at_once(reward_function: MakeRewardFunction, name: str) -> None:
    with pytest.raises(UserError, match=f"config.reward: cannot import {name}"):
        reward_function("exact", name)


HARD = ["\\boxed{10^{10^6}}", "\\boxed{9^{9^{9^{9^9}}}}", "$" + "\\frac{" * 500 + "}" * 500 + "$", "\0" * 9, "x" * 2**20]


def test_settings_reach_their_parts(reward_function: MakeRewardFunction) -> None:
    config = config_of(
        task="exact",
        shaping="choice + format + repetition + regex",
        reasoning_tags=("[T]", "[/T]"),
        choice__options="o",
        choice__answer="index",
        format__pattern=r"(\[T\].*\[/T\])? ?\w",
        format__once=("[/T]",),
        repetition__ngram_size=1,
        regex__pattern=r"(\w)$",
    )
    each = RewardFunction(config.reward, "jsonl", 10)
    completions_PG = [["[T]A[/T] B", "[T]B", "A", "<think>B</think>B"]]
    reward = each([{"answer": "1", "o": ["A", "B"], "b": "B"}], completions_PG, np.ones((1, 4)))
    each.close()
    parts = values(reward)
    assert (parts["reward/part/choice"], parts["reward/part/format"]) == (0.25, 0.25)
    np.testing.assert_array_equal(reward.task_PG, [[0, 0, 0, 0]])
    # [ T ] a [ / t ] b: 10 words, 6 of them distinct; [ t ] b; a; < think > b < / think > b
    np.testing.assert_allclose(parts["reward/part/repetition"], ((6 / 9 - 1) + 0 + 0 + (5 / 9 - 1)) / 4, rtol=1e-6)


@pytest.mark.slow
def test_hostile_answers_cost_themselves_only(reward_function: MakeRewardFunction) -> None:
    good, bad = ["\\boxed{4}", "<answer>\\frac{8}{2}</answer>"], ["\\boxed{5}", "0"]
    each = reward_function("math_verify", "0.5*exact", time_limit_secs=6.0, memory_limit_mb=1024)
    for hard in (HARD, []):
        completions_PG = [[*good, *hard, *bad]]
        reward = each([{"answer": "4"}], completions_PG, lengths(completions_PG))
        np.testing.assert_array_equal(reward.task_PG, [[1, 1, *[0] * len(hard), 0, 0]])
        np.testing.assert_array_equal(reward.shaping_PG, [[0.5, 0, *[0] * len(hard), 0, 0]])


@pytest.mark.slow
def test_a_regex_bomb_a_loop_and_a_memory_hog_cost_themselves_only(tmp_path: Path, reward_function: MakeRewardFunction) -> None:
    config = config_of(
        task="my_rewards:hoards",
        shaping="regex + my_rewards:stubborn",
        regex__pattern="(a+)+b",
        scoring__time_limit_secs=1.5,
        scoring__memory_limit_mb=512,
    )
    each = RewardFunction(config.reward, "jsonl", 10)
    completions_PG = [["ab", "a" * 40, "loop", "big"]]
    reward = each([{"answer": "ab"}], completions_PG, lengths(completions_PG))
    each.close()
    np.testing.assert_array_equal(reward.task_PG, [[1, 1, 1, 0]])
    np.testing.assert_array_equal(reward.shaping_PG, [[1, 1, 0, 1]])
    assert (values(reward)["reward/errors"], values(reward)["reward/timeouts"]) == (0.25, 0.5)


@pytest.mark.slow
def test_a_part_that_always_hangs_leaves_the_others_their_scores(reward_function: MakeRewardFunction) -> None:
    completions_PG = [[f"{p}{g}" for g in range(10)] for p in range(10)]
    each = reward_function("exact", "my_rewards:sleeps", time_limit_secs=0.5)
    each([{"answer": ""}], [["awake"]], np.ones((1, 1)))
    began = time.monotonic()
    reward = each([{"answer": f"{p}{p}"} for p in range(10)], completions_PG, lengths(completions_PG))
    np.testing.assert_array_equal(reward.task_PG, np.eye(10))
    assert values(reward)["reward/timeouts"] == 1 and not reward.shaping_PG.any() and not np.any(reward.is_scored_PG)
    assert time.monotonic() - began < 40.0  # one after the other on two workers: 25 s, and starting each takes as long again


@pytest.mark.slow
def test_what_a_users_function_starts_ends_with_its_worker(tmp_path: Path, reward_function: MakeRewardFunction) -> None:
    """Children that ignore SIGTERM, in the worker's session and in their own."""
    each = reward_function("my_rewards:litters", time_limit_secs=3.0, num_workers=1)
    completions_PG = [["a", "hang"]]
    reward = each([{"answer": "", "file": str(tmp_path / "pids")}], completions_PG, lengths(completions_PG))
    each.close()  # type: ignore[attr-defined]
    np.testing.assert_array_equal(reward.task_PG, [[1, 0]])
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 4 and os.getpid() not in pids
    deadline = time.monotonic() + 10.0
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))
