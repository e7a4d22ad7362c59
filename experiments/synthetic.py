"""The benchmark's workload in our own types: decoder, task, batch."""

from __future__ import annotations

import types
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.peers import workload
from experiments.peers.workload import PAD, SHAPES
from grpo_jax import build
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.run import Run
from grpo_jax.types import Batch, Prompts, Reward, Rollout


def architecture(name: str) -> Architecture:
    """A shape of the workload as our decoder's."""
    shape = SHAPES[name]
    sizes = (shape.vocab_size, shape.dim, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.ffn_dim)
    return Architecture(*sizes, rope=Rope(shape.rope_theta), norm_eps=1e-5)


class RandomTask:
    """The workload's prompts, every time; nothing ends a completion, and rewards differ within a group."""

    is_traceable, stop_ids = True, ()
    tokenizer: Any = types.SimpleNamespace(pad_id=PAD)

    def __init__(self, ids: list[list[int]]):
        self.tokens_PS = np.asarray(ids, np.int32)
        self.prompt_tokens = self.tokens_PS.shape[1]

    def train_prompts(self, position: Any, num_prompts: int) -> Prompts:
        del position
        tokens_PS = jnp.asarray(self.tokens_PS)
        assert len(tokens_PS) == num_prompts
        return Prompts(tokens_PS, jnp.ones_like(tokens_PS, bool), jnp.zeros(num_prompts, jnp.int32))

    def eval_prompts(self) -> Prompts:
        return self.train_prompts(0, len(self.tokens_PS))

    def reward(self, answer: Any, tokens_PGT: Any, mask_PGT: Any) -> Reward:
        del answer, mask_PGT
        reward_PG = (tokens_PGT.sum(-1) % 7).astype(jnp.float32)
        return Reward(reward_PG, jnp.zeros_like(reward_PG), {})

    def final_answers(self, tokens_PGT: Any, mask_PGT: Any) -> list[list[str]]:
        raise NotImplementedError("nothing is evaluated here")

    def close(self) -> None:
        pass


def random_batch(run: Run) -> Batch:
    """Full-length random completions, half of each group right."""
    rollout, vocab_size = run.config.rollout, run.model.arch.vocab_size
    P, G, T = rollout.num_prompts, rollout.group_size, rollout.max_completion_tokens
    uniform_PGT = jnp.full((P, G, T), np.log(vocab_size), jnp.float32)
    is_cut = build.sampling_of(run.config).is_cut
    reward_PG = jnp.asarray([[float(workload.advantage(g) > 0) for g in range(G)]] * P)
    return Batch(
        rollout=Rollout(
            prompts=run.task.train_prompts(0, P),
            tokens_PGT=jnp.asarray(workload.random_ids(P * G, T, vocab_size, seed=1), jnp.int32).reshape(P, G, T),
            mask_PGT=jnp.ones((P, G, T)),
            sampler_logp_PGT=-uniform_PGT,
            entropy_PGT=uniform_PGT,
            support_PGT=jnp.full((P, G, T), vocab_size, jnp.int32) if is_cut else None,
            is_truncated_PG=jnp.zeros((P, G), bool),
        ),
        task_reward_PG=reward_PG,
        reward_PG=reward_PG,
        sampled_at_P=jnp.zeros(P, jnp.int32),
    )
