"""Causal attention over a row's own keys and its prompt's without scores in memory, forward and backward: on accelerators.

`attention.attend` is the same in plain operations. The kernels are those of `gpu`, of `whole` on TPUs, and of `tpu` for rows
that are too long for it: here are the layout that `gpu` and `tpu` read, and the derivative.

No cotangent flows through a kernel's log-sum-exp: its own derivative drops it, and gradients of queries and keys come out wrong
by half where parts are merged. Here one derivative covers all parts, and each part's backward kernel is given the output and
the log-sum-exp of the whole, as ring attention does from device to device (Liu et al., arXiv 2310.01889).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from grpo_jax.models.flash import tpu, whole
from grpo_jax.models.flash.call import Call, CausalRows, KeysAndValues, has_kernels, say_once
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import vary_like

MIN_QUERIES = 128  # fewer fill no block: plain operations are as good
HEADS = PartitionSpec(None, "tensor")  # of arrays [rows, heads, ...]
BITS = {2: jnp.uint16, 4: jnp.uint32}  # by bytes
SAVED_NAME = "attention"  # of output and log-sum-exp: `fsdp.REMAT` keeps them where it keeps products


def suits(rows: CausalRows | None, num_queries: int, num_keys: int) -> bool:
    """Decide if the kernel is the better form: on accelerators that have one, for rows that fill a block of queries."""
    if rows is None or not has_kernels(rows.hardware.platform):
        return False
    return num_queries == num_keys >= MIN_QUERIES and rows.window != 1


def attend_causally(
    q_BTNH: Float[Array, "B T N H"],
    own: KeysAndValues,
    prompt: KeysAndValues | None,
    rows: CausalRows,
    scale: float,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attend to a row's own keys and its prompt's keys, in one softmax over both.

    Args:
      q_BTNH: rotated queries. own: keys (rotated) and values [B, K, T, H] of the same tokens.
      prompt: those of the prompts, [P, K, S, H], or None; rows p*G .. p*G+G-1 see prompt p. rows: the padding and the window.
      scale, cap: of the scores, as in `attention.attend`.
    Returns: the heads' outputs, in the dtype of the queries; undefined but finite on padding.
    """
    B, T, _, H = q_BTNH.shape
    slots = 0
    if prompt is not None:
        assert not rows.is_left_padded, "what continues a prompt has no padding before it"
        slots = prompt[0].shape[2]
    call = Call(rows.hardware, slots, cap, rows.window, rows.is_left_padded)
    if rows.hardware.platform == "tpu" and whole.fits(q_BTNH, own, prompt):
        call, masks = dataclasses.replace(call, is_whole=True, scale=scale), (rows.own_BT, rows.prompt_PS, rows.is_local)
        out_BNHT: Any = _attention(call, whole.lay_out(q_BTNH, own, prompt), masks)
        return out_BNHT[:, :, :H, :T].transpose(0, 3, 1, 2)
    if rows.hardware.platform == "tpu":
        say_once(f"attention by the kernel that ships with JAX: a core's memory does not hold rows of {slots} + {T} tokens")
    masks = [pad_mask(rows.hardware, mask) for mask in (rows.own_BT, rows.prompt_PS)]
    arrays = pad(rows.hardware, lay_out(q_BTNH * jnp.asarray(scale, q_BTNH.dtype), own, prompt))
    out_PMTH: Any = _attention(call, arrays, (*masks, rows.is_local))
    return lay_out_rows(out_PMTH[:, :, :T, :H], own[0].shape[1], B)


def lay_out(
    q_BTNH: Float[Array, "B T N H"], own: KeysAndValues, prompt: KeysAndValues | None
) -> tuple[Float[Array, "P M T H"], KeysAndValues, KeysAndValues | None]:
    """Return queries, own keys and values and the prompts' as kernels take them; arguments as in `attend_causally`."""
    # A prompt's G rows are more heads of it, in an order in which both parts find their keys: head (k, g, r) reads the prompt's
    # keys k, which are those of every G * R heads, and its row's own keys (k, g), those of every R. So nothing is repeated, and
    # queries are laid out once for both.
    B, T, N, H = q_BTNH.shape
    K, P = own[0].shape[1], B if prompt is None else len(prompt[0])
    q_PTGKRH = q_BTNH.reshape(P, B // P, T, K, N // K, H)
    q_PMTH = q_PTGKRH.transpose(0, 3, 1, 4, 2, 5).reshape(P, -1, T, H)
    own = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(P, B // P, K, T, H), 1, 2).reshape(P, -1, T, H), own)
    return q_PMTH, own, prompt


def lay_out_rows(out_PMTH: Float[Array, "P M T H"], num_keys: int, num_rows: int) -> Float[Array, "B T N H"]:
    """Undo `lay_out`. num_keys: K heads of keys. num_rows: B."""
    P, _, T, H = out_PMTH.shape
    out_PKGRTH = out_PMTH.reshape(P, num_keys, num_rows // P, -1, T, H)
    return out_PKGRTH.transpose(0, 2, 4, 1, 3, 5).reshape(num_rows, T, -1, H)


def pad(hardware: Hardware, arrays: Any) -> Any:
    """Pad tokens and channels [.., U, H] to whole blocks."""
    kernels = _kernels(hardware)

    def pad(x: Array) -> Array:
        *_, length, width = x.shape
        more = kernels.padded_length(length) - length, kernels.width_of(width) - width
        return jnp.pad(x, ((0, 0), (0, 0), (0, more[0]), (0, more[1])))

    return jax.tree.map(pad, arrays)


def pad_mask(hardware: Hardware, mask: Any) -> Any:
    """Pad a mask [rows, U], or None, as `pad` does."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, padded_length(hardware, x.shape[1]) - x.shape[1]))), mask)


def padded_length(hardware: Hardware, num: int) -> int:
    """Return a length in tokens rounded up to whole blocks of the kernels."""
    return _kernels(hardware).padded_length(num)


def _kernels(hardware: Hardware, is_whole: bool = False) -> Any:
    """Return the module of a platform's kernels."""
    if hardware.platform == "tpu":
        return whole if is_whole else tpu
    from grpo_jax.models.flash import gpu  # only here: Pallas takes a second to import, and no CPU needs it

    return gpu


# ------------------------------------------------------------------------------------------------ one derivative for both parts


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: Call, arrays: Any, masks: Any) -> Array:
    return _forward(call, arrays, masks)[0]


def _forward(call: Call, arrays: Any, masks: Any) -> tuple[Array, Any]:
    out, lse = forward(call, arrays, masks)
    # Named, so that a layer that is computed again need not run the kernel again (`fsdp.REMAT`).
    kept, lse = checkpoint_name(_pack(call, out), SAVED_NAME), checkpoint_name(lse, SAVED_NAME)
    return _unpack(call, kept, out), (arrays, masks, kept, lse)


def _backward(call: Call, residuals: Any, d_out: Array) -> tuple[Any, None]:
    arrays, masks, kept, lse = residuals
    return backward(call, (arrays, _unpack(call, kept, d_out), lse, d_out), masks), None


_attention.defvjp(_forward, _backward)


def _pack(call: Call, out: Array) -> Array:
    """Return outputs as they are kept: heads [P, M, T, H] side by side, for 64 channels would be padded to a register's 128."""
    if call.is_whole:
        # Tokens are last already. As bits: numbers that are kept JAX rounds anew, which is a pass of its own behind a kernel.
        return jax.lax.bitcast_convert_type(out, BITS[out.dtype.itemsize])
    out_PTMH = out.transpose(0, 2, 1, 3)
    return out_PTMH.reshape(*out_PTMH.shape[:2], -1)


def _unpack(call: Call, kept: Array, like: Array) -> Array:
    """Undo `_pack`; like: of its shape."""
    if call.is_whole:
        return jax.lax.bitcast_convert_type(kept, like.dtype)
    return kept.reshape(*kept.shape[:2], like.shape[1], -1).transpose(0, 2, 1, 3)


def forward(call: Call, arrays: Any, masks: Any) -> tuple[Array, Array]:
    """Run the kernels -> (outputs like queries, float32 log-sum-exp). arrays: laid out and padded. masks: padded ones."""
    return on_devices(call, _kernels(call.hardware, call.is_whole).forward, arrays, masks)


def backward(call: Call, arrays: Any, masks: Any) -> Any:
    """Run them backward -> gradients like (q, own, prompt).

    Args: as in `forward`; arrays: those there, then outputs and log-sum-exp over all keys, also over those of other calls, and
      the cotangent of that output.
    """
    return on_devices(call, _kernels(call.hardware, call.is_whole).backward, arrays, masks)


def mesh_of(hardware: Hardware) -> Any:
    """Return the mesh that is traced for: inside `shard_map` what is there, else the program's; None: one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return hardware.mesh if mesh.empty else mesh


def on_devices(
    call: Call, function: Callable[..., Any], arrays: Any, masks: Any, in_spec: Any = HEADS, out_spec: Any = HEADS
) -> Any:
    """Call function(call, arrays, masks) on each device's own part of the arrays, if `tensor` has several devices.

    Args:
      call: its facts. function: what runs kernels; its results have heads as their second axis.
      arrays: of which it gets what in_spec says, by heads unless told otherwise. masks: each device has all of them.
      out_spec: of the results.
    Returns: its results, which vary over the mesh axes that arrays and masks do.
    """
    run, mesh = functools.partial(function, call), mesh_of(call.hardware)
    if call.hardware.interpret or mesh is None:
        return run(arrays, masks)
    # The compiler cannot shard a kernel along `tensor`, so that axis is made manual here, and where no rows are sharded all the
    # others too: a TPU's kernels want that. And JAX says of no output of its kernels over which axes it varies, which is an
    # error wherever such types are checked: here they are not.
    are_rows_manual = AxisType.Manual in mesh.axis_types
    manual: dict[str, Any] = {"axis_names": {"tensor"} if are_rows_manual else set(mesh.axis_names)}
    if mesh is call.hardware.mesh:
        manual["mesh"] = mesh
    if mesh.shape["tensor"] == 1:
        in_spec = out_spec = PartitionSpec()
    sharded = jax.shard_map(run, in_specs=(in_spec, PartitionSpec()), out_specs=out_spec, check_vma=False, **manual)
    first, mask = (x.ravel()[:1].astype(jnp.int32) for x in (jax.tree.leaves(arrays)[0], masks[0]))
    return vary_like(sharded(arrays, masks), first + mask)
