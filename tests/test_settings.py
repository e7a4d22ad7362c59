"""What a run goes on with: settings that may differ, those that may not, and the files that it began with."""

import dataclasses
import json
import shutil

import pytest

from grpo_jax import files
from grpo_jax.errors import UserError
from grpo_jax.models.fingerprint import TOKENIZER, WEIGHTS, fingerprint
from grpo_jax.training.settings import (
    HARMLESS,
    Start,
    check_same_config,
    check_sources,
    init_workdir,
    read_config,
    read_settings,
)
from grpo_jax.training.trainer import Loop
from tests import tiny


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(files, "_said", set())


def test_only_settings_that_change_the_training_must_be_named(tmp_path, capsys):
    old = tiny.config_of("grpo", {"num_steps": 4})
    init_workdir(tmp_path, old.to_dict())
    changes = {"num_steps": 5, "eval_every": 3, "log.num_groups": 1, "checkpoint.keep": 7, "optimizer.max_skipped_steps": 9}
    check_same_config(tmp_path, tiny.config_of("grpo", changes).to_dict())
    said = capsys.readouterr().err
    for name in changes:
        assert f"going on with another setting, config.{name} was" in said
    harmful = {"num_steps": 3, "optimizer.learning_rate": 1.0, "optimizer.b1": 0.5, "eval.num_prompts": 5, "seed": 7}
    new = tiny.config_of("grpo", harmful).to_dict()
    with pytest.raises(UserError, match=r"config\.eval\.num_prompts was .* and 2 more; .*--allow_config_change=") as caught:
        check_same_config(tmp_path, new)
    named = str(caught.value).rpartition("=")[2].split(",")
    assert sorted(named) == sorted(harmful)
    check_same_config(tmp_path, new, Start(allowed_changes=named))
    with pytest.raises(UserError, match=r"--allow_config_change=eval\.num_prompts,num_steps,seed$"):
        check_same_config(tmp_path, new, Start(allowed_changes=["optimizer"]))
    assert read_config(tmp_path) == old


def test_a_field_that_an_older_version_did_not_have_is_no_other_setting(tmp_path, recwarn, capsys):
    """Also where its default is a tuple, which JSON has as a list. What is renamed since is not the user's to rename."""
    config = tiny.config_of("grpo")
    values = json.loads(json.dumps(config.to_dict()))
    del values["rollout"]["bad_ids"], values["objective"]["cov_range"], values["reward"]["reasoning_tags"]
    values["rollout"]["live_rows"] = values["rollout"].pop("max_live_sequences")
    (tmp_path / "config.json").write_text(json.dumps(values))
    check_same_config(tmp_path, config.to_dict())
    assert not recwarn.list and not capsys.readouterr().err


def test_what_is_left_to_the_run_goes_on_with_what_it_decided(tmp_path, capsys):
    init_workdir(tmp_path, tiny.config_of("grpo", {"learner.num_microbatches": 2, "rollout.num_prompts": 4}).to_dict())
    check_same_config(tmp_path, tiny.config_of("grpo", {"learner.num_microbatches": 0, "rollout.num_prompts": 4}).to_dict())
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=r"config\.learner\.num_microbatches was 2, now 4"):
        check_same_config(tmp_path, tiny.config_of("grpo", {"learner.num_microbatches": 4, "rollout.num_prompts": 4}).to_dict())


def test_every_harmless_name_is_one_of_a_field_or_group():
    names = set()

    def collect(values, where):
        for key, value in values.items():
            names.add(f"{where}{key}")
            if isinstance(value, dict):
                collect(value, f"{where}{key}.")

    collect(tiny.config_of().to_dict(), "")
    assert set(HARMLESS) <= names and len(names) > 50


def test_of_a_damaged_config_the_checkpoints_copy_is_read(tmp_path, capsys):
    init_workdir(tmp_path, tiny.config_of().to_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config\.json: cannot be read as JSON: Expecting"):
        read_settings(tmp_path)
    for step, content in ((3, json.dumps(config)), (5, "")):
        folder = tmp_path / "checkpoints" / str(step)
        (folder / "state").mkdir(parents=True)
        (folder / "config").mkdir()
        (folder / "config" / "metadata").write_text(content)
    assert read_settings(tmp_path) == config
    assert "config.json: cannot be read as JSON" in (said := capsys.readouterr().err) and "copy is taken" in said
    # One that is JSON still, but of another run than its checkpoint, is damaged too.
    (tmp_path / "config.json").write_text(json.dumps({**config, "seed": 8}))
    check_same_config(tmp_path, tiny.config_of().to_dict())
    assert "config.seed was 8, now 0, but its newest checkpoint was made with this config" in capsys.readouterr().err


def test_a_config_of_nonsense_is_one_line_that_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"config\.json: config\.model: expected a group of fields") as caught:
        read_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_another_training_of_the_same_shape_has_another_fingerprint(tmp_path):
    for name, byte in (("a", b"\x00"), ("b", b"\x01"), ("c", b"\x00")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"header" + byte * 3_000_000)
        (tmp_path / name / "tokenizer.json").write_text("{}")
    marks = [fingerprint(tmp_path / name, WEIGHTS) for name in "abc"]
    assert marks[0] == marks[2] != marks[1]
    assert len({fingerprint(tmp_path / name, TOKENIZER) for name in "abc"}) == 1
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "c" / "model-2.safetensors")
    assert fingerprint(tmp_path / "c", WEIGHTS) != marks[0]


def test_a_model_that_was_replaced_is_refused_where_it_is_read_again_and_said_where_not(tmp_path, capsys):
    def check(mark, reads_again=(), allowed=()):
        check_sources(tmp_path, {"model.path": mark}, Start(allowed_changes=allowed), reads_again=reads_again)

    check("1")
    check("1", ["model.path"])
    assert not capsys.readouterr().err
    with pytest.raises(UserError, match=r"sources\.json: the files of model\.path .*--allow_config_change=model\.path$"):
        check("2", ["model.path"])
    check("2", ["model.path"], ["model"])
    assert "are not those that the run began with; going on" in capsys.readouterr().err
    check("2", ["model.path"])
    check("3")
    (tmp_path / "sources.json").write_text("")
    check("4", ["model.path"])
    assert "sources.json: cannot be read as JSON: empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resumed", "per_call", "ends"),
    [(None, 0, [1, 2, 3, 4]), (2, 0, [3, 4]), (None, 2, [2, 4]), (3, 2, [4]), (1, 4, [4]), (2, 2, [4]), (4, 2, [])],
)
def test_calls_end_where_evaluations_and_checkpoints_are_due(resumed, per_call, ends):
    config = dataclasses.replace(tiny.config_of(), num_steps=4, steps_per_call=per_call)

    class Fns:
        pass

    Fns.config = config
    assert list(Loop(Fns, [], None, None).calls(resumed)) == ends
