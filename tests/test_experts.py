"""A mixture of experts beside each token's own MLPs; sampler and learner choose alike; what may move a router."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file

from grpo_jax.learner.optimizer import is_decayed
from grpo_jax.metrics import ShareEntropy, ShareMax
from grpo_jax.models.experts import Experts, Router, count_choices
from grpo_jax.models.export import save_weights
from grpo_jax.models.folders import SINGLE
from grpo_jax.models.hf import load_params
from grpo_jax.models.lora import LoRA, merge_adapters, split_adapters
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import AXES, shardings_of, with_shardings
from grpo_jax.types import join_params
from tests import tiny

ARCH = dataclasses.replace(
    tiny.LLAMA, num_layers=2, ffn_dim=6, mlp="experts", num_experts=5, experts_per_token=2, is_router_normalised=True
)
MODEL = ModelDef(ARCH)
TOKENS_BT = np.random.default_rng(0).integers(1, tiny.VOCAB, (3, 6))
MASK_BT = np.arange(6)[None] >= np.array([0, 2, 5])[:, None]


def layer_of(params, number):
    return jax.tree.map(lambda x: np.asarray(x[number], np.float64), params["layers"]["mlp"])


def one_by_one(weights, x_MD, arch):
    """The same in float64, without sorting: each token with each of its experts' matrices."""
    out_MD = np.zeros_like(x_MD)
    for m, x_D in enumerate(x_MD):
        logits_E = weights["router"]["weight"] @ x_D
        p_E = np.exp(logits_E - logits_E.max()) / np.exp(logits_E - logits_E.max()).sum()
        chosen = np.argsort(-p_E)[: arch.experts_per_token]
        total = p_E[chosen].sum() if arch.is_router_normalised else 1.0
        for e in chosen:
            gate_F, up_F = (x_D @ weights[name]["weight"][e] for name in ("expert_gate", "expert_up"))
            hidden_F = gate_F / (1 + np.exp(-gate_F)) * up_F
            out_MD[m] += p_E[e] / total * (hidden_F @ weights["expert_down"]["weight"][e])
    return out_MD


@pytest.mark.parametrize("changes", [{}, {"is_router_normalised": False, "experts_per_token": 3}])
def test_a_token_gets_its_own_experts_whatever_else_is_in_the_batch(changes):
    arch = dataclasses.replace(ARCH, **changes)
    params = tiny.random_params(arch)
    x_MD = np.random.default_rng(1).normal(size=(7, arch.dim))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Experts(arch, jax.nn.silu, rngs=nnx.Rngs(0))))
    layer = nnx.merge(graphdef, nnx.State(jax.tree.map(lambda x: x[0], params["layers"]["mlp"])))
    expected_MD = one_by_one(layer_of(params, 0), x_MD, arch)
    assert np.abs(expected_MD).max() > 1
    out_MD, chosen_Mk = layer(jnp.asarray(x_MD, jnp.float32))
    np.testing.assert_allclose(out_MD, expected_MD, atol=2e-5)
    assert chosen_Mk.shape == (7, arch.experts_per_token)
    alone_1D, _ = layer(jnp.asarray(x_MD[3:4], jnp.float32))
    np.testing.assert_allclose(alone_1D[0], out_MD[3], atol=1e-6)


def test_the_gradient_is_that_of_all_experts_under_a_mask():
    params, x_MD = tiny.random_params(ARCH), jax.random.normal(jax.random.key(0), (7, ARCH.dim))
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Experts(ARCH, jax.nn.silu, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda x: x[0], params["layers"]["mlp"])

    def sorted_loss(weights, x_MD):
        return jnp.sin(nnx.merge(graphdef, nnx.State(weights))(x_MD)[0]).sum()

    def masked_loss(weights, x_MD):
        p_ME = jax.nn.softmax(x_MD @ weights["router"]["weight"].T, -1)
        least_M1 = jnp.sort(p_ME, -1)[:, -ARCH.experts_per_token, None]
        p_ME = jnp.where(p_ME >= least_M1, p_ME, 0.0)
        p_ME = p_ME / p_ME.sum(-1, keepdims=True)
        gate_MEF, up_MEF = (jnp.einsum("md,edf->mef", x_MD, weights[name]["weight"]) for name in ("expert_gate", "expert_up"))
        out_MED = jnp.einsum("mef,efd->med", jax.nn.silu(gate_MEF) * up_MEF, weights["expert_down"]["weight"])
        return jnp.sin(jnp.einsum("me,med->md", p_ME, out_MED)).sum()

    ours, theirs = (jax.jit(jax.grad(loss, (0, 1)))(weights, x_MD) for loss in (sorted_loss, masked_loss))
    for left, right in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        assert np.abs(right).max() > 0.01
        np.testing.assert_allclose(left, right, atol=1e-4)


@pytest.mark.slow
def test_sampler_and_learner_choose_the_same_experts(monkeypatch):
    """Decoding token by token over a shared prompt, beside one forward over prompts and completions, in float32."""
    chosen, route = [], Router.__call__

    def recorded(self, x_MD):
        weight_Mk, chosen_Mk = route(self, x_MD)
        chosen.append(np.asarray(chosen_Mk))
        return weight_Mk, chosen_Mk

    monkeypatch.setattr(Router, "__call__", recorded)
    P, G, S, T = 2, 2, 3, 3
    prompts = tiny.random_prompts(P, S)
    tokens_BT = np.random.default_rng(2).integers(1, tiny.VOCAB, (P * G, T))
    with jax.disable_jit():
        decoder = MODEL.bind(tiny.random_params(ARCH))
        _, prefix = decoder.encode_prompts(prompts.tokens_PS, prompts.mask_PS)
        chosen.clear()
        layers, caches = decoder.unstack_layers(), decoder.empty_caches(P * G, T)
        for slot in range(T):
            _, caches = decoder.decode_step(layers, caches, jnp.asarray(tokens_BT[:, slot]), slot, prefix)
        sampled_LBTk = np.stack(chosen).reshape(T, ARCH.num_layers, P * G, -1).transpose(1, 2, 0, 3)
        chosen.clear()
        _, _, load_LE = decoder.forward_with_prefix(
            prompts.tokens_PS, prompts.mask_PS, jnp.asarray(tokens_BT), np.ones((P * G, T), bool)
        )
    of_prompts = [each.reshape(P, S, -1) for each in chosen[::2]]
    learned_LBTk = np.stack([each.reshape(P * G, T, -1) for each in chosen[1::2]])
    np.testing.assert_array_equal(sampled_LBTk, learned_LBTk)
    assert len(np.unique(learned_LBTk)) == ARCH.num_experts, "an expert was never asked"
    for layer in range(ARCH.num_layers):
        taken = [learned_LBTk[layer].ravel(), of_prompts[layer][np.asarray(prompts.mask_PS) > 0].ravel()]
        np.testing.assert_array_equal(load_LE[layer], np.bincount(np.concatenate(taken), minlength=ARCH.num_experts))


def test_experts_are_loaded_in_shards_and_saved_as_they_were(tmp_path):
    """Each stored tensor is turned round on its way, and so is its sharding."""
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 2, 2), AXES)
    params, shapes = tiny.random_params(ARCH), MODEL.param_shapes()
    save_weights(tmp_path, params, ARCH, "float32", 10**9)
    stored = load_file(tmp_path / SINGLE)
    up_LEIO = params["layers"]["mlp"]["expert_up"]["weight"]
    np.testing.assert_array_equal(stored["model.layers.1.mlp.experts.3.up_proj.weight"], up_LEIO[1, 3].T)
    loaded = load_params(tmp_path, ARCH, "float32", shardings_of(with_shardings(shapes, mesh, 0)))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for name, spec in (("expert_up", ("fsdp", "tensor")), ("expert_down", ("tensor", "fsdp"))):
        assert loaded["layers"]["mlp"][name]["weight"].sharding.spec == PartitionSpec(None, None, *spec)


def test_loads_are_counted_over_tokens_and_merged_as_counts():
    chosen = jnp.asarray([[[0, 1], [0, 2]], [[3, 1], [0, 1]]])
    np.testing.assert_array_equal(count_choices(chosen, jnp.asarray([[1, 0], [1, 1]]), 5), [2, 3, 0, 1, 0])
    left, right = (jnp.asarray(x, jnp.float32) for x in ([[4, 0], [1, 1]], [[0, 4], [5, 1]]))
    entropy = ShareEntropy(left).merge(ShareEntropy(right)).value()
    shares = np.array([0.75, 0.25])
    assert entropy == pytest.approx((np.log(2) - (shares * np.log(shares)).sum()) / 2)
    assert ShareMax(left).merge(ShareMax(right)).value() == pytest.approx(1.5)


@pytest.mark.slow
def test_a_frozen_router_has_no_gradient_and_no_router_decays():
    params = tiny.random_params(ARCH)

    def gradients(model):
        return jax.jit(jax.grad(lambda p: jnp.sin(model.bind(p)(TOKENS_BT, MASK_BT)).sum()))(params)

    trained = flatten_dict(gradients(MODEL))
    frozen = flatten_dict(gradients(dataclasses.replace(MODEL, is_router_frozen=True)))
    decayed = flatten_dict(is_decayed(params))
    for path, leaf in trained.items():
        is_router = "router" in path
        assert path == ("head",) or np.abs(leaf).max() > 1e-3
        np.testing.assert_allclose(frozen[path], 0 * leaf if is_router else leaf, atol=1e-5)
        assert not (is_router and decayed[path])
    assert decayed["layers", "mlp", "expert_up", "weight"]


@pytest.mark.slow
def test_adapters_of_experts_equal_merged_weights():
    lora = LoRA(rank=2, alpha=3.0, targets=("q_proj", "gate_proj", "up_proj", "down_proj"))
    model, base = dataclasses.replace(MODEL, lora=lora), tiny.random_params(ARCH)
    rng = np.random.default_rng(0)
    shapes = split_adapters(model.param_shapes())[1]
    adapters = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), jnp.float32), shapes)
    assert flatten_dict(adapters)["layers", "mlp", "expert_down", "lora_a"].shape == (2, 5, 2, 6)
    forward = jax.jit(lambda model, params: model.bind(params)(TOKENS_BT, MASK_BT), static_argnums=0)
    adapted = forward(model, join_params(base, adapters))
    merged = forward(MODEL, merge_adapters(base, adapters, lora))
    assert np.abs(adapted - forward(MODEL, base))[MASK_BT].max() > 0.1
    np.testing.assert_allclose(adapted[MASK_BT], merged[MASK_BT], atol=2e-5)
