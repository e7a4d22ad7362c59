"""Completions whose tokens are spread over devices: attention, updates and runs are those of one device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.errors import UserError
from grpo_jax.learner.hyperparams import hyperparams_of
from grpo_jax.learner.optimizer import make_optimizer
from grpo_jax.learner.train_step import make_train_step
from grpo_jax.models import attention, ring
from grpo_jax.models.attention import KVCache, Prefix, make_views
from grpo_jax.models.flash import plain
from grpo_jax.models.ring import Ring
from grpo_jax.models.transformer import MAX_UNROLLED, ModelDef
from grpo_jax.parallel.context import Share, share_of
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import make_mesh, shardings_of, with_shardings
from grpo_jax.training.run import make_run
from tests import tiny

ARCH = dataclasses.replace(tiny.LLAMA, num_layers=MAX_UNROLLED + 1, qk_norm=True, norm_eps=1e-2)
WINDOWED = dataclasses.replace(ARCH, local_layers=(0, 2), sliding_window=5, score_cap=2.0, logit_cap=4.0)
P, G, S, T = 4, 2, 6, 16
LONG = 512  # two pieces of a block of a kernel's queries on each of two devices
ROWS, WHOLE = PartitionSpec("data"), PartitionSpec()


# --------------------------------------------------------------------------------------------------------- attention


@functools.cache
def rows(T=T):
    """Queries, keys and values of completions and prompts; prompts are padded on the left."""
    rng = np.random.default_rng(0)
    sizes = {"q": (P * G, T, 4, 4), "k": (P * G, T, 2, 4), "v": (P * G, T, 2, 4), "pk": (P, S, 2, 4), "pv": (P, S, 2, 4)}
    arrays = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in sizes.items()}
    mask_PS = jnp.arange(S)[None] >= jnp.array([0, 2, 5, 1])[:, None]
    return arrays, mask_PS, jnp.asarray(rng.normal(size=sizes["q"]), jnp.float32)


def on_one_device(arrays, mask_PS, window, cap):
    arch = dataclasses.replace(ARCH, local_layers=tuple(range(ARCH.num_layers)) if window else (), sliding_window=window)
    prefix, T = Prefix.of(None, mask_PS), arrays["q"].shape[1]
    positions_BT = jnp.arange(T)[None] + jnp.repeat(prefix.lengths_P, G)[:, None]
    mask_BTU = jnp.tril(jnp.ones((T, T), bool))[None]
    view, _ = make_views(arch, positions_BT, positions_BT, mask_BTU, prefix)
    own, prompt = KVCache.of(arrays["k"], arrays["v"]), KVCache.of(arrays["pk"], arrays["pv"])
    return attention._attend(0.5, cap, arrays["q"], own, view, prompt)


def on_devices(arrays, mask_PS, window, cap, num_devices, hardware=None):
    """The same by 2 x num_devices devices; rows go in and come out whole."""
    mesh, T = make_mesh({"data": 2, "context": num_devices}), arrays["q"].shape[1]

    def attend(arrays, mask_PS):
        share = share_of(T)
        q, k, v = (arrays[name][:, share.slots_X] for name in "qkv")
        own, prompt = KVCache.of(k, v), KVCache.of(arrays["pk"], arrays["pv"])
        own_BX, prompt_PS = jnp.ones(q.shape[:2], jnp.int32), mask_PS.astype(jnp.int32)
        view = Ring(share, own_BX, prompt_PS, None if window is None else jnp.int32(window), hardware)
        keys = ((each.k.swapaxes(2, 3), each.v) for each in (own, prompt))
        out = ring.attend(q * 0.5, *keys, view, cap)
        return spread(share, out)

    # Pallas's interpreter does not know over which axes an array varies.
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(ROWS, ROWS), out_specs=ROWS, check_vma=hardware is None)
    return sharded(arrays, mask_PS)


def spread(share, out_BXNH):
    whole = jnp.zeros((len(out_BXNH), share.num_slots, *out_BXNH.shape[2:])).at[:, share.slots_X].set(out_BXNH)
    return jax.lax.psum(whole, "context")


def assert_equal_with_gradients(T, window, cap, *more):
    arrays, mask_PS, weights = rows(T)

    def of(attend, *more):
        def loss(arrays):
            out = attend(arrays, mask_PS, window, cap, *more)
            return (out * weights).sum(), out

        (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
        return {"out": out, **grads}

    expected, found = of(on_one_device), of(on_devices, *more)
    for name, one in expected.items():
        np.testing.assert_allclose(found[name], one, atol=1e-5 * np.abs(one).max(), err_msg=name)


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("window, cap", [(None, None), (5, 1.5)])
def test_attention_round_a_ring_is_that_of_whole_rows(window, cap, num_devices, monkeypatch):
    monkeypatch.setattr(plain, "BLOCK_QUERIES", 2)  # several blocks of so few queries
    assert_equal_with_gradients(T, window, cap, num_devices)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.slow
def test_the_parts_by_an_accelerators_kernels(platform, monkeypatch):
    monkeypatch.setattr(plain, "forward", None)  # not by any plain operations
    assert_equal_with_gradients(LONG, None, 1.5, 2, Hardware(platform, interpret=True))


def test_each_device_has_the_same_work():
    """Pairs of a query and a key that it sees: with one piece a device the last would have 7 times those of the first."""
    slots = [np.asarray(Share(jnp.int32(rank), 4, 64).slots_X) for rank in range(4)]
    assert sorted(np.concatenate(slots)) == list(range(64))
    assert len({(each + 1).sum() for each in slots}) == 1


# ------------------------------------------------------------------------------------------------------------ updates


def config_of(sizes, variant="grpo", **changes):
    raw = {"mesh.fsdp_min_elements": 65, "optimizer.warmup_steps": 0, "rollout.max_completion_tokens": T}
    raw |= {f"mesh.{axis}": size for axis, size in sizes.items()}
    return tiny.config_of(variant, {**raw, **changes})


@functools.cache
def updated(sizes, num_microbatches, variant, arch, bucket_tokens=0, top_k=0):
    """Two updates -> (parameters, metrics)."""
    changes = {"learner.num_microbatches": num_microbatches, "learner.bucket_tokens": bucket_tokens, "rollout.top_k": top_k}
    config = config_of(dict(sizes), **changes)
    config = dataclasses.replace(config, objective=objectives.get(variant))
    model, mesh = ModelDef(arch), make_mesh(config.mesh.sizes)
    optimizer_of = functools.partial(make_optimizer, config.optimizer, config.num_updates)
    params = tiny.random_params(arch)
    ref_params = jax.tree.map(lambda x: 0.9 * x, params) if config.objective.needs_reference else None
    state = tiny.state_of(params, optimizer_of(hyperparams_of(config)), ref_params, config=config)
    places = shardings_of(with_shardings(state, mesh, config.mesh.fsdp_min_elements))
    step = jax.jit(make_train_step(model, optimizer_of, config, mesh), out_shardings=(places, None))
    state, metrics = jax.device_put(state, places), []
    for seed in range(2):
        state, each = step(state, tiny.random_batch(P, G, T, S, vocab=arch.vocab_size, seed=seed))
        metrics.append(metrics_lib.to_floats(each))
    return jax.device_get(state.params), metrics


@pytest.mark.parametrize(
    "sizes, num_microbatches, variant, arch, bucket_tokens",
    [
        ({"context": 2}, 2, "gtpo", ARCH, 0),
        ({"data": 2, "context": 4}, 1, "grpo", WINDOWED, 8),
        ({"fsdp": 2, "context": 2, "tensor": 2}, 4, "grpo_s", ARCH, 8),
    ],
)
@pytest.mark.slow
def test_updates_are_those_of_one_device(sizes, num_microbatches, variant, arch, bucket_tokens):
    params, metrics = updated(tuple(sizes.items()), num_microbatches, variant, arch, bucket_tokens)
    expected, expected_metrics = updated((("data", 1),), 1, variant, arch)
    start = tiny.random_params(arch)
    for leaf, one, before in zip(*map(jax.tree.leaves, (params, expected, start)), strict=True):
        assert np.abs(leaf - one).max() < 1e-5 * np.abs(one).max()
        assert np.abs(one - before).max() > 1e-4 * np.abs(one).max(), "nothing was learnt"
    for each, one in zip(metrics, expected_metrics, strict=True):
        assert each.keys() == one.keys()
        for name, value in one.items():
            assert each[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.mark.slow
def test_a_run_samples_and_learns_what_one_device_does():
    """Rows are sampled by all devices, each its own, and trained on by two together."""
    found = []
    for sizes in ({"data": 1}, {"data": 2, "context": 2}):
        run = make_run(config_of(sizes, "dapo", **{"rollout.max_completion_tokens": 8}))
        state, tokens = run.initial_state(), []
        for _ in range(2):
            state, batch, metrics = run.iterate(state)
            tokens.append(jax.device_get(batch.rollout.tokens_PGT))
        found.append((tokens, jax.device_get((state.params, metrics["loss/total"]))))
    (tokens, learnt), (their_tokens, they_learnt) = found
    np.testing.assert_array_equal(tokens, their_tokens)
    for one, other in zip(*map(jax.tree.leaves, (learnt, they_learnt)), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * np.abs(one).max())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout.max_completion_tokens": 6}, r"completions of 6 tokens .*multiples of 4"),
        ({"learner.bucket_tokens": 6}, r"completions of 6 tokens .*config\.learner\.bucket_tokens"),
        ({"rollout.num_prompts": 3}, r"config\.rollout\.num_prompts = 3: does not divide over the 2 devices that sample"),
        ({"model.numerics": "exact"}, r"config\.mesh\.context = 2: model\.numerics = \"exact\""),
    ],
)
def test_what_cannot_be_spread_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_run(config_of({"data": 1, "context": 2}, **changes))
