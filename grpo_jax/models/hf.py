"""Weights from Hugging Face folders: safetensors -> parameters on the mesh, tensor by tensor, every key accounted for.

Weights go into the decoder exactly as they are stored ([out, in], nothing transposed); only the layers are stacked on a
leading axis. A name or a shape that this decoder does not have is an error here, never a silent difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from safetensors import SafetensorError, safe_open

from grpo_jax.errors import UserError
from grpo_jax.files import read_json
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.folders import INDEX, SINGLE, resolve, with_progress
from grpo_jax.models.tensor_names import EMBED, HEAD, Slot, param_slots
from grpo_jax.parallel.finite import find_not_finite
from grpo_jax.types import Params

IGNORED_END = ".rotary_emb.inv_freq"  # a buffer that old checkpoints carry; it follows from rope_theta
# Prefixes in models that do more than continue a text: of the text's own tensors, and of what is left out.
TEXT = {"language_model.": "", "model.language_model.": "model."}
LEFT_OUT = {
    "images": (
        *("vision_tower.", "multi_modal_projector.", "visual."),
        *("model.vision_tower.", "model.multi_modal_projector.", "model.visual."),
    ),
    "the prediction of several tokens": ("model.mtp_layers.", "mtp."),
}
SOURCE_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ROWS = 4096  # rows at a time, where two stored tensors are compared


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of an open safetensors file."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self, sharding: Sharding, shape: tuple[int, ...], first_row: int) -> jax.Array:
        """Read the tensor, or rows of it, as an array of this sharding.

        A process reads the shards of its own devices, each of them once.

        Args:
          sharding: of the result. shape: of the result, the tensor's own or one of fewer rows. first_row: where those begin.
        """
        stored, shards = self.file.get_slice(self.name), {}

        # JAX asks once for each device. Those that replicate a shard get the same array, and the file is read once.
        def read_shard(index: Any) -> np.ndarray:
            key = tuple(each.indices(size) for each, size in zip(index, shape, strict=True))
            if key not in shards:
                (start, stop, _), *_ = key
                shards[key] = stored[slice(first_row + start, first_row + stop), *index[1:]]
            return shards[key]

        return jax.make_array_from_callback(shape, sharding, read_shard)


def load_params(path: str | os.PathLike[str], architecture: Architecture, dtype: Any, shardings: Any) -> Params:
    """Load the weights of `path` (a folder or hub id) as the decoder's parameters.

    Reads model.safetensors or the files of model.safetensors.index.json (float32, float16, bfloat16). Names and shapes
    are checked before anything is read. The host holds one tensor at a time: each goes straight to its devices. Of several
    hosts each reads the shards of its own devices.

    Args:
      path: a folder or hub id. architecture: of the decoder. dtype: of the parameters.
      shardings: of each parameter, as a tree or a prefix of one (one for all).
    Returns: nested dict of jax arrays, the tree of `transformer.init_params`.
    Raises: UserError naming the tensor that is missing, unexpected, misshapen or of an odd dtype, or the broken file.
    """
    folder = resolve(path)
    slots, treedef = param_slots(architecture)
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check_tensors(folder, architecture, slots, tensors)
        each = jax.tree.leaves(jax.tree.broadcast(shardings, jax.tree.unflatten(treedef, slots)))
        work = with_progress(list(zip(slots, each, strict=True)), "loading weights")
        leaves = [_load(slot, tensors, jnp.dtype(dtype), sharding) for slot, sharding in work]
    _check_finite(folder, slots, leaves)
    return jax.tree.unflatten(treedef, leaves)


def _check_finite(folder: Path, slots: list[Slot], leaves: list[jax.Array]) -> None:
    """Raise UserError naming the first tensor that holds NaN or infinity."""
    # One such number makes every log-probability NaN, and nothing later would say which it was.
    found = find_not_finite(leaves)
    if found:
        (key, *_), place = found[0]
        slot = slots[key.idx]
        name = f"{slot.names[0]} (at index {place})"
        if slot.is_stacked:
            per_layer = len(slot.names) // slot.stack[0]  # of experts several
            name = slot.names[place * per_layer] + " (or of another expert there)" * (per_layer > 1)
        raise UserError(f"{folder}: tensor {name} holds NaN or infinity{_and_more(found)}; fetch or export it again")


def check_weights(path: str | os.PathLike[str], architecture: Architecture) -> int:
    """Read every number of the weights in `path`, one tensor at a time, and keep none; -> how many numbers there are.

    Raises: UserError, as `load_params`.
    """
    folder = resolve(path)
    slots, _ = param_slots(architecture)
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check_tensors(folder, architecture, slots, tensors)
        for name in with_progress([name for slot in slots for name in slot.names], "reading weights"):
            if not np.isfinite(tensors[name].file.get_tensor(name).astype(np.float32)).all():
                raise UserError(f"{folder}: tensor {name} holds NaN or infinity; fetch or export it again")
        return sum(math.prod(slot.shape) * len(slot.names) for slot in slots)


def stored_dtype(path: str | os.PathLike[str]) -> str:
    """Return the dtype of the weights in `path`, that of the embedding. Raises UserError, as `load_params`."""
    with contextlib.ExitStack() as stack:
        embed = _open(resolve(path), stack).get(EMBED)
        if embed is None or embed.dtype not in SOURCE_DTYPES:
            raise UserError(f"{path}: tensor {EMBED} is missing, or of none of the dtypes {', '.join(SOURCE_DTYPES)}")
        return SOURCE_DTYPES[embed.dtype]


def _load(slot: Slot, tensors: dict[str, _Tensor], dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """Load a leaf onto its devices; a stacked one is filled tensor by tensor."""
    of_one = _stored_sharding(sharding, slot)
    parts = (tensors[name].read(of_one, slot.stored_part, slot.first_row) for name in slot.names)
    if not slot.is_stacked:
        return _cast(next(parts), dtype, sharding)
    stacked = jnp.zeros((*slot.stack, *slot.shape), dtype, device=sharding)
    for place, part in zip(np.ndindex(slot.stack), parts, strict=True):
        stacked = _write(stacked, part, place, sharding, slot.is_transposed, slot.shape)
        # JAX does not wait for a device: without this, tensors still under way would pile up on the host.
        jax.block_until_ready(stacked)
    return stacked


def _stored_sharding(sharding: Sharding, slot: Slot) -> Sharding:
    """Return the sharding of one tensor, from that of all of them stacked; the axes they are stacked on are not sharded."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    axes = sharding.spec[len(slot.stack) :]
    if slot.is_transposed:
        axes = (*axes, *[None] * (len(slot.shape) - len(axes)))[::-1]
    return NamedSharding(sharding.mesh, PartitionSpec(*axes))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _cast(tensor: jax.Array, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(tensor.astype(dtype), sharding)


# Donated: written in place, or each layer would make a second copy of all of them.
@functools.partial(jax.jit, static_argnums=(3, 4, 5), donate_argnums=0)
def _write(
    stacked: jax.Array,
    tensor: jax.Array,
    place: tuple[int, ...],
    sharding: Sharding,
    is_transposed: bool,
    shape: tuple[int, ...],
) -> jax.Array:
    if is_transposed:
        tensor = tensor.T
    tensor = tensor.reshape(shape).astype(stacked.dtype)
    return jax.lax.with_sharding_constraint(stacked.at[place].set(tensor), sharding)


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """Open all tensors of a folder by name; only the files' headers are read. The files stay open as long as `stack`.

    Of a model of text and images only the text's, under the names that they have in a model of text alone.
    """
    promised = {}
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        promised = read_json(folder / INDEX).get("weight_map")
        if not isinstance(promised, dict) or not promised:
            raise UserError(f"{folder / INDEX}: weight_map is missing or empty")
        files = [folder / _require_name(folder / INDEX, name) for name in sorted(set(map(str, promised.values())))]
    else:
        raise UserError(f"model.path = {str(folder)!r}: the folder has neither {SINGLE} nor {INDEX}")
    tensors = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, "numpy"))
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: missing, truncated or no safetensors file ({error}); fetch it again") from None
        for name in handle.keys():  # noqa: SIM118, a safetensors handle is no dict
            header = handle.get_slice(name)
            tensors[name] = _Tensor(handle, name, tuple(header.get_shape()), header.get_dtype())
    lost = sorted(set(promised) - set(tensors))
    if lost:
        raise UserError(f"{folder / promised[lost[0]]}: tensor {lost[0]} is missing, though {INDEX} places it there")
    return _own_names(folder, tensors)


def _own_names(folder: Path, tensors: dict[str, _Tensor]) -> dict[str, _Tensor]:
    """Return the tensors of the text's decoder, under the names of a model of text alone; the others are named once."""
    kept = dict(tensors)
    for what, prefixes in LEFT_OUT.items():
        others = [name for name in tensors if name.startswith(prefixes)]
        for name in others:
            del kept[name]
        if others and jax.process_index() == 0:
            print(f"{folder}: left out {len(others)} tensors for {what}, the first is {others[0]}", file=sys.stderr)

    def rename(name: str) -> str:
        for prefix, own in TEXT.items():
            if name.startswith(prefix):
                return own + name.removeprefix(prefix)
        return name

    return {rename(name): tensor for name, tensor in kept.items()}


def _require_name(file: Path, name: str) -> str:
    """Return the name of a file beside `file`; UserError if it leads elsewhere."""
    # A folder from elsewhere must not make the loader open what is outside of it.
    if Path(name).name != name or not name.endswith(".safetensors"):
        raise UserError(f"{file}: weight_map names {name!r}; expected names of safetensors files in the same folder")
    return name


def _check_tensors(folder: Path, architecture: Architecture, slots: list[Slot], tensors: dict[str, _Tensor]) -> None:
    wanted = {name: slot.stored_shape for slot in slots for name in slot.names}
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} {wanted[missing[0]]} is missing{_and_more(missing)}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise UserError(f"{folder}: tensor {name} has shape {tensors[name].shape}; config.json asks for {shape}")
        if tensors[name].dtype not in SOURCE_DTYPES:
            known = ", ".join(SOURCE_DTYPES)
            raise UserError(f"{folder}: tensor {name} has dtype {tensors[name].dtype}; supported: {known}")
    extra = sorted(name for name in set(tensors) - set(wanted) - {HEAD} if not name.endswith(IGNORED_END))
    if extra:
        raise UserError(f"{folder}: unexpected tensor {extra[0]} {tensors[extra[0]].shape}{_and_more(extra)}")
    # A folder may hold the head although it is tied. A copy of the embedding is superfluous; anything else is a trained head,
    # and would be lost.
    has_copy = architecture.tie_embeddings and HEAD in tensors
    if has_copy and not _are_equal(tensors[HEAD], tensors[EMBED]):
        raise UserError(f"{folder}: {HEAD} differs from {EMBED} though tie_word_embeddings = true; set it to false")


def _are_equal(left: _Tensor, right: _Tensor) -> bool:
    """Compare two stored tensors, number by number; of each only ROWS rows are in memory at a time."""
    if left.shape != right.shape:
        return False
    left_rows, right_rows = (tensor.file.get_slice(tensor.name) for tensor in (left, right))
    spans = [slice(i, min(i + ROWS, left.shape[0])) for i in range(0, left.shape[0], ROWS)]
    return all(np.array_equal(left_rows[span], right_rows[span]) for span in spans)


def _and_more(names: list[Any]) -> str:
    if len(names) == 1:
        return ""
    return f" (and {len(names) - 1} more)"
