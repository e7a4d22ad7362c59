"""Every family beside transformers: the same logits, and the sampler, its learner and torch agree on every sampled token."""

import json

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from grpo_jax.config import RolloutConfig
from grpo_jax.errors import UserError
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.models.architecture import Delta, Rope
from grpo_jax.models.export import export_folder
from grpo_jax.models.families import read_architecture
from grpo_jax.models.folders import SINGLE
from grpo_jax.models.gated_delta import CHUNK_TOKENS
from grpo_jax.models.lora import DELTA_TARGETS, TARGETS, LoRA, split_adapters
from grpo_jax.models.peft import adapter_names
from grpo_jax.models.tensor_names import leaf_slot
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rollout.rollout import EndTokens, rollout, row_keys, sampling_of
from tests import tiny
from tests.hf_models import (
    MODELS,
    SIZES,
    WINDOW,
    exact_logits,
    jax_logits,
    left_padded,
    load,
    tolerance,
    torch_logits,
    torch_model,
)

P, G, S, T = 3, 2, 7, 6
NEW = [("qwen3 moe", 2), ("gemma 2", 2), ("ministral 3", 2), ("qwen3.5", 3)]
SAMPLED = [("llama 3", 2), ("qwen2, windows", 2), ("qwen3 untied", 2), ("mistral", 2), ("gemma 3", 5), *NEW]
OTHERS = [name for name in MODELS if name not in dict(SAMPLED)]  # of their own number of layers
TEMPERATURE = 0.7


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    """(torch's model, the folder it was saved to)."""
    model, folder = torch_model(request.param), tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.slow
def test_logits_equal_torch_on_left_padded_batches(pair):
    model, folder = pair
    tokens_BT, mask_BT = left_padded()
    ours, theirs = jax_logits(folder, tokens_BT, mask_BT)[mask_BT], exact_logits(model, tokens_BT, mask_BT)
    assert np.abs(theirs).max() > 1  # otherwise the tolerance would prove nothing
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance(model, tokens_BT, mask_BT))


@pytest.mark.parametrize("name", ["qwen3.5", "llama 3", "cwm"])
@pytest.mark.slow
def test_logits_equal_torch_over_several_chunks_and_beyond_the_original_context(tmp_path, name):
    """The others' windows and contexts end within the 17 tokens above."""
    model = torch_model(name)
    model.save_pretrained(tmp_path)
    tokens_BT, mask_BT = left_padded(2 * CHUNK_TOKENS + 9)
    ours, theirs = jax_logits(tmp_path, tokens_BT, mask_BT)[mask_BT], exact_logits(model, tokens_BT, mask_BT)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance(model, tokens_BT, mask_BT))


@pytest.mark.slow
def test_exported_files_are_transformers_own_and_adapters_have_its_names(pair, tmp_path):
    """Tensor by tensor what transformers saved; and each of our adapters belongs to a module that it has."""
    model, folder = pair
    arch = read_architecture(folder)
    export_folder(tmp_path / "out", load(folder), arch, folder, "float32", 10**9)
    theirs, ours = (load_file(each / SINGLE) for each in (folder, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor, err_msg=name)
    assert read_architecture(tmp_path / "out") == arch
    modules = {f"base_model.model.{name}" for name, _ in model.named_modules()}
    adapters = flatten_dict(split_adapters(ModelDef(arch, lora=LoRA(2, 1.0, (*TARGETS, *DELTA_TARGETS))).param_shapes())[1])
    adapted = []
    for path in [path for path in adapters if path[-1] == "lora_a"]:
        if arch.mlp == "experts" and "mlp" in path:
            continue  # modules of their own in older versions alone
        if leaf_slot(".".join((*path[:-1], "weight")), arch).is_joined:
            with pytest.raises(UserError, match="joins"):
                adapter_names(path, arch)
        else:
            names = [name.removesuffix(".lora_A.weight") for name in adapter_names(path, arch)]
            assert len(names) == arch.num_layers // arch.period and set(names) <= modules
            adapted += names
    assert len(adapted) == len(set(adapted)) > arch.num_layers


@pytest.mark.parametrize(
    ("name", "num_layers"),
    [*SAMPLED, *(pytest.param(name, None, marks=pytest.mark.nightly) for name in OTHERS)],
)
@pytest.mark.slow
def test_sampler_learner_and_torch_agree_on_every_token(tmp_path, name, num_layers):
    """The sampler's cached decode, the learner's forward over prefix and completion, torch's over whole rows.

    Prompts of 1 to 7 tokens with 6 sampled ones: windows end in the prompt, at its border and in the completion.
    """
    torchs = torch_model(name, **({} if num_layers is None else {"num_hidden_layers": num_layers}))
    torchs.save_pretrained(tmp_path)
    model, params, prompts = ModelDef(read_architecture(tmp_path)), load(tmp_path), tiny.random_prompts(P, S, vocab=61)
    config = RolloutConfig(group_size=G, max_completion_tokens=T, temperature=TEMPERATURE)

    @jax.jit
    def sample_and_score(params, prompts, keys_PG):
        drawn = rollout(model, params, prompts, keys_PG, config, EndTokens((), 0))
        return drawn, policy_logprobs(model, params, drawn, sampling_of(config), 16)

    drawn, (logp_PGT, entropy_PGT) = jax.device_get(sample_and_score(params, prompts, row_keys(jax.random.key(0), P, G)))
    rows = [np.repeat(x, G, axis=0) for x in (prompts.tokens_PS, prompts.mask_PS)]
    tokens_BX = np.concatenate([rows[0], drawn.tokens_PGT.reshape(P * G, T)], 1)
    mask_BX = np.concatenate([rows[1], np.ones((P * G, T), bool)], 1)
    logits_BTV = torch.from_numpy(torch_logits(torchs, tokens_BX, mask_BX)[:, S - 1 : -1] / TEMPERATURE)
    theirs_BTV = torch.log_softmax(logits_BTV, -1).numpy()
    theirs_BT = np.take_along_axis(theirs_BTV, tokens_BX[:, S:, None], -1)[..., 0]
    assert theirs_BT.std() > 0.3
    np.testing.assert_allclose(drawn.sampler_logp_PGT.reshape(P * G, T), theirs_BT, atol=2e-5)
    np.testing.assert_allclose(logp_PGT, drawn.sampler_logp_PGT, atol=2e-5)
    np.testing.assert_allclose(entropy_PGT, drawn.entropy_PGT, atol=2e-5)


# -------------------------------------------------------------------------------------------------------- config.json


@pytest.fixture
def read(tmp_path):
    """config.json's settings, beside the sizes -> Architecture."""

    def read(**config):
        (tmp_path / "config.json").write_text(json.dumps({**SIZES, **config}))
        return read_architecture(tmp_path)

    return read


def test_which_layers_have_the_window(read):
    def windows(**config):
        arch = read(**config)
        return arch.sliding_window, arch.local_layers

    sliding = {"use_sliding_window": True, "sliding_window": WINDOW}
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    assert windows(model_type="llama", sliding_window=WINDOW) == (None, ())  # transformers' Llama has none
    assert windows(model_type="mistral", sliding_window=WINDOW) == (WINDOW, (0, 1, 2))
    assert windows(model_type="mistral") == (4096, (0, 1, 2))
    assert windows(model_type="mistral", sliding_window=None) == (None, ())
    assert windows(model_type="qwen2", sliding_window=WINDOW) == (None, ())
    assert windows(model_type="qwen2", **sliding) == (None, ())  # max_window_layers is 28 where nothing is said
    assert windows(model_type="qwen3", **sliding, max_window_layers=1) == (WINDOW, (1, 2))
    assert windows(model_type="qwen3", **sliding, layer_types=kinds) == (WINDOW, (1,))
    assert windows(model_type="gemma3_text", num_hidden_layers=12) == (4096, (0, 1, 2, 3, 4, 6, 7, 8, 9, 10))
    assert windows(model_type="gemma3_text", sliding_window_pattern=2) == (4096, (0, 2))
    assert windows(model_type="gemma3_text", sliding_window=WINDOW, layer_types=kinds) == (WINDOW, (1,))


def test_gemma_3_of_old_config_files(read):
    """As the hub has it: what transformers 5 would write anew is spread over several keys, or left out."""
    arch = read(model_type="gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_theta=2e6)
    assert (arch.rope, arch.local_rope) == (Rope(2e6, factor=8.0), Rope(1e4))
    assert read(model_type="gemma3_text", rope_local_base_freq=5e3).local_rope == Rope(5e3)
    assert (arch.head_dim, arch.query_scale, arch.embed_scale) == (256, 1 / 16, 32**0.5)
    assert arch.tie_embeddings and arch.logit_cap is None and arch.activation == "gelu_tanh"


QWEN35_27B = {  # as the hub has it, a thirty-second as wide and a quarter as deep
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "model_type": "qwen3_5",
    "image_token_id": 248056,
    "tie_word_embeddings": False,
    "vision_config": {"model_type": "qwen3_5", "depth": 27, "hidden_size": 1152},
    "text_config": {
        **{"model_type": "qwen3_5_text", "dtype": "bfloat16", "vocab_size": 61, "hidden_size": 160, "intermediate_size": 544},
        **{"num_hidden_layers": 16, "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 8, "hidden_act": "silu"},
        **{"attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True, "full_attention_interval": 4},
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 4,
        **{"linear_num_key_heads": 16, "linear_num_value_heads": 48, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
        **{"linear_conv_kernel_dim": 4, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "mlp_only_layers": []},
        **{"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False, "rms_norm_eps": 1e-6, "use_cache": True},
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25},
            **{"mrope_interleaved": True, "mrope_section": [11, 11, 10]},
        },
    },
}


def test_qwen35_as_the_hub_has_it(read, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN35_27B))
    arch = read_architecture(tmp_path)
    assert arch.mixers == ("gated_delta", "gated_delta", "gated_delta", "attention") and arch.num_attention_layers == 4
    assert arch.delta == Delta(num_key_heads=16, num_value_heads=48, key_dim=4, value_dim=4, conv_width=4)
    assert arch.rope == Rope(1e7, share=0.25) and not arch.tie_embeddings
    assert arch.has_output_gate and arch.norm_plus_one and arch.qk_norm
    bare = read(model_type="qwen3_5_text", num_hidden_layers=8)
    assert (bare.mixers, bare.head_dim, bare.rope.share) == (arch.mixers, 256, 0.25)
    assert read(model_type="qwen3_5_text", num_hidden_layers=6).mixers == (*arch.mixers, "gated_delta", "gated_delta")
    assert read(model_type="qwen3_5_text", full_attention_interval=1).delta is None


def test_llama_3_of_old_config_files(read):
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    arch = read(model_type="llama", rope_theta=5e5, rope_scaling={**scaling, "original_max_position_embeddings": 8192})
    assert arch.rope == Rope(5e5, factor=8.0, llama3=(1.0, 4.0, 8192))
    arch = read(model_type="llama", rope_scaling=scaling, max_position_embeddings=2048)
    assert arch.rope == Rope(1e4, factor=8.0, llama3=(1.0, 4.0, 2048))


def test_a_mistral_whose_layers_are_of_two_kinds_is_a_ministral(read):
    kinds = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
    mistral, ministral = (read(model_type=name, **kinds) for name in ("mistral", "ministral"))
    assert mistral == ministral and mistral.local_layers == (0, 2) and mistral.sliding_window == 5
    assert read(model_type="mistral", sliding_window=5).local_layers == (0, 1, 2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "llama", "layer_types": ["sliding_attention"] * 3}, ["layer_types", "sliding_attention"]),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 3}, ["layer_types", "full_attention"]),
        ({"model_type": "gemma3_text", "layer_types": ["chunked"] * 3}, ["chunked", "full_attention, sliding_attention"]),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"] * 2}, ["2 entries", "num_hidden_layers = 3"]),
        ({"model_type": "gemma3_text", "sliding_window": 0}, ["sliding_window", "0", "positive integer"]),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, ["hidden_activation", '"gelu"', "gelu_pytorch_tanh"]),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "50.0", "absent"]),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, ["use_bidirectional_attention", "true"]),
        ({"model_type": "qwen3_5_text", "attn_output_gate": False}, ["attn_output_gate", "false", "True"]),
        (
            {"model_type": "qwen3_5_text", "linear_num_key_heads": 3},
            ["linear_num_key_heads = 3", "value_heads = 32"],
        ),
        ({"model_type": "qwen3_5_text", "layer_types": ["linear_attention"] * 2}, ["2 entries", "num_hidden_layers = 3"]),
        ({"model_type": "qwen3_5_text", "head_dim": 12}, ["partial_rotary_factor", "0.25", "head_dim = 12"]),
    ],
)
def test_what_a_family_does_not_have_is_named(read, config, words):
    with pytest.raises(UserError) as error:
        read(**config)
    assert [word for word in words if word not in str(error.value)] == []
