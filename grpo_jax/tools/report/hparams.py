"""The runs' settings and results for TensorBoard's HParams tab: tensorboard --logdir=<out>/tensorboard"""

from __future__ import annotations

import pathlib
import shutil
import time
from typing import Any

from grpo_jax.tools.report.analysis import Setting, Study
from grpo_jax.tools.report.runs import Run, differing_fields


def write(study: Study, folder: pathlib.Path) -> None:
    """One session a run, with its seed and the settings that differ; what an earlier report left there is replaced."""
    from tensorboard.plugins.hparams import summary_v2 as plugin

    shutil.rmtree(folder, ignore_errors=True)
    runs = [run for setting in study.settings for run in setting.runs]
    fields = differing_fields(runs)
    names = ["setting", "seed", *fields]
    results = [f"{study.metric} at the end", f"{study.metric} area under curve", "tokens", "seconds"]
    config = plugin.hparams_config_pb([plugin.HParam(name) for name in names], [plugin.Metric(name) for name in results])
    write_events(folder, config, {})
    for setting in study.settings:
        for run, *values in zip(setting.runs, setting.final_N, setting.area_N, strict=True):
            values += run.cost[max(run.cost)]
            session = plugin.hparams_pb(described(run, setting, fields), trial_id=f"{run.name}-seed{run.seed}")
            write_events(folder / f"{run.name}-seed{run.seed}", session, dict(zip(results, values, strict=True)))


def described(run: Run, setting: Setting, fields: list[str]) -> dict[str, Any]:
    """Values as the plugin takes them: numbers, flags and text."""
    values = {field: run.config.get(field) for field in fields}
    plain = {field: value if isinstance(value, int | float | bool | str) else str(value) for field, value in values.items()}
    return {"setting": setting.name, "seed": run.seed, **plain}


def write_events(folder: pathlib.Path, summary: Any, scalars: dict[str, float]) -> None:
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    events: Any = event_pb2  # message classes made at run time, which a type checker cannot see
    summaries: Any = summary_pb2
    values = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    writer = EventFileWriter(str(folder))
    for each in (summary, summaries.Summary(value=values)):
        writer.add_event(events.Event(wall_time=time.time(), step=0, summary=each))
    writer.close()
