"""Tiny random transformers models, one for every way in which the families differ, and their logits beside ours."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import SingleDeviceSharding
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_jax.models import hf
from grpo_jax.models.families import read_architecture
from grpo_jax.models.linear import head_logits
from grpo_jax.models.transformer import ModelDef

HERE = SingleDeviceSharding(jax.devices()[0])
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
WINDOW = 4  # shorter than every sequence below, so that it matters
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of six channel pairs one keeps its speed, two are blended, three slow down
}
YARN = {  # of eight channel pairs one keeps its speed, three are blended, four slow down in full
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 1.0,
    "beta_slow": 0.05,
}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}
SECTIONS = {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
KINDS = ["full_attention", "sliding_attention", "sliding_attention"]
GEMMA2_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
MODELS = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama untied, wide heads": ("llama", {"head_dim": 12, "rms_norm_eps": 1e-5, "rope_theta": 100_000.0}),
    "llama, one key/value head": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama 3": ("llama", {"head_dim": 12, "rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True, "rope_theta": 1_000_000.0}),
    "qwen2 untied, all heads": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2, windows": ("qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True, "head_dim": 16}),
    "qwen3 untied": ("qwen3", {"head_dim": 8, "rope_theta": 1_000_000.0}),
    "qwen3 moe": ("qwen3_moe", {"head_dim": 12, **EXPERTS, "norm_topk_prob": True}),
    "mistral": ("mistral", {"sliding_window": WINDOW, "head_dim": 12}),
    "qwen3, yarn": ("qwen3", {"head_dim": 16, "rope_parameters": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}}),
    "ministral": ("ministral", {"sliding_window": WINDOW, "head_dim": 12, "layer_types": KINDS, "rope_theta": 1e8}),
    "ministral 3": (
        "ministral3",
        {
            "head_dim": 12,
            "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.5, "truncate": False, "attention_factor": 1.3},
        },
    ),
    "phi 4": ("phi3", {"rope_theta": 250_000.0}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1], "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 12}),
    "gemma 2": ("gemma2", {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": WINDOW, **GEMMA2_CAPS}),
    "seed-oss": ("seed_oss", {"head_dim": 12, "attention_out_bias": True}),
    "cwm": ("cwm", {"head_dim": 12, "sliding_window": WINDOW, "rope_parameters": LLAMA3}),
    "olmo 2": ("olmo2", {"rope_theta": 500_000.0}),
    "olmo 3": (
        "olmo3",
        {
            "num_hidden_layers": 5,
            "sliding_window": WINDOW,
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 500_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500_000.0},
            },
        },
    ),
    "granite": (
        "granite",
        {"embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22, "logits_scaling": 0.5},
    ),
    "qwen3.5": (  # gated delta nets with one attention below, then one above them: the stack repeats nothing
        "qwen3_5_text",
        {
            **DELTA,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.25, **SECTIONS},
        },
    ),
    "qwen3.5, deep": (
        "qwen3_5_text",
        {**DELTA, "num_hidden_layers": 8, "tie_word_embeddings": True, "linear_num_value_heads": 2},
    ),
    "glm": ("glm", {"head_dim": 12}),
    "glm 4": ("glm4", {"head_dim": 8, "attention_bias": False}),
    "gemma 3": (  # five layers: scanned, so that the kind of a layer is known to the compiled program only
        "gemma3_text",
        {
            "num_hidden_layers": 5,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "final_logit_softcapping": 3.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
        },
    ),
}


def torch_config(name: str, **changes):
    """transformers' configuration of a tiny model."""
    family, its_own = MODELS[name]
    return AutoConfig.for_model(family, **{**SIZES, **its_own, **changes})


def torch_model(name: str, dtype=torch.float32, **changes):
    """A tiny model in which no bias is zero and no norm is one, so that a tensor left out or swapped shows."""
    config = torch_config(name, **changes)
    config._experts_implementation = "eager"  # the quicker ones know no float64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()
    randomise(model)
    return model


def randomise(model):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre_of(model.config, key) + 0.3 * noise if "norm" in key else 0.1 * noise)


def centre_of(config, key):
    """The mean of a norm's random weights: 1, though it is 2 that Gemma's multiply by then.

    Qwen3.5's stack would make too much of each rounding to be compared: 0 where its norms multiply by 1 + weight, which those
    of its gated delta nets do not.
    """
    is_qwen35 = config.get_text_config().model_type == "qwen3_5_text"
    return 0.0 if is_qwen35 and "linear_attn" not in key else 1.0


def load(folder, dtype="float32"):
    return hf.load_params(folder, read_architecture(folder), dtype, HERE)


def left_padded(width=17):
    tokens_BT = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (4, width))
    mask_BT = np.arange(width)[None] >= np.array([0, 3, width // 2 + 1, width - 1])[:, None]
    return tokens_BT, mask_BT


@functools.partial(jax.jit, static_argnums=0)
def forward(model: ModelDef, params, tokens_BT, mask_BT):
    decoder = model.bind(params)
    hidden_BTD = decoder(tokens_BT, mask_BT)
    logits_NV = head_logits(hidden_BTD.reshape(-1, model.arch.dim), decoder.head_VD, decoder.logit_cap)
    return logits_NV.reshape(*tokens_BT.shape, -1)


def jax_logits(folder, tokens_BT, mask_BT):
    return np.asarray(forward(ModelDef(read_architecture(folder)), load(folder), jnp.asarray(tokens_BT), jnp.asarray(mask_BT)))


def torch_logits(model, tokens_BT, mask_BT):
    positions_BT = np.maximum(mask_BT.cumsum(-1) - 1, 0)
    inputs = {"input_ids": tokens_BT, "attention_mask": mask_BT.astype(int), "position_ids": positions_BT}
    with torch.no_grad():
        return model(**{key: torch.from_numpy(np.asarray(value, np.int64)) for key, value in inputs.items()}).logits.numpy()


def exact_logits(model, tokens_BT, mask_BT):
    """In float64, each row alone and without its padding; [real tokens, V], rows one after another."""
    return logits_alone(copy.deepcopy(model).double(), tokens_BT, mask_BT)


def logits_alone(model, tokens_BT, mask_BT):
    with torch.no_grad():
        rows = [model(torch.from_numpy(tokens[mask][None])).logits[0] for tokens, mask in zip(tokens_BT, mask_BT, strict=True)]
    return torch.cat(rows).numpy()


def tolerance(model, tokens_BT, mask_BT):
    """1e-5; with gated delta nets, whose answers are normed however small they are, three times what float32 costs torch.

    2e-5 for Gemma, whose residual stream is larger (post-norms, embeddings times sqrt(D)): 1.03e-5 was seen, with jax 0.7.2.
    """
    if model.config.model_type.startswith("gemma"):
        return 2e-5
    if not hasattr(model.config, "linear_num_key_heads"):
        return 1e-5
    noise = np.abs(logits_alone(model, tokens_BT, mask_BT) - exact_logits(model, tokens_BT, mask_BT)).max()
    assert noise < 2e-4
    return max(1e-5, 3 * noise)
