"""The page of the data: prompts as tokens, counts, lengths, and what the reward says to right and to empty answers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from rich.console import Console

import grpo_jax
from grpo_jax.errors import RunError
from grpo_jax.tools import data as tool
from grpo_jax.tools.inspection import TASK, DataView, PartView, closing, inspect_data
from tests import tiny
from tests.test_prompts import CHATML, THINKING, save_tokenizer


def view_of(tmp_path: Path, rows: list[dict[str, Any]], template: str = CHATML, **changes: Any) -> DataView:
    """The view of some rows. changes: fields of a config, a double underscore for the dot."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.path": save_tokenizer(tmp_path / "model", template=template),
        "task.name": "jsonl",
        "task.jsonl.path": str(tmp_path / "a.jsonl"),
        "task.shuffle": False,
        "eval.num_prompts": 2,
        "rollout.max_completion_tokens": 12,
        "reward.scoring.num_workers": 1,
        "reward.scoring.time_limit_secs": 30.0,
    }
    config = tiny.config_of("grpo", {**settings, **{name.replace("__", "."): value for name, value in changes.items()}})
    return inspect_data(config, num_prompts=2, num_scored=4)


def page(view: DataView) -> str:
    console = Console(width=140, file=io.StringIO(), record=True, color_system=None)
    console.print(view)
    return console.export_text()


def test_what_a_person_sees_before_a_run(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+{i}?", "answer": f"twice {i}\n#### {2 * i}"} for i in range(8)]
    rows += [{"prompt": "long " * 200, "answer": "0"}, {"prompt": "none", "answer": None}]
    view = view_of(tmp_path, rows, THINKING, reward__shaping="format - 0.1*length")
    first = view.prompts[0]
    assert first.text == "<|im_start|>user\n0+0?<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert [piece for piece, special in zip(first.pieces, first.is_special, strict=True) if special] == [
        *("<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>")
    ]
    assert view.stops[0] == "<eos>" and "<|im_end|>" in view.stops
    assert (first.where, first.answer, first.opens) == (f"{tmp_path}/a.jsonl:1", "0", "<think>\n")
    assert view.counts == {
        "data/train": 6.0,
        "data/held_out": 2.0,
        "data/dropped/training/no_answer": 1.0,
        "data/dropped/training/too_long": 1.0,
    }
    assert len(view.lengths) == 8 and set(view.lengths) == {len(first.pieces)}
    parts = {part.name: part for part in view.parts}
    assert list(parts) == [TASK, "math_verify", "format", "length"] and view.num_scored == 4
    assert [(parts[name].reference, parts[name].empty) for name in (TASK, "math_verify")] == [(1.0, 0.0)] * 2
    # The closing tag, a line feed, the number and the end, of twelve tokens.
    assert (parts["length"].reference, parts["length"].empty) == pytest.approx((1 - 4 / 12, 1 - 1 / 12))
    assert [part.compares for part in view.parts] == [False, True, False, False] and view.complaints == []
    shown = page(view)
    apart = "<|im_start|>│u│s│e│r│\\n│"
    for text in ("6 questions to train on, 2 held out", "data/dropped/training/too_long", apart, "prompt 1"):
        assert text in shown
    assert "math_verify" in shown and "ok" in shown and "tokens of 8 prompts, at most 512" in shown


MINE = """
def strict(completion, item):
    return float(completion == item["answer"] and item["answer"] != "2")


def number(completion, item):
    return float(int(completion) == int(item["answer"]))
"""


def test_complaints_name_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_for_inspect.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"prompt": f"{i}?", "answer": str(i) if i else "x" * 20} for i in range(6)]
    changes = {"reward__regex__pattern": "^([0-46-9]?)", "reward__shaping": "mine_for_inspect:strict"}
    view = view_of(tmp_path, rows, reward__task="regex", **changes)
    parts = {part.name: part for part in view.parts}
    failing = parts["regex"]
    assert failing.compares and failing.reference is not None and failing.reference < 1
    assert failing.wrong == (f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:6")
    assert failing.verdict == f"the reference answer is not right for {', '.join(failing.wrong)}"
    assert not parts["mine_for_inspect:strict"].compares
    assert view.num_over_budget == 1
    assert view.complaints[-1].startswith("1 of 4 reference answers are longer than config.rollout.max_completion_tokens = 12")
    assert f"! {view.complaints[0]}"[:40] in page(view)
    several = PartView("x", 1.0, 1.0, True, trivial=("a:1", "a:2", "a:3", "a:4"))
    assert several.verdict == "an empty one is right for a:1, a:2, a:3 and 1 more"


def test_a_reward_that_fails_on_nothing_is_shown_without_a_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "number_for_inspect.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"prompt": f"{i}?", "answer": [i, -i]} for i in range(1, 7)]
    # On all references it may not fail: the data does not suit it, as int() does not take a tuple.
    with pytest.raises(RunError, match=r"reward number_for_inspect:number: all 4 completions .* TypeError"):
        view_of(tmp_path, rows, reward__task="number_for_inspect:number")
    rows = [{"prompt": f"{i}?", "answer": i} for i in range(1, 7)]
    part = view_of(tmp_path, rows, reward__task="number_for_inspect:number").parts[1]
    assert (part.reference, part.empty) == (1.0, None)


def test_prompts_alone(tmp_path: Path) -> None:
    alone = view_of(tmp_path, [{"prompt": f"A haiku about {i}"} for i in range(6)], reward__task="length")
    parts = [(part.name, part.reference, part.compares) for part in alone.parts]
    assert parts == [(TASK, None, False), ("length", None, False)]
    assert alone.prompts[0].answer is None and "reference answer" in page(alone)


def test_the_embedded_task_has_a_page_too() -> None:
    view = grpo_jax.inspect_data(tiny.config_of("grpo", {"eval.num_prompts": 8}), num_prompts=1, num_scored=3)
    (part,) = view.parts
    assert (part.name, part.reference, part.empty) == (TASK, 1.0, 0.0) and len(view.lengths) == 8
    assert page(view)


def test_open_tags_are_closed() -> None:
    assert [closing(text) for text in ("", "<think>\n", "<think>\n\n</think>\n\n", "<think></think><answer>", "<a>x<b>")] == [
        *("", "</think>\n", "", "</answer>\n", "</b>\n</a>\n")
    ]


def test_the_command_prints_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(sys.argv[:1])
    monkeypatch.setattr(tool.cli, "config_from_flags", lambda: "the config")
    monkeypatch.setattr("grpo_jax.tools.inspection.inspect_data", lambda *given: f"the page of {given}")
    tool.main()
    assert capsys.readouterr().out == "the page of ('the config', 3, 64)\n"
