"""Questions from a Hugging Face dataset: a folder written by `save_to_disk`, what `load_dataset` takes, or data files."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks.files import Row, is_files
from grpo_jax.tasks.jsonl import load_files
from grpo_jax.tasks.questions import Source, source_of
from grpo_jax.tasks.row_rewards import RowRewards

FIELD = "config.task.dataset"


def load(config: TaskConfig, num_eval: int, rewards: RowRewards) -> list[Source]:
    """Load the questions of `task.dataset.split`, and those of `eval_split` or `eval_path` if there is one.

    Args:
      config: config.task. num_eval: questions to hold out. rewards: what each row is scored by.
    Returns: one source.
    Raises: UserError naming the field for what cannot be loaded, and the row for what is not a question.
    """
    data = config.dataset
    if not data.path.strip():
        raise UserError(f"{FIELD}.path is empty: name a folder, a dataset of the hub, or data files")
    if is_files(data.path):
        _check_no_splits(config)
        return [load_files(config, data.path, data.eval_path, num_eval, FIELD, rewards)]
    if importlib.util.find_spec("datasets") is None:
        raise UserError("config.task.name = 'dataset' needs the datasets library: pip install 'grpo_jax[tasks]'")
    rows, eval_rows = _rows(config, data.path, data.split), None
    if data.eval_split or data.eval_path:
        eval_rows = _rows(config, data.eval_path or data.path, data.eval_split or data.split)
    return [source_of(rows, eval_rows, config.columns, rewards, num_eval, f"{data.path} ({data.split})")]


def _check_no_splits(config: TaskConfig) -> None:
    """Check that nothing is asked of data files that only a dataset has."""
    data = config.dataset
    if data.eval_split:
        raise UserError(
            f"{FIELD}.eval_split = {data.eval_split!r}: {data.path!r} names files, which have no splits; "
            f"give the held-out ones in {FIELD}.eval_path"
        )
    if data.split != "train" or data.subset:
        raise UserError(f"{FIELD}.split = {data.split!r}, subset = {data.subset!r}: {data.path!r} names files, which have none")


def _rows(config: TaskConfig, path: str, name: str) -> Iterator[Row]:
    """Yield the rows of a split, each with its place."""
    rows = _load_from_disk(path, name) if _is_saved(path) else _load_from_anywhere(path, config.dataset.subset, name)
    for number, row in enumerate(rows):
        yield row, f"{path} ({name}), row {number}"


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
        raise UserError(f"config.task.dataset.path = {path!r}: cannot load it: {causes(error)}") from error
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
        raise UserError(f"{field}.path = {path!r}, subset = {subset!r}, split = {name!r}: {causes(error)}") from error


def causes(error: BaseException) -> str:
    """Write an exception and what caused it, each in one line."""
    # datasets says "An error occurred while generating the dataset", and the file and line only in the cause.
    said: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = " ".join(str(current).split()) or type(current).__name__
        if text not in " ".join(said):
            said.append(text)
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return "; ".join(said)
