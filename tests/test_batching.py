"""Microbatches cut to the length they need: the same update, without the padding's work."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.learner import batching
from grpo_jax.learner.hyperparams import with_fields
from grpo_jax.learner.train_step import make_train_step
from grpo_jax.rollout.sampling import Sampling
from tests import tiny

SGD = optax.sgd(1.0)
T, PAD = 6, 0


def update(spec, batch, params, num_devices=1):
    """One step of the bigram model; -> (new parameters, metrics)."""
    step = jax.jit(make_train_step(tiny.Bigram(), lambda _: SGD, spec, tiny.mesh_of(num_devices)))
    reference = jax.tree.map(lambda x: 0.9 * x, params) if spec.objective.kl_coef else None
    after, metrics = step(tiny.state_of(params, SGD, reference, config=spec), batch)
    return after.params, metrics_lib.to_floats(metrics)


def spec_of(name, **changes):
    learner = {"logprob_chunk_tokens": 16, "old_logp": "learner", **changes}
    return tiny.update_config(objectives.get(name), Sampling(0.7), T, **learner)


def short_groups(batch):
    """All groups but two have completions of at most 2 tokens."""
    keep_P1 = jnp.arange(8)[:, None] % 4 == 3
    mask_PGT = batch.rollout.mask_PGT * (keep_P1[..., None] | (jnp.arange(T) < 2)[None, None])
    return tiny.with_rollout(batch, mask_PGT=mask_PGT)


@pytest.mark.parametrize(("name", "num_microbatches", "num_devices"), [("grpo", 1, 8), ("gtpo", 4, 1), ("dr_grpo", 16, 1)])
@pytest.mark.slow
def test_the_update_is_the_same_at_any_choice_of_widths(name, num_microbatches, num_devices):
    """With a reference and old log-probs of the learner, so that their passes are cut too."""
    batch, params = short_groups(tiny.random_batch(8, 4, T)), tiny.bigram_params()
    spec = spec_of(name, num_microbatches=num_microbatches)
    expected, expected_metrics = update(spec, batch, params, num_devices)
    found, metrics = update(with_fields(spec, {"learner.bucket_tokens": 2}), batch, params, num_devices)
    steps = [jax.tree.map(jnp.subtract, each, params) for each in (found, expected)]
    assert tiny.largest_difference(*steps) < 1e-5
    assert metrics.keys() == expected_metrics.keys()
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=2e-5, atol=1e-6, err_msg=key)


@pytest.mark.slow
def test_padding_beyond_the_width_is_never_computed():
    """The padding token's embedding is NaN, which nothing survives that looks at it."""
    batch = tiny.random_batch(8, 4, T)
    mask_PGT = batch.rollout.mask_PGT * (jnp.arange(T) < 2)[None, None]
    # The second slot is no input for a second token, so that only slots from there on may be poisoned.
    tokens_PGT = jnp.where(jnp.arange(T)[None, None] < 2, jnp.maximum(batch.rollout.tokens_PGT, 1), PAD)
    batch = tiny.with_rollout(batch, mask_PGT=mask_PGT, tokens_PGT=tokens_PGT)
    prompts = batch.rollout.prompts
    batch = tiny.with_rollout(batch, prompts=dataclasses.replace(prompts, tokens_PS=jnp.maximum(prompts.tokens_PS, 1)))
    params = tiny.bigram_params()
    params["embed"] = params["embed"].at[PAD].set(jnp.nan)
    for bucket_tokens, is_finite in ((0, False), (2, True)):
        after, metrics = update(spec_of("dapo", bucket_tokens=bucket_tokens, num_microbatches=2), batch, params)
        # What is not finite is left out of the weights, and said.
        assert metrics["update/skipped"] == (not is_finite)
        assert np.isfinite(after["head"]).all() and (after["head"] == params["head"]).all() == (not is_finite)


def test_groups_are_ordered_by_their_longest_completion():
    mask_PGT = jnp.asarray([[[1, 1, 1], [1, 0, 0]], [[1, 0, 0], [1, 0, 0]], [[1, 1, 0], [0, 0, 0]]])
    assert batching.completion_lengths(mask_PGT).tolist() == [[3, 1], [1, 1], [2, 0]]
    assert batching.length_order(mask_PGT).tolist() == [1, 2, 0]


@pytest.mark.parametrize(("longest", "width"), [(0, 2), (2, 2), (3, 4), (5, 6), (6, 6)])
def test_the_least_width_that_holds_all(longest, width):
    mask_PGT = jnp.arange(6)[None, None] < jnp.asarray([[longest, 0]])[..., None]
    tree = (jnp.ones((1, 2, 6)), jnp.ones((1, 2)))
    found = batching.run_at_bucket(lambda tree: jnp.float32(tree[0].shape[-1]), tree, mask_PGT, (2, 4, 6))
    assert found == width
