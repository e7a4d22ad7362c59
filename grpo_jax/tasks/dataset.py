"""Questions from a Hugging Face dataset: a folder written by `save_to_disk`, or whatever `load_dataset` takes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks.questions import Question, Split, hold_out, question_of


def load(config: TaskConfig, num_eval: int) -> Split:
    """Load the questions of `task.dataset.split`; held out are some of `eval_split` if there is one, else some of `split`.

    Raises UserError naming the field for what cannot be loaded, and the row for what is not a question.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError("config.task.name = 'dataset' needs the datasets library: pip install 'grpo_jax[tasks]'")
    data = config.dataset
    questions = _load_questions(config, data.split)
    others = None
    if data.eval_split:
        others = _load_questions(config, data.eval_split)
    return hold_out(questions, others, num_eval, f"{data.path} ({data.split})")


def _load_questions(config: TaskConfig, name: str) -> list[Question]:
    path = config.dataset.path
    rows = _load_from_disk(path, name) if _is_saved(path) else _load_from_anywhere(path, config.dataset.subset, name)
    return [question_of(row, config.columns, f"{path} ({name}), row {number}") for number, row in enumerate(rows)]


def _is_saved(path: str) -> bool:
    """Tell if `save_to_disk` wrote the folder: of one table, or of several splits."""
    folder = Path(path).expanduser()
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _load_from_disk(path: str, name: str) -> Any:
    """Load a split of a folder that `save_to_disk` wrote. A folder that holds one table without splits is called "train"."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(Path(path).expanduser()))
    except Exception as error:  # whatever pyarrow says about broken files
        raise UserError(f"config.task.dataset.path = {path!r}: cannot load it: {_line(error)}") from error
    splits = saved
    if not isinstance(saved, datasets.DatasetDict):
        splits = {"train": saved}
    if name not in splits:
        raise UserError(f"config.task.dataset.path = {path!r}: no split {name!r}, only {', '.join(map(str, splits))}")
    return splits[name]


def _load_from_anywhere(path: str, subset: str, name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(path, subset or None, split=name)
    except Exception as error:  # missing, offline, no such subset or split: the library's own words say which
        field = "config.task.dataset"
        raise UserError(f"{field}.path = {path!r}, subset = {subset!r}, split = {name!r}: {_line(error)}") from error


def _line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
