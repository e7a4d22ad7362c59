"""A model's folder: where it is, what its files are called, JSON out of it, a progress bar while it is read or written."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from safetensors import SafetensorError

from grpo_jax.errors import UserError
from grpo_jax.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def resolve(path: str | os.PathLike[str], field: str = "model.path") -> Path:
    """Return the local folder of a path from the config; `org/name` that is none is fetched from the hub (or its cache).

    Raises: UserError when there is no such folder, or the hub cannot be reached or does not have it.
    """
    name = os.fspath(path)
    # A local folder comes first: whoever has downloaded `org/name` into the working directory means that one.
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(f"{field} = {name!r}: no such folder")
    # Imported here, because it takes long and only a model from the hub needs it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's own errors, HTTP's and the system's: all mean "not available"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{field} = {name!r}: no such folder, and not to be had from the hub: {reason}") from None


class InputLimits(NamedTuple):
    """The ids and positions that a model takes, as its config.json says; None: it does not say.

    num_embeddings: rows of the embedding. max_tokens: positions it was made for. scaled_max_tokens: those that its RoPE
    scaling stretches them to; equal to max_tokens without one.
    """

    num_embeddings: int | None
    max_tokens: int | None
    scaled_max_tokens: int | None


def read_input_limits(folder: Path) -> InputLimits:
    """Read the limits from a folder's config.json; all are None if there is no such file."""
    file = folder / "config.json"
    if not file.exists():
        return InputLimits(None, None, None)
    config = read_json(file)
    # A model of text and images keeps them in the part about text.
    if isinstance(config.get("text_config"), dict):
        config = {**config, **config["text_config"]}
    num_embeddings, max_tokens = (_as_size(config.get(key)) for key in ("vocab_size", "max_position_embeddings"))
    return InputLimits(num_embeddings, max_tokens, _stretched(config, max_tokens))


def _stretched(config: Mapping[str, Any], max_tokens: int | None) -> int | None:
    """Return the positions that RoPE scaling allows."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    factor = isinstance(rope, Mapping) and rope.get("factor")
    if max_tokens is None or not isinstance(factor, int | float):
        return max_tokens
    # Some files give the stretched number as max_position_embeddings (Llama 3.1), some the one before (Qwen's YaRN).
    return max(max_tokens, int(factor * (_as_size(rope.get("original_max_position_embeddings")) or max_tokens)))


def _as_size(value: Any) -> int | None:
    """Return a whole number; None for anything else."""
    return value if type(value) is int else None


@contextlib.contextmanager
def new_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder to fill, beside `out`; it becomes `out` when the block ends, and is removed if that fails.

    Raises: UserError if `out` holds something already or cannot be written.
    """
    # Beside it, so that the rename stays on one file system and is atomic: nobody ever reads half a model.
    out = Path(out)
    require_new(out)
    unfinished = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        unfinished.chmod(0o755)  # mkdtemp's folders are for their owner alone
        yield unfinished
        unfinished.rename(out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out={out}: cannot be written ({error}); choose another folder") from None
    finally:
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)


def require_new(out: Path) -> None:
    """Raises UserError unless `out` is absent or an empty folder."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out={out}: exists and is not empty; choose another folder")


def with_progress(items: Sequence[Any], what: str) -> Iterable[Any]:
    """Iterate over `items` with a bar on a terminal that says how many of them are done."""
    from rich.console import Console
    from rich.progress import track

    is_shown = sys.stderr.isatty() and jax.process_index() == 0
    return track(items, what, console=Console(stderr=True), transient=True, disable=not is_shown)
