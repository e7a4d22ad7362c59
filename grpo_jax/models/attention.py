"""Attention over a row's own keys and its prompt's: what a query sees, rotary positions, one softmax over both."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from grpo_jax.models import flash, ring
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.linear import Linear, joined, soft_cap, split_outputs
from grpo_jax.models.lora import LoRA, adapter_of
from grpo_jax.models.norms import norm_if
from grpo_jax.models.ring import NO_WINDOW, Ring
from grpo_jax.models.rope import RopeTables, query_scale, rope_tables, rotate

# A masked attention score. Finite, so that a row with nothing to attend to stays finite: with -inf its maximum would be -inf,
# and exp(-inf - -inf) is NaN, in the gradient even where the output is masked.
MASK_VALUE = -1e30
BLOCK_QUERIES = 128  # of a row, whose scores exist at a time
MAX_BLOCKS = 16  # beyond it blocks grow: each is compiled


@flax.struct.dataclass
class KVCache:
    """Keys (rotated) k [L, B, K, H, U] and values v [L, B, K, U, H] of all layers (or one layer's slice, without L).

    These are the layouts of a product's right factor: others would be copied at every token.
    """

    k: jax.Array
    v: jax.Array

    @classmethod
    def of(cls, k_BUKH: Float[Array, "B U K H"], v_BUKH: Float[Array, "B U K H"]) -> KVCache:
        """Return one layer's, from what its projections give."""
        return cls(k_BUKH.transpose(0, 2, 3, 1), v_BUKH.transpose(0, 2, 1, 3))

    @classmethod
    def empty(cls, num_rows: int, num_slots: int, arch: Architecture, dtype: Any) -> KVCache:
        """Return one layer's, to be written slot by slot.

        Args:
          num_rows: B. num_slots: U, tokens that fit in a row. arch: gives K and H. dtype: the compute dtype.
        """
        B, U, K, H = num_rows, num_slots, arch.num_kv_heads, arch.head_dim
        return cls(jnp.zeros((B, K, H, U), dtype), jnp.zeros((B, K, U, H), dtype))

    def update(self, new: KVCache, slot: int | Int[Array, "..."]) -> KVCache:
        """Return one layer's, with `new` from `slot` on; slots [B] take one token a row, each its own."""
        # A scatter only where rows are at slots of their own: a slice at one slot for all is written in place.
        if jnp.ndim(slot):
            rows = jnp.arange(len(self.k))
            return KVCache(self.k.at[rows, :, :, slot].set(new.k[..., 0]), self.v.at[rows, :, slot].set(new.v[:, :, 0]))
        return KVCache(
            jax.lax.dynamic_update_slice(self.k, new.k, (0, 0, 0, slot)),
            jax.lax.dynamic_update_slice(self.v, new.v, (0, 0, slot, 0)),
        )

    def pad_to(self, num_slots: int) -> KVCache:
        """Return one layer's, with empty slots behind its own."""
        more = (0, num_slots - self.num_slots)
        return KVCache(jnp.pad(self.k, ((0, 0),) * 3 + (more,)), jnp.pad(self.v, ((0, 0),) * 2 + (more, (0, 0))))

    @property
    def num_slots(self) -> int:
        """The size U, in tokens."""
        return self.k.shape[-1]


@flax.struct.dataclass
class Prefix:
    """A left-padded prompt as its completions see it.

    cache: what the layers keep of the prompts (KVCache over [P, S], or DeltaState), one for each place in the period of their
    kinds, each of L / period layers; or None where it is handed on layer by layer. mask_PS: bool, True on tokens.
    lengths_P: int32, in tokens.
    Where prompts are in parts, each of another width, keys, values and masks are tuples with an entry for each part.
    layers: the same as cache, layer by layer, for kernels that decode; else None.
    """

    cache: Any
    mask_PS: Any
    lengths_P: jax.Array
    layers: Any = None

    @classmethod
    def of(cls, cache: Any, mask_PS: Shaped[Array, "P S"]) -> Prefix:
        """Return the prefix of prompts with this mask (True or not 0 on tokens)."""
        return cls(cache, mask_PS.astype(bool), mask_PS.astype(jnp.int32).sum(-1))

    @classmethod
    def join(cls, parts: Sequence[Prefix]) -> Prefix:
        """Return one prefix of the prompts of all parts, one part's rows behind the other's."""

        def join(of_parts: tuple[Any, ...]) -> Any:
            if isinstance(of_parts[0], KVCache):
                return of_parts
            return jax.tree.map(lambda *x: jnp.concatenate(x, 1), *of_parts)  # states, without an axis of slots: [L, P, ...]

        cache = tuple(map(join, zip(*(each.cache for each in parts), strict=True)))
        masks: Any = tuple(each.mask_PS for each in parts)
        return cls(cache, masks, jnp.concatenate([each.lengths_P for each in parts]))

    def of_masks(self, function: Callable[[Any, slice], Any]) -> Any:
        """Return function(mask_PS, the places of its rows among the prompts): an array, or a tuple with one for each part."""
        if not isinstance(self.mask_PS, tuple):
            return function(self.mask_PS, slice(0, len(self.mask_PS)))
        ends = list(itertools.accumulate(map(len, self.mask_PS)))
        rows = map(slice, (0, *ends), ends)
        return tuple(function(*each) for each in zip(self.mask_PS, rows, strict=True))


@flax.struct.dataclass
class AttentionView:
    """A layer's queries: their positions, and the keys that they see.

    rope: RopeTables of their positions, None where they are rotated already. mask_BTU: bool, the keys of their row that they
    see. mask_PGTS: bool, those of their prompt, None without a prompt; a tuple where prompts are in parts (`Prefix`). The masks
    may have axes of size 1.
    rows: the same in a kernel's terms, where accelerators have one; else None.
    query_scale: factor of the queries by their positions [B, T, 1, 1], None: 1.
    mask_BT: bool, True on the rows' tokens, False on padding; None: there is none. Layers without attention read this alone.
    ring: where the rows' tokens are spread over devices, what these queries see, in place of the masks; else None.
    newest: of single queries, where a kernel decodes, the same in its terms; else None.
    """

    rope: Any
    mask_BTU: jax.Array
    mask_PGTS: Any
    rows: flash.CausalRows | None = None
    query_scale: jax.Array | None = None
    mask_BT: jax.Array | None = None
    ring: Ring | None = None
    newest: flash.NewestTokens | None = None


def make_views(
    arch: Architecture,
    positions_BT: Int[Array, "B T"],
    key_positions_BU: Int[Array, "#B U"],
    mask_BTU: Bool[Array, "#B T U"],
    prefix: Prefix | None,
    rows: flash.CausalRows | None = None,
    mask_BT: Bool[Array, "B T"] | None = None,
    ring: Ring | None = None,
) -> tuple[AttentionView, AttentionView]:
    """Return what global layers see, and what local ones see; twice the same object if all layers are of one kind.

    Args:
      arch: says which layers are local, and their window in tokens.
      positions_BT, key_positions_BU: of the queries and of their row's keys, counted in tokens from the prompt's first.
      mask_BTU: bool, causal and without padding, broadcastable over B. prefix: of the rows' prompts, or None.
      rows: the same for a kernel, or None. mask_BT: of the rows' tokens, None: all are.
      ring: of rows whose tokens are spread over devices, without its window, or None.
    Returns: (view of global layers, view of local layers).
    """
    # Made once for all layers, outside the scan over them: masks and rotary tables depend on no weights.
    mask_PGTS = None
    if prefix is not None:
        mask_PGTS = prefix.of_masks(lambda mask_PS, _: mask_PS[:, None, None])
    scale_BT11 = query_scale(positions_BT, arch.query_growth)
    tables = rope_tables(positions_BT, arch.rope, arch.head_dim)
    global_view = AttentionView(tables, mask_BTU, mask_PGTS, rows, scale_BT11, mask_BT, ring)
    if not arch.local_layers:
        return global_view, global_view
    window, local_BTU = arch.sliding_window, mask_BTU
    if window is not None:
        local_BTU = mask_BTU & (positions_BT[:, :, None] - key_positions_BU[:, None, :] < window)
    if window is not None and prefix is not None:
        positions_PGT = positions_BT.reshape(len(prefix.lengths_P), -1, positions_BT.shape[1])

        def near(mask_PS: Bool[Array, "P S"], rows: slice) -> Bool[Array, "P G T S"]:
            S = mask_PS.shape[1]
            key_positions_PS = jnp.arange(S)[None] - (S - prefix.lengths_P[rows, None])  # below 0 on padding, which is masked
            return mask_PS[:, None, None] & (positions_PGT[rows, ..., None] - key_positions_PS[:, None, None] < window)

        mask_PGTS = prefix.of_masks(near)
    rope = global_view.rope
    if arch.local_rope is not None:
        rope = rope_tables(positions_BT, arch.local_rope, arch.head_dim)
    near_ring = ring
    if ring is not None and window is not None:
        # A number in both, so that a layer of a kind that is data can choose one.
        near_ring = dataclasses.replace(ring, window=jnp.int32(window))
        global_view = dataclasses.replace(global_view, ring=dataclasses.replace(ring, window=jnp.int32(NO_WINDOW)))
    local_view = AttentionView(rope, local_BTU, mask_PGTS, rows, scale_BT11, mask_BT, near_ring)
    if len(arch.local_layers) == arch.num_layers:
        return local_view, local_view
    return global_view, local_view


def select_view(views: tuple[AttentionView, AttentionView], is_local: Bool[Array, ""] | None) -> AttentionView:
    """Return the view of a layer that only the compiled program knows: is_local is None where layers are of one kind."""
    if is_local is None:
        return views[0]
    # What both kinds share, often the rotary tables, is handed on and not selected.
    view = jax.tree.map(lambda all_, near: all_ if all_ is near else jnp.where(is_local, near, all_), *views)
    if view.rows is None:
        return view
    return dataclasses.replace(view, rows=dataclasses.replace(view.rows, is_local=is_local))


def attend(
    q_BTNH: Float[Array, "B T N H"],
    own: KVCache,
    view: AttentionView,
    prefix: KVCache | tuple[KVCache, ...] | None,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attend to a row's own keys and its prompt's keys, in one softmax over both.

    Args:
      q_BTNH: rotated queries; one, or causal ones, T of them over as many own keys. scale: of the scores.
      own: one layer's, N a multiple of its K. view: the masks of both kinds of keys.
      prefix: one layer's, of the prompts, or None; rows p*G .. p*G+G-1 see prompt p. A tuple of parts
        (`Prefix`) for single queries only.
      cap: scores become cap * tanh(scores / cap) before the mask; None: they stay as they are.
    Returns: the heads' outputs, in the dtype of the queries.
    """
    if view.ring is not None:
        assert isinstance(prefix, KVCache), "completions that are spread over devices continue prompts"
        q_BTNH = q_BTNH * jnp.asarray(scale, q_BTNH.dtype)
        of_row, of_prompt = ((each.k.swapaxes(2, 3), each.v) for each in (own, prefix))
        return ring.attend(q_BTNH, of_row, of_prompt, view.ring, cap)
    if flash.suits(view.rows, q_BTNH.shape[1], own.num_slots):
        assert view.rows is not None
        prompt = None
        if prefix is not None:
            assert isinstance(prefix, KVCache), "prompts in parts are for decoding"
            prompt = prefix.k.swapaxes(2, 3), prefix.v
        return flash.attend_causally(q_BTNH, (own.k.swapaxes(2, 3), own.v), prompt, view.rows, scale, cap)
    # A long row's queries go block by block: a block leaves out the keys behind it, and its scores are computed again in the
    # backward pass, so that memory grows with T and not with its square (Rabe and Staats, arXiv 2112.05682).
    T = q_BTNH.shape[1]
    size = max(BLOCK_QUERIES, -(-T // MAX_BLOCKS))
    if size >= T:
        return _attend(scale, cap, q_BTNH, own, view, prefix)
    assert not isinstance(prefix, tuple), "prompts in parts are for decoding"
    block = jax.checkpoint(functools.partial(_attend, scale, cap))
    outputs = []
    for start in range(0, T, size):
        end = min(start + size, T)
        seen = KVCache(own.k[..., :end], own.v[:, :, :end])
        outputs.append(block(q_BTNH[:, start:end], seen, _slice_view(view, start, end), prefix))
    return jnp.concatenate(outputs, 1)


def _slice_view(view: AttentionView, start: int, end: int) -> AttentionView:
    """Return what the queries start .. end - 1 see, of their row's first `end` keys."""
    mask_PGTS = view.mask_PGTS
    assert not isinstance(mask_PGTS, tuple), "prompts in parts are for decoding"
    if mask_PGTS is not None and mask_PGTS.shape[2] > 1:
        mask_PGTS = mask_PGTS[:, :, start:end]
    return AttentionView(None, view.mask_BTU[:, start:end, :end], mask_PGTS)


def _attend(
    scale: float,
    cap: float | None,
    q_BTNH: Float[Array, "B T N H"],
    own: KVCache,
    view: AttentionView,
    prefix: KVCache | tuple[KVCache, ...] | None,
) -> Float[Array, "B T N H"]:
    """Attend with all queries at once.

    The scores of own keys and of the prompt's keys are two arrays with one maximum and one sum between them: nothing is
    concatenated, and no prompt is repeated for its G completions.
    """
    B, T, N, H = q_BTNH.shape
    K, R = own.k.shape[1], N // own.k.shape[1]
    # The scale goes to the queries, which are fewer than the scores. Scores and sums are float32 whatever the compute dtype:
    # a sum of exponentials over thousands of keys has too few digits in bfloat16.
    q_BTKRH = q_BTNH.reshape(B, T, K, R, H) * jnp.asarray(scale, q_BTNH.dtype)
    f32 = {"preferred_element_type": jnp.float32}
    own_BKTRU = jnp.einsum("btkrh,bkhu->bktru", q_BTKRH, own.k, **f32)
    own_BKTRU = jnp.where(view.mask_BTU[:, None, :, None], soft_cap(own_BKTRU, cap), MASK_VALUE)
    top_BKTR = own_BKTRU.max(-1)
    parts, scores = [], []  # of prompts: rows, keys and values, mask; and scores_PKGTRS
    if prefix is not None and view.mask_PGTS is not None:
        parts = _parts_of_rows(prefix, view.mask_PGTS, B)
        for rows, prompts, mask_PGTS in parts:
            q_PGTKRH = q_BTKRH[rows].reshape(len(prompts.k), -1, T, K, R, H)
            pre_PKGTRS = jnp.einsum("pgtkrh,pkhs->pkgtrs", q_PGTKRH, prompts.k, **f32)
            scores.append(jnp.where(mask_PGTS[:, None, :, :, None], soft_cap(pre_PKGTRS, cap), MASK_VALUE))
        top_BKTR = jnp.maximum(top_BKTR, _by_row([each.max(-1) for each in scores]))
    # The maximum only keeps exp from overflowing; it cancels in the quotient, so no gradient flows through it.
    top_BKTR = jax.lax.stop_gradient(top_BKTR)
    p_BKTRU = jnp.exp(own_BKTRU - top_BKTR[..., None])
    total_BKTR = p_BKTRU.sum(-1)
    out_BKTRH = jnp.einsum("bktru,bkuh->bktrh", p_BKTRU.astype(own.v.dtype), own.v, **f32)
    totals, outs = [], []
    for (rows, prompts, _), pre_PKGTRS in zip(parts, scores, strict=True):
        p_PKGTRS = jnp.exp(pre_PKGTRS - _by_prompt(top_BKTR[rows], len(prompts.k))[..., None])
        totals.append(p_PKGTRS.sum(-1))
        outs.append(jnp.einsum("pkgtrs,pksh->pkgtrh", p_PKGTRS.astype(prompts.v.dtype), prompts.v, **f32))
    if parts:
        total_BKTR += _by_row(totals)
        out_BKTRH += _by_row(outs)
    # Divided last: H numbers a query instead of one for each key.
    out_BKTRH = (out_BKTRH / total_BKTR[..., None]).astype(q_BTNH.dtype)
    return out_BKTRH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _parts(prefix: KVCache | tuple[KVCache, ...] | None) -> list[tuple[Array, Array]]:
    """List keys and values of each part of the prompts, if there are prompts."""
    parts = prefix if isinstance(prefix, tuple) else () if prefix is None else (prefix,)
    return [(part.k, part.v) for part in parts]


def _parts_of_rows(
    prefix: KVCache | tuple[KVCache, ...], mask_PGTS: Any, num_rows: int
) -> list[tuple[slice, KVCache, Bool[Array, "P G T S"]]]:
    """List parts of prompts: (the rows that continue them, their keys and values, what the rows see of them)."""
    if isinstance(prefix, KVCache):
        return [(slice(0, num_rows), prefix, mask_PGTS)]
    group_size = num_rows // sum(len(prompts.k) for prompts in prefix)
    ends = list(itertools.accumulate(group_size * len(prompts.k) for prompts in prefix))
    return list(zip(map(slice, (0, *ends), ends), prefix, mask_PGTS, strict=True))


def _by_row(parts_PKG: Sequence[Array]) -> Array:
    """[P, K, G, ...] of each part -> [B, K, ...]."""
    rows = [jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], *x.shape[3:]) for x in parts_PKG]
    return rows[0] if len(rows) == 1 else jnp.concatenate(rows)


def _by_prompt(x_BK: Array, num_prompts: int) -> Array:
    """[P*G, K, ...] -> [P, K, G, ...]."""
    return jnp.swapaxes(x_BK.reshape(num_prompts, -1, *x_BK.shape[1:]), 1, 2)


def _scaled(q_BTNH: Float[Array, "B T N H"], query_scale: Float[Array, "B T 1 1"] | None) -> Float[Array, "B T N H"]:
    return q_BTNH if query_scale is None else q_BTNH * query_scale.astype(q_BTNH.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention over a row's own tokens and, where given, its prompt's prefix."""

    def __init__(self, arch: Architecture, *, lora: LoRA | None = None, rngs: nnx.Rngs):
        self.arch = arch
        adapter = functools.partial(adapter_of, lora)
        q_dim, kv_dim = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        # With an output gate a head's query and gate are one below the other.
        num_q = q_dim * (1 + arch.has_output_gate)
        self.q = Linear(arch.dim, num_q, use_bias=arch.qkv_bias, lora=adapter("q_proj"), rngs=rngs)
        self.k: Linear | None = Linear(arch.dim, kv_dim, use_bias=arch.qkv_bias, lora=adapter("k_proj"), rngs=rngs)
        self.v: Linear | None = Linear(arch.dim, kv_dim, use_bias=arch.qkv_bias, lora=adapter("v_proj"), rngs=rngs)
        self.num_shards = 1  # of a joined product
        closing: dict[str, Any] = {"use_bias": arch.o_bias, "scale": (2 * arch.num_layers) ** -0.5, "shards_inputs": True}
        self.o = Linear(q_dim, arch.dim, lora=adapter("o_proj"), **closing, rngs=rngs)
        spans = arch.qk_norm_spans_heads
        self.q_norm = norm_if(arch.qk_norm, q_dim if spans else arch.head_dim, arch)
        self.k_norm = norm_if(arch.qk_norm, kv_dim if spans else arch.head_dim, arch)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        view: AttentionView,
        prefix: KVCache | None,
        cache: KVCache | None,
        slot: int | Int[Array, "..."],
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attend to this call's keys, to those in the cache and to those of the prompt.

        Args:
          x_BTD: normed hidden states, in the compute dtype. view: positions and masks.
          prefix: the prompts' keys and values, [P, ...] of this layer, or None. Rows p*G .. p*G+G-1 see prompt p.
          cache: the rows' earlier keys and values, or None. slot: where this call's are written, one for all rows or [B].
        Returns: (output_BTD, this call's keys and values, or `cache` with them written from `slot` on).
        """
        q_BTNH, k_BTKH, v_BTKH, gate_BTNH = self.project(x_BTD, view.rope, view.query_scale)
        if cache is not None and view.newest is not None and view.newest.hardware.platform == "gpu":
            out_BTNH, own = self._attend_newest((q_BTNH, k_BTKH, v_BTKH), view.newest, prefix, cache)
            return self.close(out_BTNH, gate_BTNH), own
        own = KVCache.of(k_BTKH, v_BTKH)
        if cache is not None:
            own = cache.update(own, slot)
        scores, out_BNH = (self.arch.attention_scale, self.arch.score_cap), None
        if view.newest is not None:
            out_BNH = flash.attend_filled(q_BTNH[:, 0], (own.k, own.v), _parts(prefix), view.newest, *scores)
        out_BTNH = attend(q_BTNH, own, view, prefix, *scores) if out_BNH is None else out_BNH[:, None]
        return self.close(out_BTNH, gate_BTNH), own

    def _attend_newest(
        self,
        projected: tuple[Float[Array, "B 1 N H"], Float[Array, "B 1 K H"], Float[Array, "B 1 K H"]],
        rows: flash.NewestTokens,
        prefix: KVCache | tuple[KVCache, ...] | None,
        cache: KVCache,
    ) -> tuple[Float[Array, "B 1 N H"], KVCache]:
        q_BNH, k_BKH, v_BKH = (x[:, 0] for x in projected)
        scores = self.arch.attention_scale, self.arch.score_cap
        out_BNH, own = flash.attend_newest(q_BNH, (k_BKH, v_BKH), (cache.k, cache.v), _parts(prefix), rows, *scores)
        return out_BNH[:, None], KVCache(*own)

    def project(
        self, x_BTD: Float[Array, "B T D"], rope: RopeTables, query_scale: Float[Array, "B T 1 1"] | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"], Float[Array, "B T N H"] | None]:
        """Return queries, keys, values and gate (None: none) of normed hidden states; rope, query_scale: of their positions."""
        arch, heads = self.arch, (*x_BTD.shape[:2], -1, self.arch.head_dim)
        turn = functools.partial(rotate, tables=rope, is_interleaved=arch.rope.is_interleaved)
        gate_BTNH = None
        if self.k is None or self.v is None:  # `join`
            num_q, num_k = arch.num_heads * (1 + arch.has_output_gate), arch.num_kv_heads
            split = functools.partial(split_outputs, num_shards=self.num_shards)
            if not (arch.qk_norm or arch.has_output_gate):  # queries and keys are turned as one, too
                q_size, k_size = num_q * arch.head_dim, num_k * arch.head_dim
                both, v = split(self.q(x_BTD), (q_size + k_size, k_size))
                q, k = split(turn(both.reshape(heads)).reshape(both.shape), (q_size, k_size))
                return _scaled(q.reshape(heads), query_scale), k.reshape(heads), v.reshape(heads), None
            # Head by head: what is split by channels is another 17 % of a small decoder's rollout, by XLA:TPU's estimate.
            q_BTNH, k_BTKH, v_BTKH = split(self.q(x_BTD).reshape(heads), (num_q, num_k, num_k), axis=2)
        else:
            q_BTNH, k_BTKH, v_BTKH = (product(x_BTD).reshape(heads) for product in (self.q, self.k, self.v))
        if arch.has_output_gate:
            q_BTNH, gate_BTNH = jnp.split(q_BTNH.reshape(*heads[:-1], 2 * arch.head_dim), 2, -1)
        if arch.qk_norm_spans_heads:
            rows = (*heads[:-2], -1)
            q_BTNH, k_BTKH = self.q_norm(q_BTNH.reshape(rows)).reshape(heads), self.k_norm(k_BTKH.reshape(rows)).reshape(heads)
        else:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        # Keys are stored rotated: a key's position never changes, so a decode loop need not turn the cache at every token.
        return _scaled(turn(q_BTNH), query_scale), turn(k_BTKH), v_BTKH, gate_BTNH

    def join(self, num_shards: int) -> None:
        """Make one product of those of queries, keys and values, if none has an adapter. num_shards: as in `joined`."""
        products = [each for each in (self.q, self.k, self.v) if each is not None]
        if not any(each.lora for each in products):
            self.q, self.k, self.v, self.num_shards = joined(products, num_shards), None, None, num_shards

    def close(self, out_BTNH: Float[Array, "B T N H"], gate_BTNH: Float[Array, "B T N H"] | None) -> Float[Array, "B T D"]:
        """Return what the layer adds, of the heads' outputs and their gate, if the family has one."""
        if gate_BTNH is not None:
            out_BTNH = out_BTNH * jax.nn.sigmoid(gate_BTNH)
        return self.o(out_BTNH.reshape(*out_BTNH.shape[:2], -1))
