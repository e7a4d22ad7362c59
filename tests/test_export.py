"""Exported folders: bit for bit what was loaded, and transformers computes the same with them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from grpo_jax.errors import UserError
from grpo_jax.models import export as export_lib
from grpo_jax.models.export import export_folder
from grpo_jax.models.families import read_architecture
from grpo_jax.models.folders import INDEX, SINGLE
from grpo_jax.models.hf import stored_dtype
from grpo_jax.tools.export import export
from grpo_jax.training.checkpoint import Checkpointer
from grpo_jax.training.run import make_run
from grpo_jax.training.settings import init_workdir
from tests import tiny
from tests.hf_models import DELTA, jax_logits, left_padded, load, randomise, torch_logits, torch_model
from tests.test_tasks_host import TEMPLATE, save_hf_tokenizer

ONE_FILE = 10**9


def exported(source, out, dtype="float32", max_shard_bytes=ONE_FILE, params=None):
    params = load(source, dtype) if params is None else params
    export_folder(out, params, read_architecture(source), source, dtype, max_shard_bytes)
    return out


def assert_same_weights(left, right):
    jax.tree.map(np.testing.assert_array_equal, load(left, "float32"), load(right, "float32"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in ("llama 3", "qwen2 tied", "qwen3 untied", "mistral", "gemma 3")), ("gemma 3", "bfloat16")],
)
@pytest.mark.slow
def test_load_export_load_is_the_identity_and_torch_agrees(tmp_path, name, dtype):
    model = torch_model(name, getattr(torch, dtype))
    model.save_pretrained(tmp_path / "source")
    out = exported(tmp_path / "source", tmp_path / "out", dtype, max_shard_bytes=30_000)
    assert read_architecture(out) == read_architecture(tmp_path / "source")
    assert stored_dtype(out) == stored_dtype(tmp_path / "source") == dtype
    assert_same_weights(out, tmp_path / "source")
    again = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert again.dtype == model.dtype and again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    if dtype == "float32":
        np.testing.assert_array_equal(torch_logits(again, *left_padded()), torch_logits(model, *left_padded()))


@pytest.mark.parametrize("max_shard_bytes", [1, 30_000, ONE_FILE])
def test_shards_are_no_larger_than_asked_and_the_index_is_true(tmp_path, max_shard_bytes):
    torch_model("qwen3 untied").save_pretrained(tmp_path / "source")
    out = exported(tmp_path / "source", tmp_path / "out", max_shard_bytes=max_shard_bytes)
    files = {file.name: load_file(file) for file in sorted(out.glob("*.safetensors"))}
    for tensors in files.values():
        assert sum(x.nbytes for x in tensors.values()) <= max_shard_bytes or len(tensors) == 1
    if max_shard_bytes == ONE_FILE:
        assert list(files) == [SINGLE] and not (out / INDEX).exists()
    else:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
        assert index["metadata"]["total_size"] == sum(x.nbytes for tensors in files.values() for x in tensors.values())
        assert len(files) > 2
        assert list(files) == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert_same_weights(out, tmp_path / "source")


TEXT = dict(
    **dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4),
    **dict(num_key_value_heads=2, head_dim=12, tie_word_embeddings=False, pad_token_id=0),
)
MROPE = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [1, 1, 4]}
GROWN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
PIXTRAL = dict(model_type="pixtral", num_hidden_layers=1, num_attention_heads=2, head_dim=8, image_size=28, patch_size=14)
VISION = dict(depth=1, num_heads=2, out_hidden_size=32)
SIGLIP = dict(num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
# model_type -> (settings of the text, of the images, of both; the class that its text is exported as).
OF_IMAGES = {
    "gemma3": (
        {"sliding_window": 4, "sliding_window_pattern": 2, "tie_word_embeddings": True},
        SIGLIP,
        {"mm_tokens_per_image": 4, "tie_word_embeddings": True},
        "Gemma3ForCausalLM",
    ),
    "qwen2_5_vl": ({"head_dim": 8, "rope_parameters": {**MROPE, "mrope_section": [1, 1, 2]}}, VISION, {}, "Qwen2ForCausalLM"),
    "qwen3_vl": (
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}},
        {**VISION, "deepstack_visual_indexes": []},
        {"tie_word_embeddings": True},
        "Qwen3ForCausalLM",
    ),
    "qwen3_5": (
        {**DELTA, "layer_types": ["linear_attention", "linear_attention", "full_attention"], "rope_parameters": MROPE},
        VISION,
        {},
        "Qwen3_5ForCausalLM",
    ),
    "mistral3": (
        {"model_type": "ministral3", "rope_parameters": {**GROWN, "llama_4_scaling_beta": 0.5}},
        PIXTRAL,
        {},
        "Ministral3ForCausalLM",
    ),
}


@pytest.mark.parametrize("name", OF_IMAGES)
@pytest.mark.slow
def test_the_text_part_of_a_model_of_text_and_images(tmp_path, capfd, name):
    text, vision, both, its_class = OF_IMAGES[name]
    vision = dict(hidden_size=16, intermediate_size=16, **vision)
    both = {"tie_word_embeddings": False, **both}
    config = AutoConfig.for_model(name, text_config={**TEXT, **text}, vision_config=vision, **both)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model)
    model.save_pretrained(tmp_path / "source")
    if name == "qwen3_5":  # the hub's files have another layer, which only speculation runs
        tensors = load_file(tmp_path / "source" / SINGLE)
        assert any(each.startswith("model.language_model.layers.0.linear_attn.") for each in tensors)
        save_file({**tensors, "mtp.fc.weight": np.ones((3, 3), np.float32)}, tmp_path / "source" / SINGLE, {"format": "pt"})
    capfd.readouterr()
    out = exported(tmp_path / "source", tmp_path / "out")
    said = capfd.readouterr().err
    assert "tensors for images, the first is" in said
    assert ("left out 1 tensors for the prediction of several tokens, the first is mtp.fc.weight" in said) == (
        name == "qwen3_5"
    )
    assert json.loads((out / "config.json").read_text())["architectures"] == [its_class]  # serving engines look there
    assert read_architecture(out) == read_architecture(tmp_path / "source")
    tokens_BT, mask_BT = left_padded()
    theirs = torch_logits(model, tokens_BT, mask_BT)
    assert np.abs(theirs[mask_BT]).max() > 1
    again = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    assert type(again).__name__ == its_class
    for logits in (jax_logits(tmp_path / "source", tokens_BT, mask_BT), torch_logits(again, tokens_BT, mask_BT)):
        np.testing.assert_allclose(logits[mask_BT], theirs[mask_BT], atol=2e-5)


@pytest.mark.slow
def test_what_predicts_several_tokens_is_left_out(tmp_path, capfd):
    """MiMo: Qwen2's layers, and others behind them that only speculation runs."""
    model = torch_model("qwen2 untied, all heads")
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.mtp_layers.0.input_proj.weight"] = np.ones((3, 3), np.float32)
    save_file(tensors, tmp_path / SINGLE, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    own = {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1, "auto_map": {}}
    (tmp_path / "config.json").write_text(json.dumps({**config, **own}))
    tokens_BT, mask_BT = left_padded()
    theirs = torch_logits(model, tokens_BT, mask_BT)
    np.testing.assert_allclose(jax_logits(tmp_path, tokens_BT, mask_BT)[mask_BT], theirs[mask_BT], atol=1e-5)
    assert "left out 1 tensors for the prediction of several tokens" in capfd.readouterr().err
    out = exported(tmp_path, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    np.testing.assert_array_equal(torch_logits(again, tokens_BT, mask_BT), theirs)


def test_all_or_nothing(tmp_path, monkeypatch):
    torch_model("llama tied").save_pretrained(tmp_path / "source")

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(export_lib, "save_file", full_disk)
        with pytest.raises(UserError, match=r"--out=.*No space left on device"):
            exported(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    with pytest.raises(UserError, match=r"--out=.*exists and is not empty"):
        exported(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match=r"--dtype=int8: unknown"):
        export_folder(tmp_path / "new", {}, read_architecture(tmp_path / "source"), tmp_path / "source", "int8", 1)


# ----------------------------------------------------------------------------------------------------------- of a run


@pytest.fixture
def trained(tmp_path):
    """A run of a bfloat16 model on four devices, with checkpoints of step 1 and 2, whose embeddings are 1 and 2 everywhere."""
    source, workdir = tmp_path / "source", tmp_path / "run"
    settings = {"eos_token": "<eos>", "pad_token": "<pad>", "chat_template": TEMPLATE}
    save_hf_tokenizer(source, {}, **settings)
    torch_model("llama tied", torch.bfloat16, vocab_size=259).save_pretrained(source)
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    in_parts = {"mesh.fsdp": 2, "mesh.tensor": 2, "mesh.fsdp_min_elements": 0}
    config = tiny.config_of(changes={"model.path": str(source), "eval.num_prompts": 4, **in_parts})
    run = make_run(config)
    init_workdir(workdir, config.to_dict())
    checkpointer = Checkpointer(workdir, config.checkpoint)
    for step in (1, 2):
        state = run.initial_state()
        state.params["embed"] = jnp.full_like(state.params["embed"], step)
        checkpointer.save(step, state.replace(step=jnp.int32(step)), config.to_dict())
    checkpointer.close()
    run.task.close()
    return source, workdir


@pytest.mark.slow
def test_a_run_becomes_a_folder_that_transformers_loads(tmp_path, trained):
    source, workdir = trained
    assert export(str(workdir), str(tmp_path / "newest"), None, None, ONE_FILE) == (2, "bfloat16")
    assert export(str(workdir), str(tmp_path / "first"), 1, "float16", ONE_FILE) == (1, "float16")
    for name, step, dtype in (("newest", 2, torch.bfloat16), ("first", 1, torch.float16)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.dtype == dtype and (model.model.embed_tokens.weight == step).all()
        expected = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).model.layers[1].mlp.up_proj.weight
        assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)
        assert model.generation_config.eos_token_id == [2, 1]
        theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / name))
        assert ours.encode("2 + 2 =") == theirs.encode("2 + 2 =") and ours.chat_template == TEMPLATE
    assert {path.name for path in tmp_path.iterdir()} == {"source", "run", "newest", "first"}
    assert all(path.stat().st_mode & 0o044 for path in (tmp_path / "newest").iterdir())  # others may read it


@pytest.mark.slow
def test_what_cannot_be_exported_is_said_in_one_line(tmp_path, trained):
    source, workdir = trained
    with pytest.raises(UserError, match=r"--step=7: no such checkpoint in .*; there are: 1, 2"):
        export(str(workdir), str(tmp_path / "out"), 7, None, ONE_FILE)
    (workdir / "checkpoints").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"no finished checkpoint"):
        export(str(workdir), str(tmp_path / "out"), None, None, ONE_FILE)
    (source / SINGLE).unlink()
    with pytest.raises(UserError, match=r"neither model\.safetensors"):
        export(str(workdir), str(tmp_path / "out"), None, None, ONE_FILE)
    init_workdir(tmp_path / "own", tiny.config_of().to_dict())
    with pytest.raises(UserError, match=r"--adapter: .*own began from no Hugging Face folder"):
        export(str(tmp_path / "own"), str(tmp_path / "out"), None, None, ONE_FILE, is_adapter=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("task", ["arithmetic", "maze"])
def test_a_fresh_decoder_is_a_llama_whose_tokenizer_knows_characters(tmp_path, task):
    config = tiny.config_of(changes={"task.name": task, "eval.num_prompts": 4, "rollout.max_completion_tokens": 16})
    run, workdir = make_run(config), tmp_path / "run"
    init_workdir(workdir, config.to_dict())
    checkpointer = Checkpointer(workdir, config.checkpoint)
    state = run.initial_state()
    checkpointer.save(1, state.replace(step=jnp.int32(1)), config.to_dict())
    checkpointer.close()
    assert export(str(workdir), str(tmp_path / "out"), None, None, ONE_FILE) == (1, "float32")
    assert read_architecture(tmp_path / "out") == run.model.arch
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out", "float32"), dict(state.params))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "out"), run.task.tokenizer
    prompts = run.task.train_prompts(0, 2)
    text = ours.decode_prompt(prompts.tokens_PS[0][prompts.mask_PS[0]])
    ids = theirs(text)["input_ids"]
    assert ids == ours.encode(text) and theirs.decode(ids) == text and theirs.eos_token_id == ours.eos_ids[0]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    assert model.generation_config.eos_token_id == list(ours.eos_ids)
    rows = np.asarray([ids]), np.ones((1, len(ids)), bool)
    np.testing.assert_allclose(jax_logits(tmp_path / "out", *rows), torch_logits(model, *rows), atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model" not in card and "# A small decoder trained with" in card
