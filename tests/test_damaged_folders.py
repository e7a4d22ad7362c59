"""Model and adapter folders that are damaged or hostile: one line names file and setting, and nothing large is made first."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from grpo_jax.config import parse_config
from grpo_jax.errors import UserError
from grpo_jax.models.families import read_architecture
from grpo_jax.models.folders import INDEX, SINGLE
from grpo_jax.models.hf import load_params, param_slots
from grpo_jax.models.lora import DELTA_TARGETS, TARGETS, LoRA, split_adapters
from grpo_jax.models.peft import CONFIG, load_adapters, save_adapters
from grpo_jax.models.transformer import ModelDef
from grpo_jax.training.build import lora_of
from tests import tiny

LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
GEMMA = {**LLAMA, "model_type": "gemma3_text", "head_dim": 4, "sliding_window": 4}
NAN, HUGE = float("nan"), 10**12


def folder_of(tmp_path, settings):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    return tmp_path


def test_the_settings_are_read_if_nothing_is_wrong_with_them(tmp_path):
    assert read_architecture(folder_of(tmp_path, LLAMA)).num_layers == 2
    assert read_architecture(folder_of(tmp_path, GEMMA)).local_layers == (0, 1)


@pytest.mark.parametrize("value", [NAN, float("inf"), 0, -1, "1e-5", True, [], {}, 1e31])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "query_pre_attn_scalar", "final_logit_softcapping"])
def test_a_number_that_is_none_is_named(tmp_path, key, value):
    with pytest.raises(UserError, match=rf"config\.json: {key} = .*: expected a finite number above 0$"):
        read_architecture(folder_of(tmp_path, {**GEMMA, key: value}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers = 1000000: no model has more than 1024"),
        ({"vocab_size": HUGE}, "vocab_size = .*no model has more"),
        ({"hidden_size": -8}, "hidden_size = -8: expected a positive integer"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = .*expected true or false"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object, got str"),
        ({"rope_scaling": [1]}, "rope_scaling: expected an object, got list"),
        ({"rope_parameters": {"full_attention": 3}}, "rope_parameters: this family has one rotary embedding for all layers"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": "x"}}, "rope_parameters: this family has one"),
        ({"rope_scaling": {"rope_type": "linear", "factor": NAN}}, "factor = NaN: expected a finite number above 0"),
        ({"rope_scaling": {"rope_type": []}}, "rope_type = .* is not supported"),
        ({"layer_types": 3}, "layer_types = 3: expected a list"),
        ({"layer_types": "full_attention"}, "layer_types = .*expected a list"),
        ({"model_type": ["llama"]}, "model_type = .*is not supported"),
    ],
)
def test_what_has_another_form_is_named(tmp_path, changes, named):
    with pytest.raises(UserError, match=named) as caught:
        read_architecture(folder_of(tmp_path, {**LLAMA, **changes}))
    assert "\n" not in str(caught.value)


def write_weights(folder, change=None):
    arch = read_architecture(folder_of(folder, LLAMA))
    slots, _ = param_slots(arch)
    tensors = {name: np.ones(slot.shape, np.float32) for slot in slots for name in slot.names}
    if change:
        name, value = change
        tensors[name].flat[-1] = value
    save_file(tensors, folder / SINGLE)
    return arch, tensors


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_not_finite_is_named(tmp_path, name, value):
    arch, _ = write_weights(tmp_path, (name, value))
    with pytest.raises(UserError, match=rf"tensor {name}.* holds NaN or infinity; fetch"):
        load_params(tmp_path, arch, np.float32, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", 3, None, "model.bin", ["x"]])
def test_the_index_leads_to_files_of_its_folder_only(tmp_path, name):
    arch, tensors = write_weights(tmp_path)
    save_file(tensors, tmp_path.parent / "outside.safetensors")
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
    with pytest.raises(UserError, match=rf"{INDEX}: weight_map names .* safetensors files in the same folder"):
        load_params(tmp_path, arch, np.float32, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def some_adapters(model):
    return jax.tree.map(lambda x: np.full(x.shape, 0.1, np.float32), split_adapters(model.param_shapes())[1])


@pytest.fixture
def adapter(tmp_path):
    """A folder of adapters, and the model they are of."""
    model = ModelDef(tiny.LLAMA, lora=LoRA(2, 4.0, ("q_proj",), use_rslora=True))
    save_adapters(tmp_path, some_adapters(model), model, "base")
    return tmp_path, model


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", 1])
def test_adapters_to_another_base_are_refused_by_name(adapter, init):
    folder, model = adapter
    load_adapters(folder, model)
    settings = json.loads((folder / CONFIG).read_text())
    for harmless in (True, False, "gaussian"):
        (folder / CONFIG).write_text(json.dumps({**settings, "init_lora_weights": harmless}))
        load_adapters(folder, model)
    (folder / CONFIG).write_text(json.dumps({**settings, "init_lora_weights": init}))
    with pytest.raises(UserError, match=rf"init_lora_weights = .*{init}.* is not supported"):
        load_adapters(folder, model)


def test_rank_stabilised_adapters_are_taken_as_such_or_refused(adapter):
    folder, model = adapter
    assert model.lora is not None and model.lora.scale == pytest.approx(4.0 / 2**0.5)
    plain = ModelDef(tiny.LLAMA, lora=LoRA(2, 4.0, ("q_proj",)))
    with pytest.raises(UserError, match=r"config\.lora\.use_rslora = False: .* has use_rslora = true"):
        load_adapters(folder, plain)


def test_all_linear_is_every_matrix_that_the_model_has(capfd):
    values = tiny.config_of("grpo", {"lora.rank": 2}).to_dict()
    values["lora"]["targets"] = ("all-linear",)
    every = parse_config(values).lora
    assert lora_of(every, tiny.LLAMA).targets == TARGETS
    assert lora_of(every, tiny.DELTA).targets == (*TARGETS[:4], *DELTA_TARGETS, *TARGETS[4:])
    assert capfd.readouterr().err == ""
    assert lora_of(dataclasses.replace(every, targets=TARGETS), tiny.DELTA).targets == TARGETS
    assert "no adapters on in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, out_proj" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"config\.lora\.targets: the model has no out_proj; it has q_proj, "):
        lora_of(dataclasses.replace(every, targets=("q_proj", "out_proj")), tiny.LLAMA)


def test_an_adapter_with_nan_is_named(adapter):
    folder, model = adapter
    broken = jax.tree.map(lambda x: x * np.nan, some_adapters(model))
    save_adapters(folder, broken, model, "base")
    with pytest.raises(UserError, match=r"tensor base_model\.model\..* holds NaN or infinity"):
        load_adapters(folder, model)
