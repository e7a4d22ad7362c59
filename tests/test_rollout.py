"""Sampling completions: where they stop, what is recorded, and that a row depends on its own prompt and key only."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import RolloutConfig
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.models.transformer import Decoder, ModelDef
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.rng import key_for
from grpo_jax.rollout import decoding
from grpo_jax.rollout.decoding import cache_sizes
from grpo_jax.rollout.rollout import EndTokens, rollout, row_keys
from grpo_jax.rollout.sampling import GREEDY, Sampling
from grpo_jax.training.samplers import make_rollout
from tests import tiny

MODEL = ModelDef(tiny.LLAMA)
P, G, S, T = 8, 3, 4, 7
STOPS, PAD = (3, 11), 5  # on purpose not 0: a zero-filled buffer would pass for padding
CUT = Sampling(temperature=0.7, top_k=20, top_p=0.9)
RULED = Sampling(temperature=0.8, bad_ids=(7, 8), bad_first_ids=(0, 3, 11), forced_prefix_ids=(9,))
REPEATS = Sampling(temperature=0.9, repetition_penalty=1.4, bad_ids=(1,))
ALL = Sampling(0.9, 0, 0.95, 0.02, 1.3, (1, 2), (3,), (9, 6))


def spec_of(sampling=Sampling(), stop_ids=STOPS, stop_strings=None, **changes):  # noqa: B008
    """-> (config, end tokens) of a rollout."""
    config = RolloutConfig(group_size=G, max_completion_tokens=T, **dataclasses.asdict(sampling))
    return dataclasses.replace(config, **changes), EndTokens(stop_ids, PAD, stop_strings)


SPEC = spec_of()

ARGUMENTS = tiny.random_params(tiny.LLAMA), tiny.random_prompts(P, S), key_for(0, "rollout", 0)


@functools.cache
def sampler(spec=SPEC, num_devices=1):
    return jax.jit(make_rollout(MODEL, *spec, tiny.mesh_of(num_devices)))


@functools.cache
def sampled(spec=SPEC, num_devices=1, step=0, seed=0):
    """Rollout of one fixed set of prompts, as NumPy arrays."""
    key = key_for(seed, "rollout", step)
    params, prompts = tiny.random_params(tiny.LLAMA), tiny.random_prompts(P, S)
    return jax.device_get(sampler(spec, num_devices)(params, prompts, key))


def assert_same(left, right):
    """The same completions; what is recorded about them up to rounding."""
    np.testing.assert_array_equal(left.tokens_PGT, right.tokens_PGT)
    np.testing.assert_array_equal(left.mask_PGT, right.mask_PGT)
    np.testing.assert_array_equal(left.is_truncated_PG, right.is_truncated_PG)
    np.testing.assert_allclose(left.sampler_logp_PGT, right.sampler_logp_PGT, atol=1e-5)
    np.testing.assert_allclose(left.entropy_PGT, right.entropy_PGT, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ stopping


def test_a_row_ends_with_any_stop_token_keeps_it_and_is_blank_after():
    got = sampled()
    ends = []
    for p, g in np.ndindex(P, G):
        tokens_T = got.tokens_PGT[p, g]
        stops = np.flatnonzero(np.isin(tokens_T, STOPS))
        num = stops[0] + 1 if len(stops) else T
        np.testing.assert_array_equal(got.mask_PGT[p, g], np.arange(T) < num)
        assert (tokens_T[num:] == PAD).all()
        assert (got.sampler_logp_PGT[p, g, num:] == 0).all() and (got.entropy_PGT[p, g, num:] == 0).all()
        assert (got.sampler_logp_PGT[p, g, :num] < 0).all() and (got.entropy_PGT[p, g, :num] > 0).all()
        assert got.is_truncated_PG[p, g] == (len(stops) == 0)
        ends.append((tokens_T[num - 1] if len(stops) else None, num))
    assert {stop for stop, _ in ends} == {*STOPS, None}  # both stop tokens and the limit occur,
    assert {1, T} < {num for _, num in ends}  # from the first position to the last
    assert (None, T) in ends and any(stop is not None and num == T for stop, num in ends)
    assert got.tokens_PGT.dtype == np.int32 and got.mask_PGT.dtype == np.float32 and got.support_PGT is None


def test_recorded_support_is_the_samplers_and_blank_after_the_end():
    got = sampled(spec_of(sampling=CUT))
    active = got.mask_PGT > 0
    assert (got.support_PGT[active] >= 1).all() and (got.support_PGT[active] <= CUT.top_k).all()
    assert (got.support_PGT[~active] == 0).all() and len(np.unique(got.support_PGT[active])) > 3
    assert (got.entropy_PGT[active] <= np.log(got.support_PGT[active]) + 1e-5).all()


def test_one_token_completions():
    got, longer = sampled(spec_of(max_completion_tokens=1)), sampled()
    assert got.tokens_PGT.shape == (P, G, 1)
    np.testing.assert_array_equal(got.tokens_PGT, longer.tokens_PGT[..., :1])
    np.testing.assert_array_equal(got.mask_PGT, 1.0)
    np.testing.assert_array_equal(got.is_truncated_PG, ~np.isin(got.tokens_PGT[..., 0], STOPS))
    np.testing.assert_allclose(got.sampler_logp_PGT, longer.sampler_logp_PGT[..., :1], atol=1e-6)


@pytest.mark.parametrize("max_live_sequences", [0, 2])
def test_without_stop_tokens_rows_run_to_the_limit_and_no_empty_array_enters_the_program(max_live_sequences):
    """The compiler of jax 0.11 ended with the process on an array without elements inside `shard_map`."""
    spec = spec_of(stop_ids=(), max_live_sequences=max_live_sequences)
    got = sampled(spec, num_devices=8)
    np.testing.assert_array_equal(got.mask_PGT, 1.0)
    assert got.is_truncated_PG.all()
    assert_same(got, sampled(spec_of(stop_ids=(9999,))))
    assert "tensor<0x" not in sampler(spec, 8).lower(*ARGUMENTS).as_text()


# -------------------------------------------------------------------------------------------------------- independence


def test_a_row_does_not_depend_on_the_other_rows():
    """Two of the prompts alone, with their own keys: same completions, though the loop now ends at another token."""
    few = [5, 2]
    params, prompts = tiny.random_params(tiny.LLAMA), tiny.random_prompts(P, S)
    keys_PG = row_keys(key_for(0, "rollout", 0), P, G)[jnp.array(few)]
    fewer = jax.tree.map(lambda x: x[jnp.array(few)], prompts)
    alone = jax.jit(lambda *args: rollout(MODEL, *args, *SPEC))(params, fewer, keys_PG)
    assert_same(alone, jax.tree.map(lambda x: x[few], dataclasses.replace(sampled(), support_PGT=None)))


@pytest.mark.parametrize("num_devices", [2, 8])
@pytest.mark.slow
def test_number_of_devices_changes_nothing(num_devices):
    assert_same(sampled(num_devices=num_devices), sampled())


def test_another_step_or_seed_is_another_sample_and_the_same_is_the_same():
    """A fixed key would repeat the same noise at every step."""
    tokens = sampled().tokens_PGT
    for other in (sampled(step=1), sampled(seed=1)):
        assert (other.tokens_PGT != tokens).any(-1).mean() > 0.8
    key, params, prompts = key_for(0, "rollout", 0), tiny.random_params(tiny.LLAMA), tiny.random_prompts(P, S)
    np.testing.assert_array_equal(sampler()(params, prompts, key).tokens_PGT, tokens)


def test_rows_of_a_group_and_equal_prompts_differ():
    prompts = jax.tree.map(lambda x: jnp.repeat(x[:1], P, axis=0), tiny.random_prompts(P, S))
    got = sampler()(tiny.random_params(tiny.LLAMA), prompts, key_for(0, "rollout", 0))
    assert len(np.unique(got.tokens_PGT.reshape(P * G, T), axis=0)) > 0.8 * P * G


# ------------------------------------------------------------------------------------------------- sampler and learner


def learners_view(got, sampling):
    """(logp, entropy) of a rollout by `policy_logprobs`: one forward over whole completions."""
    scored = jax.jit(lambda params, got: policy_logprobs(MODEL, params, got, sampling, 16))
    return jax.device_get(scored(tiny.random_params(tiny.LLAMA), got))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), CUT, *(pytest.param(each, marks=pytest.mark.slow) for each in (Sampling(min_p=0.1), RULED, REPEATS, ALL))],
    ids=["plain", "cut", "min_p", "ruled out", "penalty", "all"],
)
def test_the_learner_agrees_with_the_sampler(sampling):
    """To 1e-4 nats at every token, the stop token included; a learner that ignored the temperature would not."""
    got = sampled(spec_of(sampling=sampling))
    active = got.mask_PGT > 0
    is_stop = active & np.isin(got.tokens_PGT, STOPS)
    assert is_stop.sum() > 3
    assert not np.isin(got.tokens_PGT[active], sampling.bad_ids).any()
    for t, forced in enumerate(sampling.forced_prefix_ids):
        np.testing.assert_array_equal(got.tokens_PGT[..., t], forced)
    logp_PGT, entropy_PGT = learners_view(got, sampling)
    assert np.isfinite(logp_PGT).all() and np.isfinite(entropy_PGT).all()
    np.testing.assert_allclose(logp_PGT[active], got.sampler_logp_PGT[active], atol=1e-4)
    np.testing.assert_allclose(logp_PGT[is_stop], got.sampler_logp_PGT[is_stop], atol=1e-4)
    np.testing.assert_allclose(entropy_PGT[active], got.entropy_PGT[active], atol=1e-4)


@pytest.mark.slow
def test_greedy_is_the_chain_of_argmaxes():
    """Each token is the best one after the tokens before it, by a plain forward over prompt and completion."""
    got = sampled(spec_of(sampling=GREEDY))
    prompts = tiny.random_prompts(P, S)
    tokens_BX = jnp.concatenate([jnp.repeat(prompts.tokens_PS, G, 0), got.tokens_PGT.reshape(-1, T)], 1)
    mask_BX = jnp.concatenate([jnp.repeat(prompts.mask_PS, G, 0), got.mask_PGT.reshape(-1, T) > 0], 1)

    @jax.jit
    def best(params):
        decoder = MODEL.bind(params)
        return (decoder(tokens_BX, mask_BX) @ decoder.head_VD.T).argmax(-1)

    best_PGT = np.asarray(best(tiny.random_params(tiny.LLAMA)))[:, S - 1 : -1].reshape(P, G, T)
    active = got.mask_PGT > 0
    np.testing.assert_array_equal(got.tokens_PGT[active], best_PGT[active])
    assert (got.tokens_PGT == got.tokens_PGT[:, :1]).all() and active.sum() > 2 * P * G


# --------------------------------------------------------------------------------------------------------------- speed


def jaxpr_of(function):
    return str(jax.make_jaxpr(function)(tiny.random_params(tiny.LLAMA), tiny.random_prompts(P, S), jax.random.key(0)))


def test_no_token_passes_through_the_host():
    run = make_rollout(MODEL, *SPEC, tiny.mesh_of(1))

    def with_callback(*args):
        return jax.pure_callback(lambda x: x, jax.ShapeDtypeStruct((P, G, T), jnp.int32), run(*args).tokens_PGT)

    assert "callback" in jaxpr_of(with_callback)  # the scan does find one
    assert "callback" not in jaxpr_of(run)


@pytest.mark.parametrize("stop_ids", [STOPS, tuple(range(tiny.VOCAB))], ids=["some", "all"])
def test_the_loop_ends_with_the_longest_row(stop_ids, monkeypatch):
    """Decode steps are counted as they run: one fewer than the tokens of the longest row, none if all stop at once."""
    steps, decode_step = [], Decoder.decode_step

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(*args)

    monkeypatch.setattr(Decoder, "decode_step", counted)
    few = jnp.array([1, 2])
    prompts = jax.tree.map(lambda x: x[few], tiny.random_prompts(P, S))
    keys_PG = row_keys(jax.random.key(2), 2, G)
    spec = spec_of(stop_ids=stop_ids, max_completion_tokens=40)
    got = jax.jit(lambda *args: rollout(MODEL, *args, *spec))(tiny.random_params(tiny.LLAMA), prompts, keys_PG)
    jax.effects_barrier()
    longest = int(got.mask_PGT.sum(-1).max())
    assert longest < 40 and not got.is_truncated_PG.any()
    assert len(steps) == longest - 1
    assert (longest > 1) == (stop_ids == STOPS)


@pytest.mark.parametrize("stop_ids", [STOPS, (9999,)], ids=["some stop", "none"])
@pytest.mark.slow
def test_a_cache_that_grows_on_the_way_changes_nothing(stop_ids, monkeypatch):
    spec = spec_of(stop_ids=stop_ids)
    monkeypatch.setattr(decoding, "MIN_SLOTS_TO_GROW", 2)
    sizes = cache_sizes(T)
    assert sizes == (T // 2, T - 1) and cache_sizes(3) == (2,) and cache_sizes(1) == (1,)
    assert cache_sizes(1024, hardware=Hardware("tpu")) == (256, 512, 768, 1024)
    text = str(jax.make_jaxpr(make_rollout(MODEL, *spec, tiny.mesh_of(1)))(*ARGUMENTS))
    K, H = tiny.LLAMA.num_kv_heads, tiny.LLAMA.head_dim
    assert all(f"f32[{P * G},{K},{num_slots},{H}]" in text for num_slots in sizes)
    grown = jax.jit(make_rollout(MODEL, *spec, tiny.mesh_of(1)))(*ARGUMENTS)
    assert_same(grown, sampled(spec))


def test_each_prompt_is_prefilled_once(monkeypatch):
    widths, forward = [], Decoder._scan_layers

    def counted(self, layer, x_BTD):
        widths.append(x_BTD.shape[:2])
        return forward(self, layer, x_BTD)

    monkeypatch.setattr(Decoder, "_scan_layers", counted)
    jaxpr_of(lambda params, prompts, key: rollout(MODEL, params, prompts, row_keys(key, P, G), *SPEC))
    assert widths == [(P, S)]


# ----------------------------------------------------------------------------------------------------------- refilling


@pytest.mark.parametrize("max_live_sequences", [1, 5, P * G - 1])
@pytest.mark.parametrize("sampling", [CUT, ALL], ids=["cut", "all"])
@pytest.mark.slow
def test_rows_that_are_refilled_draw_the_same(max_live_sequences, sampling):
    spec = spec_of(sampling=sampling)
    got = sampled(spec_of(sampling=sampling, max_live_sequences=max_live_sequences))
    side_by_side = sampled(spec)
    assert_same(got, side_by_side)
    if sampling.is_cut:
        np.testing.assert_array_equal(got.support_PGT, side_by_side.support_PGT)


@pytest.mark.parametrize("stop_ids", [(9999,), tuple(range(tiny.VOCAB))], ids=["none stops", "all at once"])
def test_refilled_rows_of_one_length(stop_ids):
    spec = spec_of(stop_ids=stop_ids)
    assert_same(sampled(spec_of(stop_ids=stop_ids, max_live_sequences=4)), sampled(spec))


@pytest.mark.slow
def test_refilled_rows_on_several_devices():
    """max_live_sequences are each device's: 3 of 2 prompts' 6 completions here, of 8 prompts' 24 on one."""
    spec = spec_of(max_live_sequences=3)
    assert_same(sampled(spec, num_devices=4), sampled(SPEC))
    assert_same(sampled(spec_of(max_live_sequences=P * G)), sampled(SPEC))


def test_a_long_completion_idles_its_own_row_only(monkeypatch):
    """Decode steps of 4 rows: what all tokens need at the least, and less than one longest completion more."""
    steps, decode_step = [], Decoder.decode_step

    def counted(*args):
        jax.debug.callback(lambda: steps.append(1))
        return decode_step(*args)

    monkeypatch.setattr(Decoder, "decode_step", counted)
    spec = spec_of(max_completion_tokens=40, max_live_sequences=4)
    params, prompts = tiny.random_params(tiny.LLAMA), tiny.random_prompts(P, S)
    got = jax.jit(lambda *args: rollout(MODEL, *args, *spec))(params, prompts, row_keys(jax.random.key(2), P, G))
    jax.effects_barrier()
    lengths = np.asarray(got.mask_PGT.sum(-1))
    in_turns = sum(lengths.ravel()[i : i + 4].max() for i in range(0, P * G, 4))
    least, longest = lengths.sum() / 4, lengths.max()
    assert least <= len(steps) <= least + longest
    assert len(steps) < 0.8 * in_turns


def test_rows_take_less_memory_than_completions():
    """The caches are those of the live rows: none is as large as all completions'."""
    spec = spec_of(max_live_sequences=3)
    text = str(jax.make_jaxpr(make_rollout(MODEL, *spec, tiny.mesh_of(1)))(*ARGUMENTS))
    K, H = tiny.LLAMA.num_kv_heads, tiny.LLAMA.head_dim
    assert f"f32[3,{K},{T - 1},{H}]" in text and f"f32[{P * G},{K},{T - 1},{H}]" not in text
