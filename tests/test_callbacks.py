"""Callbacks and trackers are told of everything once, and what they raise stops nothing unless it asks to."""

import dataclasses
import json
import sys

import pytest

from grpo_jax.config import LogConfig
from grpo_jax.errors import UserError
from grpo_jax.training import trackers
from grpo_jax.training.callbacks import Callback, Callbacks, StopTraining, load_callback
from grpo_jax.training.runlog import RunLog, read_metrics
from grpo_jax.training.trainer import train
from tests.tiny import config_of


class Notes:
    """Writes down what it is told; from step 3 on it asks for the end."""

    def __init__(self):
        self.told = []

    def on_start(self, config, workdir, step):
        self.told.append(("start", step))

    def on_step(self, step, metrics):
        self.told.append(("step", step, sorted(metrics)[0]))

    def on_eval(self, step, metrics):
        assert all(name.startswith("eval/") for name in metrics)
        self.told.append(("eval", step))

    def on_samples(self, step, rows):
        self.told.append(("samples", step, len(rows)))

    def on_save(self, step):
        self.told.append(("save", step))
        if step == 2:
            raise StopTraining("enough")

    def on_end(self, summary):
        self.told.append(("end", summary["steps"]))


class Broken(Callback):
    def on_step(self, step, metrics):
        raise OSError(f"the dashboard is away at {step}")


@pytest.mark.slow
def test_a_run_tells_its_callbacks_and_ends_where_one_asks(tmp_path, capsys):
    notes = Notes()
    config = config_of("grpo", CHANGES)
    summary = train(config, tmp_path, callbacks=[notes, Broken()])
    kinds = [each[:2] for each in notes.told]
    assert kinds[:3] == [("start", None), ("step", 0), ("eval", 0)]
    assert [each for each in kinds if each[0] == "step"] == [("step", 0), ("step", 1), ("step", 2)]
    assert [each for each in kinds if each[0] == "eval"] == [("eval", 0), ("eval", 2)]
    assert ("samples", 2, config.rollout.group_size) in notes.told
    assert kinds[-1] == ("end", 2) and ("save", 2) in kinds
    assert summary["steps"] == 2 and summary["callback_errors"] == 3
    said = capsys.readouterr().err
    assert said.count("the dashboard is away at") == 2  # its line in the traceback, and its message
    assert "is away at 0" in said and "Broken.on_step failed (OSError); the run goes on" in said
    assert said.count("Notes.on_save ends the run: enough") == 1
    last = read_metrics(tmp_path)[-1]
    assert last["optimizer/learning_rate"] > 0 and last["reward/std"] >= 0


def test_what_is_no_callback_is_refused(tmp_path, monkeypatch):
    source = "class Good:\n    def on_step(self, step, metrics): pass\n\nclass Odd:\n    on_stop = print\n"
    (tmp_path / "mine.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    made = trackers.make_callbacks(LogConfig(callbacks=("mine:Good",), trackers=()), [])
    made.tell("on_step", 1, {})
    assert made.num_errors == 0
    with pytest.raises(UserError, match=r"config.log.callbacks: Odd has none of on_start, on_step"):
        trackers.make_callbacks(LogConfig(callbacks=("mine:Odd",), trackers=()), [])
    with pytest.raises(UserError, match=r"config.log.callbacks: Notes.on_stop is never called; there are on_start"):
        trackers.make_callbacks(LogConfig(trackers=()), [type("Notes", (Notes,), {"on_stop": print})()])
    with pytest.raises(UserError, match=r"config.log.callbacks = 'mine:Bad': module 'mine' has no 'Bad'"):
        load_callback("mine:Bad", "config.log.callbacks")
    with pytest.raises(UserError, match=r"expected module:Class"):
        load_callback("mine", "config.log.callbacks")


def test_a_tracker_whose_library_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"config.log.trackers: 'wandb' needs a library: pip install 'grpo_jax\[trackers\]'"):
        trackers.make_trackers(["wandb"])


CHANGES = {"num_steps": 4, "eval_every": 2, "checkpoint.every": 1, "log.completions_every": 2, "log.num_groups": 1}
STEPS = {1: {"reward/mean": 0.25, "eval/mean@4": 0.5}, 2: {"reward/mean": 0.5}}
ROW = {"group": 0, "prompt": "1+1=", "completion": "2", "task_reward": 1.0, "reward": 1.0}


@pytest.fixture
def told(tmp_path, monkeypatch):
    """-> a function that runs a tracker through two steps of a run, stops, and goes on for a third."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # mlflow-skinny has no database
    monkeypatch.chdir(tmp_path)
    config = config_of("grpo")
    workdir = tmp_path / "run"
    workdir.mkdir()

    def tell(name):
        for resumed, steps in ((None, STEPS), (2, {3: {"reward/mean": 0.75}})):
            callbacks = Callbacks(trackers.make_trackers([name]))
            callbacks.tell("on_start", config, workdir, resumed)
            for step, metrics in steps.items():
                callbacks.tell("on_step", step, metrics)
                callbacks.tell("on_samples", step, [ROW])
            callbacks.tell("on_save", 2)
            callbacks.tell("on_end", {"steps": 3})
            assert callbacks.num_errors == 0
        return config, workdir

    return tell


def test_tensorboard(told):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, workdir = told("tensorboard")
    events = EventAccumulator(str(workdir / "tensorboard")).Reload().Scalars("reward/mean")
    assert [(each.step, each.value) for each in events] == [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.slow
def test_wandb_offline(told):
    pytest.importorskip("wandb")
    _, workdir = told("wandb")
    runs = sorted((workdir / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and len({run.name.rpartition("-")[2] for run in runs}) == 1, "one run, which was resumed"
    assert all(list(run.glob("*.wandb")) for run in runs)


@pytest.mark.slow
def test_trackio_keeps_a_local_store(told):
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    config, _ = told("trackio")
    (name,) = SQLiteStorage.get_runs(config.log.project)
    logs = SQLiteStorage.get_logs(config.log.project, name)
    points = {each["step"]: each["reward/mean"] for each in logs if "reward/mean" in each}
    assert points == {1: 0.25, 2: 0.5, 3: 0.75}


@pytest.mark.slow
def test_mlflow_keeps_a_local_store(told):
    mlflow = pytest.importorskip("mlflow")
    config, _ = told("mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(config.log.project).experiment_id])
    assert [each.value for each in client.get_metric_history(run.info.run_id, "reward/mean")] == [0.25, 0.5, 0.75]
    assert run.data.metrics["eval/mean_at_4"] == 0.5
    assert run.data.params["rollout.group_size"] == str(config.rollout.group_size)
    assert {each.path for each in client.list_artifacts(run.info.run_id)} == {"samples", "summary.json"}


def test_the_log_tells_of_evaluations_apart(tmp_path):
    notes = Notes()
    log = RunLog(tmp_path, -1, 3, Callbacks([notes]))
    log.metrics(1, STEPS[1])
    log.metrics(2, STEPS[2])
    log.close()
    assert notes.told == [("step", 1, "eval/mean@4"), ("eval", 1), ("step", 2, "reward/mean")]
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert dataclasses.is_dataclass(LogConfig)
