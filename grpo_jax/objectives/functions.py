"""A function of one's own where an axis names a choice: `module:function` from a config, or the function itself.

It is found once, when the objective is checked: then everything that can be wrong with it is said in one line.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from grpo_jax.imports import import_name

Function = Callable[..., Any]
Choice = str | Function

# Field -> what its function is given, in this order. `obj` is the Objective, with `obj.params`.
SIGNATURES: Mapping[str, tuple[str, ...]] = {
    "advantage": ("obj", "groups"),
    "ratio": ("obj", "log_ratio_BT", "mask_BT"),
    "surrogate": ("obj", "terms"),
    "kl_estimator": ("obj", "logp_BT", "ref_logp_BT", "mask_BT"),
    "aggregation": ("obj", "mask_BT", "max_completion_length"),
    "row_filter": ("obj", "groups"),
    "token_filter": ("obj", "tokens"),
}


def find(field: str, choice: Choice, table: Mapping[str, Function], others: tuple[str, ...] = ()) -> Function:
    """Return the function that a field of an objective means.

    Args:
      field: name of the axis, a key of SIGNATURES. choice: a key of the table, "module:function", or a function.
      table: the functions that the axis knows by name. others: names that mean none of them, for the message.
    Raises: ValueError naming the field, what is missing, and the signature that the function must have.
    """
    if not isinstance(choice, str):
        return _checked(field, choice)
    if choice in table:
        return table[choice]
    if ":" in choice:
        return _load(field, choice)
    raise ValueError(f"objective.{field} = {choice!r}: unknown; known: {', '.join((*others, *table))}, and module:function")


def name_of(choice: Choice) -> str:
    """Name a choice as a config writes it: a function is "module:function"."""
    if isinstance(choice, str):
        return choice
    return f"{choice.__module__}:{getattr(choice, '__qualname__', type(choice).__qualname__)}"


def source_hash(field: str, choice: Choice) -> str:
    """Return the sha256, in hex, of the file that a function of one's own stands in.

    Args:
      field, choice: as `find` takes them; no choice of a table.
    Returns: the hash; of the function's own source or code where there is no file (a notebook's cell, an interpreter's line).
    """
    function = inspect.unwrap(find(field, choice, {}))
    if not inspect.isroutine(function):
        function = type(function)
    try:
        file = pathlib.Path(inspect.getsourcefile(function) or "")
    except TypeError:
        file = pathlib.Path()
    if file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return hashlib.sha256(source_of(function).encode()).hexdigest()


def source_of(function: Any) -> str:
    """Return the source of a function without a file, or what its compiled code does where the source is gone too."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        if code:
            return repr((code.co_code, code.co_consts, code.co_names))
        # An object's own repr has its address in it, which is another one in each process.
        return repr(function if inspect.isroutine(function) or inspect.isclass(function) else type(function))


@functools.cache
def _load(field: str, choice: str) -> Function:
    """Import "module:function". Raises ValueError with the signature that it must have."""
    try:
        function = import_name(choice)
    except ImportError as error:
        raise ValueError(f"objective.{field} = {choice!r}: {error}; it must be a function {signature(field)}") from error
    return _checked(field, function, choice)


def _checked(field: str, function: Any, choice: str = "") -> Function:
    """Return the function if it can be called as its axis calls it."""
    choice = choice or name_of(function)
    if not callable(function):
        raise ValueError(f"objective.{field} = {choice!r}: not a function; it must be one {signature(field)}")
    try:
        inspect.signature(function).bind(*SIGNATURES[field])
    except TypeError as error:
        raise ValueError(
            f"objective.{field} = {choice!r}: cannot be called with {signature(field)}, {error}; it must be a function of these"
        ) from None
    except ValueError:  # a builtin, whose signature Python does not know
        pass
    return function


def signature(field: str) -> str:
    """Write the parameters that a field's function must take: "(obj, groups)"."""
    return f"({', '.join(SIGNATURES[field])})"
