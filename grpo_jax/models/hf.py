"""Hugging Face folders in and out: config.json -> Architecture, safetensors -> parameters, every key accounted for.

Weights go into the decoder exactly as they are stored ([out, in], nothing transposed); only the layers are stacked on a
leading axis. A name, a shape or a setting that this decoder does not have is an error here, never a silent difference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_jax.errors import UserError
from grpo_jax.models.transformer import Architecture, init_params
from grpo_jax.types import Params

# Ours -> theirs; `{}` is the layer's number, our leading axis. Which of these exist follows from the architecture.
NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.attn.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attn.q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.attn.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "layers.attn.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attn.k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.attn.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "layers.attn.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attn.v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.attn.o.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "final_norm.weight": "model.norm.weight",
    "head": "lm_head.weight",
}
EMBED, HEAD = NAMES["embed"], NAMES["head"]
IGNORED = ".rotary_emb.inv_freq"  # a buffer that old checkpoints carry; it follows from rope_theta
SOURCE_DTYPES = ("F32", "F16", "BF16")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class Family:
    """What a `model_type` implies without saying so in config.json. default_head_dim None: hidden_size / heads."""

    qkv_bias: bool = False
    qk_norm: bool = False
    default_head_dim: int | None = None


FAMILIES = {"llama": Family(), "qwen2": Family(qkv_bias=True), "qwen3": Family(qk_norm=True, default_head_dim=128)}

# Settings with which the decoder would compute something else: key -> the one value (besides null and absent) it has.
REQUIRED_SETTINGS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


def resolve(path: str | os.PathLike[str], field: str = "model.path") -> Path:
    """A path from the config -> a local folder; `org/name` that is no folder is fetched from the hub (or its cache).

    Raises: UserError when there is no such folder, or the hub cannot be reached or does not have it.
    """
    name = os.fspath(path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        raise UserError(f"{field} = {name!r}: no such folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub's own errors, HTTP's and the system's: all mean "not available"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{field} = {name!r}: no such folder, and not to be had from the hub: {reason}") from None


def read_architecture(path: str | os.PathLike[str]) -> Architecture:
    """The architecture that `path` (a folder or hub id) describes in its config.json: llama, qwen2 or qwen3.

    Raises: UserError naming the file, the key and its value where something is missing, malformed or not supported.
    """
    file = resolve(path) / "config.json"
    if not file.is_file():
        raise UserError(f"model.path = {os.fspath(path)!r}: the folder has no config.json")
    config = _read_json(file)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise _unsupported(file, "model_type", config.get("model_type"), ", ".join(FAMILIES))
    _check_settings(file, config, family)
    dim, num_heads = _integer(file, config, "hidden_size"), _integer(file, config, "num_attention_heads")
    num_kv_heads = _integer(file, config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise UserError(f"{file}: num_key_value_heads = {num_kv_heads} must divide num_attention_heads = {num_heads}")
    return Architecture(
        vocab_size=_integer(file, config, "vocab_size"),
        dim=dim,
        num_layers=_integer(file, config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_integer(file, config, "head_dim", family.default_head_dim or dim // num_heads),
        ffn_dim=_integer(file, config, "intermediate_size"),
        rope_theta=_rope_theta(file, config),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=family.qk_norm,
        qkv_bias=family.qkv_bias,
    )


def _check_settings(file: Path, config: Mapping[str, Any], family: Family) -> None:
    for key, required in REQUIRED_SETTINGS.items():
        value = config.get(key)
        if key == "attention_bias" and family.qkv_bias:
            continue  # this family always has the bias and does not look at the setting
        if value is not None and value != required:
            raise _unsupported(file, key, value, "absent" if required is None else required)
    kinds = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if kinds:
        raise _unsupported(file, "layer_types", kinds[0], "full_attention")


def _rope_theta(file: Path, config: Mapping[str, Any]) -> float:
    """The base of the rotary embedding. transformers 5 keeps all of it in `rope_parameters`, older ones in two keys."""
    theta = config.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = config.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise _unsupported(file, f"{key}.rope_type", kind, "default (no scaling)")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _unsupported(file, f"{key}.partial_rotary_factor", rope["partial_rotary_factor"], 1.0)
        theta = rope.get("rope_theta", theta)
    return 10_000.0 if theta is None else float(theta)


def _unsupported(file: Path, key: str, value: Any, supported: Any) -> UserError:
    return UserError(f"{file}: {key} = {json.dumps(value)} is not supported; supported: {supported}")


def _integer(file: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {key} = {json.dumps(value)}: expected a positive integer")
    return value


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def load_params(path: str | os.PathLike[str], architecture: Architecture, dtype: Any) -> Params:
    """The weights of `path` (a folder or hub id) as the decoder's parameters, cast to `dtype`.

    Reads model.safetensors or the files of model.safetensors.index.json (float32, float16, bfloat16), tensor by tensor.
    Names and shapes are checked before anything is read.

    Returns: nested dict of jax arrays, the tree of `transformer.init_params`.
    Raises: UserError naming the tensor that is missing, unexpected, misshapen or of an odd dtype, or the broken file.
    """
    folder = resolve(path)
    slots, treedef = _slots(architecture)
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check_tensors(folder, architecture, slots, tensors)
        return jax.tree.unflatten(treedef, [jnp.asarray(_read(slot, tensors, jnp.dtype(dtype))) for slot in slots])


def save_params(folder: str | os.PathLike[str], params: Params, architecture: Architecture) -> None:
    """Write `params` as model.safetensors in `folder` (which exists), under Hugging Face's names, in their own dtype.

    With the config.json and tokenizer files of the model that training began from, other tools load the folder.
    """
    tensors = {}
    for slot, leaf in zip(_slots(architecture)[0], jax.device_get(jax.tree.leaves(params)), strict=True):
        tensors.update(zip(slot.names, leaf if slot.is_stacked else [leaf], strict=True))
    unfinished = Path(folder) / f".{SINGLE}.tmp"
    save_file(tensors, unfinished, metadata={"format": "pt"})
    unfinished.rename(Path(folder) / SINGLE)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """One leaf of the parameters: the tensors it is made of (one a layer, if stacked) and the shape of each."""

    names: list[str]
    shape: tuple[int, ...]
    is_stacked: bool


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One tensor of an open safetensors file."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        return self.file.get_tensor(self.name)


def _slots(architecture: Architecture) -> tuple[list[_Slot], Any]:
    """What the decoder wants, in the order of its leaves, and the tree they form."""
    shapes = jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    slots = []
    for keys, leaf in leaves:
        ours = ".".join(str(key.key) for key in keys)
        is_stacked = ours.startswith("layers.")
        names = [NAMES[ours].format(i) for i in range(architecture.num_layers)] if is_stacked else [NAMES[ours]]
        slots.append(_Slot(names, leaf.shape[is_stacked:], is_stacked))
    return slots, treedef


def _open(folder: Path, stack: contextlib.ExitStack) -> dict[str, _Tensor]:
    """All tensors of a folder by name; only the files' headers are read. The files stay open as long as `stack`."""
    promised = {}
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif (folder / INDEX).is_file():
        promised = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(promised, dict) or not promised:
            raise UserError(f"{folder / INDEX}: weight_map is missing or empty")
        files = [folder / name for name in sorted(set(promised.values()))]
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
    return tensors


def _check_tensors(folder: Path, architecture: Architecture, slots: list[_Slot], tensors: dict[str, _Tensor]) -> None:
    wanted = {name: slot.shape for slot in slots for name in slot.names}
    missing = sorted(set(wanted) - set(tensors))
    if missing:
        raise UserError(f"{folder}: tensor {missing[0]} {wanted[missing[0]]} is missing{_and_more(missing)}")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise UserError(f"{folder}: tensor {name} has shape {tensors[name].shape}; config.json asks for {shape}")
        if tensors[name].dtype not in SOURCE_DTYPES:
            known = ", ".join(SOURCE_DTYPES)
            raise UserError(f"{folder}: tensor {name} has dtype {tensors[name].dtype}; supported: {known}")
    extra = sorted(name for name in set(tensors) - set(wanted) - {HEAD} if not name.endswith(IGNORED))
    if extra:
        raise UserError(f"{folder}: unexpected tensor {extra[0]} {tensors[extra[0]].shape}{_and_more(extra)}")
    has_copy = architecture.tie_embeddings and HEAD in tensors  # if it is no copy, a trained head would be lost
    if has_copy and not np.array_equal(tensors[HEAD].read(), tensors[EMBED].read()):
        raise UserError(f"{folder}: {HEAD} differs from {EMBED} though tie_word_embeddings = true; set it to false")


def _and_more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _read(slot: _Slot, tensors: dict[str, _Tensor], dtype: np.dtype) -> np.ndarray:
    """A leaf's array; layer by layer into its place, so that no second copy of the model is ever held."""
    if not slot.is_stacked:
        return tensors[slot.names[0]].read().astype(dtype, copy=False)
    stacked = np.empty((len(slot.names), *slot.shape), dtype)
    for i, name in enumerate(slot.names):
        stacked[i] = tensors[name].read()
    return stacked
