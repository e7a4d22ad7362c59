"""Data as people bring it: layouts of files, rows and answers, mixtures, what is left out and what is said of it."""

from __future__ import annotations

import csv
import gzip
import json
import string
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from grpo_jax.config import ColumnsConfig, Config
from grpo_jax.errors import UserError
from grpo_jax.tasks import data_metrics, fingerprint, reasoning_gym
from grpo_jax.tasks.dataset import causes
from grpo_jax.tasks.files import is_files
from grpo_jax.tasks.host import HostTask
from grpo_jax.tasks.questions import MissingAnswerError, question_of
from grpo_jax.tasks.row_rewards import RowRewards
from grpo_jax.tasks.selection import choose_shots
from grpo_jax.tasks.sources import load_data
from grpo_jax.tasks.tokenizers import CharTokenizer
from grpo_jax.training.data_record import note_data
from tests import tiny

CHARS = CharTokenizer(string.printable)


def config_of(name: str = "jsonl", path: str | Path = "", seed: int = 0, **changes: Any) -> Config:
    """A config of plain prompts. changes: fields, a double underscore for the dot; those without one are task's."""
    settings = {"seed": seed, "model.path": "unused", "task.name": name, "task.use_chat_template": False, "eval.num_prompts": 2}
    if path:
        settings[f"task.{name}.path"] = str(path)
    dotted = {key.replace("__", ".") if "__" in key else f"task.{key}": value for key, value in changes.items()}
    return tiny.config_of("grpo", {**settings, "task.max_prompt_tokens": 4096, **dotted})


def task_of(name: str = "jsonl", path: str | Path = "", **changes: Any) -> HostTask:
    config = config_of(name, path, **changes)
    return HostTask(config, CHARS, load_data(config))


def sums(numbers: Sequence[int]) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {i} + 1?", "answer": str(i + 1)} for i in numbers]


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def asked(task: HostTask) -> tuple[list[str], list[str]]:
    """The prompts of one epoch, in their order, and those held out."""
    train, held_out = task.train_prompts(0, task.num_train), task.eval_prompts()
    texts = [
        [CHARS.decode(row[mask]) for row, mask in zip(each.tokens_PS, each.mask_PS, strict=True)] for each in (train, held_out)
    ]
    return texts[0], texts[1]


# --- files


def write_as(folder: Path, layout: str, rows: list[dict[str, Any]]) -> str:
    """Write rows in a layout; -> the path to give."""
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if layout == "jsonl":
        return str(write_lines(folder / "a.jsonl", rows))
    if layout == "array":
        (folder / "a.json").write_text("\n " + json.dumps(rows, indent=1))
    elif layout == "array called jsonl":
        (folder / "a.jsonl").write_text(json.dumps(rows))
        return str(folder / "a.jsonl")
    elif layout == "gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        return str(folder / "a.jsonl.gz")
    elif layout == "gz without the name":
        (folder / "a.json").write_bytes(gzip.compress(lines.encode()))
    elif layout in ("csv", "tsv"):
        with (folder / f"a.{layout}").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=",\t"[layout == "tsv"])
            writer.writeheader()
            writer.writerows(rows)
        return str(folder / f"a.{layout}")
    elif layout == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=3)
        return str(folder / "a.parquet")
    elif layout in ("two files", "glob"):
        write_lines(folder / "part-0.jsonl", rows[:4])
        parquet.write_table(pyarrow.Table.from_pylist(rows[4:]), folder / "part-1.parquet")
        return str(folder / "part-*") if layout == "glob" else f"{folder}/part-0.jsonl, {folder}/part-1.parquet"
    return str(folder / "a.json")


LAYOUTS = ("jsonl", "array", "array called jsonl", "gz", "gz without the name", "csv", "tsv", "parquet", "two files", "glob")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_of_files_changes_nothing(tmp_path: Path, layout: str) -> None:
    rows = [{**row, "note": f'a "quoted", line\nof {i}'} for i, row in enumerate(sums(range(10)))]
    path = write_as(tmp_path, layout, rows)
    expected = [f"What is {i} + 1?" for i in range(10)]
    for name in ("jsonl", "dataset"):
        assert is_files(path)
        (source,) = load_data(config_of(name, path))
        assert [question.text for question in source.train] == expected and source.evaluation is None
        assert [question.item["note"] for question in source.train] == [row["note"] for row in rows]
        assert [question.item["answer"] for question in source.train] == [row["answer"] for row in rows]
        (source,) = load_data(config_of(name, path, **{f"task__{name}__eval_path": path}))
        assert source.evaluation is not None and [question.text for question in source.evaluation] == expected


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.jsonl", b'{"prompt": "a", "answer": 4, "answer": 5}', r"a\.jsonl:1: the key 'answer' stands twice"),
        ("a.jsonl", b'\n{"prompt": "a", "answer": 1, "x": {"y": 1, "y": 2}}', r"a\.jsonl:2: the key 'y' stands twice"),
        ("a.json", b'[{"prompt": "a", "answer": 4},\n {"prompt": "a" "answer": 5}]', r"a\.json:2: not JSON"),
        ("a.json", b'[{"prompt": "a", "answer": 4}, 5]', r"a\.json, element 2: expected a JSON object .* got 5"),
        ("a.json", b"[]", r"a\.json': the file is empty"),
        ("a.csv", b"prompt,answer\na,1\nb\n", r"a\.csv:3: has another number of columns"),
        ("a.csv", b"prompt,answer\n", r"a\.csv': the file is empty"),
        ("a.csv", b"prompt,answer,answer\n1,2,3\n", r"a\.csv:1: the column 'answer' stands twice"),
        ("a.csv", "prompt,answer\nä,1\n".encode("latin1"), r"a\.csv: not UTF-8"),
        ("a.jsonl.gz", gzip.compress(b"x" * 99, mtime=0)[:15], r"a\.jsonl\.gz: a gzip file that cannot be unpacked"),
        ("a.parquet", b"PAR1 nothing", r"a\.parquet: a Parquet file that cannot be read"),
        (
            "a.jsonl",
            b'{"prompt": "2+2? \\ud800", "answer": 4}',
            r"jsonl:1: .* a lone surrogate \(U\+D800\) at character 6",
        ),
        ("a.jsonl", b'{"prompt": "a", "answer": 1}\n{"prompt": "b", "answer": "\\u0000"}', r"a\.jsonl:2: `answer` holds NUL"),
        ("a.jsonl", b'{"prompt": [{"role": "user", "content": "\\u0000"}], "answer": "1"}', r"a\.jsonl:1: `prompt` holds NUL"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_data(config_of("jsonl", tmp_path / name))
    assert "\n" not in str(caught.value)


def test_paths_that_name_no_file_or_one_twice(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", sums(range(4)))
    for wrong, says in (
        (tmp_path / "b*.jsonl", r"no file is called like .*b\*\.jsonl"),
        (f"{path},{path}", "twice"),
        (f"{path},{tmp_path}/none.csv", "cannot read it: No such file"),
    ):
        with pytest.raises(UserError, match=rf"config\.task\.jsonl\.path = .*{says}"):
            load_data(config_of("jsonl", wrong))
    for changes, says in (({"eval_split": "test"}, "eval_path"), ({"split": "test"}, "which have none")):
        with pytest.raises(UserError, match=says):
            load_data(config_of("dataset", path, **{f"task__dataset__{name}": value for name, value in changes.items()}))
    odd = write_lines(tmp_path / "a, [b].jsonl", sums(range(4)))
    assert len(load_data(config_of("jsonl", odd))[0].train) == 4
    assert not is_files("openai/gsm8k") and not is_files(str(tmp_path))


def test_a_path_that_is_empty_and_a_column_that_stands_twice(tmp_path: Path) -> None:
    for name in ("jsonl", "dataset"):
        with pytest.raises(UserError, match=rf"config\.task\.{name}\.path is empty"):
            load_data(config_of(name))
    twice = pyarrow.table([["a"], ["1"], ["2"]], names=["prompt", "answer", "answer"])
    parquet.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: the column 'answer' stands twice"):
        load_data(config_of("jsonl", tmp_path / "a.parquet"))
    (tmp_path / "long.csv").write_text("prompt,answer\n" + "x" * 200_000 + ",1\n")
    assert len(load_data(config_of("jsonl", tmp_path / "long.csv"))[0].train[0].text) == 200_000


def test_the_cause_of_an_error_of_datasets_is_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.jsonl").write_text('{"prompt": "a", "answer": 1}\nno JSON\n')
    with pytest.raises(UserError, match=r"config\.task\.dataset\.path.*JSON parse error: Invalid value") as caught:
        load_data(config_of("dataset", tmp_path / "repo"))
    assert "\n" not in str(caught.value)
    try:
        try:
            raise KeyError("x" * 300)
        except KeyError as error:
            raise OSError("first line\nsecond line") from error
    except OSError as error:
        assert causes(error) == f"first line second line; 'x{'x' * 299}'"


# --- rows

README = "# Project\n\n#### Overview\nIt adds.\n\n#### Install\npip install it"


@pytest.mark.parametrize(
    "answer, expected",
    [
        ("4", "4"),
        (4, "4"),
        (Decimal("4"), "4"),
        ("2+2 is\n#### 4", "4"),
        ("It is #### 4", "4"),
        ("so \\boxed{4}.", "4"),
        (["2", "-2"], ("2", "-2")),
        (["x\n#### 2", -2, "2"], ("2", "-2")),
        (["4"], "4"),
        (README, README),
        ("#### Steps\nAdd.\n#### 4", "4"),
        ("#### Steps\nSo \\boxed{4}\n\nDone.", "4"),
    ],
)
def test_the_answer_of_a_row(answer: Any, expected: Any) -> None:
    row = {"prompt": "2+2?", "answer": answer, "level": 1}
    question = question_of(row, ColumnsConfig(prompt="prompt", answer="answer"), "a.jsonl:1")
    assert question.item == {**row, "answer": expected} and question.where == "a.jsonl:1"


@pytest.mark.parametrize("answer", [None, float("nan"), float("inf"), "", " \n", [], [None]])
def test_a_row_without_an_answer_is_told_apart(answer: Any) -> None:
    with pytest.raises(MissingAnswerError, match="here: `answer`"):
        question_of({"prompt": "a", "answer": answer}, ColumnsConfig(prompt="prompt", answer="answer"), "here")


def test_columns_inside_of_others() -> None:
    row = {
        "data_source": "mine",
        "prompt": [{"role": "user", "content": "2+2?"}],
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"answer": "2+2 = 4\n#### 4", "deep": {"er": ["4", "four"]}},
        "a.b": "5",
    }
    for name, expected in (
        ("reward_model.ground_truth", "4"),
        ("extra_info.answer", "4"),
        ("extra_info.deep.er", ("4", "four")),
        ("a.b", "5"),
    ):
        item = question_of(row, ColumnsConfig(prompt="prompt", answer=name), "here").item
        assert item == {**row, "answer": expected}
    with pytest.raises(UserError, match=r"no column `reward_model\.truth` .*it has a\.b, .*reward_model\.ground_truth"):
        question_of(row, ColumnsConfig(prompt="prompt", answer="reward_model.truth"), "here")


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    rows = [*map(json.dumps, sums(range(6))), '{"prompt": "cat", "answer": null}', '{"prompt": "nan", "answer": NaN}']
    path.write_text("\n".join(rows))
    task = task_of(path=path)
    assert task.num_train == 4 and data_metrics(task)["data/dropped/training/no_answer"] == 2
    assert caplog.messages == ["questions left out: 2 training (no answer)"]
    path.write_text('{"prompt": "cat", "answer": null}\n{"prompt": "dog", "answer": ""}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: `answer` is null; no row has an answer \(config\.task\.columns\.answer"):
        task_of(path=path)
    (tmp_path / "a.csv").write_text("prompt,answer\n1?,1\n2?,\n3?,3\n4?,4\n")
    table = task_of(path=tmp_path / "a.csv")
    assert data_metrics(table)["data/dropped/training/no_answer"] == 1 and data_metrics(table)["data/train"] == 1


def test_prompts_alone_for_rewards_that_compare_with_nothing(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": f"A haiku about {i}.", "mood": i} for i in range(5)])
    task = task_of(path=path, reward__task="length")
    assert task.num_train == 3 and all(set(item) == {"prompt", "mood"} for item in task._items)
    task.close()
    with pytest.raises(UserError, match=r"a\.jsonl:1: no column `answer`"):
        task_of(path=path)
    with pytest.raises(UserError, match=r"columns\.answer is empty"):
        task_of(path=path, task__columns__answer="")
    # A function of one's own gets what the data has: what can be compared as text, all else as it is.
    goal = {"target": 24, "numbers": [2, 12]}
    rows = [{"prompt": str(i), "x": {"y": value}} for i, value in enumerate((None, "a\n#### 4", goal, True, [], [1, "2"], 3))]
    mixed = write_lines(tmp_path / "b.jsonl", rows)
    kept = load_data(config_of(path=mixed, reward__task="my_rewards:mine", task__columns__answer="x.y"))[0].train
    assert [question.item["answer"] for question in kept] == [None, "4", goal, True, [], ("1", "2"), "3"]
    task_of(path=mixed, reward__task="length", task__columns__answer="x.y").close()


def test_which_rewards_compare_with_an_answer() -> None:
    def compares(name: str = "jsonl", **reward: str) -> bool:
        config = config_of(name, **{f"reward__{key}": value for key, value in reward.items()})
        rewards = RowRewards(config.reward, name)
        return rewards.needs_answer(rewards.of({}, ""))

    assert compares() and compares(task="0.5*exact - length") and compares(task="length", shaping="math_verify")
    assert not compares(task="length") and not compares(task="my:own + format") and not compares("reasoning_gym")
    assert compares(task="regex", regex__pattern=r"(\d+)") and not compares(task="regex", regex__pattern=r"\d+")


def test_the_same_prompt_with_another_answer_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "3 or 4?", "answer": 3}, {"prompt": " 3 or  4?", "answer": 4}, {"prompt": "3 or 4?", "answer": "3"}]
    path = write_lines(tmp_path / "a.jsonl", [*rows, *sums(range(5))])
    task = task_of(path=path)
    assert data_metrics(task)["data/conflicts"] == 1
    said = "1 row with another answer than an earlier row with the same prompt"
    assert caplog.messages == [f"{said}: {path}:1 '3', {path}:2 '4'"]


# --- which questions are asked


def test_held_out_are_questions_that_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": f"{i} {'word ' * (i % 10 > 0) * 20}", "answer": i} for i in range(40)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    train, held_out = asked(task_of(path=path, max_prompt_tokens=12))
    assert len(train) == len(held_out) == 2 and {*train, *held_out} == {"0 ", "10 ", "20 ", "30 "}
    assert caplog.messages == ["questions left out: 36 training (over task.max_prompt_tokens = 12)"]
    # Those that fit are held out in the order in which they would be among all.
    _, of_all = asked(task_of(path=path, eval__num_prompts=39))
    assert [text for text in of_all if text in held_out] == held_out or set(held_out) - set(of_all)
    with pytest.raises(UserError, match=r"eval\.num_prompts = 4: nothing is left"):
        task_of(path=path, max_prompt_tokens=12, eval__num_prompts=4)


def test_worked_examples_are_neither_too_long_nor_held_out(tmp_path: Path) -> None:
    rows = sums(range(30)) + [{"prompt": "long " * 20 + str(i), "answer": i} for i in range(30)]
    path = write_lines(tmp_path / "a.jsonl", rows)
    config = config_of(path=path, num_shots=3, max_prompt_tokens=90, eval__num_prompts=6)
    shots = [shot.text for shot in choose_shots(config.task, CHARS, load_data(config))]
    task = HostTask(config, CHARS, load_data(config))
    train, held_out = asked(task)
    assert len(shots) == 3 and not any("long" in shot for shot in shots)
    beginning = "".join(f"{shot}\n{int(shot.split()[2]) + 1}\n\n" for shot in shots)
    assert all(text.startswith(beginning) for text in train + held_out)
    questions = [text.removeprefix(beginning).strip() for text in train + held_out]
    assert len(held_out) == 6 and len(set(questions)) == 27 and not set(questions) & set(shots)
    assert task.dropped["training"] == {"worked_examples": 3, "too_long": 30, "no_answer": 0}
    # As with fewer rows to leave out: what is held out does not depend on what is too long.
    short = task_of(path=write_lines(tmp_path / "b.jsonl", sums(range(30))), num_shots=3, eval__num_prompts=6)
    assert asked(short) == (train, held_out)
    # Nor on the examples: those with and without compare on the same questions.
    _, without = asked(task_of(path=tmp_path / "b.jsonl", eval__num_prompts=6))
    assert without == [text.removeprefix(beginning).strip() for text in held_out]


def test_training_questions_that_the_evaluation_has_too_are_counted(tmp_path: Path) -> None:
    path, others = write_lines(tmp_path / "a", sums(range(20))), write_lines(tmp_path / "b", sums(range(15, 25)))
    task = task_of(path=path, task__jsonl__eval_path=str(others), eval__num_prompts=4)
    assert data_metrics(task) == {"data/train": 15, "data/held_out": 4, "data/dropped/training/held_out_too": 5}


def test_the_order_of_the_file(tmp_path: Path) -> None:
    path, others = write_lines(tmp_path / "a", sums(range(9))), write_lines(tmp_path / "b", sums([99]))
    task = task_of(path=path, task__jsonl__eval_path=str(others), shuffle=False, eval__num_prompts=1, seed=3)
    in_order = [f"What is {i} + 1?" for i in range(9)]
    assert asked(task)[0] == in_order
    assert [CHARS.decode(task._ids[row]) for row in task.train_prompts(7, 4).answer] == [*in_order[7:], *in_order[:2]]


def test_a_template_is_around_every_question(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "2+2?"}]
    rows = [{"prompt": chat, "answer": 4}, {"prompt": "{prompt} + 1?", "answer": 0}, {"prompt": "1?", "answer": 1}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    template = "Q: {prompt} Put it in \\boxed{}."
    task = task_of(path=path, prompt_template=template, shuffle=False, eval__num_prompts=1)
    plain = task_of(path=path, shuffle=False, eval__num_prompts=1)
    texts = [text for side in asked(task) for text in side]
    assert set(texts) == {
        "Hi\nHello\n\nQ: 2+2? Put it in \\boxed{}.",
        "Q: {prompt} + 1? Put it in \\boxed{}.",
        "Q: 1? Put it in \\boxed{}.",
    }
    assert [item["prompt"] for item in task._items] == [item["prompt"] for item in plain._items], "the data is as it was"


# --- mixtures


def mixture_of(tmp_path: Path, **changes: Any) -> HostTask:
    write_lines(tmp_path / "a.jsonl", sums(range(40)))
    verl = [{"q": f"{i} twice?", "reward_model": {"ground_truth": str(2 * i)}} for i in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(verl), tmp_path / "b.parquet")
    gym = {"datasets": ["leg_counting"], "num_train": 30}
    members = [
        {"weight": 1, "name": "jsonl", "jsonl": {"path": str(tmp_path / "a.jsonl")}},
        {
            "weight": 2,
            "name": "dataset",
            "dataset": {"path": str(tmp_path / "b.parquet")},
            "columns": {"prompt": "q", "answer": "reward_model.ground_truth"},
        },
        {"name": "reasoning_gym", "reasoning_gym": gym},
    ]
    return task_of("mixture", mixture=json.dumps(members), reward__task="length", eval__num_prompts=8, **changes)


def kind(item: Any) -> str:
    return "gym" if "generator" in item else "verl" if "q" in item else "sum"


def test_a_mixture_of_any_sources_keeps_its_weights(tmp_path: Path) -> None:
    task = mixture_of(tmp_path)
    drawn = [kind(task._items[row]) for row in task.train_prompts(0, 80).answer]
    assert [Counter(drawn[i : i + 8]) for i in range(0, 80, 8)] == [{"sum": 2, "verl": 4, "gym": 2}] * 10
    assert Counter(kind(task._items[row]) for row in task.eval_prompts().answer) == {"sum": 2, "verl": 4, "gym": 2}
    ordered = mixture_of(tmp_path, shuffle=False)
    items = [ordered._items[row] for row in ordered.train_prompts(0, 40).answer]
    numbers = [int(item["q"].split()[0]) for item in items if "q" in item]
    assert numbers == sorted(numbers) and len(numbers) == 20
    task.close(), ordered.close()


def test_no_source_trains_on_what_another_holds_out(tmp_path: Path) -> None:
    a, b = write_lines(tmp_path / "a", sums(range(30))), write_lines(tmp_path / "b", sums(range(20, 50)))
    members = [{"name": "jsonl", "jsonl": {"path": str(path)}} for path in (a, b)]
    train, held_out = asked(task_of("mixture", mixture=json.dumps(members), eval__num_prompts=12))
    assert 8 <= len(held_out) == len(set(held_out)) <= 12 and not set(train) & set(held_out)
    assert {*train, *held_out} == {f"What is {i} + 1?" for i in range(50)}


def test_a_source_of_which_nothing_is_left_is_named(tmp_path: Path) -> None:
    a, b = write_lines(tmp_path / "a", sums(range(30))), write_lines(tmp_path / "b", sums(range(3)))
    members = [{"name": "jsonl", "jsonl": {"path": str(path)}} for path in (a, b)]
    with pytest.raises(UserError, match=r"no training question of 'source 2' is left: .*lower config\.eval\.num_prompts"):
        task_of("mixture", mixture=json.dumps(members), eval__num_prompts=6)


def test_what_a_template_refuses_is_named_with_its_line(tmp_path: Path) -> None:
    rows = [*sums(range(3)), {"prompt": "caf\u00e9", "answer": 1}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"a\.jsonl:4: character 'é' in 'café' is not in the alphabet"):
        task_of(path=path)


def test_rewards_get_the_prompt_as_its_row_has_it(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "2  +\n2?", "name": None}]
    rows = [{"ask": {"it": "2  +\n2?"}, "answer": 4}, {"ask": {"it": chat}, "answer": 4}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    (source,) = load_data(config_of(path=path, task__columns__prompt="ask.it"))
    assert [question.prompt for question in source.train] == ["2  +\n2?", chat]


@pytest.mark.parametrize(
    "mixture, changes, says",
    [
        ("", {}, "a list with at least one source"),
        ("[", {}, r"task\.mixture = '\[': not JSON"),
        ([{"name": "jsonl", "wieght": 2}], {}, r"mixture\[0\]\.wieght: not a setting of a source; it may have weight"),
        ([{"name": "jsonl", "weight": 0}], {}, r"mixture\[0\]\.weight = 0: a number above 0"),
        ([{"name": "arithmetic"}], {}, r"mixture\[0\]\.name = 'arithmetic': one of jsonl"),
        ([{"name": "jsonl", "jsonl": {"file": "a"}}], {}, r"mixture\[0\]\.jsonl\.file: unknown field"),
        ([{"name": "reasoning_gym", "reasoning_gym": {"datasets": []}}], {"reward__task": "length"}, r"at least one generator"),
        ([{"name": "reasoning_gym"}, {"name": "jsonl"}], {}, "say which reward suits all of it"),
        ([{"name": "jsonl"}], {"reward__task": "reasoning_gym"}, "only questions of task 'reasoning_gym'"),
    ],
)
def test_a_mixture_is_checked(mixture: Any, changes: dict[str, Any], says: str) -> None:
    text = mixture if isinstance(mixture, str) else json.dumps(mixture)
    with pytest.raises(UserError, match=says):
        config_of("mixture", mixture=text, **changes)


# --- reasoning-gym


def test_worked_examples_never_say_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator that only tells right from wrong has no answer to show."""
    from reasoning_gym.factory import DATASETS

    class Silent:
        def __init__(self, config: Any) -> None:
            self.size = config.size

        def __iter__(self) -> Any:
            return iter([{"question": f"Guess {i}", "answer": None, "metadata": {}} for i in range(self.size)])

    class SilentConfig:
        def __init__(self, seed: int, size: int) -> None:
            self.seed, self.size = seed, size

    monkeypatch.setitem(DATASETS, "silent", (Silent, SilentConfig))
    monkeypatch.setattr(reasoning_gym, "_seed", lambda purpose: 0 if purpose == "train" else 1)
    settings = {"task__reasoning_gym__datasets": ("silent",), "task__reasoning_gym__num_train": 9, "eval__num_prompts": 3}
    task = task_of("reasoning_gym", **settings)
    assert task._items[0]["answer"] is None
    with pytest.raises(UserError, match=r"config\.task\.num_shots = 1: no question"):
        task_of("reasoning_gym", num_shots=1, **settings)


# --- what a run keeps of its data


def test_the_fingerprint_is_of_prompts_answers_and_order(tmp_path: Path) -> None:
    rows = sums(range(8))
    path = write_lines(tmp_path / "a.jsonl", rows)
    mark = fingerprint(task_of(path=path))
    assert mark == fingerprint(task_of(path=path, seed=5)) and len(mark) == 16
    others = [
        [*rows, *sums([8])],
        [{**row, "answer": "0"} if i == 3 else row for i, row in enumerate(rows)],
        [{**row, "level": 1} for row in rows],
        rows[::-1],
    ]
    marks = {fingerprint(task_of(path=write_lines(tmp_path / "b.jsonl", other))) for other in others}
    assert len(marks) == len(others) and mark not in marks
    assert fingerprint(task_of(path=path, system_prompt="S")) != mark


def test_a_run_that_goes_on_with_other_data_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, workdir = write_lines(tmp_path / "a.jsonl", sums(range(8))), tmp_path / "run"
    workdir.mkdir()
    for _ in range(2):
        note_data(workdir, task_of(path=path))
        assert capsys.readouterr().err == "data: 6 questions to train on, 2 held out; prompts of 14 to 14 tokens\n"
    kept = json.loads((workdir / "data.json").read_text())
    assert (kept["data/train"], kept["data/held_out"]) == (6, 2)
    write_lines(path, sums(range(9)))
    note_data(workdir, task_of(path=path))
    note = capsys.readouterr().err.splitlines()[1]
    assert f"--workdir={workdir}: these are not the questions that the run began with" in note and "data/train 6 -> 7" in note
    assert json.loads((workdir / "data.json").read_text()) == kept
