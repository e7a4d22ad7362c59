"""Checkpoints: what is in them, and that those of older versions are read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from grpo_jax.config import CheckpointConfig
from grpo_jax.errors import UserError
from grpo_jax.training.checkpoint import Checkpointer, restore_params, saved_fields
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


def test_another_model_is_refused_by_name(tmp_path):
    older_save(tmp_path, state_of())
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    with pytest.raises(UserError, match=r"checkpoints/3: does not fit this config \(.*shape"):
        checkpointer.restore(3, state_of(dim=4))
    checkpointer.close()
