"""The best checkpoint: saved when it is found, kept, known after a resume, and found by its name."""

import dataclasses
import types

import pytest

from grpo_jax import files
from grpo_jax.errors import UserError
from grpo_jax.tools import cli
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.settings import init_workdir
from grpo_jax.training.trainer import Member
from tests import tiny

CONFIG = {"checkpoint.keep_best": "eval/success"}


def member(config):
    run = types.SimpleNamespace(config=config)
    return Member(run, None, types.SimpleNamespace(best=types.SimpleNamespace(step=-1)))


def test_of_equal_ones_the_first_is_the_best_and_nan_is_none():
    one = member(tiny.config_of("grpo", CONFIG))
    values = [0.1, float("nan"), 0.3, 0.3, 0.2, 0.4]
    assert [one.note_best(step, {"eval/success": value}) for step, value in enumerate(values)] == [
        True, False, True, False, False, True
    ]  # fmt: skip
    assert one.checkpointer.best.step == 5
    assert not one.note_best(6, {}), "a step without an evaluation"
    with pytest.raises(UserError, match=r"keep_best = 'eval/success': not evaluated; there are: eval/mean@4"):
        one.note_best(7, {"eval/mean@4": 1.0})
    assert not member(tiny.config_of("grpo")).note_best(1, {"eval/success": 1.0})


def test_the_best_is_a_step_by_name(tmp_path, monkeypatch):
    init_workdir(tmp_path, tiny.config_of("grpo", CONFIG).to_dict())
    lines = [f'{{"step": {step}, "eval/success": {value}}}\n' for step, value in ((0, 0.9), (2, 0.5), (4, 0.7), (6, 0.7))]
    files.write_atomically(tmp_path / "metrics.jsonl", "".join(lines))
    monkeypatch.setattr(cli, "STEP", types.SimpleNamespace(value="best"))
    with pytest.raises(UserError, match="no finished checkpoint"):
        cli.chosen_step(tmp_path)
    for step in (4, 6):
        (tmp_path / "checkpoints" / str(step) / "state").mkdir(parents=True)
    assert saved_steps(tmp_path) == [4, 6] and cli.chosen_step(tmp_path) == 4
    monkeypatch.setattr(cli, "STEP", types.SimpleNamespace(value="worst"))
    with pytest.raises(UserError, match="--step=worst: expected a number, or best"):
        cli.chosen_step(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"checkpoint.keep": 0, "checkpoint.keep_every": 100}, "keep = 0"),
        ({"checkpoint.every": 100, "checkpoint.keep_every": 150}, "must be a multiple of config.checkpoint.every"),
        ({"checkpoint.keep_best": "reward/mean"}, "a metric of the evaluation"),
    ],
)
def test_what_cannot_be_kept_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tiny.config_of("grpo", changes)
    assert dataclasses.is_dataclass(tiny.config_of("grpo", CONFIG))
