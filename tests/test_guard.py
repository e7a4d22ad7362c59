"""Numbers that are not finite: such an update is left out and counted, and too many in a row end the run, its weights whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.config import parse_config
from grpo_jax.errors import RunError, UserError
from grpo_jax.learner import train_step
from grpo_jax.learner.hyperparams import hyperparams_of
from grpo_jax.learner.optimizer import make_optimizer
from grpo_jax.learner.train_step import make_train_step
from grpo_jax.objectives.surrogates import ppo_clip
from grpo_jax.parallel.finite import find_not_finite
from grpo_jax.training import trainer
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.guard import GRADIENT, find_fault, place_of
from grpo_jax.training.run import make_run
from tests import programs, tiny

BIGRAM = tiny.Bigram()
ADAM = optax.adam(0.1)


def step_of(num_devices=1, **learner):
    config = tiny.update_config(objectives.get("dapo"), logprob_chunk_tokens=32, **learner)
    mesh = tiny.mesh_of(num_devices, fsdp=2 if num_devices > 1 else 1)
    return jax.jit(make_train_step(BIGRAM, lambda _: ADAM, config, mesh)), config


def poisoned(batch, value, rows):
    """The batch with the rewards of some groups not finite."""
    return batch.replace(reward_PG=batch.reward_PG.at[rows].set(value))


@pytest.mark.parametrize(
    ("num_devices", "value", "platform"), [(1, jnp.nan, "cpu"), (1, jnp.inf, "cpu"), (4, jnp.nan, "cpu"), (4, jnp.inf, "gpu")]
)
def test_an_update_that_is_not_finite_leaves_all_as_it_was_but_the_step(num_devices, value, platform, monkeypatch):
    """On CPUs a branch leaves it out, on accelerators a select."""
    monkeypatch.setattr(train_step, "target_platform", lambda: platform)
    step, config = step_of(num_devices, num_microbatches=2)
    state = tiny.state_of(tiny.bigram_params(), ADAM, config=config)
    after, metrics = step(state, poisoned(tiny.random_batch(), value, 1))
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))
    assert int(after.step) == 1
    found = metrics_lib.to_floats(metrics)
    assert found["update/skipped"] == 1.0 and not np.isfinite(found["loss/total"])
    # The next one is a first one.
    again, metrics = step(after, tiny.random_batch())
    fresh, _ = step(state.replace(step=jnp.int32(1)), tiny.random_batch())
    jax.tree.map(np.testing.assert_array_equal, again.params, fresh.params)
    assert metrics_lib.to_floats(metrics)["update/skipped"] == 0.0


def test_of_several_updates_in_a_step_the_sound_ones_are_taken():
    step, config = step_of(num_minibatches=4)
    state = tiny.state_of(tiny.bigram_params(), ADAM, config=config)
    after, metrics = step(state, poisoned(tiny.random_batch(), jnp.nan, 1))
    assert metrics_lib.to_floats(metrics)["update/skipped"] == 0.25
    assert int(optax.tree.get(after.opt_state, "count")) == 3
    assert not find_not_finite(after.params) and tiny.largest_difference(after.params, state.params) > 0


def test_one_run_of_several_in_a_program_is_held_and_the_others_go_on():
    step, config = step_of()
    second = jax.tree.map(lambda x: -x, tiny.bigram_params())
    states = [tiny.state_of(params, ADAM, config=config) for params in (tiny.bigram_params(), second)]
    batches = [tiny.random_batch(), poisoned(tiny.random_batch(), jnp.nan, 0)]
    stacked = [jax.tree.map(lambda *each: jnp.stack(each), *both) for both in (states, batches)]
    after, metrics = jax.vmap(step)(*stacked)
    np.testing.assert_array_equal(metrics["update/skipped"].total, [0.0, 1.0])
    jax.tree.map(lambda x, old: np.testing.assert_array_equal(x[1], old), after.params, states[1].params)
    alone, _ = step(states[0], batches[0])
    assert tiny.largest_difference(jax.tree.map(lambda x: x[0], after.params), alone.params) < 1e-6


EXTREMES = [
    {"optimizer.b1": 0.999999, "optimizer.b2": 0.999999},
    {"optimizer.b1": 0.0, "optimizer.b2": 0.0, "optimizer.eps": 1e-20},
    {"optimizer.learning_rate": 1.0, "optimizer.weight_decay": 1.0, "optimizer.max_grad_norm": 1e9},
    {"optimizer.max_grad_norm": 2.0**-126, "optimizer.eps": 1.0},
]


@pytest.mark.parametrize("size", [1e-38, 1e-22, 1.0, 1e18])
@pytest.mark.parametrize("changes", EXTREMES)
def test_adamw_is_finite_wherever_its_settings_and_gradient_are(changes, size):
    """For this the update is judged by its gradient alone."""
    config = tiny.config_of("grpo", changes | {"optimizer.warmup_steps": 0})
    optimizer = make_optimizer(config.optimizer, 10, hyperparams_of(config))
    params = {"weight": jnp.asarray([[1.0, -2.0]])}
    state = optimizer.init(params)
    for sign in (1, 1, -1, 0):
        updates, state = optimizer.update({"weight": jnp.full((1, 2), sign * size)}, state, params)
        params = optax.apply_updates(params, updates)
    assert not find_not_finite((params, state))


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.b1": 0.9999999},
        {"optimizer.b2": 1.0},
        {"optimizer.eps": 1e-45},
        {"optimizer.learning_rate": 1e30},
        {"optimizer.weight_decay": 2.0},
        {"optimizer.max_grad_norm": 1e39},
        {"rollout.temperature": 1e-30},
        {"objective.clip_high": 1e39},
        {"objective.adv_eps": 1e-45},
        {"num_steps": 2**63},
        {"reward.scoring.num_workers": 2**31 - 1},
    ],
)
def test_a_setting_that_float32_or_int32_cannot_hold_or_that_ends_in_nan_is_refused(changes):
    (name,) = changes
    with pytest.raises(UserError, match=rf"config\.{name}"):
        parse_config(nested(tiny.config_of("grpo").to_dict(), changes))


def nested(values, changes):
    """The settings with some changed, by their dotted names."""
    for name, value in changes.items():
        *groups, last = name.split(".")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[last] = value
    return values


def test_where_to_look_is_what_is_computed_first():
    assert "rewards" in place_of(["grad/norm", "loss/total", "reward/mean", "policy/kl_ref"])
    assert "reference" in place_of(["grad/norm", "policy/kl_ref"])
    assert place_of(["grad/norm"]) == GRADIENT


def test_what_is_not_finite_is_found_by_its_place():
    tree = {
        "a": jnp.ones((3, 2)),
        "b": jnp.ones((3, 2, 2)).at[2, 1, 0].set(jnp.inf),
        "n": jnp.int32(1),
        "s": jnp.float32(jnp.nan),
    }
    assert [(path[0].key, place) for path, place in find_not_finite(tree)] == [("b", 2), ("s", 0)]


SMALL_RUN = {"num_steps": 8, "eval_every": 0, "eval.num_samples": 0, "checkpoint.every": 1, "optimizer.max_skipped_steps": 2}


@pytest.mark.slow
def test_a_run_stops_before_it_saves_what_it_cannot_train(tmp_path, capsys):
    """A task whose rewards are NaN from step 3 on."""
    run = make_run(tiny.config_of("dapo", SMALL_RUN | {"dynamic_sampling.enabled": False}))

    def collect(state):
        state, batch, metrics = run.collect(state)
        if int(state.step) >= 2:
            batch = batch.replace(reward_PG=batch.reward_PG * jnp.nan)
        return state, batch, metrics

    with pytest.raises(RunError, match=r"step 4: .*loss/total.*Stopped: 2 step\(s\) in a row.*after step 2, and no checkpoint"):
        trainer.train_run(dataclasses.replace(run, collect=collect), tmp_path)
    assert [record["update/skipped"] for record in programs.records(tmp_path)[1:]] == [0.0, 0.0, 1.0, 1.0]
    assert "step 3: 100% of its updates left out, not finite:" in capsys.readouterr().err
    # One skipped step does not end it, and the checkpoint behind it is whole.
    assert saved_steps(tmp_path)[-1] == 3
    assert not find_not_finite(run.restore_policy(tmp_path, 3))


@jax.custom_vjp
def with_gradient_of_nan(x, is_bad):
    return x


with_gradient_of_nan.defvjp(lambda x, is_bad: (x, is_bad), lambda is_bad, g: (jnp.where(is_bad, jnp.nan, g), None))


def surrogate_with_a_marker(obj, terms):
    """PPO's; a token that the sampler seems to have thought impossible makes the gradient NaN, and it alone."""
    surrogate = ppo_clip(obj, terms)
    is_bad = jnp.any(terms.log_ratio_BT > 10)
    return surrogate._replace(value_BT=with_gradient_of_nan(surrogate.value_BT, is_bad))


def with_weight(state, batch):
    """One number among the weights."""
    params = dict(state.params, embed=state.params["embed"].at[3, 2].set(jnp.nan))
    return state.replace(params=params), batch


def with_reward(state, batch):
    return state, batch.replace(reward_PG=batch.reward_PG.at[1, 1].set(jnp.nan))


def with_data(state, batch):
    rollout = batch.rollout
    return state, tiny.with_rollout(batch, sampler_logp_PGT=rollout.sampler_logp_PGT.at[0, 0, 0].set(jnp.nan))


def with_marker(state, batch):
    rollout = batch.rollout
    return state, tiny.with_rollout(batch, sampler_logp_PGT=rollout.sampler_logp_PGT.at[0, 0, 0].set(-30.0))


@pytest.fixture(scope="module")
def marked_run():
    changes = SMALL_RUN | {"num_steps": 5, "dynamic_sampling.enabled": False, "optimizer.max_skipped_steps": 3}
    return make_run(tiny.config_of("grpo", changes | {"objective.surrogate": "tests.test_guard:surrogate_with_a_marker"}))


@pytest.mark.slow
@pytest.mark.parametrize("inject", [with_weight, with_marker, with_reward, with_data])
def test_nan_is_said_at_its_step_and_the_newest_checkpoint_is_finite(tmp_path, capsys, marked_run, inject):
    """Among weights, in a gradient, a reward or the data of step 3. Of weights nothing is saved any more."""

    def collect(state):
        is_step_3 = int(state.step) == 2
        state, batch, metrics = marked_run.collect(state)
        return *(inject(state, batch) if is_step_3 else (state, batch)), metrics

    run = dataclasses.replace(marked_run, collect=collect)
    if inject is with_weight:
        with pytest.raises(RunError, match=r"step 3: params\.embed holds NaN or infinity"):
            trainer.train_run(run, tmp_path)
    else:
        trainer.train_run(run, tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if "left out, not finite" in line]
    assert len(said) == 1 and "step 3: 100% of its updates" in said[0]
    assert ("loss/total" in said[0]) == (inject is not with_marker)
    newest = saved_steps(tmp_path)[-1]
    assert newest == (2 if inject is with_weight else 5)
    assert not find_not_finite(run.restore_policy(tmp_path, newest))


def test_a_weight_that_no_token_asks_for_is_found_before_it_is_saved():
    state = tiny.state_of(tiny.bigram_params(), ADAM)
    assert find_fault(state) == ("", False)
    broken = state.replace(params=dict(state.params, embed=state.params["embed"].at[1, 1].set(jnp.inf)))
    assert find_fault(broken) == ("params.embed holds NaN or infinity", True)
    waiting = tiny.random_batch()
    waiting = waiting.replace(reward_PG=waiting.reward_PG * jnp.nan)
    assert find_fault(state.replace(next_batch=waiting)) == ("next_batch.reward_PG holds NaN or infinity", False)
