"""Hugging Face folders: every dtype and layout loads exactly; every way a folder can be wrong ends in one line saying so."""

import dataclasses
import json
import tracemalloc
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from grpo_jax.errors import UserError
from grpo_jax.models import export, folders, hf
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.models.export import save_weights
from grpo_jax.models.families import read_architecture
from grpo_jax.models.transformer import init_params
from tests import tiny
from tests.hf_models import HERE, SIZES, load, torch_model


@pytest.fixture
def folder(tmp_path):
    """A good folder (untied llama) for a test to spoil."""
    torch_model("llama untied, wide heads").save_pretrained(tmp_path)
    return tmp_path


def spoil(folder: Path, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / folders.SINGLE)
    change(tensors)
    save_file(tensors, folder / folders.SINGLE)


def test_several_files_equal_one(tmp_path):
    model = torch_model("qwen3 untied")
    for name, size in (("one", "1GB"), ("many", "20KB")):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "many"), load(tmp_path / "one"))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_every_source_dtype_is_cast_exactly(tmp_path, stored, wanted):
    model = torch_model("qwen2 tied", stored)
    model.save_pretrained(tmp_path)
    params = load(tmp_path, wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    ours = np.asarray(params["layers"]["attn"]["q"]["weight"][1].astype("float32"))
    theirs = model.model.layers[1].self_attn.q_proj.weight.detach().to(getattr(torch, wanted)).float().numpy()
    np.testing.assert_array_equal(ours, theirs)


EXPERTS = {"mlp": "experts", "num_experts": 8, "experts_per_token": 2}


def save_layer_by_layer(folder, arch, params):
    """A folder with a file a layer, and one for the rest."""
    (folder / "config.json").write_text("{}")
    largest_layer = sum(leaf[0].nbytes for leaf in jax.tree.leaves(params["layers"]))
    save_weights(folder, params, arch, "float32", largest_layer)
    return max(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.mark.parametrize(("mlp", "leaf"), [({}, "up"), (EXPERTS, "expert_up")], ids=["dense", "experts"])
def test_loading_holds_one_tensor_at_a_time(tmp_path, mlp, leaf):
    """Beside the parameters themselves. A whole leaf of these models, all layers of it, is larger than any file."""
    arch = Architecture(64, 128, 12, num_heads=4, num_kv_heads=4, head_dim=32, ffn_dim=256, **mlp)
    params = tiny.random_params(arch)
    largest_file = save_layer_by_layer(tmp_path, arch, params)
    whole_leaf = params["layers"]["mlp"][leaf]["weight"].nbytes
    hf.load_params(tmp_path, arch, "float32", HERE)  # compiles
    tracemalloc.start()
    loaded = hf.load_params(tmp_path, arch, "float32", HERE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= 1.3 * largest_file < whole_leaf
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


PHI = {"layout": ("joined_qkv", "joined_gate_up")}


@pytest.mark.parametrize("changes", [{}, EXPERTS, PHI], ids=["dense", "experts", "joined"])
def test_saving_holds_one_file_at_a_time(tmp_path, monkeypatch, changes):
    """With devices that are not the host: there each tensor is copied from them, of a CPU's it is a view."""
    gather = export.hosts.gather_to_host
    monkeypatch.setattr(export.hosts, "gather_to_host", lambda tree: jax.tree.map(np.array, gather(tree)))
    arch = Architecture(64, 128, 12, num_heads=4, num_kv_heads=4, head_dim=32, ffn_dim=256, **changes)
    params = tiny.random_params(arch)
    save_layer_by_layer(tmp_path, arch, params)  # compiles
    tracemalloc.start()
    largest_file = save_layer_by_layer(tmp_path, arch, params)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0.9 * largest_file < peak <= 1.3 * largest_file
    jax.tree.map(np.testing.assert_array_equal, hf.load_params(tmp_path, arch, "float32", HERE), params)


@pytest.mark.parametrize(("spec", "dtype"), [(P(), "float32"), (P("data"), "bfloat16")], ids=["replicated", "sharded"])
def test_parameters_are_born_where_they_belong(tmp_path, spec, dtype):
    """On eight devices: on all of them, or cut over their first axis (of layers, where there are several)."""
    arch = Architecture(64, 16, 8, num_heads=2, num_kv_heads=2, head_dim=8, ffn_dim=24)
    params = tiny.random_params(arch)
    save_layer_by_layer(tmp_path, arch, params)
    sharding = NamedSharding(tiny.mesh_of(8), spec)
    for leaf, expected in zip(*map(jax.tree.leaves, (hf.load_params(tmp_path, arch, dtype, sharding), params)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim) and leaf.committed
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {len(expected) // (8 if spec else 1)}
        np.testing.assert_array_equal(leaf, expected.astype(dtype))


def test_the_tree_is_that_of_fresh_parameters(folder):
    fresh = jax.eval_shape(lambda: init_params(read_architecture(folder), jax.random.key(0)))
    assert jax.tree.map(jnp.shape, load(folder)) == jax.tree.map(jnp.shape, fresh)


def test_architecture_of_old_and_new_config_files(tmp_path):
    def read(**config):
        (tmp_path / "config.json").write_text(json.dumps({**SIZES, **config}))
        return read_architecture(tmp_path)

    plain = Architecture(61, 32, 3, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, tie_embeddings=False)
    for rope in (
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ):
        assert read(model_type="llama", **rope) == dataclasses.replace(plain, rope=Rope(5e5))
    assert read(model_type="llama").rope.theta == 10_000.0
    assert read(model_type="llama", num_key_value_heads=None).num_kv_heads == 4
    assert read(model_type="llama", head_dim=None).head_dim == 8
    assert read(model_type="qwen3").head_dim == 128  # transformers' default for this family
    qwen2 = read(model_type="qwen2", sliding_window=4096, use_sliding_window=False, tie_word_embeddings=True)
    assert qwen2 == dataclasses.replace(plain, tie_embeddings=True, qkv_bias=True)
    assert read(model_type="qwen3", rms_norm_eps=1e-5).norm_eps == 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, ["model_type", '"gpt2"', "llama, mistral, qwen2, qwen3"]),
        ({"model_type": None}, ["model_type", "null", "llama, mistral, qwen2, qwen3"]),
        ({"hidden_act": "gelu"}, ["hidden_act", '"gelu"', "silu"]),
        ({"attention_bias": True}, ["attention_bias", "true", "False"]),
        ({"mlp_bias": True}, ["mlp_bias", "true", "False"]),
        ({"use_sliding_window": True}, ["use_sliding_window", "true", "False"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types", "sliding_attention"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits", "absent"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "1.0"]),
        (
            {"rope_scaling": {"type": "longrope", "factor": 2.0}},
            ["rope_scaling.rope_type", '"longrope"', "default, linear, llama3, yarn"],
        ),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["rope_parameters.rope_type", '"dynamic"', "linear"]),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, ["rope_scaling.factor", "-2", "above 0"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters.low_freq_factor", "null", "above 0"]),
        (
            {"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}},
            ["rope_parameters.high_freq_factor = 4.0", "above low_freq_factor"],
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["rope_parameters.partial_rotary_factor", "0.5"]),
        ({"hidden_size": "32"}, ["hidden_size", '"32"', "positive integer"]),
        ({"vocab_size": None}, ["vocab_size", "null", "positive integer"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0", "positive integer"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads = 3", "num_attention_heads = 4"]),
    ],
)
def test_unsupported_setting_names_key_value_and_what_is_supported(folder, changes, words):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError) as error:
        read_architecture(folder)
    message = str(error.value)
    assert "config.json" in message and "\n" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_malformed_config_names_the_file(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: .*JSON"):
        read_architecture(folder)


def test_missing_folder_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match=r"model\.path = .*nowhere': no such folder"):
        read_architecture(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"model\.path = .*no config\.json"):
        read_architecture(tmp_path)


def test_folder_without_safetensors(folder):
    (folder / folders.SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UserError, match=r"model\.path = .*neither model\.safetensors nor model.*index\.json"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_file_is_named(folder, keep):
    content = (folder / folders.SINGLE).read_bytes()
    (folder / folders.SINGLE).write_bytes(content[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors: missing, truncated or no safetensors file"):
        load(folder)


Q1 = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(Q1), [Q1, "(48, 32)", "is missing"]),
        (lambda t: t.pop("lm_head.weight"), ["lm_head.weight", "(61, 32)", "is missing"]),
        (lambda t: [t.pop(k) for k in list(t) if ".mlp." in k], ["mlp.down_proj", "is missing (and 8 more)"]),
        (lambda t: t.update(extra=np.ones(3, np.float32)), ["unexpected", "extra", "(3,)"]),
        (lambda t: t.update({Q1: np.ones((32, 48), np.float32)}), [Q1, "(32, 48)", "asks for (48, 32)"]),
        (lambda t: t.update({Q1: t[Q1].astype(np.int8)}), [Q1, "dtype I8", "F32, F16, BF16"]),
        (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": t[Q1]}), ["unexpected", "model.layers.3"]),
        (lambda t: t.update({Q1.replace("weight", "bias"): np.ones(48, np.float32)}), ["unexpected", "q_proj.bias"]),
    ],
)
def test_wrong_tensor_is_named(folder, change, words):
    spoil(folder, change)
    with pytest.raises(UserError) as error:
        load(folder)
    assert [word for word in words if word not in str(error.value)] == []
    assert "\n" not in str(error.value)


def test_rotary_buffers_of_old_checkpoints_are_ignored(folder):
    expected = load(folder)
    spoil(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, load(folder), expected)


def test_tied_head_may_be_stored_if_it_is_a_copy(tmp_path):
    torch_model("llama tied").save_pretrained(tmp_path)
    expected = load(tmp_path)
    spoil(tmp_path, lambda t: t.update({hf.HEAD: t[hf.EMBED].copy()}))
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path), expected)
    spoil(tmp_path, lambda t: t.update({hf.HEAD: t[hf.EMBED] + 1e-3}))
    with pytest.raises(UserError, match=r"lm_head\.weight differs .* tie_word_embeddings = true"):
        load(tmp_path)


def test_broken_index(tmp_path):
    torch_model("qwen2 tied").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / folders.INDEX).read_text())
    lost = tmp_path / index["weight_map"][Q1]
    tensors = load_file(lost)
    tensors.pop(Q1)
    save_file(tensors or {"model.unused": np.ones(1, np.float32)}, lost)
    with pytest.raises(UserError, match=rf"{lost.name}: tensor {Q1} is missing"):
        load(tmp_path)
    lost.unlink()
    with pytest.raises(UserError, match=rf"{lost.name}: missing, truncated"):
        load(tmp_path)
    (tmp_path / folders.INDEX).write_text("{}")
    with pytest.raises(UserError, match="weight_map is missing or empty"):
        load(tmp_path)


def test_hub_id_is_fetched_and_a_failure_is_one_line(folder, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert folders.resolve("some-org/some.model") == folder
    assert folders.resolve(folder) == folder  # a folder is never looked up
    assert asked == [("some-org/some.model", folders.HUB_FILES)]

    def fail(name, allow_patterns):
        raise ConnectionError("name not known\ncheck the connection")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError) as error:
        folders.resolve("some-org/some.model")
    assert "model.path = 'some-org/some.model'" in str(error.value)
    assert "name not known" in str(error.value) and "\n" not in str(error.value)
    for no_id in ("/some-org/model", "./org/model", "a/b/c", "name"):
        with pytest.raises(UserError, match=r"no such folder$"):
            folders.resolve(no_id)
