"""Runs that share a program are the runs they would be alone."""

import json

import jax
import numpy as np
import pytest

from grpo_jax.learner.hyperparams import static_key
from grpo_jax.training import trainer
from grpo_jax.training.run import make_run
from grpo_jax.training.runlog import read_completions
from grpo_jax.training.stacking import stack_states
from tests import programs, tiny

pytestmark = pytest.mark.slow

CHANGES = {
    "steps_per_call": 3,
    "eval_every": 0,
    "checkpoint.every": 0,
    "log.completions_every": 3,
    "eval.num_samples": 0,
    "warm_start.num_steps": 5,
    "optimizer.learning_rate": 3e-2,
    "optimizer.warmup_steps": 0,
    "overlong.cache_tokens": 6,  # rewards differ, though hardly an answer is right
}
RUNS = [(0, 0.04), (0, 1.0), (1, 0.04), (1, 1.0)]  # seed, kl_coef


def config_of(seed, kl_coef, **changes):
    return tiny.config_of("grpo", CHANGES | {"seed": seed, "objective.kl_coef": kl_coef} | changes)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The last of the runs, as experiments.train makes it."""
    folder = tmp_path_factory.mktemp("alone")
    trainer.train(config_of(*RUNS[-1]), folder)
    return folder


@pytest.mark.parametrize("is_vmapped", [False, True], ids=["in turn", "vmapped"])
def test_runs_of_one_program_are_the_single_runs(tmp_path, alone, is_vmapped):
    configs = [config_of(*run) for run in RUNS]
    template = make_run(configs[0])
    folders = [tmp_path / str(i) for i in range(len(RUNS))]
    runs = [template.with_config(config) for config in configs]
    if is_vmapped:
        trainer.train_vmapped(runs, folders)
        assert len({json.dumps(programs.records(folder)) for folder in folders}) == 4, "a number does nothing"
    else:  # its numbers are not those that the program's first run has
        trainer.train_run(runs[-1], folders[-1])
    ours = folders[-1]
    assert sampled(ours) == sampled(alone)
    records = programs.records(ours)
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    for expected, found in zip(programs.records(alone), records, strict=True):
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=2e-4, atol=2e-5, err_msg=key)
    for name in ("summary.json", "learning_curve.png", "tensorboard", "checkpoints/3"):
        assert (ours / name).exists(), name
    assert (ours / "config.json").read_text() == (alone / "config.json").read_text()


OBJECTIVES = {  # none has a KL: what they need of the model is the same
    "dapo": {"objective.dual_clip": 3.0},  # with a metric that the others have not
    "gtpo": {},
    "grpo_s": {},
    "gspo": {"objective.clip_low": 0.1, "objective.token_filter": "low_covariance"},
}


APART = pytest.param({"learner.num_minibatches": 2, "steps_per_call": 0}, marks=pytest.mark.nightly)


@pytest.mark.parametrize("changes", [{"lora.rank": 2}, APART], ids=["adapters, one call a step", "halves"])
def test_objectives_of_one_program_are_the_single_runs(tmp_path, changes):
    learned = {"warm_start.num_steps": 60}  # some answers are right: without any, advantages are rounding
    configs = [tiny.config_of(name, CHANGES | learned | own | changes) for name, own in OBJECTIVES.items()]
    template = make_run(configs[0])
    folders = [tmp_path / name for name in OBJECTIVES]
    trainer.train_vmapped([template.with_config(config) for config in configs], folders)
    found = [programs.records(folder) for folder in folders]
    assert len({json.dumps(records) for records in found}) == len(configs)
    alone = tmp_path / "alone"
    trainer.train(configs[0], alone)
    for expected, record in zip(programs.records(alone), found[0], strict=True):
        assert expected.keys() == record.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(record[key], value, rtol=2e-4, atol=2e-5, err_msg=key)
    assert "policy/clip_fraction_dual" in found[0][-1] and not any("policy/clip_fraction_dual" in one[-1] for one in found[1:])


def sampled(folder):
    """What was sampled at the last step."""
    rows = read_completions(folder)
    assert len(rows) == 16
    return [(row["prompt"], row["completion"]) for row in rows]


def test_what_may_share_a_program():
    first = static_key(config_of(0, 0.04))
    for changes in ({"seed": 7}, {"objective.kl_coef": 0.5}, {"objective.clip_high": 0.3, "optimizer.learning_rate": 1e-5}):
        assert static_key(tiny.config_of("grpo", CHANGES | changes)) == first
    for changes in ({"objective.kl_coef": 0.0}, {"rollout.group_size": 4}, {"shuffle_rewards": True}, {"num_steps": 6}):
        assert static_key(tiny.config_of("grpo", CHANGES | changes)) != first


def test_settings_are_paired_by_seed():
    """At one seed all settings begin with the same weights and draw the same prompts."""

    def start(variant, seed):
        run = make_run(tiny.config_of(variant, CHANGES | {"seed": seed}))
        return run.initial_state().params, run.task.train_prompts(0, 32).tokens_PS

    grpo, gtpo, other = start("grpo", 0), start("gtpo", 0), start("grpo", 1)
    assert tiny.largest_difference(grpo, gtpo) == 0
    assert all(tiny.largest_difference(x, y) > 0 for x, y in zip(grpo, other, strict=True))


def test_every_process_makes_the_same_program(monkeypatch):
    """The order of a set of names is each process's own: a program in that order has its collectives in another one."""
    processes = []
    for seed in (1, 2):
        monkeypatch.setenv("PYTHONHASHSEED", str(seed))
        processes.append(programs.start("tests.lowered_program"))
    first, second = (process.communicate()[0] for process in processes)
    assert first == second and len(first.split()) == 1, first + second


@pytest.mark.parametrize("num_devices", [1, 2])
def test_members_leave_a_loop_together(num_devices):
    """No loop of a rollout selects what it carries at every token, and its counter is one for all: so are its writes."""
    changes = {"mesh.data": num_devices, "warm_start.num_steps": 0}
    run = make_run(config_of(0, 0.04, **changes))
    states = [run.with_config(config_of(*each, **changes)).initial_state() for each in RUNS[1:3]]
    stacked = stack_states(states, shares_base=False)
    vmapped = run.vmapped()
    loops = [loop for loop in loops_of(jax.make_jaxpr(vmapped.collect)(stacked)) if len(loop.outvars) > 8]
    assert len(loops) == 1
    (keep_going,) = loops[0].params["cond_jaxpr"].out_avals
    assert keep_going.shape == () and loops[0].outvars[0].aval.shape == ()
    _, batch, _ = vmapped.collect(stacked)
    for i, state in enumerate(states):
        _, expected, _ = run.collect(state)
        np.testing.assert_array_equal(batch.rollout.tokens_PGT[i], expected.rollout.tokens_PGT)
        np.testing.assert_array_equal(batch.rollout.mask_PGT[i], expected.rollout.mask_PGT)
        np.testing.assert_allclose(batch.rollout.sampler_logp_PGT[i], expected.rollout.sampler_logp_PGT, atol=2e-5)


def loops_of(jaxpr):
    """Every `while` of a program, those inside of others too."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == "while":
            yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from loops_of(inner)
