"""Data and functions that a caller in Python brings as objects, put into the workdir as files.

So a run made in Python is one like any other: its config.json names a file of questions and importable functions, and
evaluate, export and a resume find both. brought.json keeps a hash of each, so that a resume with others can say so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.files import note_once, read_json, write_atomically
from grpo_jax.objectives.functions import source_of
from grpo_jax.rewards.reward_function import BROUGHT

FOLDER, MARKS = "brought", "brought.json"
MODULES = f"{BROUGHT}_*.py"
MODULE = '''"""Functions that a run was given in Python; written by grpo_jax, which keeps them beside this file."""

import pathlib

import cloudpickle

globals().update(cloudpickle.loads(pathlib.Path(__file__).with_suffix(".pkl").read_bytes()))
'''
Rewards = str | Callable[..., Any] | Sequence[Any] | Mapping[Any, float]


class Brought:
    """The folder of what was brought to one run or sweep.

    workdir: of the run. Nothing is written before `write`.
    """

    def __init__(self, workdir: pathlib.Path) -> None:
        self._folder = workdir.absolute() / FOLDER
        self._functions: dict[str, Callable[..., Any]] = {}
        self._files: dict[pathlib.Path, str] = {}
        self._marks: dict[str, str] = {}
        # One name for each workdir, since a process may train in several; kept if the workdir is moved.
        kept = sorted(self._folder.glob(MODULES))
        name = f"{BROUGHT}_{hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:8]}"
        self._module = kept[0].stem if kept else name

    def path_of(self, data: Any, name: str) -> str:
        """Return the path of data: as it was given, or of a file that `write` makes of rows.

        Args:
          data: a path, or rows: mappings of what JSON can hold, as a list or a `datasets.Dataset`.
          name: of the argument, for the file and for messages.
        Raises: UserError naming the row that is no mapping or does not fit into JSON.
        """
        if isinstance(data, str | os.PathLike):
            return whole_path(data)
        lines = [_line(row, f"{name}[{number}]") for number, row in enumerate(_rows(data, name))]
        text = "".join(f"{line}\n" for line in lines)
        file = self._folder / f"{name}.jsonl"
        self._files[file] = text
        self._marks[name] = _mark(text)
        return str(file)

    def expression_of(self, rewards: Rewards | None, name: str) -> str:
        """Return a reward expression: that of config.reward.task.

        Args:
          rewards: an expression, a function, a list of these, or a mapping of them to weights. name: of the argument.
        Raises: UserError if one is neither text nor a function.
        """
        if rewards is None:
            return ""
        if isinstance(rewards, Mapping):
            weighted = list(rewards.items())
        elif isinstance(rewards, Sequence) and not isinstance(rewards, str):
            weighted = [(each, 1.0) for each in rewards]
        else:
            weighted = [(rewards, 1.0)]
        if len(weighted) == 1 and isinstance(weighted[0][0], str) and weighted[0][1] == 1:
            return weighted[0][0]
        terms = []
        for each, weight in weighted:
            part = each if isinstance(each, str) else self.name_of(each, name)
            terms.append(f"{'-' if weight < 0 else '+'} {abs(float(weight))!r}*{part}")
        return " ".join(terms).removeprefix("+ ")

    def name_of(self, function: Any, name: str) -> str:
        """Return "module:function" for a function, under which worker processes find it too. name: of the argument."""
        if not callable(function):
            raise UserError(f"{name}: {function!r:.80} is neither a function nor the name of a part")
        importable = _importable_name(function)
        if importable:
            return importable
        own = getattr(function, "__name__", type(function).__name__)
        own = own if own.isidentifier() else f"function_{len(self._functions) + 1}"  # a lambda
        if self._functions.get(own, function) is not function:
            raise UserError(f"{name}: two functions are called {own!r}; rename one")
        self._functions[own] = function
        self._marks[own] = _mark(source_of(function))
        return f"{self._module}:{own}"

    def write(self) -> None:
        """Write the files; in a folder that holds others of an earlier start, say which differ. Raises UserError."""
        if not self._marks:
            return
        try:
            self._write()
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written ({error.strerror}); choose another workdir") from error

    def _write(self) -> None:
        import cloudpickle

        self._folder.mkdir(parents=True, exist_ok=True)
        marks = self._folder / MARKS
        before = read_json(marks) if marks.exists() else {}
        changed = [name for name, mark in self._marks.items() if before.get(name, mark) != mark]
        if changed:
            note_once(f"{self._folder.parent}: goes on with other {', '.join(changed)} than it began with")
        for file, text in self._files.items():
            write_atomically(file, text)
        if self._functions:
            pickled = cloudpickle.dumps(self._functions)
            write_atomically(self._folder / f"{self._module}.pkl", pickled)
            write_atomically(self._folder / f"{self._module}.py", MODULE)
        write_atomically(marks, json.dumps({**before, **self._marks}, indent=2) + "\n")
        find_functions(self._folder.parent)


def find_functions(workdir: pathlib.Path) -> None:
    """Make the functions that were brought to a run importable, in this process and in those it starts."""
    folder = str((workdir / FOLDER).resolve())
    if folder not in sys.path and any((workdir / FOLDER).glob(MODULES)):
        sys.path.append(folder)
    importlib.invalidate_caches()


def whole_path(path: str | os.PathLike[str]) -> str:
    """Return where a file or folder is, whatever folder the run is gone on with from; another name, as of a hub, as it is."""
    return os.path.abspath(path) if os.path.exists(path) else os.fspath(path)


def _rows(data: Any, name: str) -> Iterable[Any]:
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise UserError(f"{name}: expected a path, a list of rows or a dataset, got {type(data).__name__}")
    return data


def _line(row: Any, where: str) -> str:
    """Write a row as JSON."""
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: expected a row with columns, as {{'prompt': ..., 'answer': ...}}, got {row!r:.60}")
    try:
        return json.dumps(dict(row), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {error}; rows are kept as JSON: give text, numbers, lists and dicts") from None


def _importable_name(function: Any) -> str:
    """Return "module:function" if any process with the same path can import it; else ""."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not module or module == "__main__" or not name.isidentifier():
        return ""
    here = sys.modules.get(module)
    is_file = importlib.util.find_spec(module) is not None if here is not None and here.__spec__ else False
    return f"{module}:{name}" if is_file and getattr(here, name, None) is function else ""


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
