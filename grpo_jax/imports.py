"""Things of a user's own that a config names: "module:name"."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def is_import(choice: Any) -> bool:
    """Tell if a value is written like "module:name"."""
    module, _, name = choice.partition(":") if isinstance(choice, str) else ("", "", "")
    return all(part.isidentifier() for part in (*module.split("."), *name.split(".")))


def import_name(choice: str) -> Any:
    """Import "module:name". The module may lie in the working directory, wherever the program was started from.

    Args:
      choice: as `is_import` has it.
    Returns: what stands there.
    Raises: ImportError, whose text is the end of a sentence that begins with the field and its value.
    """
    module_name, _, name = choice.partition(":")
    # A console script has its own folder on the path, and not the one that it is called in.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(f"no module {error.name!r} here or installed") from None
    except Exception as error:  # whatever a user's module raises while it is imported
        raise ImportError(f"importing module {module_name!r} failed, {type(error).__name__}: {error}") from error
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise ImportError(f"module {module_name!r} has no {name!r}")
    return found
