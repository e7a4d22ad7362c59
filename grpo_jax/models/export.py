"""Parameters -> a Hugging Face folder that other tools load: weights in shards, config.json, tokenizer, chat template."""

from __future__ import annotations

import functools
import json
import os
import shutil
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
from grpo_jax.models.hf import param_slots
from grpo_jax.parallel import hosts
from grpo_jax.types import Params

DTYPES = ("float32", "bfloat16", "float16")


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
      out: absent, or an empty folder. source: the folder or hub id that training began from. dtype: one of DTYPES.
      max_shard_bytes: the size above which the weights are cut into several files; no tensor is cut.
    Raises: UserError if `out` holds something already or cannot be written, or the dtype is unknown.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype}: unknown; known: {', '.join(DTYPES)}")
    with new_folder(out) as folder:
        _copy_settings(resolve(source), folder, dtype)
        save_weights(folder, params, architecture, dtype, max_shard_bytes)


def save_weights(folder: Path, params: Params, architecture: Architecture, dtype: str, max_shard_bytes: int) -> None:
    """`params` under Hugging Face's names: model.safetensors, or shards with an index if that would be too large."""
    places = {}  # name -> (leaf, layer or None, bytes)
    for slot, leaf in zip(param_slots(architecture)[0], jax.tree.leaves(params), strict=True):
        num_bytes = int(np.prod(slot.shape)) * jnp.dtype(dtype).itemsize
        for i, name in enumerate(slot.names):
            places[name] = leaf, i if slot.is_stacked else None, num_bytes
    shards = _cut({name: num_bytes for name, (_, _, num_bytes) in places.items()}, max_shard_bytes)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))] if len(shards) > 1 else [SINGLE]
    for file, names in with_progress(list(zip(files, shards, strict=True)), "writing weights"):
        tensors = {name: hosts.gather_to_host(_tensor(*places[name][:2], dtype)) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors' files are for their owner alone
    if len(shards) > 1:
        total = sum(num_bytes for _, _, num_bytes in places.values())
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@functools.partial(jax.jit, static_argnums=2)
def _tensor(leaf, layer: Any, dtype: str):
    """One stored tensor of a leaf; layer: its number, or None if the leaf is not stacked."""
    return (leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)).astype(dtype)


def _cut(sizes: dict[str, int], max_bytes: int) -> list[list[str]]:
    """Names in order of layers, in runs of at most `max_bytes` together (a larger tensor is a run of its own)."""
    shards, room = [], 0
    for name in sorted(sizes, key=_by_layer):
        if not shards or sizes[name] > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= sizes[name]
    return shards


def _by_layer(name: str) -> tuple[int, str]:
    """Everything of a layer beside each other; what belongs to no layer first."""
    parts = name.split(".")
    return (int(parts[2]) if parts[1] == "layers" else -1), name


def _copy_settings(source: Path, folder: Path, dtype: str) -> None:
    """All that is not weights: config.json (with the dtype of these), tokenizer, chat template, generation settings."""
    config = text_config(source)
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
        config[key] = dtype
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for pattern in HUB_FILES:
        for file in source.glob(pattern):
            if file.name != "config.json" and not file.name.endswith((".safetensors", ".index.json")):
                shutil.copyfile(file, folder / file.name)
