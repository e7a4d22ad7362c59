"""The doctor: a whole run has nothing wrong, and each damage is named where it is, with what to do."""

import shutil

import pytest

from grpo_jax.tools.examination import examine, is_config
from grpo_jax.training.checksums import write_checksums
from grpo_jax.training.settings import init_workdir
from tests import tiny


@pytest.fixture
def workdir(tmp_path):
    """A folder with all that a run of three steps leaves, but for a state that could be restored."""
    init_workdir(tmp_path, tiny.config_of("grpo").to_dict())
    (tmp_path / "metrics.jsonl").write_text("".join(f'{{"step": {step}, "reward/mean": 0.5}}\n' for step in range(4)))
    (tmp_path / "completions.jsonl").write_text("")
    (tmp_path / "summary.json").write_text('{"steps": 3}')
    for step in (2, 3):
        (tmp_path / "checkpoints" / str(step) / "state").mkdir(parents=True)
        (tmp_path / "checkpoints" / str(step) / "state" / "numbers").write_bytes(bytes(100))
        write_checksums(tmp_path / "checkpoints" / str(step))
    return tmp_path


def wrong(what):
    return {finding.part: finding.said for finding in examine(str(what)) if finding.kind == "wrong"}


def test_a_whole_run_has_nothing_wrong(workdir):
    found = list(examine(str(workdir)))
    assert {finding.kind for finding in found} == {"ok"}
    parts = {finding.part for finding in found}
    assert parts >= {
        "lock",
        "config.json",
        "metrics.jsonl",
        "checkpoints/2",
        "checkpoints/3",
        "summary.json",
        "task, model, disk",
    }


def append(path, text):
    with path.open("a") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("damage", "part", "words"),
    [
        (lambda w: (w / "config.json").write_text(""), "config.json", "cannot be read as JSON: empty"),
        (lambda w: append(w / "metrics.jsonl", "\n"), "metrics.jsonl", "no record: line 5 (empty)"),
        (lambda w: append(w / "metrics.jsonl", '{"step": 9}\n'), "metrics.jsonl", "steps are missing (5, the first 4)"),
        (lambda w: append(w / "metrics.jsonl", '{"step": 3}\n'), "metrics.jsonl", "twice"),
        (lambda w: append(w / "completions.jsonl", '{"step'), "completions.jsonl", "line 1 (the last one, torn)"),
        (lambda w: append(w / "checkpoints/3/state/numbers", "x"), "checkpoints/3", "has 101 bytes in place of 100"),
        (lambda w: shutil.rmtree(w / "checkpoints/3/state"), "checkpoints/3", "no checkpoint is in it"),
        (lambda w: (w / "summary.json").write_text("{"), "summary.json", "the next start writes it anew"),
        (lambda w: (w / "sources.json").write_text("[]"), "sources.json", "a JSON object is expected"),
    ],
)
def test_each_damage_is_found_where_it_is_and_nowhere_else(workdir, damage, part, words):
    damage(workdir)
    found = wrong(workdir)
    assert list(found) == [part] and words in found[part]


def test_a_config_or_a_model_that_cannot_be_is_named(tmp_path):
    assert wrong("configs/grpo.py:runlocal") == {}
    assert "no file configs/none.py" in wrong("configs/none.py")["configs/none.py"]
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    found = wrong(tmp_path)
    for part in ("config.json", "weights"):
        assert "model_type" in found[f"{tmp_path}: {part}"]


def test_a_shipped_config_is_known_by_its_name():
    assert [is_config(what) for what in ("dapo:tiny", "gspo", "my/own.py", "Qwen/Qwen2.5-0.5B", "runs/dapo")] == [True] * 3 + [
        False
    ] * 2
