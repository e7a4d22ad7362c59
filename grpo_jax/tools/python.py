"""The front door for Python: train, sweep, report, show. `grpo_jax.train` and its neighbours are these; docs/python.md."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.config import Config, parse_config
from grpo_jax.errors import UserError
from grpo_jax.tools import cli, notebook
from grpo_jax.tools import export as export_command
from grpo_jax.tools.advantages import EXAMPLE, FIVE, draw
from grpo_jax.tools.report import document, figures, files
from grpo_jax.tools.report.analysis import Study, analyse
from grpo_jax.tools.report.runs import load
from grpo_jax.tools.report.verdict import verdict
from grpo_jax.tools.show import command as show_command
from grpo_jax.tools.sweep import plan
from grpo_jax.tools.sweep.run import run_sweep
from grpo_jax.training import trainer
from grpo_jax.training.brought import Brought, Rewards, whole_path
from grpo_jax.training.data_record import pin_template_date
from grpo_jax.training.run import make_run
from grpo_jax.training.runlog import read_completions, read_metrics
from grpo_jax.training.settings import Start

Folder = str | os.PathLike[str]
MAX_SHARD_BYTES = 5 * 10**9


@dataclasses.dataclass(frozen=True)
class Trained:
    """A run that has ended. In a notebook it shows itself: before and after, and the learning curve."""

    workdir: pathlib.Path
    config: Config
    summary: Mapping[str, Any]

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The records of metrics.jsonl: a dict a step, `step` and each metric by its name."""
        return read_metrics(self.workdir)

    @property
    def completions(self) -> list[dict[str, Any]]:
        """The sampled completions of completions.jsonl, with reward, and entropy and advantage of each token."""
        return read_completions(self.workdir)

    def answers(self, num: int = 8) -> notebook.Comparison:
        """Let the weights before and after training answer the first held-out questions, greedily.

        num: how many questions. Returns: question, answer and reward of both, which a notebook shows as a table.
        """
        run = make_run(self.config)
        try:
            before = notebook.greedy_answers(run, run.initial_state().policy)
            _, policy = cli.restore_policy(run, self.workdir, None)
            after = notebook.greedy_answers(run, policy)
        finally:
            run.task.close()
        return notebook.Comparison(before[:num], after[:num])

    def export(self, out: Folder, *, adapter: bool = False, dtype: str | None = None) -> pathlib.Path:
        """Write the newest checkpoint as a Hugging Face folder, which transformers and vLLM load.

        Args:
          out: folder to write; absent or empty. adapter: of a LoRA run, the adapters alone, as `peft` loads them.
          dtype: of the weights; None: that of the model training began from.
        Returns: the folder.
        Raises: UserError if there is nothing to export, or `out` holds something.
        """
        export_command.export(str(self.workdir), os.fspath(out), None, dtype, MAX_SHARD_BYTES, is_adapter=adapter)
        return pathlib.Path(out)

    def _repr_html_(self) -> str:
        before, after = (self.summary.get(f"success_{when}") for when in ("before", "after"))
        said = f"{self.workdir}: {self.summary['steps']} steps, held-out success {_number(before)} to {_number(after)}"
        return notebook.with_pictures(said, [self.workdir / "learning_curve.png"])


@dataclasses.dataclass(frozen=True)
class Swept:
    """A sweep that has ended. status: folder of each run -> how it ended. errors: folder -> why it failed."""

    workdir: pathlib.Path
    status: Mapping[str, str]
    errors: Mapping[str, str]

    def report(self, metric: str = "eval/success", baseline: str | None = None) -> Report:
        """Compare the runs, as `report`."""
        return report(self.workdir, metric=metric, baseline=baseline)


@dataclasses.dataclass(frozen=True)
class Report:
    """A comparison of finished runs. In a notebook it shows verdict, table and pictures.

    verdict: sentences that claim no more than was shown. table: Markdown. pictures: name -> PNG. folder: of all its files.
    """

    verdict: Sequence[str]
    table: str
    pictures: Mapping[str, bytes]
    folder: pathlib.Path
    study: Study

    def _repr_html_(self) -> str:
        return notebook.report_html(self.verdict, self.table, self.pictures)


@dataclasses.dataclass(frozen=True)
class Page:
    """An HTML page of runs, which a notebook shows in a frame."""

    path: pathlib.Path

    def _repr_html_(self) -> str:
        return str(notebook.framed(self.path).data)


def train(
    variant: str = "grpo",
    *,
    workdir: Folder,
    model: Folder | None = None,
    data: Any = None,
    eval_data: Any = None,
    reward: Rewards | None = None,
    shaping: Rewards | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
    allow_changes: Sequence[str] = (),
) -> Trained:
    """Train, or go on in a workdir where the same run was left.

    Args:
      variant: of the objective ("grpo", "gtpo", ...), or a config as --config takes it ("dapo:tiny", "my/dapo.py:tiny").
      workdir: folder of the run.
      model: Hugging Face folder or hub id; None: the small built-in decoder.
      data: questions: a path as task.dataset.path takes it, a list of rows, or a `datasets.Dataset`; None: sums.
      eval_data: held-out ones; None: some of `data`.
      reward: what decides success: a function, a name or expression ("math_verify"), a list, or a mapping to weights.
      shaping: the same, only added to what the advantage sees.
      settings: any other field of the config by its dotted name, {"rollout.group_size": 8}; `grpo-jax fields` lists them.
      callbacks: objects with methods of `grpo_jax.training.callbacks.Callback`.
      allow_changes: fields that may differ from those that the workdir's run began with.
    Returns: the run: summary, metrics, completions.
    Raises: UserError on bad input, in one line that names the field and the fix; RunError if the run cannot go on.
    """
    cli.quiet_other_libraries()
    folder = pathlib.Path(workdir)
    brought = Brought(folder)
    name = variant if ":" in variant or variant.endswith(".py") else f"{variant}:{_scale(model)}"
    raw = cli.load_config(name, "variant")
    changes = {**brought_changes(brought, model, data, eval_data, reward, shaping), **(settings or {})}
    raw.seed = changes.pop("seed", raw.seed)
    config = pin_template_date(plan.apply_changes(raw.to_dict(), changes, "settings"), [folder])
    brought.write()
    summary = trainer.train(config, folder, Start(allowed_changes=allow_changes), callbacks=callbacks)
    return Trained(folder, config, summary or {"steps": config.num_steps})


def sweep(
    configs: Sequence[str] = FIVE,
    *,
    workdir: Folder,
    seeds: Sequence[int] = tuple(range(8)),
    sets: Mapping[str, Mapping[str, Any]] | None = None,
    more_sets: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    scale: str | None = None,
    model: Folder | None = None,
    data: Any = None,
    eval_data: Any = None,
    reward: Rewards | None = None,
    shaping: Rewards | None = None,
    settings: Mapping[str, Any] | None = None,
    num_processes: int = 0,
    cohort_size: int = 1,
) -> Swept:
    """Train every config x set of changes x seed, several at a time; the same call goes on where it was left.

    Args:
      configs: variants, or configs as `train` takes them, without a scale. workdir: of the sweep.
      seeds: of each setting; fewer than eight show hardly any difference.
      sets: name -> changes, {"": {}, "no_kl": {"objective.kl_coef": 0.0}}; None: the configs as they are.
      more_sets: config -> sets of its own, beside those.
      scale: of the configs; None: "llm" with a model, else "tiny".
      model, data, eval_data, reward, shaping, settings: of all runs, as in `train`.
      num_processes: runs at a time; 0: one a processor core, one in all on an accelerator.
      cohort_size: runs that one vmapped call advances, whatever their objectives; 0: all that may share one.
    Returns: how each run ended; `.report()` compares them.
    Raises: UserError on bad input, before anything is written.
    """
    cli.quiet_other_libraries()
    folder = pathlib.Path(workdir)
    brought = Brought(folder)
    changes = {**brought_changes(brought, model, data, eval_data, reward, shaping), **(settings or {})}
    wanted = plan.Sweep(
        scale or _scale(model),
        tuple(configs),
        dict(sets or {"": {}}),
        dict(more_sets or {}),
        tuple(seeds),
        num_processes,
        cohort_size,
    )
    brought.write()
    board = run_sweep(wanted, folder, changes)
    return Swept(folder, dict(board.status), dict(board.errors))


def report(
    folders: Folder | Sequence[Folder], metric: str = "eval/success", baseline: str | None = None, out: Folder | None = None
) -> Report:
    """Compare finished runs, and write the report's files.

    Args:
      folders: of a sweep, or of finished runs. metric: what is compared; more is better.
      baseline: setting that the others are compared with; None: grpo, or else the first.
      out: folder to write; None: report in the first folder.
    Returns: verdict, table and pictures.
    Raises: UserError if there is nothing to compare.
    """
    paths = [pathlib.Path(each) for each in _listed(folders)]
    study = analyse(*load(paths, metric), metric, baseline)
    folder = pathlib.Path(out) if out else paths[0] / "report"
    files.write(study, folder, "grpo_jax.report(...)")
    return Report(verdict(study), document.main_table(study), figures.draw(study), folder, study)


def show(folders: Folder | Sequence[Folder], out: Folder | None = None) -> Page:
    """Write the page of one or several runs: health checks, curves, sampled groups token by token.

    folders: of runs, also of one under way. out: the file; None: show.html in the first folder. Raises UserError.
    """
    return Page(show_command.show([pathlib.Path(each) for each in _listed(folders)], pathlib.Path(out) if out else None))


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, which a notebook shows."""

    png: bytes

    def _repr_png_(self) -> bytes:
        return self.png


def draw_advantages(variants: Sequence[str] = FIVE) -> Picture:
    """Draw what variants make of one small group of completions, a cell for each token. Raises UserError on an unknown one."""
    return Picture(draw(EXAMPLE, variants))


def brought_changes(
    brought: Brought, model: Folder | None, data: Any, eval_data: Any, reward: Rewards | None, shaping: Rewards | None
) -> dict[str, Any]:
    """Return the fields of the config that `train`'s arguments of the same names stand for."""
    changes: dict[str, Any] = {}
    if model is not None:
        changes["model.path"] = whole_path(model)
    if eval_data is not None and data is None:
        raise UserError("eval_data: held-out questions of which data? give data too")
    if data is not None:
        changes["task.name"] = "dataset"
        changes["task.dataset.path"] = brought.path_of(data, "data")
        changes["warm_start.num_steps"] = 0
    if eval_data is not None:
        changes["task.dataset.eval_path"] = brought.path_of(eval_data, "eval_data")
    for field, rewards in (("reward.task", reward), ("reward.shaping", shaping)):
        if rewards is not None:
            changes[field] = brought.expression_of(rewards, field.rpartition(".")[2])
    return changes


def _scale(model: Folder | None) -> str:
    return "llm" if model is not None else "tiny"


def _listed(folders: Folder | Sequence[Folder]) -> Sequence[Folder]:
    return [folders] if isinstance(folders, str | os.PathLike) else folders


def _number(x: float | None) -> str:
    return "unknown" if x is None else f"{x:.3f}"


__all__ = ["Config", "Page", "Report", "Swept", "Trained", "parse_config", "report", "show", "sweep", "train"]
