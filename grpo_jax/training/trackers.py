"""Experiment trackers as callbacks: TensorBoard, Weights & Biases, Trackio, MLflow. Each is the library itself, and optional.

All get the same: the config, every metric under its name in metrics.jsonl, sampled groups, and the learning curve at the
end. Their own offline modes work: WANDB_MODE=offline, Trackio's store in TRACKIO_DIR, MLflow's MLFLOW_TRACKING_URI.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from grpo_jax.config import Config, LogConfig
from grpo_jax.errors import UserError
from grpo_jax.training.callbacks import Callback, Callbacks, load_callback, require_callback

SAMPLE_COLUMNS = ("step", "group", "prompt", "completion", "task_reward", "reward")
_EVENTS: Any = event_pb2  # message classes made at run time, which a type checker cannot see
_SUMMARIES: Any = summary_pb2


class TensorBoard(Callback):
    """Event files in <workdir>/tensorboard."""

    def on_start(self, config: Config, workdir: pathlib.Path, step: int | None) -> None:
        """Open a file."""
        self._events = EventFileWriter(str(workdir / "tensorboard"))
        # An event file cannot be truncated; this event tells TensorBoard to drop the points of earlier files from its step on.
        restart = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
        self._events.add_event(_EVENTS.Event(wall_time=time.time(), step=0 if step is None else step + 1, session_log=restart))

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a point on each curve."""
        values = [_SUMMARIES.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._events.add_event(_EVENTS.Event(wall_time=time.time(), step=step, summary=_SUMMARIES.Summary(value=values)))

    def on_save(self, step: int) -> None:
        """Put the points on disk."""
        self._events.flush()

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Close the file."""
        self._events.close()


class Wandb(Callback):
    """Weights & Biases. A run that is resumed goes on under its id, which the workdir keeps."""

    def on_start(self, config: Config, workdir: pathlib.Path, step: int | None) -> None:
        """Begin the run, or go on with it."""
        import wandb

        self._wandb, self._workdir = wandb, workdir
        self._run = wandb.init(
            project=config.log.project,
            name=workdir.name,
            id=run_id(workdir, "wandb"),
            resume="allow",
            dir=str(workdir),
            config=config.to_dict(),
            reinit="create_new",  # several runs of a sweep may be in one process
            settings=wandb.Settings(silent=True),
        )

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics."""
        self._run.log(dict(metrics), step=step)

    def on_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table of the sampled groups."""
        self._run.log({"samples": self._wandb.Table(columns=list(SAMPLE_COLUMNS), data=sample_table(step, rows))})

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Log the summary and the learning curve, and end the run."""
        self._run.summary.update(dict(summary))
        curve = self._workdir / "learning_curve.png"
        if curve.exists():
            self._run.log({"learning_curve": self._wandb.Image(str(curve))})
        self._run.finish()


class Trackio(Callback):
    """Trackio, whose store is local unless it is told of a Space."""

    def on_start(self, config: Config, workdir: pathlib.Path, step: int | None) -> None:
        """Begin the run, or go on with it."""
        import trackio

        self._trackio, self._workdir = trackio, workdir
        name = f"{workdir.name}-{run_id(workdir, 'trackio')}"
        # The run itself is asked, and not the module, which knows one run at a time: several of a sweep may be in one process.
        self._run = trackio.init(project=config.log.project, name=name, config=config.to_dict(), resume="allow", embed=False)

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics."""
        self._run.log(dict(metrics), step=step)

    def on_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Log a table of the sampled groups."""
        import pandas

        table = pandas.DataFrame(sample_table(step, rows), columns=list(SAMPLE_COLUMNS))
        self._run.log({"samples": self._trackio.Table(dataframe=table)}, step=step)

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Log the learning curve, and end the run."""
        curve = self._workdir / "learning_curve.png"
        if curve.exists():
            self._run.log({"learning_curve": self._trackio.Image(str(curve))})
        self._run.finish()


class Mlflow(Callback):
    """MLflow: parameters, metrics, and as artifacts what was sampled and the learning curve."""

    def on_start(self, config: Config, workdir: pathlib.Path, step: int | None) -> None:
        """Begin the run, or go on with it."""
        import mlflow

        self._mlflow, self._workdir = mlflow, workdir
        self._client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(config.log.project).experiment_id
        tag = run_id(workdir, "mlflow")
        found = self._client.search_runs([experiment], f"tags.grpo_jax_id = '{tag}'")
        if found:
            self._run_id = found[0].info.run_id
            return
        run = self._client.create_run(experiment, run_name=workdir.name, tags={"grpo_jax_id": tag})
        self._run_id = run.info.run_id
        for name, value in flatten(config.to_dict()).items():
            self._client.log_param(self._run_id, name, str(value)[:500])

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics."""
        now = int(time.time() * 1000)
        entities = self._mlflow.entities
        # MLflow's names have no @, which eval/mean@4 has.
        logged = [entities.Metric(name.replace("@", "_at_"), value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=logged)

    def on_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keep the sampled groups as a JSON artifact."""
        table = [dict(zip(SAMPLE_COLUMNS, row, strict=True)) for row in sample_table(step, rows)]
        self._client.log_dict(self._run_id, {"rows": table}, f"samples/step-{step}.json")

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """Keep summary and learning curve, and end the run."""
        self._client.log_dict(self._run_id, dict(summary), "summary.json")
        curve = self._workdir / "learning_curve.png"
        if curve.exists():
            self._client.log_artifact(self._run_id, str(curve))
        self._client.set_terminated(self._run_id)


CLASSES = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}


def make_callbacks(config: LogConfig, given: Sequence[Any]) -> Callbacks:
    """Make the trackers and callbacks of a run.

    Args:
      config: config.log. given: objects, beside those that config.log names.
    Returns: all of them.
    Raises: UserError naming a library that is missing, or a class that cannot be made.
    """
    field = "config.log.callbacks"
    own = [load_callback(name, field) for name in config.callbacks]
    for callback in (*own, *given):
        require_callback(callback, field)
    return Callbacks([*make_trackers(config.trackers), *own, *given])


def make_trackers(names: Sequence[str]) -> list[Callback]:
    """Make the trackers of log.trackers. Raises UserError naming a library that is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"config.log.trackers: {name!r} needs a library: pip install 'grpo_jax[trackers]'")
    return [CLASSES[name]() for name in names]


def run_id(workdir: pathlib.Path, tracker: str) -> str:
    """Return the id by which a tracker knows this run, which the workdir keeps: a resumed run is the same one."""
    file = workdir / f".{tracker}_id"
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:8] + os.linesep)
    return file.read_text().strip()


def sample_table(step: int, rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Return the rows of completions.jsonl as a table of SAMPLE_COLUMNS."""
    return [[{"step": step, **row}.get(name) for name in SAMPLE_COLUMNS] for row in rows]


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
