"""Sweeps: what a config expands to, and that runs of a sweep are the runs that experiments.train would make."""

import csv
import importlib
import io
import itertools
import json
import os
import pathlib
import random
import signal
import time
import types

import numpy as np
import pytest
from rich.console import Console

from grpo_jax.configs.sweeps import base
from grpo_jax.errors import UserError
from grpo_jax.learner.hyperparams import static_key
from grpo_jax.tools.report import tables
from grpo_jax.tools.report.analysis import analyse
from grpo_jax.tools.report.runs import load
from grpo_jax.tools.sweep import plan, worker
from grpo_jax.tools.sweep.board import Board
from tests import programs, tiny

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


@pytest.mark.parametrize(
    ("group", "function"),
    [("task", {"task.name": "m:f"}), ("reward", {"task.name": "m:f", "reward.shaping": "m:f"}), ("objective", {})],
)
def test_a_set_may_have_settings_of_functions_of_ones_own(group, function):
    sets = {"": {**function, "model.path": "x", "warm_start.num_steps": 0, f"{group}.params.level": 3}}
    (spec,) = plan.expand(sweep_of(configs=("configs/grpo.py",), sets=sets, seeds=(0,)), {})
    assert getattr(spec.config, group).params["level"] == 3


def test_one_config_may_have_sets_of_its_own():
    more = {"configs/dapo.py": {"no_filter": {"dynamic_sampling.enabled": False}}}
    sweep = sweep_of(more_sets=more, sets={"": {}}, seeds=(0,))
    specs = plan.expand(sweep, {})
    assert [spec.name for spec in specs] == ["grpo", "dapo", "dapo-no_filter"]
    assert [spec.config.dynamic_sampling.enabled for spec in specs] == [False, True, False]
    with pytest.raises(UserError, match=r"config\.more_sets: 'gtpo' is not among config\.configs"):
        sweep_of(more_sets={"gtpo": {}})


def test_the_packages_configs_are_found_from_any_folder_and_those_at_hand_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan.expand(sweep_of(), {})[-1].config.dynamic_sampling.enabled
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "dapo.py").write_text("from grpo_jax.configs.grpo import get_config")
    assert not plan.expand(sweep_of(), {})[-1].config.dynamic_sampling.enabled


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
        ({"sets": {"x": {"kl_coef": 0.1}}}, r"'kl_coef' is no field; `grpo-jax fields` lists"),
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
    assert plan.parse_assignments(["num_steps=3", "objective.ratio=token", "model.path='a=b'"]) == {
        "num_steps": 3,
        "objective.ratio": "token",
        "model.path": "a=b",
    }
    with pytest.raises(UserError, match=r"--set=num_steps: expected <field>=<value>"):
        plan.parse_assignments(["num_steps"])


@pytest.mark.parametrize("name", [file.stem for file in sorted(SWEEPS.glob("*.py")) if file.stem not in ("__init__", "base")])
def test_every_sweep_file_expands(name):
    module = importlib.import_module(f"grpo_jax.configs.sweeps.{name}")
    for scale in ("tiny", "runlocal"):
        sweep = plan.Sweep.from_config_dict(module.get_config(scale))
        assert len(plan.expand(sweep, {})) >= 8
        assert plan.too_few_seeds(sweep) is None


def folder_of(workdir, spec, *, steps):
    """As if the run had been stopped or had finished after `steps`."""
    folder = workdir / spec.folder
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": steps, "reward/mean": 0.25, "time/step_secs": 2.0}) + "\n")
    (folder / "summary.json").write_text(json.dumps({"steps": steps}))
    return folder


def test_finished_runs_are_kept_and_runs_of_one_program_follow_each_other(tmp_path):
    sets = base.grid({"optimizer.learning_rate": (1e-3, 1e-2), "rollout.group_size": (4, 8)})
    specs = plan.expand(sweep_of(configs=("configs/grpo.py",), sets=sets), {})
    folder_of(tmp_path, specs[1], steps=3)
    folder_of(tmp_path, specs[2], steps=2)  # stopped by a signal: it has a summary, but not of all its steps
    board = Board(specs, tmp_path, 2)
    assert [board.status[spec.folder] for spec in specs] == ["waiting", "finished", *["waiting"] * 6]
    to_do = [spec for spec in specs if board.status[spec.folder] != "finished"]

    jobs = worker.jobs_of(specs, to_do, 1, tmp_path)
    assert [job.runs for job in jobs] == [(specs[i],) for i in (0, 4, 5, 2, 3, 6, 7)]
    assert len({static_key(job.runs[0].config) for job in jobs}) == 2
    together = worker.jobs_of(specs, to_do, 0, tmp_path)
    assert [job.runs for job in together] == [tuple(specs[i] for i in places) for places in ((0, 4, 5), (2, 3, 6, 7))]
    assert [len(job.runs) for job in worker.jobs_of(specs, to_do, 3, tmp_path)] == [3, 3, 1]


def test_runs_of_several_objectives_are_one_job_where_one_call_advances_them(tmp_path):
    configs = ("configs/grpo.py", "configs/gtpo.py", "configs/dr_grpo.py", "configs/grpo_s.py", "configs/dapo.py")
    specs = plan.expand(sweep_of(configs=configs, seeds=(0, 1)), {"num_steps": 3})

    def variants(cohort_size):
        return [[spec.variant for spec in job.runs] for job in worker.jobs_of(specs, specs, cohort_size, tmp_path)]

    # With a KL, without, and DAPO, which samples until a batch is full.
    assert variants(0) == [["grpo"] * 2 + ["dr_grpo"] * 2, ["gtpo"] * 2 + ["grpo_s"] * 2, ["dapo"] * 2]
    settings = {"task.name": "jsonl", "task.jsonl.path": "sums.jsonl", "model.path": "folder", "warm_start.num_steps": 0}
    on_host = plan.expand(sweep_of(configs=("configs/grpo.py", "configs/dapo.py")), settings)
    jobs = worker.jobs_of(on_host, on_host, 0, tmp_path)
    assert [len(job.runs) for job in jobs] == [2, 1, 1], "the host decides how often DAPO samples"
    assert variants(2) == [[name] * 2 for name in ("grpo", "dr_grpo", "gtpo", "grpo_s", "dapo")]
    assert [each[0] for each in variants(1)] == [name for name in ("grpo", "gtpo", "dr_grpo", "grpo_s", "dapo") for _ in (0, 1)]


def test_the_time_left_leaves_out_what_came_before_the_first_step(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(secs=0.0)
    monkeypatch.setattr("grpo_jax.tools.sweep.board.time", types.SimpleNamespace(monotonic=lambda: clock.secs))
    specs = plan.expand(sweep_of(), {})  # four runs of three steps
    board = Board(specs, tmp_path, 2)
    folder_of(tmp_path, specs[0], steps=1)
    board.set(specs[0], "running")
    clock.secs = 100.0
    board.refresh()
    assert board.secs_left() is None
    clock.secs = 112.0
    folder_of(tmp_path, specs[1], steps=3)
    board.record_end(specs[1], "")
    assert board.secs_left() == 8 * 4.0  # three steps in 12 seconds, eight to go


def test_the_board_says_how_far_each_run_is(tmp_path):
    specs = plan.expand(sweep_of(), {})
    with Board(specs, tmp_path, 2) as board:
        for spec in specs[:3]:
            board.set(spec, "running")
        folder_of(tmp_path, specs[0], steps=3)
        folder_of(tmp_path, specs[1], steps=1)
        board.record_end(specs[0], "")
        board.record_end(specs[2], "ValueError: no")
        board.set(specs[1], "running")
        assert board.cells(specs[1]) == ("grpo-seed3", "1/3", "0.25", "", "4 s", "running")
        assert board.describe_time(secs=4.0).startswith("25% of the time was training steps")  # 2 s of 2 x 4 s
        assert board.summary() == "1 running, 1 failed, 1 waiting, 1 finished; 2 at a time"
        console = Console(width=100, file=io.StringIO())
        console.print(board.table(height=6))
        shown = console.file.getvalue().splitlines()
        assert len(shown) == 4 and "grpo-seed3" in shown[1] and "dapo-seed0" in shown[2], "those that move come first"
    runs = json.loads((tmp_path / "sweep.json").read_text())["runs"]
    assert [run["status"] for run in runs] == ["finished", "waiting", "failed", "waiting"], "nothing runs any more"
    assert runs[3] == {
        "name": "dapo",
        "variant": "dapo",
        "settings": {},
        "seed": 3,
        "folder": "runs/dapo-seed3",
        "status": "waiting",
    }


def test_a_warm_start_is_made_once_for_all_settings_of_a_seed(tmp_path):
    def name(variant, seed, **changes):
        return worker.start_of(tiny.config_of(variant, {"seed": seed} | changes))

    assert name("grpo", 0) == name("gtpo", 0, **{"objective.clip_high": 0.5})
    assert len({name("grpo", 0), name("grpo", 1), name("grpo", 0, **{"warm_start.num_steps": 2})}) == 3
    made = []

    def make():
        made.append({"a": {"b": np.arange(3, dtype=np.float32)}, "c": np.ones((2, 2), np.float32)})
        return made[-1]

    for _ in range(2):
        assert tiny.largest_difference(worker.keep_in_file(make, tmp_path / "weights" / "x")(), made[0]) == 0
    assert len(made) == 1
    # What is damaged is made again, and says so.
    for damage in (lambda content: b"", lambda content: content[:-1], lambda content: content[:-2] + b"x" + content[-1:]):
        path = tmp_path / "weights" / "x"
        path.write_bytes(damage(path.read_bytes()))
        assert tiny.largest_difference(worker.keep_in_file(make, path)(), made[0]) == 0
        assert worker.is_whole(path.read_bytes())
    assert len(made) == 4


SHORT = ["--set=num_steps=0", "--set=warm_start.num_steps=0", "--set=eval.num_samples=0", "--config.num_processes=1"]


@pytest.mark.slow
def test_a_failing_run_stops_no_other(tmp_path):
    """The whole program, with runs that are evaluated but not trained; the first has no model."""
    (tmp_path / "sweep.py").write_text(
        "from grpo_jax.configs.sweeps import base\n"
        "def get_config(scale='runlocal'):\n"
        "    config = base.get_config(scale)\n"
        "    config.configs, config.seeds = ('configs/grpo.py',), (3,)\n"
        "    config.sets = {'broken': {'model.path': '/no/such/folder'}, '': {}}\n"
        "    return config\n"
    )
    workdir = tmp_path / "out"
    status, output = programs.run("experiments.sweep", f"--config={tmp_path}/sweep.py", f"--workdir={workdir}", *SHORT)
    assert status == 1, output
    runs = {run["folder"]: run["status"] for run in json.loads((workdir / "sweep.json").read_text())["runs"]}
    assert runs == {"runs/grpo-broken-seed3": "failed", "runs/grpo-seed3": "finished"}
    (line,) = [line for line in output.splitlines() if line.startswith("failed: runs/grpo-broken-seed3")]
    assert "model.path = " in line and "/no/such/folder" in line and "runs/grpo-broken-seed3/output.txt" in line
    assert "1 failed, 1 finished" in output
    (record,) = programs.records(workdir / "runs" / "grpo-seed3")
    assert record["step"] == 0 and "eval/success" in record


@pytest.mark.parametrize(
    ("num_sets", "num_seeds", "least"),
    [(2, 5, 6), (2, 6, None), (5, 7, 8), (5, 8, None), (1, 1, None)],  # 2 / 2^6 = 0.031; 4 * 2 / 2^8 = 0.031
)
def test_a_sweep_says_beforehand_that_it_has_too_few_seeds_to_show_anything(num_sets, num_seeds, least):
    sets = {f"set{i}": {"optimizer.learning_rate": 1e-3 * (i + 1)} for i in range(num_sets)}
    warning = plan.too_few_seeds(sweep_of(configs=("configs/grpo.py",), sets=sets, seeds=tuple(range(num_seeds))))
    assert warning is None if least is None else f"holds {num_seeds}; with fewer than {least} no" in warning


@pytest.mark.slow
def test_typos_end_in_one_line_before_anything_runs(tmp_path):
    flags = ["--config=configs/sweeps/variants.py:runlocal", f"--workdir={tmp_path}/out"]
    status, output = programs.run("experiments.sweep", *flags, "--set=num_step=3")
    assert status == 2
    assert output.strip() == "error: grpo, set '': 'num_step' is no field; `grpo-jax fields` lists them all"
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------- killed and resumed

SETS = "{'': {}, 'fast': {'optimizer.learning_rate': 1e-2}}"  # of one program
FIELDS = {"num_steps": 8, "checkpoint.every": 2, "eval_every": 0}
FIELDS |= {"overlong.cache_tokens": 6, "warm_start.num_steps": 0}  # no answer is right, and rewards differ by length
FIELDS |= {"objective.kl_coef": 0.0, "eval.num_samples": 0, "log.completions_every": 0}  # little to compile


def sweep_command(file, workdir):
    changes = [f"--set={field}={value}" for field, value in FIELDS.items()]
    return ["experiments.sweep", f"--config={file}", f"--workdir={workdir}", "--config.num_processes=1", *changes]


def killed_at(process, workdir, num_records):
    """SIGKILL for the sweep and its processes as soon as its runs have so many records together."""
    while sum(file.read_text().count("\n") for file in workdir.glob("runs/*/metrics.jsonl")) < num_records:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def reported(workdir):
    """The report's tables without what a clock decides, and the records behind them."""
    study = analyse(*load([workdir], "reward/mean"), "reward/mean", None)
    assert not study.left_out
    tables_ = [list(csv.DictReader(io.StringIO(text))) for text in (tables.results_csv(study), tables.runs_csv(study))]
    for row in itertools.chain(*tables_):
        assert float(row.pop("seconds")) > 0
    return *tables_, {file.name: programs.records(file) for file in workdir.glob("runs/*")}


@pytest.mark.slow
def test_a_sweep_killed_twice_ends_with_the_report_of_an_unbroken_one(tmp_path):
    sweep, whole, torn, cache = (tmp_path / name for name in ("sweep.py", "whole", "torn", "compiled"))
    sweep.write_text(
        "from grpo_jax.configs.sweeps import base\n"
        "def get_config(scale='runlocal'):\n"
        "    config = base.get_config(scale)\n"
        f"    config.configs, config.seeds, config.sets = ('configs/grpo.py',), (0, 1), {SETS}\n"
        "    return config\n"
    )
    status, output = programs.run(*sweep_command(sweep, whole), cache=cache)
    assert status == 0, output
    results, runs, records = reported(whole)
    total = sum(map(len, records.values()))
    assert (len(results), len(runs), total) == (2, 4, 4 * (FIELDS["num_steps"] + 1))
    assert len({row["area"] for row in runs}) > 2, "all runs are alike: nothing is tested"

    for num_records in sorted(random.Random(0).sample(range(2, total - 2), 2)):
        killed_at(programs.start(*sweep_command(sweep, torn), cache=cache), torn, num_records)
        statuses = [run["status"] for run in json.loads((torn / "sweep.json").read_text())["runs"]]
        assert "running" in statuses, "it was not killed in the middle"
    status, output = programs.run(*sweep_command(sweep, torn), cache=cache)
    assert status == 0, output
    assert reported(torn) == (results, runs, records)
