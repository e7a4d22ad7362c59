"""The wider family: every objective against the float64 oracle, its invariants, and the simpler ones that it must equal."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from grpo_jax import objectives
from grpo_jax.rewards import shaping
from grpo_jax.types import UNKNOWN, Reward
from tests import oracle, tiny
from tests.test_objectives import BUDGET, HOLED_GROUP, B, G, P, T, assert_close, f32, make_batch, replaced, rows_of, steps_of

# Each with what makes it act on a batch of 32 rows of 6 tokens: 2e-4 of so few tokens is one.
ACTIVE = {
    "clip_cov": {"cov_share": 0.1, "cov_range": (0.1, 3.0)},
    "kl_cov": {"cov_share": 0.1},
    "gfpo": {"keep_rows": 2},
    "dppo_tv": {"clip_low": 0.05, "clip_high": 0.1},
    "dppo_kl": {"clip_low": 0.01, "clip_high": 0.02},
    "fipo": {"future_clip": (0.7, 1.4), "future_half_life": 2.0},
    "gspo_token": {"clip_low": 0.1, "clip_high": 0.2},
    "luspo": {"clip_low": 0.1, "clip_high": 0.2},
    "entropy_bonus": {"entropy_coef": 0.05},
    "adaptive_entropy": {"entropy_coef": 0.05},
    "lambda_grpo": {"length_exponent": 4.0},
}
CASES = [
    *((name, ACTIVE.get(name, {})) for name in objectives.FAMILY),
    ("gtpo_paper", {}),
    ("grpo_process", {"std_ddof": 0, "adv_eps": 1e-2}),
    ("sapo", {"gate_sharpness": (0.3, 4.0)}),
    ("sapo", {"ratio": "sequence_geometric"}),
    ("dppo_tv", {"max_ratio": 1.1}),
    ("vespo", {"gamma_weight": (1.0, 0.5, 0.2, 3.0)}),
    ("fipo", {"future_half_life": 0.5, "future_clip": (1.0, 1.2)}),
    ("gfpo", {"keep_rows": 3, "row_filter": "efficient"}),
    ("forking_tokens", {"token_share": 0.5, "advantage": "token_entropy"}),
    ("deepseek_v32", {"max_off_policy_kl": 0.3, "kl_coef": 0.4, "kl_estimator": "k1"}),
    ("deepseek_v32", {"max_off_policy_kl": 0.0, "ratio": "sequence", "kl_estimator": "k2"}),
    ("pass_at_k_analytic", {"pass_k": 3}),
    ("gdpo", {"std_ddof": 0}),
    ("lambda_grpo", {"length_exponent": -3.0, "length_spread": 0.25, "std_ddof": 0}),
    ("lite_ppo", {"std_ddof": 0, "adv_eps": 1e-2}),
    ("gspo_token", {"advantage": "token_entropy", "clip_low": 0.1, "clip_high": 0.2, "aggregation": "token_mean"}),
    ("gtpo_geometric", {"stat_scope": "group", "entropy_weight": 0.3}),
    ("kl_cov", {"cov_penalty": 0.3, "cov_share": 0.3}),
]
every_case = pytest.mark.parametrize("name, fields", [pytest.param(*case, id=f"{case[0]}-{i}") for i, case in enumerate(CASES)])
every_name = pytest.mark.parametrize("name", objectives.FAMILY)


def objective(name, **fields):
    return objectives.get(name, **{**ACTIVE.get(name, {}), **fields})


def advantages(obj, batch, **kwargs):
    arrays = f32(batch.rewards_B), f32(batch.mask_BT), f32(batch.entropy_BT)
    steps_BT = f32(steps_of(batch))
    kwargs = {"task_rewards_B": f32(batch.task_B), "logp_BT": f32(batch.old_BT), "step_rewards_BT": steps_BT, **kwargs}
    return objectives.advantages(obj, *arrays, group_size=G, **kwargs)


def oracle_advantages(obj, batch, parts_BK=None):
    arrays = batch.rewards_B, batch.mask_BT, batch.entropy_BT, G, batch.task_B
    return oracle.advantages(obj, *arrays, logp_BT=batch.old_BT, parts_BK=parts_BK, steps_BT=steps_of(batch))


def loss_and_grad(obj, batch, adv_BT):
    mask_BT, old_BT = f32(batch.mask_BT), f32(batch.old_BT)
    penalised_BT = objectives.penalised_tokens(obj, f32(adv_BT), old_BT, mask_BT)

    def loss_of(logp_BT):
        arrays = logp_BT, old_BT, f32(batch.ref_BT), f32(adv_BT), mask_BT
        extra = {"entropy_BT": f32(batch.entropy_BT), "penalised_BT": penalised_BT}
        return objectives.loss(obj, *arrays, max_completion_length=BUDGET, **extra)

    (loss, metrics), grad_BT = jax.value_and_grad(loss_of, has_aux=True)(f32(batch.logp_BT))
    return loss, grad_BT, metrics


def oracle_loss_and_grad(obj, batch, adv_BT):
    arrays = batch.logp_BT, batch.old_BT, batch.ref_BT, adv_BT, batch.mask_BT, BUDGET
    chosen_BT = oracle.penalised(obj, adv_BT, batch.old_BT, batch.mask_BT) if obj.cov_penalty else None
    return oracle.loss_and_grad(obj, *arrays, entropy=batch.entropy_BT, is_penalised=chosen_BT)


def hand(obj, logp, old, adv, mask=None, **kwargs):
    """Loss and gradient of a few rows that are written out."""
    logp, old, adv = (np.atleast_2d(np.asarray(x, np.float32)) for x in (logp, old, adv))
    mask = np.ones_like(logp) if mask is None else np.asarray(mask, np.float32)

    def loss_of(x):
        return objectives.loss(obj, x, old, None, adv, mask, max_completion_length=BUDGET, **kwargs)[0]

    return jax.value_and_grad(loss_of)(jnp.asarray(logp))


# --------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("rewards", ["binary", "shaped"])
@every_case
def test_every_objective_matches_its_oracle(name, fields, rewards):
    obj, batch = objectives.get(name, **fields), make_batch(seed=4, rewards=rewards)
    expected_BT = oracle_advantages(obj, batch)
    adv_BT = advantages(obj, batch)
    assert_close(adv_BT, expected_BT, scale=0.5)
    expected, expected_grad_BT = oracle_loss_and_grad(obj, batch, expected_BT)
    loss, grad_BT, _ = loss_and_grad(obj, batch, adv_BT)
    assert np.abs(expected_grad_BT).max() > 1e-3
    assert_close(loss, expected, rtol=2e-5, scale=0.1)
    assert_close(grad_BT, expected_grad_BT, rtol=2e-5)


SURROGATES = ("soft_gate", "trust_region_tv", "trust_region_kl", "gamma_weight", "importance")


@pytest.mark.parametrize(
    "fields",
    [
        *({"surrogate": surrogate, "clip_low": 0.1, "clip_high": 0.1} for surrogate in SURROGATES),
        {"kl_by_ratio": True, "kl_coef": 0.3},
        {"max_off_policy_kl": 0.1, "ratio": "sequence"},
        {"cov_penalty": 0.5, "cov_share": 0.2},
    ],
    ids=lambda fields: next(iter(fields.values())) if "surrogate" in fields else next(iter(fields)),
)
def test_the_oracles_gradient_is_the_finite_difference(fields):
    obj, batch, h = objectives.get("grpo", **{"kl_coef": 0.0, **fields}), make_batch(seed=1), 1e-6
    few = SimpleNamespace(**{key: value[:6].astype(np.float64) for key, value in vars(batch).items()})
    adv_BT = few.token_adv_BT if obj.ratio == "token" else few.row_adv_BT
    grad_BT = oracle_loss_and_grad(obj, few, adv_BT)[1]
    numeric_BT = np.zeros_like(grad_BT)
    is_weight = obj.surrogate in (*oracle.WEIGHT, *oracle.WEIGHT_OF_A_ROW)
    chosen_BT = oracle.penalised(obj, adv_BT, few.old_BT, few.mask_BT)
    for i, t in np.ndindex(*grad_BT.shape):
        sides = []
        for step in (h, -h):
            logp_BT, old_BT = few.logp_BT.copy(), few.old_BT.copy()
            logp_BT[i, t] += step
            if is_weight:  # it is a number: the ratio that it is made of stays where it is
                old_BT[i, t] += step
            arrays = logp_BT, old_BT, few.ref_BT, adv_BT, few.mask_BT, BUDGET
            sides.append(oracle.loss_and_grad(obj, *arrays, is_penalised=chosen_BT)[0])
        numeric_BT[i, t] = (sides[0] - sides[1]) / (2 * h)
    assert np.abs(grad_BT).max() > 0.01
    np.testing.assert_allclose(grad_BT, numeric_BT, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rewards", ["graded", "shaped"])
def test_parts_of_the_reward_match_the_oracle(rewards):
    """A correct answer and a format, of very different spread."""
    batch, rng = make_batch(seed=6, rewards=rewards), np.random.default_rng(0)
    parts_BK = np.stack([batch.rewards_B, 0.01 * rng.integers(0, 3, B)], 1).astype(np.float32)
    for weights in ((), (1.0, 0.25)):
        obj = objectives.get("gdpo", part_weights=weights)
        adv_BT = advantages(obj, batch, reward_parts_BK=parts_BK)
        assert_close(adv_BT, oracle_advantages(obj, batch, parts_BK.astype(np.float64)), rtol=2e-5)
    with pytest.raises(ValueError, match=r"part_weights = \(1.0,\): the reward has 2 parts"):
        advantages(objectives.get("gdpo", part_weights=(1.0,)), batch, reward_parts_BK=parts_BK)


# --------------------------------------------------------------------------------------------------------- invariants


@every_name
def test_masked_positions_hold_anything(name):
    obj, batch = objective(name), make_batch(seed=8)
    keys = ("logp_BT", "old_BT", "ref_BT", "entropy_BT")
    dirty = replaced(batch, **{key: np.where(batch.mask_BT > 0, getattr(batch, key), np.nan) for key in keys})
    adv_BT = advantages(obj, batch)
    np.testing.assert_array_equal(advantages(obj, dirty), adv_BT)
    loss, grad_BT, _ = loss_and_grad(obj, batch, adv_BT)
    dirty_loss, dirty_grad_BT, metrics = loss_and_grad(obj, dirty, adv_BT)
    np.testing.assert_array_equal(dirty_loss, loss)
    np.testing.assert_array_equal(dirty_grad_BT, grad_BT)
    assert all(np.isfinite(float(metric.value())) for metric in metrics.values())


@every_name
def test_order_does_not_matter(name):
    obj, batch = objective(name), make_batch(seed=9, rewards="graded")
    rng = np.random.default_rng(0)
    order_B = rng.permutation(rng.permuted(np.arange(B).reshape(P, G), axis=1)).reshape(B)
    moved = SimpleNamespace(**{key: value[order_B] for key, value in vars(batch).items()})
    adv_BT = np.asarray(advantages(obj, batch))
    assert_close(advantages(obj, moved), adv_BT[order_B], scale=0.5)
    loss, grad_BT, _ = loss_and_grad(obj, batch, adv_BT)
    moved_loss, moved_grad_BT, _ = loss_and_grad(obj, moved, adv_BT[order_B])
    assert_close(moved_loss, loss, scale=0.1)
    assert_close(moved_grad_BT, np.asarray(grad_BT)[order_B])


BATCH_WIDE = ("gtpo_geometric", "gtpo_paper")  # a group of one side has an advantage, as under GTPO


@every_name
def test_without_advantage_there_is_no_gradient(name):
    """Equal rewards are silent, with a dropped row too; and no surrogate makes a gradient of A = 0."""
    obj, batch = objective(name, kl_coef=0.0, cov_penalty=0.0, drift_coef=0.0), make_batch(seed=11, rewards="graded")
    rewards_B = batch.rewards_B.copy()
    rewards_B[:G] = rewards_B[rows_of(HOLED_GROUP)] = np.float32(0.7)
    batch = replaced(batch, rewards_B=rewards_B, task_B=rewards_B)
    flat = np.r_[rows_of(0), rows_of(HOLED_GROUP)]
    adv_BT = np.asarray(advantages(obj, batch))
    assert adv_BT.any() and (name in BATCH_WIDE or not adv_BT[flat].any())
    silent_BT = np.where(np.isin(np.arange(B), flat)[:, None], 0, adv_BT)
    grad_BT = np.asarray(loss_and_grad(obj, batch, silent_BT)[1])
    assert grad_BT.any() and not grad_BT[flat].any()


@every_name
def test_any_cut_into_microbatches_gives_the_whole_batch(name):
    obj, batch = objective(name), make_batch(seed=6)
    adv_BT = advantages(obj, batch)
    loss, _, _ = loss_and_grad(obj, batch, adv_BT)
    mask_BT = f32(batch.mask_BT)
    penalised_BT = objectives.penalised_tokens(obj, adv_BT, f32(batch.old_BT), mask_BT)
    weight_BT, denom = objectives.weights(obj, mask_BT, max_completion_length=BUDGET)
    arrays = [f32(x) for x in (batch.logp_BT, batch.old_BT, batch.ref_BT, adv_BT, batch.mask_BT)]
    total = 0.0
    for rows in (np.arange(B)[first::4] for first in range(4)):  # no piece holds a whole group
        extra = {
            "entropy_BT": f32(batch.entropy_BT)[rows],
            "penalised_BT": None if penalised_BT is None else penalised_BT[rows],
        }
        loss_bT, _ = objectives.token_loss(obj, *(x[rows] for x in arrays), **extra)
        total += np.float64((loss_bT * weight_BT[rows]).sum() / denom)
    assert_close(total, loss, scale=0.1)


def _of_all(axis_name, batch):
    """Advantages, loss and gradient of the whole family, as one program."""
    found = {}
    for name in objectives.FAMILY:
        obj, mask_BT = objective(name), batch["mask_BT"]
        arrays = batch["rewards_B"], mask_BT, batch["entropy_BT"]
        kwargs = {"task_rewards_B": batch["task_B"], "logp_BT": batch["old_BT"], "step_rewards_BT": batch["steps_BT"]}
        kwargs["axis_name"] = axis_name
        adv_BT = objectives.advantages(obj, *arrays, group_size=G, **kwargs)
        extra = {
            "entropy_BT": batch["entropy_BT"],
            "penalised_BT": objectives.penalised_tokens(obj, adv_BT, batch["old_BT"], mask_BT, axis_name=axis_name),
        }

        def loss_of(logp_BT, obj=obj, adv_BT=adv_BT, mask_BT=mask_BT, extra=extra):
            rest = batch["old_BT"], batch["ref_BT"], adv_BT, mask_BT
            return objectives.loss(obj, logp_BT, *rest, max_completion_length=BUDGET, axis_name=axis_name, **extra)[0]

        found[name] = (adv_BT, *jax.value_and_grad(loss_of)(batch["logp_BT"]))
    return found


@pytest.mark.slow
def test_eight_devices_give_the_one_device_numbers():
    batch = make_batch(seed=5, rewards="shaped")
    inputs = {key: f32(value) for key, value in vars(batch).items()} | {"steps_BT": f32(steps_of(batch))}
    mesh, rows, everywhere = Mesh(np.array(jax.devices()[:8]), ("data",)), PartitionSpec("data"), PartitionSpec()
    specs = dict.fromkeys(objectives.FAMILY, (rows, everywhere, rows))
    sharded = jax.shard_map(functools.partial(_of_all, "data"), mesh=mesh, in_specs=(rows,), out_specs=specs)
    found = jax.jit(sharded)(inputs)
    for name, (adv_BT, loss, grad_BT) in found.items():
        obj = objective(name)
        expected_BT = oracle_advantages(obj, batch)
        assert_close(adv_BT, expected_BT, scale=0.5)
        expected, expected_grad_BT = oracle_loss_and_grad(obj, batch, expected_BT)
        assert_close(loss, expected, rtol=2e-5, scale=0.1)
        assert_close(grad_BT, expected_grad_BT, rtol=2e-5)


@pytest.mark.parametrize("gap", [25.0, 1e4])
@every_name
def test_extremes_stay_finite(name, gap):
    """Log-ratios far beyond the clamp, certain and impossible tokens, entropies of 0."""
    obj, batch = objective(name), make_batch(seed=18)
    sign_BT = np.sign(batch.token_adv_BT + 0.5)
    far = replaced(batch, old_BT=batch.logp_BT - gap * sign_BT, ref_BT=batch.logp_BT + gap * sign_BT)
    certain = replaced(batch, logp_BT=np.zeros((B, T)), old_BT=np.full((B, T), -gap), entropy_BT=np.zeros((B, T)))
    for extreme in (far, certain):
        adv_BT = advantages(obj, extreme)
        loss, grad_BT, metrics = loss_and_grad(obj, extreme, adv_BT)
        assert np.isfinite(np.asarray(adv_BT)).all() and np.isfinite(float(loss)) and np.isfinite(np.asarray(grad_BT)).all()
        assert all(np.isfinite(float(metric.value())) for metric in metrics.values())


@every_name
def test_everything_masked(name):
    obj, batch = objective(name), make_batch(seed=14)
    batch = replaced(batch, mask_BT=np.zeros((B, T)), logp_BT=np.full((B, T), np.nan))
    adv_BT = advantages(obj, batch)
    loss, grad_BT, _ = loss_and_grad(obj, batch, adv_BT)
    assert not np.asarray(adv_BT).any() and float(loss) == 0 and not np.asarray(grad_BT).any()


# --------------------------------------------------------------------------- degenerate settings equal simpler objectives


def assert_same(left, right, batch, rows=True):
    """Two objectives make one loss and one gradient of a batch, with advantages of rows or of tokens."""
    adv_BT = batch.row_adv_BT if rows else batch.token_adv_BT
    for ours, theirs in zip(loss_and_grad(left, batch, adv_BT)[:2], loss_and_grad(right, batch, adv_BT)[:2], strict=True):
        assert_close(ours, theirs, scale=0.1)


OFF = {"kl_coef": 0.0}


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (("dppo_tv", {"clip_low": 1.0, "clip_high": 1.0}), ("cispo", {"clip_low": 1.0, "clip_high": 19.0})),
        (("dppo_kl", {"clip_low": 1e6, "clip_high": 1e6}), ("cispo", {"clip_low": 1.0, "clip_high": 19.0})),
        (("fipo", {"future_clip": (1.0, 1.0)}), ("dapo", {})),
        (("kl_cov", {"cov_penalty": 0.0}), ("dapo", {"clip_low": 1.0, "clip_high": 1e6})),
        (("gspo_token", {}), ("gspo", {})),
        (("deepseek_v32", {"max_off_policy_kl": 20.0, "kl_by_ratio": False}), ("grpo", {})),
        (("entropy_bonus", {"entropy_coef": 0.0}), ("grpo", OFF)),
        (("adaptive_entropy", {"entropy_coef": 1e-3, "aggregation": "sequence_mean"}), ("entropy_bonus", {})),
    ],
    ids=lambda case: case[0],
)
def test_a_wide_setting_is_a_simpler_objective(left, right):
    batch = make_batch(seed=13)
    assert_same(objectives.get(left[0], **left[1]), objectives.get(right[0], **right[1]), batch)


def test_sapo_is_between_the_unbounded_ratio_and_nothing():
    """tau -> 0: the gradient of w A; tau -> infinity: only tokens at w = 1 are left."""
    batch = make_batch(seed=13)
    flat, steep = (objectives.get("sapo", gate_sharpness=(tau, tau)) for tau in (1e-3, 1e5))
    plain = objectives.get("grpo", surrogate="importance", **OFF)
    grad_BT, plain_grad_BT = (np.asarray(loss_and_grad(obj, batch, batch.row_adv_BT)[1]) for obj in (flat, plain))
    np.testing.assert_allclose(grad_BT, plain_grad_BT, rtol=1e-4, atol=1e-8)
    assert not np.asarray(loss_and_grad(steep, batch, batch.row_adv_BT)[1]).any()
    at_one = replaced(batch, old_BT=batch.logp_BT)
    assert_close(loss_and_grad(steep, at_one, batch.row_adv_BT)[1], loss_and_grad(plain, at_one, batch.row_adv_BT)[1])


@pytest.mark.parametrize("scope", ["batch", "group"])
def test_row_geometric_shares_of_equal_entropy_are_token_weighted_grpo(scope):
    batch = make_batch(seed=10)
    even = replaced(batch, entropy_BT=np.repeat(np.linspace(0.3, 2.0, B, dtype=np.float32)[:, None], T, axis=1))
    ours = objectives.get("gtpo_geometric", stat_scope=scope)
    grpo = objectives.get("gtpo", entropy_weight=0.0, stat_scope=scope)  # test_objectives: that is GRPO's, token-weighted
    assert_close(advantages(ours, even), advantages(grpo, even), rtol=2e-5)
    assert np.abs(np.asarray(advantages(ours, batch)) - np.asarray(advantages(grpo, batch))).max() > 0.05


def test_row_geometric_shares_by_hand():
    # One right and one wrong row of two tokens, H = (1, 4): the geometric mean is 2, shares 1/2 and 2, inverses 2 and 1/2.
    # r+ = 1.05, 1.2 and r- = -1.2, -1.05. R+ = [1.05, 1.2, 0, 0]: mean 0.5625, variance (1.1025 + 1.44 - 4 * 0.5625^2) / 3.
    obj = objectives.get("gtpo_geometric", adv_eps=0.0)
    adv_BT = np.asarray(objectives.advantages(obj, f32([1, 0]), f32(np.ones((2, 2))), f32([[1, 4], [1, 4]]), group_size=2))
    std = math.sqrt((1.1025 + 1.44 - 4 * 0.5625**2) / 3)
    assert_close(adv_BT, [[0.4875 / std, 0.6375 / std], [-0.6375 / std, -0.4875 / std]])


def test_luspo_counts_rows_by_their_length():
    batch = make_batch(seed=13)
    batch.mask_BT[:] = np.arange(T) < 3  # rows of one length: three times GSPO
    ours, theirs = (loss_and_grad(objectives.get(name), batch, batch.row_adv_BT) for name in ("luspo", "gspo"))
    assert_close(ours[0], 3 * theirs[0])
    assert_close(ours[1], 3 * theirs[1])


def test_advantages_that_equal_simpler_ones():
    batch = make_batch(seed=12, rewards="graded")
    equal = replaced(batch, mask_BT=np.where(batch.mask_BT.any(1, keepdims=True), np.arange(T) < 3, 0))
    centred_BT = advantages(objectives.get("dr_grpo"), equal)
    assert_close(advantages(objectives.get("opo"), equal), centred_BT)
    informative = np.asarray(centred_BT).any(1).reshape(P, G).any(1).sum()
    num_groups = equal.mask_BT.any(1).reshape(P, G).any(1).sum()
    assert informative < num_groups
    assert_close(advantages(objectives.get("gpg"), equal), np.asarray(centred_BT) * num_groups / informative)
    binary = make_batch(seed=12)
    analytic = objectives.get("pass_at_k_analytic", pass_k=1)
    assert_close(advantages(analytic, binary), advantages(objectives.get("grpo", std_ddof=0, adv_eps=0.0), binary))
    assert_close(advantages(objectives.get("gfpo", keep_rows=G), batch), advantages(objectives.get("dapo"), batch))
    assert_close(advantages(objectives.get("lambda_grpo"), batch), advantages(objectives.get("dapo"), batch))
    even_BT = advantages(objectives.get("lambda_grpo", length_exponent=9.0), equal)
    assert_close(even_BT, advantages(objectives.get("dapo"), equal))
    assert_close(
        advantages(objectives.get("forking_tokens", token_share=1.0), batch), advantages(objectives.get("dapo"), batch)
    )


def test_rewards_of_steps_by_hand():
    """Two rows: steps 1, 0 and 1, 1. One step a row at its last token is GRPO."""
    no = UNKNOWN
    steps_BT, mask_BT = f32([[1, no, 0, no], [no, 1, 1, 7]]), f32([[1, 1, 1, 1], [1, 1, 1, 0]])
    obj = objectives.get("grpo_process", adv_eps=0.0)
    adv_BT = objectives.advantages(obj, f32([0, 0]), mask_BT, group_size=2, step_rewards_BT=steps_BT)
    up, down = 0.25 / 0.5, -0.75 / 0.5  # mean 3/4, variance (3 (1/4)^2 + (3/4)^2) / 3 = 1/4
    assert_close(adv_BT, [[up + down, down, down, 0], [2 * up, 2 * up, up, 0]])
    batch = make_batch(seed=12, rewards="graded")
    last_BT = np.arange(T)[None] == batch.mask_BT.sum(1, keepdims=True) - 1
    outcome_BT = np.where(last_BT, batch.rewards_B[:, None], no)
    ours_BT = advantages(objectives.get("grpo_process"), batch, step_rewards_BT=f32(outcome_BT))
    assert_close(ours_BT, advantages(objectives.get("grpo"), batch))


def test_advantages_by_hand():
    """Rewards 1, 1, 0, 0 and 1, 0, 0, 0 in two groups, of lengths 1, 2, 3, 4."""
    rewards_B, mask_BT = f32([1, 1, 0, 0, 1, 0, 0, 0]), f32(np.tril(np.ones((4, 4))))
    mask_BT = jnp.concatenate([mask_BT, mask_BT])

    def first(name, **fields):
        return np.asarray(objectives.advantages(objectives.get(name, **fields), rewards_B, mask_BT, group_size=4))[:, 0]

    assert_close(first("maxrl"), [1, 1, -1, -1, 3, -1, -1, -1])
    assert_close(first("opo"), [0.7, 0.7, -0.3, -0.3, 0.9, -0.1, -0.1, -0.1])
    assert_close(first("pass_at_k"), [0, 0, 0, 0, 1, 0, 0, 0])
    assert_close(first("gpg"), [0.5, 0.5, -0.5, -0.5, 0.75, -0.25, -0.25, -0.25])
    std = np.std([1, 1, 0, 0, 1, 0, 0, 0], ddof=1)
    assert_close(first("lite_ppo", adv_eps=0.0), np.array([0.5, 0.5, -0.5, -0.5, 0.75, -0.25, -0.25, -0.25]) / std)
    # k = 2, one right of four: 3 of 6 pairs fail, s = 1/2; right: 0.5 / s; wrong: (0.5 - C(2,1)/C(3,1)) / s.
    assert_close(first("pass_at_k_analytic")[4:], [1, -1 / 3, -1 / 3, -1 / 3])
    # The two shortest of the first group are both right, of the second one is.
    assert_close(first("gfpo", keep_rows=2, adv_eps=0.0), [0, 0, 0, 0, 0.5**0.5, -(0.5**0.5), 0, 0])


def test_gdpo_counts_parts_by_their_weight_and_not_by_their_spread():
    """A part of a hundredth of the spread: GRPO does not see it, GDPO counts both alike."""
    parts_BK = np.array([[1, 0], [1, 0.01], [0, 0], [0, 0.01]], np.float32)
    mask_BT, rewards_B = f32(np.ones((4, 1))), f32(parts_BK.sum(1))
    adv = np.asarray(
        objectives.advantages(
            objectives.get("gdpo", adv_eps=0.0), rewards_B, mask_BT, group_size=4, reward_parts_BK=f32(parts_BK)
        )
    )[:, 0]
    std = np.std([0, 2, -2, 0], ddof=1)
    assert_close(adv, np.array([0, 2, -2, 0]) / std, scale=1.0)


# ---------------------------------------------------------------------------------------------------- surrogates by hand


def test_dppo_bounds_the_probability_and_not_the_ratio():
    """A rare token may grow tenfold; a likely one that grows by 0.3 trains no more, and is free to come back."""
    obj = objectives.get("dppo_tv")
    for (new, old), A, weight in [
        ((0.1, 0.01), 1.0, 10.0),
        ((0.9, 0.6), 1.0, 0.0),
        ((0.9, 0.6), -1.0, 1.5),
        ((0.6, 0.9), -1.0, 0.0),
        ((0.6, 0.9), 1.0, 2 / 3),
        ((0.15, 0.001), 1.0, 20.0),  # the weight, 150, is bounded
    ]:
        loss, grad = hand(obj, np.log(new), np.log(old), A)
        assert_close(grad, [[-weight * A]])
        assert_close(loss, -weight * A * math.log(new))
    # Binary KL of 0.01 -> 0.1: 0.01 log 0.1 + 0.99 log (0.99 / 0.9) = 0.0713 > 0.05.
    assert float(hand(objectives.get("dppo_kl"), np.log(0.1), np.log(0.01), 1.0)[1][0, 0]) == 0
    wider = objectives.get("dppo_kl", clip_low=0.0713, clip_high=0.0714)
    assert_close(hand(wider, np.log(0.1), np.log(0.01), 1.0)[1], [[-10.0]])


def test_sapo_fades():
    # w = 2, A = 1, tau = 1: slope 4 s (1 - s) w with s = sigmoid(1); a wrong token's tau is 1.05.
    gate = 1 / (1 + math.exp(-1))
    loss, grad = hand(objectives.get("sapo"), math.log(2) - 3, -3.0, 1.0)
    assert_close(loss, -4 * gate)
    assert_close(grad, [[-8 * gate * (1 - gate)]])
    gate = 1 / (1 + math.exp(-1.05))
    assert_close(hand(objectives.get("sapo"), math.log(2) - 3, -3.0, -1.0)[1], [[8 * gate * (1 - gate)]])


def test_vespo_weighs_by_the_whole_row():
    # Token ratios 2 and 1/4: W = 1/2; k = 2, lambda = 3 for A > 0: phi = 1/4 e^(3/2).
    phi = 0.25 * math.exp(1.5)
    _, grad = hand(objectives.get("vespo"), [-1 + math.log(2), -1 - math.log(4)], [-1, -1], [1.0, 1.0])
    assert_close(grad, [[-phi / 2, -phi / 2]])


def test_fipo_credits_what_came_after():
    # Half-life of one token: the first token's sum is log 1 + log 1.1 / 2, exp of it 1.1^0.5 = 1.0488.
    obj = objectives.get("fipo", future_half_life=1.0)
    loss, grad = hand(obj, [-1, -1 + math.log(1.1)], [-1, -1], [1.0, 1.0])
    first, second = math.sqrt(1.1), 1.1 * 1.1
    assert_close(grad, [[-first / 2, -second / 2]])
    assert_close(loss, -(first + second) / 2)
    assert float(hand(obj, [-1, -1 + math.log(5)], [-1, -1], [1.0, 1.0])[1][0, 0]) == pytest.approx(-1.2 / 2)  # the bound


def test_opsm_leaves_out_bad_rows_that_became_rare():
    """Rows at half their old probability: the wrong one is left out, the right one is pulled back; metrics count it."""
    obj = objectives.get("deepseek_v32", kl_coef=0.0, clip_low=0.9)
    logp = np.full((2, 2), -1 - math.log(2))
    loss, grad = hand(obj, logp, np.full((2, 2), -1.0), [[1, 1], [-1, -1]])
    assert_close(grad, [[-1 / 8, -1 / 8], [0, 0]])
    assert_close(loss, -0.25)
    batch = make_batch(seed=4)
    _, _, metrics = loss_and_grad(objectives.get("deepseek_v32"), batch, batch.row_adv_BT)
    assert 0 < float(metrics["policy/off_policy_fraction"].value()) < 1


def test_the_kl_weighted_by_the_ratio_is_unbiased_off_policy():
    """Sampled by q, its expectation over the vocabulary is KL(p || ref), gradient included; unweighted it is not."""
    logits = [jnp.asarray(np.random.default_rng(seed).normal(size=6), jnp.float32) for seed in range(3)]
    p_logits, log_q, log_ref = logits[0], *(jax.nn.log_softmax(x) for x in logits[1:])
    column = np.ones((6, 1), np.float32)

    def penalty(x, **fields):
        obj = objectives.get("deepseek_v32", kl_coef=1.0, max_off_policy_kl=None, **fields)
        loss_BT, _ = objectives.token_loss(
            obj, jax.nn.log_softmax(x)[:, None], log_q[:, None], log_ref[:, None], 0 * column, column
        )
        return (jnp.exp(log_q)[:, None] * loss_BT).sum()

    def truth(x):
        log_p = jax.nn.log_softmax(x)
        return (jnp.exp(log_p) * (log_p - log_ref)).sum()

    expected, expected_grad = jax.value_and_grad(truth)(p_logits)
    value, grad = jax.value_and_grad(penalty)(p_logits)
    assert_close(value, expected)
    np.testing.assert_allclose(grad, expected_grad, atol=1e-6)
    assert abs(float(penalty(p_logits, kl_by_ratio=False)) - float(expected)) > 0.05


def test_the_entropy_bonus_pushes_the_policy_apart():
    """Its gradient goes through the entropy that is handed in, weighted like the rest of the objective."""
    obj, mask_BT, zero_BT = objectives.get("entropy_bonus", entropy_coef=0.5), f32(np.ones((1, 1))), f32(np.zeros((1, 1)))

    def loss_of(logits):
        log_p = jax.nn.log_softmax(logits)
        entropy_BT = -(jnp.exp(log_p) * log_p).sum()[None, None]
        arrays = log_p[None, :1], log_p[None, :1], None, zero_BT, mask_BT
        return objectives.loss(obj, *arrays, max_completion_length=BUDGET, entropy_BT=entropy_BT)[0]

    logits = jnp.asarray([2.0, 0.0, -1.0])
    p = np.exp(np.asarray(jax.nn.log_softmax(logits), np.float64))
    entropy = -(p * np.log(p)).sum()
    assert_close(loss_of(logits), -0.5 * entropy)
    assert_close(jax.grad(loss_of)(logits), 0.5 * p * (np.log(p) + entropy))
    with pytest.raises(ValueError, match=r"entropy_coef = 0.5 needs the policy's entropy_BT"):
        objectives.loss(obj, zero_BT, zero_BT, None, zero_BT, mask_BT, max_completion_length=BUDGET)


# ------------------------------------------------------------------------------------------------------------- filters


def test_filters_take_what_they_say():
    batch = make_batch(seed=20)
    kept = np.asarray(advantages(objectives.get("forking_tokens", advantage="batch_norm"), batch)) != 0
    active_BT = batch.mask_BT > 0
    assert kept.sum() == pytest.approx(0.2 * active_BT.sum(), abs=1)
    assert batch.entropy_BT[kept].min() >= batch.entropy_BT[active_BT & ~kept].max()
    obj = objectives.get("clip_cov", cov_share=0.05, cov_range=(-9.0, 9.0))
    whole_BT = np.asarray(advantages(dataclasses.replace(obj, token_filter="all"), batch))
    dropped_BT = (whole_BT != 0) & (np.asarray(advantages(obj, batch)) == 0)
    assert dropped_BT.sum() == int(0.05 * active_BT.sum())
    cov_BT = (whole_BT - whole_BT[active_BT].mean()) * (batch.old_BT - batch.old_BT[active_BT].mean())
    assert cov_BT[dropped_BT].min() >= cov_BT[active_BT & ~dropped_BT].max()
    # The policy's loss of a token that is filtered out is 0, and it still counts in the mean over tokens.
    grad_BT = loss_and_grad(obj, batch, advantages(obj, batch))[1]
    assert not np.asarray(grad_BT)[dropped_BT].any()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"keep_rows": 2}, r"objective.keep_rows = 2: nothing reads it"),
        ({"row_filter": "shortest"}, r"objective.keep_rows = 0: row_filter = 'shortest' needs"),
        ({"row_filter": "tallest"}, r"objective.row_filter = 'tallest': unknown; known: all, shortest, efficient"),
        ({"token_filter": "first"}, r"objective.token_filter = 'first': unknown; known: all, top_entropy, low_covariance"),
        ({"cov_range": (2.0, 1.0)}, r"objective.cov_range = \(2.0, 1.0\): must be \(low, high\), low first"),
        ({"gate_sharpness": (0.0, 1.0)}, r"objective.gate_sharpness = .*: both must be above 0"),
        ({"gamma_weight": (1.0, 1.0)}, r"objective.gamma_weight = .*: must be \(k, lambda, k, lambda\)"),
        ({"max_off_policy_kl": -1.0}, r"objective.max_off_policy_kl = -1.0: must be None or a number >= 0"),
    ],
)
def test_a_setting_that_cannot_be_says_so(fields, says):
    with pytest.raises(ValueError, match=says):
        objectives.get("grpo", **fields)


def test_missing_inputs_are_errors():
    batch = make_batch()
    arrays = f32(batch.rewards_B), f32(batch.mask_BT)
    with pytest.raises(ValueError, match="token_filter 'top_entropy' needs the sampling policy's entropy_BT"):
        objectives.advantages(objectives.get("forking_tokens"), *arrays, group_size=G)
    with pytest.raises(ValueError, match="advantage 'step_returns' needs step_rewards_BT"):
        objectives.advantages(objectives.get("grpo_process"), *arrays, group_size=G)
    with pytest.raises(ValueError, match="token_filter 'low_covariance' needs logp_BT"):
        objectives.advantages(objectives.get("clip_cov"), *arrays, group_size=G)
    with pytest.raises(ValueError, match=r"cov_penalty = 1.0 needs penalised_BT"):
        rest = f32(batch.old_BT), None, f32(batch.row_adv_BT), arrays[1]
        objectives.loss(objectives.get("kl_cov"), f32(batch.logp_BT), *rest, max_completion_length=BUDGET)


def test_every_entry_says_what_it_is():
    for name, entry in objectives.FAMILY.items():
        assert entry.title and entry.paper and entry.formula and "\n" not in entry.formula, name
        assert objectives.VARIANTS[name] is entry.objective and objectives.describe(entry.objective) == name
    assert not set(objectives.FAMILY) & (set(objectives.ENTRIES) | set(objectives.PRESETS))


# ---------------------------------------------------------------------------------------- the correction of the sampler


@pytest.mark.parametrize("outside", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_geometric"])
def test_the_samplers_correction_number_by_number(level, outside):
    batch, (low, high) = make_batch(seed=21), (0.7, 1.4)
    log_ratio_BT = objectives.log_ratio(f32(batch.logp_BT), f32(batch.old_BT), f32(batch.mask_BT))
    ratio_BT = objectives.sampler_ratio(log_ratio_BT, f32(batch.mask_BT), level)
    found_BT = np.asarray(objectives.sampler_weights(ratio_BT, outside, low, high))
    outcomes = set()
    for i, t in zip(*np.nonzero(batch.mask_BT), strict=True):
        logs = (batch.logp_BT[i].astype(np.float64) - batch.old_BT[i])[batch.mask_BT[i] > 0]
        log_w = {"token": logs[t], "sequence": logs.sum(), "sequence_geometric": logs.mean()}[level]
        w = math.exp(log_w)
        expected = min(max(w, low), high) if outside == "truncate" else w * (low <= w <= high)
        assert_close(found_BT[i, t], expected)
        outcomes.add((w < low) - (w > high))
    assert outcomes == {-1, 0, 1}
    wide_BT = objectives.sampler_weights(ratio_BT, outside, 0.0, math.inf)
    assert_close(wide_BT, ratio_BT)
    agreed_BT = objectives.sampler_weights(
        objectives.sampler_ratio(0 * log_ratio_BT, f32(batch.mask_BT), level), outside, 1.0, 1.0
    )
    assert (np.asarray(agreed_BT) == 1).all()
    far_BT = objectives.sampler_ratio(jnp.where(f32(batch.mask_BT) > 0, 20.0, 0.0), f32(batch.mask_BT), level)
    assert np.isfinite(np.asarray(far_BT)).all()


# ------------------------------------------------------------------------------------------------------------------ GROP


def grop(lengths, is_right, share=0.75, counts=None):
    counts = [True] * len(lengths) if counts is None else counts
    arrays = (jnp.asarray([x]) for x in (lengths, is_right, counts))
    return np.asarray(shaping.group_overlong(*arrays, easy_share=share))[0]


def test_grop_by_hand():
    # Easy, 3 of 4 right: their lengths 2, 4, 12, L = max(7, 6) = 7; 12 is beyond it by 5/7. The wrong one is not punished.
    assert_close(grop([2, 4, 12, 40], [True, True, True, False]), [0, 0, -2.5 / 7, 0])
    # L = max(3, 10/3) is the mean where that is larger; beyond 2 L it is -1/2.
    assert_close(grop([1, 4, 5, 5], [True] * 4), [0, -0.25 / 7.5, -1.25 / 7.5, -1.25 / 7.5])
    assert_close(grop([1, 1, 1, 9], [True] * 4), [0, 0, 0, -0.4])
    assert_close(grop([1] * 9 + [99], [True] * 10)[-1], -0.5 * 49 / 50)
    # Hard, 1 of 4 right: nobody.
    assert not grop([1, 50, 50, 50], [True, False, False, False]).any()
    # Between, half right: not the majority, so the wrong ones, with L of all four: max((2 + 10) / 2, 5.5) = 6.
    assert_close(grop([2, 10, 8, 2], [True, True, False, False]), [0, 0, -1 / 6, 0])
    # Between, 3 of 5 right: the right ones, L of all five: max((1 + 9) / 2, 5) = 5.
    assert_close(grop([9, 1, 5, 5, 5], [True, True, True, False, False]), [-0.4, 0, 0, 0, 0])
    # A row that is out of its group counts in nothing: 2 of 3 are right, the right ones are the majority.
    assert_close(grop([2, 10, 6, 999], [True, True, False, True], counts=[True] * 3 + [False]), [0, -1 / 3, 0, 0])
    assert not grop([3, 4], [True, True], counts=[False, False]).any()


def test_grop_is_added_to_the_reward_and_leaves_the_tasks_alone():
    rolled = tiny.random_batch(num_prompts=6, group_size=8, max_tokens=12, seed=3).rollout
    task_PG = jnp.asarray(np.random.default_rng(0).random((6, 8)) < 0.6, jnp.float32)
    reward = Reward(task_PG, jnp.zeros((6, 8)), {})
    kwargs = {"max_completion_tokens": 12, "cache_tokens": 0}
    plain, punished = (shaping.make_batch(rolled, reward, 0, easy_share=share, **kwargs) for share in (0.0, 0.75))
    lengths_PG = rolled.mask_PGT.sum(-1)
    expected_PG = shaping.group_overlong(lengths_PG, task_PG > 0.5, lengths_PG > 0, easy_share=0.75)
    assert_close(punished.reward_PG - plain.reward_PG, expected_PG)
    assert (np.asarray(expected_PG) < 0).any()
    np.testing.assert_array_equal(punished.task_reward_PG, task_PG)
