"""The loops that draw tokens until every completion has ended: all side by side, or few rows that take one after another.

Token t of completion b is drawn with fold_in(its key, t) in both, so they draw the same tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.models.attention import KVCache, Prefix
from grpo_jax.models.linear import head_logits
from grpo_jax.models.transformer import Decoder
from grpo_jax.parallel.sharding import vary_like
from grpo_jax.rollout.sampling import Draw, Sampling, draw

MIN_SLOTS_TO_GROW = 64  # so many slots of a cache are not worth a loop of their own
REFILL_FRACTION = 8  # rows are refilled when one of so many has ended: then each row's prompt is copied to it


@flax.struct.dataclass
class Completions:
    """What has been drawn, B rows of T slots: blank (pad_id, zeros) where nothing was. is_done_B: ended by a stop token."""

    drawn: Draw
    mask_BT: Any
    is_done_B: Any

    @classmethod
    def blank(cls, num_rows: int, num_tokens: int, pad_id: int) -> Completions:
        shape = (num_rows, num_tokens)
        drawn = Draw(jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))
        return cls(drawn, jnp.zeros(shape), jnp.zeros(num_rows, bool))


@dataclasses.dataclass(frozen=True)
class DecodeContext:
    """What both loops work on: B = P * G completions of P encoded prompts. layers: unstacked. keys_B: a key of each."""

    decoder: Decoder
    layers: list[Any]
    head_VD: Any
    prefix: Prefix
    first_logits_PV: Any
    keys_B: Any
    sampling: Sampling
    stop_ids: tuple[int, ...]
    pad_id: int
    max_completion_tokens: int

    def draw(self, logits_BV, keys_B, t) -> Draw:
        """Token t of each row (one t for all, or one each)."""
        t_B = jnp.broadcast_to(t, keys_B.shape)
        return draw(logits_BV, jax.vmap(jax.random.fold_in)(keys_B, t_B), self.sampling)

    def next_logits(self, caches: list[KVCache], last_B, slot, prefix: Prefix) -> tuple[Any, list[KVCache]]:
        """After the token `last_B`, which goes to `slot` of the caches (`Decoder.decode_step`)."""
        hidden_BD, caches = self.decoder.decode_step(self.layers, caches, last_B, slot, prefix)
        return head_logits(hidden_BD, self.head_VD, self.decoder.logit_cap), caches

    def ends(self, token_B):
        """bool: a stop token."""
        return (token_B[:, None] == jnp.asarray(self.stop_ids, jnp.int32)[None]).any(-1)

    def empty_caches(self, num_rows: int, num_slots: int) -> list[KVCache]:
        arch = self.decoder.arch
        return [KVCache.empty(num_rows, num_slots, arch, self.decoder.dtype)] * arch.num_layers

    def blank(self) -> Completions:
        return Completions.blank(len(self.keys_B), self.max_completion_tokens, self.pad_id)


# -------------------------------------------------------------------------------------------------------- side by side


@flax.struct.dataclass
class _BatchedState:
    """The loop's state: columns up to `t` are filled."""

    t: Any
    done: Completions
    caches: list[KVCache]


def cache_sizes(max_completion_tokens: int) -> tuple[int, ...]:
    """Slots of the caches as a rollout goes on: half of them first, for attention costs what there is, not what is filled."""
    num_slots = max(max_completion_tokens - 1, 1)  # the last token is never read
    return (num_slots,) if num_slots <= MIN_SLOTS_TO_GROW else (-(-num_slots // 2), num_slots)


def decode_batched(ctx: DecodeContext) -> Completions:
    """Every completion has a row of its own; the loop ends with the longest."""
    B, T = len(ctx.keys_B), ctx.max_completion_tokens
    G = B // len(ctx.first_logits_PV)

    def record(carry: _BatchedState, new: Draw) -> _BatchedState:
        """Write column t; rows that ended before it stay blank."""
        done = carry.done
        live_B = ~done.is_done_B
        column = jax.tree.map(lambda x, b: jnp.where(live_B, x, b), new, Draw(ctx.pad_id, 0.0, 0.0, 0))
        done = Completions(
            drawn=jax.tree.map(lambda old_BT, x_B: old_BT.at[:, carry.t].set(x_B), done.drawn, column),
            mask_BT=done.mask_BT.at[:, carry.t].set(live_B.astype(jnp.float32)),
            is_done_B=done.is_done_B | ctx.ends(column.token_B),
        )
        return dataclasses.replace(carry, t=carry.t + 1, done=done)

    def step(carry: _BatchedState) -> _BatchedState:
        last_B = jax.lax.dynamic_index_in_dim(carry.done.drawn.token_B, carry.t - 1, axis=1, keepdims=False)
        logits_BV, caches = ctx.next_logits(carry.caches, last_B, carry.t - 1, ctx.prefix)
        return record(dataclasses.replace(carry, caches=caches), ctx.draw(logits_BV, ctx.keys_B, carry.t))

    sizes = cache_sizes(T)
    carry = vary_like(_BatchedState(jnp.int32(0), ctx.blank(), ctx.empty_caches(B, sizes[0])), ctx.prefix.lengths_P)
    carry = record(carry, ctx.draw(jnp.repeat(ctx.first_logits_PV, G, axis=0), ctx.keys_B, 0))
    for num_slots in sizes:
        carry = dataclasses.replace(carry, caches=[cache.pad_to(num_slots) for cache in carry.caches])
        end = min(num_slots + 1, T)
        carry = jax.lax.while_loop(lambda c, end=end: (c.t < end) & ~c.done.is_done_B.all(), step, carry)
    return carry.done


# ------------------------------------------------------------------------------------------------- one after the other


@flax.struct.dataclass
class _ContinuousState:
    """The loops' state, of R rows. next: the first completion that waits. of_R: the completion that a row is at, B where none
    is left. t_R: tokens it has. last_R: the last of them. is_free_R: it has ended.
    """

    next: Any
    of_R: Any
    t_R: Any
    last_R: Any
    is_free_R: Any
    done: Completions
    caches: list[KVCache]


def decode_continuous(ctx: DecodeContext, num_rows: int) -> Completions:
    """R = num_rows completions at a time, R < B. Rows that end take the next that wait: a long one idles its own row only.

    Caches are R rows instead of B. Rows of one prompt begin at different times and no longer stand together: each has a copy
    of its prompt's keys and values, made anew when rows are refilled.
    """
    B, R, T = len(ctx.keys_B), num_rows, ctx.max_completion_tokens
    G = B // len(ctx.first_logits_PV)

    def refill(carry: _ContinuousState) -> _ContinuousState:
        """Free rows take what waits, in its order."""
        rank_R = jnp.cumsum(carry.is_free_R) - 1
        of_R = jnp.where(carry.is_free_R, jnp.minimum(carry.next + rank_R, B), carry.of_R)
        return dataclasses.replace(
            carry,
            next=jnp.minimum(carry.next + carry.is_free_R.sum(), B),
            of_R=of_R,
            t_R=jnp.where(carry.is_free_R, 0, carry.t_R),
            is_free_R=of_R == B,
        )

    def step(carry: _ContinuousState, prefix: Prefix, first_logits_RV, keys_R) -> _ContinuousState:
        """One token more in every row that is not free; a row's first comes of its prompt."""
        slot_R = jnp.maximum(carry.t_R - 1, 0)
        logits_RV, caches = ctx.next_logits(carry.caches, carry.last_R, slot_R, prefix)
        new = ctx.draw(jnp.where(carry.t_R[:, None] == 0, first_logits_RV, logits_RV), keys_R, carry.t_R)
        to_R = jnp.where(carry.is_free_R, B, carry.of_R)  # row B is none: it is dropped
        done, is_stop_R = carry.done, ctx.ends(new.token_B)
        done = Completions(
            drawn=jax.tree.map(lambda old_BT, x_R: old_BT.at[to_R, carry.t_R].set(x_R, mode="drop"), done.drawn, new),
            mask_BT=done.mask_BT.at[to_R, carry.t_R].set(1.0, mode="drop"),
            is_done_B=done.is_done_B.at[to_R].set(is_stop_R, mode="drop"),
        )
        t_R = carry.t_R + ~carry.is_free_R
        is_free_R = carry.is_free_R | is_stop_R | (t_R == T)
        return _ContinuousState(carry.next, carry.of_R, t_R, new.token_B, is_free_R, done, caches)

    def decode_until_refill(carry: _ContinuousState) -> _ContinuousState:
        """Refill, and decode until it is worth refilling again, or to the end if nothing waits."""
        carry = refill(carry)
        of_R = jnp.minimum(carry.of_R, B - 1)
        prompt_R = of_R // G
        prefix = jax.tree.map(lambda x: x[prompt_R], dataclasses.replace(ctx.prefix, cache=None))
        prefix = dataclasses.replace(prefix, cache=jax.tree.map(lambda x: x[:, prompt_R], ctx.prefix.cache))
        first_logits_RV, keys_R = ctx.first_logits_PV[prompt_R], ctx.keys_B[of_R]
        most_free = jnp.where(carry.next < B, -(-R // REFILL_FRACTION), R)
        return jax.lax.while_loop(
            lambda c: c.is_free_R.sum() < most_free, lambda c: step(c, prefix, first_logits_RV, keys_R), carry
        )

    zeros_R = jnp.zeros(R, jnp.int32)
    carry = _ContinuousState(
        next=jnp.int32(0),
        of_R=zeros_R,
        t_R=zeros_R,
        last_R=zeros_R,
        is_free_R=jnp.ones(R, bool),
        done=ctx.blank(),
        caches=ctx.empty_caches(R, cache_sizes(T)[-1]),
    )
    carry = vary_like(carry, ctx.prefix.lengths_P)
    return jax.lax.while_loop(lambda c: (c.next < B) | ~c.is_free_R.all(), decode_until_refill, carry).done
