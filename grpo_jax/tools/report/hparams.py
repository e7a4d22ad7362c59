"""Settings and results of the runs for TensorBoard's HParams tab: tensorboard --logdir=<out>/tensorboard"""

from __future__ import annotations

import pathlib
import shutil
import time
from typing import Any

from grpo_jax.tools.report.analysis import Setting, Study
from grpo_jax.tools.report.runs import Run, differing_fields


def write(study: Study, folder: pathlib.Path) -> None:
    """Write one session a run, with its seed and the settings that differ."""
    from tensorboard.plugins.hparams import summary_v2 as plugin

    # Event files are named by the time: an earlier report's would stay beside the new ones and be shown as more runs.
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
            session = plugin.hparams_pb(describe_run(run, setting, fields), trial_id=f"{run.name}-seed{run.seed}")
            write_events(folder / f"{run.name}-seed{run.seed}", session, dict(zip(results, values, strict=True)))


def describe_run(run: Run, setting: Setting, fields: list[str]) -> dict[str, Any]:
    """Collect a run's settings as the plugin takes them.

    Args:
      run: of which the values are.
      setting: it belongs to.
      fields: of the config that differ between runs.
    Returns: name -> number, flag or text.
    """
    values = {field: to_hparam(run.config.get(field)) for field in fields}
    return {"setting": setting.name, "seed": run.seed, **values}


def to_hparam(value: Any) -> int | float | bool | str:
    """Return numbers, flags and text as they are, anything else (lists, null) as text: the plugin knows no other kind."""
    if isinstance(value, int | float | bool | str):
        return value
    return str(value)


def write_events(folder: pathlib.Path, summary: Any, scalars: dict[str, float]) -> None:
    """Write one event file.

    Args:
      folder: of the session.
      summary: the plugin's message, which makes the folder a session (or, in the root, lists the columns).
      scalars: name -> value at step 0.
    """
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    events: Any = event_pb2  # message classes made at run time, which a type checker cannot see
    summaries: Any = summary_pb2
    values = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
    writer = EventFileWriter(str(folder))
    for each in (summary, summaries.Summary(value=values)):
        writer.add_event(events.Event(wall_time=time.time(), step=0, summary=each))
    writer.close()
