"""Several objectives in one program: each run's update is the one that its objective makes alone."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.learner.hyperparams import joint_key, static_key
from grpo_jax.learner.train_step import make_train_step
from grpo_jax.objectives.one_of import OneOf, choose, needs_of
from grpo_jax.objectives.variants import Objective
from grpo_jax.training.stacking import places_of, several_of, stack_states
from tests import tiny
from tests.test_train_step import BIGRAM, SGD, batch_of, moved, spec_of, start, step_of

WITHOUT_KL = ("dapo", "gtpo", "grpo_s", "gspo", "cispo", "gmpo", "rloo", "reinforce_pp", "sapo", "vespo", "kl_cov", "dppo_tv")
IN_REWARD = {"kl_coef": 0.0, "kl_in_reward": 0.1, "surrogate": "soft_gate"}
WITH_KL = (
    objectives.get("grpo"),
    objectives.get("dr_grpo"),
    dataclasses.replace(objectives.get("gtpo"), kl_coef=0.1, kl_estimator="k2", dual_clip=2.0),
    dataclasses.replace(objectives.get("grpo_s"), **IN_REWARD),
)


def update_together(specs, num_devices):
    """Update a state for each spec in one vmapped program; -> (states before, states after, metrics)."""
    several = several_of(specs)
    assert several is not None and len(several.members) == len(specs)
    mesh = tiny.mesh_of(num_devices, fsdp=2 if num_devices > 1 else 1)
    step = make_train_step(BIGRAM, lambda _: SGD, static_key(specs[0]), mesh, several)
    # Each has numbers of its own, and a policy of its own.
    weights = [jax.tree.map(lambda x, i=i: x * (1 + 0.1 * i), tiny.bigram_params()) for i in range(len(specs))]
    states = [start(spec, params) for spec, params in zip(specs, weights, strict=True)]
    stacked = stack_states(states, shares_base=False, places=places_of(specs, several))
    batches = jax.tree.map(lambda *x: jnp.stack(x), *(batch_of(seed) for seed in range(len(specs))))
    after, metrics = jax.jit(jax.vmap(step))(stacked, batches)
    return states, *([jax.tree.map(lambda x, i=i: x[i], tree) for i in range(len(specs))] for tree in (after, metrics))


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("objs", [tuple(map(objectives.get, WITHOUT_KL)), WITH_KL], ids=["no KL", "KL"])
def test_each_update_is_that_of_its_objective_alone(objs, num_devices):
    clips = [{} if "trust" in obj.surrogate else {"clip_high": obj.clip_high * (1 + 0.1 * i)} for i, obj in enumerate(objs)]
    specs = [
        dataclasses.replace(spec_of("grpo"), objective=dataclasses.replace(obj, **clip))
        for obj, clip in zip(objs, clips, strict=True)
    ]
    before, after, metrics = update_together(specs, num_devices)
    moves = []
    for seed, (spec, first, last, found) in enumerate(zip(specs, before, after, metrics, strict=True)):
        expected, expected_metrics = step_of(spec)(first, batch_of(seed))
        moves.append(moved(first, last))
        scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(moves[-1]))
        assert scale > 1e-4
        assert tiny.largest_difference(moves[-1], moved(first, expected)) < 1e-5 * max(scale, 1.0)
        ours, alone = metrics_lib.to_floats(found), metrics_lib.to_floats(expected_metrics)
        assert alone.keys() <= ours.keys()
        for name, value in alone.items():
            np.testing.assert_allclose(ours[name], value, rtol=1e-4, atol=1e-5, err_msg=f"{name} of {spec.objective}")


def test_what_does_not_hold_sends_no_gradient():
    """Neither a wrong one nor NaN, and it may give more arrays than the one that holds."""
    endless = dataclasses.replace(objectives.get("grpo"), clip_high=0.5)

    def value(obj: Objective, x):
        # The root has an endless slope at 0, which even 0 times is NaN.
        return (jnp.sqrt(x), {"more": x}, None) if obj.clip_high == 0.5 else (3.0 * x, {}, None)

    def of(place):
        several = OneOf((objectives.get("grpo"), endless), place)
        return jax.value_and_grad(lambda x: choose(several, value, x)[0])

    x = jnp.float32(0.0)
    found, slope = jax.jit(lambda place: of(place)(x))(jnp.int32(0))
    assert (found, slope) == (0.0, 3.0)
    found, slope = jax.vmap(lambda place: of(place)(jnp.float32(4.0)))(jnp.arange(2))
    np.testing.assert_allclose(found, [12.0, 2.0])
    np.testing.assert_allclose(slope, [3.0, 0.25])
    _, given, nothing = choose(OneOf((objectives.get("grpo"), endless), jnp.int32(0)), value, jnp.float32(4.0))
    assert nothing is None and given == {"more": 0.0}


def test_which_objectives_may_share_a_program():
    def key(name, **changes):
        return joint_key(tiny.config_of(name, changes))

    assert key("grpo") == key("dr_grpo") == key("gtpo", **{"objective.kl_coef": 0.1})
    assert key("dapo") == key("gtpo") == key("grpo_s", **{"objective.aggregation": "sequence_sum"}) != key("grpo")
    for changes in (
        {"objective.entropy_coef": 0.1},  # the learner's entropy has a gradient then
        {"objective.entropy_target": 0.1},  # a number of the state
        {"objective.success_threshold": 0.3},  # read where completions are scored
        {"objective.params": {"width": 1.0}},
        {"rollout.group_size": 4},
    ):
        assert key("dapo", **changes) != key("dapo"), changes
    with pytest.raises(ValueError, match="need the same"):
        OneOf((objectives.get("grpo"), objectives.get("dapo")))
    # A forgotten `choose` is an error and no wrong number.
    with pytest.raises(AttributeError):
        _ = OneOf((objectives.get("dapo"), objectives.get("gtpo"))).advantage  # pyright: ignore[reportAttributeAccessIssue]
    assert json.dumps(needs_of(objectives.get("gtpo")).to_dict()) == json.dumps(needs_of(objectives.get("dapo")).to_dict())


def test_a_program_of_several_needs_the_place():
    specs = [spec_of("dapo"), spec_of("gtpo")]
    step = make_train_step(BIGRAM, lambda _: SGD, static_key(specs[0]), tiny.mesh_of(1), several_of(specs))
    with pytest.raises(AssertionError, match="which one"):
        jax.eval_shape(step, start(specs[0]), batch_of())
