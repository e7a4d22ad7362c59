"""Workload of the benchmark in our own types: decoder, batch."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from experiments.peers import workload
from experiments.peers.workload import SHAPES
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.rollout.rollout import sampling_of
from grpo_jax.training.run import Run
from grpo_jax.types import Batch, Rollout


def architecture(name: str) -> Architecture:
    """Return a shape of the workload as our decoder's."""
    shape = SHAPES[name]
    sizes = (shape.vocab_size, shape.dim, shape.num_layers, shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.ffn_dim)
    return Architecture(*sizes, rope=Rope(shape.rope_theta), norm_eps=1e-5)


def random_batch(run: Run) -> Batch:
    """Make a batch of full-length random completions, half of each group right."""
    rollout, vocab_size = run.config.rollout, run.model.arch.vocab_size
    P, G, T = rollout.num_prompts, rollout.group_size, rollout.max_completion_tokens
    # log V is the entropy of the uniform distribution. Random weights are 0.3 nats from it: ratios are near 1, as in training.
    uniform_PGT = jnp.full((P, G, T), np.log(vocab_size), jnp.float32)
    # Half right: a group of equal rewards has advantages of 0, and an update made of those would train nothing.
    reward_PG = jnp.asarray([[float(workload.advantage(g) > 0) for g in range(G)]] * P)
    # A rollout has the size of the support only where top-k or top-p is used, and the update is another program with it.
    support_PGT = None
    if sampling_of(run.config.rollout).is_cut:
        support_PGT = jnp.full((P, G, T), vocab_size, jnp.int32)
    return Batch(
        rollout=Rollout(
            prompts=run.task.train_prompts(0, P),
            tokens_PGT=jnp.asarray(workload.random_ids(P * G, T, vocab_size, seed=1), jnp.int32).reshape(P, G, T),
            mask_PGT=jnp.ones((P, G, T)),
            sampler_logp_PGT=-uniform_PGT,
            entropy_PGT=uniform_PGT,
            support_PGT=support_PGT,
            is_truncated_PG=jnp.zeros((P, G), bool),
        ),
        task_reward_PG=reward_PG,
        reward_PG=reward_PG,
        sampled_at_P=jnp.zeros(P, jnp.int32),
    )
