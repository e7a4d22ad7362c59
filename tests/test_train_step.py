"""One update: the same number however the batch is cut, the one that the objective written out gives, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.learner import batching, train_step
from grpo_jax.learner.advantage_diagnostics import batch_advantages
from grpo_jax.learner.hyperparams import hyperparams_of, with_fields
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.learner.optimizer import learning_rate, make_optimizer
from grpo_jax.learner.train_step import make_train_step
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.training.run import make_run
from tests import tiny

NAMES = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
P, G, S, T = 8, 4, 4, 5
BUDGET = 9  # max_completion_tokens, on purpose not T: Dr. GRPO divides by the budget
SAMPLING = Sampling(temperature=0.7)
SGD = optax.sgd(1.0)  # parameters before minus parameters after is the gradient, at its true size
SPEC = tiny.update_config(objectives.get("grpo"), SAMPLING, BUDGET, logprob_chunk_tokens=32)
BIGRAM = tiny.Bigram()
every_variant = pytest.mark.parametrize("name", NAMES)


def spec_of(name, **changes):
    return tiny.update_config(objectives.get(name), SAMPLING, BUDGET, **{"logprob_chunk_tokens": 32, **changes})


@functools.cache
def step_of(spec, num_devices=1, model=BIGRAM, optimizer=SGD):
    return jax.jit(
        make_train_step(model, lambda _: optimizer, spec, tiny.mesh_of(num_devices, fsdp=2 if num_devices > 1 else 1))
    )


@functools.cache
def batch_of(seed=0):
    return tiny.random_batch(P, G, T, S, seed=seed)


def start(spec, params=None, step=0, optimizer=SGD):
    """A state whose reference, where there is one, is another model than the policy."""
    params = tiny.bigram_params() if params is None else params
    ref_params = jax.tree.map(lambda x: x + 0.1 * jnp.cos(10 * x), params) if spec.objective.needs_reference else None
    return tiny.state_of(params, optimizer, ref_params, step, config=spec)


def moved(before, after):
    """What the update did to the parameters; with SGD at rate 1, minus the gradient."""
    return jax.tree.map(np.subtract, *jax.device_get((after.params, before.params)))


def floats(metrics):
    return metrics_lib.to_floats(metrics)


def on_policy(batch, params, sampling=SAMPLING, model=BIGRAM):
    """The batch as if `params` had sampled it: its log-probs and entropies, 0 where masked as the rollout leaves them."""
    logp_PGT, entropy_PGT = jax.jit(functools.partial(policy_logprobs, model, sampling=sampling, chunk_tokens=32))(
        params, batch.rollout
    )
    mask_PGT = batch.rollout.mask_PGT
    return tiny.with_rollout(batch, sampler_logp_PGT=logp_PGT * mask_PGT, entropy_PGT=entropy_PGT * mask_PGT)


# --------------------------------------------------------------------------------------- the objective, written out


def dense_logp(hidden_BTD, head_VD, tokens_BT, temperature):
    log_p_BTV = jax.nn.log_softmax(hidden_BTD @ head_VD.T / temperature)
    return jnp.take_along_axis(log_p_BTV, tokens_BT[..., None], -1)[..., 0]


def bigram_logp(params, rollout, temperature):
    decoder = BIGRAM.bind(params)
    tokens_BT, mask_BT = rollout.tokens_PGT.reshape(-1, T), rollout.mask_PGT.reshape(-1, T)
    last_PD, hidden_BTD, _ = decoder.forward_with_prefix(rollout.prompts.tokens_PS, rollout.prompts.mask_PS, tokens_BT, mask_BT)
    hidden_BTD = jnp.concatenate([jnp.repeat(last_PD, G, 0)[:, None], hidden_BTD[:, :-1]], 1)
    return dense_logp(hidden_BTD, decoder.head_VD, tokens_BT, temperature)


def decoder_logp(model, params, rollout, temperature):
    """Prompt and completion as one plain row: position S - 1, the last prompt token, predicts the first completion token."""
    decoder = model.bind(params)
    tokens_BX = jnp.concatenate([jnp.repeat(rollout.prompts.tokens_PS, G, 0), rollout.tokens_PGT.reshape(-1, T)], 1)
    mask_BX = jnp.concatenate([jnp.repeat(rollout.prompts.mask_PS, G, 0), rollout.mask_PGT.reshape(-1, T) > 0], 1)
    hidden_BXD = decoder(tokens_BX, mask_BX)
    return dense_logp(hidden_BXD[:, S - 1 : -1], decoder.head_VD, tokens_BX[:, S:], temperature)


def longhand(logp_of, spec, state, batch, temperature=SAMPLING.temperature):
    """(loss, gradient) of one batch: `objectives` on the whole of it, log-probs by a dense softmax."""
    obj, rollout = spec.objective, batch.rollout
    mask_BT, old_BT, entropy_BT = (x.reshape(-1, T) for x in (rollout.mask_PGT, rollout.sampler_logp_PGT, rollout.entropy_PGT))
    reward_B, task_B = batch.reward_PG.reshape(-1), batch.task_reward_PG.reshape(-1)
    adv_BT = objectives.advantages(obj, reward_B, mask_BT, entropy_BT, group_size=G, task_rewards_B=task_B)

    def loss(params):
        ref_BT = logp_of(state.ref_params, rollout, temperature) if obj.kl_coef else None
        logp_BT = logp_of(params, rollout, temperature)
        return objectives.loss(obj, logp_BT, old_BT, ref_BT, adv_BT, mask_BT, max_completion_length=BUDGET)[0]

    return jax.jit(jax.value_and_grad(loss))(state.params)


@every_variant
def test_loss_and_gradient_are_the_objective_written_out(name):
    spec, batch = spec_of(name), batch_of()
    state = start(spec)
    after, metrics = step_of(spec)(state, batch)
    loss, grads = longhand(bigram_logp, spec, state, batch)
    np.testing.assert_allclose(floats(metrics)["loss/total"], loss, rtol=1e-5)
    np.testing.assert_allclose(floats(metrics)["grad/norm"], optax.tree.norm(grads), rtol=1e-5)
    assert tiny.largest_difference(moved(state, after), jax.tree.map(jnp.negative, grads)) < 1e-5
    assert int(after.step) == 1 and float(optax.tree.norm(grads)) > 1e-3


def test_decoder_over_devices_and_parts_of_groups_is_the_objective_written_out():
    """Chunked log-probs, shared prefix, 8 devices, groups cut in two, against plain rows: shifting by one, training the
    last prompt token, dropping the temperature or summing over devices twice would all show."""
    model, params = ModelDef(tiny.LLAMA), tiny.random_params(tiny.LLAMA)
    spec, batch = spec_of("grpo", num_microbatches=2), batch_of()
    state = start(spec, params)
    after, metrics = step_of(spec, num_devices=8, model=model)(state, batch)
    logp_of = functools.partial(decoder_logp, model)
    loss, grads = longhand(logp_of, spec, state, batch)
    np.testing.assert_allclose(floats(metrics)["loss/total"], loss, rtol=2e-5)
    assert tiny.largest_difference(moved(state, after), jax.tree.map(jnp.negative, grads)) < 2e-5
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-4


# -------------------------------------------------------------------------------------------- how the batch was cut


@functools.cache
def three_updates(name, num_devices, num_microbatches):
    """(what three updates on three batches did to the parameters, the metrics of each)."""
    spec = spec_of(name, num_microbatches=num_microbatches)
    first = state = start(spec)
    history = []
    for seed in range(3):
        state, metrics = step_of(spec, num_devices)(state, batch_of(seed))
        history.append(floats(metrics))
    assert int(state.step) == 3
    return moved(first, state), history


@every_variant
@pytest.mark.parametrize("num_devices, num_microbatches", [(8, 1), (1, 4), (8, 2)])
@pytest.mark.slow
def test_devices_and_microbatches_change_nothing(name, num_devices, num_microbatches):
    """With 8 devices, data x fsdp, each has one group, which 2 microbatches cut in half: group statistics must not notice."""
    expected, expected_history = three_updates(name, 1, 1)
    got, history = three_updates(name, num_devices, num_microbatches)
    assert tiny.largest_difference(got, expected) < 1e-5
    for metrics, expected_metrics in zip(history, expected_history, strict=True):
        assert metrics.keys() == expected_metrics.keys()
        for key, value in expected_metrics.items():
            np.testing.assert_allclose(metrics[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("num_microbatches", [1, 2, 4, 8, 16])
def test_microbatches_hold_every_row_once_beside_its_own_prompt(num_microbatches):
    """Cut by groups, then inside groups (4 groups of 4 rows here)."""
    batch = tiny.random_batch(4, 4, T, S)
    number_PG = jnp.arange(16.0).reshape(4, 4)
    rollout, number = batching.split_microbatches((batch.rollout, number_PG), batch.rollout, num_microbatches)
    tokens_RT, number_R = batch.rollout.tokens_PGT.reshape(16, T), []
    for m in range(num_microbatches):
        piece = jax.tree.map(lambda x: x[m], rollout)  # noqa: B023
        p, g = piece.tokens_PGT.shape[:2]
        assert p * g == 16 // num_microbatches and piece.prompts.tokens_PS.shape == (p, S)
        for i, j in np.ndindex(p, g):
            row = int(number[m, i, j])
            number_R.append(row)
            np.testing.assert_array_equal(piece.tokens_PGT[i, j], tokens_RT[row])
            assert int(piece.prompts.answer[i]) == row // 4
    assert number_R == list(range(16))


# ------------------------------------------------------------------------------------------- epochs and minibatches


@pytest.mark.parametrize("num_epochs, num_minibatches", [(2, 2), (3, 1)])
@pytest.mark.slow
def test_inner_epochs_move_the_ratio_away_from_one_and_keep_old_logp(num_epochs, num_minibatches):
    """Every optimizer step by hand, with the old log-probs of the start: a step that renewed them would keep the ratio at 1."""
    spec = spec_of("gtpo", num_epochs=num_epochs, num_minibatches=num_minibatches)
    state = start(spec)
    batch = on_policy(batch_of(), state.params)
    _, once = step_of(spec_of("gtpo"))(state, batch)
    np.testing.assert_allclose(floats(once)["policy/ratio"], 1.0, atol=1e-5)
    assert floats(once)["policy/clip_fraction_low"] == floats(once)["policy/clip_fraction_high"] == 0

    after, metrics = step_of(spec)(state, batch)
    assert abs(floats(metrics)["policy/ratio"] - 1) > 1e-3
    # Only before the first optimizer step does the policy hold the sampler's weights.
    assert floats(metrics)["policy/sampler_logp_gap"] < 1e-5

    target = train_step.make_target(BIGRAM, state, batch, spec)
    np.testing.assert_array_equal(target.old_logp_PGT, batch.rollout.sampler_logp_PGT)
    minibatches = train_step.split_minibatches(target, 0, state.step, spec.learner)
    gradients = jax.jit(
        lambda params, target: train_step.compute_gradients(BIGRAM, params, None, target, spec.objective, spec)[0]
    )
    params = state.params
    for i in range(num_epochs * num_minibatches):
        minibatch = jax.tree.map(lambda x: x[i], minibatches)  # noqa: B023
        params = jax.tree.map(jnp.subtract, params, gradients(params, minibatch))
    assert tiny.largest_difference(moved(state, after), moved(state, state.replace(params=params))) < 1e-5


def test_minibatches_hold_every_group_once_an_epoch_in_a_fresh_order():
    spec = spec_of("dapo", num_epochs=3, num_minibatches=4)
    number_PGT = jnp.broadcast_to(jnp.arange(P)[:, None, None], (P, G, T))
    batch = tiny.with_rollout(batch_of(), tokens_PGT=number_PGT)
    target = train_step.Target(batch.rollout, jnp.ones((P, G), bool), number_PGT, number_PGT, None, None)

    def orders(step, seed=0):
        cut = train_step.split_minibatches(target, seed, jnp.int32(step), spec.learner)
        # A group stays whole, beside its own prompt.
        np.testing.assert_array_equal(cut.rollout.tokens_PGT, cut.advantage_PGT)
        np.testing.assert_array_equal(cut.rollout.prompts.answer, cut.advantage_PGT[..., 0, 0])
        assert (cut.advantage_PGT == cut.advantage_PGT[..., :1, :1]).all()
        return cut.advantage_PGT[..., 0, 0].reshape(3, P).tolist()

    assert train_step.split_minibatches(target, 0, jnp.int32(0), spec.learner).advantage_PGT.shape == (12, 2, G, T)
    assert all(sorted(order) == list(range(P)) for order in orders(0))
    distinct = {tuple(order) for step in range(3) for order in orders(step)}
    assert len(distinct) == 9  # epochs and steps
    assert orders(0) == orders(0) != orders(0, seed=1)


# ----------------------------------------------------------------------------------------------------------- reference


@every_variant
def test_a_reference_is_held_if_and_only_if_it_is_paid_for(name):
    run = make_run(tiny.config_of(name))
    state = jax.eval_shape(lambda: run.initial_state())
    assert (state.ref_params is not None) == (run.config.objective.kl_coef > 0) == (name in ("grpo", "dr_grpo"))


@pytest.mark.parametrize("kl_coef, old_logp, passes", [(0.0, "sampler", 1), (0.1, "sampler", 2), (0.0, "learner", 2)])
def test_a_forward_pass_runs_only_for_what_is_asked(kl_coef, old_logp, passes, monkeypatch):
    scored = []

    def counting(function):
        def counted(model, params, *args):
            scored.append(params)
            return function(model, params, *args)

        return counted

    for name in ("policy_logprobs", "logprobs_and_routing"):
        monkeypatch.setattr(train_step, name, counting(getattr(train_step, name)))
    spec = with_fields(SPEC, {"objective.kl_coef": kl_coef, "learner.old_logp": old_logp})
    jax.eval_shape(make_train_step(BIGRAM, lambda _: SGD, spec, tiny.mesh_of(1)), start(spec), batch_of())
    assert len(scored) == passes


def test_kl_without_a_reference_is_an_error():
    state = dataclasses.replace(start(SPEC), ref_params=None)
    with pytest.raises(AssertionError, match="reference"):
        jax.eval_shape(make_train_step(BIGRAM, lambda _: SGD, SPEC, tiny.mesh_of(1)), state, batch_of())


def test_kl_alone_pulls_towards_the_reference():
    """Equal rewards in every group: all that is left of the loss is the penalty."""
    state = start(SPEC)
    batch = batch_of().replace(reward_PG=jnp.ones((P, G)), task_reward_PG=jnp.ones((P, G)))
    kl = []
    for _ in range(30):
        state, metrics = step_of(SPEC)(state, batch)
        kl.append(floats(metrics)["policy/kl_ref"])
        np.testing.assert_allclose(
            floats(metrics)["loss/total"], SPEC.objective.kl_coef * floats(metrics)["policy/kl_ref"], rtol=0.5
        )
    assert 0 < kl[-1] < 0.8 * kl[0] and (np.diff(kl) < 0).all()

    at_reference = dataclasses.replace(state, params=state.ref_params)
    _, metrics = step_of(SPEC)(at_reference, batch)
    assert abs(floats(metrics)["policy/kl_ref"]) < 1e-6 and floats(metrics)["grad/norm"] < 1e-6


# ---------------------------------------------------------------------------------------------------- what is left out


@every_variant
def test_masked_positions_may_hold_anything(name):
    """Log-probs are masked before exp: NaN and infinity behind a row's end reach neither loss nor gradient."""
    spec, batch = spec_of(name), batch_of()
    is_masked = batch.rollout.mask_PGT == 0
    junk = jnp.where(jnp.arange(T)[None, None] % 2 == 0, jnp.nan, jnp.inf)
    dirty = tiny.with_rollout(
        batch,
        sampler_logp_PGT=jnp.where(is_masked, junk, batch.rollout.sampler_logp_PGT),
        entropy_PGT=jnp.where(is_masked, junk, batch.rollout.entropy_PGT),
        tokens_PGT=jnp.where(is_masked, 7, batch.rollout.tokens_PGT),
    )
    clean_after, clean = step_of(spec)(start(spec), batch)
    after, metrics = step_of(spec)(start(spec), dirty)
    assert floats(metrics) == floats(clean)
    jax.tree.map(np.testing.assert_array_equal, after.params, clean_after.params)


@every_variant
def test_a_fully_masked_batch_trains_nothing(name):
    """Dynamic sampling may find no group at all."""
    spec = spec_of(name)
    state = start(spec)
    empty = tiny.with_rollout(batch_of(), mask_PGT=jnp.zeros((P, G, T)))
    after, metrics = step_of(spec)(state, empty)
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    assert floats(metrics)["loss/total"] == floats(metrics)["grad/norm"] == 0
    assert np.isfinite(list(floats(metrics).values())).all()


def test_a_group_that_is_missing_is_as_if_it_had_never_been():
    """Its mask is 0: the rest is trained on as a smaller batch."""
    spec, batch = spec_of("gtpo"), batch_of()
    state = start(spec)
    holed = tiny.with_rollout(batch, mask_PGT=batch.rollout.mask_PGT.at[4:].set(0))
    smaller = jax.tree.map(lambda x: x[:4], batch)
    after, metrics = step_of(spec)(state, holed)
    expected_after, expected = step_of(spec)(state, smaller)
    np.testing.assert_allclose(floats(metrics)["loss/total"], floats(expected)["loss/total"], rtol=1e-5)
    assert tiny.largest_difference(moved(state, after), moved(state, expected_after)) < 1e-5


def test_overlong_filter_is_a_mask_on_truncated_rows():
    spec, batch = spec_of("gtpo"), batch_of()
    is_truncated_PG = batch.rollout.is_truncated_PG
    assert 1 < is_truncated_PG.sum() < P * G
    masked = tiny.with_rollout(batch, mask_PGT=batch.rollout.mask_PGT * ~is_truncated_PG[..., None])
    expected_after, expected = step_of(spec)(start(spec), masked)
    unfiltered_after, _ = step_of(spec)(start(spec), batch)
    filtered = spec_of("gtpo", filter_truncated=True)
    after, metrics = step_of(filtered)(start(spec), batch)
    assert floats(metrics) == pytest.approx(floats(expected), rel=1e-5)
    assert tiny.largest_difference(after.params, expected_after.params) < 1e-6
    assert tiny.largest_difference(after.params, unfiltered_after.params) > 1e-3


@every_variant
def test_rows_without_a_score_are_as_if_they_were_not_there(name):
    """Groups with all, some, two, one and no score; what stands in place of a missing one changes no bit."""
    spec, batch = spec_of(name), batch_of()
    is_scored_PG = np.ones((P, G), bool)
    is_scored_PG[0, 3] = is_scored_PG[3, :2] = is_scored_PG[4, 1:] = is_scored_PG[5] = is_scored_PG[6, 2] = False
    is_there_PG = is_scored_PG.copy()
    is_there_PG[4] = False  # one score has nothing to be compared with
    without = tiny.with_rollout(batch, mask_PGT=batch.rollout.mask_PGT * is_there_PG[..., None])
    expected_after, expected = step_of(spec)(start(spec), without)
    whole_after, _ = step_of(spec)(start(spec), batch)
    found = []
    for instead in (0.0, 1e6, -3.0):
        rewards = {name: jnp.where(is_scored_PG, getattr(batch, name), instead) for name in ("reward_PG", "task_reward_PG")}
        found.append(step_of(spec)(start(spec), batch.replace(is_scored_PG=jnp.asarray(is_scored_PG), **rewards)))
    for after, metrics in found:
        assert floats(metrics) == pytest.approx(floats(expected), rel=1e-5, abs=1e-6)
        assert tiny.largest_difference(moved(start(spec), after), moved(start(spec), expected_after)) < 1e-5
        assert tiny.largest_difference(after.params, found[0][0].params) == 0
    assert tiny.largest_difference(moved(start(spec), whole_after), moved(start(spec), expected_after)) > 1e-2


# ---------------------------------------------------------------------------------------------------- old log-probs


def test_the_learners_old_logp_is_the_samplers_when_on_policy():
    """Computed in microbatches on 8 devices; the advantage reads the entropy, which comes from the same pass."""
    spec = spec_of("gtpo", old_logp="learner", num_microbatches=4)
    state = start(spec)
    batch = on_policy(batch_of(), state.params)
    expected_after, _ = step_of(spec_of("gtpo"))(state, batch)
    after, metrics = step_of(spec, num_devices=8)(state, batch)
    assert tiny.largest_difference(moved(state, after), moved(state, expected_after)) < 1e-5

    # A sampler of other numerics: what it recorded is not used, and the ratio starts at 1.
    noisy = tiny.with_rollout(
        batch,
        sampler_logp_PGT=batch.rollout.sampler_logp_PGT - 0.3,
        entropy_PGT=batch.rollout.entropy_PGT[..., ::-1],
    )
    noisy_after, metrics = step_of(spec, num_devices=8)(state, noisy)
    jax.tree.map(np.testing.assert_array_equal, noisy_after.params, after.params)
    np.testing.assert_allclose(floats(metrics)["policy/ratio"], 1.0, atol=1e-5)
    np.testing.assert_allclose(floats(metrics)["policy/sampler_logp_gap"], 0.3, atol=1e-4)


def test_truncated_importance_weighs_each_token_by_learner_over_sampler():
    """The gradient is the policy gradient under min(learner's / sampler's probability, cap), token by token."""
    cap, spec = 1.5, spec_of("gtpo", old_logp="learner")
    corrected = with_fields(spec, {"learner.importance_cap": cap})
    state = start(spec)
    batch = on_policy(batch_of(), state.params)
    rollout = batch.rollout
    log_weight_PGT = jnp.asarray(np.random.default_rng(0).normal(size=(P, G, T)), jnp.float32)
    skewed = tiny.with_rollout(batch, sampler_logp_PGT=rollout.sampler_logp_PGT - log_weight_PGT)
    weight_BT = np.minimum(np.exp(log_weight_PGT), cap).reshape(-1, T)
    mask_BT = rollout.mask_PGT.reshape(-1, T)
    adv_PGT = jax.jit(batch_advantages, static_argnums=0)(spec.objective, batch, rollout.mask_PGT, rollout.entropy_PGT)

    def loss(params):
        logp_BT = bigram_logp(params, rollout, SAMPLING.temperature)
        return -(mask_BT * adv_PGT.reshape(-1, T) * weight_BT * logp_BT).sum() / mask_BT.sum()

    after, metrics = step_of(corrected)(state, skewed)
    assert (
        tiny.largest_difference(moved(state, after), jax.tree.map(jnp.negative, jax.jit(jax.grad(loss))(state.params))) < 1e-5
    )
    values, is_capped_BT = floats(metrics), np.exp(log_weight_PGT).reshape(-1, T) > cap
    assert values["policy/importance_weight"] == pytest.approx(float((mask_BT * weight_BT).sum() / mask_BT.sum()), rel=1e-5)
    assert values["policy/importance_capped"] == pytest.approx(float((mask_BT * is_capped_BT).sum() / mask_BT.sum()))
    assert 0.2 < values["policy/importance_capped"] < 0.5

    # Where the two agree the weight is exactly 1: so it is on groups that waited, whose old_logp is the sampler's word.
    waited = skewed.replace(sampled_at_P=jnp.full(P, -1))
    after, metrics = step_of(corrected)(state, waited)
    plain_after, plain_metrics = step_of(spec)(state, waited)
    jax.tree.map(np.testing.assert_array_equal, after.params, plain_after.params)
    assert floats(metrics) == {**floats(plain_metrics), "policy/importance_weight": 1.0, "policy/importance_capped": 0.0}

    # Sampled a step early on purpose, it weighs what the policy has moved since; an older one has waited in the buffer.
    asynchronous = step_of(with_fields(corrected, {"async_steps": 1}))
    expected = step_of(corrected)(state, skewed)[0]
    jax.tree.map(np.testing.assert_array_equal, asynchronous(state, waited)[0].params, expected.params)
    older = skewed.replace(sampled_at_P=jnp.full(P, -2))
    jax.tree.map(np.testing.assert_array_equal, asynchronous(state, older)[0].params, plain_after.params)


def test_sampler_gap_is_over_fresh_groups_only():
    """A group that waited in the buffer was sampled by an older policy: its gap says nothing about numerics."""
    spec, batch = spec_of("gtpo"), batch_of()
    state = start(spec, step=3)
    mask_PGT = batch.rollout.mask_PGT
    logp_PGT = bigram_logp(state.params, batch.rollout, SAMPLING.temperature).reshape(P, G, T)
    gap_P = (jnp.abs(logp_PGT - batch.rollout.sampler_logp_PGT) * mask_PGT).max((1, 2))
    for sampled_at in ([3] * P, [3, 2] * (P // 2), [2] * P):
        is_fresh_P = jnp.array(sampled_at) == 3
        _, metrics = step_of(spec)(state, batch.replace(sampled_at_P=jnp.array(sampled_at)))
        expected = float(jnp.where(is_fresh_P, gap_P, 0).max())
        np.testing.assert_allclose(floats(metrics)["policy/sampler_logp_gap"], expected, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- optimizer


def optimizer_of(num_updates=10, **changes):
    config = tiny.config_of(changes={f"optimizer.{key}": value for key, value in changes.items()})
    return config.optimizer, make_optimizer(config.optimizer, num_updates, hyperparams_of(config))


def test_weight_decay_is_for_matrices_only():
    config, optimizer = optimizer_of(weight_decay=0.5, learning_rate=0.1, warmup_steps=0, schedule="constant")
    arch = dataclasses.replace(tiny.LLAMA, qkv_bias=True, qk_norm=True, num_layers=2)
    params = tiny.random_params(arch)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda params: optimizer.update(zeros, optimizer.init(params), params))(params)
    seen = {True: set(), False: set()}
    for (path, update), param in zip(jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(params), strict=True):
        names = [entry.key for entry in path]
        is_vector = names[-1] == "bias" or (names[-2:-1] and names[-2].endswith("norm"))
        expected = 0 * param if is_vector else -0.1 * 0.5 * param
        np.testing.assert_allclose(update, expected, rtol=1e-6, err_msg=str(names))
        seen[bool(is_vector)].add(names[-2] if len(names) > 1 else names[-1])
    assert seen[True] == {"q", "k", "v", "q_norm", "k_norm", "attn_norm", "mlp_norm", "final_norm"}
    assert seen[False] == {"embed", "head", "q", "k", "v", "o", "gate", "up", "down"}
    assert config.weight_decay == 0.5


def test_gradients_are_clipped_by_their_global_norm():
    config, optimizer = optimizer_of(max_grad_norm=0.5, b1=0.9)
    params = {"a": jnp.zeros(4), "b": jnp.zeros((2, 3))}
    for size in (10.0, 0.01):
        grads = jax.tree.map(lambda x: jnp.full_like(x, size), params)  # noqa: B023
        norm = float(optax.tree.norm(grads))
        _, opt_state = optimizer.update(grads, optimizer.init(params), params)
        mean = optax.tree_utils.tree_get(opt_state, "mu")
        expected = (1 - config.b1) * min(norm, config.max_grad_norm)
        np.testing.assert_allclose(optax.tree.norm(mean), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("constant", [0.25, 0.4375, 0.625, 0.8125, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.25, 0.4375, 0.625, 0.8125, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ("cosine", [0.25, 0.4375, 0.625, 0.8125, *((1 + np.cos(np.pi * k / 6)) / 2 for k in range(7))]),
    ],
)
def test_learning_rate_warms_up_and_follows_its_schedule(schedule, expected):
    """Four warm-up steps, from a quarter; ten updates in all. No update is at rate 0."""
    config, _ = optimizer_of(schedule=schedule, warmup_steps=4, learning_rate=0.5)
    rate = learning_rate(config.learning_rate, config, num_updates=10)
    np.testing.assert_allclose([rate(i) for i in range(11)], 0.5 * np.array(expected), atol=1e-6)


def test_no_warm_up_starts_at_the_full_rate():
    config, _ = optimizer_of(schedule="constant", warmup_steps=0, learning_rate=0.5)
    assert float(learning_rate(config.learning_rate, config, num_updates=10)(0)) == 0.5


# ----------------------------------------------------------------------------------------------------------- compiling


def test_other_batches_do_not_recompile():
    spec = spec_of("dr_grpo")
    step = step_of.__wrapped__(spec)  # its own: other tests call the shared one with batches of other structures
    state = start(spec)
    for seed in range(3):
        step(state, batch_of(seed))
    assert step._cache_size() == 1


@pytest.mark.slow
def test_a_whole_run_compiles_once():
    """With dynamic sampling, so that every part of the state changes; each iteration's state goes into the next."""
    changes = {
        "dynamic_sampling.enabled": True,
        "learner.num_minibatches": 2,
        "rollout.group_size": 2,
        "optimizer.learning_rate": 1e-2,
    }
    run = make_run(tiny.config_of("dapo", changes))
    state = run.initial_state()
    before = jax.tree.map(np.asarray, state.params)
    with tiny.compilations() as first:
        state, _, metrics = run.iterate(state)
    with tiny.compilations() as later:
        for _ in range(2):
            state, _, metrics = run.iterate(state)
    assert first and not later
    metrics = floats(jax.tree.map(lambda x: x[0], metrics))  # of the one step in a call
    assert int(state.step) == 3 and metrics["grad/norm"] >= 0
    assert np.isfinite(list(metrics.values())).all()
    assert jax.tree.structure(state.params) == jax.tree.structure(before)


# ------------------------------------------------------------------------------------------------------ KL in the reward


@pytest.mark.parametrize("name", ["rloo", "reinforce_pp", "grpo"])
def test_a_kl_in_the_reward_is_the_loss_of_rewards_less_their_kl(name):
    """Against `objectives` written out: the sum of logp - ref over a row leaves its reward, the task's reward stays."""
    coefficient = 0.3
    spec, batch = with_fields(spec_of(name), {"objective.kl_in_reward": coefficient}), batch_of()
    state = start(spec)
    mask_BT, old_BT = (x.reshape(-1, T) for x in (batch.rollout.mask_PGT, batch.rollout.sampler_logp_PGT))
    ref_BT = bigram_logp(state.ref_params, batch.rollout, SAMPLING.temperature)
    kl_B = ((old_BT - ref_BT) * mask_BT).sum(-1)
    paid = batch.replace(reward_PG=batch.reward_PG - coefficient * kl_B.reshape(P, G))
    plain = with_fields(spec, {"objective.kl_in_reward": 0.0})
    loss, grads = longhand(bigram_logp, plain, state, paid)
    after, metrics = step_of(spec)(state, batch)
    np.testing.assert_allclose(floats(metrics)["loss/total"], loss, rtol=1e-4)
    assert tiny.largest_difference(moved(state, after), jax.tree.map(jnp.negative, grads)) < 1e-4
    assert floats(metrics)["policy/kl_ref"] > 0
    without, _ = longhand(bigram_logp, plain, state, batch)
    assert abs(float(without) - float(loss)) > 1e-3, "the KL changed nothing"
