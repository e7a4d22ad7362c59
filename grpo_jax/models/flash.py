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
# The backward kernel's keys at a time: for each such block it writes a copy of the queries' gradient. Half of the least, which
# skips more above the diagonal, adds more to XLA's estimate than it takes from the kernel's by hand. Beyond the largest a
# core's own memory would not hold them, and there is one kernel for each gradient.
MIN_BACKWARD_KEYS, MAX_BACKWARD_KEYS, MAX_PARTIAL_DQ = 1024, 4096, 4
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
    """Facts that are compiled into a call. prompt_slots: S, before it was padded to blocks."""

    window: int | None
    is_left_padded: bool
    prompt_slots: int
    cap: float | None
    hardware: Hardware


KeysAndValues = tuple[Float[Array, "R K U H"], Float[Array, "R K U H"]]


def suits(rows: CausalRows | None, num_queries: int, num_keys: int) -> bool:
    """Decide if the kernel is the better form: on a TPU, for rows that fill a block of queries."""
    if rows is None or rows.hardware.platform != "tpu":
        return False
    return num_queries == num_keys >= MIN_QUERIES and rows.window != 1


def attend_causally(
    q_BTNH: Float[Array, "B T N H"],
    own: KeysAndValues,
    prompt: KeysAndValues | None,
    rows: CausalRows,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attend to a row's own keys and its prompt's keys, in one softmax over both.

    Args:
      q_BTNH: rotated and scaled queries. own: keys (rotated) and values [B, K, T, H] of the same tokens.
      prompt: those of the prompts, [P, K, S, H], or None; rows p*G .. p*G+G-1 see prompt p. rows: the padding and the window.
      cap: of the scores, as in `attention.attend`.
    Returns: the heads' outputs, in the dtype of the queries; undefined but finite on padding.
    """
    B, T, N, H = q_BTNH.shape
    K, P, slots = own[0].shape[1], B, 0
    if prompt is not None:
        assert not rows.is_left_padded, "what continues a prompt has no padding before it"
        P, slots = len(prompt[0]), prompt[0].shape[2]
        prompt = jax.tree.map(lambda x: _pad(x, padded_length(slots), _width(H)), prompt)
    # A prompt's G rows are more heads of it, in an order in which both calls find their keys: head (k, g, r) reads the prompt's
    # keys k, which are those of every G * R heads, and its row's own keys (k, g), those of every R. So nothing is repeated, and
    # queries are laid out once for both.
    q_PTGKRH = q_BTNH.reshape(P, B // P, T, K, N // K, H)
    q_PMTH = q_PTGKRH.transpose(0, 3, 1, 4, 2, 5).reshape(P, -1, T, H)
    own = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(P, B // P, K, T, H), 1, 2).reshape(P, -1, T, H), own)
    q_PMTH, own = jax.tree.map(lambda x: _pad(x, padded_length(T), _width(H)), (q_PMTH, own))
    masks = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, padded_length(x.shape[1]) - x.shape[1]))), (rows.own_BT, rows.prompt_PS)
    )
    static = Static(rows.window, rows.is_left_padded, slots, cap, rows.hardware)
    out_PMTH: Any = _attention(static, (q_PMTH, own, prompt), (*masks, rows.is_local))
    out_PKGRTH = out_PMTH[:, :, :T, :H].reshape(P, K, B // P, N // K, T, H)
    return out_PKGRTH.transpose(0, 2, 4, 1, 3, 5).reshape(B, T, N, H)


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
def _attention(static: Static, arrays: Any, masks: Any) -> Float[Array, "P M T H"]:
    return _forward(static, arrays, masks)[0]


def _forward(static: Static, arrays: Any, masks: Any) -> tuple[Float[Array, "P M T H"], Any]:
    out_PMTH, lse_PMT = _on_devices(static, _merged, arrays, masks)
    # Named, so that a layer that is computed again need not run the kernel again (`fsdp.REMAT`); kept with the heads side by
    # side, for a last axis of 64 channels would be padded to a register's 128.
    kept_PTX, lse_PMT = checkpoint_name(_pack(out_PMTH), SAVED_NAME), checkpoint_name(lse_PMT, SAVED_NAME)
    return _unpack(kept_PTX, out_PMTH.shape[1]), (arrays, masks, kept_PTX, lse_PMT)


def _backward(static: Static, residuals: Any, d_out_PMTH: Float[Array, "P M T H"]) -> tuple[Any, None]:
    arrays, masks, kept_PTX, lse_PMT = residuals
    out_PMTH = _unpack(kept_PTX, d_out_PMTH.shape[1])
    return _on_devices(static, _gradients, (arrays, out_PMTH, lse_PMT, d_out_PMTH), masks), None


_attention.defvjp(_forward, _backward)


def _pack(x_PMTH: Float[Array, "P M T H"]) -> Float[Array, "P T MH"]:
    x_PTMH = x_PMTH.transpose(0, 2, 1, 3)
    return x_PTMH.reshape(*x_PTMH.shape[:2], -1)


def _unpack(x_PTX: Float[Array, "P T MH"], num_heads: int) -> Float[Array, "P M T H"]:
    return x_PTX.reshape(*x_PTX.shape[:2], num_heads, -1).transpose(0, 2, 1, 3)


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


def _merged(static: Static, arrays: Any, masks: Any) -> tuple[Float[Array, "P M T H"], Float[Array, "P M T"]]:
    """Run both parts forward -> (outputs, float32 log-sum-exp of all scores)."""
    q_PMTH, own, prompt = arrays
    own_BT, prompt_PS, is_local = masks

    def run(window: int | None) -> tuple[Array, Array]:
        out_PMTH, lse_PMT = _run_forward(_own_kernel(static, q_PMTH, window), q_PMTH, own, _own_segments(static, own_BT))
        if prompt is None:
            return out_PMTH, lse_PMT
        kernel, segments = _prompt_kernel(static, q_PMTH, prompt_PS, window), _prompt_segments(q_PMTH, prompt_PS)
        seen_PMTH, seen_lse_PMT = _run_forward(kernel, q_PMTH, prompt, segments)
        share_PMT1 = jax.nn.sigmoid(seen_lse_PMT - lse_PMT)[..., None]  # of the prompt in the sum of exponentials
        moved_PMTH = (seen_PMTH.astype(jnp.float32) - out_PMTH) * share_PMT1
        if window is not None:
            # A block of queries that sees no key of the prompt is never run: its output is 0 / 0.
            moved_PMTH = jnp.where(share_PMT1 > 0, moved_PMTH, 0.0)
        return (out_PMTH + moved_PMTH).astype(q_PMTH.dtype), jnp.logaddexp(lse_PMT, seen_lse_PMT)

    return _by_kind(static, is_local, run)


def _gradients(static: Static, arrays: Any, masks: Any) -> Any:
    """Run both parts backward, each with the whole's output and log-sum-exp -> gradients like (q, own, prompt)."""
    (q_PMTH, own, prompt), *whole = arrays  # whole: output, log-sum-exp, the output's cotangent
    own_BT, prompt_PS, is_local = masks

    def run(window: int | None) -> tuple[Array, Any, Any]:
        kernel = _own_kernel(static, q_PMTH, window)
        dq_PMTH, *d_own = _run_backward(kernel, q_PMTH, own, _own_segments(static, own_BT), whole)
        if prompt is None:
            return dq_PMTH, tuple(d_own), None
        kernel, segments = _prompt_kernel(static, q_PMTH, prompt_PS, window), _prompt_segments(q_PMTH, prompt_PS)
        seen_dq_PMTH, *d_prompt = _run_backward(kernel, q_PMTH, prompt, segments, whole)
        return dq_PMTH + seen_dq_PMTH, tuple(d_own), tuple(d_prompt)

    return _by_kind(static, is_local, run)


def _by_kind(static: Static, is_local: Any, run: Callable[[int | None], Any]) -> Any:
    """Run with the window or without; where only the compiled program knows which, it chooses."""
    if is_local is None or static.window is None:
        return run(static.window)
    return jax.lax.cond(is_local, lambda: run(static.window), lambda: run(None))


# --------------------------------------------------------------------------------------------------------------- the kernels


def _library() -> tuple[Any, Any]:
    # Imported where it is used: on a CPU nothing needs it, and it takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    return splash_attention_kernel, splash_attention_mask


def _own_kernel(static: Static, q_PMTH: Array, window: int | None) -> Any:
    """Return the kernel of rows that see themselves."""
    _, masks = _library()
    T = q_PMTH.shape[2]
    mask = masks.CausalMask((T, T))
    if window is not None and window < T:
        mask = masks.LocalMask((T, T), (window - 1, 0), 0)
    return _make_kernel(static, mask, q_PMTH)


def _prompt_kernel(static: Static, q_PMTH: Array, prompt_PS: Array, window: int | None) -> Any:
    """Return the kernel of rows that see their prompt."""
    _, masks = _library()
    shape = q_PMTH.shape[2], prompt_PS.shape[1]
    mask = masks.FullMask(shape)
    if window is not None:
        # Token t stands S + t - s slots behind the prompt's slot s, however much of the prompt is padding on the left.
        mask = masks.LocalMask(shape, (window - 1, None), static.prompt_slots)
    return _make_kernel(static, mask, q_PMTH)


def _make_kernel(static: Static, mask: Any, q_PMTH: Array) -> Any:
    kernels, masks = _library()
    queries, keys = (block_of(size) for size in mask.shape)
    num_keys = mask.shape[1]
    backward_keys = keys
    while num_keys % (2 * backward_keys) == 0 and (
        backward_keys < MIN_BACKWARD_KEYS or backward_keys * MAX_PARTIAL_DQ < num_keys
    ):
        backward_keys *= 2
    sizes = {"block_q": queries, "block_kv": keys, "block_q_dkv": queries, "block_kv_dkv_compute": keys}
    if backward_keys <= MAX_BACKWARD_KEYS and num_keys <= backward_keys * MAX_PARTIAL_DQ:
        sizes |= {"block_kv_dkv": backward_keys, "use_fused_bwd_kernel": True}
    else:
        sizes |= {"block_kv_dkv": keys, "block_q_dq": queries, "block_kv_dq": keys}
    return kernels.make_splash_mha(
        mask=masks.MultiHeadMask([mask] * q_PMTH.shape[1]),
        block_sizes=kernels.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=True,
        attn_logits_soft_cap=static.cap,
        interpret=static.hardware.interpret,
    )


def _own_segments(static: Static, own_BT: Array) -> Any:
    """Tell tokens from padding, where it stands before them."""
    if not static.is_left_padded:
        return None
    kernels, _ = _library()
    return kernels.SegmentIds(q=own_BT, kv=own_BT)


def _prompt_segments(q_PMTH: Array, prompt_PS: Array) -> Any:
    """Hide the prompts' padding from all queries."""
    kernels, _ = _library()
    return kernels.SegmentIds(q=jnp.ones((len(prompt_PS), q_PMTH.shape[2]), jnp.int32), kv=prompt_PS)


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
