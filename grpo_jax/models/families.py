"""config.json -> Architecture. A setting that the decoder does not have is an error here, never a silent difference."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.files import read_json
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.models.folders import resolve

Settings = Mapping[str, Any]  # of a config.json


@dataclasses.dataclass(frozen=True)
class Family:
    """The facts that a `model_type` implies without saying so in config.json.

    facts: fields of Architecture that all its models share. defaults: settings that its config.json may leave out.
    activation: the name of it there. windows: the layers that have the sliding window, "none", "all" or as "layer_types" says.
    """

    facts: Settings = dataclasses.field(default_factory=dict)
    defaults: Settings = dataclasses.field(default_factory=dict)
    activation: str = "silu"
    windows: str = "none"
    is_embedding_scaled: bool = False


# A config.json may leave out settings that equal transformers' own defaults; Gemma 3's do.
QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
GEMMA3 = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "use_sliding_window": True,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
FAMILIES = {
    "llama": Family(),
    "mistral": Family(defaults={"use_sliding_window": True, "sliding_window": 4096}, windows="all"),
    "qwen2": Family(facts={"qkv_bias": True}, defaults=QWEN, windows="layer_types"),
    "qwen3": Family(facts={"qk_norm": True}, defaults={"head_dim": 128, **QWEN}, windows="layer_types"),
    "gemma3_text": Family(
        facts={"qk_norm": True, "norm_plus_one": True, "post_norms": True, "activation": "gelu_tanh"},
        defaults=GEMMA3,
        activation="gelu_pytorch_tanh",
        windows="layer_types",
        is_embedding_scaled=True,
    ),
}
# Models of text and images: what makes a config.json of its own out of their `text_config`.
TEXT_OF = {"gemma3": {"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]}}
SHARED = ("dtype", "torch_dtype", "eos_token_id", "tie_word_embeddings")  # settings that hold for text and images

# More than this is damage, found before anything of such a size is made.
AT_MOST, MANY = {"num_hidden_layers": 1024}, 2**24
HUGE = 1e30

# Settings with which the decoder would compute something else: key -> the one value (besides null and absent) it has.
REQUIRED_SETTINGS = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "attn_logit_softcapping": None,  # transformers' Gemma 3 has the setting and ignores it
    "use_bidirectional_attention": False,
}


def text_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read config.json of `path` (a folder or hub id); of a model that also sees images, the part about text.

    Raises: UserError naming the file if it is missing, malformed, or of a family that is not supported.
    """
    file = resolve(path) / "config.json"
    if not file.is_file():
        raise UserError(f"model.path = {os.fspath(path)!r}: the folder has no config.json")
    config = read_json(file)
    kind = str(config.get("model_type"))
    if kind in TEXT_OF and isinstance(config.get("text_config"), dict):
        shared = {key: config[key] for key in SHARED if key in config}
        config = {**shared, **config["text_config"], **TEXT_OF[kind]}
    elif kind not in FAMILIES:
        raise _unsupported(file, "model_type", config.get("model_type"), ", ".join(FAMILIES))
    return config


def read_architecture(path: str | os.PathLike[str]) -> Architecture:
    """Read the architecture that `path` (a folder or hub id) describes in its config.json.

    Raises: UserError naming the file, the key and its value where something is missing, malformed or not supported.
    """
    file, config = resolve(path) / "config.json", text_config(path)
    family = FAMILIES[config["model_type"]]
    config = {**family.defaults, **config}
    _check_settings(file, config, family)
    dim, num_heads = _integer(file, config, "hidden_size"), _integer(file, config, "num_attention_heads")
    num_kv_heads = _integer(file, config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise UserError(f"{file}: num_key_value_heads = {num_kv_heads} must divide num_attention_heads = {num_heads}")
    num_layers = _integer(file, config, "num_hidden_layers")
    window, local_layers = _windows(file, config, family, num_layers)
    rope, local_rope = _ropes(file, config)
    optional: dict[str, Any] = dict(family.facts)
    if family.is_embedding_scaled:
        optional["embed_scale"] = dim**0.5
    # The scalar replaces the head width in 1 / sqrt(H): Gemma 3 27B has 168 = D / N there, with H = 128.
    if config.get("query_pre_attn_scalar") is not None:
        optional["query_scale"] = _number(file, config, "query_pre_attn_scalar") ** -0.5
    if config.get("final_logit_softcapping") is not None:
        optional["logit_cap"] = _number(file, config, "final_logit_softcapping")
    if local_layers:
        optional["local_rope"] = local_rope
    return Architecture(
        vocab_size=_integer(file, config, "vocab_size"),
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_integer(file, config, "head_dim", dim // num_heads),
        ffn_dim=_integer(file, config, "intermediate_size"),
        rope=rope,
        norm_eps=_number(file, config, "rms_norm_eps", 1e-6),
        tie_embeddings=_flag(file, config, "tie_word_embeddings"),
        sliding_window=window,
        local_layers=local_layers,
        **optional,
    )


def _check_settings(file: Path, config: Settings, family: Family) -> None:
    # A setting that was ignored here would still load and train, with other logits than the model's: nothing would show it.
    required = {"hidden_act": family.activation, "hidden_activation": family.activation, **REQUIRED_SETTINGS}
    if family.windows == "none":
        required["use_sliding_window"] = False
    if family.facts.get("qkv_bias"):
        del required["attention_bias"]  # this family always has the bias and does not look at the setting
    for key, value in required.items():
        if config.get(key) in (None, value):
            continue
        if value is None:
            raise _unsupported(file, key, config[key], "absent")
        raise _unsupported(file, key, config[key], value)


def _windows(file: Path, config: Settings, family: Family, num_layers: int) -> tuple[int | None, tuple[int, ...]]:
    """Return (tokens that a local layer's query sees, the local layers' numbers)."""
    kinds = config.get("layer_types")
    has_window = family.windows != "none" and config["use_sliding_window"] and config.get("sliding_window") is not None
    known = ["full_attention"]
    if has_window and family.windows == "layer_types":
        known.append("sliding_attention")
    if not isinstance(kinds, list | None):
        raise UserError(f"{file}: layer_types = {json.dumps(kinds)}: expected a list, a kind for each layer")
    for kind in kinds or ():
        if kind not in known:
            raise _unsupported(file, "layer_types", kind, ", ".join(known))
    if not has_window:
        return None, ()
    window = _integer(file, config, "sliding_window")
    if family.windows == "all":
        return window, tuple(range(num_layers))
    # Older files say the kinds by a rule: the last of every `sliding_window_pattern` layers is global (Gemma 3), or all from
    # `max_window_layers` on are local (Qwen).
    if kinds is None and "sliding_window_pattern" in config:
        pattern = _integer(file, config, "sliding_window_pattern")
        local = [bool((i + 1) % pattern) for i in range(num_layers)]
    elif kinds is None:
        first = config["max_window_layers"]
        if not isinstance(first, int) or isinstance(first, bool):
            raise UserError(f"{file}: max_window_layers = {json.dumps(first)}: expected an integer")
        local = [i >= first for i in range(num_layers)]
    elif len(kinds) != num_layers:
        raise UserError(f"{file}: layer_types has {len(kinds)} entries; num_hidden_layers = {num_layers}")
    else:
        local = [kind == "sliding_attention" for kind in kinds]
    local_layers = tuple(i for i, is_local in enumerate(local) if is_local)
    if not local_layers:  # a window that no layer has would be another architecture, and another compiled program
        return None, ()
    return window, local_layers


def _ropes(file: Path, config: Settings) -> tuple[Rope, Rope | None]:
    """Return the rotary embedding, and that of local layers if they have another."""
    # transformers 5 keeps all of it in `rope_parameters` (one for each kind of layer, if they differ), older ones in
    # `rope_theta`, `rope_scaling` and `rope_local_base_freq`. The key is kept, as messages name it.
    key = "rope_parameters"
    if config.get("rope_scaling"):
        key = "rope_scaling"
    given, local = _group(file, key, config.get(key)), {}
    if "full_attention" in given:
        local = _group(file, f"{key}.sliding_attention", given.get("sliding_attention"))
        given = _group(file, f"{key}.full_attention", given["full_attention"])
    theta, local_theta = config.get("rope_theta"), config.get("rope_local_base_freq")
    rope = _rope(file, config, key, given, theta)
    if not local and local_theta is None:
        return rope, None
    return rope, _rope(file, config, key, local, local_theta)


def _rope(file: Path, config: Settings, key: str, given: Settings, theta: float | None) -> Rope:
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise _unsupported(file, f"{key}.rope_type", kind, "default, linear, llama3")
    if given.get("partial_rotary_factor", 1.0) != 1.0:
        raise _unsupported(file, f"{key}.partial_rotary_factor", given["partial_rotary_factor"], 1.0)
    theta = _number(file, {"rope_theta": given.get("rope_theta", theta)}, "rope_theta", 10_000.0)
    if kind == "default":
        return Rope(theta)

    def number(name: str, default: Any = None) -> int | float:
        value = given.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < HUGE:
            raise UserError(f"{file}: {key}.{name} = {json.dumps(value)}: expected a number above 0, for {kind} scaling")
        return value

    if kind == "linear":
        return Rope(theta, float(number("factor")))
    low, high = float(number("low_freq_factor")), float(number("high_freq_factor"))
    if high <= low:
        raise UserError(f"{file}: {key}.high_freq_factor = {high}: must be above low_freq_factor = {low}")
    context = number("original_max_position_embeddings", config.get("max_position_embeddings"))
    return Rope(theta, float(number("factor")), (low, high, int(context)))


def _unsupported(file: Path, key: str, value: Any, supported: Any) -> UserError:
    return UserError(f"{file}: {key} = {json.dumps(value)} is not supported; supported: {supported}")


def _integer(file: Path, config: Settings, key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    # A bool is an int in Python, and true would be taken for 1.
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{file}: {key} = {json.dumps(value)}: expected a positive integer")
    if value > AT_MOST.get(key, MANY):
        raise UserError(f"{file}: {key} = {json.dumps(value)}: no model has more than {AT_MOST.get(key, MANY)}")
    return value


def _number(file: Path, config: Settings, key: str, default: float | None = None) -> float:
    """Read a finite number above 0."""
    value: Any = config.get(key)
    if value is None:
        value = default
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < HUGE:  # NaN is in no range
        raise UserError(f"{file}: {key} = {json.dumps(value)}: expected a finite number above 0")
    return float(value)


def _flag(file: Path, config: Settings, key: str) -> bool:
    value = config.get(key)
    if not isinstance(value, bool | None):  # "false" would be true
        raise UserError(f"{file}: {key} = {json.dumps(value)}: expected true or false")
    return bool(value)


def _group(file: Path, key: str, value: Any) -> Settings:
    """Return settings that are an object, empty if there are none."""
    if not value:
        return {}
    if not isinstance(value, Mapping):
        raise UserError(f"{file}: {key} = {json.dumps(value)}: expected an object")
    return value
