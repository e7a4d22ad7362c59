"""What is said about credit: against float64, and the same on however many devices the batch lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.learner.advantage_diagnostics import advantage_metrics, advantages_with_grpo, batch_advantages
from grpo_jax.parallel.sharding import ROWS
from tests import oracle, tiny

P, G, T = 8, 4, 5
NAMES = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")


@functools.cache
def batch_of(num_devices):
    return jax.device_put(tiny.random_batch(P, G, T), NamedSharding(tiny.mesh_of(num_devices), ROWS))


def by_oracle(obj, batch, mask_PGT):
    rollout = jax.device_get(batch.rollout)
    rows = [np.asarray(x).reshape(P * G, -1) for x in (mask_PGT, rollout.entropy_PGT)]
    task_B = np.asarray(batch.task_reward_PG).reshape(-1)
    return oracle.advantages(obj, np.asarray(batch.reward_PG).reshape(-1), *rows, G, task_B).reshape(P, G, T)


@pytest.mark.parametrize("filter_truncated", [False, True])
def test_recorded_advantages_on_8_devices_are_those_of_the_whole_batch(filter_truncated):
    """GTPO normalises over the batch: a device that looked at its own group only would record other numbers."""
    obj, batch = objectives.get("gtpo", stat_scope="batch"), batch_of(8)
    recorded = jax.jit(lambda batch: advantages_with_grpo(obj, batch, filter_truncated))
    adv_PGT, grpo_PG = recorded(batch)
    mask_PGT = np.asarray(batch.rollout.mask_PGT)
    if filter_truncated:
        assert 0 < batch.rollout.is_truncated_PG.sum() < P * G
        mask_PGT = mask_PGT * ~np.asarray(batch.rollout.is_truncated_PG)[..., None]
    np.testing.assert_allclose(adv_PGT, by_oracle(obj, batch, mask_PGT), atol=2e-5)
    np.testing.assert_allclose(grpo_PG, by_oracle(objectives.get("grpo"), batch, mask_PGT)[..., 0], atol=2e-5)
    by_group = by_oracle(objectives.get("gtpo", stat_scope="group"), batch, mask_PGT)
    assert np.abs(adv_PGT - by_group).max() > 0.1


@functools.cache
def compiled_metrics():
    def every_metric(batch, mask_PGT):
        objs = {name: objectives.get(name) for name in NAMES}
        advs = {name: batch_advantages(obj, batch, mask_PGT, batch.rollout.entropy_PGT) for name, obj in objs.items()}
        return {name: advantage_metrics(objs[name], batch, mask_PGT, advs[name]) for name in NAMES}

    return jax.jit(every_metric)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_metrics_of_every_variant_are_float64s(num_devices):
    batch = batch_of(num_devices)
    mask_PGT = batch.rollout.mask_PGT.at[5].set(0.0)  # a missing group
    got = compiled_metrics()(batch, mask_PGT)
    is_trained = np.asarray(mask_PGT) > 0
    success = np.broadcast_to(np.asarray(batch.task_reward_PG)[..., None] >= 0.5, is_trained.shape)[is_trained]
    grpo = by_oracle(objectives.get("grpo"), batch, mask_PGT)[is_trained]
    for name in NAMES:
        ours = by_oracle(objectives.get(name), batch, mask_PGT)[is_trained]
        values = metrics_lib.to_floats(got[name])
        differs = (np.abs(ours - grpo) > 1e-4 * np.maximum(np.abs(ours), np.abs(grpo))).mean()
        assert values["advantage/differs_from_grpo"] == pytest.approx(differs, abs=1e-6), name
        assert values["advantage/success_correlation"] == pytest.approx(np.corrcoef(ours, success)[0, 1], abs=1e-5), name
        assert (differs > 0.2) == (name in ("dr_grpo", "gtpo", "grpo_s")), name
        assert values["advantage/success_correlation"] > 0.3, name


def test_a_batch_that_says_nothing_is_silent():
    batch = batch_of(1)
    everywhere = batch.replace(task_reward_PG=jnp.ones((P, G)), reward_PG=jnp.ones((P, G)))
    for each, mask_PGT in ((everywhere, batch.rollout.mask_PGT), (batch, jnp.zeros((P, G, T)))):
        for name in ("grpo", "dr_grpo", "grpo_s"):
            values = metrics_lib.to_floats(compiled_metrics()(each, mask_PGT)[name])
            assert values.pop("advantage/silent") == float(mask_PGT.any())
            assert set(values.values()) == {0.0}
