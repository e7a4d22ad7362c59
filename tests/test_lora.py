"""LoRA: adapters equal merged weights in value and gradient, the base is the reference, and PEFT reads what we write."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.traverse_util import flatten_dict
from peft import LoraConfig, PeftModel, get_peft_model

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.errors import UserError
from grpo_jax.learner.train_step import make_train_step
from grpo_jax.models.export import export_folder
from grpo_jax.models.families import read_architecture
from grpo_jax.models.linear import head_logits
from grpo_jax.models.lora import DELTA_TARGETS, TARGETS, LoRA, init_adapters, merge_adapters, split_adapters, targets_of
from grpo_jax.models.peft import CONFIG, WEIGHTS, load_adapters, save_adapters
from grpo_jax.models.tensor_names import leaf_slot
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import shardings_of
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.tools.plan.fixed_task import FixedTask
from grpo_jax.training import trainer
from grpo_jax.training.build import initial_params
from grpo_jax.training.checkpoint import Checkpointer
from grpo_jax.training.run import assemble, make_run
from grpo_jax.types import join_params
from tests import programs, tiny
from tests.hf_models import MODELS, exact_logits, jax_logits, left_padded, load, logits_alone, torch_logits, torch_model

LORA = LoRA(rank=3, alpha=5.0, targets=("q_proj", "o_proj", "up_proj"))
MODEL = ModelDef(tiny.LLAMA, lora=LORA)
SMALL_RUN = {
    "lora.targets": ("q_proj", "v_proj"),
    "num_steps": 2,
    "eval_every": 0,
    "eval.num_samples": 0,
    "checkpoint.every": 1,
    "optimizer.learning_rate": 1e-2,
    "optimizer.warmup_steps": 0,
    "overlong.cache_tokens": 6,
}
WHOLE = dataclasses.replace(MODEL, lora=None)


def random_adapters(model, seed=0):
    """Neither A nor B zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), split_adapters(model.param_shapes())[1]
    )


def test_fresh_adapters_sit_where_they_are_wanted_and_change_nothing():
    adapters = flatten_dict(init_adapters(MODEL.param_shapes(), jax.random.key(0)))
    assert {path[:3] for path in adapters} == {("layers", "attn", "q"), ("layers", "attn", "o"), ("layers", "mlp", "up")}
    for path, values in adapters.items():
        if path[-1] == "lora_b":
            assert not values.any()
        else:
            bound = values.shape[-1] ** -0.5
            assert values.shape[:2] == (1, 3) and 0.5 * bound < jnp.abs(values).max() <= bound
    first, second = adapters["layers", "attn", "q", "lora_a"], adapters["layers", "attn", "o", "lora_a"]
    assert np.abs(first - second).min() > 0, "two adapters began alike"


@pytest.mark.slow
def test_one_step_is_the_chain_rule_through_merged_weights():
    """Against training all weights from the merged ones, with the base as reference: W' = W + s B A."""
    objective = objectives.get("grpo")
    assert objective.kl_coef > 0
    learner = {"num_microbatches": 2, "logprob_chunk_tokens": 32, "bucket_tokens": 4, "old_logp": "learner"}
    config = tiny.update_config(objective, Sampling(0.7), **learner)
    batch, sgd = tiny.random_batch(), optax.sgd(1.0)
    base, adapters = tiny.random_params(tiny.LLAMA), random_adapters(MODEL)
    whole = merge_adapters(base, adapters, LORA)

    def step(model, state):
        train_step = jax.jit(make_train_step(model, lambda _: sgd, config, tiny.mesh_of(2)))
        after, metrics = train_step(state, batch)
        return after, metrics_lib.to_floats(metrics)

    low_rank = tiny.state_of(adapters, sgd, config=config).replace(base=base)
    after, metrics = step(MODEL, low_rank)
    full = tiny.state_of(whole, sgd, ref_params=base, config=config)
    full_after, full_metrics = step(WHOLE, full)

    assert metrics["policy/kl_ref"] > 0.01
    for name in ("loss/total", "policy/kl_ref", "policy/learner_entropy"):
        np.testing.assert_allclose(metrics[name], full_metrics[name], rtol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, after.base, base)
    grads = flatten_dict(jax.tree.map(jnp.subtract, full.params, full_after.params))
    moved = jax.tree.map(jnp.subtract, low_rank.params, after.params)
    flat = flatten_dict(adapters)
    expected = {}
    for *path, name in flat:
        a, b, dW = flat[*path, "lora_a"], flat[*path, "lora_b"], grads[*path, "weight"]
        terms = ("lor,loi->lri", b, dW) if name == "lora_a" else ("loi,lri->lor", dW, a)
        expected[*path, name] = LORA.scale * jnp.einsum(*terms)
    assert tiny.largest_difference(flatten_dict(moved), expected) < 2e-5


@pytest.mark.slow
def test_a_run_with_adapters_resumes_bitwise(tmp_path):
    """2 steps = 1 + 1."""
    config = tiny.config_of("grpo", SMALL_RUN | {"lora.rank": 2})
    trainer.train(config, tmp_path / "whole")
    trainer.train(dataclasses.replace(config, num_steps=1), tmp_path / "torn")
    trainer.train(config, tmp_path / "torn")
    records = programs.records(tmp_path / "whole")
    assert [record["step"] for record in records] == [0, 1, 2]
    assert records[1]["policy/kl_ref"] == 0.0 < records[2]["policy/kl_ref"], "the policy does not begin at its reference"
    assert [{k: r[k] for k in records[i]} for i, r in enumerate(programs.records(tmp_path / "torn"))] == records


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.slow
def test_what_never_changes_is_not_saved_and_comes_back_as_it_was(tmp_path, rank):
    """The reference or the base: here from the seed, in a run with a model folder from the folder."""
    config = tiny.config_of("grpo", SMALL_RUN | {"lora.rank": rank})
    run = make_run(config)
    state = run.initial_state()
    checkpointer = Checkpointer(tmp_path, config.checkpoint)
    moved = state.replace(step=jnp.int32(1), params=jax.tree.map(lambda x: x + 1, state.params))
    checkpointer.save(1, moved, config.to_dict())
    restored = run.restore_state(checkpointer, 1)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, restored, moved)
    assert (restored.base is None) == (rank == 0) and (restored.ref_params is None) == (rank > 0)
    jax.tree.map(np.testing.assert_array_equal, run.restore_policy(tmp_path, 1), moved.policy)
    saved = json.loads((tmp_path / "checkpoints" / "1" / "state" / "_METADATA").read_text())["tree_metadata"]
    names = {entry["key_metadata"][0]["key"] for entry in saved.values() if entry["value_metadata"]["value_type"] != "None"}
    assert {"params", "opt_state"} <= names and not names & {"base", "ref_params"}


# ------------------------------------------------------------------------------------------------------------- PEFT


ADAPTED = ("qwen3 tied", "qwen3.5")


def is_joined(target, arch):
    """If the folders have the matrix of an attention or MLP layer as a part of another tensor."""
    part = "attn" if target in TARGETS[:4] else "mlp"
    name = f"layers.{part}.{target.removesuffix('_proj')}.weight"
    return arch.period == 1 and not arch.num_experts and leaf_slot(name, arch).is_joined


# transformers 5 warns of names that peft still uses.
peft_warns = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture
def folder(tmp_path):
    torch_model("qwen3 tied").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@peft_warns
@pytest.mark.parametrize(
    "name", [*ADAPTED, *(pytest.param(name, marks=pytest.mark.nightly) for name in MODELS if name not in ADAPTED)]
)
@pytest.mark.slow
def test_peft_loads_what_we_save(tmp_path, name):
    """Of every family, on the matrices that transformers 5 has as modules of their own: not those of experts."""
    folder = tmp_path / "base"
    torch_model(name).save_pretrained(folder)
    arch = read_architecture(folder)
    assert targets_of(arch) == (TARGETS if arch.delta is None else (*TARGETS[:4], *DELTA_TARGETS, *TARGETS[4:]))
    targets = TARGETS[:4] if arch.num_experts else targets_of(arch)
    lora = LoRA(rank=4, alpha=6.0, targets=tuple(each for each in targets if not is_joined(each, arch)))
    assert lora.targets == targets or name in ("phi 4", "glm", "glm 4")
    model = ModelDef(arch, lora=lora)
    adapters = random_adapters(model)
    (tmp_path / "adapter").mkdir()
    save_adapters(tmp_path / "adapter", adapters, model, str(folder))
    base = load(folder, "float32")
    tokens_BT, mask_BT = left_padded()

    @jax.jit
    def forward(params):
        decoder = model.bind(params)
        hidden_FD = decoder(tokens_BT, mask_BT).reshape(-1, arch.dim)
        return head_logits(hidden_FD, decoder.head_VD, decoder.logit_cap).reshape(*tokens_BT.shape, -1)

    adapted = PeftModel.from_pretrained(torch_model(name), tmp_path / "adapter")
    theirs, exact = (logits(adapted, tokens_BT, mask_BT) for logits in (logits_alone, exact_logits))
    plain = jax_logits(folder, tokens_BT, mask_BT)
    assert np.abs(exact - plain[mask_BT]).max() > 0.1, "the adapters do nothing"
    # Adapters this large double some logits, and rounding with them: what float32 costs torch is the measure, but in Gemma,
    # where torch's model in float64 is 4e-5 off itself, for its norms and RoPE stay float32. With these in float64 too, on
    # both sides, Gemma's logits are 1.3e-13 apart and GLM-4's 1.2e-14.
    noise = np.abs(theirs - exact).max()
    assert noise < 2e-4
    ours = np.asarray(forward(join_params(base, adapters)))
    np.testing.assert_allclose(ours[mask_BT], exact, rtol=0, atol=1e-4 if name == "gemma" else max(2e-5, 3 * noise))
    jax.tree.map(np.testing.assert_array_equal, load_adapters(tmp_path / "adapter", model), adapters)


def test_frozen_weights_are_counted_in_the_type_that_they_are_loaded_in(folder):
    changes = {"model.path": str(folder), "model.dtype": "bfloat16", "mesh.data": 1, "lora.rank": 2}
    config = tiny.config_of("grpo", SMALL_RUN | changes)
    model = ModelDef(read_architecture(folder), "bfloat16", lora=LORA)
    task = FixedTask(np.ones((config.rollout.num_prompts, 4)), pad_id=0)
    base = assemble(config, tiny.mesh_of(1), task, model).abstract_state.base
    loaded = initial_params(config, model, task, shardings_of(base))
    assert {leaf.dtype for leaf in jax.tree.leaves(base)} == {jnp.dtype("bfloat16")}
    jax.tree.map(lambda like, leaf: np.testing.assert_equal((like.shape, like.dtype), (leaf.shape, leaf.dtype)), base, loaded)


@peft_warns
@pytest.mark.slow
def test_we_load_what_peft_saves(tmp_path, folder):
    settings = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(torch_model("qwen3 tied"), settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "adapter")
    lora = LoRA(rank=2, alpha=4.0, targets=("q_proj", "down_proj"))
    model = ModelDef(read_architecture(folder), lora=lora)
    base = load(folder, "float32")
    whole = merge_adapters(base, load_adapters(tmp_path / "adapter", model), lora)
    export_folder(tmp_path / "merged", whole, model.arch, folder, "float32", 10**9)
    tokens_BT, mask_BT = left_padded()
    expected = torch_logits(theirs, tokens_BT, mask_BT)
    np.testing.assert_allclose(
        jax_logits(tmp_path / "merged", tokens_BT, mask_BT)[mask_BT], expected[mask_BT], rtol=0, atol=2e-5
    )


def test_adapters_that_do_not_fit_are_refused(tmp_path, folder):
    good = LoRA(rank=2, alpha=4.0, targets=("q_proj", "v_proj"))
    model = ModelDef(read_architecture(folder), lora=good)
    save_adapters(tmp_path, random_adapters(model), model, "somewhere")

    def refused(words, **changes):
        with pytest.raises(UserError, match=words):
            load_adapters(tmp_path, dataclasses.replace(model, lora=dataclasses.replace(good, **changes)))

    refused("rank = 3", rank=3)
    refused("alpha = 5.0", alpha=5.0)
    refused("targets", targets=("q_proj",))
    settings = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**settings, "use_dora": True}))
    refused("use_dora")
    (tmp_path / CONFIG).write_text(json.dumps(settings))
    wide = dataclasses.replace(model.arch, num_heads=8, head_dim=model.arch.head_dim)
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj\.lora_B\.weight is \("):
        load_adapters(tmp_path, dataclasses.replace(model, arch=wide))
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:100])
    refused(WEIGHTS.replace(".", r"\."))


def test_settings_that_cannot_be_are_refused():
    for changes, words in (
        ({"lora.targets": ("query",)}, "lora.targets"),
        ({"lora.path": "x"}, "lora.rank"),
        ({"lora.rank": 4, "lora.alpha": 0.0}, "lora.alpha"),
    ):
        with pytest.raises(UserError, match=words):
            tiny.config_of("grpo", changes)
