"""A layer whose numbers depend on a row alone: `model.numerics = "exact"`.

What each row does by itself runs in tiles of rows (`tiles.in_tiles`), attention in tiles of a row's queries over blocks of keys
that are added up in one order. Decoding fills a tile of queries with one; a block that no query sees changes no bit.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from grpo_jax.models import attention
from grpo_jax.models.attention import MASK_VALUE, AttentionView, KVCache
from grpo_jax.models.flash import SAVED_NAME
from grpo_jax.models.linear import soft_cap
from grpo_jax.models.tiles import SCOPE, Tiles, in_tiles
from grpo_jax.parallel.sharding import vary_like


def run_rows(module_method: str, tiles: Tiles, module: nnx.Module, dtype: Any, *rows: Any) -> Any:
    """Call a method of a module on rows, in tiles.

    Args:
      module_method: its name. tiles: of the model. module: its weights are cast to dtype. dtype: the compute dtype.
      rows: trees of floats [B, T, ...], the method's arguments; None stays None.
    Returns: what the method gives, [B, T, ...].
    """
    graphdef, weights = nnx.split(module)
    # As a rollout casts all of them once: a norm's float32 weight would make the learner's policy another one.
    weights = jax.tree.map(lambda x: x.astype(dtype), weights)
    lead = jax.tree.leaves(rows)[0].shape[:2]

    def method(weights: Any, rows: Any) -> Any:
        return getattr(nnx.merge(graphdef, weights), module_method)(*rows)

    # An axis of one token stays, for the method knows rows [B, T, ...].
    flat = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape[2:])).reshape(-1, 1, *x.shape[2:]), rows)
    return jax.tree.map(lambda x: x.reshape(*lead, *x.shape[2:]), in_tiles(method, tiles.rows, weights, flat))


def run_block(
    tiles: Tiles | None,
    block: Any,
    x_BTD: Float[Array, "B T D"],
    view: AttentionView,
    prefix: Any = None,
    cache: Any = None,
    slot: int | Int[Array, "..."] = 0,
) -> tuple[Float[Array, "B T D"], Any, Int[Array, "B T k"] | None]:
    """Run a layer.

    Args: as `block.Block.__call__` has them, which is called if tiles is None; else slots of cache and prefix are whole
      blocks of keys.
    Returns: what it does.
    """
    if tiles is None:
        return block(x_BTD, view, prefix, cache, slot)
    dtype, arch = x_BTD.dtype, block.attn.arch
    q_BTNH, k_BTKH, v_BTKH, gate_BTNH = run_rows("enter", tiles, block, dtype, x_BTD, view.rope, view.query_scale)
    own = KVCache.of(k_BTKH, v_BTKH)
    if cache is not None:
        own = cache.update(own, slot)
    # Named like a kernel's results: a layer that is computed again in the backward pass need not run the tiles again.
    q_BTNH, own = jax.tree.map(lambda x: checkpoint_name(x, SAVED_NAME), (q_BTNH, own))
    out_BTNH = _attend(tiles, arch.attention_scale, arch.score_cap, (q_BTNH, own, prefix), view)
    out_BTNH = checkpoint_name(out_BTNH, SAVED_NAME)
    x_BTD, _ = run_rows("leave", tiles, block, dtype, x_BTD, out_BTNH, gate_BTNH)
    return x_BTD, own, None


def run_norm(tiles: Tiles | None, norm: Any, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
    """Return norm(x), in tiles unless they are None."""
    if tiles is None:
        return norm(x)
    return run_rows("__call__", tiles, norm, x.dtype, x.reshape(-1, 1, x.shape[-1])).reshape(x.shape)


def pad_prompts(
    tiles: Tiles | None, tokens_PS: Int[Array, "P S"], mask_PS: Shaped[Array, "P S"]
) -> tuple[Int[Array, "P Z"], Shaped[Array, "P Z"]]:
    """Return prompts padded on the left to whole blocks of keys, which a batch of another width has too; None: as they are."""
    if tiles is None:
        return tokens_PS, mask_PS
    S = tokens_PS.shape[1]
    widths = ((0, 0), (tiles.round_keys(S) - S, 0))
    return jnp.pad(tokens_PS, widths), jnp.pad(mask_PS, widths)


# ------------------------------------------------------------------------------------------------------------- attention


@flax.struct.dataclass
class _Sums:
    """Sums over the keys seen so far: their largest score, of exp(score - top) and of that times the values."""

    top_BKM: jax.Array
    total_BKM: jax.Array
    out_BKMH: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attend(tiles: Tiles, scale: float, cap: float | None, arrays: Any, view: AttentionView) -> Float[Array, "B T N H"]:
    q_BTNH, own, prefix = arrays
    (B, T, N, H), K, Q = q_BTNH.shape, own.k.shape[1], tiles.queries
    own = own.pad_to(tiles.round_keys(own.num_slots))
    num_tiles = -(-T // Q)

    def split(x: Array, axis: int) -> Array:
        """Cut an axis of T into tiles, which come first; of an axis of size 1 all tiles see the same."""
        if x.shape[axis] == 1 and T > 1:
            return jnp.broadcast_to(x[None], (num_tiles, *x.shape))
        widths = [(0, 0)] * x.ndim
        widths[axis] = (0, num_tiles * Q - T)
        padded = jnp.pad(x, widths)
        return jnp.moveaxis(padded.reshape(*x.shape[:axis], num_tiles, Q, *x.shape[axis + 1 :]), axis, 0)

    q_nBQKRH = split(q_BTNH, 1).reshape(num_tiles, B, Q, K, N // K, H)
    q_nBKMH = q_nBQKRH.transpose(0, 1, 3, 2, 4, 5).reshape(num_tiles, B, K, -1, H)
    mask_BTU = jnp.pad(view.mask_BTU, ((0, 0), (0, 0), (0, own.num_slots - view.mask_BTU.shape[-1])))
    mask_PGTS = None
    if prefix is not None and view.mask_PGTS is not None:
        mask_PGTS = split(view.mask_PGTS, 2)

    def tile(given: Any) -> Array:
        q_BKMH, mask_BQU, mask_PGQS = given
        blocks = functools.partial(_add_blocks, tiles, cap, q_BKMH * jnp.asarray(scale, q_BKMH.dtype))
        zeros_BKM = jnp.zeros(q_BKMH.shape[:-1])
        sums = _Sums(jnp.full_like(zeros_BKM, MASK_VALUE), zeros_BKM, jnp.zeros(q_BKMH.shape))
        sums = vary_like(sums, mask_BQU.astype(jnp.int32))
        if prefix is not None:
            P = len(prefix.k)
            mask_BQS = jnp.broadcast_to(mask_PGQS, (P, B // P, *mask_PGQS.shape[2:])).reshape(B, *mask_PGQS.shape[2:])
            sums = blocks(prefix, mask_BQS, sums)
        sums = blocks(own, mask_BQU, sums)
        # Queries of padding may have seen no block at all: finite, as 0 times NaN would be NaN in the rows that mask them.
        total_BKM = jnp.maximum(sums.total_BKM, jnp.finfo(jnp.float32).tiny)
        return (sums.out_BKMH / total_BKM[..., None]).astype(q_BKMH.dtype)

    out_nBKMH = jax.lax.map(tile, (q_nBKMH, split(mask_BTU, 1), mask_PGTS))
    out_nBKQRH = out_nBKMH.reshape(num_tiles, B, K, Q, N // K, H)
    return out_nBKQRH.transpose(1, 0, 3, 2, 4, 5).reshape(B, num_tiles * Q, N, H)[:, :T]


def _add_blocks(
    tiles: Tiles, cap: float | None, q_BKMH: Array, keys: KVCache, mask_BQU: Bool[Array, "#B #Q U"], sums: _Sums
) -> _Sums:
    """Add what the queries see of keys and values [B, ...], or [P, ...] of their prompts, block by block."""
    B, num_queries, size = len(q_BKMH), tiles.queries, tiles.keys
    # Blocks that no query of any row sees would change nothing, in front and behind.
    is_seen_n = mask_BQU.any((0, 1)).reshape(-1, size).any(1)
    places_n = jnp.arange(len(is_seen_n))
    first, end = jnp.where(is_seen_n, places_n, len(is_seen_n)).min(), jnp.where(is_seen_n, places_n + 1, 0).max()

    def add(i: Array, sums: _Sums) -> _Sums:
        block = KVCache(
            jax.lax.dynamic_slice_in_dim(keys.k, i * size, size, axis=3),
            jax.lax.dynamic_slice_in_dim(keys.v, i * size, size, axis=2),
        )
        block = jax.tree.map(lambda x: jnp.repeat(x, B // len(x), axis=0), block)
        mask_BQC = jax.lax.dynamic_slice_in_dim(mask_BQU, i * size, size, axis=2)
        mask_BQC = jnp.broadcast_to(mask_BQC, (B, num_queries, size))
        given = jax.lax.optimization_barrier((q_BKMH, block, mask_BQC, sums))
        with jax.named_scope(SCOPE):
            return jax.lax.optimization_barrier(_add_block(cap, *given))

    return jax.lax.fori_loop(first, end, add, sums)


def _add_block(cap: float | None, q_BKMH: Array, block: KVCache, mask_BQC: Array, sums: _Sums) -> _Sums:
    """Add one block of keys, in the way of Milakov and Gimelshein (arXiv 1805.02867)."""
    f32 = {"preferred_element_type": jnp.float32}
    score_BKMC = soft_cap(jnp.einsum("bkmh,bkhc->bkmc", q_BKMH, block.k, **f32), cap)
    mask_BMC = jnp.repeat(mask_BQC, q_BKMH.shape[2] // mask_BQC.shape[1], axis=1)  # queries, each with its R heads
    score_BKMC = jnp.where(mask_BMC[:, None], score_BKMC, MASK_VALUE)
    top_BKM = jnp.maximum(sums.top_BKM, score_BKMC.max(-1))
    # 1 where the top stays: a block that is masked in full leaves the sums as they are. 0 at the first key that is seen.
    kept_BKM = jnp.exp(sums.top_BKM - top_BKM)
    p_BKMC = jnp.exp(score_BKMC - top_BKM[..., None])
    out_BKMH = jnp.einsum("bkmc,bkch->bkmh", p_BKMC.astype(block.v.dtype), block.v, **f32)
    return _Sums(top_BKM, sums.total_BKM * kept_BKM + p_BKMC.sum(-1), sums.out_BKMH * kept_BKM[..., None] + out_BKMH)


def _forward(tiles: Tiles, scale: float, cap: float | None, arrays: Any, view: AttentionView) -> tuple[Array, Any]:
    return _attend(tiles, scale, cap, arrays, view), (arrays, view)


def _backward(tiles: Tiles, scale: float, cap: float | None, given: Any, d_out_BTNH: Array) -> tuple[Any, None]:
    del tiles
    (q_BTNH, own, prefix), view = given

    def attend(q_BTNH: Array, own: KVCache, prefix: KVCache | None) -> Array:
        return attention.attend(q_BTNH, own, view, prefix, scale, cap)

    return jax.vjp(attend, q_BTNH, own, prefix)[1](d_out_BTNH), None


_attend.defvjp(_forward, _backward)
