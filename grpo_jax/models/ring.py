"""Attention of completions whose tokens are spread over devices: keys and values go round a ring (arXiv 2310.01889).

Each device's queries see their prompt, their own keys, and those of every other device as they come by; one softmax over all,
by the log-sum-exp of the scores so far. Exact, with a derivative by hand: keys and values come round once more and take their
gradients along, so that no device ever has more than one visitor's. The parts are computed by the kernels of `flash`, or in
plain operations.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from grpo_jax.models.flash import attend as flash
from grpo_jax.models.flash import plain
from grpo_jax.models.flash.call import Call, KeysAndValues
from grpo_jax.parallel.context import Share
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import vary_like

NO_WINDOW = 2**30  # tokens

Scored = tuple[Float[Array, "P M X H"], Float[Array, "P M X"]]  # outputs, and log-sum-exp of the scores; float32


@flax.struct.dataclass
class Ring:
    """The facts that decide which keys a device's queries see, and by what they are scored.

    share: the slots of rows that are here. own_BX: int32, 1 on their tokens, which stand before the padding. prompt_PS: int32,
    1 on the tokens of left-padded prompts. window: int32, tokens that a query sees, itself included; None: all before it.
    hardware: whose kernels are taken where they suit; None: none are.
    """

    share: Share
    own_BX: Any
    prompt_PS: Any
    window: Any = None
    hardware: Hardware | None = flax.struct.field(pytree_node=False, default=None)


def attend(
    q_BXNH: Float[Array, "B X N H"],
    own: KeysAndValues,
    prompt: KeysAndValues,
    ring: Ring,
    cap: float | None = None,
) -> Float[Array, "B X N H"]:
    """Attend to all keys of a row, wherever they are, and to its prompt's keys, in one softmax. Inside `shard_map`.

    Args:
      q_BXNH: rotated and scaled queries of the slots that are here. own: keys (rotated) and values [B, K, X, H] of the same
        tokens. prompt: those of the prompts, [P, K, S, H]; rows p*G .. p*G+G-1 see prompt p.
      ring: slots, padding and window. cap: of the scores, as in `attention.attend`.
    Returns: the heads' outputs, in the dtype of the queries; undefined but finite on padding.
    """
    H = q_BXNH.shape[-1]
    # Where weights are the same on all devices by their type, so are the prompts' keys; the gradients below are each device's.
    prompt = vary_like(prompt, ring.share.rank)
    arrays = flash.lay_out(q_BXNH, own, prompt)
    if _has_kernels(ring):
        assert ring.hardware is not None
        arrays = flash.pad(ring.hardware, arrays)
    out_PMXH: Any = _attention(cap, arrays, ring)
    return flash.lay_out_rows(out_PMXH[..., :H], own[0].shape[1], len(q_BXNH))


def _has_kernels(ring: Ring) -> bool:
    """Decide if kernels score the parts: they have no windows between slots that are far apart, and no pieces of a block."""
    if ring.hardware is None or ring.window is not None:
        return False
    piece = ring.share.piece
    return all(flash.padded_length(ring.hardware, size) == size for size in (piece, 2 * piece))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(cap: float | None, arrays: Any, ring: Ring) -> Float[Array, "P M X H"]:
    return _forward(cap, arrays, ring)[0]


def _forward(cap: float | None, arrays: Any, ring: Ring) -> tuple[Float[Array, "P M X H"], Any]:
    q, own, _ = arrays
    found = _score(cap, arrays, ring, ring.share.rank)

    def visit(carry: Any, step: Int[Array, ""]) -> tuple[Any, None]:
        visitor, found = carry
        coming = ring.share.pass_on(visitor)  # it travels while the visitor's keys are scored
        owner = _owner_of(ring, step)
        of_front, of_back = (functools.partial(_score_visitor, cap, q, visitor, ring, owner, part) for part in PARTS)
        return (coming, _merge(found, jax.lax.cond(owner < ring.share.rank, of_front, of_back))), None

    carry = ring.share.pass_on(own), found
    (_, (out, lse)), _ = jax.lax.scan(visit, carry, jnp.arange(1, ring.share.num_devices))
    # Named as the kernels' are, so that a layer that is computed again need not go round once more (`fsdp.REMAT`).
    out, lse = checkpoint_name(out.astype(q.dtype), flash.SAVED_NAME), checkpoint_name(lse, flash.SAVED_NAME)
    return out, (arrays, ring, out, lse)


def _backward(cap: float | None, residuals: Any, d_out: Float[Array, "P M X H"]) -> tuple[Any, None]:
    arrays, ring, out, lse = residuals
    q, own, _ = arrays
    whole = out, lse, d_out
    dq, d_own, d_prompt = _differentiate(cap, arrays, whole, ring, ring.share.rank)

    def visit(carry: Any, step: Int[Array, ""]) -> tuple[Any, None]:
        (visitor, d_visitor), dq = carry
        coming = ring.share.pass_on(visitor)
        owner = _owner_of(ring, step)
        of_front, of_back = (
            functools.partial(_differentiate_visitor, cap, q, visitor, whole, ring, owner, part) for part in PARTS
        )
        more_dq, more = jax.lax.cond(owner < ring.share.rank, of_front, of_back)
        d_visitor = jax.tree.map(jnp.add, d_visitor, more)
        return ((coming, ring.share.pass_on(d_visitor)), dq + more_dq), None

    carry = ring.share.pass_on((own, d_own)), dq
    ((_, d_own), dq), _ = jax.lax.scan(visit, carry, jnp.arange(1, ring.share.num_devices))
    # After the last step each device's own keys are with it again, and with them the gradients that all have added.
    return jax.tree.map(lambda grad, x: grad.astype(x.dtype), (dq, d_own, d_prompt), arrays), None


_attention.defvjp(_forward, _backward)


# ----------------------------------------------------------------------------------------------------------------- visitors

# A visitor's front piece stands before all queries here if it comes from a device with a lower place, whose back piece stands
# behind them all; of one with a higher place, both pieces stand before the back half of the queries and behind the front half.
# So half of the scores are needed, and not the same half.
PARTS = ("front", "back")


def _halves(part: str, size: int) -> tuple[slice, slice]:
    """Return the queries, and the visitor's keys, of a part."""
    first, second, whole = slice(0, size // 2), slice(size // 2, size), slice(0, size)
    return {"front": (whole, first), "back": (second, whole)}[part]


def _owner_of(ring: Ring, step: Int[Array, ""]) -> Int[Array, ""]:
    """Return the place of the device whose keys are here after so many steps."""
    return (ring.share.rank - step) % ring.share.num_devices


def _score_visitor(cap: float | None, q: Array, visitor: KeysAndValues, ring: Ring, owner: Array, part: str) -> Scored:
    queries, keys = _halves(part, q.shape[2])
    arrays = q[:, :, queries], jax.tree.map(lambda x: x[:, :, keys], visitor), None
    out, lse = _score(cap, arrays, ring, owner, queries, keys)
    unseen = ((0, 0), (0, 0), (queries.start, 0))
    return jnp.pad(out, (*unseen, (0, 0))), jnp.pad(lse, unseen, constant_values=plain.MASK_VALUE)


def _differentiate_visitor(
    cap: float | None, q: Array, visitor: KeysAndValues, whole: Any, ring: Ring, owner: Array, part: str
) -> tuple[Array, KeysAndValues]:
    queries, keys = _halves(part, q.shape[2])
    arrays = q[:, :, queries], jax.tree.map(lambda x: x[:, :, keys], visitor), None
    seen = jax.tree.map(lambda x: x[:, :, queries], whole)
    dq, d_visitor, _ = _differentiate(cap, arrays, seen, ring, owner, queries, keys)

    def widen(x: Array, before: int, behind: int) -> Array:
        return jnp.pad(x, ((0, 0), (0, 0), (before, behind), (0, 0)))

    behind = q.shape[2] - keys.stop
    return widen(dq, queries.start, 0), jax.tree.map(lambda x: widen(x, 0, behind), d_visitor)


def _merge(one: Scored, other: Scored) -> Scored:
    """Return the outputs of one softmax over the keys of two."""
    (out, lse), (more, more_lse) = one, other
    share = jax.nn.sigmoid(more_lse - lse)[..., None]
    return out + (more - out) * share, jnp.logaddexp(lse, more_lse)


# -------------------------------------------------------------------------------------------------------------- one part

ALL = slice(None)


def _score(cap: float | None, arrays: Any, ring: Ring, owner: Array, queries: slice = ALL, keys: slice = ALL) -> Scored:
    """Attend to the keys of one device, and of the prompt where they are given.

    Args:
      arrays: queries, keys and values of rows, those of prompts or None. owner: whose keys they are. queries, keys: which of a
        device's slots the arrays have.
    Returns: (outputs, log-sum-exp), float32.
    """
    if _has_kernels(ring):
        call, masks = _call_of(cap, ring, arrays[2] is None, queries)
        out, lse = flash.forward(call, arrays, masks)
        return out.astype(jnp.float32), lse
    return plain.forward(cap, arrays, _seen(ring, owner, queries, keys, arrays[2] is not None))


def _differentiate(
    cap: float | None, arrays: Any, whole: Any, ring: Ring, owner: Array, queries: slice = ALL, keys: slice = ALL
) -> Any:
    """Return what those keys add to all gradients, float32. whole: outputs, log-sum-exp, d_out. The rest as in `_score`."""
    if _has_kernels(ring):
        call, masks = _call_of(cap, ring, arrays[2] is None, queries)
        found = flash.backward(call, (arrays, *whole), masks)
        return jax.tree.map(lambda x: x.astype(jnp.float32), found)
    return plain.backward(cap, (arrays, *whole), _seen(ring, owner, queries, keys, arrays[2] is not None))


def _call_of(cap: float | None, ring: Ring, is_visitor: bool, queries: slice) -> tuple[Call, Any]:
    """Say to a kernel which keys are seen: of a visitor all that it is given, of own ones those up to a query's own."""
    assert ring.hardware is not None
    call = Call(ring.hardware, ring.prompt_PS.shape[1], cap, is_before=is_visitor)
    return call, (ring.own_BX[:, queries], flash.pad_mask(ring.hardware, ring.prompt_PS), None)


def _seen(ring: Ring, owner: Array, queries: slice, keys: slice, has_prompt: bool) -> plain.Seen:
    """Say the same by masks, from the slots that queries and keys stand at."""
    query_slots_X = ring.share.slots_X[queries]
    own_XU = _near(query_slots_X, ring.share.slots_of(owner)[keys], ring.window)
    if not has_prompt:
        return own_XU, None
    # The prompt's slot s stands S + t - s tokens before token t, however much of the prompt is padding on the left.
    S = ring.prompt_PS.shape[1]
    near_XS = _near(query_slots_X, jnp.arange(-S, 0), ring.window)
    return own_XU, (ring.prompt_PS > 0)[:, None] & near_XS[None]


def _near(query_slots_X: Array, key_slots_U: Array, window: Any) -> Bool[Array, "X U"]:
    """Say which keys are not behind a query, nor too far before it."""
    distance_XU = query_slots_X[:, None] - key_slots_U[None]
    if window is None:
        return distance_XU >= 0
    return (distance_XU >= 0) & (distance_XU < window)
