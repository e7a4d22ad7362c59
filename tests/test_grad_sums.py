"""A scan over layers that adds its gradient to sums, against JAX's own gradient and an addition."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.learner import logprobs
from grpo_jax.models import grad_sums, transformer
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rollout.sampling import Sampling
from tests import tiny

LLAMA = dataclasses.replace(tiny.LLAMA, num_layers=3)
EXPERTS = dataclasses.replace(LLAMA, ffn_dim=10, mlp="experts", num_experts=4, experts_per_token=2, is_router_normalised=True)
GEMMA = dataclasses.replace(LLAMA, sliding_window=3, local_layers=(0, 2))
DELTA = dataclasses.replace(tiny.DELTA, norm_eps=0.1)


CASES = {"llama": (LLAMA, "none"), "products": (LLAMA, "dots"), "gemma": (GEMMA, "full"), "experts": (EXPERTS, "narrow")}
CASES["delta"] = (DELTA, "full")


@pytest.mark.parametrize(("arch", "remat"), CASES.values(), ids=CASES.keys())
def test_sums_become_sums_and_gradient(arch, remat, monkeypatch):
    monkeypatch.setattr(transformer, "MAX_UNROLLED", 1)
    model, params, rollout = (
        ModelDef(arch, remat=remat),
        tiny.random_params(arch),
        tiny.random_batch(vocab=arch.vocab_size).rollout,
    )
    P, G, T = rollout.tokens_PGT.shape
    made = []
    forward = grad_sums._Layer.forward

    def watched(self, *given):
        results = forward(self, *given)
        made.append((len(results[1][1]), len(self.given)))
        return results

    monkeypatch.setattr(grad_sums._Layer, "forward", watched)

    def loss(params, sums):
        prompts, tokens = (rollout.prompts.tokens_PS, rollout.prompts.mask_PS), rollout.tokens_PGT.reshape(P * G, T)
        mask = rollout.mask_PGT.reshape(P * G, T)
        last_PD, hidden_BTD, routing = model.bind(params).forward_with_prefix(*prompts, tokens, mask, sums=sums)
        return jnp.square(last_PD).sum() + jnp.sin(hidden_BTD * mask[..., None]).sum(), routing

    rng = np.random.default_rng(0)
    sums = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params["layers"])
    (value, routing), expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, None)
    found = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, sums)
    (found_value, found_routing), (grads, found_sums) = found
    np.testing.assert_allclose(found_value, value, rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, found_routing, routing)
    assert tiny.largest_difference(found_sums, jax.tree.map(jnp.add, sums, expected["layers"])) < 1e-4
    assert tiny.largest_difference(found_sums, sums) > 0.1
    assert tiny.largest_difference(grads["embed"], expected["embed"]) < 1e-4
    assert not any(np.any(x) for x in jax.tree.leaves(grads["layers"]))
    if remat == "full":  # layers' two inputs alone are stacked, and their kind, but no mask, which all of them have
        assert {num for num, _ in made} == {2 * arch.period + bool(arch.local_layers)} and all(given for _, given in made)


@pytest.mark.parametrize("vocab", [8, 0], ids=["by parts of the vocabulary", "by positions"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_sums_of_embedding_and_head(is_tied, vocab, monkeypatch):
    """Prompts and completions look up rows of the table that is the head too, or of another one."""
    monkeypatch.setattr(transformer, "MAX_UNROLLED", 1)
    monkeypatch.setattr(logprobs.Chunks, "of", lambda *_: logprobs.Chunks(16, vocab))
    arch = dataclasses.replace(LLAMA, tie_embeddings=is_tied)
    model, params = ModelDef(arch), tiny.random_params(arch)
    rollout = tiny.random_batch(vocab=arch.vocab_size).rollout
    weight_PGT = jnp.asarray(np.random.default_rng(1).normal(size=rollout.mask_PGT.shape), jnp.float32) * rollout.mask_PGT

    def loss(params, sums):
        logp_PGT, entropy_PGT, _ = logprobs.logprobs_and_routing(model, params, rollout, Sampling(), 0, True, sums)
        return ((logp_PGT + 0.3 * entropy_PGT) * weight_PGT).sum()

    rng = np.random.default_rng(0)
    sums = {name: params[name] for name in ("layers", "embed", "head") if name in params}
    sums = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), sums)
    expected = jax.jit(jax.grad(loss))(params, None)
    grads, found = jax.jit(jax.grad(loss, (0, 1)))(params, sums)
    for name, total in sums.items():
        assert tiny.largest_difference(found[name], jax.tree.map(jnp.add, total, expected[name])) < 1e-4
        assert tiny.largest_difference(found[name], total) > 0.1
        assert not any(np.any(x) for x in jax.tree.leaves(grads[name]))
    assert tiny.largest_difference(grads["final_norm"], expected["final_norm"]) < 1e-4
