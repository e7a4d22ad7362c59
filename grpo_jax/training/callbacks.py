"""Objects that are told what happens in a run: trackers, and those of a user. None can stop or break it by accident."""

from __future__ import annotations

import pathlib
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.imports import import_name, is_import


class StopTraining(Exception):  # noqa: N818, it is a wish and no error
    """Raised by a callback to end the run as a SIGTERM does: the step under way is finished and saved."""


class Callback:
    """Base of callbacks; a class of one's own may leave out what it does not need, and need not derive from this.

    Called in the process that writes the records, between compiled calls. Metrics come when their record is written, which
    is one call late. Numbers are Python floats, rows those of completions.jsonl.
    """

    def on_start(self, config: Config, workdir: pathlib.Path, step: int | None) -> None:
        """Before the first step. step: of the checkpoint that the run goes on from; None: it begins."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each step. metrics: name -> number, as in metrics.jsonl."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """After a held-out evaluation. metrics: those of `eval/`."""

    def on_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """When sampled groups are recorded. rows: a completion each, as in completions.jsonl."""

    def on_save(self, step: int) -> None:
        """After a checkpoint was handed over to be written."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """After the last step, or a stop. summary: as in summary.json."""


class Callbacks:
    """Tells a list of callbacks. One that raises is reported, its further failures of the same kind are only counted.

    callbacks: objects with some of the methods of `Callback`.
    """

    def __init__(self, callbacks: Sequence[Any]):
        self._callbacks = list(callbacks)
        self.num_errors = 0
        self.is_stop_asked = False
        self._left_out: set[int] = set()
        self._reported: set[tuple[int, str]] = set()

    def tell(self, method: str, *args: Any) -> None:
        """Call a method of all callbacks that have it."""
        for number, callback in enumerate(self._callbacks):
            call = getattr(callback, method, None)
            if call is None or number in self._left_out:
                continue
            try:
                call(*args)
            except StopTraining as wish:
                self.is_stop_asked = True
                print(f"{name_of(callback)}.{method} ends the run: {wish}", file=sys.stderr)
            except Exception as error:
                # Training for days must not end because a dashboard is away. The first failure is shown whole, for it is most
                # often a mistake in the user's own lines.
                self.num_errors += 1
                if (number, method) not in self._reported:
                    self._reported.add((number, method))
                    traceback.print_exc()
                    said = f"{name_of(callback)}.{method} failed ({type(error).__name__}); the run goes on"
                    then = "further failures of it are only counted"
                    if method == "on_start":  # what it would have opened, all its other methods need
                        self._left_out.add(number)
                        then = "without it"
                    print(f"warning: {said}, {then}", file=sys.stderr)


def load_callback(name: str, field: str) -> Any:
    """Make the callback that "module:Class" names, without arguments. field: where it was named, for the message.

    Raises: UserError if it cannot be imported or made.
    """
    if not is_import(name):
        raise UserError(f"{field} = {name!r}: expected module:Class")
    try:
        made = import_name(name)()
    except ImportError as error:
        raise UserError(f"{field} = {name!r}: {error}") from error
    except Exception as error:
        raise UserError(f"{field} = {name!r}: cannot be made: {type(error).__name__}: {error}") from error
    require_callback(made, field)
    return made


def require_callback(callback: Any, field: str) -> None:
    """Check that an object has a method that is ever called. Raises UserError."""
    methods = [name for name in vars(Callback) if name.startswith("on_")]
    if not any(callable(getattr(callback, name, None)) for name in methods):
        raise UserError(f"{field}: {name_of(callback)} has none of {', '.join(methods)}")
    unknown = [name for name in dir(callback) if name.startswith("on_") and name not in methods]
    if unknown:
        raise UserError(f"{field}: {name_of(callback)}.{unknown[0]} is never called; there are {', '.join(methods)}")


def name_of(callback: Any) -> str:
    """Return the name of a callback's class."""
    return type(callback).__name__
