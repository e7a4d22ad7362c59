"""Adapters of several runs on one frozen base: one copy of its weights, and the runs that each would be alone."""

import dataclasses

import jax
import numpy as np
import pytest

from grpo_jax.training import trainer
from grpo_jax.training.run import make_run
from grpo_jax.training.stacking import share_base, stack_states, unstack
from grpo_jax.types import join_params
from tests import programs, tiny

CHANGES = {
    "lora.rank": 2,
    "num_steps": 2,
    "steps_per_call": 2,
    "log.completions_every": 2,
    "eval_every": 0,
    "checkpoint.every": 0,
    "eval.num_samples": 0,
    "warm_start.num_steps": 5,
    "optimizer.learning_rate": 3e-2,
    "optimizer.warmup_steps": 0,
    "overlong.cache_tokens": 6,  # rewards differ, though hardly an answer is right
}
RUNS = [{"objective.kl_coef": 0.04}, {"objective.kl_coef": 1.0}, {"objective.clip_high": 0.4, "optimizer.learning_rate": 1e-2}]


def configs_of(**changes):
    return [tiny.config_of("grpo", {**CHANGES, **run, **changes}) for run in RUNS]


def test_which_runs_have_one_base():
    configs = configs_of()
    assert share_base(configs)
    assert not share_base([configs[0], dataclasses.replace(configs[1], seed=1)]), "its warm start is another one"
    assert not share_base([dataclasses.replace(config, lora=dataclasses.replace(config.lora, rank=0)) for config in configs])
    from_folder = [
        dataclasses.replace(config, seed=seed, model=dataclasses.replace(config.model, path="folder"))
        for seed, config in enumerate(configs)
    ]
    assert share_base(from_folder), "a folder's weights are the same for all seeds"


@pytest.mark.slow
def test_the_base_is_there_once():
    """In the state before and after a call, and in those of the members."""
    run = make_run(configs_of()[0])
    states = [run.initial_state()] * 3
    shared, apart = stack_states(states, shares_base=True), stack_states(states, shares_base=False)
    base_bytes = sum(x.nbytes for x in jax.tree.leaves(states[0].base))
    sizes = [sum(x.nbytes for x in jax.tree.leaves(state)) for state in (shared, apart)]
    assert sizes[1] - sizes[0] == 2 * base_bytes > 0
    members = unstack(shared, 3, shares_base=True)
    for member, state in zip(members, states, strict=True):
        jax.tree.map(
            np.testing.assert_array_equal, dataclasses.replace(member, base=None), dataclasses.replace(state, base=None)
        )
        assert all(x is y for x, y in zip(jax.tree.leaves(member.base), jax.tree.leaves(states[0].base), strict=True))
    after = jax.eval_shape(run.vmapped(shares_base=True).iterate, shared)[0]
    assert jax.tree.map(lambda x: x.shape, after) == jax.tree.map(lambda x: x.shape, shared)


@pytest.mark.nightly
def test_adapters_on_one_base_are_the_runs_alone(tmp_path):
    configs, folders, alone = configs_of(), [tmp_path / str(i) for i in range(len(RUNS))], tmp_path / "alone"
    template = make_run(configs[0])
    trainer.train_vmapped([template.with_config(config) for config in configs], folders)
    trainer.train(configs[-1], alone)
    ours, single = (programs.records(folder) for folder in (folders[-1], alone))
    assert [record["step"] for record in ours] == [0, 1, 2]
    for expected, found in zip(single, ours, strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=2e-4, atol=2e-5, err_msg=key)
    run, *others = (template.with_config(config) for config in configs)
    params = [run.restore_policy(folder, 2) for folder in (*folders, alone)]
    assert tiny.largest_difference(params[-1], params[-2]) < 2e-5
    assert min(tiny.largest_difference(params[-1], each) for each in params[:2]) > 1e-3, "a number does nothing"
    start = run.initial_state()
    assert tiny.largest_difference(params[-1], join_params(start.base, start.params)) > 1e-3 and len(others) == 2
