"""Every family under every variant: three whole training steps, beside a plain forward of whole rows and the float64 oracle.

Each step samples with the policy of the step before, and the learner evaluates what was sampled over the prompt that a group
shares. The plain forward has neither a cache nor a shared prompt. From its log-probabilities the oracle has advantages, loss
and the loss's derivative by each of them, and that derivative's vector-Jacobian product is the gradient to be found.
"""

import dataclasses
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.config import RolloutConfig
from grpo_jax.learner.hyperparams import hyperparams_of
from grpo_jax.learner.optimizer import make_optimizer
from grpo_jax.learner.train_step import make_train_step
from grpo_jax.models.families import FAMILIES, read_architecture
from grpo_jax.models.linear import head_logits
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import make_mesh
from grpo_jax.rollout.rollout import EndTokens, rollout, row_keys
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.types import Batch
from tests import oracle, tiny
from tests.hf_models import MODELS, SIZES, torch_config

P, G, S, T = 4, 4, 7, 6  # windows of 4 tokens end in the prompt, at its border and in the completion
TEMPERATURE = 0.7
VARIANTS = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
# One model of each family, and one with YaRN; the others of hf_models differ from these in sizes.
FIRST = {kind: name for name, (kind, _) in reversed(MODELS.items())}
NAMES = [*{**FIRST, "llama": "llama 3", "qwen2": "qwen2, windows"}.values(), "qwen3, yarn"]
OFTEN = {("phi 4", "gtpo")}
CASES = [
    pytest.param(name, variant, marks=pytest.mark.slow if (name, variant) in OFTEN else pytest.mark.nightly)
    for name in NAMES
    for variant in VARIANTS
]


def test_no_family_is_left_out():
    assert {MODELS[name][0] for name in NAMES} == set(FAMILIES)
    assert len(CASES) == len(NAMES) * len(VARIANTS) and {each.values for each in CASES} >= OFTEN


@functools.cache
def model_of(name):
    """The decoder of a family's tiny model, as its config.json gives it."""
    with tempfile.TemporaryDirectory() as folder:
        torch_config(name).save_pretrained(folder)
        arch = read_architecture(folder)
    if arch.delta is not None:
        # A state's answer may be next to nothing, and its norm would make much of what was lost in rounding: 1.5e-4 nats of
        # one token in 93.
        arch = dataclasses.replace(arch, norm_eps=1e-2)
    return ModelDef(arch)


@functools.cache
def programs_of(name):
    """(sampler, plain forward), compiled once for all variants.

    plain(params, tokens, mask, slope_BT) -> logp of the completions' tokens, norm of the gradient of sum(slope * logp).
    """
    # Gemma's tied and enlarged embeddings make it repeat a prompt's last token, so more of them must end a completion.
    stride = 2 if name == "gemma" else 6
    model, ends = model_of(name), EndTokens(tuple(range(1, SIZES["vocab_size"], stride)), 0)
    config = RolloutConfig(group_size=G, max_completion_tokens=T, temperature=TEMPERATURE)

    @jax.jit
    def sample(params, prompts, key):
        return rollout(model, params, prompts, row_keys(key, P, G), config, ends)

    def logp_of(params, tokens_BX, mask_BX):
        decoder = model.bind(params)
        hidden_BTD = decoder(tokens_BX, mask_BX)[:, S - 1 : -1]
        logits_FV = head_logits(hidden_BTD.reshape(-1, model.arch.dim), decoder.head_VD, decoder.logit_cap)
        log_p_BTV = jax.nn.log_softmax(logits_FV / TEMPERATURE).reshape(P * G, T, -1)
        return jnp.take_along_axis(log_p_BTV, tokens_BX[:, S:, None], -1)[..., 0]

    @jax.jit
    def plain(params, tokens_BX, mask_BX, slope_BT):
        logp_BT, backward = jax.vjp(lambda params: logp_of(params, tokens_BX, mask_BX), params)
        (grads,) = backward(slope_BT)
        return logp_BT, jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads)))

    return sample, plain


def whole_rows(drawn):
    """(tokens, mask), each prompt in front of its completions: [B, S + T]."""
    prompts = [np.repeat(x, G, axis=0) for x in (drawn.prompts.tokens_PS, drawn.prompts.mask_PS)]
    completions = [x.reshape(P * G, T) for x in (drawn.tokens_PGT, drawn.mask_PGT > 0)]
    return [np.concatenate(pair, 1) for pair in zip(prompts, completions, strict=True)]


def batch_of(drawn, seed):
    """A batch of what was sampled; old log-probabilities lie beside the policy's, so that ratios are not one."""
    rng, mask_PGT = np.random.default_rng(seed), drawn.mask_PGT
    task_PG = rng.integers(0, 2, (P, G)).astype(np.float32)
    task_PG[0], task_PG[1, :2] = 1, [0, 1]  # a group whose answers are all right, and one whose are not
    reward_PG = task_PG - 0.5 * (rng.random((P, G)) < 0.25).astype(np.float32)
    old_PGT = (drawn.sampler_logp_PGT + 0.2 * rng.normal(size=mask_PGT.shape) * mask_PGT).astype(np.float32)
    drawn = drawn.replace(sampler_logp_PGT=old_PGT)
    return Batch(drawn, jnp.asarray(task_PG), jnp.asarray(reward_PG), jnp.zeros(P, jnp.int32))


def oracle_of(objective, batch, logp_BT, ref_BT):
    """(loss, its derivative by each log-probability), float64."""
    rolled = batch.rollout
    mask_BT, entropy_BT, old_BT = (
        np.asarray(x, np.float64).reshape(P * G, T) for x in (rolled.mask_PGT, rolled.entropy_PGT, rolled.sampler_logp_PGT)
    )
    rewards = [np.asarray(x, np.float64).ravel() for x in (batch.reward_PG, batch.task_reward_PG)]
    adv_BT = oracle.advantages(objective, rewards[0], mask_BT, entropy_BT, G, rewards[1], logp_BT=old_BT)
    return oracle.loss_and_grad(objective, logp_BT, old_BT, ref_BT, adv_BT, mask_BT, T)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_three_steps_are_those_of_a_plain_forward_and_the_oracle(name, variant):
    model, objective = model_of(name), objectives.get(variant)
    sample, plain = programs_of(name)
    config = tiny.update_config(objective, max_completion_tokens=T, sampling=Sampling(TEMPERATURE))
    optimizer_of = functools.partial(make_optimizer, config.optimizer, 3)
    params = tiny.random_params(model.arch)
    ref_params = jax.tree.map(lambda x: 0.9 * x, params) if objective.has_kl else None
    state = tiny.state_of(params, optimizer_of(hyperparams_of(config)), ref_params, config=config)
    step = jax.jit(make_train_step(model, optimizer_of, config, make_mesh({"data": 1, "fsdp": 1, "tensor": 1})))
    zero_BT = np.zeros((P * G, T), np.float32)
    for number in range(3):
        prompts = tiny.random_prompts(P, S, SIZES["vocab_size"], seed=number)
        drawn = jax.device_get(sample(state.params, prompts, jax.random.key(number)))
        rows, active_BT = whole_rows(drawn), drawn.mask_PGT.reshape(P * G, T) > 0
        logp_BT = np.asarray(plain(state.params, *rows, zero_BT)[0], np.float64)
        assert 0.3 < active_BT.mean() < 1 and logp_BT[active_BT].std() > 0.3
        np.testing.assert_allclose(drawn.sampler_logp_PGT.reshape(P * G, T)[active_BT], logp_BT[active_BT], atol=1e-4)
        ref_BT = None
        if ref_params is not None:
            ref_BT = np.asarray(plain(ref_params, *rows, zero_BT)[0], np.float64)
        batch = batch_of(drawn, number)
        loss, slope_BT = oracle_of(objective, batch, logp_BT, ref_BT)
        norm = plain(state.params, *rows, slope_BT.astype(np.float32))[1]
        before = jax.device_get(state.params)
        state, metrics = step(state, batch)
        found = metrics_lib.to_floats(metrics)
        assert found["loss/total"] == pytest.approx(loss, rel=1e-4, abs=1e-5)
        assert found["grad/norm"] == pytest.approx(float(norm), rel=1e-3) and float(norm) > 1e-3
        assert found["update/skipped"] == 0
        moved = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(y).max(), jax.device_get(state.params), before)
        assert min(jax.tree.leaves(moved)) > 1e-6 and max(jax.tree.leaves(moved)) < 0.1
