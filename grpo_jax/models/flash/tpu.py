"""The kernels of `attend` on TPUs for rows that are too long for `whole`: two calls of JAX's own flash attention ("splash").

The first is of the G completions of a prompt, folded into one row of queries, over the prompt's keys, the second of every row
over its own. What they give is merged by the log-sum-exp of their scores, and that is one softmax over both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from grpo_jax.models.flash.call import Call, KeysAndValues, Masks, by_kind

LANES = 128  # the unit of every length that a kernel sees
# Queries or keys at a time, and what a padded token costs in blocks of that size beside the largest one's: small blocks are
# loaded more often. An assumption: no chip was at hand to measure it.
BLOCKS = {512: 1.0, 384: 1.05, 256: 1.15, 128: 1.5}
# The backward kernel's keys at a time: for each such block it writes a copy of the queries' gradient. Half of the least, which
# skips more above the diagonal, adds more to XLA's estimate than it takes from the kernel's by hand. Beyond the largest a
# core's own memory would not hold them, and there is one kernel for each gradient.
MIN_BACKWARD_KEYS, MAX_BACKWARD_KEYS, MAX_PARTIAL_DQ = 1024, 4096, 4


def block_of(num: int) -> int:
    """Return the size of a block of so many queries or keys: little padding, few blocks."""
    return min(BLOCKS, key=lambda block: -(-num // block) * block * BLOCKS[block])


def padded_length(num: int) -> int:
    """Return a length in tokens rounded up to whole blocks."""
    return -(-num // block_of(num)) * block_of(num)


def width_of(head_dim: int) -> int:
    """Return the channels of a head as the kernel takes them: half a register's, or whole registers'."""
    if head_dim <= LANES // 2:
        return LANES // 2
    return -(-head_dim // LANES) * LANES


def forward(call: Call, arrays: Any, masks: Masks) -> tuple[Float[Array, "P M T H"], Float[Array, "P M T"]]:
    """Run both parts forward -> (outputs, float32 log-sum-exp of all scores)."""
    q_PMTH, own, prompt = arrays
    own_BT, prompt_PS, _ = masks

    def run(window: int | None) -> tuple[Array, Array]:
        kernel = _own_kernel(call, q_PMTH, own[0].shape[2], window)
        out_PMTH, lse_PMT = _run_forward(kernel, q_PMTH, own, _own_segments(call, own_BT))
        if prompt is None:
            return out_PMTH, lse_PMT
        kernel, segments = _prompt_kernel(call, q_PMTH, prompt_PS, window), _prompt_segments(q_PMTH, prompt_PS)
        seen_PMTH, seen_lse_PMT = _run_forward(kernel, q_PMTH, prompt, segments)
        share_PMT1 = jax.nn.sigmoid(seen_lse_PMT - lse_PMT)[..., None]  # of the prompt in the sum of exponentials
        moved_PMTH = (seen_PMTH.astype(jnp.float32) - out_PMTH) * share_PMT1
        if window is not None:
            # A block of queries that sees no key of the prompt is never run: its output is 0 / 0.
            moved_PMTH = jnp.where(share_PMT1 > 0, moved_PMTH, 0.0)
        # Fenced: the layout in which outputs are kept is not that of a kernel, and XLA would turn both parts' float32 copies.
        merged_PMTH = (out_PMTH + moved_PMTH).astype(q_PMTH.dtype)
        return jax.lax.optimization_barrier(merged_PMTH), jnp.logaddexp(lse_PMT, seen_lse_PMT)

    return by_kind(call, masks, run)


def backward(call: Call, arrays: Any, masks: Masks) -> Any:
    """Run both parts backward, each with the whole's output and log-sum-exp -> gradients like (q, own, prompt)."""
    (q_PMTH, own, prompt), *whole = arrays  # whole: output, log-sum-exp, the output's cotangent
    own_BT, prompt_PS, _ = masks

    def run(window: int | None) -> tuple[Array, Any, Any]:
        kernel = _own_kernel(call, q_PMTH, own[0].shape[2], window)
        dq_PMTH, *d_own = _run_backward(kernel, q_PMTH, own, _own_segments(call, own_BT), whole)
        if prompt is None:
            return dq_PMTH, tuple(d_own), None
        kernel, segments = _prompt_kernel(call, q_PMTH, prompt_PS, window), _prompt_segments(q_PMTH, prompt_PS)
        seen_dq_PMTH, *d_prompt = _run_backward(kernel, q_PMTH, prompt, segments, whole)
        return dq_PMTH + seen_dq_PMTH, tuple(d_own), tuple(d_prompt)

    return by_kind(call, masks, run)


# --------------------------------------------------------------------------------------------------------------- the kernels


def _library() -> tuple[Any, Any]:
    # Imported where it is used: on a CPU nothing needs it, and it takes a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    return splash_attention_kernel, splash_attention_mask


def _own_kernel(call: Call, q_PMTH: Array, num_keys: int, window: int | None) -> Any:
    """Return the kernel of rows that see themselves, or keys before all of them."""
    _, masks = _library()
    T = q_PMTH.shape[2]
    if call.is_before:
        return _make_kernel(call, masks.FullMask((T, num_keys)), q_PMTH)
    mask = masks.CausalMask((T, T))
    if window is not None and window < T:
        mask = masks.LocalMask((T, T), (window - 1, 0), 0)
    return _make_kernel(call, mask, q_PMTH)


def _prompt_kernel(call: Call, q_PMTH: Array, prompt_PS: Array, window: int | None) -> Any:
    """Return the kernel of rows that see their prompt."""
    _, masks = _library()
    shape = q_PMTH.shape[2], prompt_PS.shape[1]
    mask = masks.FullMask(shape)
    if window is not None:
        # Token t stands S + t - s slots behind the prompt's slot s, however much of the prompt is padding on the left.
        mask = masks.LocalMask(shape, (window - 1, None), call.prompt_slots)
    return _make_kernel(call, mask, q_PMTH)


def _make_kernel(call: Call, mask: Any, q_PMTH: Array) -> Any:
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
        attn_logits_soft_cap=call.cap,
        interpret=call.hardware.interpret,
    )


def _own_segments(call: Call, own_BT: Array) -> Any:
    """Tell tokens from padding, where it stands before them."""
    if not call.is_left_padded:
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
