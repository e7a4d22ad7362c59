"""config.json -> Architecture. A setting that the decoder does not have is an error here, never a silent difference."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.files import read_json
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.family import Family, Reads, TextPart
from grpo_jax.models.folders import resolve
from grpo_jax.models.layer_settings import read_mixers, read_positions
from grpo_jax.models.settings import Settings, positive, read_flag, read_integer, read_number, unsupported


def _inverse_root(file: Path, config: Settings, key: str) -> float:
    return read_number(file, config, key) ** -0.5


def _cap(file: Path, config: Settings, key: str) -> float | None:
    """Return a number above 0, or None where the setting is null."""
    if config.get(key) is None:
        return None
    return read_number(file, config, key)


# The scalar replaces the head width in 1 / sqrt(H): Gemma 3 27B has 168 = D / N there, with H = 128.
SCALAR: Reads = {"query_pre_attn_scalar": ("query_scale", _inverse_root)}
LOGIT_CAP: Reads = {"final_logit_softcapping": ("logit_cap", _cap)}
SCORE_CAP: Reads = {"attn_logit_softcapping": ("score_cap", _cap)}
QKV_BIAS: Reads = {"attention_bias": ("qkv_bias", read_flag)}
O_BIAS: Reads = {"attention_out_bias": ("o_bias", read_flag)}
MULTIPLIERS: Reads = {
    "embedding_multiplier": ("embed_scale", read_number),
    "attention_multiplier": ("query_scale", read_number),
    "residual_multiplier": ("residual_scale", read_number),
    "logits_scaling": ("logit_divisor", read_number),
}

# A config.json may leave out settings that equal transformers' own defaults; Gemma 3's do.
SWITCH = {"use_sliding_window": False}
QWEN = {**SWITCH, "sliding_window": 4096, "max_window_layers": 28}
GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
GEMMA_FACTS = {"norm_plus_one": True, "activation": "gelu_tanh"}
GEMMA3 = {
    **GEMMA,
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
}
CWM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}
MOE: Reads = {
    "num_experts": ("num_experts", read_integer),
    "num_experts_per_tok": ("experts_per_token", read_integer),
    "norm_topk_prob": ("is_router_normalised", read_flag),
}
OLMO_FACTS = {"qk_norm": True, "qk_norm_spans_heads": True, "pre_norms": False, "post_norms": True, "norm_rounds_last": True}
GLM = {"head_dim": 128, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-7, "attention_bias": True}
GLM_ROPE = {"partial_rotary_factor": 0.5}
QWEN35 = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
FAMILIES = {
    "llama": Family(
        models="Llama 2 and 3, SmolLM2, DeepSeek-R1-Distill-Llama, TinyLlama, Falcon3, Yi",
        beside="RoPE slowed down: `linear`, `llama3`, `yarn`",
    ),
    "mistral": Family(
        models="Mistral 7B, Nemo, Mistral-Small-2501",
        beside="sliding window in every layer, or none",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        windows="all",
        has_layer_types=True,  # transformers takes one that has them for a Ministral
    ),
    "qwen2": Family(
        models="Qwen2, Qwen2.5, QwQ, DeepSeek-R1-Distill-Qwen",
        beside="query, key and value bias; sliding window by layer",
        facts={"qkv_bias": True},
        defaults={"num_key_value_heads": 32, **QWEN},
        windows="from",
        period="max_window_layers",
        has_layer_types=True,
    ),
    "qwen3": Family(
        models="Qwen3, DeepSeek-R1-0528-Qwen3-8B (YaRN)",
        beside="query and key norm",
        facts={"qk_norm": True},
        defaults={"num_key_value_heads": 32, "head_dim": 128, **QWEN},
        windows="from",
        period="max_window_layers",
        has_layer_types=True,
    ),
    "ministral": Family(
        models="Ministral-8B-2410",
        beside="sliding window by layer",
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
        windows="all",
        has_layer_types=True,
    ),
    "ministral3": Family(
        models="Ministral 3, Devstral 2",
        beside="YaRN; queries grow with their position",
        defaults={"head_dim": 128, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_parameters": MINISTRAL3_ROPE},
        windows="all",
        has_query_growth=True,
    ),
    "qwen3_moe": Family(
        models="Qwen3-30B-A3B, Qwen3-235B-A22B",
        beside="Qwen3's attention; a mixture of experts",
        facts={"qk_norm": True, "mlp": "experts"},
        defaults={
            **SWITCH,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        aliases={"num_local_experts": "num_experts"},
        reads=MOE,
        required={"decoder_sparse_step": 1, "mlp_only_layers": []},  # else some layers were dense
        ffn_key="moe_intermediate_size",
        windows="all",
    ),
    "gemma": Family(
        models="Gemma 1",
        beside="norms by 1 + weight, scaled embeddings, GeGLU",
        facts=GEMMA_FACTS,
        defaults={"num_key_value_heads": 16, **GEMMA},
        activations=("gelu_pytorch_tanh", "gelu"),  # the older name meant the same
        is_embedding_scaled=True,
    ),
    "gemma2": Family(
        models="Gemma 2",
        beside="norms before and after; capped attention scores and logits; every other layer local",
        facts={**GEMMA_FACTS, "post_norms": True},
        defaults={
            **GEMMA,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        reads={**SCALAR, **LOGIT_CAP, **SCORE_CAP},
        activations=("gelu_pytorch_tanh",),
        windows="all but every last",
        period=2,
        has_layer_types=True,
        is_embedding_scaled=True,
    ),
    "gemma3_text": Family(
        models="Gemma 3",
        beside="query and key norm; local layers with a RoPE of their own",
        facts={**GEMMA_FACTS, "qk_norm": True, "post_norms": True},
        defaults=GEMMA3,
        reads={**SCALAR, **LOGIT_CAP},
        activations=("gelu_pytorch_tanh",),
        windows="all but every last",
        period="sliding_window_pattern",
        has_layer_types=True,
        is_embedding_scaled=True,
        has_local_rope=True,
    ),
    "phi3": Family(
        models="Phi-4, Phi-3-mini-4k",
        beside="q, k, v stored as one tensor, gate and up as another",
        facts={"layout": ("joined_qkv", "joined_gate_up")},
        defaults={"rms_norm_eps": 1e-5},
        windows="all",
        rope_types=("default",),
    ),
    "smollm3": Family(
        models="SmolLM3",
        beside="every fourth layer has no RoPE",
        defaults={
            **SWITCH,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
        },
        windows="without rope",
        has_layer_types=True,
    ),
    "seed_oss": Family(
        models="Seed-OSS",
        beside="query, key, value (and output) bias as config.json says",
        defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "attention_out_bias": False},
        reads={**QKV_BIAS, **O_BIAS},
    ),
    "cwm": Family(
        models="Code World Model",
        beside="sliding window by layer",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "rope_parameters": CWM_ROPE,
            "sliding_window": 8192,
        },
        windows="all but every first",
        period=4,
        has_layer_types=True,
    ),
    "olmo2": Family(
        models="OLMo 2",
        beside="norms after attention and MLP alone; one query norm over all heads",
        facts=OLMO_FACTS,
        defaults={"rms_norm_eps": 1e-5},
    ),
    "olmo3": Family(
        models="OLMo 3",
        beside="the same, local layers, YaRN on the global ones",
        facts=OLMO_FACTS,
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "rope_local_base_freq": 500_000.0, "sliding_window": 4096},
        windows="all but every last",
        period=4,
        has_layer_types=True,
        has_local_rope=True,
        # transformers leaves the local layers' at this value, whatever `rope_theta` says.
        required={"rope_theta": 500_000.0, "rope_local_base_freq": 500_000.0},
    ),
    "granite": Family(
        models="Granite 3",
        beside="embeddings, scores, residuals and logits multiplied",
        defaults=dict.fromkeys(MULTIPLIERS, 1.0),
        reads=MULTIPLIERS,
    ),
    "glm": Family(
        models="GLM-4-9B",
        beside="interleaved RoPE on half the channels; gate and up stored as one",
        facts={"layout": ("joined_gate_up",)},
        defaults={**GLM, **GLM_ROPE},
        reads=QKV_BIAS,
        has_partial_rope=True,
        is_rope_interleaved=True,
    ),
    "glm4": Family(
        models="GLM-4-0414",
        beside="the same, and norms before and after",
        facts={"layout": ("joined_gate_up", "glm4_norms"), "post_norms": True},
        defaults={**GLM, **GLM_ROPE},
        reads=QKV_BIAS,
        has_partial_rope=True,
        is_rope_interleaved=True,
    ),
    "qwen3_5_text": Family(
        models="Qwen3.5, 3.6, 3.8 dense, as exported",
        beside="gated delta nets, and attention with an output gate and RoPE on a quarter of the channels",
        facts={"qk_norm": True, "norm_plus_one": True, "has_output_gate": True},
        defaults=QWEN35,
        # transformers reads none of them.
        required={"attn_output_gate": True, "output_gate_type": "swish", "mlp_only_layers": []},
        has_partial_rope=True,
        has_image_rope=True,
        has_delta=True,
    ),
}

QWEN2_TEXT = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
TEXT_OF = {
    "gemma3": TextPart(
        settings={"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]},
        models="Gemma 3 with images",
        becomes="`gemma3_text`",
    ),
    "qwen2_5_vl": TextPart(settings=QWEN2_TEXT, models="Qwen2.5-VL", becomes="`qwen2`"),
    "qwen3_vl": TextPart(
        settings={"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}, models="Qwen3-VL", becomes="`qwen3`"
    ),
    "qwen3_5": TextPart(
        settings={"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]},
        models="Qwen3.5, 3.6, 3.8 dense (0.8B to 27B)",
        becomes="`qwen3_5_text`; images and the layers that predict further tokens (`mtp.`) are left out",
    ),
    "mistral3": TextPart(
        models="Mistral-Small-3.1 and 3.2; Ministral 3 with images",
        becomes="`mistral` or `ministral3`, as its text says",
    ),
    "mimo": TextPart(
        settings=QWEN2_TEXT,
        left_out=("auto_map", "num_nextn_predict_layers"),
        models="MiMo-7B",
        becomes="`qwen2`; layers that predict further tokens (`model.mtp_layers.`) are left out",
    ),
}
# What the families of `mistral3`'s text are called as models of their own.
CLASSES = {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"}
SHARED = ("dtype", "torch_dtype", "eos_token_id")  # settings that the text may leave to the whole
OF_WHOLE = ("tie_word_embeddings", "quantization_config")  # settings of which transformers takes the whole's

# Settings with which the decoder would compute something else -> the one value, besides null and absent, that they may have in
# a family that does not read them. transformers ignores some of them there; but who sets one means it.
NEUTRAL = {
    "attention_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "query_pre_attn_scalar": None,
    "attn_logit_softcapping": None,  # transformers' Gemma 3 has the setting and ignores it
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "is_causal": True,
    "no_rope_layers": None,
    "embedding_multiplier": 1.0,
    "attention_multiplier": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "num_experts": None,
    "num_local_experts": None,
}


def text_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read config.json of `path` (a folder or hub id); of a model that also sees images, the part about text.

    Raises: UserError naming the file if it is missing, malformed, or of a family that is not supported.
    """
    file = resolve(path) / "config.json"
    if not file.is_file():
        raise UserError(f"model.path = {os.fspath(path)!r}: the folder has no config.json")
    config = read_json(file)
    part = TEXT_OF.get(str(config.get("model_type")))
    if part is not None:
        config = _text_part(config, part)
    kind = config.get("model_type")
    if str(kind) not in FAMILIES:
        raise unsupported(file, "model_type", kind, ", ".join([*FAMILIES, *TEXT_OF]))
    if part is not None or FAMILIES[str(kind)].has_image_rope:
        _leave_out_sections(config)
    return config


def _text_part(config: dict[str, Any], part: TextPart) -> dict[str, Any]:
    """Return the settings of a model of text alone."""
    if isinstance(config.get("text_config"), dict):
        shared, of_whole = ({key: config[key] for key in keys if config.get(key) is not None} for keys in (SHARED, OF_WHOLE))
        config = {**shared, **config["text_config"], **of_whole}
    config = {**{key: value for key, value in config.items() if key not in part.left_out}, **part.settings}
    if config.get("model_type") in CLASSES:
        config["architectures"] = [CLASSES[config["model_type"]]]
    return config


def _leave_out_sections(config: dict[str, Any]) -> None:
    """Take the axes of images out of the rotary settings."""
    # Time, height and width of an image turn channels of their own. A text's tokens are at one place on all three: the plain
    # embedding, which is what a model of text alone calls it.
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict) and "mrope_section" in config[key]:
            plain = {name: value for name, value in config[key].items() if not name.startswith("mrope_")}
            config[key] = {name: "default" if value == "mrope" else value for name, value in plain.items()}


def read_architecture(path: str | os.PathLike[str]) -> Architecture:
    """Read the architecture that `path` (a folder or hub id) describes in its config.json.

    Raises: UserError naming the file, the key and its value where something is missing, malformed or not supported.
    """
    file, config = resolve(path) / "config.json", text_config(path)
    family = FAMILIES[config["model_type"]]
    if config.get("rope_parameters") is None:  # null is as good as absent
        config.pop("rope_parameters", None)
    for alias, own in family.aliases.items():
        if alias in config and config[alias] != config.setdefault(own, config[alias]):
            raise UserError(f"{file}: {alias} = {json.dumps(config[alias])} beside {own} = {json.dumps(config[own])}")
    config = {**family.defaults, **config}
    _check_settings(file, config, family)
    dim, num_heads = read_integer(file, config, "hidden_size"), read_integer(file, config, "num_attention_heads")
    num_kv_heads = read_integer(file, config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise UserError(f"{file}: num_key_value_heads = {num_kv_heads} must divide num_attention_heads = {num_heads}")
    optional = dict(family.facts)
    if family.is_embedding_scaled:
        optional["embed_scale"] = dim**0.5
    optional.update({field: read(file, config, key) for key, (field, read) in family.reads.items()})
    return Architecture(
        vocab_size=read_integer(file, config, "vocab_size"),
        dim=dim,
        num_layers=read_integer(file, config, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=read_integer(file, config, "head_dim", dim // num_heads),
        norm_eps=positive(config.get("rms_norm_eps", 1e-6), f"{file}: rms_norm_eps"),
        tie_embeddings=read_flag(file, {"tie_word_embeddings": False, **config}, "tie_word_embeddings"),
        **{"ffn_dim": read_integer(file, config, family.ffn_key), **read_positions(file, config, family), **optional},
        **read_mixers(file, config, family),
    )


def _check_settings(file: Path, config: Settings, family: Family) -> None:
    # A setting that was ignored here would still load and train, with other logits than the model's: nothing would show it.
    is_read = {*family.reads, *family.defaults, *family.aliases}
    required = {key: value for key, value in NEUTRAL.items() if key not in is_read} | dict(family.required)
    if family.facts.get("qkv_bias"):
        del required["attention_bias"]  # this family always has the bias and does not look at the setting
    if "use_sliding_window" not in family.defaults:  # nor at this one: a window that is there holds
        required["use_sliding_window"] = family.windows != "none" and config.get("sliding_window") is not None
    for key in ("hidden_act", "hidden_activation"):
        if config.get(key) not in (None, *family.activations):
            raise unsupported(file, key, config[key], ", ".join(family.activations))
    for key, value in required.items():
        if config.get(key) in (None, value):
            continue
        if value is None:
            raise unsupported(file, key, config[key], "absent")
        raise unsupported(file, key, config[key], value)
