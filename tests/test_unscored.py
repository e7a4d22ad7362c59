"""Completions whose score failed, came late or was withheld: in no statistic, in no loss, in no mean; but counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.learner.advantage_diagnostics import advantages_with_grpo, batch_advantages, trained_mask
from grpo_jax.rewards import shaping
from grpo_jax.training.evaluate import judge
from grpo_jax.training.samplers import sample_metrics
from grpo_jax.types import Reward
from tests import oracle, tiny

P, G, T = 8, 4, 5
NAMES = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
# Groups with all scores, three, two of each kind, one, and none.
IS_SCORED_PG = np.ones((P, G), bool)
IS_SCORED_PG[0, 3] = IS_SCORED_PG[3, :2] = IS_SCORED_PG[4, 1:] = IS_SCORED_PG[5] = False


def batch_of():
    """A batch without some scores; in their place are numbers that would be the best and the worst of all."""
    rng = np.random.default_rng(3)
    batch = tiny.random_batch(P, G, T, seed=1)
    instead_PG = rng.choice([1e6, -1e6], (P, G)).astype(np.float32)
    rewards = {name: jnp.where(IS_SCORED_PG, getattr(batch, name), instead_PG) for name in ("reward_PG", "task_reward_PG")}
    return dataclasses.replace(batch, is_scored_PG=jnp.asarray(IS_SCORED_PG), **rewards)


def rows(x):
    return np.asarray(x).reshape(P * G, *x.shape[2:])


@pytest.mark.parametrize("name", NAMES)
def test_advantages_and_loss_are_those_of_the_batch_without_them_in_float64(name):
    obj, batch = objectives.get(name), batch_of()
    mask_PGT = trained_mask(batch, filter_truncated=False)
    adv_BT = rows(batch_advantages(obj, batch, mask_PGT, batch.rollout.entropy_PGT))
    # The oracle sees no score that is missing: those rows have no tokens there, and it leaves out such rows.
    is_there_PG = IS_SCORED_PG & (IS_SCORED_PG.sum(1, keepdims=True) > 1)
    mask_BT = rows(batch.rollout.mask_PGT) * is_there_PG.reshape(-1, 1)
    nan_B = np.where(is_there_PG.reshape(-1), 0, np.nan)
    reward_B, task_B = rows(batch.reward_PG) + nan_B, rows(batch.task_reward_PG) + nan_B
    expected_BT = oracle.advantages(obj, reward_B, mask_BT, rows(batch.rollout.entropy_PGT), G, task_B)
    np.testing.assert_allclose(adv_BT, expected_BT, rtol=1e-4, atol=1e-5)
    assert np.abs(expected_BT).max() > 0.1 and not adv_BT[rows(~is_there_PG)].any()

    rng = np.random.default_rng(4)
    old_BT = rows(batch.rollout.sampler_logp_PGT)
    logp_BT, ref_BT = (old_BT + rng.normal(size=old_BT.shape).astype(np.float32) * 0.2 for _ in range(2))
    args = (old_BT, ref_BT, adv_BT, rows(mask_PGT))
    loss, grad_BT = jax.value_and_grad(lambda x: objectives.loss(obj, x, *args, max_completion_length=9)[0])(logp_BT)
    args = (old_BT, ref_BT, expected_BT, mask_BT)
    expected, expected_grad_BT = oracle.loss_and_grad(obj, logp_BT, *args, max_completion_length=9)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(grad_BT, expected_grad_BT, rtol=1e-3, atol=1e-6)


def test_recorded_advantages_leave_them_out_too():
    adv_PGT, grpo_PG = advantages_with_grpo(objectives.get("gtpo"), batch_of(), filter_truncated=False)
    is_there_PG = IS_SCORED_PG & (IS_SCORED_PG.sum(1, keepdims=True) > 1)
    assert not np.asarray(adv_PGT)[~is_there_PG].any() and not np.asarray(grpo_PG)[~is_there_PG].any()
    assert np.asarray(adv_PGT)[is_there_PG].any()


def test_a_score_that_is_missing_or_not_finite_becomes_a_flag():
    """Whatever a task's own function returned: no NaN gets beyond here."""
    batch = tiny.random_batch(P, G, T)
    task_PG, shaping_PG = np.ones((P, G), np.float32), np.zeros((P, G), np.float32)
    task_PG[0, 0], task_PG[1, 1], shaping_PG[2, 2], task_PG[3, 3] = np.nan, np.inf, np.nan, 7
    is_scored_PG = np.ones((P, G), bool)
    is_scored_PG[3, 3] = False
    for given, more in ((None, 0), (is_scored_PG, 1)):
        reward = Reward(task_PG, shaping_PG, {}, given)
        made = shaping.make_batch(batch.rollout, reward, 0, max_completion_tokens=T, cache_tokens=0)
        assert made.is_scored_PG is not None and (~made.is_scored_PG).sum() == 3 + more
        for values in (made.task_reward_PG, made.reward_PG):
            assert np.isfinite(values).all() and not np.asarray(values)[~np.asarray(made.is_scored_PG)].any()
        metrics = metrics_lib.to_floats(sample_metrics(made, 0.5))
        assert metrics["reward/unscored"] == pytest.approx((3 + more) / (P * G))
        assert metrics["reward/success"] == 1.0 and metrics["reward/mean"] == pytest.approx(1 + (1 - more) * 6 / (P * G - 3))


def test_groups_without_two_scores_say_nothing():
    task_PG = jnp.array([[0.0, 1, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1], [1, 1, 1]])
    is_scored_PG = jnp.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    assert shaping.is_informative(task_PG, is_scored_PG).tolist() == [True, True, False, False, False]
    assert shaping.is_informative(task_PG).tolist() == [True, True, True, True, False]


def test_shuffled_rewards_take_their_flags_along():
    task_PG = jnp.arange(P * G, dtype=jnp.float32).reshape(P, G)
    reward = shaping.shuffle_rewards(Reward(task_PG, -task_PG, {}, task_PG % 3 > 0), jax.random.key(0))
    np.testing.assert_array_equal(reward.is_scored_PG, reward.task_PG % 3 > 0)
    assert (np.asarray(reward.task_PG) != np.asarray(task_PG)).any()


def test_in_held_out_evaluation_none_without_a_score_is_a_success():
    """Nor is one left out; and a part that only shapes has no say."""
    reward = Reward(np.array([[1, 1, 0, np.nan, 0]]), np.zeros((1, 5)), {}, np.array([[True, True, False, True, True]]))
    is_scored_PG, is_right_PG = judge(reward, 0.0)
    assert is_scored_PG.tolist() == is_right_PG.tolist() == [[True, True, True, False, True]]
    reward = dataclasses.replace(reward, has_task_score_PG=np.array([[True, False, False, True, True]]))
    is_scored_PG, is_right_PG = judge(reward, 0.0)
    assert is_scored_PG.tolist() == is_right_PG.tolist() == [[True, False, False, False, True]]
