"""Numbers that training moves by itself: the weight of the entropy bonus, lambda of lambda-GRPO, and a moving reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import objectives
from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.errors import UserError
from grpo_jax.learner.adaptation import adapt, refresh_reference
from grpo_jax.learner.hyperparams import with_fields
from grpo_jax.objectives import adaptive
from grpo_jax.types import Adapted
from tests import tiny
from tests.test_objectives import BUDGET, G, f32, make_batch
from tests.test_train_step import batch_of, floats, moved, on_policy, spec_of, start, step_of


def test_the_entropys_weight_is_steered_as_written():
    """Up by a step while the entropy is at most the target, else down and off; between 0 and its bound."""
    obj = objectives.get("adaptive_entropy", entropy_target=0.5, entropy_coef_step=0.1, entropy_coef_max=0.25)
    assert adaptive.initial_adapted(obj) == Adapted(entropy_coef=0.0)
    c, seen = 0.0, []
    for entropy in (0.6, 0.5, 0.4, 0.1, 0.2, 0.51, 0.3, 0.9, 0.9, 0.9, 0.9, 0.45):
        now, later = adaptive.adapt_entropy_coef(dataclasses.replace(obj, entropy_coef=jnp.float32(c)), jnp.float32(entropy))
        assert float(now) == pytest.approx(c if entropy <= 0.5 else 0.0)
        c = min(c + 0.1, 0.25) if entropy <= 0.5 else max(c - 0.1, 0.0)
        assert float(later) == pytest.approx(c)
        seen.append(round(c, 2))
    assert {0.0, 0.1, 0.25} <= set(seen)


@pytest.mark.parametrize("exponent", [-2.0, 0.0, 3.0])
def test_lambdas_slope_is_the_losses(exponent):
    """At ratio 1, by a finite difference through the whole loss."""
    batch, h = make_batch(seed=4), 1e-2

    def loss_at(value):
        obj = objectives.get("lambda_grpo", length_exponent=value, length_spread=0.3)
        arrays = f32(batch.rewards_B), f32(batch.mask_BT)
        adv_BT = objectives.advantages(obj, *arrays, group_size=G)
        logp_BT = f32(batch.logp_BT)
        return objectives.loss(obj, logp_BT, logp_BT, None, adv_BT, arrays[1], max_completion_length=BUDGET)[0], obj, adv_BT

    (up, *_), (down, *_), (_, obj, adv_BT) = (loss_at(exponent + step) for step in (h, -h, 0))
    kwargs = {"group_size": G, "max_completion_length": BUDGET}
    slope = adaptive.length_exponent_slope(obj, adv_BT, f32(batch.mask_BT), **kwargs)
    assert abs(float(slope)) > 1e-4
    assert float(slope) == pytest.approx(float(up - down) / (2 * h), rel=2e-2, abs=2e-5)


def test_the_shortest_row_of_a_large_group_has_a_weight():
    """1 + r z is negative there, which no power is defined of."""
    lengths_PG = f32(np.r_[1, np.full(199, 900)])[None]
    obj = objectives.get("lambda_grpo", length_exponent=0.5)
    weight_PG, slope_PG = adaptive.length_weights(obj, lengths_PG, lengths_PG > 0)
    assert np.isfinite(np.asarray(weight_PG)).all() and np.isfinite(np.asarray(slope_PG)).all()
    assert float(weight_PG.mean()) == pytest.approx(1, rel=1e-5) and weight_PG[0, 0] < weight_PG[0, 1]


def test_nothing_that_is_fixed_is_in_the_state():
    assert adaptive.initial_adapted(objectives.get("grpo")) is None
    assert adaptive.initial_adapted(objectives.get("entropy_bonus")) is None
    assert adaptive.initial_adapted(objectives.get("lambda_grpo", length_exponent_rate=0.0)) is None
    assert adapt(objectives.get("grpo"), None, None, None, None, 9) == (None, None, {})


def updates(name, fields, num=2, num_devices=1, **learner):
    """States and metrics of updates on batches that the policy of the moment sampled."""
    spec = with_fields(spec_of(name, **learner), {f"objective.{field}": value for field, value in fields.items()})
    state = dataclasses.replace(start(spec), adapted=adaptive.initial_adapted(spec.objective))
    if spec.learner.ref_every:
        state = dataclasses.replace(state, moving_ref=state.params, ref_params=None)
    states, metrics = [state], []
    for seed in range(num):
        after, measured = step_of(spec, num_devices)(states[-1], on_policy(batch_of(seed), states[-1].params))
        states.append(after)
        metrics.append(floats(measured))
    return states, metrics


@pytest.mark.slow
def test_updates_have_the_bonus_of_the_moment():
    """Fixed and adapted bonus of one weight move the weights alike, and the next weight is a step further."""
    fields = {"entropy_target": 9.0, "entropy_coef": 0.1, "entropy_coef_step": 0.2}
    states, metrics = updates("adaptive_entropy", fields)
    weights = [float(state.adapted.entropy_coef) for state in states]
    assert weights == pytest.approx([0.1, 0.3, 0.5])
    assert [each["policy/entropy_coef"] for each in metrics] == pytest.approx([0.1, 0.3])
    fixed, _ = updates("entropy_bonus", {"entropy_coef": 0.1, "aggregation": "token_mean"}, num=1)
    assert tiny.largest_difference(moved(*states[:2]), moved(*fixed)) < 1e-6
    off, measured = updates("adaptive_entropy", {**fields, "entropy_target": 0.01}, num=1)
    plain, _ = updates("grpo", {"kl_coef": 0.0, "aggregation": "token_mean"}, num=1)
    assert tiny.largest_difference(moved(*off), moved(*plain)) < 1e-6
    assert measured[0]["policy/entropy_coef"] == 0 and float(off[-1].adapted.entropy_coef) == 0


@pytest.mark.slow
def test_lambda_descends_on_any_number_of_devices():
    fields = {"length_exponent": 1.0, "length_exponent_rate": 5.0, "length_spread": 0.3}
    (before, after, _), metrics = updates("lambda_grpo", fields)
    (_, sharded, _), _ = updates("lambda_grpo", fields, num_devices=8, num_microbatches=2)
    assert float(before.adapted.length_exponent) == 1 == metrics[0]["advantage/length_exponent"]
    assert metrics[1]["advantage/length_exponent"] == pytest.approx(float(after.adapted.length_exponent))
    assert abs(float(after.adapted.length_exponent) - 1) > 1e-3
    assert float(sharded.adapted.length_exponent) == pytest.approx(float(after.adapted.length_exponent), rel=1e-5)
    assert tiny.largest_difference(moved(before, sharded), moved(before, after)) < 1e-5
    # The loss that the step is along: by a finite difference of it.
    batch, obj = batch_of(0), objectives.get("lambda_grpo", length_spread=0.3)
    mask_BT = batch.rollout.mask_PGT.reshape(-1, batch.rollout.mask_PGT.shape[-1])

    def loss_at(value):
        adv_BT = objectives.advantages(
            dataclasses.replace(obj, length_exponent=value), batch.reward_PG.reshape(-1), mask_BT, group_size=4
        )
        return -(adv_BT * mask_BT).sum() / mask_BT.sum()

    slope = float(loss_at(1.01) - loss_at(0.99)) / 0.02
    assert float(after.adapted.length_exponent) == pytest.approx(1 - 5 * slope, rel=1e-3)


def test_a_reference_moves_when_it_is_time():
    config = spec_of("grpo").learner
    old, new = {"w": f32([1.0, 3.0])}, {"w": f32([2.0, 7.0])}
    assert refresh_reference(None, new, 4, config) is None
    for num_updates, mix, expected in ((3, 1.0, [1, 3]), (4, 1.0, [2, 7]), (4, 0.25, [1.25, 4])):
        found = refresh_reference(old, new, num_updates, dataclasses.replace(config, ref_every=2, ref_mix=mix))
        np.testing.assert_array_equal(found["w"], expected)


@pytest.mark.slow
def test_the_kl_is_to_the_reference_of_the_moment():
    """After a refresh the policy is its reference: no KL, until it moves on."""
    states, metrics = updates("grpo", {"kl_coef": 0.5}, num=4, ref_every=2)
    kl = [each["policy/kl_ref"] for each in metrics]
    assert kl[0] == pytest.approx(0, abs=1e-7) and kl[2] == pytest.approx(0, abs=1e-7)
    assert min(kl[1], kl[3]) > 1e-6
    assert tiny.largest_difference(states[2].moving_ref, states[2].params) == 0
    assert tiny.largest_difference(states[3].moving_ref, states[2].params) == 0
    assert tiny.largest_difference(states[1].moving_ref, states[0].params) == 0


@pytest.mark.slow
def test_what_moves_is_in_the_state_from_the_start_and_in_its_checkpoints():
    from grpo_jax.training.checkpoint import saved_fields
    from grpo_jax.training.run import make_run

    changes = {"learner.ref_every": 2, "objective.kl_coef": 0.1, "objective.entropy_target": 0.3, "warm_start.num_steps": 0}
    for extra in ({}, {"lora.rank": 2}):
        run = make_run(tiny.config_of("grpo", {**changes, **extra}))
        state = run.abstract_state
        assert state.ref_params is None and jax.tree.structure(state.moving_ref) == jax.tree.structure(state.params)
        assert {"adapted", "moving_ref"} < set(saved_fields(state))
    plain = make_run(tiny.config_of("grpo", {"warm_start.num_steps": 0})).abstract_state
    assert plain.ref_params is not None and not {"adapted", "moving_ref"} & set(saved_fields(plain))


def test_settings_that_nothing_reads_are_refused():
    with pytest.raises(UserError, match=r"config.learner.ref_every = 3: without a KL there is no reference to move"):
        tiny.config_of("dapo", {"learner.ref_every": 3})
    with pytest.raises(ValueError, match=r"length_exponent_rate = 0.1: advantage = 'group_norm' has no lambda"):
        objectives.get("grpo", length_exponent_rate=0.1)
    with pytest.raises(ValueError, match=r"entropy_target = -1.0: must be None or a number >= 0"):
        objectives.get("grpo", entropy_target=-1.0)


def test_what_is_off_can_be_set_from_the_command_line():
    raw = base.get_config("runlocal", "grpo")
    raw.objective.entropy_target, raw.objective.max_off_policy_kl = 0.3, 0.1  # a field that is None has no type
    assert parse_config(raw).objective == objectives.get("grpo", entropy_target=0.3, max_off_policy_kl=0.1)
