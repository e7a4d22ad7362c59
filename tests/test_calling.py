"""How reward functions are called: the forms that people bring from TRL and verl, and ours, each told by its signature."""

import asyncio
import dataclasses
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.config import CodeConfig, JudgeConfig, RewardConfig, ScoringConfig, parse_config
from grpo_jax.errors import UserError
from grpo_jax.rewards.calling import Request, as_score, call, plan_call
from grpo_jax.rewards.pool.pool import Context
from grpo_jax.rewards.reward_function import RewardFunction
from grpo_jax.tools import cli
from grpo_jax.tools.sweep.plan import apply_changes
from tests import tiny

COLUMNS = ("prompt", "answer", "level", "data_source")
ITEM = {"prompt": "6 * 7?", "answer": "42", "level": 3, "data_source": "sums", "extra_info": {"index": 5}}


def ask(function, completions=("42", "41"), columns=COLUMNS, settings=None, **request):
    """Plan and make one call -> (scores, the line that describes it)."""
    calling = plan_call("f", inspect.signature(function), columns, settings)
    texts = completions if calling.form.is_group else completions[:1]
    with asyncio.Runner() as runner:
        scores = call(function, calling, Request(ITEM, texts, **request), runner.run)
    return scores, calling.describe("m:f")


# --- ours


def test_one_completion_and_its_row():
    assert ask(lambda completion, item: len(completion) + item["level"]) == (
        [5.0],
        "m:f is called for one completion: completion, item",
    )


def test_all_completions_of_a_prompt():
    assert ask(lambda completions, item: [item["level"]] * len(completions)) == (
        [3.0, 3.0],
        "m:f is called for all completions of a prompt: completions, item",
    )


def test_columns_by_name_where_the_row_is_not_asked_for():
    assert ask(lambda completion, answer: completion == answer)[0] == [1.0]
    assert ask(lambda completion, level=0: level)[0] == [3.0]


def test_a_function_that_has_the_row_is_given_no_column_beside_it():
    assert ask(lambda completion, item, *, level=0.5: level)[0] == [0.5]


def test_parameters_without_names_and_callable_objects():
    def f(completion, item, /, weight=1.0):
        return weight * len(completion)

    class Judge:
        def __call__(self, completion, item):
            return 1.0

    assert ask(f)[0] == [2.0] and ask(Judge())[0] == [1.0]


def test_what_a_function_does_to_the_row_is_its_own_business():
    assert ask(lambda completion, item: item.clear() or 1.0)[0] == [1.0]
    assert ITEM["answer"] == "42"


def test_step_prompt_tokens_and_settings():
    def f(completion, item, step, prompt, completion_ids, scale, offset=1):
        return step + len(prompt) + sum(completion_ids) + scale + offset

    scores, line = ask(f, settings={"scale": 0.5, "unused": 1}, prompt="abc", ids=[[1, 2]], step=100)
    assert scores == [100 + 3 + 3 + 0.5 + 1]
    assert line == "m:f is called for one completion: completion, item, step, prompt, completion_ids, scale"
    assert ask(lambda completion, item, **settings: settings["scale"], settings={"scale": 0.5})[0] == [0.5]


# --- TRL's


def test_columns_come_as_lists():
    def f(completions, answer, **kwargs):
        assert kwargs["level"] == [3, 3] and kwargs["prompts"] == ["6 * 7?"] * 2 and "prompt" not in kwargs
        assert kwargs["trainer_state"].global_step == 7 and kwargs["completion_ids"] == [[1], [2]]
        return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]

    scores, line = ask(f, prompt="6 * 7?", ids=[[1], [2]], step=7)
    assert scores == [1.0, 0.0]
    assert line == "m:f is called as TRL does: completions, answer, **columns"


def test_without_kwargs_only_what_is_named():
    scores, line = ask(lambda prompts, completions, level: [len(prompts[0]) + level[1]] * 2, prompt="abc")
    assert scores == [6.0, 6.0] and line == "m:f is called as TRL does: prompts, completions, level"


def test_completions_of_a_chat_are_messages():
    chat = [{"role": "user", "content": "6 * 7?"}]

    def f(completions, prompts, **kwargs):
        assert prompts == [chat, chat] and [len(each) for each in completions] == [1, 1]
        return [float(each[0]["content"] == "42") * (each[0]["role"] == "assistant") for each in completions]

    assert ask(f, prompt=chat)[0] == [1.0, 0.0]
    assert ask(lambda completions, **kwargs: [float(text == "42") for text in completions], prompt="text")[0] == [1.0, 0.0]


def test_a_column_that_the_row_has_not_is_none():
    columns = (*COLUMNS, "kind")
    assert ask(lambda completions, kind: [1.0 if each is None else 0.0 for each in kind], columns=columns)[0] == [1, 1]


def test_none_is_no_opinion():
    assert ask(lambda completions, **kwargs: [None, 1])[0] == [None, 1.0]


def test_coroutines_are_awaited():
    async def one(completion, item):
        await asyncio.sleep(0)
        return 1.0

    async def group(completions, **kwargs):
        return list(await asyncio.gather(*(one(text, {}) for text in completions)))

    class Judge:
        async def __call__(self, completion, item):
            return 0.5

    assert ask(one)[0] == [1.0] and ask(group)[0] == [1.0, 1.0] and ask(Judge())[0] == [0.5]


# --- verl's


def test_verls_names():
    def f(data_source, solution_str, ground_truth, extra_info=None):
        assert (data_source, extra_info) == ("sums", {"index": 5})
        return {"score": float(ground_truth == solution_str), "acc": 1.0}

    scores, line = ask(f)
    assert scores == [1.0]
    assert line == "m:f is called as verl does: data_source, solution_str, ground_truth, extra_info"


def test_verls_layout_of_a_row_comes_before_the_answer_column():
    item = {"answer": "42", "reward_model": {"style": "rule", "ground_truth": "forty-two"}}

    def f(data_source, solution_str, ground_truth):
        return float(data_source == "" and ground_truth == "forty-two")

    calling = plan_call("f", inspect.signature(f), tuple(item))
    assert call(f, calling, Request(item, ["x"]), lambda x: x) == [1.0]
    assert calling.describe("f").endswith('(data_source is "": the data has no such column)')


def test_verls_batches():
    def f(data_sources, solution_strs, ground_truths, extra_infos, scale):
        assert data_sources == ["sums"] * 2 and extra_infos[1] == {"index": 5}
        return [scale * (text == gold) for text, gold in zip(solution_strs, ground_truths, strict=True)]

    assert ask(f, settings={"scale": 2})[0] == [2.0, 0.0]


# --- what fits none


@pytest.mark.parametrize(
    "function, says",
    [
        (lambda text, item: 1, "parameter `text` of f .* call it `completion`"),
        (lambda *args, **kwargs: 1, r"parameter `\*args` of f .* call it `completion`"),
        (lambda: 1, "f has no parameters"),
        (
            lambda completion, item, tokenizer: 1,
            "parameter `tokenizer` of f is none of .*columns are in `item`",
        ),
        (
            lambda completion, gold: 1,
            r"parameter `gold` of f is none of .*no column of the data \(answer, data_source, level, ",
        ),
        (lambda completions, gold, **kwargs: 1, "parameter `gold` of f"),
        (lambda solution_str, ground_truth, router: 1, "parameter `router` of f"),
    ],
)
def test_a_parameter_that_nothing_can_be_given_to_is_named(function, says):
    with pytest.raises(TypeError, match=says):
        plan_call("f", inspect.signature(function), COLUMNS)


def test_a_setting_that_is_a_column_too_is_refused():
    with pytest.raises(TypeError, match="`level` is a column of the data and also a setting"):
        plan_call("f", inspect.signature(lambda completions, level: 1), COLUMNS, {"level": 2})


@pytest.mark.parametrize(
    "returned, says",
    [
        (1.0, r"returned 1\.0 for 2 completions, not a list"),
        ([1.0], "returned 1 scores for 2 completions"),
        (np.array(1.0), "iteration over a 0-d array"),
        ({"score": 1.0}, "not a list with a score for each"),
        ("11", "returned '11' for 2"),
        ([1.0, "1"], "returned '1', not a number"),
        ([1.0, (1.0, "because")], "returned .1.0, 'because'., not a number"),
        ([1.0, float("nan")], "returned nan, not a finite number"),
        ([1.0, 1e39], "not a finite number"),
        ([1.0, {"acc": 1}], 'a dict without "score"'),
    ],
)
def test_what_a_group_function_must_not_return(returned, says):
    with pytest.raises((TypeError, ValueError), match=says):
        ask(lambda completions, item: returned)


def test_scores_of_every_kind():
    for value in (1, True, np.float32(1), np.array(1.0), {"score": 1, "why": "so"}):
        assert as_score(value) == 1.0
    for values in (np.ones(2), (1.0, 1.0), (1.0 for _ in range(2)), [{"score": 1}, {"score": 1}]):
        assert ask(lambda completions, item, values=values: values)[0] == [1.0, 1.0]


PAGE = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()


def test_the_examples_of_the_page_are_called_as_it_says():
    """One function of each form, and settings; each gets what its section promises."""
    space = {}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S):
        if not code.startswith(">>>"):
            exec(code, space)
    assert ask(space["brevity"])[0] == [pytest.approx(1 / 3)]
    assert ask(space["rank"], ("aaa", "b"))[0] == [0.5, 1.0]
    assert ask(space["right"], ("so 42", "41"))[0] == [1.0, 0.0]
    assert ask(space["compute_score"])[0] == [1.0]
    assert ask(space["close"], settings={"scale": 0.5}, step=50)[0] == [1.25]
    assert "\n" + ask(space["right"])[1].replace("m:f", "my_rewards:right") + "\n" in PAGE


def test_the_page_names_every_setting_of_these_parts():
    for config in (CodeConfig, JudgeConfig, ScoringConfig):
        for field in dataclasses.fields(config):
            assert f"{field.name}`" in PAGE or f".{field.name}=" in PAGE, field.name


def test_settings_on_the_command_line_and_in_sweeps():
    argv = ["train", "--config=a.py", "--config.reward.params.scale=0.5", "--config.reward.params.word=a=b", "--config.seed=1"]
    free, rest = cli._split_free_fields(argv)
    assert free == {"reward": {"scale": 0.5, "word": "a=b"}} and rest == ["train", "--config=a.py", "--config.seed=1"]
    config = apply_changes(tiny.config_of().to_dict(), {"reward.params.scale": 2}, "set")
    assert config.reward.params == {"scale": 2} and hash(config) != hash(tiny.config_of())
    with pytest.raises(UserError, match=r"'reward\.param\.scale' is no field"):
        apply_changes(tiny.config_of().to_dict(), {"reward.param.scale": 2}, "set")


# --- through worker processes

OF_PEERS = """
import re

def trl(completions, answer, **kwargs):
    found = [re.search(r"(-?\\d+)\\s*$", text) for text in completions]
    return [1.0 if m and m[1] == gold else 0.0 for m, gold in zip(found, answer)]

def trl_chat(prompts, completions, **kwargs):
    return [float(turns[0]["content"] in prompt[-1]["content"]) for prompt, turns in zip(prompts, completions)]

async def judges(completions, answer, **kwargs):
    return [None if not text else float(text == gold) for text, gold in zip(completions, answer)]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(ground_truth in solution_str), "acc": 1.0}

def arrays(completions, item):
    import numpy as np
    return np.array([item["answer"] in text for text in completions])

def scaled(completion, item, step, scale, bonus=0.0):
    return scale * step + bonus

def lost(completion, gold):
    return 1.0

def slow(completions, item):
    import time
    time.sleep(0.4 * len(completions))
    return [1.0] * len(completions)

def gathered(completions, item):
    return [ValueError("no judge") if text == "bad" else None if not text else 1.0 for text in completions]
"""


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """peers(function, **fields of RewardConfig) -> a RewardFunction of one function in the file above."""
    (tmp_path / "of_peers.py").write_text(OF_PEERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = []

    def make(name, columns=("prompt", "answer"), **fields):
        made.append(RewardFunction(RewardConfig(task=f"of_peers:{name}", **fields), "jsonl", 10, columns))
        return made[-1]

    yield make
    for each in made:
        each.close()


TEXTS_PG = [["it is 42", "41", ""], ["42", "it is 7", "7"]]
ROWS = [{"prompt": "a", "answer": "42"}, {"prompt": "b", "answer": "7"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, expected_PG, is_scored_PG",
    [
        ("trl", [[1, 0, 0], [0, 1, 1]], np.ones((2, 3))),
        ("judges", [[0, 0, 0], [0, 0, 1]], [[1, 1, 0], [1, 1, 1]]),
        ("compute_score", [[1, 0, 0], [0, 1, 1]], np.ones((2, 3))),
        ("arrays", [[1, 0, 0], [0, 1, 1]], np.ones((2, 3))),
    ],
)
def test_functions_of_peers_score_as_they_do_there(peers, name, expected_PG, is_scored_PG):
    reward = peers(name)(ROWS, TEXTS_PG, np.ones((2, 3)))
    np.testing.assert_array_equal(reward.task_PG, expected_PG)
    np.testing.assert_array_equal(reward.is_scored_PG, is_scored_PG)
    assert float(reward.metrics["reward/errors"].value()) == 0


@pytest.mark.slow
def test_the_limit_of_time_is_for_one_completion_also_in_a_group(peers):
    function = peers("slow", scoring=ScoringConfig(num_workers=1, time_limit_secs=1.0))
    reward = function(ROWS[:1], [["a", "b", "c", "d"]], np.ones((1, 4)))
    np.testing.assert_array_equal(reward.task_PG, [[1, 1, 1, 1]])
    assert np.all(reward.is_scored_PG)


@pytest.mark.slow
def test_an_exception_in_a_list_costs_one_completion(peers, caplog):
    reward = peers("gathered")(ROWS, [["a", "bad", ""], ["a", "b", "c"]], np.ones((2, 3)))
    np.testing.assert_array_equal(reward.task_PG, [[1, 0, 0], [1, 1, 1]])
    np.testing.assert_array_equal(reward.is_scored_PG, [[True, False, False], [True, True, True]])
    counts = {name: float(reward.metrics[f"reward/{name}"].value()) for name in ("errors", "timeouts", "abstained")}
    assert counts == pytest.approx({"errors": 1 / 6, "timeouts": 0, "abstained": 1 / 6})
    assert "ValueError: no judge" in caplog.text


@pytest.mark.slow
def test_chats_tokens_steps_and_settings_reach_the_process(peers, caplog):
    chats = [[{"role": "user", "content": "41 or 42"}], [{"role": "user", "content": "7"}]]
    reward = peers("trl_chat")(ROWS, [["42", "43"], ["7", "8"]], np.ones((2, 2)), Context(chats, None, 3))
    np.testing.assert_array_equal(reward.task_PG, [[1, 0], [1, 0]])
    with caplog.at_level("INFO", "grpo_jax"):
        each = peers("scaled", params=parse_config(with_params(scale=0.5)).reward.params)
    assert each.lines == ["of_peers:scaled is called for one completion: completion, item, step, scale"]
    assert caplog.messages == each.lines
    reward = each(ROWS, [["42"], ["7"]], np.ones((2, 1)), Context(None, None, 30))
    np.testing.assert_array_equal(reward.task_PG, [[15.0], [15.0]])


def with_params(**params):
    config = tiny.config_of().to_dict()
    config["reward"]["params"] = params
    return config


def test_what_cannot_be_called_is_refused_before_training(peers):
    with pytest.raises(
        UserError, match=r"config\.reward: cannot call of_peers:lost: TypeError: parameter `gold` of lost"
    ) as caught:
        peers("lost")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no config\.reward\.params\.scale"):
        peers("scaled")
    with pytest.raises(UserError, match=r"config\.reward\.params\.weigth: no reward function has such a parameter"):
        peers("scaled", params=parse_config(with_params(scale=1.0, weigth=2.0)).reward.params)


@pytest.mark.parametrize(
    "params, says",
    [
        ({"a b": 1}, r"params\.a b: not the name"),
        ({"a": {1}}, r"params\.a = \{1\}: must be"),
        ([1], r"params = \[1\]: expected"),
    ],
)
def test_settings_are_what_json_can_hold(params, says):
    config = tiny.config_of().to_dict()
    config["reward"]["params"] = params
    with pytest.raises(UserError, match=says):
        parse_config(config)
