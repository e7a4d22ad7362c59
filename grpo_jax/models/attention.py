"""Attention over a row's own keys and its prompt's: what a query sees, rotary positions, one softmax over both."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.models.architecture import Architecture, Rope

MASK_VALUE = -1e30  # a masked attention score: finite, so that a row with nothing to attend to stays finite
BLOCK_QUERIES = 128  # of a row, whose scores exist at a time
MAX_BLOCKS = 16  # then they grow: each is compiled


@flax.struct.dataclass
class KVCache:
    """Keys (rotated) k [L, B, K, H, U] and values v [L, B, K, U, H] of all layers (or one layer's slice, without L).

    These are the layouts of a product's right factor: others would be copied at every token.
    """

    k: Any
    v: Any

    @classmethod
    def of(cls, k_BUKH, v_BUKH) -> KVCache:
        """One layer's, from what its projections give."""
        return cls(k_BUKH.transpose(0, 2, 3, 1), v_BUKH.transpose(0, 2, 1, 3))

    @classmethod
    def empty(cls, num_rows: int, num_slots: int, arch: Architecture, dtype: Any) -> KVCache:
        """One layer's, to be written slot by slot."""
        B, U, K, H = num_rows, num_slots, arch.num_kv_heads, arch.head_dim
        return cls(jnp.zeros((B, K, H, U), dtype), jnp.zeros((B, K, U, H), dtype))

    def update(self, new: KVCache, slot: Any) -> KVCache:
        """One layer's, with `new` from `slot` on; slots [B] take one token a row, each its own."""
        if jnp.ndim(slot):
            rows = jnp.arange(len(slot))
            return KVCache(self.k.at[rows, :, :, slot].set(new.k[..., 0]), self.v.at[rows, :, slot].set(new.v[:, :, 0]))
        return KVCache(
            jax.lax.dynamic_update_slice(self.k, new.k, (0, 0, 0, slot)),
            jax.lax.dynamic_update_slice(self.v, new.v, (0, 0, slot, 0)),
        )

    def pad_to(self, num_slots: int) -> KVCache:
        """One layer's, with empty slots behind its own."""
        more = (0, num_slots - self.num_slots)
        return KVCache(jnp.pad(self.k, ((0, 0),) * 3 + (more,)), jnp.pad(self.v, ((0, 0),) * 2 + (more, (0, 0))))

    @property
    def num_slots(self) -> int:
        """U."""
        return self.k.shape[-1]


@flax.struct.dataclass
class Prefix:
    """A left-padded prompt as its completions see it: cache over [P, S], mask_PS (True on tokens), lengths_P in tokens."""

    cache: Any
    mask_PS: Any
    lengths_P: Any

    @classmethod
    def of(cls, cache: KVCache | None, mask_PS) -> Prefix:
        """cache: None: it is handed on layer by layer."""
        return cls(cache, mask_PS.astype(bool), mask_PS.astype(jnp.int32).sum(-1))


@flax.struct.dataclass
class AttentionView:
    """What a layer's queries see. rope: tables of their positions. mask_BTU: their row's keys. mask_PGTS: their prompt's.

    The masks may have axes of size 1; mask_PGTS is None without a prompt.
    """

    rope: Any
    mask_BTU: Any
    mask_PGTS: Any


def make_views(
    arch: Architecture, positions_BT, key_positions_BU, mask_BTU, prefix: Prefix | None
) -> tuple[AttentionView, AttentionView]:
    """What global layers see, and what local ones see; twice the same object if all layers are of one kind.

    Args:
      positions_BT, key_positions_BU: of the queries and of their row's keys, counted in tokens from the prompt's first.
      mask_BTU: bool, causal and without padding, broadcastable over B.
    """
    mask_PGTS = None if prefix is None else prefix.mask_PS[:, None, None]
    global_view = AttentionView(rope_tables(positions_BT, arch.rope, arch.head_dim), mask_BTU, mask_PGTS)
    if not arch.local_layers:
        return global_view, global_view
    window = arch.sliding_window
    local_BTU = mask_BTU & (positions_BT[:, :, None] - key_positions_BU[:, None, :] < window)
    if prefix is not None:
        P, S = prefix.mask_PS.shape
        key_positions_PS = jnp.arange(S)[None] - (S - prefix.lengths_P[:, None])  # below 0 on padding, which is masked
        positions_PGT = positions_BT.reshape(P, -1, positions_BT.shape[1])
        mask_PGTS = mask_PGTS & (positions_PGT[..., None] - key_positions_PS[:, None, None] < window)
    rope = global_view.rope if arch.local_rope is None else rope_tables(positions_BT, arch.local_rope, arch.head_dim)
    local_view = AttentionView(rope, local_BTU, mask_PGTS)
    return (local_view, local_view) if len(arch.local_layers) == arch.num_layers else (global_view, local_view)


def select_view(views: tuple[AttentionView, AttentionView], is_local) -> AttentionView:
    """The view of a layer that only the compiled program knows: is_local is a traced bool, or None for layers of one kind."""
    if is_local is None:
        return views[0]
    return jax.tree.map(lambda all_, near: all_ if all_ is near else jnp.where(is_local, near, all_), *views)


def attend(q_BTNH, own: KVCache, view: AttentionView, prefix: KVCache | None, scale: float):
    """Softmax attention over a row's own keys and its prompt's keys, as one softmax over both.

    A long row's queries go block by block: a block leaves out the keys behind it, and its scores are computed again in the
    backward pass, so that memory grows with T and not with its square (Rabe and Staats, arXiv 2112.05682).

    Args:
      q_BTNH: queries; one, or causal ones, T of them over as many own keys. scale: of the scores.
      own: one layer's, N a multiple of its K.
      prefix: one layer's, of the prompts; rows p*G .. p*G+G-1 see prompt p. The two score blocks share their maximum and
        their sum, so nothing is concatenated and no prompt is repeated.
    """
    T = q_BTNH.shape[1]
    size = max(BLOCK_QUERIES, -(-T // MAX_BLOCKS))
    if size >= T:
        return _attend(scale, q_BTNH, own, view, prefix)
    block = jax.checkpoint(functools.partial(_attend, scale))
    pieces = []
    for start in range(0, T, size):
        end = min(start + size, T)
        seen = KVCache(own.k[..., :end], own.v[:, :, :end])
        pieces.append(block(q_BTNH[:, start:end], seen, _view_of(view, start, end), prefix))
    return jnp.concatenate(pieces, 1)


def _view_of(view: AttentionView, start: int, end: int) -> AttentionView:
    """What the queries start .. end - 1 see, of their row's first `end` keys."""
    mask_PGTS = view.mask_PGTS
    if mask_PGTS is not None and mask_PGTS.shape[2] > 1:
        mask_PGTS = mask_PGTS[:, :, start:end]
    return AttentionView(None, view.mask_BTU[:, start:end, :end], mask_PGTS)


def _attend(scale: float, q_BTNH, own: KVCache, view: AttentionView, prefix: KVCache | None):
    """All queries at once."""
    B, T, N, H = q_BTNH.shape
    K, R = own.k.shape[1], N // own.k.shape[1]
    P, G = (1, B) if prefix is None else (len(prefix.k), B // len(prefix.k))
    q_BTKRH = q_BTNH.reshape(B, T, K, R, H) * jnp.asarray(scale, q_BTNH.dtype)
    f32 = {"preferred_element_type": jnp.float32}
    own_BKTRU = jnp.einsum("btkrh,bkhu->bktru", q_BTKRH, own.k, **f32)
    own_BKTRU = jnp.where(view.mask_BTU[:, None, :, None], own_BKTRU, MASK_VALUE)
    top_BKTR = own_BKTRU.max(-1)
    if prefix is None:
        pre_PKGTRS = None
    else:
        pre_PKGTRS = jnp.einsum("pgtkrh,pkhs->pkgtrs", q_BTKRH.reshape(P, G, T, K, R, H), prefix.k, **f32)
        pre_PKGTRS = jnp.where(view.mask_PGTS[:, None, :, :, None], pre_PKGTRS, MASK_VALUE)
        top_BKTR = jnp.maximum(top_BKTR, _by_row(pre_PKGTRS.max(-1)))
    top_BKTR = jax.lax.stop_gradient(top_BKTR)
    p_BKTRU = jnp.exp(own_BKTRU - top_BKTR[..., None])
    total_BKTR = p_BKTRU.sum(-1)
    out_BKTRH = jnp.einsum("bktru,bkuh->bktrh", p_BKTRU.astype(own.v.dtype), own.v, **f32)
    if prefix is not None and pre_PKGTRS is not None:
        p_PKGTRS = jnp.exp(pre_PKGTRS - _by_prompt(top_BKTR, P)[..., None])
        total_BKTR += _by_row(p_PKGTRS.sum(-1))
        out_BKTRH += _by_row(jnp.einsum("pkgtrs,pksh->pkgtrh", p_PKGTRS.astype(prefix.v.dtype), prefix.v, **f32))
    out_BKTRH = (out_BKTRH / total_BKTR[..., None]).astype(q_BTNH.dtype)
    return out_BKTRH.transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)


def _by_row(x_PKG):
    """[P, K, G, ...] -> [P*G, K, ...]."""
    return jnp.swapaxes(x_PKG, 1, 2).reshape(-1, x_PKG.shape[1], *x_PKG.shape[3:])


def _by_prompt(x_BK, num_prompts: int):
    """[P*G, K, ...] -> [P, K, G, ...]."""
    return jnp.swapaxes(x_BK.reshape(num_prompts, -1, *x_BK.shape[1:]), 1, 2)


def rope_tables(positions_BT, rope: Rope, head_dim: int):
    """float32 (cos, sin) of each position and channel pair, each [B, T, 1, H/2]."""
    inverse = _scale_frequencies(rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim), rope)
    angles = positions_BT.astype(jnp.float32)[..., None] * inverse[None, None]
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def _scale_frequencies(inverse, rope: Rope):
    """The angles a token turns by, slowed down as `rope` says."""
    if rope.factor == 1:
        return inverse
    if rope.llama3 is None:
        return inverse / rope.factor
    low, high, context = rope.llama3
    kept = jnp.clip((inverse * context / (2 * math.pi) - low) / (high - low), 0, 1)  # 1: turns often enough to stay
    return inverse * (kept + (1 - kept) / rope.factor)


def rotate(x_BTNH, rope):
    """Apply RoPE in the half-split layout (channel i pairs with channel i + H/2)."""
    cos, sin = (table.astype(x_BTNH.dtype) for table in rope)
    left, right = jnp.split(x_BTNH, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)
