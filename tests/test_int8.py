"""Weights in int8 for the rollout: what it draws from is the policy with rounded matrices, and the learner corrects for it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import RolloutConfig
from grpo_jax.errors import UserError
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.models.int8 import Int8Matrix, dequantize, dequantize_layers, quantize, quantize_layers
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rollout.decoding import EndTokens
from grpo_jax.rollout.rollout import greedy, rollout, row_keys, sampling_of
from grpo_jax.training import trainer
from tests import programs, tiny
from tests.test_transformer import ARCHS

ENDS = EndTokens((3,), 0)
INT8 = RolloutConfig(group_size=3, max_completion_tokens=6, weights="int8")


def test_a_weight_is_off_by_half_a_scale_at_most():
    matrix = np.random.default_rng(0).normal(size=(5, 7, 33)).astype(np.float32) * np.logspace(-3, 3, 7)[None, :, None]
    matrix[0, 0] = 0.0
    rounded = jax.jit(quantize)(matrix)
    assert rounded.q.dtype == jnp.int8 and rounded.scale.shape == (5, 7, 1)
    scale = np.abs(matrix).max(-1, keepdims=True) / 127
    assert (np.abs(dequantize(rounded, jnp.float32) - matrix) <= scale * 0.5001).all()
    assert np.abs(rounded.q).max() == 127 and not np.asarray(rounded.q)[0, 0].any()
    again = quantize(dequantize(rounded, jnp.float32))
    np.testing.assert_array_equal(again.q, rounded.q)


def test_matrices_of_products_are_rounded_and_nothing_else():
    arch = dataclasses.replace(ARCHS["qwen3"], qkv_bias=True)
    layers = quantize_layers(tiny.random_params(arch)["layers"])
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(layers, is_leaf=lambda x: isinstance(x, Int8Matrix)):
        found.setdefault(isinstance(leaf, Int8Matrix), set()).add("/".join(str(key.key) for key in path))
    assert found[True] == {f"attn/{name}/weight" for name in "qkvo"} | {f"mlp/{name}/weight" for name in ("gate", "up", "down")}
    assert {"attn/q/bias", "attn_norm/weight", "attn/q_norm/weight"} <= found[False]


@pytest.mark.parametrize("arch", [tiny.LLAMA, pytest.param(tiny.DELTA, marks=pytest.mark.slow)], ids=["llama", "delta"])
def test_the_sampler_is_the_policy_with_rounded_matrices(arch):
    """Prompts too: the learner's log-probabilities by these weights are those that the rollout has recorded."""
    arch = dataclasses.replace(arch, tie_embeddings=False)
    model, params, prompts = ModelDef(arch), tiny.random_params(arch), tiny.random_prompts(4, 5)
    sample = jax.jit(rollout, static_argnums=(0, 4, 5))
    rolled = sample(model, params, prompts, row_keys(jax.random.key(0), 4, 3), INT8, ENDS)
    rounded = {
        **params,
        "layers": jax.tree.map(jnp.asarray, dequantize_layers(quantize_layers(params["layers"]), jnp.float32)),
        "head": dequantize(quantize(params["head"]), jnp.float32),
    }
    is_token = np.asarray(rolled.mask_PGT) > 0
    logp, other = (
        np.asarray(policy_logprobs(model, weights, rolled, sampling_of(INT8), 64)[0])[is_token] for weights in (rounded, params)
    )
    recorded = np.asarray(rolled.sampler_logp_PGT)[is_token]
    np.testing.assert_allclose(recorded, logp, atol=2e-5 if arch.delta is None else 1e-4)
    assert np.abs(recorded - other).max() > 1e-3, "the rounding changed nothing: is it done?"


def test_a_decoding_loop_reads_int8():
    """Of the loop's operands the layers' matrices are int8: a program that rounded them back before it would read bfloat16."""
    model, prompts = ModelDef(tiny.LLAMA, dtype="bfloat16"), tiny.random_prompts(4, 5)
    arguments = tiny.random_params(tiny.LLAMA), prompts, row_keys(jax.random.key(0), 4, 3)
    jaxpr = jax.make_jaxpr(lambda *args: rollout(model, *args, INT8, ENDS))(*arguments)
    loops = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "while"]
    shapes = [(7 * tiny.LLAMA.num_layers + 1) for _ in loops]
    assert loops and [sum(v.aval.dtype == jnp.int8 for v in eqn.invars) for eqn in loops] == shapes


def test_settings_that_would_leave_the_rounding_uncorrected_are_refused():
    def parsed(**changes):
        return tiny.config_of("grpo", {name.replace("__", "."): value for name, value in changes.items()})

    with pytest.raises(UserError, match="importance_cap, to 2"):
        parsed(rollout__weights="int8")
    with pytest.raises(UserError, match="numerics to 'fast'"):
        parsed(rollout__weights="int8", learner__importance_cap=2.0, model__numerics="exact")
    assert parsed(rollout__weights="int8", learner__importance_cap=2.0).learner.old_logp == "learner"
    assert parsed(rollout__weights="int8", learner__old_logp="sampler").learner.old_logp == "sampler"
    assert greedy(INT8).weights == "model"  # what is evaluated is the policy


@pytest.mark.slow
def test_a_run_in_int8_records_the_gap_and_the_weights(tmp_path):
    changes = {"rollout.weights": "int8", "learner.importance_cap": 2.0, "num_steps": 3, "eval_every": 0, "eval.num_samples": 0}
    trainer.train(tiny.config_of("grpo", changes), tmp_path)
    records = [record for record in programs.records(tmp_path) if "policy/sampler_logp_gap" in record]
    assert len(records) == 3
    assert all(1e-3 < record["policy/sampler_logp_gap"] < 1 for record in records)
    assert all(abs(record["policy/importance_weight"] - 1) < 0.1 for record in records)
