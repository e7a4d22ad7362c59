"""Parameters -> a Hugging Face folder that other tools load: weights in shards, config.json, tokenizer, chat template."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from grpo_jax.errors import UserError
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.families import text_config
from grpo_jax.models.folders import HUB_FILES, INDEX, SINGLE, new_folder, resolve, with_progress
from grpo_jax.models.tensor_names import param_slots
from grpo_jax.parallel import hosts
from grpo_jax.types import Params

DTYPES = ("float32", "bfloat16", "float16")
FRESH_POSITIONS = 4096  # a fresh decoder has no limit; a config.json needs one


def export_folder(
    out: str | os.PathLike[str],
    params: Params,
    architecture: Architecture,
    source: str | os.PathLike[str],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Write `params` to the new folder `out`, with config.json, tokenizer and generation settings of `source`.

    The host holds one shard at a time.

    Args:
      out: absent, or an empty folder. params: of the decoder, possibly sharded over devices; architecture: theirs.
      source: the folder or hub id that training began from. dtype: one of DTYPES, of the files.
      max_shard_bytes: the size above which the weights are split into several files; no tensor is split.
    Raises: UserError if `out` holds something already or cannot be written, or the dtype is unknown.
    """
    _require_dtype(dtype)
    with new_folder(out) as folder:
        _copy_settings(resolve(source), folder, dtype)
        save_weights(folder, params, architecture, dtype, max_shard_bytes)


def export_fresh(
    out: str | os.PathLike[str],
    params: Params,
    architecture: Architecture,
    save_tokenizer: Callable[[Path], None],
    dtype: str,
    max_shard_bytes: int,
) -> None:
    """Write a decoder that began from no folder as the Llama that it is.

    Args:
      out, params, architecture, dtype, max_shard_bytes: as in `export_folder`.
      save_tokenizer: writes tokenizer and generation settings into a folder.
    Raises: UserError as `export_folder` does.
    """
    _require_dtype(dtype)
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(_llama_config(architecture, dtype), indent=2) + "\n")
        save_tokenizer(folder)
        save_weights(folder, params, architecture, dtype, max_shard_bytes)


def _require_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: unknown; known: {', '.join(DTYPES)}")


def _llama_config(arch: Architecture, dtype: str) -> dict[str, Any]:
    """Describe a fresh decoder as transformers describes a Llama; `families.read_architecture` gives the same back."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.dim,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_heads,
        "num_key_value_heads": arch.num_kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.ffn_dim,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope.theta,
        "max_position_embeddings": FRESH_POSITIONS,
        "tie_word_embeddings": arch.tie_embeddings,
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }


def save_weights(folder: Path, params: Params, architecture: Architecture, dtype: str, max_shard_bytes: int) -> None:
    """Write `params` under Hugging Face's names: model.safetensors, or several files with an index.

    Args: as `export_folder` has them. folder: exists.
    """
    parts: dict[str, list[_Part]] = {}  # of each stored tensor
    num_bytes = {}
    for slot, leaf in zip(param_slots(architecture)[0], jax.tree.leaves(params), strict=True):
        for name, place in zip(slot.names, np.ndindex(slot.stack), strict=True):
            parts.setdefault(name, []).append(_Part(slot.first_row, leaf, place, slot.is_transposed, slot.stored_part))
            num_bytes[name] = int(np.prod(slot.stored_shape)) * jnp.dtype(dtype).itemsize
    shards = _split_by_size(num_bytes, max_shard_bytes)
    files = [SINGLE]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for file, names in with_progress(list(zip(files, shards, strict=True)), "writing weights"):
        _save_shard(folder / file, {name: parts[name] for name in names}, dtype)
    if len(shards) > 1:
        total = sum(num_bytes.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@dataclasses.dataclass(frozen=True)
class _Part:
    """Part of a stored tensor. first_row: in it. leaf: that it comes from. place: its numbers on the leaf's stacked axes.

    is_transposed: as in `Slot`. shape: as it is stored.
    """

    first_row: int
    leaf: jax.Array
    place: tuple[int, ...]
    is_transposed: bool
    shape: tuple[int, ...]


def _save_shard(file: Path, parts: dict[str, list[_Part]], dtype: str) -> None:
    """Write one file."""
    # A function of its own, so that a file's tensors are gone from the host before the next one's are gathered.
    save_file({name: _gather_tensor(each, dtype) for name, each in parts.items()}, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors' files are for their owner alone


def _gather_tensor(parts: list[_Part], dtype: str) -> np.ndarray:
    """Return one stored tensor on the host."""

    # Part by part, cast on the device before it is gathered: neither a full float32 copy nor a stacked leaf of all layers is
    # ever in the host's memory.
    def gather(part: _Part) -> np.ndarray:
        extracted = _extract_part(part.leaf, part.place, dtype, part.is_transposed)
        return hosts.gather_to_host(extracted).reshape(part.shape)

    if len(parts) == 1:
        return gather(parts[0])
    # Into its place, not joined at the end: that would hold the tensor twice.
    num_rows = sum(part.shape[0] for part in parts)
    tensor = np.empty((num_rows, *parts[0].shape[1:]), jnp.dtype(dtype))
    for part in parts:
        tensor[part.first_row : part.first_row + part.shape[0]] = gather(part)
    return tensor


@functools.partial(jax.jit, static_argnums=(2, 3))
def _extract_part(leaf: jax.Array, place: tuple[int, ...], dtype: str, is_transposed: bool) -> jax.Array:
    """Return one tensor of a leaf, as it is stored.

    Args: as `_Part` has them. dtype: of the result.
    """
    # The numbers are arguments of the program: as constants they would compile one for each layer.
    for number in place:
        leaf = jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False)
    if is_transposed:
        leaf = leaf.T
    return leaf.astype(dtype)


def _split_by_size(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Split names, in order of layers, into runs of at most `max_bytes` (a larger tensor is a run of its own)."""
    shards, room = [], 0
    for name in sorted(sizes, key=_by_layer):
        if not shards or sizes[name] > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= sizes[name]
    return shards


def _by_layer(name: str) -> tuple[int, str]:
    """Return the key that sorts a layer's tensors beside each other, and those of no layer first."""
    words = name.split(".")
    if words[1] != "layers":
        return -1, name
    return int(words[2]), name


def _copy_settings(source: Path, folder: Path, dtype: str) -> None:
    """Copy all that is not weights: config.json (with the dtype of these), tokenizer, chat template, generation settings."""
    config = text_config(source)
    # transformers 5 reads `dtype`, older ones `torch_dtype`: the name that the source has, or else the one that both know.
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in HUB_FILES:
        for file in source.glob(pattern):
            if file.name != "config.json" and not file.name.endswith((".safetensors", ".index.json")):
                shutil.copyfile(file, folder / file.name)
