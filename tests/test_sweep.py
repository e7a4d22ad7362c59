"""Sweeps: what a config expands to, and that runs of a sweep are the runs that experiments.train would make."""

import importlib
import pathlib

import pytest

from configs.sweeps import base
from experiments.sweep import plan
from grpo_jax.errors import UserError

SWEEPS = pathlib.Path(__file__).parent.parent / "configs" / "sweeps"


def sweep_of(**fields):
    config = base.get_config("runlocal")
    config.update({"configs": ("configs/grpo.py", "configs/dapo.py"), "seeds": (0, 3), **fields})
    return plan.Sweep.from_config_dict(config)


def test_every_config_set_and_seed_is_a_run():
    sets = base.crossed({"": {}, "wide": {"objective.clip_high": 0.4}}, base.grid({"optimizer.learning_rate": (1e-3, 1e-2)}))
    specs = plan.expand(sweep_of(sets=sets), {"num_steps": 2})
    assert [spec.name for spec in specs[::2]] == [
        f"{variant}-{prefix}learning_rate={rate}"
        for variant in ("grpo", "dapo")
        for prefix in ("", "wide-")
        for rate in (0.001, 0.01)
    ]
    last = specs[-1]
    assert (last.variant, last.seed, last.folder) == ("dapo", 3, "runs/dapo-wide-learning_rate=0.01-seed3")
    assert last.settings == {"objective.clip_high": 0.4, "optimizer.learning_rate": 0.01}
    assert last.config.objective.clip_high == 0.4 and last.config.optimizer.learning_rate == 0.01
    assert last.config.seed == 3 and last.config.num_steps == 2 and last.config.dynamic_sampling.enabled


def test_lists_and_grids_are_named_by_their_values():
    assert base.grid({"objective.clip_low": (0.1, 0.2), "seed": (1,)}) == {
        "clip_low=0.1,seed=1": {"objective.clip_low": 0.1, "seed": 1},
        "clip_low=0.2,seed=1": {"objective.clip_low": 0.2, "seed": 1},
    }
    assert list(base.each([{"a.b": 1}, {"a.b": 2, "c": "x"}])) == ["b=1", "b=2,c=x"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sets": {"x": {"objective.kl_coeff": 0.1}}}, r"configs/grpo.py, set 'x': 'objective.kl_coeff' is no field"),
        ({"sets": {"x": {"kl_coef": 0.1}}}, r"'kl_coef' is no field; configs/base.py lists"),
        ({"sets": {"x": {"objective.kl_coef.y": 0.1}}}, r"'objective.kl_coef.y' is no field"),
        ({"sets": {"x": {"objective.kl_coef": "much"}}}, r"set 'x': config.objective.kl_coef = 'much': expected float"),
        ({"sets": {"x": {"objective.kl_coef": -1.0}}}, r"set 'x': config.objective.kl_coef = -1.0: must be"),
        ({"sets": {"x": {"seed": 1}}}, r"'seed' cannot be changed by a set; use config.seeds"),
        ({"sets": {}}, r"config.sets is empty"),
        ({"sets": {"a b": {}, "a_b": {}}}, r"two runs would have the folder 'runs/grpo-a_b-seed0'"),
        ({"seeds": (0, 0)}, r"two runs would have the folder"),
        ({"configs": ("configs/ppo.py",)}, r"config.configs: no file configs/ppo.py"),
        ({"scale": "huge"}, r"configs/grpo.py: unknown scale 'huge'"),
        ({"num_processes": -1}, r"config.num_processes = -1: must be at least 0"),
    ],
)
def test_bad_sweeps_end_in_one_line(fields, says):
    with pytest.raises(UserError, match=says) as caught:
        plan.expand(sweep_of(**fields), {})
    assert "\n" not in str(caught.value)


def test_assignments_on_the_command_line():
    assert plan.parsed(["num_steps=3", "objective.ratio=token", "model.path='a=b'"]) == {
        "num_steps": 3,
        "objective.ratio": "token",
        "model.path": "a=b",
    }
    with pytest.raises(UserError, match=r"--set=num_steps: expected <field>=<value>"):
        plan.parsed(["num_steps"])


@pytest.mark.parametrize("name", [file.stem for file in sorted(SWEEPS.glob("*.py")) if file.stem not in ("__init__", "base")])
def test_every_sweep_file_expands(name):
    module = importlib.import_module(f"configs.sweeps.{name}")
    for scale in ("tiny", "runlocal"):
        specs = plan.expand(plan.Sweep.from_config_dict(module.get_config(scale)), {})
        assert len(specs) >= 8
