"""Questions from a function of one's own, and a reward for each row: by a column, or by the source of a mixture."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grpo_jax.errors import UserError
from grpo_jax.tasks import fingerprint
from grpo_jax.tasks.host import HostTask
from grpo_jax.tasks.sources import load_data
from tests.test_data import config_of, task_of, write_lines
from tests.test_tasks_host import as_completions

MODULE = """
calls = []
def load(level=1, num=6):
    return [{"prompt": f"{i} + {level}?", "answer": i + level} for i in range(num)]
def splits():
    return {"train": ({"prompt": f"{i}?", "answer": i} for i in range(3)), "eval": [{"prompt": "9?", "answer": 9}]}
def nothing():
    return []
def text():
    return "rows.jsonl"
def odd():
    return {"train": [], "test": []}
def fails():
    raise KeyError("secret")
def words():
    return ["a"]
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file of the user's, in the folder that the program is started from."""
    (tmp_path / "own_questions.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    yield "own_questions"
    sys.modules.pop("own_questions", None)


def test_a_function_gives_the_questions(module: str) -> None:
    task = task_of(f"{module}:load", eval__num_prompts=2)
    assert task.num_train == 4 and len(task.eval_prompts().answer) == 2
    harder = task_of(f"{module}:load", task__params={"level": 5}, eval__num_prompts=2)
    assert {task.row(i)[0]["answer"] for i in range(6)} == {str(i + 1) for i in range(6)}
    assert {harder.row(i)[0]["answer"] for i in range(6)} == {str(i + 5) for i in range(6)}
    assert fingerprint(task) != fingerprint(harder) and task.row(0)[1].startswith(f"{module}:load train[")
    own = task_of(f"{module}:splits", eval__num_prompts=4)
    assert own.num_train == 3 and own.row(int(own.eval_prompts().answer[0]))[0]["answer"] == "9"


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("load", {"levle": 2}, "unexpected keyword argument 'levle'; its settings are those of config.task.params, now levle"),
        ("nothing", {}, "it returned no rows"),
        ("text", {}, "it returned str, not rows"),
        ("odd", {}, 'it returned a mapping of train, test; {"train": rows, "eval": rows}'),
        ("fails", {}, "it raised KeyError: 'secret'"),
        ("words", {}, r"words train[0] is str, not a row"),
        ("number", {}, "not a function"),
        ("absent", {}, "module 'own_questions' has no 'absent'"),
    ],
)
def test_what_is_wrong_with_it_is_said(module: str, name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_data(config_of(f"{module}:{name}", task__params=params))
    assert said in str(caught.value) and f"config.task.name = '{module}:{name}'" in str(caught.value)


def test_settings_belong_to_a_function() -> None:
    with pytest.raises(UserError, match=r"config.task.params.level: settings are for a task of your own"):
        config_of("jsonl", "a.jsonl", task__params={"level": 1})


# --- a reward for each row


ROWS = [
    {"prompt": "2 + 2?", "answer": "4", "source": "sums"},
    {"prompt": "Which? A) no B) yes", "answer": "B", "source": "options"},
    {"prompt": "Say anything.", "answer": None, "source": "talk"},
]
BY = json.dumps({"sums": "exact", "options": "choice - 0.5*length", "*": "length"})


def rewards_of(task: HostTask, text: str) -> dict[str, tuple[float, float]]:
    """What each row's source earns for a completion: (task, shaping)."""
    answer = np.arange(task.num_train)
    tokens_PGT, mask_PGT = as_completions(task, [[text, "?"]] * len(answer))
    reward = task.reward(answer, tokens_PGT, mask_PGT)
    sources = [task.row(int(row))[0].get("source", task.row(int(row))[1]) for row in answer]
    pairs = zip(np.asarray(reward.task_PG)[:, 0].tolist(), np.asarray(reward.shaping_PG)[:, 0].tolist(), strict=True)
    return dict(zip(sources, pairs, strict=True))


def test_a_column_chooses_the_reward(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [*ROWS, {"prompt": "x", "answer": "9", "source": "held"}] * 1)
    settings: dict[str, Any] = {"task__columns__reward": "source", "reward__by_column": BY, "reward__shaping": "0.1*format"}
    task = task_of(path=path, **settings, rollout__max_completion_tokens=10, eval__num_prompts=1)
    share = 1 - 2 / 10  # of the budget that "B" and its stop token leave
    rewards = rewards_of(task, "B")
    expected = {"sums": 0.0, "options": 1 - 0.5 * share, "talk": share, "held": share}
    assert {name: rewards[name] for name in rewards} == {
        name: (pytest.approx(expected[name], abs=1e-6), 0.0) for name in rewards
    }
    assert len(rewards) == 3 and not task.dropped["training"]["no_answer"]
    # A part's mean is over the rows that it was asked about: of "choice" one row, of two completions.
    tokens_PGT, mask_PGT = as_completions(task, [["B", "?"]] * 3)
    metrics = task.reward(np.arange(3), tokens_PGT, mask_PGT).metrics
    assert metrics["reward/part/choice"].value() == 0.5 and metrics["reward/part/choice"].count == 2
    assert metrics["reward/part/format"].count == 6
    plain = task_of(path=path, eval__num_prompts=1)
    assert plain.dropped["training"]["no_answer"] == 1 and fingerprint(plain) != fingerprint(task)
    task.close(), plain.close()


def test_a_column_may_hold_the_reward_but_no_function(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}", "answer": i, "grade": {"how": "0.5*exact + length"}} for i in range(4)]
    task = task_of(path=write_lines(tmp_path / "a.jsonl", rows), task__columns__reward="grade.how")
    assert task.expressions == {"0.5*exact + length"}
    task.close()
    for value, said in (
        ("os:system", r"names the function 'os:system'; data may not"),
        ("exactly", r"no part 'exactly'"),
        (None, "is None: expected the parts of a reward"),
    ):
        rows[2]["grade"]["how"] = value
        path = write_lines(tmp_path / "b.jsonl", rows)
        with pytest.raises(UserError, match=said) as caught:
            load_data(config_of(path=path, task__columns__reward="grade.how"))
        assert f"{path}:3: `grade.how` (config.task.columns.reward)" in str(caught.value)


def test_a_value_without_a_reward_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS)
    settings: dict[str, Any] = {"task__columns__reward": "source", "reward__by_column": '{"sums": "exact"}'}
    with pytest.raises(
        UserError, match=r"a.jsonl:2: `source` .* is 'options': config.reward.by_column has 'sums'; add it, or '\*'"
    ):
        load_data(config_of(path=path, **settings))
    with pytest.raises(UserError, match=r"config.task.columns.reward\) is no column of it; it has answer, prompt, source"):
        load_data(config_of(path=path, **{**settings, "task__columns__reward": "kind"}))
    with pytest.raises(UserError, match=r"config.task.columns.reward is empty"):
        config_of(path=path, reward__by_column=BY)
    with pytest.raises(UserError, match=r"config.reward.by_column\['a'\] = 'exactly': no part"):
        config_of(path=path, task__columns__reward="source", reward__by_column='{"a": "exactly"}')
    with pytest.raises(UserError, match="must be"):
        config_of(path=path, task__columns__reward="source", reward__by_column='{"a": 1}')


def test_sources_of_a_mixture_have_rewards_of_their_own(tmp_path: Path, module: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", ROWS[:1])
    mixture = [
        {"name": "jsonl", "jsonl": {"path": str(path)}, "reward": "exact"},
        {"name": f"{module}:load", "params": {"num": 2}, "reward": "2*length"},
        {"name": "reasoning_gym", "reasoning_gym": {"num_train": 2}, "reward": "reasoning_gym"},
    ]
    task = task_of("mixture", task__mixture=json.dumps(mixture), rollout__max_completion_tokens=4, eval__num_prompts=1)
    assert task.expressions == {"exact", "2*length", "reasoning_gym"}
    rewards = rewards_of(task, "4")
    by_function = [reward for where, reward in rewards.items() if where.startswith(f"{module}:load train")]
    assert rewards["sums"] == (1.0, 0.0) and by_function == [(1.0, 0.0)] * len(by_function) and by_function
    task.close()
    with pytest.raises(UserError, match=r"mixture\[2\].reward = 'exactly': no part"):
        config_of("mixture", task__mixture=json.dumps([*mixture[:2], {**mixture[0], "reward": "exactly"}]))
    with pytest.raises(UserError, match=r"mixture\[0\].reward = 'reasoning_gym': only questions of task"):
        config_of("mixture", task__mixture=json.dumps([{**mixture[0], "reward": "reasoning_gym"}]))
