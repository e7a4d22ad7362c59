"""A mixture of experts beside each token's own MLPs; sampler and learner choose alike; what may move a router."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh, PartitionSpec
from safetensors.numpy import load_file

from grpo_jax.config import RolloutConfig
from grpo_jax.learner.logprobs import logprobs_and_routing
from grpo_jax.learner.optimizer import is_decayed
from grpo_jax.learner.train_step import Target, routing_metrics
from grpo_jax.metrics import ShareEntropy, ShareMax
from grpo_jax.models import experts
from grpo_jax.models.experts import Experts, Router, Routing, choices_of, count_choices, num_parts, share_elsewhere
from grpo_jax.models.export import save_weights
from grpo_jax.models.folders import SINGLE
from grpo_jax.models.hf import load_params
from grpo_jax.models.lora import LoRA, merge_adapters, split_adapters
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import AXES, shardings_of, with_shardings
from grpo_jax.rollout.rollout import EndTokens, rollout, row_keys, sampling_of
from grpo_jax.types import Rollout, join_params
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


@jax.custom_vjp
def undefined_behind(x_MI, weight_EIO, sizes_E):
    """A grouped product that leaves NaN behind the last run, in what it gives and in its gradient by the rows."""
    return jnp.where(jnp.arange(len(x_MI))[:, None] < sizes_E.sum(), jax.lax.ragged_dot(x_MI, weight_EIO, sizes_E), jnp.nan)


def _undefined_gradient(residuals, dy_MO):
    *factors, sizes_E = residuals
    is_own = jnp.arange(len(dy_MO))[:, None] < sizes_E.sum()
    factors[0] = jnp.where(is_own, factors[0], 0)
    _, backward = jax.vjp(lambda x, weight: jax.lax.ragged_dot(x, weight, sizes_E), *factors)
    dx_MI, d_weight_EIO = backward(jnp.where(is_own, dy_MO, 0))
    return jnp.where(is_own, dx_MI, jnp.nan), d_weight_EIO, None


undefined_behind.defvjp(lambda *args: (undefined_behind(*args), args), _undefined_gradient)


@pytest.mark.parametrize("part_tokens", [1, 10**9], ids=["in parts", "at once"])
def test_devices_with_some_of_the_experts_answer_like_one_with_all(monkeypatch, part_tokens):
    """Values and gradients; two thirds of all choices fall on one device's experts, and nothing comes of undefined rows."""
    monkeypatch.setattr(experts, "PART_TOKENS", part_tokens)
    monkeypatch.setattr(experts, "grouped_product", undefined_behind)
    arch = dataclasses.replace(ARCH, num_experts=8, experts_per_token=3)
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Experts(arch, jax.nn.silu, rngs=nnx.Rngs(0))))
    weights = jax.tree.map(lambda x: x[0], tiny.random_params(arch)["layers"]["mlp"])
    x_MD = jax.random.normal(jax.random.key(0), (24, arch.dim)) + 2 * weights["router"]["weight"][:2].sum(0)[None]
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 1, 4, 1, 1), AXES)
    specs = jax.tree.map(lambda x: PartitionSpec("expert") if x.ndim == 3 else PartitionSpec(), weights)

    def answers(weights, x_MD):
        return nnx.merge(graphdef, nnx.State(weights))(x_MD)

    rows = PartitionSpec("expert")
    cut = jax.shard_map(answers, mesh=mesh, in_specs=(specs, rows), out_specs=(rows, rows))

    def loss(function, weights, x_MD):
        y_MD, chosen_Mk = function(weights, x_MD)
        return jnp.sin(y_MD).sum(), (y_MD, chosen_Mk)

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, function), (0, 1), has_aux=True))(weights, x_MD) for function in (cut, answers)
    )
    assert (np.asarray(expected[1][1]) < 2).mean() > 0.5 and num_parts(4, 6) == {1: 4, 10**9: 1}[part_tokens]
    for ours, one in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.abs(one).max() > 0.01
        np.testing.assert_allclose(ours, one, atol=1e-5 * np.abs(one).max())


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
            _, caches, _ = decoder.decode_step(layers, caches, jnp.asarray(tokens_BT[:, slot]), slot, prefix)
        sampled_LBTk = np.stack(chosen).reshape(T, ARCH.num_layers, P * G, -1).transpose(1, 2, 0, 3)
        chosen.clear()
        _, _, routing = decoder.forward_with_prefix(
            prompts.tokens_PS, prompts.mask_PS, jnp.asarray(tokens_BT), np.ones((P * G, T), bool)
        )
    of_prompts = [each.reshape(P, S, -1) for each in chosen[::2]]
    learned_LBTk = np.stack([each.reshape(P * G, T, -1) for each in chosen[1::2]])
    np.testing.assert_array_equal(sampled_LBTk, learned_LBTk)
    assert len(np.unique(learned_LBTk)) == ARCH.num_experts, "an expert was never asked"
    for layer in range(ARCH.num_layers):
        taken = [learned_LBTk[layer].ravel(), of_prompts[layer][np.asarray(prompts.mask_PS) > 0].ravel()]
        np.testing.assert_array_equal(routing.load_LE[layer], np.bincount(np.concatenate(taken), minlength=ARCH.num_experts))


def test_experts_are_loaded_in_shards_and_saved_as_they_were(tmp_path):
    """Each stored tensor is turned round on its way, and so is its sharding."""
    mesh, arch = Mesh(np.array(jax.devices()[:8]).reshape(1, 2, 2, 1, 2), AXES), dataclasses.replace(ARCH, num_experts=6)
    params, shapes = tiny.random_params(arch), ModelDef(arch).param_shapes()
    save_weights(tmp_path, params, arch, "float32", 10**9)
    stored = load_file(tmp_path / SINGLE)
    up_LEIO = params["layers"]["mlp"]["expert_up"]["weight"]
    np.testing.assert_array_equal(stored["model.layers.1.mlp.experts.3.up_proj.weight"], up_LEIO[1, 3].T)
    loaded = load_params(tmp_path, arch, "float32", shardings_of(with_shardings(shapes, mesh, 0)))
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    for name, spec in (("expert_up", ("fsdp", "tensor")), ("expert_down", ("tensor", "fsdp"))):
        assert loaded["layers"]["mlp"][name]["weight"].sharding.spec == PartitionSpec(None, "expert", *spec)


@pytest.mark.slow
def test_the_rollout_records_the_experts_that_the_learner_finds():
    """In float32, whatever the order of decoding; nothing is recorded where the sampler read no token."""
    P, G, T = 3, 2, 7
    prompts, ends = tiny.random_prompts(P, 3), EndTokens(tuple(range(1, tiny.VOCAB, 8)), 0)
    params, keys_PG = tiny.random_params(ARCH), row_keys(jax.random.key(0), P, G)
    config = RolloutConfig(group_size=G, max_completion_tokens=T)

    @functools.partial(jax.jit, static_argnums=0)
    def sample(config, params):
        rolled = rollout(MODEL, params, prompts, keys_PG, config, ends)
        return rolled, logprobs_and_routing(MODEL, params, rolled, sampling_of(config), 0)[2]

    rolled, routing = sample(config, params)
    refilled, _ = sample(dataclasses.replace(config, max_live_sequences=2), params)
    jax.tree.map(np.testing.assert_array_equal, rolled.experts_PGTX, refilled.experts_PGTX)
    chosen_BTX, sampled_BTX = routing.chosen_BTX, rolled.experts_PGTX.reshape(P * G, T, -1)
    is_read_BT = np.asarray(rolled.mask_PGT.reshape(P * G, T)[:, 1:]) > 0
    assert 0 < is_read_BT.sum() < is_read_BT.size and sampled_BTX.dtype == jnp.uint8
    np.testing.assert_array_equal(share_elsewhere(chosen_BTX, sampled_BTX[:, :-1], 2)[is_read_BT], 0)
    assert not np.asarray(sampled_BTX[:, :-1])[~is_read_BT].any() and not np.asarray(sampled_BTX[:, -1]).any()
    assert len(np.unique(np.asarray(sampled_BTX)[:, :-1][is_read_BT])) > 3


def test_the_share_of_other_experts_looks_at_sets_layer_by_layer():
    """Tokens of two layers, two experts each: the same, in another order, one of four elsewhere, none the same."""
    own = choices_of([jnp.asarray([[[0, 1], [0, 1], [0, 1], [0, 1]]]), jnp.asarray([[[2, 3], [2, 3], [2, 3], [2, 3]]])], 300)
    other = choices_of([jnp.asarray([[[0, 1], [1, 0], [0, 1], [2, 3]]]), jnp.asarray([[[2, 3], [3, 2], [2, 4], [0, 1]]])], 300)
    assert own.dtype == jnp.uint16 and own.shape == (1, 4, 4)
    np.testing.assert_array_equal(share_elsewhere(own, other, 2), [[0, 0, 0.25, 1]])


def test_how_often_the_sampler_differs_is_counted_where_both_had_the_same_weights():
    """Two rows of one group, three read tokens; a group of an older policy does not count."""
    mask_PGT = jnp.asarray([[[1, 1, 1], [1, 1, 0]], [[1, 1, 1], [1, 1, 1]]], jnp.float32)
    learner_BTX = choices_of([jnp.asarray([[[0, 1]] * 2] * 4)], 5)
    sampler_PGTX = jnp.asarray([[[[0, 1], [0, 3], [0, 0]], [[2, 4], [9, 9], [0, 0]]], [[[3, 4]] * 3] * 2], jnp.uint8)
    rolled = Rollout(None, None, mask_PGT, None, None, None, None, sampler_PGTX)
    target = Target(rolled, jnp.asarray([[True, True], [False, False]]), *[None] * 4)
    found = routing_metrics(Routing(jnp.ones((1, 5)), learner_BTX), target, 2)["experts/sampler_differs"]
    assert (float(found.total), float(found.count)) == (1.5, 3)


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
