"""Traces of some steps for TensorBoard's profiler."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from typing import Any

import jax


@dataclasses.dataclass
class Profiler:
    """Traces the calls that end with one of `steps`, each by itself."""

    folder: pathlib.Path
    steps: range | None

    def __call__(self, step: int) -> contextlib.AbstractContextManager[Any]:
        is_traced = self.steps is not None and step in self.steps
        return jax.profiler.trace(str(self.folder)) if is_traced else contextlib.nullcontext()
