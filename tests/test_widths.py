"""Prompts at the width of their batch's bucket: what is sampled and trained is what the task's full width gives."""

import types

import jax
import numpy as np
import pytest

from grpo_jax.config import Config, RolloutConfig
from grpo_jax.models.transformer import ModelDef
from grpo_jax.training import trainer
from grpo_jax.training.run import assemble
from grpo_jax.training.widths import bucket_of, longest_prompt, prompt_buckets, with_prompt_width
from grpo_jax.types import Prompts, Reward
from tests import programs, tiny
from tests.test_host_training import train_in_two

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


def test_widths():
    config = Config(rollout=RolloutConfig(prompt_bucket_tokens=4))
    assert prompt_buckets(config, 14) == (4, 8, 14) and prompt_buckets(config, 3) == (3,)
    assert [bucket_of(n, (4, 8, 14)) for n in (1, 4, 5, 8, 9, 14)] == [4, 4, 8, 8, 14, 14]
    prompts = MixedTask().train_prompts(8, 4)
    assert longest_prompt(prompts.mask_PS.any(0)) == 9
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
    state, widths = bucketed.initial_state(), []
    with tiny.compilations() as compiled:
        for _ in range(4):
            state, batch, _ = bucketed.collect(state)
            widths.append(batch.rollout.prompts.tokens_PS.shape[1])
            state, _ = bucketed.update(state, batch)
    assert widths == [4, 4, 14, 14] and not compiled  # each program was compiled once, while the run trained
    train_in_two(bucketed, tmp_path / "torn", 3)
    assert numbers(tmp_path / "torn") == numbers(tmp_path / "bucketed")


@pytest.mark.slow
def test_where_shapes_are_fixed_the_width_is_the_tasks(tmp_path):
    """Dynamic sampling's buffer and the next batch are in checkpoints; what is trained on has its own width."""
    for name, bucket_tokens in [("full", 0), ("bucketed", 4)]:
        trainer.train_run(run_of(bucket_tokens, dynamic_sampling__enabled=True, async_steps=1), tmp_path / name)
    assert_same_records(numbers(tmp_path / "full"), numbers(tmp_path / "bucketed"), rel=1e-3, abs=1e-4)
