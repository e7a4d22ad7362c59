"""The loops that draw tokens until every completion has ended.

`decode_batched` decodes all completions side by side. `decode_continuous` has a few rows, and each takes the next completion
as soon as its own has ended. Token t of completion b is drawn with fold_in(its key, t) in both, so they draw the same tokens.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Bool, Float, Int, Key, UInt

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.attention import Prefix
from grpo_jax.models.block import Kept
from grpo_jax.models.experts import choices_of
from grpo_jax.models.flash import single
from grpo_jax.models.flash.tpu import LANES
from grpo_jax.models.linear import head_logits
from grpo_jax.models.tiles import Tiles
from grpo_jax.models.transformer import Decoder
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import largest_in_step, vary_like
from grpo_jax.rollout.sampling import Draw, Sampling, draw
from grpo_jax.rollout.stops import StopStrings


class EndTokens(NamedTuple):
    """Ends of a completion. stop_ids: the first of them ends it, and is kept. pad_id: fills the slots behind.

    stop_strings: the token that completes one of them ends it too, and is kept; None: there are none.
    """

    stop_ids: tuple[int, ...]
    pad_id: int
    stop_strings: StopStrings | None = None


MIN_SLOTS_TO_GROW = 64  # a cache of no more slots is not worth a second loop
MIN_SLOTS_OF_QUARTERS = 512
REFILL_FRACTION = 8  # rows are refilled when 1 in 8 has ended, since every refill copies the prompts of all rows


@flax.struct.dataclass
class Completions:
    """B completions of up to T tokens; pad_id and zeros where no token has been drawn.

    drawn: a Draw whose arrays are [B, T]. mask_BT: float32, 1 on drawn tokens. is_done_B: ended by a stop.
    experts_BTX: as `Rollout.experts_PGTX`.
    """

    drawn: Draw
    mask_BT: Float[jax.Array, "B T"]
    is_done_B: Bool[jax.Array, " B"]
    experts_BTX: UInt[jax.Array, "B T X"] | None = None

    @classmethod
    def blank(cls, num_rows: int, num_tokens: int, pad_id: int, arch: Architecture) -> Completions:
        """Make room for tokens, none drawn yet.

        Args:
          num_rows: B. num_tokens: T.
          pad_id: the token of every empty slot. arch: says if there are experts.
        Returns: Completions with an empty mask.
        """
        shape = (num_rows, num_tokens)
        drawn = Draw(jnp.full(shape, pad_id, jnp.int32), jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape, jnp.int32))
        experts_BTX = None
        if arch.num_experts:
            no_choice = jnp.zeros((*shape, arch.num_layers * arch.experts_per_token), jnp.int32)
            experts_BTX = choices_of([no_choice], arch.num_experts)
        return cls(drawn, jnp.zeros(shape), jnp.zeros(num_rows, bool), experts_BTX)


@flax.struct.dataclass
class Memory:
    """The text of a loop's rows, as far as later tokens depend on it.

    seen_BV: tokens that occurred in prompt and completion; None without a repetition penalty. stop_state_B: int32, of the stop
    strings' automaton; None without one.
    """

    seen_BV: Bool[jax.Array, "B V"] | None
    stop_state_B: Int[jax.Array, " B"] | None


@dataclasses.dataclass(frozen=True)
class DecodeContext:
    """Everything that stays the same while B = P * G completions of P encoded prompts are decoded.

    layers: the weights of each layer, unstacked. first_logits_PV: float32, of the token after each prompt. keys_B: a random
    key of each completion. seen_PV: tokens of each prompt; None without a repetition penalty.
    """

    decoder: Decoder
    layers: list[nnx.State]
    head_VD: Float[jax.Array, "V D"]
    prefix: Prefix
    first_logits_PV: Float[jax.Array, "P V"]
    keys_B: Key[jax.Array, " B"]
    sampling: Sampling
    ends: EndTokens
    max_completion_tokens: int
    seen_PV: Bool[jax.Array, "P V"] | None = None

    @property
    def group_size(self) -> int:
        """Completions of each prompt, G."""
        return len(self.keys_B) // len(self.first_logits_PV)

    def draw(
        self,
        logits_BV: Float[jax.Array, "B V"],
        keys_B: Key[jax.Array, " B"],
        t: int | Int[jax.Array, " *B"],
        memory: Memory,
    ) -> tuple[Draw, Memory, Bool[jax.Array, " B"]]:
        """Draw token t of each row.

        Args:
          logits_BV: of that token. keys_B: the key of each row's completion.
          t: the token's number in its completion, one for all rows or one for each. memory: of the tokens before it.
        Returns: (a Draw, [B]; the memory with it; which tokens end their completion).
        """
        t_B = jnp.broadcast_to(t, keys_B.shape)
        keys_B = jax.vmap(jax.random.fold_in)(keys_B, t_B)
        hardware = self.decoder.hardware if self.decoder.has_kernels else None
        new = draw(logits_BV, keys_B, self.sampling, t_B, memory.seen_BV, self.decoder.tiles, hardware)
        seen_BV, state_B = memory.seen_BV, memory.stop_state_B
        is_stop_B = _is_among(new.token_B, self.ends.stop_ids)
        if seen_BV is not None:
            seen_BV = seen_BV.at[jnp.arange(len(seen_BV)), new.token_B].set(True)
        if state_B is not None and self.ends.stop_strings is not None:
            state_B = self.ends.stop_strings.advance(state_B, new.token_B)
            is_stop_B |= state_B == self.ends.stop_strings.end
        return new, Memory(seen_BV, state_B), is_stop_B

    def first_memory(self, prompt_B: Int[jax.Array, " B"]) -> Memory:
        """Return the memory of rows that have nothing but their prompt. prompt_B: its number."""
        seen_BV = state_B = None
        if self.seen_PV is not None:
            seen_BV = self.seen_PV[prompt_B]
        if self.ends.stop_strings is not None:
            state_B = jnp.zeros_like(prompt_B)
        return Memory(seen_BV, state_B)

    def next_logits(
        self, caches: list[Kept], last_B: Int[jax.Array, " B"], slot: Int[jax.Array, " *B"], prefix: Prefix
    ) -> tuple[Float[jax.Array, "B V"], list[Kept], UInt[jax.Array, "B X"] | None]:
        """Compute the logits of the token after `last_B`.

        Args:
          caches: what each layer keeps of earlier tokens. last_B: the last token of each row, which `slot` of the caches takes.
          slot: one for all rows, or one for each. prefix: the rows' prompts.
        Returns: (float32 logits [B, V], the caches with `slot` filled, the experts of `last_B` or None).
        """
        hidden_BD, caches, chosen_BX = self.decoder.decode_step(self.layers, caches, last_B, slot, prefix)
        return head_logits(hidden_BD, self.head_VD, self.decoder.logit_cap, self.decoder.tiles), caches, chosen_BX

    def blank(self) -> Completions:
        """Make the completions before anything is drawn."""
        return Completions.blank(len(self.keys_B), self.max_completion_tokens, self.ends.pad_id, self.decoder.arch)


def _is_among(token_B: Int[jax.Array, " B"], ids: tuple[int, ...]) -> Bool[jax.Array, " B"]:
    """Mark the tokens that are one of the ids."""
    # jax 0.11's compiler ends the process on an array without elements that goes into `shard_map`.
    if not ids:
        return jnp.zeros_like(token_B, bool)
    return (token_B[:, None] == jnp.asarray(ids, jnp.int32)[None]).any(-1)


# -------------------------------------------------------------------------------------------------------- side by side


@flax.struct.dataclass
class _BatchedState:
    """The loop's state. t: int32, the columns of `done` before it are filled. caches: one for each layer."""

    t: Int[jax.Array, ""]
    done: Completions
    caches: list[Kept]
    memory: Memory


def cache_sizes(
    max_completion_tokens: int, tiles: Tiles | None = None, hardware: Hardware | None = None, *, by_kernel: bool = False
) -> tuple[int, ...]:
    """List the slots of the caches, one number for each loop of a rollout: half of them first, then all.

    Args:
      max_completion_tokens: T. tiles: of exact numbers, whose blocks of keys are whole; None: there are none.
      hardware: accelerators, for which a long cache grows by quarters; None: CPUs.
      by_kernel: single queries are attended to by a kernel (`Decoder.decodes_by_kernel`).
    """
    num_slots = max(max_completion_tokens - 1, 1)  # the last token is never read
    if by_kernel:
        return (single.round_slots(hardware, num_slots),)  # which reads no empty block
    if tiles is not None:
        return (tiles.round_keys(num_slots),)  # blocks of keys that are empty are not read anyway
    if num_slots <= MIN_SLOTS_TO_GROW:
        return (num_slots,)
    # Attention reads an empty slot like a filled one, so the first half of the steps gets caches of half the slots. Each size
    # is one more loop to compile, with every layer in it: two, not more.
    if hardware is None or num_slots < MIN_SLOTS_OF_QUARTERS:
        return -(-num_slots // 2), num_slots
    # There attention is a larger part of a token than a compilation is of a run, and slots come in tiles of 128.
    return tuple(-(-num_slots * i // (4 * LANES)) * LANES for i in (1, 2, 3, 4))


def _go_on(is_wanted: Bool[jax.Array, ""]) -> Bool[jax.Array, ""]:
    """Say if a loop goes on: where experts are sharded, as long as one of the devices that have them wants to.

    Its tokens need the experts of the others. What these draw for rows that have ended is not written.
    """
    return largest_in_step(is_wanted, ("expert",))


def decode_batched(ctx: DecodeContext) -> Completions:
    """Decode all completions side by side, each in a row of its own, until the longest has ended."""
    B, T = len(ctx.keys_B), ctx.max_completion_tokens
    sizes = cache_sizes(T, ctx.decoder.tiles, ctx.decoder.hardware, by_kernel=ctx.decoder.decodes_by_kernel)
    # `lengths_P` differs between devices, and so will all that is drawn: under `shard_map` the first carry, made of constants,
    # must have that type already, or the loop's carry would change its type on the way.
    memory = ctx.first_memory(jnp.arange(B) // ctx.group_size)
    caches = ctx.decoder.empty_caches(B, sizes[0])
    carry = vary_like(_BatchedState(jnp.int32(0), ctx.blank(), caches, memory), ctx.prefix.lengths_P)
    carry = _draw_column(ctx, carry, jnp.repeat(ctx.first_logits_PV, ctx.group_size, axis=0))
    for num_slots in sizes:
        carry = dataclasses.replace(carry, caches=[cache.pad_to(num_slots) for cache in carry.caches])
        end = min(num_slots + 1, T)  # a cache holds all tokens but the one that was drawn last
        carry = jax.lax.while_loop(
            lambda c, end=end: _go_on((c.t < end) & ~c.done.is_done_B.all()), lambda c: _step_batched(ctx, c), carry
        )
    return carry.done


def _step_batched(ctx: DecodeContext, carry: _BatchedState) -> _BatchedState:
    """Draw one more token in every row."""
    last_B = jax.lax.dynamic_index_in_dim(carry.done.drawn.token_B, carry.t - 1, axis=1, keepdims=False)
    logits_BV, caches, chosen_BX = ctx.next_logits(carry.caches, last_B, carry.t - 1, ctx.prefix)
    done = carry.done
    if chosen_BX is not None and done.experts_BTX is not None:
        chosen_BX = jnp.where(done.is_done_B[:, None], 0, chosen_BX)  # a row that has ended is read on for nothing
        done = dataclasses.replace(done, experts_BTX=done.experts_BTX.at[:, carry.t - 1].set(chosen_BX))
    return _draw_column(ctx, dataclasses.replace(carry, caches=caches, done=done), logits_BV)


def _draw_column(ctx: DecodeContext, carry: _BatchedState, logits_BV: Float[jax.Array, "B V"]) -> _BatchedState:
    """Draw column t of the completions; rows that ended before it stay blank."""
    new, memory, is_stop_B = ctx.draw(logits_BV, ctx.keys_B, carry.t, carry.memory)
    done = carry.done
    # Rows that have ended are decoded on, for shapes are static. What is drawn for them is replaced before it is written, so
    # that slots behind a stop token hold pad_id and zeros. The stop token itself is still live: it is trained on.
    live_B = ~done.is_done_B
    column = jax.tree.map(lambda x, b: jnp.where(live_B, x, b), new, Draw._make((ctx.ends.pad_id, 0.0, 0.0, 0)))
    done = dataclasses.replace(
        done,
        drawn=jax.tree.map(lambda old_BT, x_B: old_BT.at[:, carry.t].set(x_B), done.drawn, column),
        mask_BT=done.mask_BT.at[:, carry.t].set(live_B.astype(jnp.float32)),
        is_done_B=done.is_done_B | is_stop_B,
    )
    return dataclasses.replace(carry, t=carry.t + 1, done=done, memory=memory)


# ------------------------------------------------------------------------------------------------- one after the other


@flax.struct.dataclass
class _ContinuousState:
    """The loops' state, of W rows.

    next_completion: the first one that waits. completion_W: the one that a row decodes, B where none is left. t_W: tokens
    that it has. last_W: the last of them. is_free_W: it has ended. caches: one for each layer.
    """

    next_completion: Int[jax.Array, ""]
    completion_W: Int[jax.Array, " W"]
    t_W: Int[jax.Array, " W"]
    last_W: Int[jax.Array, " W"]
    is_free_W: Bool[jax.Array, " W"]
    done: Completions
    caches: list[Kept]
    memory: Memory


class _RowInputs(NamedTuple):
    """Inputs of W rows, from one refill to the next: each row has its own copy of its prompt, its first logits and its key."""

    prefix: Prefix
    first_logits_WV: Float[jax.Array, "W V"]
    keys_W: Key[jax.Array, " W"]


def decode_continuous(ctx: DecodeContext, num_rows: int) -> Completions:
    """Decode num_rows completions at a time. A row that ends takes the next that waits: a long one delays its own row only.

    Caches are num_rows rows instead of B. Rows of one prompt begin at different times and are no longer neighbours: each has a
    copy of its prompt's keys and values, made anew when rows are refilled. num_rows must be less than B.
    """
    B = len(ctx.keys_B)
    zeros_W = jnp.zeros(num_rows, jnp.int32)
    by_kernel = ctx.decoder.decodes_by_kernel
    hardware = ctx.decoder.hardware if by_kernel else None  # caches do not grow
    num_slots = cache_sizes(ctx.max_completion_tokens, ctx.decoder.tiles, hardware, by_kernel=by_kernel)[-1]
    carry = _ContinuousState(
        next_completion=jnp.int32(0),
        completion_W=zeros_W,
        t_W=zeros_W,
        last_W=zeros_W,
        is_free_W=jnp.ones(num_rows, bool),  # so that the first refill gives every row its first completion
        done=ctx.blank(),
        caches=ctx.decoder.empty_caches(num_rows, num_slots),
        memory=ctx.first_memory(zeros_W),
    )
    carry = vary_like(carry, ctx.prefix.lengths_P)
    return jax.lax.while_loop(
        lambda c: _go_on((c.next_completion < B) | ~c.is_free_W.all()), lambda c: _decode_until_refill(ctx, c), carry
    ).done


def _decode_until_refill(ctx: DecodeContext, carry: _ContinuousState) -> _ContinuousState:
    """Refill, and decode until it is worth refilling again, or to the end if nothing waits."""
    B, W = len(ctx.keys_B), len(carry.t_W)
    carry = _refill(ctx, carry)
    inputs = _gather_row_inputs(ctx, carry.completion_W)
    # A refill copies prompts and a free row draws for nothing: waiting until a few rows are free keeps both small.
    most_free = jnp.where(carry.next_completion < B, -(-W // REFILL_FRACTION), W)
    return jax.lax.while_loop(
        lambda c: _go_on(c.is_free_W.sum() < most_free), lambda c: _step_continuous(ctx, inputs, c), carry
    )


def _refill(ctx: DecodeContext, carry: _ContinuousState) -> _ContinuousState:
    """Give free rows the completions that wait, in their order."""
    B, is_free_W = len(ctx.keys_B), carry.is_free_W
    rank_W = jnp.cumsum(is_free_W) - 1
    completion_W = jnp.where(is_free_W, jnp.minimum(carry.next_completion + rank_W, B), carry.completion_W)
    first = ctx.first_memory(jnp.minimum(completion_W, B - 1) // ctx.group_size)

    def if_free(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(is_free_W, tuple(range(1, new.ndim))), new, old)

    # The caches need no clearing: a row that begins again at slot 0 sees no slot beyond the one it has just written, and a
    # state that is kept instead of slots begins as its prompt's.
    return dataclasses.replace(
        carry,
        next_completion=jnp.minimum(carry.next_completion + is_free_W.sum(), B),
        completion_W=completion_W,
        t_W=jnp.where(is_free_W, 0, carry.t_W),
        is_free_W=completion_W == B,
        memory=jax.tree.map(if_free, first, carry.memory),
    )


def _gather_row_inputs(ctx: DecodeContext, completion_W: Int[jax.Array, " W"]) -> _RowInputs:
    """Copy to each row what its completion's prompt has."""
    completion_W = jnp.minimum(completion_W, len(ctx.keys_B) - 1)  # a row without one needs some index; it writes nothing
    prompt_W = completion_W // ctx.group_size
    prefix = jax.tree.map(lambda x: x[prompt_W], dataclasses.replace(ctx.prefix, cache=None))
    # These caches have the layers before the prompts.
    prefix = dataclasses.replace(prefix, cache=jax.tree.map(lambda x: x[:, prompt_W], ctx.prefix.cache))
    return _RowInputs(prefix, ctx.first_logits_PV[prompt_W], ctx.keys_B[completion_W])


def _step_continuous(ctx: DecodeContext, inputs: _RowInputs, carry: _ContinuousState) -> _ContinuousState:
    """Draw one more token in every row that is not free."""
    B = len(ctx.keys_B)
    # A row's first token comes of its prompt's logits. What the decoder computes for it in that step, from the last token of
    # the completion before, is not used, and slot 0 is written again in the next step, before anything reads it.
    slot_W = jnp.maximum(carry.t_W - 1, 0)
    logits_WV, caches, chosen_WX = ctx.next_logits(carry.caches, carry.last_W, slot_W, inputs.prefix)
    logits_WV = jnp.where(carry.t_W[:, None] == 0, inputs.first_logits_WV, logits_WV)
    new, memory, is_stop_W = ctx.draw(logits_WV, inputs.keys_W, carry.t_W, carry.memory)
    # Row B does not exist and mode="drop" leaves its writes out: no spare row, and no select over [B, T] at every token.
    to_W = jnp.where(carry.is_free_W, B, carry.completion_W)
    done = carry.done
    if chosen_WX is not None and done.experts_BTX is not None:
        # Of a row that has begun only: before, the token that was read was another completion's.
        read_W = jnp.where(carry.t_W > 0, to_W, B)
        done = dataclasses.replace(done, experts_BTX=done.experts_BTX.at[read_W, slot_W].set(chosen_WX, mode="drop"))
    done = dataclasses.replace(
        done,
        drawn=jax.tree.map(lambda old_BT, x_W: old_BT.at[to_W, carry.t_W].set(x_W, mode="drop"), done.drawn, new),
        mask_BT=done.mask_BT.at[to_W, carry.t_W].set(1.0, mode="drop"),
        is_done_B=done.is_done_B.at[to_W].set(is_stop_W, mode="drop"),
    )
    t_W = carry.t_W + ~carry.is_free_W
    is_free_W = carry.is_free_W | is_stop_W | (t_W == ctx.max_completion_tokens)
    return _ContinuousState(carry.next_completion, carry.completion_W, t_W, new.token_B, is_free_W, done, caches, memory)
