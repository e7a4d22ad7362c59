"""Tokenizers, and the tasks scored on the host: what is read, held out, drawn, dropped and rewarded."""

from __future__ import annotations

import json
import pickle
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from grpo_jax.config import ColumnsConfig, RewardConfig
from grpo_jax.errors import UserError
from grpo_jax.rewards.scorers.gym import reasoning_gym_score
from grpo_jax.tasks import Task
from grpo_jax.tasks.files import read_rows
from grpo_jax.tasks.host import HostTask
from grpo_jax.tasks.questions import Question, questions_of
from grpo_jax.tasks.row_rewards import RowRewards
from grpo_jax.tasks.sources import SOURCES
from grpo_jax.tasks.tokenizers import CharTokenizer, HFTokenizer
from grpo_jax.training.build import make_task
from tests import tiny

CHARS = CharTokenizer(string.printable)
COLUMNS = ColumnsConfig(prompt="prompt", answer="answer")
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def task_of(tokenizer: Any = CHARS, *, name: str = "jsonl", num_eval: int = 0, seed: int = 0, **changes: Any) -> HostTask:
    """A task of plain prompts. changes: config fields, a double underscore for the dot; those without one are task's."""
    dotted = {key.replace("__", ".") if "__" in key else f"task.{key}": value for key, value in changes.items()}
    base = {"seed": seed, "model.path": "unused", "task.name": name, "task.max_prompt_tokens": 4096}
    scoring = {"task.use_chat_template": False, "reward.scoring.num_workers": 1, "reward.scoring.time_limit_secs": 30.0}
    config = tiny.config_of("grpo", {**base, **scoring, **dotted})
    return HostTask(config, tokenizer, SOURCES[name](config.task, num_eval, RowRewards(config.reward, name)))


def questions_in(path: Path | str, columns: ColumnsConfig = COLUMNS) -> list[Question]:
    """The questions of a data file, all of whose rows have an answer."""
    return questions_of(read_rows(str(path), "config.task.jsonl.path"), columns, RowRewards(RewardConfig(), "jsonl"))[0]


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
    return [task.tokenizer.decode_prompt(tokens_S[mask_S]) for tokens_S, mask_S in rows]


def as_completions(task: Task, texts_PG: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
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
def jsonl_task(tmp_path: Path) -> Iterator[HostTask]:
    """Forty sums, ten of them held out."""
    task = task_of(task__jsonl__path=write_lines(tmp_path / "sums.jsonl", sums(40)), seed=3, num_eval=10)
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


@pytest.mark.parametrize("unk", ["", "<unk>"])
def test_text_that_the_tokenizer_has_no_token_for(tmp_path: Path, caplog: pytest.LogCaptureFixture, unk: str) -> None:
    """Refused by the character and the row, or, where an unknown token stands for it, said and counted."""
    special = ["<pad>", "<eos>", *filter(None, [unk])]
    raw = RawTokenizer(models.WordLevel({token: i for i, token in enumerate([*special, *"0123456789+="])}, unk_token=unk))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    (tmp_path / "model").mkdir()
    raw.save(str(tmp_path / "model" / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<pad>"}
    names |= {"unk_token": unk} if unk else {}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = HFTokenizer(str(tmp_path / "model"))
    assert tokenizer.prompt_prefix == () and tokenizer.decode(tokenizer.encode("1+2=")) == "1+2="
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]
    path = write_lines(tmp_path / "sums.jsonl", [*rows, {"prompt": "2*3=", "answer": "6"}])
    if not unk:
        with pytest.raises(
            UserError, match=r"sums.jsonl:9: model.path = .*: its tokenizer has no token for '\*', in the text '2\*3='"
        ):
            task_of(tokenizer, task__jsonl__path=path)
        return
    task = task_of(tokenizer, task__jsonl__path=path)
    assert task.data_metrics["data/unknown_text"] == 1
    task.close()
    assert "1 prompt with text that the tokenizer has no token for" in caplog.text and "2*3=" in caplog.text


def test_hf_tokenizer_without_pad_token_or_template(tmp_path: Path) -> None:
    tokenizer = HFTokenizer(save_hf_tokenizer(tmp_path / "model", {"config.json": 2}))
    assert (tokenizer.pad_id, tokenizer.eos_ids, tokenizer.has_chat_template) == (2, (2,), False)
    with pytest.raises(UserError, match=r"task\.use_chat_template"):
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


def test_a_position_gives_the_same_prompt_alone_and_in_a_batch(jsonl_task: HostTask) -> None:
    batch = texts(jsonl_task, jsonl_task.train_prompts(25, 50))
    alone = [texts(jsonl_task, jsonl_task.train_prompts(np.int32(25 + i), 1))[0] for i in range(50)]
    assert batch == alone and len(set(batch)) > 20


def test_every_prompt_once_an_epoch_in_an_order_of_its_own(jsonl_task: HostTask) -> None:
    num = jsonl_task.num_train
    epochs = [texts(jsonl_task, jsonl_task.train_prompts(num * epoch, num)) for epoch in range(3)]
    assert num == 30 and all(len(set(epoch)) == num for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])


def test_the_seed_changes_the_order_and_not_what_is_held_out(tmp_path: Path, jsonl_task: HostTask) -> None:
    path = write_lines(tmp_path / "again.jsonl", sums(40)[::-1])
    same, other = (task_of(task__jsonl__path=path, seed=seed, num_eval=10) for seed in (3, 4))
    assert texts(same, same.eval_prompts()) == texts(other, other.eval_prompts())
    assert texts(same, same.eval_prompts()) == texts(jsonl_task, jsonl_task.eval_prompts())
    assert texts(same, same.train_prompts(0, 30)) != texts(other, other.train_prompts(0, 30))


def test_prompts_that_are_too_long_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "x.jsonl", [{"prompt": "x" * length, "answer": "1"} for length in range(1, 21)])
    long = write_lines(tmp_path / "y.jsonl", [{"prompt": "y" * length, "answer": "1"} for length in (5, 13)])
    task = task_of(task__jsonl__path=path, task__jsonl__eval_path=long, max_prompt_tokens=12, num_eval=2)
    reason = "over task.max_prompt_tokens = 12"
    assert (task.dropped["training"]["too_long"], task.dropped["held-out"]["too_long"]) == (8, 1)
    assert (task.num_train, task.prompt_tokens) == (12, 12)
    assert caplog.messages == [
        f"questions left out: 8 training ({reason}), 1 held-out ({reason})",
        "held out: 1 question, config.eval.num_prompts = 2: there are no more that differ and fit",
    ]
    assert task.data_metrics == {
        "data/train": 12.0,
        "data/held_out": 1.0,
        "data/dropped/training/too_long": 8.0,
        "data/dropped/held_out/too_long": 1.0,
    }
    assert sorted(map(len, texts(task, task.train_prompts(0, 12)))) == list(range(1, 13))
    assert texts(task, task.eval_prompts()) == ["yyyyy"]
    with pytest.raises(UserError, match=r"config\.task\.max_prompt_tokens = 4: no held-out prompt"):
        task_of(task__jsonl__path=path, task__jsonl__eval_path=long, max_prompt_tokens=4, num_eval=2)


# --- what is held out


def test_no_held_out_prompt_is_trained_on_in_any_copy(tmp_path: Path) -> None:
    records = sums(20) + [{"prompt": f"  What is\n{i} + 1? ", "answer": "0"} for i in range(20)] + sums(20)
    task = task_of(task__jsonl__path=write_lines(tmp_path / "a.jsonl", records), num_eval=8)
    held_out = [" ".join(text.split()) for text in texts(task, task.eval_prompts())]
    train = [" ".join(text.split()) for text in texts(task, task.train_prompts(0, task.num_train))]
    assert len(held_out) == len(set(held_out)) == 8
    assert len(train) == 36 and set(Counter(train).values()) == {3}
    assert not set(train) & set(held_out) and len(set(train) | set(held_out)) == 20


def test_eval_path_keeps_its_prompts_out_of_training(tmp_path: Path) -> None:
    path, eval_path = write_lines(tmp_path / "a", sums(30)), write_lines(tmp_path / "b", sums(35)[25:])
    task = task_of(task__jsonl__path=path, task__jsonl__eval_path=eval_path, num_eval=6)
    held_out, train = texts(task, task.eval_prompts()), texts(task, task.train_prompts(0, task.num_train))
    everything = {record["prompt"] for record in sums(35)[25:]}
    assert len(set(held_out)) == 6 and set(held_out) < everything
    assert len(set(train)) == 25 and not set(train) & everything


def test_holding_out_everything_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", sums(5))
    for eval_path in ("", path):
        with pytest.raises(UserError, match=r"eval\.num_prompts = 5"):
            task_of(task__jsonl__path=path, task__jsonl__eval_path=eval_path, num_eval=5)


# --- reading


@pytest.mark.parametrize(
    "content, line, reason",
    [
        (b'{"prompt": "a", "answer": "1"}\n\n{"prompt": "b", "answer": }\n', 3, "not JSON"),
        (b'{"prompt": "a", "answer": "1"}\n[1, 2]\n', 2, "JSON object"),
        (
            b'{"prompt": "a", "answer": "1"}\n{"prompt": "b", "question": "c"}\n',
            2,
            "no column `answer` .*it has prompt, question",
        ),
        (b'{"answer": "1"}\n', 1, "no column `prompt`"),
        (b'\n\n{"prompt": 3, "answer": "1"}\n', 3, "`prompt` must be text or a list of messages .* got 3"),
        (b'{"prompt": "a", "answer": null}\n', 1, "`answer` is null; no row has an answer"),
        (b'{"prompt": "a", "answer": true}\n', 1, "`answer` must be text or a number, or a list of them, got true"),
        (b'{"prompt": "a", "answer": {"x": 1}}\n', 1, "`answer` must be text"),
        (b'{"prompt": "a", "answer": ["1", ["2"]]}\n', 1, "`answer` holds an answer that must be text"),
        (b'{"prompt": " ", "answer": "1"}\n', 1, "`prompt` is empty"),
        (b'{"prompt": "a", "answer": "so #### "}\n', 1, "`answer` is empty"),
        (b'{"prompt": "a", "answer": "1"}\n{"prompt": "\xff", "answer": "1"}', 2, "not UTF-8"),
        (b'{"prompt": [], "answer": "1"}\n', 1, "`prompt` is empty"),
        (b'{"prompt": [{"role": "user"}], "answer": "1"}\n', 1, "role and content"),
        (b'{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}\n', 1, "nothing left to answer"),
        (b"[" * 100_000, 1, "nested too deeply|not JSON"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: bytes, line: int, reason: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        questions_in(path)
    assert str(caught.value).startswith(f"{path}:{line}: ") and "\n" not in str(caught.value)


def test_files_that_hold_nothing_are_named(tmp_path: Path) -> None:
    (tmp_path / "blank.jsonl").write_text("\n  \n")
    for path in (tmp_path / "blank.jsonl", tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"task\.jsonl\.path") as caught:
            questions_in(path)
        assert str(path) in str(caught.value)


def test_answers_are_read_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [
        '{"prompt": "a", "answer": "6 * 7 #### or\\n#### 42 "}',
        "",
        '{"prompt": " b\u2028", "answer": 7, "id": 1}',
        '{"prompt": "c", "answer": "so \\\\boxed{\\\\frac{1}{2}}. Done 3"}',
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    a, b, c = questions_in(path)
    assert (a.item["answer"], a.solution, a.text) == ("42", "6 * 7 #### or\n#### 42", "a")
    assert b.messages == ({"role": "user", "content": " b\u2028"},)
    assert b.item == {"prompt": " b\u2028", "answer": "7", "id": 1} and b.solution == "7"
    assert c.item["answer"] == "\\frac{1}{2}"


def test_columns_are_named_and_the_others_travel_along(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"question": chat, "solution": "It is\n#### 2", "level": 3, "answer": "shadowed"}]
    (question,) = questions_in(write_lines(tmp_path / "a", rows), ColumnsConfig(prompt="question", answer="solution"))
    assert question.text == "Be kind. 1 + 1?" and question.item == {**rows[0], "answer": "2"}


# --- how the model reads it


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    settings = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    return HFTokenizer(save_hf_tokenizer(tmp_path_factory.mktemp("chat") / "model", {}, **settings))


def test_system_prompt_and_chat_template(tmp_path: Path, chat_tokenizer: HFTokenizer) -> None:
    path = write_lines(tmp_path / "a.jsonl", sums(1))
    expected = [
        (chat_tokenizer, True, "Be brief.", "[system]Be brief.<|im_end|>[user]What is 0 + 1?<|im_end|>[assistant]"),
        (chat_tokenizer, True, "", "[user]What is 0 + 1?<|im_end|>[assistant]"),
        (chat_tokenizer, False, "Be brief.", "Be brief.\n\nWhat is 0 + 1?"),
        (CHARS, True, "", "What is 0 + 1?"),
    ]
    for tokenizer, use_chat_template, system_prompt, text in expected:
        settings = {"system_prompt": system_prompt, "use_chat_template": use_chat_template}
        task = task_of(tokenizer, task__jsonl__path=path, **settings)
        assert texts(task, task.train_prompts(0, 1)) == [text]
        # The template ends a turn with a token that is no end token of the model; plain text has no turns.
        is_chat = use_chat_template and tokenizer is chat_tokenizer
        assert task.stop_ids == ((*tokenizer.eos_ids, chat_tokenizer.encode("<|im_end|>")[0]) if is_chat else tokenizer.eos_ids)


def test_chat_prompts_keep_their_turns(tmp_path: Path, chat_tokenizer: HFTokenizer) -> None:
    """A system message of the row's own goes before the config's."""
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "2?")]
    rows = [{"prompt": [{"role": role, "content": text} for role, text in turns], "answer": 2}]
    for own, first in ((None, "Be brief."), ("Mine.", "Mine.")):
        prompt = [*([{"role": "system", "content": own}] if own else []), *rows[0]["prompt"]]
        path = write_lines(tmp_path / "a.jsonl", [{**rows[0], "prompt": prompt}])
        task = task_of(chat_tokenizer, task__jsonl__path=path, use_chat_template=True, system_prompt="Be brief.")
        said = [("system", first), *turns]
        written = "".join(f"[{role}]{text}<|im_end|>" for role, text in said)
        assert texts(task, task.train_prompts(0, 1)) == [f"{written}[assistant]"]


def test_worked_examples_stand_before_every_question_and_are_asked_nowhere(tmp_path: Path, chat_tokenizer: HFTokenizer) -> None:
    rows = [{"prompt": f"Q{i}?", "answer": f"because\n#### {i}"} for i in range(12)] * 2
    path = write_lines(tmp_path / "a.jsonl", rows)
    shown = set()
    for seed in (0, 1):
        task = task_of(task__jsonl__path=path, num_shots=2, system_prompt="S", num_eval=3, seed=seed)
        assert task.num_train == 14 and task.dropped["training"]["worked_examples"] == 4
        asked = texts(task, task.train_prompts(0, 14)) + texts(task, task.eval_prompts())
        parts = [re.fullmatch(r"(S\n\n(?:Q\d+\?\nbecause\n#### \d+\n\n){2})(Q\d+\?)\n", text) for text in asked]
        (beginning,) = {part[1] for part in parts if part}
        questions = [part[2] for part in parts if part]
        shots = re.findall(r"Q\d+\?", beginning)
        assert len(asked) == len(questions) == 17 and len(set(questions)) == 10 and not set(shots) & set(questions)
        for number in re.findall(r"Q(\d+)", beginning):
            assert f"Q{number}?\nbecause\n#### {number}\n" in beginning
        shown.add(beginning)
    assert len(shown) == 1
    with pytest.raises(UserError, match=r"config\.task\.num_shots = 12: no question is left"):
        task_of(task__jsonl__path=path, num_shots=12)
    task = task_of(chat_tokenizer, task__jsonl__path=path, num_shots=1, use_chat_template=True, num_eval=1)
    assert all(
        re.fullmatch(
            r"\[user\]Q(\d+)\?<\|im_end\|>\[assistant\]because\n#### \1<\|im_end\|>\[user\]Q\d+\?<\|im_end\|>\[assistant\]",
            text,
        )
        for text in texts(task, task.train_prompts(0, 20))
    )


# --- what completions answer


def test_final_answers_are_votes(jsonl_task: HostTask) -> None:
    texts_PG = [["so \\boxed{1,000}", "#### 1000"], ["1 + 2 = 3.", "<answer>4</answer> 5"]]
    assert jsonl_task.final_answers(*as_completions(jsonl_task, texts_PG)) == [["1000", "1000"], ["3", "4"]]


def test_final_answers_of_the_embedded_task() -> None:
    task = make_task(tiny.config_of())
    tokens_PGT, mask_PGT = as_completions(task, [["12", "1"], ["", "7+"]])
    assert task.final_answers(tokens_PGT, mask_PGT) == [["12", "1"], ["", "7+"]]


# --- datasets


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of `save_to_disk`: `both` with two splits, `one` without."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    train, test = (datasets.Dataset.from_list(sums(30)[part]) for part in (slice(0, 24), slice(20, 30)))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(folder / "both")
    train.save_to_disk(folder / "one")
    return folder


def test_a_saved_dataset_is_split_like_a_file(saved: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", sums(24))
    lines = task_of(task__jsonl__path=path, num_eval=5)
    for folder in ("one", "both"):
        task = task_of(name="dataset", task__dataset__path=str(saved / folder), num_eval=5)
        assert texts(task, task.eval_prompts()) == texts(lines, lines.eval_prompts())
        assert texts(task, task.train_prompts(7, 40)) == texts(lines, lines.train_prompts(7, 40))


def test_a_split_of_its_own_is_held_out(saved: Path) -> None:
    task = task_of(name="dataset", task__dataset__path=str(saved / "both"), task__dataset__eval_split="test", num_eval=99)
    assert len(task.eval_prompts().answer) == 10 and task.num_train == 20


def test_what_load_dataset_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of parquet files, as a dataset's repository is one."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repo").mkdir()
    datasets.Dataset.from_list(sums(9)).to_parquet(tmp_path / "repo" / "train-00000-of-00001.parquet")
    task = task_of(name="dataset", task__dataset__path=str(tmp_path / "repo"), num_eval=2)
    assert task.num_train == 7


@pytest.mark.parametrize(
    "folder, changes, says",
    [
        ("both", {"task__dataset__split": "tset"}, r"no split 'tset', only train, test"),
        ("one", {"task__dataset__eval_split": "test"}, r"no split 'test', only train"),
        ("one", {"task__columns__prompt": "question"}, r"one \(train\), row 0: no column `question`.*it has answer, prompt"),
        ("none", {}, r"config\.task\.dataset\.path = '.*none', subset = '', split = 'train': "),
    ],
)
def test_datasets_that_do_not_fit_are_named(saved: Path, folder: str, changes: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        task_of(name="dataset", task__dataset__path=str(saved / folder), **changes)
    assert "\n" not in str(caught.value)


# --- reasoning-gym


def gym_task(*names: str, num_eval: int = 0, params: dict[str, Any] | None = None, **changes: Any) -> HostTask:
    settings = {"task__reasoning_gym__datasets": names, "task__reasoning_gym__num_train": changes.pop("num_train", 20)}
    if params is not None:
        settings["task__reasoning_gym__params"] = json.dumps(params)
    return task_of(name="reasoning_gym", num_eval=num_eval, **settings, **changes)


@pytest.mark.parametrize(
    "dataset, params",
    [("basic_arithmetic", {"max_terms": 3}), ("countdown", {"max_numbers": 4}), ("word_sorting", {"max_words": 4})],
)
def test_reasoning_gym_scores_its_own_answers(dataset: str, params: dict[str, int]) -> None:
    task = gym_task(dataset, params={dataset: params})
    for row in task.train_prompts(0, 20).answer:
        item = pickle.loads(pickle.dumps(task._items[row]))
        answer = item["answer"]
        assert reasoning_gym_score(f"<answer>no</answer> I mean <answer> {answer}\n</answer>", item) == 1
        assert reasoning_gym_score(f" {answer}\n", item) == 1
        assert reasoning_gym_score("rubbish ?", item) < 0.1  # some generators give a crumb for trying


def test_reasoning_gym_reward_belongs_to_its_prompt_and_completion() -> None:
    task = gym_task("basic_arithmetic", params={"basic_arithmetic": {"max_terms": 3}}, num_eval=5)
    prompts = task.eval_prompts()
    answers = [task._items[row]["answer"] for row in prompts.answer]
    assert len(set(texts(task, prompts))) == 5 and task.num_train > 15  # the two are not from one seed
    completions = as_completions(task, [[f"<answer>{answer}</answer>", "rubbish"] for answer in answers])
    reward = task.reward(prompts.answer, *completions)
    np.testing.assert_array_equal(reward.task_PG, [[1, 0]] * 5)
    assert reward.metrics["reward/errors"].value() == 0 and reward.metrics["reward/part/reasoning_gym"].value() == 0.5
    task.close()


def test_reasoning_gym_holds_out_the_same_whatever_the_seed() -> None:
    params = {"basic_arithmetic": {"max_terms": 2, "max_digits": 1}}
    tasks = [gym_task("basic_arithmetic", params=params, num_train=300, num_eval=50, seed=seed) for seed in (1, 1, 2)]
    drawn = [texts(task, task.train_prompts(0, task.num_train)) for task in tasks]
    held_out = [texts(task, task.eval_prompts()) for task in tasks]
    assert drawn[0] == drawn[1] != drawn[2] and sorted(drawn[0]) == sorted(drawn[2])
    assert held_out[0] == held_out[1] == held_out[2]
    assert 40 < len(held_out[0]) == len(set(held_out[0])) and 0 < len(drawn[0]) < 300
    assert not set(drawn[0]) & set(held_out[0])


def test_a_mixture_keeps_its_weights_at_any_position() -> None:
    weights, names = (1.0, 3.0), ("leg_counting", "basic_arithmetic")
    task = gym_task(*names, task__reasoning_gym__weights=weights, num_train=80, num_eval=20)
    streams = [task._items[row]["generator"] for row in task.train_prompts(0, 160).answer]
    assert [Counter(streams[i : i + 16])["leg_counting"] for i in range(0, 160, 16)] == [4] * 10
    first_60 = [row for row in task.train_prompts(0, 60).answer if task._items[row]["generator"] == "basic_arithmetic"]
    assert len(first_60) == len(set(first_60)) == 45  # nothing twice before everything once
    np.testing.assert_array_equal(task.train_prompts(1001, 1).answer, task.train_prompts(1000, 2).answer[1:])
    held_out = Counter(task._items[row]["generator"] for row in task.eval_prompts().answer)
    assert held_out == {"leg_counting": 5, "basic_arithmetic": 15}
    even = gym_task(*names)
    assert Counter(even._items[row]["generator"] for row in even.train_prompts(0, 10).answer) == dict.fromkeys(names, 5)


@pytest.mark.parametrize(
    "names, params, reason",
    [
        (("basic_aritmetic",), None, "no generator 'basic_aritmetic'; there are basic_arithmetic"),
        (("leg_counting",), {"leg_counting": {"no_such_setting": 1}}, "no_such_setting"),
        (("leg_counting",), {"leg_counting": {"min_animals": 0}}, "min_animals"),
        (("leg_counting",), {"leg_counting": {"seed": 1}}, r"params\.leg_counting\.seed"),
        (("leg_counting",), {"countdown": {}}, "'countdown' is not among"),
        ((), None, "at least one generator"),
    ],
)
def test_reasoning_gym_settings_are_checked(names: tuple[str, ...], params: dict[str, Any] | None, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        gym_task(*names, params=params, num_eval=1)
    assert "task.reasoning_gym" in str(caught.value) and "\n" not in str(caught.value)


def test_reasoning_gym_with_all_training_questions_held_out() -> None:
    with pytest.raises(UserError, match="raise num_train"):
        params = {"basic_arithmetic": {"max_terms": 2, "max_digits": 1}}
        gym_task("basic_arithmetic", params=params, num_train=1, num_eval=3000)


def test_reasoning_gym_score_takes_the_last_answer() -> None:
    item = {"generator": "leg_counting", "settings": {"seed": 0, "size": 1}, "answer": "12", "question": ""}
    assert reasoning_gym_score("<answer>3</answer> no, <answer>12</answer>", item) == 1
    assert reasoning_gym_score("<answer>12</answer> no, <answer>3</answer>", item) == 0
    assert reasoning_gym_score("\n12 ", item) == 1
    assert reasoning_gym_score("", item) == 0
