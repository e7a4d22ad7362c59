"""One decoder for Llama, Qwen2/2.5 and Qwen3: grouped-query attention, RoPE, RMSNorm, SwiGLU.

A prompt is run once; its keys and values (the *prefix*) are attended to by all G completions of it without a copy, in the
rollout and in the update alike. Linear weights are [out, in] and the head is [V, D], as Hugging Face stores them: nothing
is transposed on loading, and on a CPU decoding reads memory in order. The L layers are stacked on a leading axis.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.models.lora import LoRA, attach
from grpo_jax.types import Params

MAX_UNROLLED = 4  # so few layers are unrolled: a scan would stack and copy what the backward pass needs
NEVER = -1e30  # a masked attention score: finite, so that a row with nothing to attend to stays finite


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of a decoder: what a Hugging Face config.json says, in our words."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False


@flax.struct.dataclass
class KVCache:
    """Keys (rotated) and values of all layers, each [L, B, U, K, H] (or one layer's slice of it)."""

    k: Any
    v: Any


@flax.struct.dataclass
class Prefix:
    """A prompt as its completions see it: cache over [P, S], mask_PS (True on real tokens), lengths_P in tokens."""

    cache: KVCache
    mask_PS: Any
    lengths_P: Any


class Linear(nnx.Module):
    """y = x W^T (+ b), W stored [out, in]; with adapters (`lora.attach`) also + scale * (x A^T) B^T."""

    def __init__(self, num_in: int, num_out: int, *, use_bias: bool = False, scale: float = 1.0, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (num_out, num_in)) * (scale * num_in**-0.5))
        self.bias = nnx.Param(jnp.zeros(num_out)) if use_bias else None
        self.lora_a: nnx.Param | None = nnx.data(None)  # filled by `lora.attach`
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.lora_scale = 0.0

    def __call__(self, x):
        y = jnp.einsum("...i,oi->...o", x, self.weight[...].astype(x.dtype))
        if self.lora_a is not None and self.lora_b is not None:
            low = jnp.einsum("...i,ri->...r", x, self.lora_a[...].astype(x.dtype))
            y = y + self.lora_scale * jnp.einsum("...r,or->...o", low, self.lora_b[...].astype(x.dtype))
        return y if self.bias is None else y + _like(self.bias[...].astype(x.dtype), y)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, the statistics in float32."""

    def __init__(self, dim: int, eps: float):
        self.weight = nnx.Param(jnp.ones(dim))
        self.eps = eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * _like(self.weight[...].astype(x.dtype), x)


class Attention(nnx.Module):
    """Causal grouped-query attention over a row's own tokens and, where given, its prompt's prefix."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.arch = arch
        q_dim, kv_dim = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q = Linear(arch.dim, q_dim, use_bias=arch.qkv_bias, rngs=rngs)
        self.k = Linear(arch.dim, kv_dim, use_bias=arch.qkv_bias, rngs=rngs)
        self.v = Linear(arch.dim, kv_dim, use_bias=arch.qkv_bias, rngs=rngs)
        self.o = Linear(q_dim, arch.dim, scale=(2 * arch.num_layers) ** -0.5, rngs=rngs)
        self.q_norm = RMSNorm(arch.head_dim, arch.norm_eps) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch.norm_eps) if arch.qk_norm else None

    def __call__(self, x_BTD, rope, mask_BTU, prefix: Prefix | None, cache: KVCache | None, slot):
        """-> (output_BTD, this call's keys and values, or `cache` with them written from `slot` on)."""
        heads = (*x_BTD.shape[:2], -1, self.arch.head_dim)
        q_BTNH, k_BTKH, v_BTKH = (proj(x_BTD).reshape(heads) for proj in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        own = KVCache(rotate(k_BTKH, rope), v_BTKH)
        if cache is not None:
            own = jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, slot, 0, 0)), cache, own)
        out_BTNH = attend(rotate(q_BTNH, rope), own, mask_BTU, prefix)
        return self.o(out_BTNH.reshape(*x_BTD.shape[:2], -1)), own


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.gate = Linear(arch.dim, arch.ffn_dim, rngs=rngs)
        self.up = Linear(arch.dim, arch.ffn_dim, rngs=rngs)
        self.down = Linear(arch.ffn_dim, arch.dim, scale=(2 * arch.num_layers) ** -0.5, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm layer."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(arch.dim, arch.norm_eps)
        self.attn = Attention(arch, rngs=rngs)
        self.mlp_norm = RMSNorm(arch.dim, arch.norm_eps)
        self.mlp = MLP(arch, rngs=rngs)

    def __call__(self, x_BTD, rope, mask_BTU, prefix: Prefix | None = None, cache: KVCache | None = None, slot=0):
        attn_BTD, kv = self.attn(self.attn_norm(x_BTD), rope, mask_BTU, prefix, cache, slot)
        x_BTD = x_BTD + attn_BTD
        return x_BTD + self.mlp(self.mlp_norm(x_BTD)), kv


class Decoder(nnx.Module):
    """Token ids -> final hidden states. The head is applied elsewhere, in chunks (`grpo_jax.logprobs`)."""

    def __init__(self, arch: Architecture, *, dtype: Any = jnp.float32, remat: bool = False, rngs: nnx.Rngs):
        self.arch, self.dtype, self.remat = arch, jnp.dtype(dtype), remat
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (arch.vocab_size, arch.dim)) * 0.02)
        self.layers = nnx.vmap(lambda r: Block(arch, rngs=r))(rngs.split(arch.num_layers))
        self.final_norm = RMSNorm(arch.dim, arch.norm_eps)
        self.head = (
            None
            if arch.tie_embeddings
            else nnx.Param(jax.random.normal(rngs.params(), (arch.vocab_size, arch.dim)) * arch.dim**-0.5)
        )

    @property
    def head_VD(self):
        """The output matrix, in the compute dtype."""
        return (self.embed if self.head is None else self.head)[...].astype(self.dtype)

    def __call__(self, tokens_BT, mask_BT, prefix: Prefix | None = None, *, return_cache: bool = False):
        """Full causal forward.

        Args:
          tokens_BT: int. mask_BT: bool, False on padding (either side). prefix: the prompts of P = B / G rows each, if
            these tokens continue prompts.
        Returns:
          hidden_BTD after the final norm (rubbish, but finite, on padding), and a KVCache [L, B, T, K, H] or None.
        """
        mask_BT = mask_BT.astype(bool)
        positions_BT = jnp.maximum(jnp.cumsum(mask_BT, -1) - 1, 0)
        if prefix is not None:
            positions_BT = positions_BT + jnp.repeat(prefix.lengths_P, len(tokens_BT) // len(prefix.lengths_P))[:, None]
        rope = rope_tables(positions_BT, self.arch)
        causal_TT = jnp.tril(jnp.ones((tokens_BT.shape[1],) * 2, bool))
        mask_BTU = causal_TT[None] & mask_BT[:, None, :]
        graphdef, stacked = nnx.split(self.layers)

        def layer(x_BTD, weights_and_prefix):
            weights, prefix_cache = weights_and_prefix
            its_prefix = None if prefix is None else dataclasses.replace(prefix, cache=prefix_cache)
            x_BTD, kv = nnx.merge(graphdef, weights)(x_BTD, rope, mask_BTU, its_prefix)
            return x_BTD, kv if return_cache else None

        layer = jax.checkpoint(layer, prevent_cse=False) if self.remat else layer
        xs = (stacked, None if prefix is None else prefix.cache)
        unroll = self.arch.num_layers if self.arch.num_layers <= MAX_UNROLLED else 1
        hidden_BTD, cache = jax.lax.scan(layer, self.embed[...].astype(self.dtype)[tokens_BT], xs, unroll=unroll)
        return self.final_norm(hidden_BTD), cache

    def encode_prompts(self, tokens_PS, mask_PS):
        """Left-padded prompts -> (hidden_PD at each prompt's last token, Prefix)."""
        hidden_PSD, cache = self(tokens_PS, mask_PS, return_cache=True)
        assert cache is not None
        return hidden_PSD[:, -1], Prefix(cache, mask_PS.astype(bool), mask_PS.astype(jnp.int32).sum(-1))

    def unstacked_layers(self) -> list[Any]:
        """The layers' weights one by one: slicing them inside a decode loop would copy them at every token."""
        _, stacked = nnx.split(self.layers)
        return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(self.arch.num_layers)]

    def decode_step(self, layers: list[Any], caches: list[KVCache], tokens_B, slot, prefix: Prefix):
        """One token a row, written to cache slot `slot` (the same for all rows).

        Args:
          layers: from `unstacked_layers`. caches: one [B, U, K, H] pair a layer. tokens_B: the tokens at `slot`.
        Returns: hidden_BD, and the caches with slot `slot` filled.
        """
        group_size = len(tokens_B) // len(prefix.lengths_P)
        rope = rope_tables(jnp.repeat(prefix.lengths_P, group_size)[:, None] + slot, self.arch)
        mask_11U = (jnp.arange(caches[0].k.shape[1]) <= slot)[None, None]
        graphdef, _ = nnx.split(self.layers)
        x_B1D = self.embed[...].astype(self.dtype)[tokens_B][:, None]
        filled = []
        for i, (weights, cache) in enumerate(zip(layers, caches, strict=True)):
            its_prefix = dataclasses.replace(prefix, cache=KVCache(prefix.cache.k[i], prefix.cache.v[i]))
            x_B1D, cache = nnx.merge(graphdef, weights)(x_B1D, rope, mask_11U, its_prefix, cache, slot)
            filled.append(cache)
        return self.final_norm(x_B1D)[:, 0], filled


def attend(q_BTNH, own: KVCache, mask_BTU, prefix: Prefix | None = None):
    """Softmax attention over a row's own keys and its prompt's keys, as one softmax over both.

    Args:
      q_BTNH: queries. own: keys/values [B, U, K, H] where N is a multiple of K. mask_BTU: bool, broadcastable over B.
      prefix: one layer's [P, S, K, H]; rows p*G .. p*G+G-1 see prompt p. The two score blocks share their maximum and
        their sum, so nothing is concatenated and no prompt is repeated.
    """
    B, T, N, H = q_BTNH.shape
    K = own.k.shape[2]
    q_BTKRH = q_BTNH.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q_BTNH.dtype)
    f32 = {"preferred_element_type": jnp.float32}
    own_BKRTU = jnp.einsum("btkrh,bukh->bkrtu", q_BTKRH, own.k, **f32)
    own_BKRTU = jnp.where(mask_BTU[:, None, None], own_BKRTU, NEVER)
    top = own_BKRTU.max(-1, keepdims=True)
    if prefix is None:
        p_BKRTU = jnp.exp(own_BKRTU - jax.lax.stop_gradient(top))
        total = p_BKRTU.sum(-1)
        out = jnp.einsum("bkrtu,bukh->btkrh", p_BKRTU.astype(own.v.dtype), own.v, **f32)
    else:
        P = len(prefix.lengths_P)
        q_PGTKRH = q_BTKRH.reshape(P, B // P, *q_BTKRH.shape[1:])
        pre_PGKRTS = jnp.einsum("pgtkrh,pskh->pgkrts", q_PGTKRH, prefix.cache.k, **f32)
        pre_PGKRTS = jnp.where(prefix.mask_PS[:, None, None, None, None], pre_PGKRTS, NEVER)
        top = jax.lax.stop_gradient(jnp.maximum(top, pre_PGKRTS.max(-1, keepdims=True).reshape(top.shape)))
        p_BKRTU = jnp.exp(own_BKRTU - top)
        p_PGKRTS = jnp.exp(pre_PGKRTS - top.reshape(*pre_PGKRTS.shape[:-1], 1))
        total = p_BKRTU.sum(-1) + p_PGKRTS.sum(-1).reshape(p_BKRTU.shape[:-1])
        out = jnp.einsum("bkrtu,bukh->btkrh", p_BKRTU.astype(own.v.dtype), own.v, **f32)
        out_prefix = jnp.einsum("pgkrts,pskh->pgtkrh", p_PGKRTS.astype(own.v.dtype), prefix.cache.v, **f32)
        out = out + out_prefix.reshape(out.shape)
    out = out / total.transpose(0, 3, 1, 2)[..., None]
    return out.reshape(B, T, N, H).astype(q_BTNH.dtype)


def rope_tables(positions_BT, arch: Architecture):
    """Rotary position embedding (Su et al., arXiv 2104.09864): float32 (cos, sin), each [B, T, 1, H/2]."""
    inverse = arch.rope_theta ** (-jnp.arange(0, arch.head_dim, 2, dtype=jnp.float32) / arch.head_dim)
    angles = positions_BT.astype(jnp.float32)[..., None] * inverse[None, None]
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x_BTNH, rope):
    """Apply RoPE in the half-split layout (channel i pairs with channel i + H/2)."""
    cos, sin = (table.astype(x_BTNH.dtype) for table in rope)
    left, right = jnp.split(x_BTNH, 2, -1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def _like(vector, x):
    """A vector with leading axes of size 1, for the same rank as x (implicit rank promotion is an error in our tests)."""
    return vector.reshape((1,) * (x.ndim - 1) + vector.shape)


def init_params(arch: Architecture, key) -> Params:
    """Fresh float32 parameters as a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(Decoder(arch, rngs=nnx.Rngs(key)), nnx.Param))


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """The static half of a model: hashable, so a jitted function can take it as a static argument."""

    arch: Architecture
    dtype: str = "float32"
    remat: bool = False
    lora: LoRA | None = None

    def bind(self, params: Params) -> Decoder:
        """The decoder with these parameters (cheap: call it inside the traced function)."""
        return nnx.merge(nnx.graphdef(self._abstract()), nnx.State(params))

    def param_shapes(self) -> Params:
        """The tree that `bind` takes, adapters included, as shapes."""
        return nnx.to_pure_dict(nnx.state(self._abstract(), nnx.Param))

    def _abstract(self) -> Decoder:
        def build() -> Decoder:
            decoder = Decoder(self.arch, dtype=self.dtype, remat=self.remat, rngs=nnx.Rngs(0))
            if self.lora is not None:
                attach(decoder, self.lora)
            return decoder

        return nnx.eval_shape(build)
