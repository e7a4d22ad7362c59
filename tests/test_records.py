"""Files of records: what a resume cuts off, what it keeps, what readers skip, and that each of it is said."""

import json

import pytest

from grpo_jax import files
from grpo_jax.errors import UserError
from grpo_jax.training import records as records_lib
from grpo_jax.training.records import cut_after, read_records
from grpo_jax.training.runlog import RunLog, completion_fault, metrics_fault, read_completions, read_metrics


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """Every test hears a line anew."""
    monkeypatch.setattr(files, "_said", set())


def lines(*steps):
    return [json.dumps({"step": step, "x": 0.5 + step}).encode() + b"\n" for step in steps]


def write(path, parts):
    path.write_bytes(b"".join(parts))
    return path


def steps_of(path):
    return [record["step"] for record in read_records(path, metrics_fault)]


@pytest.mark.parametrize("step", [-1, 0, 3, 5, 99])
@pytest.mark.parametrize("torn", [b"", b'{"step": 6, "x', b"\xe2\x82", b"\0" * 40])
def test_a_resume_keeps_just_the_wanted_records(tmp_path, step, torn):
    path = write(tmp_path / "metrics.jsonl", [*lines(*range(6)), torn])
    end = cut_after(path, step, metrics_fault)
    kept = [each for each in range(6) if each <= step]
    assert path.read_bytes() == b"".join(lines(*kept))
    assert end.kept == (kept[-1] if kept else None)
    assert end.dropped == ((len(kept), 5) if len(kept) < 6 else None)


def test_nothing_before_the_end_is_read_or_written(tmp_path, monkeypatch):
    """A kill during the cut loses nothing, for there is one truncation and no other change; memory holds a line at a time."""
    path = write(tmp_path / "metrics.jsonl", lines(*range(1000)))
    seen = []
    parse = files.parse_json_object
    monkeypatch.setattr(records_lib, "parse_json_object", lambda line: seen.append(line) or parse(line))
    before = path.stat().st_ino
    cut_after(path, 990, metrics_fault)
    assert path.stat().st_ino == before and len(seen) == 10


DAMAGED = {
    "blank": b"\n",
    "no JSON": b'{"step": 4, "x": 4.\x00}\n',
    "no object": b"[4]\n",
    "no step": b'{"x": 4.5}\n',
    "no number": b'{"step": 4, "x": "4.5"}\n',
    "no UTF-8": b'{"step": 4, "\xff": 4.5}\n',
    "deep": b"[" * 100_000 + b"\n",
}


@pytest.mark.parametrize("damaged", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("place", [0, 2, 4, 6])
def test_a_damaged_line_is_named_and_kept_and_costs_no_other(tmp_path, capsys, damaged, place):
    parts = lines(0, 1, 2, 3, 5, 6)
    parts.insert(place, damaged)
    path = write(tmp_path / "metrics.jsonl", parts)
    cut_after(path, 6, metrics_fault)
    assert path.read_bytes() == b"".join(parts)
    assert steps_of(path) == [0, 1, 2, 3, 5, 6]
    said = capsys.readouterr().err
    assert f"{path}: no record, skipped: line {place + 1} (" in said
    # The resume looks at the end alone.
    assert (f"{path}, line 7: no record" in said) == (place == 6)


def test_a_damaged_line_behind_steps_that_come_again_goes_with_them(tmp_path, capsys):
    path = write(tmp_path / "metrics.jsonl", [*lines(0, 1), b"?\n", *lines(3), b"??\n", *lines(5)])
    cut_after(path, 1, metrics_fault)
    assert path.read_bytes() == b"".join([*lines(0, 1), b"?\n"])
    said = capsys.readouterr().err
    assert "line 3: no record" in said and "1 damaged line(s) behind a step that is done again: removed" in said


def test_a_last_line_without_its_newline_is_not_glued_to_the_next(tmp_path):
    write(tmp_path / "metrics.jsonl", [b"".join(lines(0, 1, 2))[:-1]])
    log = RunLog(tmp_path, 2, 4)
    log.metrics(3, {"x": 1.0})
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 3]


def test_records_that_a_checkpoint_should_have_are_missed(tmp_path, capsys):
    write(tmp_path / "metrics.jsonl", lines(0, 1))
    RunLog(tmp_path, 5, 9).close()
    assert "no records of steps 2 to 5, although the checkpoint is of step 5" in capsys.readouterr().err
    write(tmp_path / "metrics.jsonl", lines(0, 1, 2, 3))
    RunLog(tmp_path, 1, 9).close()
    assert "records of steps 2 to 3 are behind the checkpoint of step 1" in capsys.readouterr().err


ROW = {
    "step": 1,
    "group": 0,
    "prompt": "1+1=",
    "completion": "2",
    "task_reward": 1.0,
    "reward": 1.0,
    "tokens": 1,
    "is_truncated": False,
    "entropy": 0.5,
    "grpo_advantage": 0.0,
    "token_text": ["2"],
    "token_entropy": [0.5],
    "token_advantage": [0.0],
}


@pytest.mark.parametrize(
    "changes",
    [
        {"group": "0"},
        {"task_reward": None},
        {"is_truncated": 0},
        {"token_entropy": []},
        {"token_text": [1]},
        {"token_text": "2"},
    ],
)
def test_a_completion_with_a_field_of_another_kind_is_no_record(changes):
    assert completion_fault(ROW) == "" and completion_fault({**ROW, "prompt": [{"role": "user"}]}) == ""
    assert completion_fault({**ROW, **changes})


def test_any_text_comes_back(tmp_path):
    """Also half of a surrogate pair, which UTF-8 cannot write."""
    text = 'a\u2028b\n"\\\ud800 \U0001f600 \x00'
    log = RunLog(tmp_path, -1, 2)
    log.completions(1, [{key: value for key, value in ROW.items() if key != "step"} | {"completion": text}])
    log.close()
    assert [row["completion"] for row in read_completions(tmp_path)] == [text]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\0\0", "zero bytes"),
        (b'{"a": 1', "Expecting"),
        (b"[1]", "not list"),
        (b"\xff", "no UTF-8"),
        (b"[" * 100_000, "nested|recursion"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content, reason):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"config\.json: cannot be read as JSON: .*({reason}).*; do this$") as caught:
        files.read_json(path, "do this")
    assert "\n" not in str(caught.value)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_atomically(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, "new")
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["summary.json"]


def test_what_is_shown_is_one_line_without_escapes():
    assert files.printable("a\n  b\x1b[31mred\x07\ud800") == "a b\\x1b[31mred\\x07\\xd800"
    long = files.printable("x" * 20_000, 100)
    assert len(long) < 150 and "[19900 characters]" in long
