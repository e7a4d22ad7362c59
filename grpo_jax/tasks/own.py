"""Questions from a function of one's own: config.task.name = "module:function"."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.imports import import_name
from grpo_jax.tasks.files import Row
from grpo_jax.tasks.questions import Source, source_of
from grpo_jax.tasks.row_rewards import RowRewards

SPLITS = ("train", "eval")


def load(config: TaskConfig, num_eval: int, rewards: RowRewards) -> list[Source]:
    """Call the function that config.task.name names, with the settings of config.task.params.

    It returns rows, {"prompt": ..., "answer": ...}, as a list, a generator that ends or a `datasets.Dataset`; or {"train":
    rows, "eval": rows}, where without "eval" some of the rows are held out. It must return the same in every process.

    Args:
      config: config.task. num_eval: questions to hold out. rewards: what each row is scored by.
    Returns: one source.
    Raises: UserError naming the function and what is wrong with it, its settings, or a row.
    """
    field = f"config.task.name = {config.name!r}"
    splits = _splits(_call(config, field), field)
    rows, eval_rows = _rows(splits["train"], f"{config.name} train", field), None
    if "eval" in splits:
        eval_rows = _rows(splits["eval"], f"{config.name} eval", field)
    return [source_of(rows, eval_rows, config.columns, rewards, num_eval, config.name)]


def _call(config: TaskConfig, field: str) -> Any:
    try:
        function = import_name(config.name)
    except ImportError as error:
        raise UserError(f"{field}: {error}") from error
    if not callable(function):
        raise UserError(f"{field}: not a function; it must be one that returns rows")
    try:
        inspect.signature(function).bind(**config.params)
    except TypeError as error:
        given = ", ".join(config.params) or "none"
        raise UserError(f"{field}: {error}; its settings are those of config.task.params, now {given}") from None
    except ValueError:  # a builtin, whose signature Python does not know
        pass
    try:
        return function(**config.params)
    except Exception as error:  # whatever a user's function raises
        raise UserError(f"{field}: it raised {type(error).__name__}: {error}") from error


def _splits(returned: Any, field: str) -> Mapping[str, Any]:
    if not isinstance(returned, Mapping):
        return {"train": returned}
    unknown = sorted(set(map(str, returned)) - set(SPLITS))
    if unknown or "train" not in returned:
        raise UserError(f'{field}: it returned a mapping of {", ".join(map(str, returned))}; {{"train": rows, "eval": rows}}')
    return returned


def _rows(rows: Any, where: str, field: str) -> Iterator[Row]:
    """Yield rows, each with its place."""
    if isinstance(rows, str | bytes) or not isinstance(rows, Iterable):
        raise UserError(f"{field}: it returned {type(rows).__name__}, not rows: a list of mappings with prompt and answer")
    number = -1
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(f"{field}: {where}[{number}] is {type(row).__name__}, not a row: a mapping with prompt and answer")
        yield dict(row), f"{where}[{number}]"
    if number < 0:
        raise UserError(f"{field}: it returned no rows ({where})")
