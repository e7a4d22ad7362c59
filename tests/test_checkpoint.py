"""Checkpoints: what is in them, and that those of older versions are read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from grpo_jax import files
from grpo_jax.config import CheckpointConfig
from grpo_jax.errors import UserError
from grpo_jax.training.checkpoint import (
    Checkpointer,
    DamagedCheckpointError,
    restore_params,
    saved_fields,
    saved_steps,
)
from grpo_jax.training.checksums import find_damage
from grpo_jax.types import GroupBuffer
from tests import tiny

ADAM = optax.adam(1e-3)


def state_of(dim=8, step=3):
    params = tiny.bigram_params(dim=dim)
    return tiny.state_of(params, ADAM, ref_params=params, step=step)


def older_save(folder, state, **more):
    """A checkpoint as the first version wrote it: all fields of the state, None where there was nothing."""
    with ocp.CheckpointManager((folder / "checkpoints").absolute()) as manager:
        fields = {"base": None, "ref_params": None, "pending": None, "ahead": None, **saved_fields(state), **more}
        items = ocp.args.Composite(state=ocp.args.StandardSave(fields), config=ocp.args.JsonSave({}))
        manager.save(int(state.step), args=items)


def test_what_never_changes_is_not_saved():
    assert set(saved_fields(state_of())) == {"step", "params", "opt_state", "num_prompts_drawn"}


@pytest.mark.parametrize("is_older", [False, True])
def test_a_state_comes_back_bitwise_also_from_an_older_version(tmp_path, is_older):
    state, like = state_of(), jax.tree.map(jnp.zeros_like, state_of())
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    if is_older:
        older_save(tmp_path, state)
        checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    else:
        checkpointer.save(3, state, {})
        checkpointer.close()
        checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    restored = checkpointer.restore(3, like)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, saved_fields(restored), saved_fields(state))
    assert jax.tree.structure(saved_fields(restored)) == jax.tree.structure(saved_fields(state))
    assert restored.ref_params is None and restored.hyperparams is None
    params = restore_params(tmp_path, 3, like.params)
    jax.tree.map(np.testing.assert_array_equal, params, state.params)


def test_waiting_batches_of_an_older_version_are_read_and_all_of_their_rows_have_scores(tmp_path):
    """It had no is_scored_PG, and `next_batch` was `ahead`."""
    batch = tiny.random_batch()
    scored = batch.replace(is_scored_PG=jnp.ones_like(batch.reward_PG, bool))
    older_save(tmp_path, state_of(), pending=GroupBuffer(batch, jnp.int32(2)), ahead=batch)
    like = state_of().replace(pending=GroupBuffer(scored, jnp.int32(0)), next_batch=scored)
    like = jax.tree.map(jnp.zeros_like, like)
    restored = _restored(tmp_path, like)
    expected = state_of().replace(pending=GroupBuffer(scored, jnp.int32(2)), next_batch=scored)
    jax.tree.map(np.testing.assert_array_equal, saved_fields(restored), saved_fields(expected))
    with pytest.raises(UserError, match=r"ahead\.rollout\.support_PGT is missing.*version of grpo_jax"):
        wanted = scored.replace(rollout=scored.rollout.replace(support_PGT=jnp.zeros((8, 4, 5), jnp.int32)))
        _restored(tmp_path, like.replace(next_batch=wanted))


def _restored(folder, like):
    checkpointer = Checkpointer(folder, CheckpointConfig())
    try:
        return checkpointer.restore(3, like)
    finally:
        checkpointer.close()


def test_another_model_is_refused_by_name(tmp_path):
    older_save(tmp_path, state_of())
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(UserError, match=r"checkpoints/3: does not fit this config \(.*shape"):
        checkpointer.restore(3, state_of(dim=4))
    checkpointer.close()


def saved(folder, *steps):
    """A workdir with checkpoints of these steps, each of other numbers."""
    checkpointer = Checkpointer(folder, CheckpointConfig(keep=len(steps)))
    for step in steps:
        state = state_of(step=step)
        checkpointer.save(step, state.replace(params=jax.tree.map(lambda x: x + step, state.params)), {"of": step})  # noqa: B023
    checkpointer.close()
    return folder / "checkpoints"


def newest(folder, step=None, **kwargs):
    """-> (step, params) as a resume finds them."""
    like = jax.tree.map(jnp.zeros_like, state_of())
    checkpointer = Checkpointer(folder, CheckpointConfig())
    try:
        found = checkpointer.restore_newest(lambda each: checkpointer.restore(each, like), step, **kwargs)
    finally:
        checkpointer.close()
    return found and (found[0], found[1].params)


def is_of_step(params, step):
    return tiny.largest_difference(params, jax.tree.map(lambda x: x + step, state_of().params)) == 0


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit": lambda path: flip(path, 8 * path.stat().st_size // 2),
    "deleted": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A workdir with checkpoints of steps 3 and 5, not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    saved(folder, 3, 5)
    return folder


def files_of(folder, step):
    return sorted(path for path in (folder / "checkpoints" / str(step)).rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, two, capsys, monkeypatch, damage):
    """Every file of it in turn."""
    num = len(files_of(two, 5))
    assert num > 8
    for i in range(num):
        monkeypatch.setattr(files, "_said", set())
        folder = tmp_path / str(i)
        shutil.copytree(two, folder)
        path = files_of(folder, 5)[i]
        damage(path)
        # Nothing is missed where the sums are, or what Orbax adds when a checkpoint is complete.
        is_needed = path.parent.name != "5" or (path.name == "checksums.json" and path.exists())
        step, params = newest(folder)
        said = capsys.readouterr().err
        if is_needed:
            assert step == 3, path
            named = path.relative_to(folder / "checkpoints" / "5")
            assert f"checkpoints/5: damaged ({named}" in said
            assert "5: renamed to aside-0-5" in said
            assert sorted(each.name for each in (folder / "checkpoints").iterdir()) == ["3", "aside-0-5"]
        else:
            assert step == 5, path
        assert is_of_step(params, step)


def test_no_bit_of_the_table_of_sums_blames_a_file(tmp_path, two):
    """Every bit of it in turn: it is named, or its meaning is the same (a blank that became a tab)."""
    step = tmp_path / "5"
    shutil.copytree(two / "checkpoints" / "5", step)
    whole = (step / "checksums.json").read_bytes()
    found = set()
    for bit in range(8 * len(whole)):
        (step / "checksums.json").write_bytes(whole)
        flip(step / "checksums.json", bit)
        found.add(find_damage(step))
    assert found <= {"", "checksums.json is damaged"}
    (step / "checksums.json").write_text(json.dumps({"crc32": json.loads(whole)["crc32"]}))
    assert find_damage(step) == "", "an older version's table has no sum of its own"


def test_a_wish_for_a_step_or_for_no_other_is_obeyed(tmp_path, two):
    shutil.copytree(two, tmp_path / "run")
    DAMAGES["half"](next(path for path in files_of(tmp_path / "run", 5) if path.parent.name == "d"))
    for wish in ({"step": 5}, {"is_strict": True}):
        with pytest.raises(DamagedCheckpointError, match=r"checkpoints/5: damaged \(state/.* bytes in place of"):
            newest(tmp_path / "run", **wish)
    with pytest.raises(UserError, match=r"--step=4: no such checkpoint .*: 3, 5"):
        newest(tmp_path / "run", 4)
    assert newest(tmp_path / "run", 3)[0] == 3
    assert saved_steps(tmp_path / "run") == [3], "the steps behind it come again"


def test_with_no_whole_checkpoint_nothing_is_begun_and_nothing_moved(tmp_path, two):
    shutil.copytree(two, tmp_path / "run")
    for step in (3, 5):
        DAMAGES["one bit"](next(path for path in files_of(tmp_path / "run", step) if path.parent.name == "d"))
    with pytest.raises(DamagedCheckpointError, match=r"none of the 2 checkpoint\(s\) there can be read"):
        newest(tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [3, 5]


def test_what_is_no_checkpoint_is_passed_over(tmp_path, two, capsys):
    shutil.copytree(two, tmp_path / "run")
    for name in ("7", "notes", "9.orbax-checkpoint-tmp"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
    step, params = newest(tmp_path / "run")
    assert step == 5 and is_of_step(params, 5)
    assert "checkpoints/7: damaged (no checkpoint is in it)" in capsys.readouterr().err
    assert newest(tmp_path / "empty") is None


def test_a_checkpoint_that_holds_nan_is_none(tmp_path):
    state = state_of(step=3)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    checkpointer.save(3, state, {})
    checkpointer.save(4, state.replace(params=jax.tree.map(lambda x: x.at[0].set(jnp.nan), state.params)), {})
    checkpointer.close()
    with pytest.raises(DamagedCheckpointError, match=r"checkpoints/4: params\..* holds NaN or infinity"):
        newest(tmp_path, is_strict=True)
    assert newest(tmp_path)[0] == 3


def test_the_newest_the_multiples_and_the_best_are_kept(tmp_path):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=1, every=2, keep_every=4))
    for step in range(2, 12, 2):
        if step in (2, 6):
            checkpointer.best.step = step
        checkpointer.save(step, state_of(step=step), {})
    checkpointer.close()
    assert saved_steps(tmp_path) == [4, 6, 8, 10]
