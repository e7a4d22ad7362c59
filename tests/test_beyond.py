"""What came after the five: closed forms of each new choice on an axis."""

import dataclasses
import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import objectives
from grpo_jax.config import parse_config
from grpo_jax.configs import preset
from grpo_jax.tools.advantages import FIVE
from grpo_jax.tools.sweep import plan
from grpo_jax.training.run import make_run
from tests import oracle
from tests.test_config import raw_config
from tests.test_objectives import (
    ENTROPY_NAMES,
    NAMES,
    G,
    advantages,
    assert_close,
    f32,
    hand_loss,
    loss_and_grad,
    make_batch,
    oracle_advantages,
    replaced,
)


def gradient_coefficients(obj, batch, adv_BT):
    """d(-loss)/d logp, times the number of tokens: what a token's log-probability is pushed by under token_mean."""
    return -np.asarray(loss_and_grad(obj, batch, adv_BT)[1]) * batch.mask_BT.sum()


# --------------------------------------------------------------------------------------------------------- advantages


def test_rloo_is_the_centred_reward_times_g_over_g_minus_1():
    batch = make_batch(seed=30, rewards="graded")
    centred_BT = np.asarray(advantages(objectives.get("dr_grpo"), batch), np.float64)
    adv_BT = np.asarray(advantages(objectives.get("rloo"), batch))
    sizes_P = (batch.mask_BT.any(1)).reshape(-1, G).sum(1)
    assert set(sizes_P) == {0, G - 1, G}  # a dropped row is nobody's baseline
    factor_B1 = np.repeat(sizes_P / np.maximum(sizes_P - 1, 1), G)[:, None]
    assert_close(adv_BT, centred_BT * factor_B1)
    rest_B = [np.delete(batch.rewards_B[:G], i).mean() for i in range(G)]
    assert_close(adv_BT[:G, 0], batch.rewards_B[:G] - rest_B)


def test_rloo_of_whole_rows_is_reinforce():
    """Its gradient is that of A_i times the log-probability of the whole row, whoever sampled it, averaged over rows."""
    obj, batch = objectives.get("rloo"), make_batch(seed=31)
    adv_BT = np.asarray(advantages(obj, batch))
    loss, grad_BT = loss_and_grad(obj, batch, adv_BT)
    num_rows = batch.mask_BT.any(1).sum()
    row_logp_B = (batch.logp_BT.astype(np.float64) * batch.mask_BT).sum(1)
    assert_close(loss, -(adv_BT[:, 0] * row_logp_B).sum() / num_rows, rtol=1e-4)
    assert_close(grad_BT, -adv_BT * batch.mask_BT / num_rows)
    far = replaced(batch, old_BT=batch.old_BT - 3)
    np.testing.assert_array_equal(loss_and_grad(obj, far, adv_BT)[1], grad_BT)


@pytest.mark.parametrize("name", ["reinforce_pp", "reinforce_pp_baseline"])
def test_reinforce_pp_is_standardised_over_the_tokens_of_the_batch(name):
    batch = make_batch(seed=32, rewards="graded")
    adv = np.asarray(advantages(objectives.get(name, adv_eps=0.0), batch), np.float64)[batch.mask_BT > 0]
    assert abs(adv.mean()) < 1e-6
    assert adv.std(ddof=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("name", ENTROPY_NAMES)
def test_with_the_zeros_left_out_being_right_counts_for_nothing(name, scope):
    """The mistaken reading: right tokens average to 0, and so do wrong ones."""
    obj, batch = objectives.get(name, stat_scope=scope, include_other_side=False), make_batch(seed=33)
    adv_BT = np.asarray(advantages(obj, batch))
    # Rewards near 1 are divided by a spread of a few hundredths, so float32's rounding counts tenfold.
    assert_close(adv_BT, oracle_advantages(obj, batch), rtol=2e-4)
    kept_BT = np.asarray(advantages(dataclasses.replace(obj, include_other_side=True), batch))
    for side in (0, 1):
        for rows in [slice(None)] if scope == "batch" else [slice(0, G)]:
            chosen_BT = (batch.mask_BT[rows] > 0) & (batch.task_B[rows, None] == side)
            weight_BT = chosen_BT / np.maximum(chosen_BT.sum(1, keepdims=True), 1) if name == "grpo_s" else chosen_BT
            assert abs((adv_BT[rows] * weight_BT).sum() / weight_BT.sum()) < 1e-4
            assert abs((kept_BT[rows] * weight_BT).sum() / weight_BT.sum()) > 0.3
    assert np.abs(adv_BT).max() > 0.5


# --------------------------------------------------------------------------------------------------------- surrogates


def test_cispo_is_the_policy_gradient_under_a_clipped_weight():
    """Every token keeps a gradient, A times its weight; GRPO's clipped tokens have none."""
    obj = objectives.get("cispo", clip_low=0.5, clip_high=0.3)
    batch = make_batch(seed=34)
    ratio_BT = np.exp(batch.logp_BT.astype(np.float64) - batch.old_BT)
    weight_BT = np.clip(ratio_BT, 0.5, 1.3)
    coefficient_BT = gradient_coefficients(obj, batch, batch.token_adv_BT)
    assert_close(coefficient_BT, weight_BT * batch.token_adv_BT)
    clipped = dataclasses.replace(obj, surrogate="ppo_clip")
    is_dropped_BT = (gradient_coefficients(clipped, batch, batch.token_adv_BT) == 0) & (batch.token_adv_BT != 0)
    assert is_dropped_BT.sum() > 10 and (coefficient_BT[is_dropped_BT] != 0).all()


def test_gmpo_of_one_token_is_grpo():
    wide = make_batch(seed=35)
    wide.mask_BT[:, 1:] = 0
    fields = {"kl_coef": 0.0, "clip_low": 0.2, "clip_high": 0.28}
    gmpo, grpo = (loss_and_grad(objectives.get(name, **fields), wide, wide.row_adv_BT) for name in ("gmpo", "grpo"))
    assert_close(gmpo[0], grpo[0])
    assert_close(gmpo[1], grpo[1])


def test_gmpo_clips_tokens_and_not_the_mean():
    # Ratios e and e^-1 with clip (e^-0.4, e^0.4): the geometric mean is 1, which a clip of the mean would leave alone.
    # A > 0: tokens count as e^0.4 and e^-1, the mean is e^-0.3; the first is held, the second pulled by half of it.
    # A < 0: as e and e^-0.4, the mean is e^0.3.
    logp, old = [[0.0, -2.0]], [[-1.0, -1.0]]
    obj = objectives.get("gmpo")
    loss, grad_BT, metrics = hand_loss(obj, logp, old, [[1.0, 1.0]])
    assert_close(loss, -np.exp(-0.3))
    assert_close(grad_BT, [[0.0, -np.exp(-0.3) / 2]])
    assert metrics["policy/clip_fraction_high"] == 0.5 and metrics["policy/clip_fraction_low"] == 0
    loss, grad_BT, metrics = hand_loss(obj, logp, old, [[-1.0, -1.0]])
    assert_close(loss, np.exp(0.3))
    assert_close(grad_BT, [[np.exp(0.3) / 2, 0.0]])
    assert metrics["policy/clip_fraction_low"] == 0.5 and metrics["policy/ratio"] == pytest.approx(1)


def test_clipping_each_token_first_is_ppo_where_the_ratio_is_a_token():
    batch = make_batch(seed=36)
    first, then = (objectives.get("dapo", surrogate=surrogate) for surrogate in ("token_clip", "ppo_clip"))
    for ours, theirs in zip(*(loss_and_grad(obj, batch, batch.token_adv_BT) for obj in (first, then)), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("ratio", ["token", "sequence", "sequence_geometric"])
def test_dual_clip_bounds_the_loss_of_a_bad_token(ratio):
    """For A < 0 the loss is at most c |A|, and gone with it the gradient; A > 0 and ratios below c do not notice."""
    obj = objectives.get("grpo", kl_coef=0.0, ratio=ratio, dual_clip=3.0)
    for A, w, loss, slope in [
        (-2, 9.0, 6.0, 0.0),
        (-2, 2.9, 5.8, 5.8),
        (-2, 0.5, 1.6, 0.0),
        (2, 9.0, -2.4, 0.0),
        (2, 1.0, -2.0, -2.0),
    ]:
        found, grad_BT, metrics = hand_loss(obj, [[np.log(w) - 1]], [[-1.0]], [[A]])
        assert_close(found, loss)
        assert_close(grad_BT, [[slope]])
        assert metrics["policy/clip_fraction_dual"] == (w > 3 and A < 0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dual_clip": 1.0}, "dual_clip = 1.0: must be None or a finite number > 1"),
        ({"dual_clip": float("inf")}, "dual_clip = inf"),
        ({"dual_clip": 3.0, "surrogate": "reinforce"}, "surrogate 'reinforce' has no gradient through a ratio"),
    ],
)
def test_a_dual_clip_that_bounds_nothing_is_an_error(fields, says):
    with pytest.raises(ValueError, match=says):
        objectives.get("grpo", **fields)


# ------------------------------------------------------------------------------------------------------------------ KL


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_each_kl_estimator_pulls_towards(estimator):
    """Expected over a whole vocabulary: k1's gradient is 0, k2's is that of KL(p || q), k3's that of KL(q || p)."""
    p_logits, q_logits = (jnp.asarray(np.random.default_rng(seed).normal(size=6), jnp.float32) for seed in (0, 1))
    obj = objectives.get("grpo", kl_coef=1.0, kl_estimator=estimator, aggregation="token_mean")
    log_q, p = jax.nn.log_softmax(q_logits), jax.nn.softmax(p_logits)
    column = np.ones((6, 1), np.float32)  # six rows of one token, one for each word

    def expected_penalty(logits):
        logp_BT = jax.nn.log_softmax(logits)[:, None]
        loss_BT, _ = objectives.token_loss(obj, logp_BT, logp_BT, log_q[:, None], 0 * column, column)
        return (p[:, None] * loss_BT).sum()  # p: who samples, without gradient

    def kl(first, second):
        return (jnp.exp(first) * (first - second)).sum()

    value, grad = jax.value_and_grad(expected_penalty)(p_logits)
    truth = {
        "k1": 0 * p_logits,
        "k2": jax.grad(lambda logits: kl(jax.nn.log_softmax(logits), log_q))(p_logits),
        "k3": jax.grad(lambda logits: kl(log_q, jax.nn.log_softmax(logits)))(p_logits),
    }
    np.testing.assert_allclose(grad, truth[estimator], atol=1e-6)
    assert np.abs(np.asarray(truth["k2"])).max() > 0.1 and np.abs(truth["k2"] - truth["k3"]).max() > 0.05
    is_unbiased = estimator in ("k1", "k3")
    assert (abs(float(value) - float(kl(jnp.log(p), log_q))) < 1e-6) == is_unbiased


def test_the_recorded_kl_is_k3_whatever_is_paid_for():
    batch = make_batch(seed=37)
    for estimator in ("k1", "k2", "k3"):
        obj = objectives.get("grpo", kl_estimator=estimator)
        _, aux = objectives.token_loss(
            obj, *(f32(getattr(batch, k)) for k in ("logp_BT", "old_BT", "ref_BT", "row_adv_BT", "mask_BT"))
        )
        expected_BT = oracle._k3(batch.logp_BT.astype(np.float64), batch.ref_BT)[0]
        assert_close(np.where(batch.mask_BT > 0, aux["kl_ref"], 0), batch.mask_BT * expected_BT)


def test_the_kl_in_the_reward_is_the_sum_over_the_row():
    """Rows of 2, 1 and 0 tokens that are twice, half and as likely as under the reference; what is masked is not read."""
    obj = objectives.get("rloo", kl_in_reward=0.5)
    ref_BT = np.full((3, 2), -2.0)
    logp_BT = ref_BT + np.log([[2, 2], [0.5, 1], [1, 1]])
    mask_BT = f32([[1, 1], [1, 0], [0, 0]])
    logp_BT[mask_BT == 0] = np.nan
    rewards_B = objectives.rewards_with_kl(obj, f32([1, 0, 0.25]), f32(logp_BT), f32(ref_BT), mask_BT)
    assert_close(rewards_B, [1 - np.log(2), 0.5 * np.log(2), 0.25])


@pytest.mark.parametrize("rewards", ["graded", "shaped"])
def test_the_kl_in_the_reward_matches_the_oracle(rewards):
    obj, batch = objectives.get("rloo", kl_in_reward=0.1), make_batch(seed=38, rewards=rewards)
    batch.old_BT[0, 0] = batch.ref_BT[0, 0] + 50  # clamped at 20 nats
    arrays = batch.rewards_B, batch.old_BT, batch.ref_BT, batch.mask_BT
    rewards_B = objectives.rewards_with_kl(obj, *map(f32, arrays))
    expected_B = oracle.rewards_with_kl(obj, *arrays)
    assert_close(rewards_B, expected_B)
    assert rewards_B.dtype == jnp.float32 and np.abs(expected_B - batch.rewards_B).max() > 1.5
    adv_BT = advantages(obj, replaced(batch, rewards_B=rewards_B))
    assert_close(adv_BT, oracle_advantages(obj, replaced(batch, rewards_B=expected_B)))
    grad_BT = jax.grad(lambda logp_BT: objectives.rewards_with_kl(obj, arrays[0], logp_BT, *arrays[2:]).sum())(arrays[1])
    assert not np.asarray(grad_BT).any()


def test_the_kl_in_the_reward_costs_nothing_where_it_is_off():
    """Neither a reference nor an operation: the very array comes back."""
    batch, off = make_batch(), objectives.get("rloo")
    assert objectives.rewards_with_kl(off, batch.rewards_B, batch.logp_BT, None, batch.mask_BT) is batch.rewards_B
    on = objectives.get("rloo", kl_in_reward=0.1)
    assert (off.needs_reference, on.needs_reference, on.has_kl) == (False, True, False)
    assert objectives.get("grpo").needs_reference and not objectives.get("grpo").has_kl_in_reward
    with pytest.raises(ValueError, match=r"objective.kl_in_reward = 0.1 needs the reference's log-probabilities"):
        objectives.rewards_with_kl(on, batch.rewards_B, batch.logp_BT, None, batch.mask_BT)
    with pytest.raises(ValueError, match=r"objective.kl_in_reward = -0.1: must be at least 0"):
        objectives.get("rloo", kl_in_reward=-0.1)


# -------------------------------------------------------------------------------------------------------------- presets


def test_presets_run_with_what_their_names_promise():
    for name in objectives.PRESETS:
        config = parse_config(preset.get_config(f"{name},runlocal"))
        assert config.objective == objectives.get(name) and config.num_steps == 3
        assert config.dynamic_sampling.enabled == (name in ("dapo_paper", "gtpo_paper"))
    with pytest.raises(ValueError, match=r"unknown preset 'trl'.*trl_default"):
        preset.get_config("trl")


def test_framework_constants_alone_change_the_advantage():
    """ddof 0 against 1 at G = 4 is a factor of 1.155; TRL's epsilon of 1e-4 is seen in the fourth digit."""
    rewards_B, mask_BT = f32([1, 1, 0, 0]), np.ones((4, 1), np.float32)

    def first(name, **fields):
        return float(objectives.advantages(objectives.get(name, **fields), rewards_B, mask_BT, group_size=4)[0, 0])

    assert first("grpo", std_ddof=0) / first("grpo") == pytest.approx(np.sqrt(4 / 3), rel=1e-5)
    assert first("trl_default") == pytest.approx(0.5 / (np.sqrt(1 / 3) + 1e-4), rel=1e-6)
    assert first("deepseekmath") == pytest.approx(0.5 / np.sqrt(1 / 3), rel=1e-6)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in FIVE])
def test_every_config_fits_together(name):
    """At the smallest scale, traced through rollout and update."""
    raw = raw_config(name, "runlocal")
    raw.update_from_flattened_dict({"warm_start.num_steps": 0, "mesh.data": 1, "learner.num_minibatches": 2})
    run = make_run(parse_config(raw))
    state = jax.eval_shape(lambda: run.initial_state())
    after, _, metrics = jax.eval_shape(run.iterate, state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert (state.ref_params is None) == (not run.config.objective.has_kl)
    assert {"loss/total", "policy/ratio", "policy/clip_fraction_low"} < set(metrics)


# -------------------------------------------------------------------------------------------------------------- sweeps


def expanded(name):
    module = importlib.import_module(f"configs.sweeps.{name}")
    sweep = plan.Sweep.from_config_dict(module.get_config("runlocal"))
    return {spec.name: spec.config for spec in plan.expand(dataclasses.replace(sweep, seeds=(0,)), {})}


def test_the_parts_add_up_to_their_variants():
    for name, last, variant in [
        ("dapo_parts", "grpo-+overlong", "dapo"),
        ("dr_grpo_parts", "grpo-no_std-no_length", "dr_grpo_paper"),
    ]:
        runs = expanded(name)
        assert runs[last].objective == objectives.get(variant)
        assert len({(run.objective, run.dynamic_sampling, run.overlong) for run in runs.values()}) == len(runs)
    runs = list(expanded("dapo_parts").values())
    dapo = parse_config(importlib.import_module("configs.dapo").get_config("runlocal"))
    assert (runs[-1].dynamic_sampling, runs[-1].overlong) == (dapo.dynamic_sampling, dapo.overlong)
    for before, after in itertools.pairwise(runs):  # one part at a time
        fields = dataclasses.asdict(before).items()
        assert sum(value != dataclasses.asdict(after)[field] for field, value in fields) == 1
    assert all(run.learner.num_minibatches == 4 for run in runs)


def test_ablations_are_over_what_they_say():
    frameworks = expanded("frameworks")
    assert {
        name.removeprefix("grpo-"): run.objective for name, run in frameworks.items() if "=" not in name and "-" in name
    } == dict(objectives.PRESETS)
    entropy = expanded("entropy_weight")
    assert entropy["grpo-gtpo-entropy_weight=0.1,stat_scope=batch"].objective == objectives.get("gtpo")
    assert entropy["grpo-grpo_s-entropy_weight=0.1,stat_scope=group"].objective == objectives.get("grpo_s")
    assert entropy["grpo-dapo"].objective == objectives.get("dapo") and entropy["grpo-dapo"].dynamic_sampling.enabled
    assert sum(not run.objective.include_other_side for run in entropy.values()) == 4
    kl = [(run.objective.kl_estimator, run.objective.kl_coef) for run in expanded("kl_estimators").values()]
    assert set(itertools.product(("k1", "k2", "k3"), (0.04, 0.4))) < set(kl) and ("k3", 0.0) in kl
