"""Tokenizers, and the tasks scored on the host: what is read, held out, drawn, dropped and rewarded."""

from __future__ import annotations

import json
import pickle
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from grpo_jax import config as config_lib
from grpo_jax.errors import UserError
from grpo_jax.scorers.gym import reasoning_gym_score
from grpo_jax.scorers.math_answer import math_verify_score
from grpo_jax.tasks.host import HostTask, Question
from grpo_jax.tasks.jsonl import JsonlTask, read_questions
from grpo_jax.tasks.reasoning_gym import ReasoningGymTask
from grpo_jax.tasks.tokenizers import CharTokenizer, HFTokenizer

CHARS = CharTokenizer(string.printable)
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def task_config(**changes: Any) -> config_lib.TaskConfig:
    """A TaskConfig whose fields `changes` override, whichever group they are in."""
    fields: dict[str, dict[str, Any]] = {
        "reasoning_gym": {"dataset": "leg_counting", "params": {}, "num_train": 20, "system_prompt": ""},
        "jsonl": {"path": "", "eval_path": "", "system_prompt": "", "use_chat_template": False},
        "scoring": {"num_workers": 1, "time_limit_secs": 30.0},
    }
    max_prompt_tokens = changes.pop("max_prompt_tokens", 4096)
    assert all(any(name in group for group in fields.values()) for name in changes), changes
    for group in fields.values():
        group.update({name: value for name, value in changes.items() if name in group})
    return config_lib.TaskConfig(
        name="under test",
        max_prompt_tokens=max_prompt_tokens,
        arithmetic=config_lib.ArithmeticConfig(min_operand=0, max_operand=9, operators="+", num_shots=0),
        reasoning_gym=config_lib.ReasoningGymConfig(**fields["reasoning_gym"]),
        jsonl=config_lib.JsonlConfig(**fields["jsonl"]),
        scoring=config_lib.ScoringConfig(**fields["scoring"]),
    )


def write_lines(path: Path, records: list[Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def sums(num: int) -> list[dict[str, str]]:
    return [{"prompt": f"What is {i} + 1?", "answer": f"{i + 1}"} for i in range(num)]


def texts(task: HostTask, prompts: Any) -> list[str]:
    """The prompts as text, after checking that they are padded on the left."""
    assert prompts.tokens_PS.shape == prompts.mask_PS.shape == (len(prompts.answer), task.prompt_tokens)
    assert prompts.mask_PS.any(1).all() and (np.diff(prompts.mask_PS.astype(int)) >= 0).all()
    assert (prompts.tokens_PS[~prompts.mask_PS] == task.tokenizer.pad_id).all()
    rows = zip(prompts.tokens_PS, prompts.mask_PS, strict=True)
    return [task.tokenizer.decode(tokens_S[mask_S]) for tokens_S, mask_S in rows]


def as_completions(task: HostTask, texts_PG: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Texts -> (tokens_PGT, mask_PGT), each ended by a stop token, with rubbish behind it."""
    ids_PG = [[[*task.tokenizer.encode(text), task.stop_ids[0]] for text in row] for row in texts_PG]
    width = max(len(ids) for row in ids_PG for ids in row) + 2
    tokens_PGT = np.full((len(ids_PG), len(ids_PG[0]), width), task.tokenizer.encode("7")[0], np.int32)
    mask_PGT = np.zeros(tokens_PGT.shape, np.float32)
    for p, row in enumerate(ids_PG):
        for g, ids in enumerate(row):
            tokens_PGT[p, g, : len(ids)] = ids
            mask_PGT[p, g, : len(ids)] = 1
    return tokens_PGT, mask_PGT


@pytest.fixture
def jsonl_task(tmp_path: Path) -> Iterator[JsonlTask]:
    """Forty sums, ten of them held out."""
    config = task_config(path=write_lines(tmp_path / "sums.jsonl", sums(40)))
    task = JsonlTask(config, CHARS, seed=3, num_eval=10)
    yield task
    task.close()


# --- tokenizers


def test_char_tokenizer_round_trip() -> None:
    tokenizer = CharTokenizer("0123456789+=")
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, (1,), 14)
    assert tokenizer.encode("10+2=") == [3, 2, 12, 4, 13]
    assert tokenizer.decode(np.array([3, 2, 12, 4, 13, 1, 0, 0], np.int32)) == "10+2="
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_char_tokenizer_names_what_it_cannot_do() -> None:
    with pytest.raises(UserError, match="'x'"):
        CharTokenizer("abc").encode("abxc")
    with pytest.raises(UserError, match="'b'"):
        CharTokenizer("abcb")


def save_hf_tokenizer(folder: Path, eos_ids: dict[str, Any], **settings: Any) -> str:
    """A byte-level tokenizer in Hugging Face's files; eos_ids: file name -> its eos_token_id."""
    folder.mkdir()
    special = ["<pad>", "<eos>", "<|im_end|>"]
    vocab = {token: i for i, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, value in eos_ids.items():
        (folder / name).write_text(json.dumps({"eos_token_id": value}))
    return str(folder)


def test_hf_tokenizer_ids_text_and_chat(tmp_path: Path) -> None:
    eos_ids = {"generation_config.json": [2, 1], "config.json": 1}
    settings = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    tokenizer = HFTokenizer(save_hf_tokenizer(tmp_path / "model", eos_ids, **settings))
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, (1, 2), 259)
    text = "héllo , 1 .  x\n"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and tokenizer.decode([*ids, 2, 1, 0]) == text
    chat = tokenizer.chat([{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}])
    assert all(isinstance(i, int) for i in chat) and chat.count(2) == 2
    assert tokenizer.decode(chat) == "[system]S[user]hi[assistant]"


def test_hf_tokenizer_without_pad_token_or_template(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_hf_tokenizer(tmp_path / "model", {"config.json": 2}))
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.has_chat_template) == (2, (2,), False)
    with pytest.raises(UserError, match=r"task\.jsonl\.use_chat_template"):
        tokenizer.chat([{"role": "user", "content": "hi"}])


def test_hf_tokenizer_errors_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refusing = "{{ raise_exception('no system role') }}"
    endless = save_hf_tokenizer(tmp_path / "endless", {})
    broken = save_hf_tokenizer(tmp_path / "broken", {})
    (tmp_path / "broken" / "config.json").write_text("{")
    for path in (str(tmp_path / "absent"), str(tmp_path / "empty"), endless, broken):
        with pytest.raises(UserError, match=r"model\.path") as caught:
            HFTokenizer(path)
        assert path in str(caught.value) and "\n" not in str(caught.value)
    picky = HFTokenizer(save_hf_tokenizer(tmp_path / "picky", {"config.json": 1}, chat_template=refusing))
    with pytest.raises(UserError, match="refuses system, user: no system role"):
        picky.chat([{"role": "system", "content": "S"}, {"role": "user", "content": "hi"}])


# --- the order of the data


def test_a_position_gives_the_same_prompt_alone_and_in_a_batch(jsonl_task: JsonlTask) -> None:
    batch = texts(jsonl_task, jsonl_task.train_prompts(25, 50))
    alone = [texts(jsonl_task, jsonl_task.train_prompts(np.int32(25 + i), 1))[0] for i in range(50)]
    assert batch == alone and len(set(batch)) > 20


def test_every_prompt_once_an_epoch_in_an_order_of_its_own(jsonl_task: JsonlTask) -> None:
    num = jsonl_task.num_train
    epochs = [texts(jsonl_task, jsonl_task.train_prompts(num * epoch, num)) for epoch in range(3)]
    assert num == 30 and all(len(set(epoch)) == num for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])


def test_the_seed_changes_the_order_and_not_what_is_held_out(tmp_path: Path, jsonl_task: JsonlTask) -> None:
    config = task_config(path=write_lines(tmp_path / "again.jsonl", sums(40)[::-1]))
    same, other = (JsonlTask(config, CHARS, seed=seed, num_eval=10) for seed in (3, 4))
    assert texts(same, same.eval_prompts()) == texts(other, other.eval_prompts())
    assert texts(same, same.eval_prompts()) == texts(jsonl_task, jsonl_task.eval_prompts())
    assert texts(same, same.train_prompts(0, 30)) != texts(other, other.train_prompts(0, 30))
    for task in (same, other):
        task.close()


def test_prompts_that_are_too_long_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = [{"prompt": "x" * length, "answer": "1"} for length in range(1, 21)]
    config = task_config(path=write_lines(tmp_path / "x.jsonl", records), max_prompt_tokens=12)
    task = JsonlTask(config, CHARS, seed=0, num_eval=0)
    assert (task.num_dropped, task.num_train, task.prompt_tokens) == (8, 12, 12)
    assert caplog.messages == ["dropped 8 of 20 prompts: over task.max_prompt_tokens = 12"]
    assert sorted(map(len, texts(task, task.train_prompts(0, 12)))) == list(range(1, 13))
    assert task.eval_prompts().tokens_PS.shape == (0, 12)
    task.close()
    config = task_config(path=config.jsonl.path, max_prompt_tokens=0)
    with pytest.raises(UserError, match=r"task\.max_prompt_tokens = 0"):
        JsonlTask(config, CHARS, seed=0, num_eval=0)


# --- what is held out


def test_no_held_out_prompt_is_trained_on_in_any_copy(tmp_path: Path) -> None:
    records = sums(20) + [{"prompt": f"  What is\n{i} + 1? ", "answer": "0"} for i in range(20)] + sums(20)
    task = JsonlTask(task_config(path=write_lines(tmp_path / "a.jsonl", records)), CHARS, seed=0, num_eval=8)
    held_out = [" ".join(text.split()) for text in texts(task, task.eval_prompts())]
    train = [" ".join(text.split()) for text in texts(task, task.train_prompts(0, task.num_train))]
    assert len(held_out) == len(set(held_out)) == 8
    assert len(train) == 36 and set(Counter(train).values()) == {3}
    assert not set(train) & set(held_out) and len(set(train) | set(held_out)) == 20
    task.close()


def test_eval_path_keeps_its_prompts_out_of_training(tmp_path: Path) -> None:
    path, eval_path = write_lines(tmp_path / "a", sums(30)), write_lines(tmp_path / "b", sums(35)[25:])
    task = JsonlTask(task_config(path=path, eval_path=eval_path), CHARS, seed=0, num_eval=6)
    held_out, train = texts(task, task.eval_prompts()), texts(task, task.train_prompts(0, task.num_train))
    everything = {record["prompt"] for record in sums(35)[25:]}
    assert len(set(held_out)) == 6 and set(held_out) < everything
    assert len(set(train)) == 25 and not set(train) & everything
    task.close()


def test_holding_out_everything_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", sums(5))
    for config in (task_config(path=path), task_config(path=path, eval_path=path)):
        with pytest.raises(UserError, match=r"eval\.num_prompts = 5"):
            JsonlTask(config, CHARS, seed=0, num_eval=5)


# --- reading


@pytest.mark.parametrize(
    "content, line, reason",
    [
        (b'{"prompt": "a", "answer": "1"}\n\n{"prompt": "b", "answer": }\n', 3, "not JSON"),
        (b'{"prompt": "a", "answer": "1"}\n[1, 2]\n', 2, "JSON object"),
        (b'{"prompt": "a", "answer": "1"}\n{"prompt": "b", "question": "c"}\n', 2, "no field `answer`"),
        (b'{"answer": "1"}\n', 1, "no field `prompt`"),
        (b'\n\n{"prompt": 3, "answer": "1"}\n', 3, "`prompt` must be text, got 3"),
        (b'{"prompt": "a", "answer": null}\n', 1, "`answer` must be text, got null"),
        (b'{"prompt": "a", "answer": true}\n', 1, "`answer` must be text, got true"),
        (b'{"prompt": "a", "answer": ["1"]}\n', 1, "`answer` must be text"),
        (b'{"prompt": " ", "answer": "1"}\n', 1, "`prompt` is empty"),
        (b'{"prompt": "a", "answer": "so #### "}\n', 1, "`answer` is empty"),
        (b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xff", "answer": "1"}', 2, "not UTF-8"),
        (b"[" * 100_000, 1, "nested too deeply|not JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: bytes, line: int, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        JsonlTask(task_config(path=str(path)), CHARS, seed=0, num_eval=0)
    assert str(caught.value).startswith(f"{path}:{line}: ") and "\n" not in str(caught.value)


def test_files_that_hold_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    for path in (tmp_path / "blank.jsonl", tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"task\.jsonl\.path") as caught:
            read_questions(str(path), "task.jsonl.path")
        assert str(path) in str(caught.value)


def test_answers_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{"prompt": "a", "answer": "6 * 7 #### or\\n#### 42 "}',
        "",
        '{"prompt": " b\u2028", "answer": 7, "id": 1}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_questions(str(path), "") == [Question("a", {"answer": "42"}), Question(" b\u2028", {"answer": "7"})]


def test_system_prompt_and_chat_template(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", sums(1))
    settings = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    chat = HFTokenizer(save_hf_tokenizer(tmp_path / "model", {}, **settings))
    expected = [
        (chat, True, "Be brief.", "[system]Be brief.[user]What is 0 + 1?[assistant]"),
        (chat, True, "", "[user]What is 0 + 1?[assistant]"),
        (chat, False, "Be brief.", "Be brief.\n\nWhat is 0 + 1?"),
        (CHARS, True, "", "What is 0 + 1?"),
    ]
    for tokenizer, use_chat_template, system_prompt, text in expected:
        config = task_config(path=path, system_prompt=system_prompt, use_chat_template=use_chat_template)
        task = JsonlTask(config, tokenizer, seed=0, num_eval=0)
        assert texts(task, task.train_prompts(0, 1)) == [text]
        assert task.stop_ids == tokenizer.eos_ids
        task.close()


# --- rewards


@pytest.mark.parametrize(
    "answer, completion, score",
    [
        ("42", "Six times seven, so the answer is \\boxed{42}.", 1),
        ("42", "6 * 7 = 42", 1),
        ("42", "It is $42$, not 43... no: \\boxed{43}", 0),
        ("42", "so\n#### 42", 1),
        ("42", "", 0),
        ("42", "no idea", 0),
        ("1,234", "The total is 1234 dollars", 1),
        ("\\frac{1}{2}", "\\boxed{0.5}", 1),
        ("\\frac{1}{2}", "$\\frac{2}{4}$", 1),
        ("$\\frac{1}{2}$", "\\boxed{\\frac{1}{3}}", 0),
        ("x^2 + 1", "\\boxed{1 + x^2}", 1),
        ("(1, 2)", "\\boxed{(1,2)}", 1),
        ("(1, 2)", "\\boxed{(2,1)}", 0),
        ("\\boxed{7}", "\\boxed{7}", 1),
        ("Paris", " Paris\n", 1),
        ("Paris", "London", 0),
    ],
)
def test_math_verify_score(answer: str, completion: str, score: float) -> None:
    assert math_verify_score({"answer": answer}, completion) == score


def test_jsonl_reward_belongs_to_its_prompt_and_completion(jsonl_task: JsonlTask) -> None:
    prompts = jsonl_task.train_prompts(5, 6)
    numbers = [int(text.split()[2]) for text in texts(jsonl_task, prompts)]
    texts_PG = [[f"\\boxed{{{i + 1}}}", f"\\boxed{{{i}}}", f"{i + 1}", ""] for i in numbers]
    reward_PG, metrics = jsonl_task.reward(prompts.answer, *as_completions(jsonl_task, texts_PG))
    assert reward_PG.dtype == np.float32
    np.testing.assert_array_equal(reward_PG, [[1, 0, 1, 0]] * 6)
    assert {name: metric.value() for name, metric in metrics.items()} == {"reward/errors": 0, "reward/timeouts": 0}


def test_held_out_rewards_and_failures_are_fractions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "def f(item, completion):\n    if completion == '!':\n        raise ValueError\n    return item['value']\n"
    (tmp_path / "failing_scorer.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    train, held_out = [Question("a", {"value": 1.0})], [Question("b", {"value": 2.0}), Question("cc", {"value": 3.0})]
    settings = {"scorer": "failing_scorer:f", "system_prompt": "", "use_chat": False, "seed": 0}
    task = HostTask(task_config(), CHARS, train, held_out, **settings)
    prompts = task.eval_prompts()
    assert texts(task, prompts) == ["b", "cc"] and prompts.answer.dtype == np.int32
    reward_PG, metrics = task.reward(prompts.answer, *as_completions(task, [["x", "!"], ["x", "x"]]))
    np.testing.assert_array_equal(reward_PG, [[2, 0], [3, 3]])
    assert (metrics["reward/errors"].value(), metrics["reward/timeouts"].value()) == (0.25, 0)
    task.close()


# --- reasoning-gym


@pytest.mark.parametrize(
    "dataset, params",
    [("basic_arithmetic", {"max_terms": 3}), ("countdown", {"max_numbers": 4}), ("word_sorting", {"max_words": 4})],
)
def test_reasoning_gym_scores_its_own_answers(dataset: str, params: dict[str, int]) -> None:
    task = ReasoningGymTask(task_config(dataset=dataset, params=params, num_train=20), CHARS, seed=1, num_eval=0)
    for row in task.train_prompts(0, 20).answer:
        item = pickle.loads(pickle.dumps(task._items[row]))
        answer = item["entry"]["answer"]
        assert reasoning_gym_score(item, f"<answer>no</answer> I mean <answer> {answer}\n</answer>") == 1
        assert reasoning_gym_score(item, f" {answer}\n") == 1
        assert reasoning_gym_score(item, "rubbish ?") < 0.1  # some generators give a crumb for trying
    task.close()


def test_reasoning_gym_reward_belongs_to_its_prompt_and_completion() -> None:
    config = task_config(dataset="basic_arithmetic", params={"max_terms": 3}, num_train=20)
    task = ReasoningGymTask(config, CHARS, seed=1, num_eval=5)
    prompts = task.eval_prompts()
    answers = [task._items[row]["entry"]["answer"] for row in prompts.answer]
    assert len(set(texts(task, prompts))) == 5 and task.num_train > 15  # the two are not from one seed
    completions = as_completions(task, [[f"<answer>{answer}</answer>", "rubbish"] for answer in answers])
    reward_PG, metrics = task.reward(prompts.answer, *completions)
    np.testing.assert_array_equal(reward_PG, [[1, 0]] * 5)
    assert metrics["reward/errors"].value() == 0
    task.close()


def test_reasoning_gym_holds_out_and_repeats_itself() -> None:
    config = task_config(dataset="basic_arithmetic", params={"max_terms": 2, "max_digits": 1}, num_train=300)
    tasks = [ReasoningGymTask(config, CHARS, seed=seed, num_eval=50) for seed in (1, 1, 2)]
    drawn = [texts(task, task.train_prompts(0, task.num_train)) for task in tasks]
    held_out = [texts(task, task.eval_prompts()) for task in tasks]
    assert drawn[0] == drawn[1] and held_out[0] == held_out[1]
    assert drawn[0] != drawn[2] and held_out[0] != held_out[2]
    assert len(held_out[0]) == len(set(held_out[0])) and 0 < len(drawn[0]) < 300
    assert not set(drawn[0]) & set(held_out[0])
    for task in tasks:
        task.close()


def test_reasoning_gym_system_prompt_by_name_or_text(tmp_path: Path) -> None:
    settings = {"eos_token": "<eos>", "pad_token": "<pad>"}
    chat = HFTokenizer(save_hf_tokenizer(tmp_path / "chat", {}, chat_template=TEMPLATE, **settings))
    base = HFTokenizer(save_hf_tokenizer(tmp_path / "base", {}, **settings))
    beginnings = [
        (chat, "direct", "[system]Answer the question directly."),
        (chat, "Be brief.", "[system]Be brief.[user]"),
        (chat, "", "[user]"),
        (base, "direct", "Answer the question directly."),
    ]
    for tokenizer, system_prompt, beginning in beginnings:
        task = ReasoningGymTask(task_config(system_prompt=system_prompt, num_train=2), tokenizer, seed=0, num_eval=0)
        assert all(text.startswith(beginning) for text in texts(task, task.train_prompts(0, 2)))
        task.close()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dataset": "basic_aritmetic"}, "basic_arithmetic"),
        ({"params": {"no_such_setting": 1}}, "no_such_setting"),
        ({"params": {"min_animals": 0}}, "min_animals"),
        ({"params": {"seed": 1}}, "task.reasoning_gym.params.seed"),
    ],
)
def test_reasoning_gym_settings_are_checked(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        ReasoningGymTask(task_config(**changes), CHARS, seed=0, num_eval=1)
    assert "task.reasoning_gym" in str(caught.value) and "\n" not in str(caught.value)


def test_reasoning_gym_with_all_training_questions_held_out() -> None:
    config = task_config(dataset="basic_arithmetic", params={"max_terms": 2, "max_digits": 1}, num_train=1)
    with pytest.raises(UserError, match="raise num_train"):
        ReasoningGymTask(config, CHARS, seed=0, num_eval=3000)


def test_reasoning_gym_score_takes_the_last_answer() -> None:
    item = {"dataset": "leg_counting", "params": {"seed": 0, "size": 1}, "entry": {"answer": "12", "question": ""}}
    assert reasoning_gym_score(item, "<answer>3</answer> no, <answer>12</answer>") == 1
    assert reasoning_gym_score(item, "<answer>12</answer> no, <answer>3</answer>") == 0
    assert reasoning_gym_score(item, "\n12 ") == 1
    assert reasoning_gym_score(item, "") == 0
