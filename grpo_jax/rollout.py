"""Prompts -> completions, as one traced function: prefill each prompt once, decode G completions of it, stop early."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.logprobs import head_logits
from grpo_jax.models.transformer import KVCache, ModelDef
from grpo_jax.sampling import Draw, Sampling, draw
from grpo_jax.spmd import vary_like
from grpo_jax.types import Params, Prompts, Rollout

WHOLE_SLOTS = 64  # so many slots of a cache are not worth a loop of their own


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """The static half of a rollout (hashable). stop_ids: a completion ends at any of them and keeps it."""

    group_size: int
    max_completion_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    pad_id: int


@flax.struct.dataclass
class _Carry:
    """The decode loop's state; [B, T] buffers are filled column by column up to `t`."""

    t: Any
    drawn: Draw
    mask_BT: Any
    is_done_B: Any
    caches: list[KVCache]


def row_keys(key, num_prompts: int, group_size: int):
    """A key for each row, [P, G], from its number in the global batch: not from the device it happens to be on."""
    rows = jnp.arange(num_prompts * group_size)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows).reshape(num_prompts, group_size)


def cache_sizes(max_completion_tokens: int) -> tuple[int, ...]:
    """Slots of the caches as a rollout goes on: half of them first, for attention costs what there is, not what is filled."""
    num_slots = max(max_completion_tokens - 1, 1)  # the last token is never read
    return (num_slots,) if num_slots <= WHOLE_SLOTS else (-(-num_slots // 2), num_slots)


def rollout(model: ModelDef, params: Params, prompts: Prompts, row_keys_PG, spec: RolloutSpec) -> Rollout:
    """Sample G completions of each prompt.

    The loop ends with the longest live row. Token t of a row is drawn with fold_in(row key, t), whatever else is in the
    batch. What is recorded (log-probability, entropy, support) is of the distribution really drawn from.

    Args:
      params: in any dtype; computed with in the model's. prompts: [P, S], left-padded. row_keys_PG: from `row_keys`.
    Returns: a Rollout with T = spec.max_completion_tokens.
    """
    decoder = model.bind(jax.tree.map(lambda x: x.astype(model.dtype), params))  # cast once, not at every token
    P, G, T = len(prompts.tokens_PS), spec.group_size, spec.max_completion_tokens
    keys_B = row_keys_PG.reshape(P * G)
    layers, head_VD = decoder.unstacked_layers(), decoder.head_VD
    stop_ids = jnp.asarray(spec.stop_ids, jnp.int32)

    def draw_at(t, logits_BV) -> Draw:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, t))(keys_B)
        return draw(logits_BV, keys, spec.sampling)

    def record(carry: _Carry, new: Draw) -> _Carry:
        """Write column t; rows that ended before it stay blank."""
        live_B = ~carry.is_done_B
        blank = Draw(spec.pad_id, 0.0, 0.0, 0)
        column = jax.tree.map(lambda x, b: jnp.where(live_B, x, b), new, blank)
        drawn = jax.tree.map(lambda old_BT, x_B: old_BT.at[:, carry.t].set(x_B), carry.drawn, column)
        is_stop_B = (column.token_B[:, None] == stop_ids[None]).any(-1)
        return dataclasses.replace(
            carry,
            t=carry.t + 1,
            drawn=drawn,
            mask_BT=carry.mask_BT.at[:, carry.t].set(live_B.astype(jnp.float32)),
            is_done_B=carry.is_done_B | is_stop_B,
        )

    hidden_PD, prefix = decoder.encode_prompts(prompts.tokens_PS, prompts.mask_PS)
    arch = decoder.arch
    sizes = cache_sizes(T)
    cache = KVCache.empty(P * G, sizes[0], arch, decoder.dtype)
    carry = _Carry(
        t=jnp.int32(0),
        drawn=Draw(
            jnp.full((P * G, T), spec.pad_id, jnp.int32),
            jnp.zeros((P * G, T)),
            jnp.zeros((P * G, T)),
            jnp.zeros((P * G, T), jnp.int32),
        ),
        mask_BT=jnp.zeros((P * G, T)),
        is_done_B=jnp.zeros(P * G, bool),
        caches=[cache] * len(layers),
    )
    carry = vary_like(carry, prompts.tokens_PS)
    first_logits_BV = jnp.repeat(head_logits(hidden_PD, head_VD, decoder.logit_cap), G, axis=0)
    carry = record(carry, draw_at(0, first_logits_BV))

    def step(carry: _Carry) -> _Carry:
        last_B = jax.lax.dynamic_index_in_dim(carry.drawn.token_B, carry.t - 1, axis=1, keepdims=False)
        hidden_BD, caches = decoder.decode_step(layers, carry.caches, last_B, carry.t - 1, prefix)
        logits_BV = head_logits(hidden_BD, head_VD, decoder.logit_cap)
        return record(dataclasses.replace(carry, caches=caches), draw_at(carry.t, logits_BV))

    for num_slots in sizes:
        carry = dataclasses.replace(carry, caches=[cache.widened(num_slots) for cache in carry.caches])
        end = min(num_slots + 1, T)
        carry = jax.lax.while_loop(lambda c, end=end: (c.t < end) & ~c.is_done_B.all(), step, carry)
    by_group = jax.tree.map(lambda x: x.reshape(P, G, *x.shape[1:]), (carry.drawn, carry.mask_BT, carry.is_done_B))
    drawn, mask_PGT, is_done_PG = by_group
    return Rollout(
        prompts=prompts,
        tokens_PGT=drawn.token_B,
        mask_PGT=mask_PGT,
        sampler_logp_PGT=drawn.logp_B,
        entropy_PGT=drawn.entropy_B,
        support_PGT=drawn.support_B if spec.sampling.is_cut else None,
        is_truncated_PG=~is_done_PG,
    )
