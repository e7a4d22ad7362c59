"""What outlives a run, in $GRPO_JAX_CACHE or else ~/.cache/grpo_jax: a model, compiled programs, the peers' environments."""

from __future__ import annotations

import os
import pathlib


def cache_folder() -> pathlib.Path:
    """Where it lies. Nothing is made."""
    return pathlib.Path(os.environ.get("GRPO_JAX_CACHE") or pathlib.Path.home() / ".cache" / "grpo_jax").expanduser()


def enable_compilation_cache(folder: pathlib.Path) -> None:
    """Programs that one process compiles need not be compiled by the next. JAX_COMPILATION_CACHE_DIR, if set, is where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))


def enable_compilation_cache_on_accelerators() -> None:
    """`enable_compilation_cache` in the cache folder.

    Not on a CPU: its programs may not suit the next machine with the same home.
    """
    import jax

    if jax.default_backend() != "cpu":
        enable_compilation_cache(cache_folder() / "compiled")
