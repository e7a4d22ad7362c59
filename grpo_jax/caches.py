"""Files that outlive a run, in $GRPO_JAX_CACHE or else ~/.cache/grpo_jax: models, compiled programs, peers' environments."""

from __future__ import annotations

import os
import pathlib


def cache_folder() -> pathlib.Path:
    """Return the folder's path, which may not exist yet."""
    return pathlib.Path(os.environ.get("GRPO_JAX_CACHE") or pathlib.Path.home() / ".cache" / "grpo_jax").expanduser()


def enable_compilation_cache(folder: pathlib.Path) -> None:
    """Keep compiled programs in a folder, so that the next process need not compile them again.

    JAX_COMPILATION_CACHE_DIR, if set, goes before `folder`.
    """
    import jax  # seconds, and some callers of this module never need it

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))


def enable_compilation_cache_on_accelerators() -> None:
    """Call `enable_compilation_cache` in the cache folder, but not on a CPU."""
    import jax

    # A CPU's programs use the instructions of the machine that compiled them, and a home may be shared with another machine.
    if jax.default_backend() != "cpu":
        enable_compilation_cache(cache_folder() / "compiled")
