"""The objectives against the float64 oracle, numbers worked out by hand, every invariant, and public trainers' bugs."""

import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from grpo_jax import objectives
from grpo_jax.knobs import Knob, walk
from grpo_jax.objectives.choices import CHOICES
from grpo_jax.types import UNKNOWN
from tests import oracle

NAMES = tuple(objectives.ENTRIES)
ENTROPY_NAMES = ("gtpo", "grpo_s")


def one_of_each(*fields):
    """The first variant of each choice in these fields, for tests that look at nothing else."""
    return tuple({tuple(getattr(objectives.get(name), field) for field in fields): name for name in reversed(NAMES)}.values())


ESTIMATORS = one_of_each("advantage")
LOSSES = one_of_each("ratio", "surrogate", "aggregation")
SURROGATES = one_of_each("ratio", "surrogate")
CLIPPED = tuple(name for name in SURROGATES if objectives.get(name).surrogate in ("ppo_clip", "token_clip"))
# Advantages that must be 0 in a group of equal rewards: those that have a baseline of the group's own.
SILENT = tuple(name for name in ESTIMATORS if name in ENTROPY_NAMES or objectives.get(name).advantage in oracle.OF_A_GROUP)
# What the variants that come with the package were published as. A new one needs no row here.
AS_PUBLISHED = {
    "grpo": ("group_norm", "token", 0.2, 0.2, "sequence_mean", 0.04),
    "dapo": ("group_norm", "token", 0.2, 0.28, "token_mean", 0.0),
    "dr_grpo": ("group_center", "token", 0.2, 0.2, "constant", 0.04),
    "gtpo": ("token_entropy", "token", 0.2, 0.28, "token_mean", 0.0),
    "grpo_s": ("sequence_entropy", "sequence", 0.2, 0.28, "sequence_mean", 0.0),
    "gspo": ("group_norm", "sequence_geometric", 3e-4, 4e-4, "sequence_mean", 0.0),
    "rloo": ("leave_one_out", "token", 0.2, 0.2, "sequence_sum", 0.0),
    "reinforce_pp": ("batch_norm", "token", 0.2, 0.2, "token_mean", 0.0),
    "cispo": ("group_norm", "token", 1.0, 4.0, "token_mean", 0.0),
    "gmpo": ("group_norm", "sequence_geometric", 1 - math.exp(-0.4), math.exp(0.4) - 1, "sequence_mean", 0.0),
}
P, G, T = 8, 4, 6
B = P * G
BUDGET = 10  # max_completion_length, on purpose not T
SUCCESS_GROUP, FAILURE_GROUP, HOLED_GROUP, DROPPED_GROUP = 1, 2, 3, 5  # groups of `make_batch` that are special
HOLED_ROW = HOLED_GROUP * G + 1
every_variant = pytest.mark.parametrize("name", NAMES)
every_estimator = pytest.mark.parametrize("name", ESTIMATORS)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_surrogate = pytest.mark.parametrize("name", SURROGATES)
every_clipped = pytest.mark.parametrize("name", CLIPPED)


# ---------------------------------------------------------------------------------------------------------- helpers


def f32(x):
    return jnp.asarray(x, jnp.float32)


def rows_of(group):
    return slice(group * G, (group + 1) * G)


def make_batch(seed=0, rewards="binary"):
    """Ragged: a row without tokens, a group without tokens, uniform groups, ratios on both sides of the clip."""
    rng = np.random.default_rng(seed)
    lengths_B = rng.integers(1, T + 1, B)
    lengths_B[HOLED_ROW] = 0
    lengths_B[rows_of(DROPPED_GROUP)] = 0
    lengths_B[0], lengths_B[1] = T, 1
    task_B = rng.integers(0, 2, B).astype(np.float32)
    task_B[:G] = [1, 0, 1, 0]
    task_B[rows_of(SUCCESS_GROUP)] = 1
    task_B[rows_of(FAILURE_GROUP)] = 0
    rewards_B = task_B
    if rewards == "graded":  # 0.5 is the threshold and counts as success
        task_B = rewards_B = rng.choice([0.0, 0.25, 0.5, 0.75, 1.0], B)
        rewards_B[rows_of(SUCCESS_GROUP)] = 0.75
    elif rewards == "shaped":  # a success may end below the threshold after its punishment, and stays in O+
        rewards_B = task_B + rng.choice([0.0, -0.3, -1.0], B)
    logp_BT = -rng.uniform(0.1, 4.0, (B, T))
    sign_B1 = rng.choice([-1.0, 1.0], (B, 1))
    entropy_BT = rng.uniform(0.0, 3.0, (B, T))
    entropy_BT[rng.random((B, T)) < 0.1] = 0.0  # a certain token: only the floor keeps 1/H finite
    row_adv_BT = np.repeat(rng.normal(size=(B, 1)), T, axis=1)
    mask_BT = np.arange(T)[None, :] < lengths_B[:, None]
    batch = dict(
        rewards_B=rewards_B,
        task_B=task_B,
        mask_BT=mask_BT,
        entropy_BT=entropy_BT,
        logp_BT=logp_BT,
        old_BT=logp_BT - rng.normal(size=(B, T)) * 0.3 - 0.2 * sign_B1,
        ref_BT=logp_BT + rng.normal(size=(B, T)) * 0.4,
        row_adv_BT=row_adv_BT * mask_BT,
        token_adv_BT=rng.normal(size=(B, T)) * mask_BT,
    )
    return SimpleNamespace(**{key: np.asarray(value, np.float32) for key, value in batch.items()})


def replaced(batch, **changes):
    return SimpleNamespace(**{**vars(batch), **changes})


def steps_of(batch):
    """Steps that end at some tokens, each with its row's reward: equal in a group where these are."""
    return np.where(np.asarray(batch.token_adv_BT) > 0, np.asarray(batch.rewards_B)[:, None], np.float32(UNKNOWN))


def advantages(obj, batch, group_size=G, **kwargs):
    kwargs = {"task_rewards_B": f32(batch.task_B), "step_rewards_BT": f32(steps_of(batch)), **kwargs}
    rewards_B, mask_BT, entropy_BT = f32(batch.rewards_B), f32(batch.mask_BT), f32(batch.entropy_BT)
    return objectives.advantages(obj, rewards_B, mask_BT, entropy_BT, group_size=group_size, **kwargs)


def oracle_advantages(obj, batch, group_size=G):
    arrays = batch.rewards_B, batch.mask_BT, batch.entropy_BT, group_size, batch.task_B
    return oracle.advantages(obj, *arrays, steps_BT=steps_of(batch))


def loss_grad_metrics(obj, batch, adv_BT, budget=BUDGET):
    """Loss, d loss / d logp and metrics of the library."""
    ref_BT = f32(batch.ref_BT) if obj.kl_coef else None
    rest = f32(batch.old_BT), ref_BT, f32(adv_BT), f32(batch.mask_BT)

    def loss_of(logp_BT):
        return objectives.loss(obj, logp_BT, *rest, max_completion_length=budget)

    (loss, metrics), grad_BT = jax.value_and_grad(loss_of, has_aux=True)(f32(batch.logp_BT))
    return loss, grad_BT, metrics


def loss_and_grad(obj, batch, adv_BT, budget=BUDGET):
    return loss_grad_metrics(obj, batch, adv_BT, budget)[:2]


def oracle_loss_and_grad(obj, batch, adv_BT, budget=BUDGET):
    return oracle.loss_and_grad(obj, batch.logp_BT, batch.old_BT, batch.ref_BT, adv_BT, batch.mask_BT, budget)


def assert_close(actual, desired, rtol=1e-5, scale=0.0):
    """Relative to each number, or to a tenth of the largest one (`scale`: of what was summed) where numbers cancel."""
    desired = np.asarray(desired)
    scale = float(np.max(np.abs(desired), initial=scale))
    np.testing.assert_allclose(np.asarray(actual), desired, rtol=rtol, atol=0.1 * rtol * scale + 1e-9)


def framed(x, shape, fill=0.0):
    """`x` in the corner of a larger array, so that all hand-made cases share one shape (and its compilations)."""
    x = np.atleast_2d(np.asarray(x, np.float64))
    frame = np.full(shape, fill)
    frame[: x.shape[0], : x.shape[1]] = x
    return frame


def hand_loss(obj, logp, old, adv, mask=None, ref=None, budget=BUDGET):
    """Loss, d loss / d logp and metrics of a case of at most 3 rows of 4 tokens."""
    rows, tokens = np.atleast_2d(logp).shape
    shape = (3, 4)
    mask = np.ones((rows, tokens)) if mask is None else mask
    frames = {"logp_BT": logp, "old_BT": old, "ref_BT": logp if ref is None else ref, "mask_BT": mask}
    batch = SimpleNamespace(**{key: framed(value, shape) for key, value in frames.items()})
    loss, grad_BT, metrics = loss_grad_metrics(obj, batch, framed(adv, shape), budget)
    return loss, np.asarray(grad_BT)[:rows, :tokens], {name: float(m.value()) for name, m in metrics.items()}


def hand_advantages(obj, rewards, mask, entropy):
    """Advantages of one group of at most 4 rows of 2 tokens; the rest of the group is dropped."""
    rows, shape = len(rewards), (4, 2)
    rewards_B = f32(framed(rewards, (1, 4), fill=99.0)[0])
    entropy_BT = None if entropy is None else f32(framed(entropy, shape))
    return np.asarray(objectives.advantages(obj, rewards_B, f32(framed(mask, shape)), entropy_BT, group_size=4))[:rows]


def case(name, **fields):
    return pytest.param(name, fields, id="-".join([name, *(f"{k}={v}" for k, v in fields.items())]).replace(" ", ""))


def grid(name, **choices):
    return [case(name, **dict(zip(choices, values, strict=True))) for values in itertools.product(*choices.values())]


SCOPED = [  # only the entropy variants have a scope to choose
    *(case(name) for name in ESTIMATORS if name not in ENTROPY_NAMES),
    *itertools.chain.from_iterable(grid(name, stat_scope=("batch", "group")) for name in ENTROPY_NAMES),
]
every_scope = pytest.mark.parametrize("name, fields", SCOPED)


# ------------------------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("name, fields", [*(case(name) for name in LOSSES), *grid("grpo", kl_estimator=("k1", "k2"))])
def test_oracle_gradient_is_the_finite_difference(name, fields):
    obj = objectives.get(name, kl_coef=0.1, **fields)
    batch = make_batch(seed=1)
    few = SimpleNamespace(**{key: value[:6].astype(np.float64) for key, value in vars(batch).items()})
    adv_BT = few.token_adv_BT if obj.ratio == "token" else few.row_adv_BT
    _, grad_BT = oracle_loss_and_grad(obj, few, adv_BT)
    numeric_BT, h = np.zeros_like(grad_BT), 1e-6
    for i, t in np.ndindex(*grad_BT.shape):
        sides = []
        for step in (h, -h):
            moved = replaced(few, logp_BT=few.logp_BT.copy(), old_BT=few.old_BT.copy())
            moved.logp_BT[i, t] += step
            if obj.surrogate in oracle.WEIGHT:  # the weight is a number: it has to stay where it is
                moved.old_BT[i, t] += step
            sides.append(oracle_loss_and_grad(obj, moved, adv_BT)[0])
        numeric_BT[i, t] = (sides[0] - sides[1]) / (2 * h)
    assert np.abs(grad_BT).max() > 0.01
    np.testing.assert_allclose(grad_BT, numeric_BT, rtol=1e-6, atol=1e-9)


def test_batches_exercise_every_branch():
    batch = make_batch()
    is_active_BT = batch.mask_BT > 0
    w_BT = np.exp(batch.logp_BT - batch.old_BT)
    for w in (w_BT[is_active_BT], [w_BT[i, is_active_BT[i]].mean() for i in range(B) if is_active_BT[i].any()]):
        assert (np.asarray(w) < 0.8).sum() >= 3 and (np.asarray(w) > 1.28).sum() >= 3
    for adv_BT in (batch.token_adv_BT, batch.row_adv_BT):
        for is_far_BT in (w_BT < 0.8, w_BT > 1.28):
            assert {-1.0, 1.0} <= set(np.sign(adv_BT[is_far_BT & is_active_BT]))
    assert len(set(batch.mask_BT.sum(1))) == T + 1
    shaped = make_batch(rewards="shaped")
    assert ((shaped.task_B >= 0.5) != (shaped.rewards_B >= 0.5)).any()


# ------------------------------------------------------------------------------------------- parity with the oracle

# With the defaults every variant is compared end to end, below; here is what they leave out, each case with numbers of its own.
ADVANTAGE_CASES = [
    *grid("grpo", advantage=CHOICES["advantage"], std_ddof=(0,), adv_eps=(0.0,)),
    *grid("grpo", advantage=CHOICES["advantage"], adv_eps=(1e-2,)),
    *grid("gtpo", stat_scope=("batch", "group"), entropy_clip=((0.2, 1.5),)),
    *grid("gtpo", stat_scope=("batch", "group"), entropy_floor=(0.3,), entropy_clip=((0.0, 1.5),)),
    *grid("gtpo", stat_scope=("batch", "group"), base_weight=(0.5,), entropy_weight=(0.3,)),
    *grid("gtpo", stat_scope=("group",), std_ddof=(0,)),
    *grid("grpo_s", stat_scope=("batch", "group"), sequence_mean_kind=("geometric",), std_ddof=(0, 1)),
    *grid("grpo_s", stat_scope=("batch", "group"), entropy_clip=((0.2, 1.5),), entropy_floor=(0.3,)),
    *grid("grpo_s", sequence_mean_kind=("geometric",), entropy_floor=(0.3,)),
    *grid("grpo_s", stat_scope=("batch", "group"), base_weight=(0.5,), entropy_weight=(0.3,)),
]
REWARDS_OF_CASES = [
    *(
        pytest.param(*case.values, rewards, id=f"{case.id}-{rewards}")
        for case in ADVANTAGE_CASES
        for rewards in ("graded", "shaped")
    ),
    *(  # 0 and 1 are on their sides of any threshold between
        pytest.param(name, {"success_threshold": threshold}, "graded", id=f"{name}-success_threshold={threshold}")
        for name in ENTROPY_NAMES
        for threshold in (0.25, 0.75)
    ),
]


@pytest.mark.parametrize("name, fields, rewards", REWARDS_OF_CASES)
def test_advantages_match_oracle(name, fields, rewards):
    obj = objectives.get(name, **fields)
    batch = make_batch(seed=2, rewards=rewards)
    expected_BT = oracle_advantages(obj, batch)
    assert np.abs(expected_BT).max() > 0.2
    assert_close(advantages(obj, batch), expected_BT)


LOSS_CASES = [
    *itertools.chain.from_iterable(
        [
            case(name, kl_coef=0.04, clip_low=0.2, clip_high=0.28),
            case(name, kl_coef=0.0, clip_low=0.1, clip_high=0.4),
        ]
        for name in LOSSES
    ),
    # Axes compose: a token ratio with any aggregation; the other ratios average rows whatever it says.
    *grid("grpo", ratio=("token",), aggregation=("token_mean", "constant")),
    *grid("grpo", ratio=("sequence", "sequence_geometric"), aggregation=("constant",)),
    *grid("grpo", aggregation=("sequence_sum",), kl_estimator=("k1", "k2")),
    *grid("gmpo", ratio=("token",), clip_low=(0.1,), clip_high=(0.1,), dual_clip=(None, 1.3)),
    *grid("gmpo", clip_low=(0.1,), clip_high=(0.1,), dual_clip=(1.3,)),
    *grid("grpo", ratio=("token", "sequence", "sequence_geometric"), dual_clip=(1.3,)),
    *grid("cispo", ratio=("sequence", "sequence_geometric"), clip_low=(0.1,), clip_high=(0.1,)),
]


@pytest.mark.parametrize("name, fields", LOSS_CASES)
def test_loss_and_gradient_match_oracle(name, fields):
    obj = objectives.get(name, **fields)
    batch = make_batch(seed=3)
    adv_BT = batch.token_adv_BT if obj.ratio == "token" else batch.row_adv_BT
    expected, expected_grad_BT = oracle_loss_and_grad(obj, batch, adv_BT)
    loss, grad_BT = loss_and_grad(obj, batch, adv_BT)
    assert abs(expected) > 1e-3
    assert_close(loss, expected)
    assert_close(grad_BT, expected_grad_BT)


def assert_end_to_end(obj, batch):
    expected, expected_grad_BT = oracle_loss_and_grad(obj, batch, oracle_advantages(obj, batch))
    loss, grad_BT = loss_and_grad(obj, batch, advantages(obj, batch))
    assert np.abs(expected_grad_BT).max() > 1e-3
    assert_close(loss, expected, rtol=2e-5, scale=0.1)
    assert_close(grad_BT, expected_grad_BT, rtol=2e-5)


@pytest.mark.parametrize("rewards", ["binary", "graded"])  # shaped: test_one_device_step_matches_oracle
@every_variant
def test_variants_match_oracle_end_to_end(name, rewards):
    assert_end_to_end(objectives.get(name), make_batch(seed=4, rewards=rewards))


@pytest.mark.parametrize("name", objectives.PRESETS)
def test_presets_match_oracle_end_to_end(name):
    assert_end_to_end(objectives.get(name), make_batch(seed=4, rewards="graded"))


def other_values(value, knob):
    """Other values of a number in its range: half and twice, or half of the way to a bound; of an int one less and more."""
    if isinstance(value, int):
        return [other for other in (value - 1, value + 1) if not knob.complaint(other)]
    lower, higher = value / 2, value * 2
    bounds = [bound for bound in (knob.at_most, knob.below) if bound is not None]
    if bounds and knob.complaint(higher):
        higher = (value + bounds[0]) / 2
    return [other for other in (lower, higher) if not knob.complaint(other)]


@every_variant
def test_every_number_of_a_variant_does_what_the_oracle_says(name):
    """Each number lower and higher, one at a time: also the hyper-parameter that a new variant brings."""
    plain, batch = objectives.get(name), make_batch(seed=4, rewards="graded")
    numbers = [(field, value, knob) for field, value, knob in walk(plain) if isinstance(value, float | int) and value]
    numbers = [(field, value, knob) for field, value, knob in numbers if not isinstance(value, bool)]
    assert len(numbers) >= 8
    for field, value, knob in numbers:
        assert other_values(value, knob), f"{field}: no other value is in its range"
        for changed in other_values(value, knob):
            assert_end_to_end(dataclasses.replace(plain, **{field: changed}), batch)


def test_other_values_stay_in_the_range():
    assert other_values(0.75, Knob("", at_least=0, at_most=1)) == [0.375, 0.875]
    assert other_values(0.2, Knob("", at_least=0)) == [0.1, 0.4]
    assert other_values(1, Knob("", at_least=1)) == [2]


@every_loss
def test_loss_is_its_parts(name):
    """`loss` is sum(token_loss * weight) / denom: the train step uses the parts, so they may not drift apart."""
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch()
    adv_BT, mask_BT = advantages(obj, batch), f32(batch.mask_BT)
    logps = f32(batch.logp_BT), f32(batch.old_BT), f32(batch.ref_BT)
    loss_BT, aux = objectives.token_loss(obj, *logps, adv_BT, mask_BT)
    weight_BT, denom = objectives.weights(obj, mask_BT, max_completion_length=BUDGET)
    loss, _ = objectives.loss(obj, *logps, adv_BT, mask_BT, max_completion_length=BUDGET)
    assert_close((loss_BT * weight_BT).sum() / denom, loss, rtol=1e-6)
    assert loss_BT.shape == weight_BT.shape == (B, T) and denom.shape == ()
    assert all(value.shape == (B, T) for value in aux.values())
    assert not np.asarray(loss_BT)[batch.mask_BT == 0].any()
    assert not np.asarray(weight_BT * mask_BT - weight_BT).any()


# --------------------------------------------------------------------------------------------------- goldens by hand


def test_golden_group_norm():
    # [1, 0, 0, 0]: mean 1/4; sum of squares 9/16 + 3/16 = 3/4; sample variance 3/4 / 3 = 1/4, std 1/2.
    # A = (3/4) / (1/2) = 3/2 and (-1/4) / (1/2) = -1/2.
    # ddof 0: variance 3/16, std sqrt(3)/4, A = sqrt(3) and -1/sqrt(3).
    obj = objectives.get("grpo", adv_eps=0.0)
    rewards, mask = [1, 0, 0, 0], np.ones((4, 2))
    adv_BT = hand_advantages(obj, rewards, mask, None)
    assert_close(adv_BT, [[1.5, 1.5], [-0.5, -0.5], [-0.5, -0.5], [-0.5, -0.5]])
    population = objectives.get("grpo", adv_eps=0.0, std_ddof=0)
    adv_BT = hand_advantages(population, rewards, mask, None)
    assert_close(adv_BT[:2, 0], [math.sqrt(3), -1 / math.sqrt(3)])


def test_golden_group_center():
    # [1, 0, 0, 1/2]: mean 3/8.
    adv_BT = hand_advantages(objectives.get("dr_grpo"), [1, 0, 0, 0.5], [[1, 1], [1, 1], [1, 0], [1, 1]], None)
    assert_close(adv_BT, [[5 / 8, 5 / 8], [-3 / 8, -3 / 8], [-3 / 8, 0], [1 / 8, 1 / 8]])


def test_golden_token_entropy():
    # One group, rewards [1, 1, 0]; row 1 has no second token.  H = [[1, 5], [3, .], [2, 7]].
    # t=0: O+ = {0, 1}, d = 2: 1 + 0.1 * 2 * 1/4 = 1.05 and 1 + 0.1 * 2 * 3/4 = 1.15.  O- = {2}, h = 1: -1 - 0.1 = -1.1.
    # t=1: O+ = {0}, d = 1: 1 + 0.1 = 1.1.  O- = {2}: -1.1.
    # R+ = [1.05, 1.1, 1.15, 0, 0]: mean 3.3/5 = 0.66, sum of squares 1.1025 + 1.21 + 1.3225 = 3.635,
    #      variance (3.635 - 5 * 0.66^2) / 4 = 1.457/4 = 0.36425.
    # R- = [0, 0, 0, -1.1, -1.1]: mean -0.44, variance (2.42 - 5 * 0.44^2) / 4 = 1.452/4 = 0.363.
    for scope in ("batch", "group"):
        obj = objectives.get("gtpo", adv_eps=0.0, stat_scope=scope)
        adv_BT = hand_advantages(obj, [1, 1, 0], [[1, 1], [1, 0], [1, 1]], [[1, 5], [3, 9], [2, 7]])
        plus, minus = math.sqrt(0.36425), math.sqrt(0.363)
        expected_BT = [[0.39 / plus, 0.44 / plus], [0.49 / plus, 0.0], [-0.66 / minus, -0.66 / minus]]
        assert_close(adv_BT, expected_BT)


def test_golden_token_entropy_punishes_the_sure_failure_most():
    # Rewards [1, 0, 0], one token each, H = [2, 1, 3].  O-: h = 2, 1/H = 1 and 1/3, sum 4/3: shares 3/4 and 1/4;
    # -1 - 0.1 * 2 * 3/4 = -1.15 and -1.05.  R- = [0, -1.15, -1.05]: mean -2.2/3, var (1.3225 + 1.1025 - 4.84/3)/2.
    obj = objectives.get("gtpo", adv_eps=0.0)
    adv_BT = hand_advantages(obj, [1, 0, 0], [[1, 0]] * 3, [[2, 9], [1, 9], [3, 9]])
    mean, std = -2.2 / 3, math.sqrt((1.3225 + 1.1025 - 4.84 / 3) / 2)
    assert_close(adv_BT[1:, 0], [(-1.15 - mean) / std, (-1.05 - mean) / std])
    assert_close(adv_BT[0, 0], 2 / math.sqrt(3))  # R+ = [1.1, 0, 0]: 1.1 * (2/3) / (1.1 / sqrt(3))


@pytest.mark.parametrize("kind, Hs", [("arithmetic", 2.5), ("geometric", 2.0)])
def test_golden_sequence_entropy(kind, Hs):
    # Rewards [1, 1, 0].  H = [[1, 4], [6, 6], [2, .]]: row 0's mean is (1 + 4)/2 or sqrt(1 * 4), row 1's is 6 anyhow.
    # n = 2: rs+ = 1 + 0.2 * Hs/(Hs + 6) and 1 + 0.2 * 6/(Hs + 6) (geometric: 1.05 and 1.15).  m = 1: rs- = -1.1.
    # R+ = [., ., 0] sums to 2.2.  R- = [0, 0, -1.1]: mean -1.1/3, std 1.1/sqrt(3), A- = -1.1 * 2/3 / std = -2/sqrt(3).
    obj = objectives.get("grpo_s", adv_eps=0.0, sequence_mean_kind=kind)
    adv_BT = hand_advantages(obj, [1, 1, 0], [[1, 1], [1, 1], [1, 0]], [[1, 4], [6, 6], [2, 99]])
    plus = 1 + 0.2 * Hs / (Hs + 6), 1 + 0.2 * 6 / (Hs + 6)
    mean = 2.2 / 3
    std = math.sqrt((plus[0] ** 2 + plus[1] ** 2 - 3 * mean**2) / 2)
    expected_B = [(plus[0] - mean) / std, (plus[1] - mean) / std, -2 / math.sqrt(3)]
    assert_close(adv_BT, np.array([expected_B, expected_B]).T * [[1, 1], [1, 1], [1, 0]])


@pytest.mark.parametrize(
    "A, w, objective, slope",
    [
        (1.0, 1.5, 1.28, 0.0),  # already likelier than the clip allows: no more
        (1.0, 0.5, 0.5, 0.5),  # became unlikelier though good: full pull back
        (-1.0, 1.5, -1.5, -1.5),  # became likelier though bad: full push down, unclipped
        (-1.0, 0.5, -0.8, 0.0),  # already pushed down enough
    ],
)
@every_clipped
def test_golden_clip(name, A, w, objective, slope):
    obj = objectives.get(name, kl_coef=0.0, clip_low=0.2, clip_high=0.28, aggregation="sequence_mean")
    loss, grad_BT, _ = hand_loss(obj, [[math.log(w) - 1.0]], [[-1.0]], [[A]])
    assert_close(loss, -objective)
    assert_close(grad_BT, [[-slope]])


def test_golden_sequence_ratios():
    # w = (2, 1/2): arithmetic mean 1.25, geometric mean 1.  A = 1, clip out of the way.
    case = np.log([[0.4, 0.1]]), np.log([[0.2, 0.2]]), [[1.0, 1.0]]
    wide = dict(kl_coef=0.0, clip_low=0.9, clip_high=9.0)
    loss, grad_BT, _ = hand_loss(objectives.get("grpo_s", **wide), *case)
    assert_close(loss, -1.25)
    assert_close(grad_BT, [[-2 / 2, -0.5 / 2]])  # dw/dlogp_t = exp(log_ratio_t) / |o|
    loss, grad_BT, _ = hand_loss(objectives.get("gspo", **wide), *case)
    assert_close(loss, -1.0)
    assert_close(grad_BT, [[-1 / 2, -1 / 2]])  # dw/dlogp_t = w / |o|


@pytest.mark.parametrize(
    "aggregation, loss, weights_B",
    [
        ("sequence_mean", -(1 + 4) / 2, [1 / 2, 1 / 6]),  # rows average 1 and 4
        ("token_mean", -(1 + 12) / 4, [1 / 4, 1 / 4]),  # 1 + 3 * 4 over 4 tokens
        ("constant", -(1 + 12) / (2 * 10), [1 / 20, 1 / 20]),  # over 2 rows of 10
    ],
)
def test_golden_aggregation(aggregation, loss, weights_B):
    # Lengths 1, 3 and a dropped row; A = 1 and 4; w = 1.
    mask_BT = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    adv_BT = mask_BT * np.array([[1.0], [4.0], [0.0]])
    logp_BT = np.full((3, 3), -1.0)
    obj = objectives.get("grpo", kl_coef=0.0, aggregation=aggregation)
    actual, grad_BT, _ = hand_loss(obj, logp_BT, logp_BT, adv_BT, mask_BT, budget=10)
    assert_close(actual, loss)
    assert_close(grad_BT, -adv_BT * np.array([*weights_B, 0.0])[:, None])


def test_golden_kl():
    # pi = 1/4, ref = 1/2: d = ln 2, k3 = 2 - ln 2 - 1 = 1 - ln 2, slope in logp 1 - 2 = -1.
    logp, ref = np.log([[0.25, 0.25]]), np.log([[0.5, 0.25]])
    for name in AS_PUBLISHED:  # two tokens, the second has no KL: every aggregation but one averages them (budget = 2)
        obj = objectives.get(name, kl_coef=0.1)
        share = 1.0 if obj.aggregation == "sequence_sum" else 0.5
        loss, grad_BT, _ = hand_loss(obj, logp, logp, np.zeros((1, 2)), ref=ref, budget=2)
        assert_close(loss, 0.1 * (1 - math.log(2)) * share)
        assert_close(grad_BT, [[-0.1 * share, 0.0]])


def test_golden_clip_fractions_and_kl_metric():
    # Four tokens: two below 0.8 with A < 0 (clipped low), one above 1.28 with A > 0 (clipped high), one inside.
    log_w = np.log([[0.5, 0.7, 1.5, 1.1]])
    case = log_w - 2, np.full((1, 4), -2.0), [[-1.0, -1.0, 1.0, 1.0]]
    ref = case[0] + math.log(2) * np.array([[1, 1, 0, 0]])
    *_, metrics = hand_loss(objectives.get("dapo", kl_coef=0.1), *case, ref=ref)
    assert metrics["policy/clip_fraction_low"] == pytest.approx(0.5)
    assert metrics["policy/clip_fraction_high"] == pytest.approx(0.25)
    assert metrics["policy/kl_ref"] == pytest.approx((1 - math.log(2)) / 2, rel=1e-5)
    *_, metrics = hand_loss(objectives.get("dapo", kl_coef=0.0), *case)
    assert "policy/kl_ref" not in metrics


# -------------------------------------------------------------------------------- invariant 1: devices, microbatches

INVARIANCE_CASES = [
    *(case(name, kl_coef=0.04, **({"clip_high": 0.3} if name == "cispo" else {})) for name in NAMES),
    case("gtpo", stat_scope="group"),
    case("grpo_s", stat_scope="batch"),
]


def _inputs(batch):
    keys = ("rewards_B", "task_B", "mask_BT", "entropy_BT", "logp_BT", "old_BT", "ref_BT")
    return {key: f32(getattr(batch, key)) for key in keys}


def _step(obj, axis_name, theta_T, batch):
    """-> advantages, loss, d/d theta, d/d logp, weights, clip fractions. theta is replicated: its gradient is a sum."""
    adv_BT = objectives.advantages(
        obj,
        batch["rewards_B"],
        batch["mask_BT"],
        batch["entropy_BT"],
        group_size=G,
        task_rewards_B=batch["task_B"],
        axis_name=axis_name,
    )
    ref_BT = batch["ref_BT"] if obj.kl_coef else None
    feature_BT = jnp.sin(3 * batch["logp_BT"])

    def loss_of(theta_T, logp_BT):
        logp_BT = logp_BT + theta_T[None, :] * feature_BT
        rest = batch["old_BT"], ref_BT, adv_BT, batch["mask_BT"]
        return objectives.loss(obj, logp_BT, *rest, max_completion_length=BUDGET, axis_name=axis_name)

    of_both = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    (loss, metrics), (grad_T, grad_BT) = of_both(theta_T, batch["logp_BT"])
    clipped = [metrics[f"policy/clip_fraction_{side}"] for side in ("low", "high")]
    clip_fractions = jnp.stack([metric.total / metric.count for metric in clipped])
    weight_BT, denom = objectives.weights(obj, batch["mask_BT"], max_completion_length=BUDGET, axis_name=axis_name)
    return adv_BT, loss, grad_T, grad_BT, weight_BT / denom, clip_fractions


@functools.lru_cache
def _alone(obj):
    """What `_step` returns on one device, not jitted."""
    return _step(obj, None, jnp.zeros(T), _inputs(MESH_BATCH))


MESH_BATCH = make_batch(seed=5, rewards="shaped")


def on_devices(cases, nums):
    return [pytest.param(*case.values, n, id=f"{case.id}-{n}") for case, n in zip(cases, nums, strict=False)]


# Every case on 8 devices, the last two, whose statistics are of the batch and of the group, on 2 or on 4 too.
MESH_CASES = on_devices(INVARIANCE_CASES, itertools.repeat(8)) + on_devices(INVARIANCE_CASES[-2:], (2, 4))


@pytest.mark.parametrize("name, fields, num_devices", MESH_CASES)
def test_any_number_of_devices_gives_the_one_device_numbers(name, fields, num_devices):
    assert len(jax.devices()) >= 8, "needs 8 forced CPU devices"
    obj = objectives.get(name, **fields)
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("data",))
    rows, everywhere = PartitionSpec("data"), PartitionSpec()
    sharded = jax.shard_map(
        functools.partial(_step, obj, "data"),
        mesh=mesh,
        in_specs=(everywhere, rows),
        out_specs=(rows, everywhere, everywhere, rows, rows, everywhere),
    )
    actual = jax.jit(sharded)(jnp.zeros(T), _inputs(MESH_BATCH))
    *_, clip_fractions = _alone(obj)
    assert np.asarray(clip_fractions).any() == (obj.surrogate != "reinforce") or name not in AS_PUBLISHED
    for ours, alone in zip(actual, _alone(obj), strict=True):
        assert alone is clip_fractions or np.abs(np.asarray(alone)).max() > 1e-4
        assert_close(ours, alone)


@pytest.mark.parametrize("name, fields", INVARIANCE_CASES)
def test_one_device_step_matches_oracle(name, fields):
    """Anchors the device test: the numbers all meshes agree on are the right ones."""
    obj, batch = objectives.get(name, **fields), MESH_BATCH
    adv_BT, loss, grad_T, grad_BT, *_ = _alone(obj)
    expected_BT = oracle_advantages(obj, batch)
    expected, expected_grad_BT = oracle_loss_and_grad(obj, batch, expected_BT)
    assert_close(adv_BT, expected_BT)
    assert_close(loss, expected, rtol=2e-5)
    assert_close(grad_BT, expected_grad_BT, rtol=2e-5)
    assert_close(grad_T, (expected_grad_BT * np.sin(3 * batch.logp_BT.astype(np.float64))).sum(0), rtol=5e-5)


@pytest.mark.parametrize("size", [2, 1])
@every_loss
def test_any_cut_into_microbatches_gives_the_whole_batch(name, size):
    """Smaller than a group, down to single rows, some of them without tokens."""
    assert size < G and B % size == 0
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch(seed=6)
    adv_BT = advantages(obj, batch)
    loss, grad_BT = loss_and_grad(obj, batch, adv_BT)
    weight_BT, denom = objectives.weights(obj, f32(batch.mask_BT), max_completion_length=BUDGET)

    @jax.jit
    def micro(logp_bT, old_bT, ref_bT, adv_bT, mask_bT, weight_bT):
        def share(logp_bT):
            loss_bT, _ = objectives.token_loss(obj, logp_bT, old_bT, ref_bT, adv_bT, mask_bT)
            return (loss_bT * weight_bT).sum() / denom

        return jax.value_and_grad(share)(logp_bT)

    arrays = [f32(x) for x in (batch.logp_BT, batch.old_BT, batch.ref_BT, adv_BT, batch.mask_BT, weight_BT)]
    parts = [micro(*(x[start : start + size] for x in arrays)) for start in range(0, B, size)]
    assert_close(sum(np.float64(value) for value, _ in parts), loss)
    assert_close(np.concatenate([grad_bT for _, grad_bT in parts]), grad_BT)


# ------------------------------------------------------------------------------------------------- invariants 2 to 7


# What the surrogates of the published variants are at a ratio of 1, as a function of A and logp.
ON_POLICY = {
    "ppo_clip": lambda adv_BT, logp_BT: adv_BT,
    "token_clip": lambda adv_BT, logp_BT: adv_BT,
    "clipped_weight": lambda adv_BT, logp_BT: adv_BT * logp_BT,
    "reinforce": lambda adv_BT, logp_BT: adv_BT * logp_BT,
}


@pytest.mark.parametrize("name", [name for name in LOSSES if name in AS_PUBLISHED])
def test_invariant_2_on_policy(name):
    """logp = old_logp: the loss is minus the aggregated advantage plus kl_coef KL, and nothing is clipped."""
    kl_coef = 0.04
    obj = objectives.get(name, kl_coef=kl_coef)
    batch = make_batch(seed=7)
    batch = replaced(batch, old_BT=batch.logp_BT)
    adv_BT = np.asarray(advantages(obj, batch), np.float64)
    loss, grad_BT, metrics = loss_grad_metrics(obj, batch, adv_BT)
    mask_BT, lengths_B1 = batch.mask_BT, batch.mask_BT.sum(1, keepdims=True)
    num_rows = (lengths_B1 > 0).sum()
    weight_BT = {
        "sequence_mean": mask_BT / np.maximum(lengths_B1, 1) / num_rows,
        "token_mean": mask_BT / mask_BT.sum(),
        "constant": mask_BT / (num_rows * BUDGET),
        "sequence_sum": mask_BT / num_rows,
    }["sequence_mean" if obj.ratio != "token" else obj.aggregation].astype(np.float64)
    d_BT = batch.ref_BT.astype(np.float64) - batch.logp_BT
    kl_BT = np.exp(d_BT) - d_BT - 1
    value_BT = ON_POLICY[obj.surrogate](adv_BT, batch.logp_BT)
    scale = np.abs(weight_BT * value_BT).sum()  # GRPO's advantages sum to zero
    assert_close(loss, (weight_BT * (kl_coef * kl_BT - value_BT)).sum(), scale=scale)
    assert_close(grad_BT, weight_BT * (kl_coef * (1 - np.exp(d_BT)) - adv_BT), rtol=2e-5)
    assert float(metrics["policy/clip_fraction_low"].value()) == 0
    assert float(metrics["policy/clip_fraction_high"].value()) == 0
    assert np.abs(np.asarray(grad_BT)).max() > 1e-3  # a ratio that is a constant 1 has no gradient


@pytest.mark.parametrize("junk", [np.nan, np.inf])
@every_variant
def test_invariant_3_masked_positions_hold_anything(name, junk):
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch(seed=8)
    keys = ("logp_BT", "old_BT", "ref_BT", "entropy_BT")
    dirty = replaced(batch, **{key: np.where(batch.mask_BT > 0, getattr(batch, key), junk) for key in keys})
    adv_BT = advantages(obj, batch)
    np.testing.assert_array_equal(advantages(obj, dirty), adv_BT)
    loss, grad_BT = loss_and_grad(obj, batch, adv_BT)
    dirty_loss, dirty_grad_BT = loss_and_grad(obj, dirty, adv_BT)
    np.testing.assert_array_equal(dirty_loss, loss)
    np.testing.assert_array_equal(dirty_grad_BT, grad_BT)
    assert not np.asarray(grad_BT)[batch.mask_BT == 0].any()


@every_loss
def test_invariant_3_masked_advantages_hold_anything(name):
    """Advantages that were not made by `advantages` may hold anything where masked, too."""
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch(seed=8)
    dirty_adv_BT = np.where(batch.mask_BT > 0, batch.row_adv_BT, np.nan)
    loss, grad_BT = loss_and_grad(obj, batch, batch.row_adv_BT)
    dirty_loss, dirty_grad_BT = loss_and_grad(obj, batch, dirty_adv_BT)
    np.testing.assert_array_equal(dirty_loss, loss)
    np.testing.assert_array_equal(dirty_grad_BT, grad_BT)


@pytest.mark.parametrize("what", ["rows", "groups"])
@every_estimator
def test_invariant_4_order_does_not_matter(name, what):
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch(seed=9, rewards="graded")
    rng = np.random.default_rng(0)
    order_PG = np.arange(B).reshape(P, G)
    order_PG = rng.permuted(order_PG, axis=1) if what == "rows" else rng.permutation(order_PG)
    order_B = order_PG.reshape(B)
    moved = SimpleNamespace(**{key: value[order_B] for key, value in vars(batch).items()})
    adv_BT, moved_adv_BT = np.asarray(advantages(obj, batch)), advantages(obj, moved)
    assert not np.array_equal(adv_BT, adv_BT[order_B])
    assert_close(moved_adv_BT, adv_BT[order_B])
    loss, grad_BT = loss_and_grad(obj, batch, adv_BT)
    moved_loss, moved_grad_BT = loss_and_grad(obj, moved, moved_adv_BT)
    assert_close(moved_loss, loss)
    assert_close(moved_grad_BT, np.asarray(grad_BT)[order_B])


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_invariant_5_gtpo_without_entropy_is_token_weighted_grpo(scope, ddof):
    obj = objectives.get("gtpo", entropy_weight=0.0, stat_scope=scope, std_ddof=ddof)
    batch = make_batch(seed=10)
    adv_BT = np.asarray(advantages(obj, batch))
    for rows in [slice(0, B)] if scope == "batch" else [rows_of(g) for g in range(P)]:
        is_active_bT = batch.mask_BT[rows] > 0
        reward_bT = np.repeat(batch.rewards_B[rows].astype(np.float64)[:, None], T, axis=1)
        pool = reward_bT[is_active_bT]
        is_flat = pool.size == 0 or np.ptp(pool) == 0
        expected_bT = 0 if is_flat else (reward_bT - pool.mean()) / (pool.std(ddof=ddof) + obj.adv_eps)
        assert_close(adv_BT[rows], is_active_bT * expected_bT)


@pytest.mark.parametrize("ddof", [0, 1])
def test_invariant_5_grpo_s_without_entropy_is_grpo(ddof):
    batch = make_batch(seed=10)
    expected_BT = advantages(objectives.get("grpo", std_ddof=ddof), batch)
    assert np.abs(np.asarray(expected_BT)).max() > 0.5
    for fields in ({}, {"sequence_mean_kind": "geometric"}):
        obj = objectives.get("grpo_s", entropy_weight=0.0, std_ddof=ddof, **fields)
        assert_close(advantages(obj, batch), expected_BT)


@pytest.mark.parametrize("value", [0.7, -123.456])
@pytest.mark.parametrize("name", SILENT)
def test_invariant_6_equal_rewards_have_no_policy_gradient(name, value):
    fields = {"stat_scope": "group"} if name in ENTROPY_NAMES else {}
    batch = make_batch(seed=11)
    rewards_B = batch.rewards_B.copy()
    rewards_B[:G] = rewards_B[rows_of(HOLED_GROUP)] = np.float32(value)  # a full group, and one with a dropped row
    batch = replaced(batch, rewards_B=rewards_B, task_B=rewards_B)
    flat = np.r_[rows_of(0), rows_of(HOLED_GROUP)]
    adv_BT = np.asarray(advantages(objectives.get(name, **fields), batch))
    assert not adv_BT[flat].any() and adv_BT.any()  # exactly zero, not rounding over adv_eps
    _, grad_BT = loss_and_grad(objectives.get(name, kl_coef=0.0, **fields), batch, adv_BT)
    assert not np.asarray(grad_BT)[flat].any() and np.asarray(grad_BT).any()
    with_kl = objectives.get(name, kl_coef=0.04, **fields)
    _, kl_grad_BT = loss_and_grad(with_kl, batch, adv_BT)
    _, only_kl_grad_BT = oracle_loss_and_grad(with_kl, batch, np.zeros((B, T)))
    assert_close(np.asarray(kl_grad_BT)[flat], only_kl_grad_BT[flat])


@pytest.mark.parametrize("name", SILENT)
def test_repeated_rewards_are_exactly_zero_at_any_group_size(name):
    """A float32 mean of n equal numbers is rarely that number; the advantage is 0 all the same."""
    obj, batch = objectives.get(name, **({"stat_scope": "group"} if name in ENTROPY_NAMES else {})), make_batch()
    for value, size in itertools.product((0.1, 0.7, 1e-3), (3, 6, 7, 11, 31)):
        mask_BT = (np.arange(B)[:, None] < size) * np.ones((1, T))  # one group of `size`, the rest of it dropped
        same = replaced(batch, rewards_B=np.full(B, value), task_B=np.full(B, value), mask_BT=mask_BT)
        assert not np.asarray(advantages(obj, same, group_size=B)).any()


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("name", ENTROPY_NAMES)
def test_invariant_7_sign_is_success(name, scope):
    obj = objectives.get(name, stat_scope=scope)
    for seed in range(3):
        batch = make_batch(seed)
        adv_BT = np.asarray(advantages(obj, batch))
        for g in range(P):
            is_active_GT, adv_GT = batch.mask_BT[rows_of(g)] > 0, adv_BT[rows_of(g)]
            is_plus_GT = np.repeat(batch.task_B[rows_of(g)][:, None] >= 0.5, T, axis=1)
            plus, minus = adv_GT[is_active_GT & is_plus_GT], adv_GT[is_active_GT & ~is_plus_GT]
            if scope == "group" and not (plus.size and minus.size):
                assert not adv_GT.any()
            else:
                assert (plus > 0).all() and (minus < 0).all()
        assert adv_BT.any()


# --------------------------------------------------------------------------------------------------- degenerate cases


@pytest.mark.parametrize("junk", [1e6, np.nan])
@every_scope
def test_dropped_rows_contribute_nothing(name, fields, junk):
    """The reward of a row without tokens is not in any statistic: not in means, not in counts, whatever it is."""
    obj = objectives.get(name, **fields)
    batch = make_batch(seed=12)
    is_dropped_B = batch.mask_BT.sum(1) == 0
    assert is_dropped_B.sum() == G + 1
    rewards_B = np.where(is_dropped_B, np.float32(junk), batch.rewards_B)
    adv_BT = advantages(obj, batch)
    np.testing.assert_array_equal(advantages(obj, replaced(batch, rewards_B=rewards_B, task_B=rewards_B)), adv_BT)
    assert_close(adv_BT, oracle_advantages(obj, batch))
    assert not np.asarray(adv_BT)[is_dropped_B].any()


@every_variant
def test_everything_masked(name):
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch(seed=14)
    batch = replaced(batch, mask_BT=np.zeros((B, T)), logp_BT=np.full((B, T), np.nan))
    adv_BT = advantages(obj, batch)
    loss, grad_BT, metrics = loss_grad_metrics(obj, batch, adv_BT)
    assert not np.asarray(adv_BT).any() and float(loss) == 0 and not np.asarray(grad_BT).any()
    for metric in metrics.values():
        assert np.isfinite(float(metric.value()))


@pytest.mark.parametrize("num_tokens, group_size", [(1, 1), (T, B)])
@every_scope
def test_one_token_and_odd_groups(name, fields, num_tokens, group_size):
    obj = objectives.get(name, kl_coef=0.04, **fields)
    batch = make_batch(seed=15, rewards="graded")
    cut = SimpleNamespace(**{k: v[:, :num_tokens] if v.ndim == 2 else v for k, v in vars(batch).items()})
    expected_BT = oracle_advantages(obj, cut, group_size)
    adv_BT = advantages(obj, cut, group_size)
    assert_close(adv_BT, expected_BT)
    if group_size == 1 and fields != {"stat_scope": "batch"} and name in SILENT:
        assert not np.asarray(adv_BT).any()
    else:
        assert expected_BT.any()
    expected, expected_grad_BT = oracle_loss_and_grad(obj, cut, expected_BT)
    loss, grad_BT = loss_and_grad(obj, cut, adv_BT)
    assert_close(loss, expected, rtol=2e-5)
    assert_close(grad_BT, expected_grad_BT, rtol=2e-5)


@every_scope
def test_too_few_entries_for_a_std_give_no_advantage(name, fields):
    """Fewer than ddof + 1 entries: the std does not exist, and the advantage is 0, not a deviation over adv_eps."""
    loose, strict = (advantages(objectives.get(name, std_ddof=ddof, **fields), make_batch()) for ddof in (0, 2))
    if np.array_equal(loose, strict):
        assert objectives.get(name).advantage not in ("group_norm", "batch_norm", "token_entropy", "sequence_entropy")
        return  # no std in it
    obj, batch = objectives.get(name, std_ddof=2, **fields), make_batch()
    batch.mask_BT[:] = 0
    batch.mask_BT[:2, 0] = 1
    assert set(batch.task_B[:2]) == {0, 1}
    assert not np.asarray(advantages(obj, batch)).any()


@pytest.mark.parametrize("entropy_weight, reward", [(0.0, 0.7), (0.1, 0.1)])
@pytest.mark.parametrize("name", ENTROPY_NAMES)
def test_constant_shaped_rewards_of_a_whole_batch_are_no_signal(name, reward, entropy_weight):
    """All rows on one side with one entropy: R is constant over the batch; its rounding must not become advantage."""
    obj = objectives.get(name, stat_scope="batch", entropy_weight=entropy_weight, base_weight=0.7)
    rewards_B = np.full(B, reward)
    batch = replaced(make_batch(), rewards_B=rewards_B, task_B=rewards_B, entropy_BT=np.full((B, T), 0.37))
    assert np.abs(np.asarray(advantages(obj, batch))).max() < 1e-3


@every_variant
def test_a_single_token_in_the_whole_batch(name):
    """Too few entries for a sample std, so no advantage; the KL alone remains."""
    obj, batch = objectives.get(name, kl_coef=0.5, kl_estimator="k3"), make_batch()
    batch.mask_BT[:] = 0
    batch.mask_BT[0, 0] = 1
    batch = replaced(batch, old_BT=batch.logp_BT, ref_BT=batch.logp_BT + np.float32(math.log(2)))
    adv_BT = advantages(obj, batch)
    assert not np.asarray(adv_BT).any()
    loss, grad_BT = loss_and_grad(obj, batch, adv_BT, budget=1)
    assert_close(loss, 0.5 * (1 - math.log(2)))
    assert_close(grad_BT, -0.5 * batch.mask_BT)


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("name", ENTROPY_NAMES)
def test_success_is_decided_on_the_task_reward(name, scope):
    """Punishment moves a success's shaped reward, never its side; without task rewards, the reward decides."""
    obj = objectives.get(name, stat_scope=scope)
    batch = make_batch(seed=16, rewards="shaped")
    adv_BT = advantages(obj, batch)
    assert_close(adv_BT, oracle_advantages(obj, batch))
    by_reward = replaced(batch, task_B=batch.rewards_B)
    without_BT = advantages(obj, batch, task_rewards_B=None)
    assert_close(without_BT, oracle_advantages(obj, by_reward))
    assert np.abs(np.asarray(adv_BT) - np.asarray(without_BT)).max() > 0.1


@pytest.mark.parametrize("name", ENTROPY_NAMES)
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.7])
def test_a_reward_at_the_threshold_is_a_success(name, threshold):
    """Also for thresholds that float32 rounds (0.7 becomes 0.69999999): compared as float32 with float32."""
    obj = objectives.get(name, success_threshold=threshold)
    below = np.nextafter(np.float32(threshold), np.float32(0))
    adv_BT = hand_advantages(obj, [threshold, below, threshold, below], np.ones((4, 2)), np.ones((4, 2)))
    assert (adv_BT[::2] > 0).all() and (adv_BT[1::2] < 0).all()


@pytest.mark.parametrize("name", ENTROPY_NAMES)
def test_zero_entropy_is_floored(name):
    batch = replaced(make_batch(seed=17), entropy_BT=np.zeros((B, T)))
    obj = objectives.get(name)
    adv_BT = advantages(obj, batch)
    assert np.isfinite(np.asarray(adv_BT)).all()
    assert_close(adv_BT, advantages(obj, replaced(batch, entropy_BT=np.full((B, T), obj.entropy_floor))))


@pytest.mark.parametrize("gap", [25.0, 1e4])
@every_surrogate
def test_extreme_log_ratios_stay_finite(name, gap):
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch(seed=18)
    sign_BT = np.sign(batch.token_adv_BT + 0.5)
    far = replaced(batch, old_BT=batch.logp_BT - gap * sign_BT, ref_BT=batch.logp_BT + gap * sign_BT)
    loss, grad_BT = loss_and_grad(obj, far, batch.row_adv_BT)
    assert np.isfinite(float(loss)) and np.isfinite(np.asarray(grad_BT)).all()
    if obj.ratio == "token":  # clamped at +-20 before exp, without gradient beyond
        plain = objectives.get(name, kl_coef=0.0)
        expected, expected_grad_BT = oracle_loss_and_grad(plain, far, batch.row_adv_BT)
        loss, grad_BT = loss_and_grad(plain, far, batch.row_adv_BT)
        assert_close(loss, expected)
        assert_close(grad_BT, expected_grad_BT)


# ------------------------------------------------------------------------------------------- bugs of public trainers


@every_clipped
def test_clip_is_not_inverted_for_negative_advantages(name):
    """With A < 0 a ratio that grew keeps its whole gradient (max over the losses, not min)."""
    obj = objectives.get(name, kl_coef=0.0)
    loss, grad_BT, _ = hand_loss(obj, np.log([[0.9]]), np.log([[0.1]]), [[-1.0]], budget=1)  # w = 9
    assert_close(loss, 9.0)
    assert_close(grad_BT, [[9.0]])


@pytest.mark.parametrize("scope", ["batch", "group"])
@pytest.mark.parametrize("name", ENTROPY_NAMES)
def test_correct_answers_do_not_average_to_zero(name, scope):
    """The zeros on the other set belong to R+ and R-; without them each set's advantages average to exactly 0."""
    batch = make_batch(seed=19)
    adv_BT = np.asarray(advantages(objectives.get(name, stat_scope=scope), batch))
    for g in (0, HOLED_GROUP):
        is_active_GT = batch.mask_BT[rows_of(g)] > 0
        is_plus_GT = np.repeat(batch.task_B[rows_of(g)][:, None] == 1, T, axis=1)
        adv_GT = adv_BT[rows_of(g)]
        if (is_active_GT & is_plus_GT).any() and (is_active_GT & ~is_plus_GT).any():
            assert adv_GT[is_active_GT & is_plus_GT].mean() > 0.2
            assert adv_GT[is_active_GT & ~is_plus_GT].mean() < -0.2
    assert 0 < batch.task_B[:G].sum() < G


@every_loss
def test_padding_the_batch_wider_changes_nothing(name):
    """Dr. GRPO's divisor is the generation budget, not the width of the batch; the rest have no width at all."""
    obj, wide = objectives.get(name, kl_coef=0.04), make_batch(seed=20)
    wide.mask_BT[:, 1:] = 0
    batch = SimpleNamespace(**{k: v[:, :1] if v.ndim == 2 else v for k, v in vars(wide).items()})
    loss, grad_BT = loss_and_grad(obj, batch, batch.row_adv_BT)
    wide_loss, wide_grad_BT = loss_and_grad(obj, wide, wide.row_adv_BT)
    assert_close(wide_loss, loss)
    assert_close(wide_grad_BT[:, :1], grad_BT)


@every_loss
def test_only_a_constant_denominator_depends_on_the_budget(name):
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch(seed=20)
    adv_BT = advantages(obj, batch)
    short, short_grad_BT = loss_and_grad(obj, batch, adv_BT, budget=BUDGET)
    long, long_grad_BT = loss_and_grad(obj, batch, adv_BT, budget=3 * BUDGET)
    factor = 3 if obj.aggregation == "constant" and obj.ratio == "token" else 1
    assert_close(long * factor, short)
    assert_close(long_grad_BT * factor, short_grad_BT)


@every_loss
def test_kl_is_k3_and_not_k1(name):
    """k1's gradient is 1 wherever it is taken; k3's is 1 - exp(ref - logp), and 0 where the two agree."""
    obj, batch = objectives.get(name, kl_coef=1.0, kl_estimator="k3"), make_batch(seed=21)
    batch = replaced(batch, old_BT=batch.logp_BT)
    zero_BT = np.zeros((B, T))
    weight_BT, denom = objectives.weights(obj, f32(batch.mask_BT), max_completion_length=BUDGET)
    weight_BT = np.asarray(weight_BT, np.float64) / float(denom)
    loss, grad_BT = loss_and_grad(obj, batch, zero_BT)
    d_BT = batch.ref_BT.astype(np.float64) - batch.logp_BT
    assert_close(grad_BT, weight_BT * (1 - np.exp(d_BT)), rtol=2e-5)
    assert float(loss) > 0  # k3 is never negative
    agreed, agreed_grad_BT = loss_and_grad(obj, replaced(batch, ref_BT=batch.logp_BT), zero_BT)
    assert float(agreed) == 0 and not np.asarray(agreed_grad_BT).any()


@every_clipped
def test_ratio_is_not_always_one(name):
    """In later inner epochs logp has left old_logp: value and gradient scale with the ratio."""
    obj = objectives.get(name, kl_coef=0.0, clip_low=0.2, clip_high=0.2)
    for w in (0.9, 1.1):
        loss, grad_BT, _ = hand_loss(obj, [[math.log(w) - 2]], [[-2.0]], [[1.0]], budget=1)
        assert_close(loss, -w)
        assert_close(grad_BT, [[-w]])


# ----------------------------------------------------------------------------------------------------------- the API


def test_published_variants_are_as_published():
    assert set(NAMES) >= set(AS_PUBLISHED)
    for name, expected in AS_PUBLISHED.items():
        obj = objectives.get(name)
        actual = obj.advantage, obj.ratio, obj.clip_low, obj.clip_high, obj.aggregation, obj.kl_coef
        assert actual == expected and obj == objectives.VARIANTS[name]
    surrogates = {name: objectives.get(name).surrogate for name in AS_PUBLISHED}
    others = {name: surrogate for name, surrogate in surrogates.items() if surrogate != "ppo_clip"}
    assert others == {"rloo": "reinforce", "cispo": "clipped_weight", "gmpo": "token_clip"}
    for name in AS_PUBLISHED:
        obj = objectives.get(name)
        assert (obj.std_ddof, obj.adv_eps, obj.success_threshold) == (1, 1e-6, 0.5)
        assert (obj.entropy_floor, obj.entropy_clip, obj.base_weight, obj.entropy_weight) == (1e-4, None, 1.0, 0.1)
        assert (obj.sequence_mean_kind, obj.kl_estimator, obj.include_other_side) == ("arithmetic", "k3", True)
        assert obj.dual_clip is None and obj.kl_in_reward == 0
    assert objectives.get("gtpo").stat_scope == "batch" and objectives.get("grpo_s").stat_scope == "group"


def test_every_entry_says_what_it_is():
    for name, entry in objectives.ENTRIES.items():
        assert entry.title and entry.paper and entry.formula and "\n" not in entry.formula, name
        assert objectives.VARIANTS[name] is entry.objective
    titles = [entry.title for entry in objectives.ENTRIES.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", ["gtpo"])
def test_objectives_are_frozen_and_hashable(name):
    obj, changed = objectives.get(name), objectives.get(name, adv_eps=1e-3)
    assert obj == objectives.get(name) and hash(obj) == hash(objectives.get(name))
    assert changed != obj and changed.adv_eps == 1e-3 and objectives.VARIANTS[name].adv_eps == 1e-6
    assert dataclasses.replace(changed, adv_eps=1e-6) == obj
    assert hash(objectives.get(name, entropy_clip=(0.2, 0.28))) != hash(obj)
    with pytest.raises(AttributeError):
        obj.clip_low = 0.5


def test_unknown_variant_lists_the_known_ones():
    with pytest.raises(ValueError, match="grpoo") as error:
        objectives.get("grpoo")
    assert all(name in str(error.value) for name in objectives.VARIANTS)


def test_unknown_field_lists_the_known_ones():
    with pytest.raises(ValueError, match="clip_lo") as error:
        objectives.get("grpo", clip_lo=0.1)
    assert all(field.name in str(error.value) for field in dataclasses.fields(objectives.Objective))


@pytest.mark.parametrize(
    "field, known",
    [
        ("advantage", ("group_norm", "group_center", "leave_one_out", "batch_norm", "token_entropy", "sequence_entropy")),
        ("ratio", ("token", "sequence", "sequence_geometric")),
        ("aggregation", ("sequence_mean", "token_mean", "constant", "sequence_sum")),
        ("stat_scope", ("batch", "group")),
        ("sequence_mean_kind", ("arithmetic", "geometric")),
        ("surrogate", ("ppo_clip", "token_clip", "clipped_weight", "reinforce")),
        ("kl_estimator", ("k1", "k2", "k3")),
    ],
)
def test_unknown_choice_lists_the_known_ones(field, known):
    with pytest.raises(ValueError, match="nonsense") as error:
        objectives.get("grpo_s", **{field: "nonsense"})
    assert field in str(error.value) and all(choice in str(error.value) for choice in known)


def test_missing_inputs_are_errors():
    batch = make_batch()
    for name in ENTROPY_NAMES:
        with pytest.raises(ValueError, match="entropy"):
            objectives.advantages(objectives.get(name), f32(batch.rewards_B), f32(batch.mask_BT), None, group_size=G)
    arrays = f32(batch.logp_BT), f32(batch.old_BT), None, f32(batch.row_adv_BT), f32(batch.mask_BT)
    with pytest.raises(ValueError, match="ref"):
        objectives.loss(objectives.get("grpo", kl_coef=0.04), *arrays, max_completion_length=BUDGET)
    loss, _ = objectives.loss(objectives.get("grpo", kl_coef=0.0), *arrays, max_completion_length=BUDGET)
    assert np.isfinite(float(loss))


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_a_reference_is_ignored_without_kl(name):
    obj, batch = objectives.get(name, kl_coef=0.0), make_batch()
    logps, rest = (f32(batch.logp_BT), f32(batch.old_BT)), (f32(batch.row_adv_BT), f32(batch.mask_BT))
    for ref_BT in (f32(batch.ref_BT), jnp.full((B, T), jnp.nan)):
        given, _ = objectives.loss(obj, *logps, ref_BT, *rest, max_completion_length=BUDGET)
        assert float(given) == float(loss_and_grad(obj, batch, batch.row_adv_BT)[0])


@pytest.mark.parametrize("name", ["gtpo", "gspo"])
def test_jit_gives_the_same(name):
    obj = objectives.get(name, kl_coef=0.04)
    jitted = jax.jit(_step, static_argnums=(0, 1))(obj, None, jnp.zeros(T), _inputs(MESH_BATCH))
    for ours, eager in zip(jitted, _alone(obj), strict=True):
        assert_close(ours, eager)


def test_equal_objectives_share_one_compilation():
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def denom_of(obj, mask_BT):
        traces.append(obj)
        return objectives.weights(obj, mask_BT, max_completion_length=BUDGET)[1]

    for eps in (1e-6, 1e-6, 1e-3):
        denom_of(objectives.get("grpo", adv_eps=eps), jnp.ones((B, T)))
    assert [obj.adv_eps for obj in traces] == [1e-6, 1e-3]


@every_estimator
def test_outputs_are_float32_and_zero_where_masked(name):
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch(seed=23)
    adv_BT = advantages(obj, batch)
    assert adv_BT.dtype == jnp.float32 and adv_BT.shape == (B, T)
    assert not np.asarray(adv_BT)[batch.mask_BT == 0].any()
    loss, grad_BT = loss_and_grad(obj, batch, adv_BT)
    assert loss.dtype == jnp.float32 and loss.shape == () and grad_BT.dtype == jnp.float32
    logps = f32(batch.logp_BT), f32(batch.old_BT), f32(batch.ref_BT)
    loss_BT, _ = objectives.token_loss(obj, *logps, adv_BT, f32(batch.mask_BT))
    weight_BT, denom = objectives.weights(obj, f32(batch.mask_BT), max_completion_length=BUDGET)
    assert loss_BT.dtype == weight_BT.dtype == denom.dtype == jnp.float32


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gtpo", "grpo_s"])
def test_no_gradient_reaches_rewards_or_entropy(name):
    obj, batch = objectives.get(name, kl_coef=0.04), make_batch(seed=24)
    mask_BT, rest = f32(batch.mask_BT), (f32(batch.old_BT), f32(batch.ref_BT))

    def loss_of(rewards_B, entropy_BT, logp_BT):
        adv_BT = objectives.advantages(obj, rewards_B, mask_BT, entropy_BT, group_size=G)
        return objectives.loss(obj, logp_BT, *rest, adv_BT, mask_BT, max_completion_length=BUDGET)[0]

    inputs = f32(batch.rewards_B), f32(batch.entropy_BT), f32(batch.logp_BT)
    rewards_B, entropy_BT, logp_BT = jax.jit(jax.grad(loss_of, argnums=(0, 1, 2)))(*inputs)
    assert not np.asarray(rewards_B).any() and not np.asarray(entropy_BT).any()
    assert np.asarray(logp_BT).any()
