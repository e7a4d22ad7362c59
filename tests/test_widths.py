"""Prompts at the width of their batch's bucket: what is sampled and trained is what the task's full width gives."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import metrics as metrics_lib
from grpo_jax.config import Config, RolloutConfig
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rollout.decoding import EndTokens
from grpo_jax.rollout.prompt_parts import without_long_rows
from grpo_jax.rollout.rollout import rollout, row_keys
from grpo_jax.training import trainer
from grpo_jax.training.run import assemble
from grpo_jax.training.widths import bucket_of, long_rows_of, prompt_buckets, prompt_lengths, with_prompt_width
from grpo_jax.types import LongRows, Prompts, Reward
from tests import programs, tiny
from tests.test_host_training import train_in_two
from tests.test_transformer import GEMMA, atol_of

LENGTHS = [3, 4, 1, 2, 4, 3, 2, 4, 9, 1, 2, 3, 4, 2, 14, 1]  # batches of four: widths of 4, 4, 16 and 16
P, S = 4, 14


class MixedTask:
    """On the host; prompts of LENGTHS at the width of the longest, over and over. Rewards follow from the tokens."""

    is_traceable, stop_ids, prompt_tokens = False, (3,), S

    tokenizer = types.SimpleNamespace(pad_id=0, decode=lambda ids: " ".join(map(str, np.asarray(ids))))

    def train_prompts(self, position, num_prompts):
        rows = [(int(position) + i) % len(LENGTHS) for i in range(num_prompts)]
        mask_PS = np.arange(S)[None] >= S - np.array(LENGTHS)[rows][:, None]
        tokens_PS = np.random.default_rng(0).integers(1, tiny.VOCAB, (len(LENGTHS), S))[rows]
        return Prompts(np.where(mask_PS, tokens_PS, 0).astype(np.int32), mask_PS, np.array(rows, np.int32))

    def eval_prompts(self):
        return self.train_prompts(0, len(LENGTHS))

    def reward(self, answer, tokens_PGT, mask_PGT):
        reward_PG = ((np.asarray(tokens_PGT) * (np.asarray(mask_PGT) > 0)).sum(-1) % 3 == 0).astype(np.float32)
        return Reward(reward_PG, np.zeros_like(reward_PG), {})

    def final_answers(self, tokens_PGT, mask_PGT):
        return [["" for _ in row] for row in tokens_PGT]

    def close(self):
        pass


def run_of(bucket_tokens, num_devices=1, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    config = tiny.config_of(
        "grpo",
        {
            "num_steps": 6,
            "eval_every": 0,
            "eval.num_samples": 0,
            "eval.batch_size": 4,
            "checkpoint.every": 3,
            "log.completions_every": 0,
            "rollout.num_prompts": P,
            "rollout.prompt_bucket_tokens": bucket_tokens,
            "optimizer.learning_rate": 1e-2,
            "mesh.data": num_devices,
            **changes,
        },
    )
    return assemble(config, tiny.mesh_of(num_devices), MixedTask(), ModelDef(tiny.LLAMA))


def numbers(workdir):
    return [{name: value for name, value in record.items() if "secs" not in name} for record in programs.records(workdir)]


def assert_same_records(left, right, **tolerance):
    assert [sorted(record) for record in left] == [sorted(record) for record in right] and len(left) == 7
    for one, other in zip(left, right, strict=True):
        for name, value in one.items():
            assert other[name] == pytest.approx(value, nan_ok=True, **tolerance), (name, one["step"])


def prompts_without_compiling(run):
    """The prompts of four steps; each program was compiled once, while the run trained."""
    state, prompts = run.initial_state(), []
    with tiny.compilations() as compiled:
        for _ in range(4):
            state, batch, _ = run.collect(state)
            prompts.append(batch.rollout.prompts)
            state, _ = run.update(state, batch)
    assert not compiled
    return prompts


def test_widths():
    config = Config(rollout=RolloutConfig(prompt_bucket_tokens=4))
    assert prompt_buckets(config, 14) == (4, 8, 14) and prompt_buckets(config, 3) == (3,)
    assert [bucket_of(n, (4, 8, 14)) for n in (1, 4, 5, 8, 9, 14)] == [4, 4, 8, 8, 14, 14]
    prompts = MixedTask().train_prompts(8, 4)
    np.testing.assert_array_equal(prompt_lengths(prompts.mask_PS), [9, 1, 2, 3])
    narrow = with_prompt_width(prompts, 9)
    np.testing.assert_array_equal(narrow.tokens_PS, prompts.tokens_PS[:, -9:])
    np.testing.assert_array_equal(narrow.mask_PS, prompts.mask_PS[:, -9:])
    jax.tree.map(np.testing.assert_array_equal, with_prompt_width(narrow, S), prompts)


@pytest.mark.slow
def test_a_run_in_buckets_is_the_run_at_full_width_and_resumes_bitwise(tmp_path):
    """On four devices, which have one width for all; on one at full width."""
    full, bucketed = run_of(0), run_of(4, num_devices=4)
    trainer.train_run(full, tmp_path / "full")
    trainer.train_run(bucketed, tmp_path / "bucketed")
    assert_same_records(numbers(tmp_path / "full"), numbers(tmp_path / "bucketed"), rel=1e-3, abs=1e-4)
    assert [prompts.tokens_PS.shape[1] for prompts in prompts_without_compiling(bucketed)] == [4, 4, 14, 14]
    train_in_two(bucketed, tmp_path / "torn", 3)
    assert numbers(tmp_path / "torn") == numbers(tmp_path / "bucketed")


@pytest.mark.slow
def test_where_shapes_are_fixed_the_width_is_the_tasks(tmp_path):
    """Dynamic sampling's buffer and the next batch are in checkpoints; what is trained on has its own width."""
    for name, bucket_tokens in [("full", 0), ("bucketed", 4)]:
        trainer.train_run(run_of(bucket_tokens, dynamic_sampling__enabled=True, async_steps=1), tmp_path / name)
    assert_same_records(numbers(tmp_path / "full"), numbers(tmp_path / "bucketed"), rel=1e-3, abs=1e-4)


# --------------------------------------------------------------------------------------------- few long prompts among short


def test_what_is_promised_of_long_rows():
    buckets = (4, 8, 16, 32)
    one_long = np.array([4, 2, 30, 3, 1, 4, 2, 3])
    assert long_rows_of(one_long, 1, buckets) == (1, 4)
    assert long_rows_of(np.array([4, 2, 30, 3, 1, 5, 2, 3]), 1, buckets) == (1, 8)
    assert long_rows_of(np.array([4, 2, 30, 3, 1, 17, 2, 3]), 1, buckets) is None  # the others are as wide
    assert long_rows_of(np.full(8, 30), 1, buckets) is None and long_rows_of(np.array([2, 30]), 2, buckets) is None
    # Two devices: each has at most one long row, and all programs are of one shape.
    assert long_rows_of(np.concatenate([one_long, one_long[::-1] // 2]), 2, buckets) == (1, 4)
    assert long_rows_of(np.concatenate([one_long, np.full(8, 30)]), 2, buckets) is None


def mixed_prompts(num=8, width=14, short=4, seed=0):
    """Two of them long, neither at an end."""
    rng = np.random.default_rng(seed)
    lengths_P = np.where(np.isin(np.arange(num), (2, 5)), width - np.arange(num) % 3, rng.integers(1, short + 1, num))
    mask_PS = np.arange(width)[None] >= width - lengths_P[:, None]
    tokens_PS = np.where(mask_PS, rng.integers(1, tiny.VOCAB, (num, width)), 0)
    return Prompts(jnp.asarray(tokens_PS, jnp.int32), jnp.asarray(mask_PS), jnp.arange(num))


TWO_LONG = LongRows(2, 4)


def promised(prompts):
    return dataclasses.replace(prompts, long_rows=TWO_LONG)


@pytest.mark.parametrize(
    ("arch", "changes"),
    [
        (tiny.LLAMA, {}),
        (GEMMA, {"repetition_penalty": 1.5}),
        pytest.param(tiny.DELTA, {"top_k": 5}, marks=pytest.mark.slow),
    ],
    ids=["llama", "gemma", "delta"],
)
def test_completions_of_long_and_of_short_prompts_are_those_of_one_width(arch, changes):
    config, ends = RolloutConfig(group_size=3, max_completion_tokens=7, **changes), EndTokens((3,), 0)
    keys_PG = row_keys(jax.random.key(1), 8, 3)
    params = tiny.random_params(arch)
    sample = jax.jit(lambda prompts: rollout(ModelDef(arch), params, prompts, keys_PG, config, ends))
    plain, parted = sample(mixed_prompts()), sample(promised(mixed_prompts()))
    assert parted.prompts.long_rows == TWO_LONG
    parted = without_long_rows(parted)
    for name in ("tokens_PGT", "mask_PGT", "is_truncated_PG", "prompts"):
        jax.tree.map(np.testing.assert_array_equal, getattr(parted, name), getattr(plain, name))
    np.testing.assert_allclose(parted.sampler_logp_PGT, plain.sampler_logp_PGT, atol=atol_of(arch))
    assert len(np.unique(np.asarray(plain.tokens_PGT))) > 5


@pytest.mark.slow
@pytest.mark.parametrize(("num_microbatches", "num_minibatches"), [(1, 1), (4, 1), (16, 2)])
def test_an_update_of_long_and_of_short_prompts_is_that_of_one_width(num_microbatches, num_minibatches):
    """In a microbatch of four are two groups; in one of sixteen is a part of a group."""
    changes = {"learner.num_microbatches": num_microbatches, "learner.num_minibatches": num_minibatches}
    changes["optimizer.eps"] = 1e-5  # at 1e-8 a gradient that is nothing but rounding moves its weight as far as any other
    run = run_of(4, rollout__num_prompts=8, rollout__group_size=4, **{"learner.old_logp": "learner"} | changes)
    G, T = run.config.rollout.group_size, run.config.rollout.max_completion_tokens
    batch = tiny.random_batch(8, G, T, prompt_width=14, vocab=run.model.arch.vocab_size)
    prompts, results = mixed_prompts(), []
    for each in (prompts, promised(prompts)):
        of_prompts = dataclasses.replace(batch, rollout=dataclasses.replace(batch.rollout, prompts=each))
        state, metrics = run.update(run.initial_state(), of_prompts)
        results.append((jax.device_get(state.params), metrics_lib.to_floats(metrics)))
    (params, metrics), (expected, expected_metrics) = results[::-1]
    assert tiny.largest_difference(params, expected) < 1e-5
    assert sorted(metrics) == sorted(expected_metrics)
    for name, value in expected_metrics.items():
        assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True), name
    start = jax.device_get(run.initial_state().params)
    assert tiny.largest_difference(expected, start) > 1e-4


@pytest.mark.slow
def test_a_run_says_which_rows_are_long_and_compiles_no_further_program(tmp_path):
    run, full = run_of(4), run_of(0)
    trainer.train_run(run, tmp_path / "parts")
    trainer.train_run(full, tmp_path / "full")
    assert_same_records(numbers(tmp_path / "parts"), numbers(tmp_path / "full"), rel=1e-3, abs=1e-4)
    assert [prompts.long_rows for prompts in prompts_without_compiling(run)] == [None, None, (1, 4), (1, 4)]
