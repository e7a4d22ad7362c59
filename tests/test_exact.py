"""`model.numerics = "exact"`: the sampler's log-probabilities are the learner's, bit for bit, and those of the fast form."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax.errors import UserError
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.learner.train_step import compute_gradients, make_target
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.models.lora import LoRA, init_adapters
from grpo_jax.models.tiles import CPU, in_tiles
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rollout.decoding import EndTokens
from grpo_jax.rollout.rollout import sampling_of
from grpo_jax.training import build
from grpo_jax.training.samplers import make_rollout
from grpo_jax.types import Batch, Prompts, join_params
from tests import tiny

P, G, T, S = 4, 3, 40, 5  # prompts of less than a block, completions of more than one
QWEN = dataclasses.replace(tiny.LLAMA, qkv_bias=True, tie_embeddings=True)
GEMMA = Architecture(  # windows below a global layer, all kinds of norms, capped scores and logits
    tiny.VOCAB, 16, 2, 4, 2, 8, 24, qk_norm=True, norm_plus_one=True, post_norms=True, embed_scale=4.0, sliding_window=7,
    local_layers=(0,), local_rope=Rope(100.0), score_cap=20.0, logit_cap=10.0, activation="gelu_tanh",
)  # fmt: skip
ENDS = EndTokens((1,), 0)
CASES = {
    "all tokens, in parts of groups": (QWEN, {}, {"num_microbatches": 12}),
    "nucleus, widths": (GEMMA, {"top_p": 0.9, "temperature": 0.7}, {"bucket_tokens": 8, "num_microbatches": 2}),
    "penalty, rows refilled": (QWEN, {"repetition_penalty": 1.2, "bad_ids": (3,), "max_live_sequences": 5}, {}),
    "top-k": (QWEN, {"top_k": 4}, {"logprob_chunk_tokens": 48}),
}


def config_of(rollout, learner):
    shape = {"num_prompts": P, "group_size": G, "max_completion_tokens": T, **rollout}
    changes = {f"rollout.{name}": value for name, value in shape.items()}
    changes |= {f"learner.{name}": value for name, value in {"bucket_tokens": 0, **learner}.items()}
    return tiny.config_of("dapo", {**changes, "model.dtype": "bfloat16"})


def sampled(model, params, config, num_devices=1):
    run = jax.jit(make_rollout(model, config.rollout, ENDS, tiny.mesh_of(num_devices)))
    return run(params, tiny.random_prompts(P, S), jax.random.key(3))


def gap_of(model, params, config, num_devices=1):
    """-> the metric of an update on a fresh batch, without the update."""
    rollout = sampled(model, params, config, num_devices)
    reward_PG = (rollout.tokens_PGT.sum(-1) % 2).astype(jnp.float32)
    state = tiny.state_of(params, optax.sgd(1.0), config=config)
    batch = Batch(rollout, reward_PG, reward_PG, jnp.zeros(P, jnp.int32))

    def metrics(state, batch):
        target = make_target(model, state, batch, config)
        return compute_gradients(model, state.params, None, target, config.objective, config)[1]

    found = jax.jit(metrics)(state, batch)
    assert rollout.mask_PGT.sum() > 2 * P * G, "completions of some tokens"
    return float(found["policy/sampler_logp_gap"].value())


def tiers(names, often):
    """Those of a list that run often, and the others at night."""
    return [pytest.param(name, marks=pytest.mark.slow if name in often else pytest.mark.nightly) for name in names]


@pytest.mark.parametrize("name", tiers(CASES, ["all tokens, in parts of groups"]))
def test_the_learner_finds_the_samplers_numbers(name):
    arch, rollout, learner = CASES[name]
    params, config = tiny.random_params(arch), config_of(rollout, learner)
    fast = ModelDef(arch, dtype="bfloat16")
    assert gap_of(dataclasses.replace(fast, numerics="exact"), params, config) == 0.0


@pytest.mark.nightly
def test_the_fast_form_does_not():
    """The measure is one that can fail: in bfloat16 the two forms round differently."""
    assert gap_of(ModelDef(QWEN, dtype="bfloat16"), tiny.random_params(QWEN), config_of({}, {})) > 1e-3


ARCHITECTURES = {"qwen": QWEN, "gemma": GEMMA}


@pytest.mark.parametrize("name", tiers(ARCHITECTURES, ["qwen"]))
def test_in_float32_values_and_gradients_are_those_of_the_fast_form(name):
    config, arch = config_of({}, {}), ARCHITECTURES[name]
    params, model = tiny.random_params(arch), ModelDef(arch)
    rollout = sampled(model, params, config)

    @functools.partial(jax.jit, static_argnums=0)
    def run(model, params):
        def loss(params):
            logp_PGT, entropy_PGT = policy_logprobs(model, params, rollout, sampling_of(config.rollout), 0, True)
            return ((logp_PGT + 0.1 * entropy_PGT) * rollout.mask_PGT).sum(), logp_PGT * rollout.mask_PGT

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, logp), grads = run(model, params)
    (_, exact_logp), exact_grads = run(dataclasses.replace(model, numerics="exact"), params)
    np.testing.assert_allclose(exact_logp, logp, atol=2e-5)
    assert tiny.largest_difference(exact_grads, grads) < 1e-5


@pytest.mark.nightly
def test_with_adapters_over_devices():
    model = ModelDef(QWEN, dtype="bfloat16", numerics="exact", lora=LoRA(3, 5.0, ("q_proj", "down_proj")))
    adapters = jax.tree.map(lambda x: x + 0.1, init_adapters(model.param_shapes(), jax.random.key(0)))
    params = join_params(tiny.random_params(QWEN), adapters)
    assert gap_of(model, params, config_of({}, {"num_microbatches": 2}), num_devices=4) == 0.0


@pytest.mark.parametrize("width", [S, 2 * CPU.keys + 1])
def test_a_wider_batch_changes_no_bit(width):
    """Padding in front of prompts fills blocks of keys that change nothing."""
    model, params = ModelDef(QWEN, dtype="bfloat16", numerics="exact"), tiny.random_params(QWEN)
    prompts = tiny.random_prompts(P, S)
    pad = functools.partial(jnp.pad, pad_width=((0, 0), (width - S, 0)))
    wide = Prompts(pad(prompts.tokens_PS), pad(prompts.mask_PS), prompts.answer)
    encode = jax.jit(lambda params, prompts: model.bind(params).encode_prompts(prompts.tokens_PS, prompts.mask_PS)[0])
    np.testing.assert_array_equal(encode(params, wide), encode(params, prompts))


@pytest.mark.parametrize("num_rows", [1, CPU.rows, 3 * CPU.rows + 5])
def test_a_rows_product_does_not_depend_on_the_other_rows(num_rows):
    rng = np.random.default_rng(0)
    x_MI, weight_IO = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((num_rows, 96), (96, 80)))
    run = jax.jit(lambda weight_IO, x_MI: in_tiles(lambda w, x: x @ w, CPU.rows, weight_IO, x_MI))
    all_at_once = run(weight_IO, x_MI)
    for row in range(0, num_rows, 7):
        np.testing.assert_array_equal(run(weight_IO, x_MI[row : row + 1])[0], all_at_once[row])


def test_experts_are_refused(monkeypatch):
    from grpo_jax.models import families

    arch = dataclasses.replace(QWEN, mlp="experts", num_experts=4, experts_per_token=2)
    monkeypatch.setattr(families, "read_architecture", lambda _: arch)
    config = tiny.config_of(changes={"model.numerics": "exact"})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, path="folder"))
    with pytest.raises(UserError, match=r"config\.model\.numerics = 'exact': an expert"):
        build.make_model(config, None)
