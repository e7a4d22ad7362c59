"""Refilling a batch with informative groups: the buffer, the rounds and their cap; and what shaping does to a reward."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import metrics as metrics_lib
from grpo_jax.learner.hyperparams import hyperparams_of
from grpo_jax.rewards import shaping as rewards
from grpo_jax.training import dynamic_sampling
from grpo_jax.training.iteration import Collect
from grpo_jax.training.samplers import DeviceSampler, HostSampler
from grpo_jax.types import Prompts, Reward, Rollout, TrainState
from tests import tiny

P, G, T = 4, 2, 6
NUM_PROMPTS = 200
MAX_ROUNDS = 3


def reward_of(task_PG, shaping=0.0):
    """A task's reward with the same shaping for completion g everywhere: g times `shaping`."""
    return Reward(task_PG, jnp.broadcast_to(shaping * jnp.arange(task_PG.shape[-1])[None], task_PG.shape), {})


class NumberedTask:
    """Prompt number i is asked at data position i. Rewards differ within its group if is_informative_N[i], else they are
    all `otherwise`; the shaping is different for each of its completions."""

    def __init__(self, is_informative_N, is_traceable=True, otherwise=0.0, shaping=0.0):
        self.is_informative_N, self.is_traceable, self.otherwise = is_informative_N, is_traceable, otherwise
        self.shaping = shaping

    def train_prompts(self, position, num_prompts, seed=None):
        del seed
        number_P = position + jnp.arange(num_prompts)
        return Prompts(number_P[:, None], jnp.ones((num_prompts, 1), bool), number_P)

    def reward(self, answer, tokens_PGT, mask_PGT):
        if not self.is_traceable:
            assert all(isinstance(x, np.ndarray) for x in (answer, tokens_PGT, mask_PGT))
        is_informative_P1 = jnp.asarray(self.is_informative_N)[answer][:, None]
        is_first_1G = (jnp.arange(G) == 0)[None]
        return reward_of(jnp.where(is_informative_P1, is_first_1G * 1.0, self.otherwise), self.shaping)


def numbered_rollout(params, prompts, key):
    """A rollout without a model: tokens are a fingerprint of the key, lengths differ within a group."""
    del params
    number_P, tokens_PGT = prompts.answer, jax.random.randint(key, (len(prompts.answer), G, T), 0, 2**30)
    lengths_PG = 1 + (number_P[:, None] + 3 * jnp.arange(G)[None]) % T
    mask_PGT = (jnp.arange(T)[None, None] < lengths_PG[..., None]).astype(jnp.float32)
    blank = jnp.zeros_like(mask_PGT)
    return Rollout(prompts, tokens_PGT, mask_PGT, blank, blank, None, (lengths_PG == T) & (number_P[:, None] % 2 == 0))


def config_of(**changes):
    """Dynamic sampling on; a double underscore stands for the dot."""
    base = {
        "rollout.num_prompts": P,
        "rollout.group_size": G,
        "rollout.max_completion_tokens": T,
        "dynamic_sampling.enabled": True,
        "dynamic_sampling.max_sampling_rounds": MAX_ROUNDS,
    }
    return tiny.config_of("dapo", {**base, **{name.replace("__", "."): value for name, value in changes.items()}})


def example_batch(position=0):
    prompts = NumberedTask(None).train_prompts(position, P)
    rolled = numbered_rollout(None, prompts, jax.random.key(position))
    reward_PG = prompts.answer[:, None] + 0.25 * jnp.arange(G)[None]
    return rewards.make_batch(rolled, reward_of(reward_PG), position, max_completion_tokens=T, cache_tokens=2)


def empty_state(step=0):
    pending = dynamic_sampling.empty_buffer(jax.eval_shape(example_batch))
    return TrainState(jnp.int32(step), {}, None, None, None, jnp.int32(0), pending, hyperparams=hyperparams_of(config_of()))


def make_collect(config, task, run_rollout, mesh):
    kind = DeviceSampler if task.is_traceable else HostSampler
    return Collect(config, kind(config, task, run_rollout, mesh))


# ---------------------------------------------------------------------------------------------------------- the buffer


@functools.cache
def jitted_buffer():
    return jax.jit(dynamic_sampling.push), jax.jit(dynamic_sampling.pop, static_argnums=1)


def groups_of(batch):
    """Every leaf of each group, to compare them exactly."""
    batch = jax.device_get(batch)
    return [jax.tree.map(lambda x: x[i], batch) for i in range(len(batch.task_reward_PG))]  # noqa: B023


def assert_group(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.mark.parametrize("seed, share", [(0, 0.2), (1, 0.5), (2, 0.9)])
def test_buffer_is_a_queue(seed, share):
    """Against a list, over random rounds: order kept, all leaves moved together, never more than it has room for."""
    rng = np.random.default_rng(seed)
    push, pop = jitted_buffer()
    buffer, queue, num_pops, num_short = empty_state().pending, [], 0, 0
    for position in range(0, 30 * P, P):
        batch, keep_P = example_batch(position), rng.random(P) < share
        buffer = push(buffer, batch, jnp.asarray(keep_P))
        queue += [group for group, keep in zip(groups_of(batch), keep_P, strict=True) if keep]
        assert int(buffer.count) == len(queue) < 2 * P
        for got, expected in zip(groups_of(buffer.batch), queue, strict=False):
            assert_group(got, expected)
        if len(queue) >= P or rng.random() < 0.1:
            taken, buffer = pop(buffer, P)
            num_pops, num_short = num_pops + 1, num_short + (len(queue) < P)
            for i, got in enumerate(groups_of(taken)):
                if i < len(queue):
                    assert_group(got, queue[i])
                else:
                    assert (got.rollout.mask_PGT == 0).all()
            queue = queue[P:]
            assert int(buffer.count) == len(queue)
    assert num_pops > num_short > 0


def test_all_or_nothing_kept():
    push, pop = jitted_buffer()
    batch, empty = example_batch(), empty_state().pending
    assert int(push(empty, batch, jnp.zeros(P, bool)).count) == 0
    taken, rest = pop(push(empty, batch, jnp.ones(P, bool)), P)
    jax.tree.map(np.testing.assert_array_equal, taken, batch)
    assert int(rest.count) == 0
    nothing, rest = pop(rest, P)
    assert int(rest.count) == 0 and not nothing.rollout.mask_PGT.any()


def test_the_last_free_slots_are_filled():
    """P - 1 groups wait, P more come: the buffer's last slot but one."""
    push, pop = jitted_buffer()
    buffer = push(empty_state().pending, example_batch(0), jnp.arange(P) < P - 1)
    buffer = push(buffer, example_batch(P), jnp.ones(P, bool))
    taken, rest = pop(buffer, P)
    np.testing.assert_array_equal(taken.rollout.prompts.answer, [0, 1, 2, P])
    np.testing.assert_array_equal(rest.batch.rollout.prompts.answer[: P - 1], [P + 1, P + 2, P + 3])
    assert int(rest.count) == P - 1


# ---------------------------------------------------------------------------------------------------------- the rounds


def simulate(is_informative_N, num_steps):
    """What collecting should do, with lists: per step (numbers, sampled_at, rounds, drawn so far, waiting)."""
    queue, drawn, expected = [], 0, []
    for step in range(num_steps):
        rounds = 0
        while rounds == 0 or (len(queue) < P and rounds < MAX_ROUNDS):
            queue += [(number, step) for number in range(drawn, drawn + P) if is_informative_N[number]]
            drawn, rounds = drawn + P, rounds + 1
        batch, queue = queue[:P], queue[P:]
        expected.append(SimpleNamespace(batch=batch, rounds=rounds, drawn=drawn, waiting=len(queue)))
    return expected


STREAM_N = np.random.default_rng(5).random(NUM_PROMPTS) < np.where(np.arange(NUM_PROMPTS) < 40, 0.7, 0.15)


@functools.cache
def collected(num_devices, is_traceable):
    """(expected, [(state, batch, metrics)]) over ten steps of a stream that is mostly informative, then hardly."""
    task = NumberedTask(STREAM_N, is_traceable)
    collect = make_collect(config_of(), task, numbered_rollout, tiny.mesh_of(num_devices))
    collect = jax.jit(collect) if is_traceable else collect
    state, got = empty_state(), []
    for step in range(10):
        state, batch, metrics = collect(dataclasses.replace(state, step=jnp.int32(step)))
        got.append(jax.device_get((state, batch, metrics)))
    return simulate(STREAM_N, 10), got


every_way = pytest.mark.parametrize(
    "num_devices, is_traceable", [(1, True), pytest.param(4, True, marks=pytest.mark.slow), (1, False)]
)


@every_way
def test_groups_are_gathered_in_order_over_rounds_and_steps(num_devices, is_traceable):
    """Compiled, on several devices and as a Python loop: the same as with lists. The stream makes each kind of step occur."""
    expected, got = collected(num_devices, is_traceable)
    assert {1, 2, 3} == {step.rounds for step in expected} and any(step.waiting for step in expected)
    assert any(len(step.batch) < P for step in expected) and any(len(step.batch) == P for step in expected)
    for step, (want, (state, batch, metrics)) in enumerate(zip(expected, got, strict=True)):
        num = len(want.batch)
        numbers = batch.rollout.prompts.answer[:num].tolist()
        assert list(zip(numbers, batch.sampled_at_P[:num].tolist(), strict=True)) == want.batch
        assert (batch.rollout.mask_PGT[:num].sum((1, 2)) > 0).all() and (batch.rollout.mask_PGT[num:] == 0).all()
        assert int(state.num_prompts_drawn) == want.drawn and int(state.pending.count) == want.waiting
        values = metrics_lib.to_floats(metrics)
        assert values["groups/rounds"] == want.rounds and values["groups/pending"] == want.waiting
        assert values["groups/missing"] == (P - num) / P
        assert int(state.step) == step


@every_way
def test_groups_that_waited_are_used_first_and_remember_who_sampled_them(num_devices, is_traceable):
    _, got = collected(num_devices, is_traceable)
    sampled_at = [batch.sampled_at_P[batch.rollout.mask_PGT.any((1, 2))] for _, batch, _ in got]
    assert any((at < step).any() and (at == step).any() for step, at in enumerate(sampled_at))
    assert all((np.diff(at) >= 0).all() and (at >= step - 1).all() for step, at in enumerate(sampled_at))


@every_way
def test_metrics_are_over_everything_sampled(num_devices, is_traceable):
    """Rejected groups too: else the reported success would be that of the groups picked for being half right."""
    expected, got = collected(num_devices, is_traceable)
    position = 0
    for want, (_, _, metrics) in zip(expected, got, strict=True):
        num_drawn, num_informative = want.drawn - position, int(STREAM_N[position : want.drawn].sum())
        position = want.drawn
        assert float(metrics["completion/length_mean"].count) == num_drawn * G
        values = metrics_lib.to_floats(metrics)
        np.testing.assert_allclose(values["groups/uninformative"], 1 - num_informative / num_drawn, atol=1e-6)
        np.testing.assert_allclose(values["reward/success"], num_informative / (num_drawn * G), atol=1e-6)


@every_way
def test_every_round_of_every_step_has_its_own_noise(num_devices, is_traceable):
    """A key that ignored the step or the round would hand out the same tokens again. The seed alone decides."""
    _, got = collected(num_devices, is_traceable)
    tokens = [batch.rollout.tokens_PGT[batch.rollout.mask_PGT.any((1, 2))] for _, batch, _ in got]
    rows = np.concatenate(tokens).reshape(-1, T)
    assert len(rows) > 4 * P * G and len(np.unique(rows, axis=0)) == len(rows)
    for (_, batch, _), (_, other, _) in zip(got, collected(1, True)[1], strict=True):
        np.testing.assert_array_equal(batch.rollout.tokens_PGT, other.rollout.tokens_PGT)


@pytest.mark.parametrize("is_traceable", [True, False])
@pytest.mark.parametrize("otherwise", [0.0, 1.0], ids=["all-wrong", "all-right"])
def test_a_stream_that_says_nothing_ends_at_the_cap(is_traceable, otherwise):
    task = NumberedTask(np.zeros(NUM_PROMPTS, bool), is_traceable, otherwise)
    collect = make_collect(config_of(), task, numbered_rollout, tiny.mesh_of(1))
    collect = jax.jit(collect) if is_traceable else collect
    state, batch, metrics = collect(empty_state())
    values = metrics_lib.to_floats(metrics)
    assert values["groups/missing"] == values["groups/uninformative"] == 1 and values["groups/rounds"] == MAX_ROUNDS
    assert int(state.num_prompts_drawn) == MAX_ROUNDS * P and int(state.pending.count) == 0
    assert not batch.rollout.mask_PGT.any()


def test_groups_are_judged_on_the_task_reward_not_on_the_shaped_one():
    """Punishment for length and shaping tell the rewards of every group apart: they are uninformative still."""
    is_informative_N = np.arange(NUM_PROMPTS) % 2 == 0
    collect = make_collect(
        config_of(overlong__cache_tokens=5),
        NumberedTask(is_informative_N, shaping=0.25),
        numbered_rollout,
        tiny.mesh_of(1),
    )
    _, batch, metrics = jax.jit(collect)(empty_state())
    prompts = NumberedTask(is_informative_N).train_prompts(0, 2 * P)
    rolled = numbered_rollout(None, prompts, jax.random.key(0))
    shaped = rewards.make_batch(rolled, reward_of(jnp.zeros((2 * P, G)), 0.25), 0, max_completion_tokens=T, cache_tokens=5)
    assert rewards.is_informative(shaped.reward_PG).sum() > P  # judged on these, odd numbers would have come through
    np.testing.assert_array_equal(batch.rollout.prompts.answer, [0, 2, 4, 6])
    assert metrics_lib.to_floats(metrics)["groups/uninformative"] == 0.5
    np.testing.assert_array_equal(batch.task_reward_PG, [[1, 0]] * P)
    np.testing.assert_allclose(batch.reward_PG - batch.task_reward_PG, shaped.reward_PG[::2], atol=1e-6)


def test_without_dynamic_sampling_one_round_is_the_batch():
    task = NumberedTask(np.zeros(NUM_PROMPTS, bool))
    collect = make_collect(config_of(dynamic_sampling__enabled=False), task, numbered_rollout, tiny.mesh_of(1))
    state = dataclasses.replace(empty_state(step=7), pending=None, num_prompts_drawn=jnp.int32(12))
    after, batch, metrics = jax.jit(collect)(state)
    np.testing.assert_array_equal(batch.rollout.prompts.answer, [12, 13, 14, 15])
    np.testing.assert_array_equal(batch.sampled_at_P, 7)
    assert int(after.num_prompts_drawn) == 12 + P and after.pending is None
    assert "groups/missing" not in metrics and batch.rollout.mask_PGT.any((1, 2)).all()


# ------------------------------------------------------------------------------------------------------------- rewards


def test_soft_overlong_punishment_by_hand():
    """DAPO, eq. 13, with a budget of 10 tokens and a cache of 4: free up to 6, then a quarter a token."""
    lengths = jnp.array([0, 1, 5, 6, 7, 8, 9, 10, 10])
    is_truncated = jnp.array([False] * 8 + [True])
    punishment = rewards.soft_overlong(lengths, is_truncated, max_completion_tokens=10, cache_tokens=4)
    np.testing.assert_array_equal(punishment, [0, 0, 0, 0, -0.25, -0.5, -0.75, -1, -1])
    widest = rewards.soft_overlong(lengths, is_truncated, max_completion_tokens=10, cache_tokens=10)
    np.testing.assert_allclose(widest, [0, -0.1, -0.5, -0.6, -0.7, -0.8, -0.9, -1, -1], rtol=1e-6)
    off = rewards.soft_overlong(lengths, is_truncated, max_completion_tokens=10, cache_tokens=0)
    np.testing.assert_array_equal(off, 0)


def test_punishment_is_added_beside_the_task_reward_by_tokens():
    """Lengths are what the mask holds, the stop token included."""
    batch = tiny.random_batch(P, G, T)
    lengths_PG = np.asarray(batch.rollout.mask_PGT).sum(-1)
    got = rewards.make_batch(batch.rollout, reward_of(batch.task_reward_PG, 0.5), 5, max_completion_tokens=T, cache_tokens=3)
    is_truncated_PG = np.asarray(batch.rollout.is_truncated_PG)
    expected_PG = np.where(is_truncated_PG, -1, -np.clip((lengths_PG - (T - 3)) / 3, 0, 1))
    assert len(np.unique(expected_PG)) > 2
    np.testing.assert_array_equal(got.task_reward_PG, batch.task_reward_PG)
    shaping_PG = np.broadcast_to(0.5 * np.arange(G)[None], (P, G))
    np.testing.assert_allclose(got.reward_PG, batch.task_reward_PG + shaping_PG + expected_PG, rtol=1e-6)
    np.testing.assert_array_equal(got.sampled_at_P, [5] * P)


def test_a_group_is_informative_if_any_two_rewards_differ():
    reward_PG = jnp.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.4999]])
    np.testing.assert_array_equal(rewards.is_informative(reward_PG), [False, False, True, True])


def test_shuffled_rewards_are_the_same_rewards_elsewhere():
    """Over the whole batch, not inside groups: nothing about a row may be left in its reward."""
    reward_PG = jnp.arange(P * G * 4.0).reshape(P, 4 * G)
    shuffled = rewards.shuffle_rewards(Reward(reward_PG, -reward_PG, {}), jax.random.key(0))
    got = shuffled.task_PG
    np.testing.assert_array_equal(shuffled.shaping_PG, -got)  # the two stay together
    np.testing.assert_array_equal(np.sort(got, axis=None), reward_PG.reshape(-1))
    is_own_group = got // (4 * G) == jnp.arange(P)[:, None]
    assert 0 < is_own_group.mean() < 0.6
    assert (rewards.shuffle_rewards(reward_of(reward_PG), jax.random.key(1)).task_PG != got).any()


def test_the_control_experiment_shuffles_task_rewards_afresh_at_every_step():
    task = NumberedTask(np.arange(NUM_PROMPTS) % 2 == 0, otherwise=0.25)
    config = config_of(dynamic_sampling__enabled=False, shuffle_rewards=True)
    collect = jax.jit(make_collect(config, task, numbered_rollout, tiny.mesh_of(1)))
    rows = []
    for step in range(6):
        _, batch, _ = collect(dataclasses.replace(empty_state(step), pending=None))
        np.testing.assert_array_equal(np.sort(batch.task_reward_PG, axis=None), [0, 0, 0.25, 0.25, 0.25, 0.25, 1, 1])
        np.testing.assert_array_equal(batch.reward_PG, batch.task_reward_PG)
        rows.append(tuple(np.asarray(batch.task_reward_PG).reshape(-1).tolist()))
    assert len(set(rows)) > 3
