"""Every setting of every family: what changes transformers' logits changes ours as much, or is refused.

A model is built by transformers from the very config.json that we read. Where our architecture stays the same, its weights and
logits must too; where ours changes, the logits are compared (all of it nightly, as each is another decoder).
"""

import contextlib
import io
import json
import logging
import pathlib

import jax
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_jax.errors import UserError
from grpo_jax.models import hf
from grpo_jax.models.families import FAMILIES, TEXT_OF, read_architecture
from grpo_jax.models.linear import head_logits
from grpo_jax.models.transformer import ModelDef
from grpo_jax.tools import families_table
from tests.hf_models import HERE, centre_of

SIZES = {
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}
KINDS = ["full_attention", "sliding_attention"]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "beta_fast": 1.0, "beta_slow": 0.05, "original_max_position_embeddings": 4}
TWO_ROPES = {KINDS[0]: {"rope_type": "linear", "factor": 4.0, "rope_theta": 99.0}, KINDS[1]: {"rope_theta": 77.0}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
DELTA = {
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 2,
}
BASES = {
    "mistral": {"sliding_window": 3},
    "ministral": {"sliding_window": 3, "layer_types": KINDS},
    "ministral3": {"rope_parameters": {**YARN, "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
    "qwen3_moe": EXPERTS,
    "gemma2": {"sliding_window": 3, "query_pre_attn_scalar": 5, "attn_logit_softcapping": 5.0},
    "gemma3_text": {"sliding_window": 3, "sliding_window_pattern": 2, "query_pre_attn_scalar": 5},
    "phi3": {"rope_theta": 1e4},
    "smollm3": {"no_rope_layers": [1, 0]},
    "cwm": {"sliding_window": 3},
    "olmo3": {"sliding_window": 3, "layer_types": KINDS},
    # A state's answer may be next to nothing: without the larger epsilon its norm would show float32's last digits.
    "qwen3_5_text": {**DELTA, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "rms_norm_eps": 0.01},
}
ON = {"use_sliding_window": True, "sliding_window": 3}
# Settings that some model of some library reads, of the right type.
CHANGES = [
    *({key: True} for key in ("attention_bias", "attention_out_bias", "mlp_bias", "qkv_bias", "bias", "use_qk_norm")),
    *({key: True} for key in ("use_bidirectional_attention", "attn_output_gate", "rope_interleaved", "tie_word_embeddings")),
    *({key: False} for key in ("attention_bias", "is_causal", "use_sliding_window", "tie_word_embeddings")),
    *({key: 0.5} for key in ("partial_rotary_factor", "rotary_pct", "embedding_multiplier", "residual_multiplier")),
    *({key: 3.0} for key in ("logits_scaling", "attention_multiplier", "logit_scale", "clip_qkv", "scale_emb")),
    *({key: 2.0} for key in ("final_logit_softcapping", "attn_logit_softcapping")),
    *({key: None} for key in ("final_logit_softcapping", "attn_logit_softcapping", "sliding_window", "rope_parameters")),
    *({key: None} for key in ("layer_types", "no_rope_layers", "num_key_value_heads", "head_dim")),
    *({"hidden_act": name} for name in ("gelu", "relu", "gelu_pytorch_tanh")),
    *({"hidden_activation": name} for name in ("gelu", "relu")),
    {"query_pre_attn_scalar": 3},
    {"rms_norm_eps": 0.3},
    {"num_key_value_heads": 2},
    {"head_dim": 6},
    {"sliding_window": 2},
    {"max_window_layers": 1},
    {"sliding_window_pattern": 1},
    {"layer_types": KINDS, "sliding_window": 3},
    {"layer_types": KINDS, **ON},
    {"layer_types": ["sliding_attention"] * 2, **ON},
    ON,
    {**ON, "max_window_layers": 1},
    {"no_rope_layers": [0, 1]},
    {"no_rope_layer_interval": 1},
    {"rope_theta": 99.0},
    {"rope_local_base_freq": 55.0},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "rope_theta": 77.0}},
    {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}},
    {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
    {"rope_scaling": LLAMA3},
    {"rope_scaling": YARN},
    {"rope_scaling": {**YARN, "attn_factor": 0.5}},
    {"rope_scaling": {**YARN, "attention_factor": 2.0, "truncate": False}},
    {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.5}},
    {"rope_scaling": {**YARN, "mscale": 2.0}},
    {"rope_scaling": YARN, "original_max_position_embeddings": 16},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {**YARN, "rope_theta": 77.0, "llama_4_scaling_beta": 0.4}},
    {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"rope_parameters": TWO_ROPES},
    {"rope_parameters": {**TWO_ROPES, KINDS[0]: {**YARN, "rope_theta": 99.0}}},
    {"num_experts_per_tok": 1},
    {"norm_topk_prob": True},
    {"mlp_only_layers": [0]},
    {"decoder_sparse_step": 2},
    {"moe_intermediate_size": 5},
    {"layer_types": ["full_attention", "linear_attention"]},
    {"layer_types": ["full_attention"] * 2},
    {"layer_types": None, "full_attention_interval": 1},
    {"layer_types": None, "full_attention_interval": 3},
    {"full_attention_interval": 1},
    {"linear_conv_kernel_dim": 4},
    {"linear_num_value_heads": 1},
    {"linear_value_head_dim": 5},
    {
        "rope_parameters": {
            "rope_theta": 77.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
            "mrope_interleaved": True,
        }
    },
    {"attn_output_gate": False},
    {"output_gate_type": "sigmoid"},
]


@pytest.fixture
def folder(tmp_path):
    """A folder, while torch says little and runs on one thread: its models here are too small to share."""
    logger, num_threads = logging.getLogger("transformers"), torch.get_num_threads()
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.set_num_threads(1)
    yield tmp_path
    logger.setLevel(level)
    torch.set_num_threads(num_threads)


def torch_of(folder):
    """transformers' model of this config.json, in which every tensor is random, and the same under the same name."""
    config = AutoConfig.from_pretrained(folder)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(key)))
            parameter.copy_(centre_of(config, key) + 0.3 * noise if "norm" in key else 0.5 * noise)
    return model


TOKENS = torch.from_numpy(np.random.default_rng(0).integers(1, 11, (1, 24)))


def torch_logits(model):
    with torch.no_grad():
        return model(TOKENS).logits[0].numpy()


def our_logits(folder, arch):
    with jax.disable_jit():  # op by op: no two of these decoders would share a program
        params = hf.load_params(folder, arch, "float32", HERE)
        decoder = ModelDef(arch).bind(params)
        hidden_TD = decoder(jax.numpy.asarray(TOKENS.numpy()), np.ones(TOKENS.shape, bool))[0]
        return np.asarray(head_logits(hidden_TD, decoder.head_VD, decoder.logit_cap))


def torch_refuses_or(folder):
    """transformers' (shapes of the weights, logits); None where it does not take this config.json."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model = torch_of(folder)
            return model, {key: value.shape for key, value in model.state_dict().items()}, torch_logits(model)
    except Exception:  # of its own many kinds
        return None


def compare(folder, family, is_numeric):
    """-> the number of changes that were (refused, without effect, equally effective)."""
    base = {**SIZES, **BASES.get(family, {}), "model_type": family}

    def write(config):
        (folder / "config.json").write_text(json.dumps(config))

    write(base)
    base_arch, (_, base_shapes, base_logits) = read_architecture(folder), torch_refuses_or(folder)
    counts = [0, 0, 0]
    for change in CHANGES:
        write({**base, **change})
        try:
            arch = read_architecture(folder)
        except UserError as error:
            assert "config.json" in str(error)
            counts[0] += 1
            continue
        if arch != base_arch and not is_numeric:
            counts[2] += 1
            continue
        theirs = torch_refuses_or(folder)
        if theirs is None:
            continue
        model, shapes, logits = theirs
        if arch == base_arch:
            assert shapes == base_shapes, f"{family}: {change} changes transformers' weights"
            np.testing.assert_allclose(logits, base_logits, atol=1e-6, err_msg=f"{family}: {change} is not seen")
            counts[1] += 1
            continue
        with contextlib.redirect_stderr(io.StringIO()):
            model.save_pretrained(folder)
        write({**base, **change})
        np.testing.assert_allclose(our_logits(folder, arch), logits, atol=2e-4, err_msg=f"{family}: {change}")
        counts[2] += 1
    return counts


def test_the_pages_list_every_family(capsys):
    root = pathlib.Path(__file__).parent.parent
    assert families_table.main([f"--root={root}"]) == 0, capsys.readouterr().out
    rows = families_table.families_table(root)[2:] + families_table.texts_table(root)[2:]
    assert [row.split("`")[1] for row in rows] == [*FAMILIES, *TEXT_OF]
    assert all(len(cell.strip()) > 3 for row in rows for cell in row.split("|")[1:-2])
    line = families_table.models_line()
    assert line in (root / families_table.README).read_text() and line.count(", ") == len(FAMILIES) - 1


def test_a_list_that_is_out_of_date_is_written_anew(tmp_path, capsys):
    root, page = pathlib.Path(__file__).parent.parent, tmp_path / families_table.PAGE
    for name in (families_table.PAGE, families_table.README, families_table.PUBLISHED):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((root / name).read_text())
    page.write_text(page.read_text().replace("| Seed-OSS |", "| Sead-OSS |"))
    assert families_table.main([f"--root={tmp_path}"]) == 1 and "docs/models.md: out of date" in capsys.readouterr().out
    assert families_table.main([f"--root={tmp_path}", "--write"]) == 0 and families_table.main([f"--root={tmp_path}"]) == 0
    assert page.read_text() == (root / families_table.PAGE).read_text()
    page.write_text("")
    with pytest.raises(UserError, match=r"docs/models.md: no <!-- families:begin -->"):
        families_table.main([f"--root={tmp_path}"])


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "gemma3_text", "smollm3", "olmo3", "qwen3_moe", "qwen3_5_text"]
)  # every way of reading
@pytest.mark.slow
def test_a_setting_that_changes_nothing_here_changes_nothing_there(folder, family):
    refused, without_effect, effective = compare(folder, family, is_numeric=False)
    assert refused > 10 and without_effect > 5 and effective > 5


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.nightly
def test_a_setting_that_changes_logits_changes_ours_as_much(folder, family):
    assert compare(folder, family, is_numeric=True)[2] > 5
