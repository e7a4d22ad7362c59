"""A model that always answers right scores 1, one that never does scores 0, by every measure, and twice the same."""

import json

import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_jax.analysis.estimates import Estimate, estimate
from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.models.families import read_architecture
from grpo_jax.models.lora import LoRA, init_adapters
from grpo_jax.models.peft import save_adapters
from grpo_jax.models.transformer import ModelDef
from grpo_jax.tasks.tokenizers import HFTokenizer
from grpo_jax.training.run import make_run
from tests import programs, tiny
from tests.test_tasks_host import save_hf_tokenizer

pytestmark = pytest.mark.slow

LORA = LoRA(rank=1, alpha=1.0, targets=("q_proj",))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Says `7` after anything, and stops after `7`: the layers add nothing, the head reads off which token came last."""
    folder = tmp_path_factory.mktemp("models") / "seven"
    save_hf_tokenizer(folder, {}, eos_token="<eos>", pad_token="<pad>")
    tokenizer = HFTokenizer(str(folder))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, **sizes))
    (seven,) = tokenizer.encode("7")
    weights = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    weights["model.norm.weight"] += 1
    weights["model.embed_tokens.weight"][:, 0] = 1
    weights["model.embed_tokens.weight"][seven] = torch.eye(8)[1]
    weights["lm_head.weight"][seven, 0] = weights["lm_head.weight"][tokenizer.eos_ids[0], 1] = 30
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    return folder


def settings(folder, tmp_path, answer):
    """Config fields that differ from the smallest scale's."""
    lines = [{"prompt": f"Question {i}", "answer": answer} for i in range(20)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model.path": str(folder),
        "warm_start.num_steps": 0,
        "task.name": "jsonl",
        "task.jsonl.path": str(tmp_path / "questions.jsonl"),
        "task.use_chat_template": False,
        "reward.task": "exact",
        "eval.num_prompts": 10,
        "eval.num_samples": 3,
        "eval.batch_size": 4,
        "mesh.data": 1,
    }


@pytest.mark.parametrize(("answer", "expected"), [("7", 1.0), ("8", 0.0)])
def test_always_right_and_never_right(folder, tmp_path, answer, expected):
    raw = base.get_config("runlocal")
    raw.update_from_flattened_dict(settings(folder, tmp_path, answer))
    run = make_run(parse_config(raw))
    try:
        params = run.initial_state().policy
        estimates = run.evaluate(params)
        assert run.evaluate(params) == estimates
    finally:
        run.task.close()
    assert estimates.pop("length_mean") == Estimate(2.0, 2.0, 2.0)
    share = estimate(np.full(len(run.task.eval_prompts().tokens_PS), expected))
    assert share.value == expected
    assert estimates == dict.fromkeys(["success", "mean@3", "pass@2", "pass@3", "maj@3"], share)


def test_the_program_evaluates_a_folder_under_an_adapter_and_writes_json(folder, tmp_path):
    model = ModelDef(read_architecture(folder), lora=LORA)
    adapters = init_adapters(model.param_shapes(), tiny.jax.random.key(0))
    assert flatten_dict(adapters)
    (tmp_path / "adapter").mkdir()
    save_adapters(tmp_path / "adapter", adapters, model, str(folder))
    fields = settings(folder, tmp_path, "7") | {"lora.path": str(tmp_path / "adapter"), "lora.rank": 1, "lora.alpha": 1.0}
    flags = [f"--config.{name}={value}" for name, value in fields.items()] + ["--config.lora.targets=('q_proj',)"]
    out = tmp_path / "results.json"
    status, output = programs.run("experiments.evaluate", "--config=configs/grpo.py:runlocal", f"--out={out}", *flags)
    assert status == 0, output
    assert "maj@3" in output and "0.722 to 1.000" in output
    results = json.loads(out.read_text())
    assert results["step"] == 0 and results["num_prompts"] == 10 and results["num_samples"] == 3
    assert results["estimates"]["pass@2"] == {
        "value": 1.0,
        "low": pytest.approx(0.7225, abs=1e-4),
        "high": 1.0,
    }  # Wilson, 10 of 10
