"""Causal attention over a row's own keys and its prompt's without scores in memory, forward and backward: on TPUs.

Two calls of the flash-attention kernel that ships with JAX ("splash"): the G completions of a prompt, folded into one row of
queries, over the prompt's keys, and every row over its own. What they give is merged by the log-sum-exp of their scores, and
that is one softmax over both. `attention.attend` is the same in plain operations.

No cotangent flows through a merge: the kernel's own derivative drops that of its log-sum-exp, and gradients of queries and
keys come out wrong by half. Here one derivative covers both calls, and each part's backward kernel is given the output and
the log-sum-exp of the whole, as ring attention does from device to device (Liu et al., arXiv 2310.01889).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import vary_like

LANES = 128  # the unit of every length that a kernel sees
# Queries or keys at a time, and what a padded token costs in blocks of that size beside the largest one's: small blocks are
# loaded more often. An assumption: no chip was at hand to measure it.
BLOCKS = {512: 1.0, 384: 1.05, 256: 1.15, 128: 1.5}
MIN_QUERIES = 128  # fewer fill no block: plain operations are as good
MAX_PARTIAL_DQ = 4  # copies of the queries' gradient, one for each block of keys of the backward kernel
MAX_BACKWARD_KEYS = 4096  # in such a block: beyond it a core's own memory would not hold them
SAVED_NAME = "attention"  # of output and log-sum-exp: `fsdp.REMAT` keeps them where it keeps products


@flax.struct.dataclass
class CausalRows:
    """Rows that see themselves causally, and their prompt: what a kernel is told in place of masks.

    own_BT: int32, 1 on tokens. prompt_PS: int32, 1 on tokens of left-padded prompts; None without prompts. is_local: bool, the
    window holds; None: it does where there is one. window: tokens that a query sees, itself included; None: all before it.
    is_left_padded: padding stands before the tokens of own_BT, and must not be seen; behind them causality hides it.
    """

    own_BT: Any
    prompt_PS: Any
    is_local: Any
    window: int | None = flax.struct.field(pytree_node=False)
    is_left_padded: bool = flax.struct.field(pytree_node=False)
    hardware: Hardware = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Static:
    """What is compiled into a call. prompt_slots: S, before it was padded to blocks."""

    window: int | None
    is_left_padded: bool
    prompt_slots: int
    hardware: Hardware


KeysAndValues = tuple[Float[Array, "R K U H"], Float[Array, "R K U H"]]


def suits(rows: CausalRows | None, num_queries: int, num_keys: int) -> bool:
    """Return whether the kernel is the better form: on a TPU, for rows that fill a block of queries."""
    if rows is None or rows.hardware.platform != "tpu":
        return False
    return num_queries == num_keys >= MIN_QUERIES and rows.window != 1


def attend_causally(
    q_BTNH: Float[Array, "B T N H"], own: KeysAndValues, prompt: KeysAndValues | None, rows: CausalRows
) -> Float[Array, "B T N H"]:
    """Attend to a row's own keys and its prompt's keys, in one softmax over both.

    Args:
      q_BTNH: rotated and scaled queries. own: keys (rotated) and values [B, K, T, H] of the same tokens.
      prompt: those of the prompts, [P, K, S, H], or None; rows p*G .. p*G+G-1 see prompt p. rows: the padding and the window.
    Returns: the heads' outputs, in the dtype of the queries; undefined but finite on padding.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    width = _width(H)
    q_BNTH = _pad(q_BTNH.transpose(0, 2, 1, 3), padded_length(T), width)
    own = jax.tree.map(lambda x: _pad(x, padded_length(T), width), own)
    masks = rows.own_BT, rows.prompt_PS
    slots = 0
    if prompt is not None:
        slots = prompt[0].shape[2]
        prompt = jax.tree.map(lambda x: _pad(x, padded_length(slots), width), prompt)
    masks = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, padded_length(x.shape[1]) - x.shape[1]))), masks)
    static = Static(rows.window, rows.is_left_padded, slots, rows.hardware)
    out_BNTH = _attention(static, (q_BNTH, own, prompt), (*masks, rows.is_local))
    return out_BNTH[:, :, :T, :H].transpose(0, 2, 1, 3)


def block_of(num: int) -> int:
    """Return the size of a block of so many queries or keys: little padding, few blocks."""
    return min(BLOCKS, key=lambda block: -(-num // block) * block * BLOCKS[block])


def padded_length(num: int) -> int:
    """Return a length in tokens rounded up to whole blocks."""
    return -(-num // block_of(num)) * block_of(num)


def _width(head_dim: int) -> int:
    """Return the channels of a head as the kernel takes them: half a register's, or whole registers'."""
    if head_dim <= LANES // 2:
        return LANES // 2
    return -(-head_dim // LANES) * LANES


def _pad(x: Float[Array, "R M U H"], length: int, width: int) -> Float[Array, "R M Upad Hpad"]:
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, width - x.shape[3])))


# ------------------------------------------------------------------------------------------------ one derivative for both parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, arrays: Any, masks: Any) -> Float[Array, "B N T H"]:
    return _forward(static, arrays, masks)[0]


def _forward(static: Static, arrays: Any, masks: Any) -> tuple[Float[Array, "B N T H"], Any]:
    # Named, so that a layer that is computed again need not run the kernel again (`fsdp.REMAT`).
    out_BNTH, lse_BNT = (checkpoint_name(x, SAVED_NAME) for x in _on_devices(static, _merged, arrays, masks))
    return out_BNTH, (arrays, masks, out_BNTH, lse_BNT)


def _backward(static: Static, residuals: Any, d_out_BNTH: Float[Array, "B N T H"]) -> tuple[Any, None]:
    arrays, masks, out_BNTH, lse_BNT = residuals
    return _on_devices(static, _gradients, (arrays, out_BNTH, lse_BNT, d_out_BNTH), masks), None


_attention.defvjp(_forward, _backward)


def _on_devices(static: Static, function: Callable[..., Any], arrays: Any, masks: Any) -> Any:
    """Call function(static, arrays, masks) on each device's own heads.

    Args:
      static: of the call. function: what runs kernels; its results have heads as their second axis.
      arrays: heads are their second axis. masks: they have none.
    Returns: its results, which vary over the mesh axes that masks do.
    """
    call = functools.partial(function, static)
    mesh = jax.sharding.get_abstract_mesh()
    if static.hardware.interpret or (mesh.empty and static.hardware.mesh is None):
        return call(arrays, masks)
    # The compiler cannot shard a kernel along `tensor`, so that axis is made manual here. And the library says of no output of
    # its kernels over which axes it varies, which is an error wherever such types are checked: here they are not.
    where = {}
    if mesh.empty:
        mesh = static.hardware.mesh
        where = {"mesh": mesh}
    heads = PartitionSpec()
    if mesh.shape["tensor"] > 1:
        heads = PartitionSpec(None, "tensor")
    sharded = jax.shard_map(
        call, in_specs=(heads, PartitionSpec()), out_specs=heads, axis_names={"tensor"}, check_vma=False, **where
    )
    return vary_like(sharded(arrays, masks), masks[0])


def _merged(static: Static, arrays: Any, masks: Any) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T"]]:
    """Run both parts forward -> (outputs, float32 log-sum-exp of all scores)."""
    q_BNTH, own, prompt = arrays
    own_BT, prompt_PS, is_local = masks

    def run(window: int | None) -> tuple[Array, Array]:
        kernel = _own_kernel(static, q_BNTH.shape, window)
        out_BNTH, lse_BNT = _run_forward(kernel, q_BNTH, own, _own_segments(static, own_BT))
        if prompt is None:
            return out_BNTH, lse_BNT
        num_prompts, T = len(prompt_PS), q_BNTH.shape[2]
        q_PNXH = _fold(q_BNTH, num_prompts)
        kernel = _prompt_kernel(static, q_PNXH.shape, T, prompt_PS.shape[1], window)
        given = _run_forward(kernel, q_PNXH, prompt, _prompt_segments(q_PNXH, prompt_PS))
        seen_BNTH, seen_lse_BNT = (_unfold(x, T) for x in given)
        both_BNT = jnp.logaddexp(lse_BNT, seen_lse_BNT)
        out_BNTH = _share(out_BNTH, lse_BNT - both_BNT) + _share(seen_BNTH, seen_lse_BNT - both_BNT)
        return out_BNTH.astype(q_BNTH.dtype), both_BNT

    return _by_kind(static, is_local, run)


def _share(out_BNTH: Float[Array, "B N T H"], log_share_BNT: Float[Array, "B N T"]) -> Float[Array, "B N T H"]:
    """Weight one part's output. A block of queries that sees no key of it was never run: its output may be NaN."""
    share_BNT1 = jnp.exp(log_share_BNT)[..., None]
    return jnp.where(share_BNT1 > 0, out_BNTH.astype(jnp.float32) * share_BNT1, 0.0)


def _gradients(static: Static, arrays: Any, masks: Any) -> Any:
    """Run both parts backward, each with the whole's output and log-sum-exp -> gradients like (q, own, prompt)."""
    (q_BNTH, own, prompt), *whole = arrays  # whole: output, log-sum-exp, the output's cotangent
    own_BT, prompt_PS, is_local = masks

    def run(window: int | None) -> tuple[Array, Any, Any]:
        kernel = _own_kernel(static, q_BNTH.shape, window)
        dq_BNTH, *d_own = _run_backward(kernel, q_BNTH, own, _own_segments(static, own_BT), whole)
        if prompt is None:
            return dq_BNTH, tuple(d_own), None
        num_prompts, T = len(prompt_PS), q_BNTH.shape[2]
        q_PNXH = _fold(q_BNTH, num_prompts)
        kernel = _prompt_kernel(static, q_PNXH.shape, T, prompt_PS.shape[1], window)
        folded = [_fold(x, num_prompts) for x in whole]
        dq_PNXH, *d_prompt = _run_backward(kernel, q_PNXH, prompt, _prompt_segments(q_PNXH, prompt_PS), folded)
        return dq_BNTH + _unfold(dq_PNXH, T), tuple(d_own), tuple(d_prompt)

    return _by_kind(static, is_local, run)


def _by_kind(static: Static, is_local: Any, run: Callable[[int | None], Any]) -> Any:
    """Run with the window or without; where only the compiled program knows which, it chooses."""
    if is_local is None:
        return run(static.window)
    return jax.lax.cond(is_local, lambda: run(static.window), lambda: run(None))


def _fold(x: Float[Array, "B N T ..."], num_prompts: int) -> Float[Array, "P N GT ..."]:
    """Put a group's rows one behind the other."""
    x = jnp.swapaxes(x.reshape(num_prompts, -1, *x.shape[1:]), 1, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _unfold(x: Float[Array, "P N GT ..."], num_tokens: int) -> Float[Array, "B N T ..."]:
    x = jnp.swapaxes(x.reshape(*x.shape[:2], -1, num_tokens, *x.shape[3:]), 1, 2)
    return x.reshape(-1, *x.shape[2:])


# --------------------------------------------------------------------------------------------------------------- the kernels


def _library() -> tuple[Any, Any]:
    # Imported where it is used: on a CPU nothing needs it, and it takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    return splash_attention_kernel, splash_attention_mask


def _own_kernel(static: Static, shape: tuple[int, ...], window: int | None) -> Any:
    """Return the kernel of rows that see themselves. shape: of their queries."""
    _, masks = _library()
    _, num_heads, T, _ = shape
    mask = masks.CausalMask((T, T))
    if window is not None and window < T:
        mask = masks.LocalMask((T, T), (window - 1, 0), 0)
    return _make_kernel(static, mask, num_heads)


def _prompt_kernel(static: Static, shape: tuple[int, ...], num_tokens: int, num_slots: int, window: int | None) -> Any:
    """Return the kernel of rows that see their prompt.

    Args:
      static: of the call. shape: of the folded queries. num_tokens: T of each row in them. num_slots: the prompts', padded.
      window: in tokens, or None.
    """
    _, masks = _library()
    _, num_heads, num_queries, _ = shape
    mask = masks.FullMask((num_queries, num_slots))
    if window is not None:
        # Token t stands S + t - s slots behind the prompt's slot s, however much of the prompt is padding on the left.
        mask = masks.LocalMask((num_queries, num_slots), (window - 1, None), static.prompt_slots)
        mask.q_sequence = np.tile(np.arange(num_tokens, dtype=np.int32), num_queries // num_tokens)
    return _make_kernel(static, mask, num_heads)


def _make_kernel(static: Static, mask: Any, num_heads: int) -> Any:
    kernels, masks = _library()
    queries, keys = (block_of(size) for size in mask.shape)
    num_keys = mask.shape[1]
    # Backward in one kernel where its partial sums of the queries' gradient, one for each block of keys, are few.
    largest = keys
    while num_keys > largest * MAX_PARTIAL_DQ and num_keys % (2 * largest) == 0 and largest < MAX_BACKWARD_KEYS:
        largest *= 2
    sizes = {"block_q": queries, "block_kv": keys, "block_q_dkv": queries, "block_kv_dkv_compute": keys}
    if num_keys <= largest * MAX_PARTIAL_DQ:
        sizes |= {"block_kv_dkv": largest, "use_fused_bwd_kernel": True}
    else:
        sizes |= {"block_kv_dkv": keys, "block_q_dq": queries, "block_kv_dq": keys}
    return kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * num_heads),
        block_sizes=kernels.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        interpret=static.hardware.interpret,
    )


def _own_segments(static: Static, own_BT: Array) -> Any:
    """Tell tokens from padding, where it stands before them."""
    if not static.is_left_padded:
        return None
    kernels, _ = _library()
    return kernels.SegmentIds(q=own_BT, kv=own_BT)


def _prompt_segments(q_PNXH: Array, prompt_PS: Array) -> Any:
    """Hide the prompts' padding from all queries."""
    kernels, _ = _library()
    return kernels.SegmentIds(q=jnp.ones((len(prompt_PS), q_PNXH.shape[2]), jnp.int32), kv=prompt_PS)


def _run_forward(kernel: Any, q: Array, keys_and_values: KeysAndValues, segments: Any) -> tuple[Array, Array]:
    """Run a kernel on many rows -> (output, log-sum-exp)."""

    def run(q: Array, k: Array, v: Array, segments: Any) -> tuple[Array, Array]:
        out, (lse,) = kernel(q, k, v, segments)
        return out, lse

    return jax.vmap(run)(q, *keys_and_values, segments)


def _run_backward(kernel: Any, q: Array, keys_and_values: KeysAndValues, segments: Any, whole: Any) -> tuple[Array, ...]:
    """Run a kernel's derivative on many rows.

    Args:
      kernel: as it ran forward. q, keys_and_values, segments: what it was given.
      whole: output and log-sum-exp over all parts, and the cotangent of that output.
    Returns: the gradients of q, keys and values.
    """
    kernels, _ = _library()
    made = kernel.kwargs

    def run(q: Array, k: Array, v: Array, segments: Any, out: Array, lse: Array, d_out: Array) -> tuple[Array, ...]:
        saved = (q, k, v, segments, None, out, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        # Private to the library, and the only way to hand it another output and log-sum-exp than it computed.
        grads = kernels._splash_attention_bwd(
            False,
            made["mask_value"],
            made["is_mqa"],
            made["block_sizes"],
            None,
            made["mask_function"],
            made["attn_logits_soft_cap"],
            made["interpret"],
            saved,
            d_out,
        )
        return grads[3:6]

    return jax.vmap(run)(q, *keys_and_values, segments, *whole)
