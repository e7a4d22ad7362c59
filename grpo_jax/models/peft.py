"""Adapters in PEFT's folder format (github.com/huggingface/peft): adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from grpo_jax.errors import UserError
from grpo_jax.files import read_json, write_atomically
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.folders import resolve
from grpo_jax.models.lora import ALL_LINEAR, split_adapters, targets_of
from grpo_jax.models.tensor_names import leaf_slot
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel import hosts
from grpo_jax.types import Params

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PEFT_NAMES = {"lora_a": "lora_A", "lora_b": "lora_B"}
# Settings under which adapters mean something else: key -> the values, besides an absent one, that change nothing.
PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False,),
    # Others than these change the base weights, so that the adapters are differences to another model than the folder's.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "layer_replication": (None,),
    "exclude_modules": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layers_to_transform": ([], None),
}


def save_adapters(folder: str | os.PathLike[str], adapters: Params, model: ModelDef, base_path: str) -> None:
    """Write adapters so that `peft` loads them onto the model at `base_path`.

    Args:
      folder: exists. adapters: float32, [L, ...] each. model: its `lora` says their settings.
      base_path: folder or hub id of the base model.
    Raises: UserError if the model's folder joins the matrices that they belong to.
    """
    lora = model.lora
    assert lora is not None, "a model without LoRA has no adapters to save"
    # Whatever their sharding, all processes gather them: it is a collective call.
    flat: dict[Any, Any] = flatten_dict(hosts.gather_to_host(adapters))
    tensors = {}
    for path, stacked in flat.items():
        names = adapter_names(path, model.arch)
        tensors.update(zip(names, stacked.reshape(len(names), *stacked.shape[-2:]), strict=True))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_path,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.use_rslora,
        "target_modules": sorted(lora.targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    save_file(tensors, Path(folder) / WEIGHTS, metadata={"format": "pt"})
    write_atomically(Path(folder) / CONFIG, json.dumps(config, indent=2) + "\n")


def load_adapters(path: str | os.PathLike[str], model: ModelDef) -> Params:
    """Load float32 adapters from a PEFT folder or hub id, for a model whose `lora` says what they must be.

    Raises: UserError naming the setting or the tensor that does not fit, or the file that cannot be read.
    """
    assert model.lora is not None, "a model without LoRA has no adapters to load"
    folder = resolve(path, "lora.path")
    _check_config(folder / CONFIG, model)
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: missing, truncated or no safetensors file ({error})") from None
    wanted: dict[Any, Any] = flatten_dict(split_adapters(model.param_shapes())[1])
    names = {path: adapter_names(path, model.arch) for path in wanted}
    extra = sorted(set(tensors) - {name for each in names.values() for name in each})
    if extra:
        raise UserError(f"{folder / WEIGHTS}: unexpected tensor {extra[0]}; config.lora.targets = {model.lora.targets}")
    for path, shape in wanted.items():
        for name in names[path]:
            found = "missing"
            if name in tensors:
                found = tensors[name].shape
            if found != shape.shape[-2:]:
                raise UserError(f"{folder / WEIGHTS}: tensor {name} is {found}; the model asks for {shape.shape[-2:]}")
            if not np.isfinite(tensors[name].astype(np.float32)).all():
                raise UserError(f"{folder / WEIGHTS}: tensor {name} holds NaN or infinity; save it again")
    stacked = {path: np.stack([tensors[name] for name in each]) for path, each in names.items()}
    return unflatten_dict({path: jnp.asarray(x.reshape(wanted[path].shape), jnp.float32) for path, x in stacked.items()})


def adapter_names(path: tuple[str, ...], architecture: Architecture) -> list[str]:
    """Return PEFT's names of one of our stacked adapters: one a layer, or a layer and expert.

    Raises: UserError if the model's folder joins its matrix with others.
    """
    slot = leaf_slot(".".join((*path[:-1], "weight")), architecture)
    if slot.is_joined:
        stored = slot.names[0].removesuffix(".weight").rpartition(".")[2]
        raise UserError(
            f"the model's folder joins {path[-2]} with others in {stored}, which PEFT would give one adapter: adapters of ours "
            "cannot be read or written as a PEFT folder; export the merged model, without --adapter"
        )
    return [f"base_model.model.{name.removesuffix('weight')}{PEFT_NAMES[path[-1]]}.weight" for name in slot.names]


def _check_config(file: Path, model: ModelDef) -> None:
    lora = model.lora
    assert lora is not None
    config = read_json(file, "lora.path must be a PEFT folder")
    for key, plain in PLAIN.items():
        # Compared as JSON has them: to Python 1 is True.
        if key in config and json.dumps(config[key]) not in map(json.dumps, plain):
            known = ", ".join(json.dumps(each) for each in plain if each is not None)
            raise UserError(f"{file}: {key} = {json.dumps(config[key])} is not supported; supported: {known or 'none'}")
    # Alpha decides what the tensors mean, and no tensor shows it: with another one the policy would silently be another.
    ours = {"r": ("rank", lora.rank), "lora_alpha": ("alpha", lora.alpha), "use_rslora": ("use_rslora", lora.use_rslora)}
    for key, (field, value) in ours.items():
        if config.get(key, False) != value:
            raise UserError(f"config.lora.{field} = {value!r}: {file} has {key} = {json.dumps(config.get(key))}")
    targets = config.get("target_modules")
    if targets == ALL_LINEAR:
        targets = list(targets_of(model.arch))
    if not isinstance(targets, list) or set(targets) != set(lora.targets):
        raise UserError(f"config.lora.targets = {lora.targets!r}: {file} has target_modules = {json.dumps(targets)}")
