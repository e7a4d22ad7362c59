"""Attention over a row's own keys and its prompt's: what a query sees, rotary positions, one softmax over both."""

from __future__ import annotations

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.models.architecture import Architecture, Rope

NEVER = -1e30  # a masked attention score: finite, so that a row with nothing to attend to stays finite


@flax.struct.dataclass
class KVCache:
    """Keys (rotated) k [L, B, K, U, H] and values v [L, B, K, H, U] of all layers (or one layer's slice, without L).

    These are the layouts in which a matrix product reads them: others would be copied at every token.
    """

    k: Any
    v: Any

    @classmethod
    def of(cls, k_BUKH, v_BUKH) -> KVCache:
        """One layer's, from what its projections give."""
        return cls(k_BUKH.transpose(0, 2, 1, 3), v_BUKH.transpose(0, 2, 3, 1))

    @classmethod
    def empty(cls, num_rows: int, num_slots: int, arch: Architecture, dtype: Any) -> KVCache:
        """One layer's, to be written slot by slot."""
        B, U, K, H = num_rows, num_slots, arch.num_kv_heads, arch.head_dim
        return cls(jnp.zeros((B, K, U, H), dtype), jnp.zeros((B, K, H, U), dtype))

    def written(self, new: KVCache, slot: Any) -> KVCache:
        """One layer's, with `new` from `slot` on."""
        return KVCache(
            jax.lax.dynamic_update_slice(self.k, new.k, (0, 0, slot, 0)),
            jax.lax.dynamic_update_slice(self.v, new.v, (0, 0, 0, slot)),
        )

    @property
    def num_slots(self) -> int:
        """U."""
        return self.k.shape[-2]


@flax.struct.dataclass
class Prefix:
    """A left-padded prompt as its completions see it: cache over [P, S], mask_PS (True on tokens), lengths_P in tokens."""

    cache: KVCache
    mask_PS: Any
    lengths_P: Any


@flax.struct.dataclass
class View:
    """What a layer's queries see. rope: tables of their positions. mask_BTU: their row's keys. mask_PGTS: their prompt's.

    The masks may have axes of size 1; mask_PGTS is None without a prompt.
    """

    rope: Any
    mask_BTU: Any
    mask_PGTS: Any


def make_views(arch: Architecture, positions_BT, key_positions_BU, mask_BTU, prefix: Prefix | None) -> tuple[View, View]:
    """What global layers see, and what local ones see; twice the same object if all layers are of one kind.

    Args:
      positions_BT, key_positions_BU: of the queries and of their row's keys, counted in tokens from the prompt's first.
      mask_BTU: bool, causal and without padding, broadcastable over B.
    """
    mask_PGTS = None if prefix is None else prefix.mask_PS[:, None, None]
    everything = View(rope_tables(positions_BT, arch.rope, arch.head_dim), mask_BTU, mask_PGTS)
    if not arch.local_layers:
        return everything, everything
    window = arch.sliding_window
    nearby_BTU = mask_BTU & (positions_BT[:, :, None] - key_positions_BU[:, None, :] < window)
    if prefix is not None:
        P, S = prefix.mask_PS.shape
        key_positions_PS = jnp.arange(S)[None] - (S - prefix.lengths_P[:, None])  # below 0 on padding, which is masked
        positions_PGT = positions_BT.reshape(P, -1, positions_BT.shape[1])
        mask_PGTS = mask_PGTS & (positions_PGT[..., None] - key_positions_PS[:, None, None] < window)
    rope = everything.rope if arch.local_rope is None else rope_tables(positions_BT, arch.local_rope, arch.head_dim)
    nearby = View(rope, nearby_BTU, mask_PGTS)
    return (nearby, nearby) if len(arch.local_layers) == arch.num_layers else (everything, nearby)


def choose(views: tuple[View, View], is_local) -> View:
    """The view of a layer that only the compiled program knows: is_local is a traced bool, or None for layers of one kind."""
    if is_local is None:
        return views[0]
    return jax.tree.map(lambda all_, near: all_ if all_ is near else jnp.where(is_local, near, all_), *views)


def attend(q_BTNH, own: KVCache, view: View, prefix: KVCache | None, scale: float):
    """Softmax attention over a row's own keys and its prompt's keys, as one softmax over both.

    Args:
      q_BTNH: queries. own: one layer's, N a multiple of its K. scale: of the scores.
      prefix: one layer's, of the prompts; rows p*G .. p*G+G-1 see prompt p. The two score blocks share their maximum and
        their sum, so nothing is concatenated and no prompt is repeated.
    """
    B, T, N, H = q_BTNH.shape
    K = own.k.shape[1]
    q_BTKRH = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(scale, q_BTNH.dtype)
    f32 = {"preferred_element_type": jnp.float32}
    own_BKRTU = jnp.einsum("btkrh,bkuh->bkrtu", q_BTKRH, own.k, **f32)
    own_BKRTU = jnp.where(view.mask_BTU[:, None, None], own_BKRTU, NEVER)
    top = own_BKRTU.max(-1, keepdims=True)
    if prefix is None:
        p_BKRTU = jnp.exp(own_BKRTU - jax.lax.stop_gradient(top))
        total = p_BKRTU.sum(-1)
        out = jnp.einsum("bkrtu,bkhu->btkrh", p_BKRTU.astype(own.v.dtype), own.v, **f32)
    else:
        P = len(prefix.k)
        q_PGTKRH = q_BTKRH.reshape(P, B // P, *q_BTKRH.shape[1:])
        pre_PGKRTS = jnp.einsum("pgtkrh,pksh->pgkrts", q_PGTKRH, prefix.k, **f32)
        pre_PGKRTS = jnp.where(view.mask_PGTS[:, :, None, None], pre_PGKRTS, NEVER)
        top = jax.lax.stop_gradient(jnp.maximum(top, pre_PGKRTS.max(-1, keepdims=True).reshape(top.shape)))
        p_BKRTU = jnp.exp(own_BKRTU - top)
        p_PGKRTS = jnp.exp(pre_PGKRTS - top.reshape(*pre_PGKRTS.shape[:-1], 1))
        total = p_BKRTU.sum(-1) + p_PGKRTS.sum(-1).reshape(p_BKRTU.shape[:-1])
        out = jnp.einsum("bkrtu,bkhu->btkrh", p_BKRTU.astype(own.v.dtype), own.v, **f32)
        out_prefix = jnp.einsum("pgkrts,pkhs->pgtkrh", p_PGKRTS.astype(own.v.dtype), prefix.v, **f32)
        out = out + out_prefix.reshape(out.shape)
    out = out / total.transpose(0, 3, 1, 2)[..., None]
    return out.reshape(B, T, N, H).astype(q_BTNH.dtype)


def rope_tables(positions_BT, rope: Rope, head_dim: int):
    """float32 (cos, sin) of each position and channel pair, each [B, T, 1, H/2]."""
    inverse = _scaled(rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim), rope)
    angles = positions_BT.astype(jnp.float32)[..., None] * inverse[None, None]
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def _scaled(inverse, rope: Rope):
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
