"""A gated delta net (Yang et al., arXiv 2412.06464): in place of keys and values a state that does not grow with the row.

Each value head holds a matrix S [K, V] that answers a query q with S^T q. Token t lets it fade by a_t in (0, 1), and moves what
it answers to key k_t towards v_t, by a share b_t of the difference:

    S_t = a_t S_{t-1} + k_t d_t^T,    d_t = b_t (v_t - a_t S_{t-1}^T k_t),    o_t = S_t^T q_t

Prompts and completions of an update are computed in chunks of tokens (section 3.3 there), decoding token by token: the same
numbers. Shapes: C tokens of a chunk, N chunks, J key heads, each with M value heads, K and V channels of a key and a value.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from grpo_jax.models.architecture import Architecture, Delta
from grpo_jax.models.attention import AttentionView
from grpo_jax.models.linear import Linear, like
from grpo_jax.models.lora import LoRA, adapter_of
from grpo_jax.parallel.sharding import vary_like

CHUNK_TOKENS = 64  # a power of 2: work within a chunk grows with its square, the steps from chunk to chunk shrink with it
EPSILON = 1e-6  # under the root, where queries and keys are made unit vectors


@flax.struct.dataclass
class DeltaState:
    """The trace of a row's tokens, of all layers (or of one, without L).

    tail [L, B, W - 1, X]: the last inputs of the convolution, zeros before the first token. state [L, B, J, M, K, V]: float32.
    """

    tail: jax.Array
    state: jax.Array

    @classmethod
    def empty(cls, num_rows: int, delta: Delta, dtype: Any) -> DeltaState:
        """Return one layer's, before any token.

        Args:
          num_rows: B. delta: the sizes. dtype: the compute dtype.
        """
        J, M = delta.num_key_heads, delta.num_value_heads // delta.num_key_heads
        # float32 whatever the compute dtype: a state is a sum over the whole row, and bfloat16 would lose its small terms.
        state = jnp.zeros((num_rows, J, M, delta.key_dim, delta.value_dim))
        return cls(jnp.zeros((num_rows, delta.conv_width - 1, delta.num_channels), dtype), state)

    def of_rows(self, num_rows: int) -> DeltaState:
        """Return one layer's prompts' for their completions: rows p*G .. p*G+G-1 begin where prompt p ended."""
        return jax.tree.map(lambda x: jnp.repeat(x, num_rows // len(x), axis=0), self)

    def at_start(self, slot: int | Int[Array, "..."], first: DeltaState) -> DeltaState:
        """Return one layer's, of rows that are at slot 0 `first`. slot: of their next token, one for all rows or [B]."""
        is_first = (jnp.asarray(slot) == 0).reshape(-1)
        return jax.tree.map(
            lambda old, new: jnp.where(jnp.expand_dims(is_first, tuple(range(1, old.ndim))), new, old), self, first
        )

    def pad_to(self, num_slots: int) -> DeltaState:
        """Return the same: its size does not depend on the number of tokens."""
        del num_slots
        return self

    @property
    def num_slots(self) -> int:
        """Tokens that are kept apart: none."""
        return 0


class Convolution(nnx.Module):
    """y_t = silu(sum_w weight_w x_{t - W + 1 + w}), every channel by itself."""

    def __init__(self, delta: Delta, *, rngs: nnx.Rngs):
        """Draw the weight [X, W] from N(0, 1 / W)."""
        shape = delta.num_channels, delta.conv_width
        self.weight = nnx.Param(jax.random.normal(rngs.params(), shape) * delta.conv_width**-0.5)

    def __call__(
        self, x_BTX: Float[Array, "B T X"], tail_BUX: Float[Array, "B U X"]
    ) -> tuple[Float[Array, "B T X"], Float[Array, "B U X"]]:
        """Convolve.

        Args:
          x_BTX: inputs. tail_BUX: the U = W - 1 inputs before them.
        Returns: (y_BTX, the last U inputs).
        """
        T, (_, W) = x_BTX.shape[1], self.weight[...].shape
        inputs = jnp.concatenate([tail_BUX, x_BTX], 1)
        weight_XW = self.weight[...].astype(x_BTX.dtype).astype(jnp.float32)
        # A few shifted sums, which compilers fuse into one pass; convolutions by channel are slow on CPUs.
        y_BTX = sum(inputs[:, w : w + T].astype(jnp.float32) * weight_XW[None, None, :, w] for w in range(W))
        return jax.nn.silu(y_BTX).astype(x_BTX.dtype), inputs[:, T:]


class GatedNorm(nnx.Module):
    """x / rms(x) * weight * silu(gate) over the last axis, the statistics and the gate in float32."""

    def __init__(self, dim: int, eps: float):
        self.weight, self.eps = nnx.Param(jnp.ones(dim)), eps

    def __call__(self, x: Float[Array, "*lead V"], gate: Float[Array, "*lead V"]) -> Float[Array, "*lead V"]:
        x32 = x.astype(jnp.float32)
        normed = (x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)).astype(x.dtype)
        weighted = normed * like(self.weight[...].astype(x.dtype), x)
        return (weighted.astype(jnp.float32) * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)


class GatedDelta(nnx.Module):
    """A gated delta net over a row's own tokens and, where given, on top of its prompt's state."""

    def __init__(self, arch: Architecture, *, lora: LoRA | None = None, rngs: nnx.Rngs):
        """Draw fresh parameters.

        Args:
          arch: its `delta` gives the sizes. lora: adapters of the matrices, or None.
        """
        assert arch.delta is not None, "a gated delta net without its sizes"
        self.delta = delta = arch.delta
        linear = functools.partial(Linear, arch.dim, rngs=rngs)
        adapter = functools.partial(adapter_of, lora)
        self.qkv = linear(delta.num_channels, lora=adapter("in_proj_qkv"))
        self.output_gate = linear(delta.num_value_heads * delta.value_dim, lora=adapter("in_proj_z"))
        self.strength = linear(delta.num_value_heads, lora=adapter("in_proj_b"))
        self.rate = linear(delta.num_value_heads, lora=adapter("in_proj_a"))
        self.conv = Convolution(delta, rngs=rngs)
        # Heads forget at rates of their own: some lose half of their state in one token, others in twenty.
        heads = (delta.num_value_heads,)
        self.log_rate = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), heads, minval=0.03, maxval=0.5)))
        self.rate_bias = nnx.Param(jnp.ones(heads))
        self.norm = GatedNorm(delta.value_dim, arch.norm_eps)
        closing: dict[str, Any] = {"scale": (2 * arch.num_layers) ** -0.5, "shards_inputs": True}
        num_values = delta.num_value_heads * delta.value_dim
        self.out = Linear(num_values, arch.dim, lora=adapter("out_proj"), **closing, rngs=rngs)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        view: AttentionView,
        prefix: DeltaState | None,
        cache: DeltaState | None,
        slot: int | Int[Array, "..."],
    ) -> tuple[Float[Array, "B T D"], DeltaState]:
        """Run tokens through the state.

        Args:
          x_BTD: normed hidden states, in the compute dtype. view: its `mask_BT` alone is read.
          prefix: the prompts' states, [P, ...] of this layer, or None. Rows p*G .. p*G+G-1 begin with that of prompt p.
          cache: the rows' states after their earlier tokens, or None; with it T is 1. slot: the token's number in its row, one
            for all rows or [B]; at slot 0 a row begins anew, whatever the cache holds.
        Returns: (output_BTD, the rows' states after these tokens).
        """
        delta, (B, T, _), dtype = self.delta, x_BTD.shape, x_BTD.dtype
        J, M = delta.num_key_heads, delta.num_value_heads // delta.num_key_heads
        channels_BTX, log_decay, strength = self.qkv(x_BTD), self._log_decay(x_BTD), jax.nn.sigmoid(self.strength(x_BTD))
        if view.mask_BT is not None:
            # Padding leaves convolution and state as they were: it has no inputs, fades nothing and adds nothing.
            is_token_BT1 = view.mask_BT[..., None]
            channels_BTX, log_decay, strength = (jnp.where(is_token_BT1, x, 0) for x in (channels_BTX, log_decay, strength))
        if prefix is not None:
            start = prefix.of_rows(B)
        else:
            assert view.mask_BT is not None, "rows without a prompt have a mask"
            start = vary_like(DeltaState.empty(B, delta, dtype), view.mask_BT.astype(jnp.int32))
        if cache is not None:
            start = cache.at_start(slot, start)
        channels_BTX, tail_BUX = self.conv(channels_BTX, start.tail)
        q, k, v = jnp.split(channels_BTX.astype(jnp.float32), [J * delta.key_dim, 2 * J * delta.key_dim], -1)
        q, k = (unit(x.reshape(B, T, J, delta.key_dim)) for x in (q, k))
        q, v = q * delta.key_dim**-0.5, v.reshape(B, T, J, M, delta.value_dim)
        log_decay, strength = (x.astype(jnp.float32).reshape(B, T, J, M) for x in (log_decay, strength))
        run = run_chunks if cache is None else run_token
        # With bfloat16 these products may be as coarse as all others on an accelerator; with float32 they must not be.
        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        out, state = run(q, k, v, log_decay, strength, start.state, precision)
        out = out.reshape(B, T, -1, delta.value_dim).astype(dtype)
        out = self.norm(out, self.output_gate(x_BTD).reshape(out.shape))
        return self.out(out.reshape(B, T, -1)), DeltaState(tail_BUX, state)

    def _log_decay(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T H"]:
        """Return log a_t of each value head, at most 0, in float32."""
        # Rounded to the compute dtype first, as the sampler's weights are: the learner must not see other rates.
        log_rate, bias = (x[...].astype(x_BTD.dtype).astype(jnp.float32) for x in (self.log_rate, self.rate_bias))
        rate_BTH = self.rate(x_BTD).astype(jnp.float32)
        return -like(jnp.exp(log_rate), rate_BTH) * jax.nn.softplus(rate_BTH + like(bias, rate_BTH))


def unit(x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
    """Return vectors of length 1; zeros stay zeros."""
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + EPSILON)


def run_token(q, k, v, log_decay, strength, state, precision):
    """Take one step of the recurrence.

    Args: as `run_chunks` has them, T = 1.
    Returns: (o [B, 1, J, M, V], the next state).
    """
    q, k, v, log_decay, strength = (x[:, 0] for x in (q, k, v, log_decay, strength))
    decay = jnp.exp(log_decay)[..., None]
    # Both answers in one product: the state, by far the largest array, is read once for them, and once to be changed.
    answers = jnp.einsum("bjik,bjmkv->bjmiv", jnp.stack([k, q], 2), state, precision=precision)
    change = strength[..., None] * (v - decay * answers[..., 0, :])
    out = decay * answers[..., 1, :] + (q * k).sum(-1)[..., None, None] * change
    return out[:, None], decay[..., None] * state + k[:, :, None, :, None] * change[..., None, :]


def run_chunks(
    q: Float[Array, "B T J K"],
    k: Float[Array, "B T J K"],
    v: Float[Array, "B T J M V"],
    log_decay: Float[Array, "B T J M"],
    strength: Float[Array, "B T J M"],
    state: Float[Array, "B J M K V"],
    precision: jax.lax.Precision | None,
) -> tuple[Float[Array, "B T J M V"], Float[Array, "B J M K V"]]:
    """Run tokens in chunks: products within each, and a scan over the states between them.

    Args:
      q, k: unit vectors, queries times K^-1/2. v: values. log_decay: log a_t. strength: b_t. Where all but q are 0, nothing
        happens to the state. state: before the first token. precision: of the products.
    Returns: (o, the state after the last token), float32.
    """
    T = q.shape[1]
    chunk = chunk_size(T)
    dot = functools.partial(jnp.einsum, precision=precision)

    def split(x: Array) -> Array:
        """[B, T, ...] -> [B, N, ..., C, last], or [B, N, ..., C] of numbers by head."""
        x = jnp.pad(x, ((0, 0), (0, -T % chunk)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(len(x), -1, chunk, *x.shape[2:])

    q, k = (jnp.moveaxis(split(x), 2, 3) for x in (q, k))  # BNJCK
    v, log_decay, strength = (jnp.moveaxis(split(x), 2, 4) for x in (v, log_decay, strength))  # BNJMCV, BNJMC
    faded = jnp.cumsum(log_decay, -1)  # from the chunk's start to behind each token
    between = faded[..., :, None] - faded[..., None, :]
    # What is left at token i of what token j wrote, BNJMCC.
    between = jnp.exp(jnp.where(like(jnp.tri(chunk, dtype=bool), between), between, -jnp.inf))
    # d_i = b_i (v_i - exp(faded_i) S^T k_i - sum_{j<i} between_ij (k_i . k_j) d_j): a triangular system for all d of a chunk,
    # linear in the state S before it. `inverse` solves it once, for the values and for what is taken from S.
    overlap = strength[..., None] * dot("bnjik,bnjlk->bnjil", k, k)[:, :, :, None] * between
    inverse = invert_triangular(jnp.tril(overlap, -1), precision)
    of_values = dot("bnjmil,bnjmlv->bnjmiv", inverse, strength[..., None] * v)
    of_state = dot("bnjmil,bnjmlk->bnjmik", inverse, (strength * jnp.exp(faded))[..., None] * k[:, :, :, None])
    weights = dot("bnjik,bnjlk->bnjil", q, k)[:, :, :, None] * between
    asked = q[:, :, :, None] * jnp.exp(faded)[..., None]
    kept = k[:, :, :, None] * jnp.exp(faded[..., -1:] - faded)[..., None]

    def step(state, parts):
        of_values, of_state, weights, asked, kept, decay = parts
        change = of_values - dot("bjmik,bjmkv->bjmiv", of_state, state)
        out = dot("bjmik,bjmkv->bjmiv", asked, state) + dot("bjmil,bjmlv->bjmiv", weights, change)
        return decay[..., None, None] * state + dot("bjmik,bjmiv->bjmkv", kept, change), out

    parts = (of_values, of_state, weights, asked, kept, jnp.exp(faded[..., -1]))
    state, out = jax.lax.scan(step, state, jax.tree.map(lambda x: x.swapaxes(0, 1), parts))
    out = jnp.moveaxis(out, (0, 4), (1, 2))  # NBJMCV -> BNCJMV
    return out.reshape(len(out), -1, *out.shape[3:])[:, :T], state


def chunk_size(num_tokens: int) -> int:
    """Return the tokens of a chunk in rows of so many: a power of 2."""
    return min(CHUNK_TOKENS, 1 << max(num_tokens - 1, 0).bit_length())


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def invert_triangular(below: Float[Array, "*lead C C"], precision: jax.lax.Precision | None) -> Float[Array, "*lead C C"]:
    """Invert I + below.

    Args:
      below: 0 on and above the diagonal; C is a power of 2. precision: of the products.
    Returns: the inverse, lower triangular with ones on its diagonal.
    """
    # Products alone, and few of them one after the other: solving row by row would be C steps. The inverses of two blocks on
    # the diagonal give that of the block they make up together; no power of `below`, which may be large, is ever formed.
    num = below.shape[-1]
    rows, columns = jnp.arange(num)[:, None], jnp.arange(num)[None]
    inverse = jnp.broadcast_to(jnp.eye(num, dtype=below.dtype), below.shape)
    size = 1
    while size < num:
        is_joined = (rows // (2 * size) == columns // (2 * size)) & (rows // size != columns // size)
        joined = jnp.where(like(is_joined, below), below, 0)
        inverse = inverse - jnp.matmul(inverse, jnp.matmul(joined, inverse, precision=precision), precision=precision)
        size *= 2
    return inverse


def _invert_forward(below, precision):
    inverse = invert_triangular(below, precision)
    return inverse, inverse


def _invert_backward(precision, inverse, d_inverse):
    turned = inverse.swapaxes(-1, -2)
    d_below = -jnp.matmul(turned, jnp.matmul(d_inverse, turned, precision=precision), precision=precision)
    return (jnp.tril(d_below, -1),)


invert_triangular.defvjp(_invert_forward, _invert_backward)
