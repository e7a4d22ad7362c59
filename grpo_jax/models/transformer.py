"""One decoder for all families of `families.py`: grouped-query attention, RoPE, RMSNorm, a gated MLP.

A prompt is run once; its keys and values (the *prefix*) are attended to by all G completions of it without a copy, in the
rollout and in the update alike. Linear weights are [out, in] and the head is [V, D], as Hugging Face stores them: nothing
is transposed on loading, and on a CPU decoding reads memory in order. The L layers are stacked on a leading axis.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.attention import AttentionView, KVCache, Prefix, attend, make_views, rotate, select_view
from grpo_jax.models.fsdp import GatherLayer, all_gather_params, apply_remat, make_layer_gather
from grpo_jax.models.linear import project
from grpo_jax.models.lora import LoRA, adapter_of
from grpo_jax.types import Params

MAX_UNROLLED = 4  # so few layers are unrolled: a scan would stack and copy what the backward pass needs
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class Linear(nnx.Module):
    """y = x W^T (+ b), W stored [out, in]; with an adapter also + alpha / rank * (x A^T) B^T."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        use_bias: bool = False,
        scale: float = 1.0,
        lora: LoRA | None = None,
        rngs: nnx.Rngs,
    ):
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (num_out, num_in)) * (scale * num_in**-0.5))
        self.bias = nnx.Param(jnp.zeros(num_out)) if use_bias else None
        self.lora = lora
        if lora is not None:  # zeros: their values come with the parameters (`lora.init_adapters`)
            self.lora_a = nnx.Param(jnp.zeros((lora.rank, num_in)))
            self.lora_b = nnx.Param(jnp.zeros((num_out, lora.rank)))

    def __call__(self, x):
        y = project(x, self.weight[...].astype(x.dtype))
        if self.lora is not None:
            low = project(x, self.lora_a[...].astype(x.dtype))
            y = y + self.lora.scale * project(low, self.lora_b[...].astype(x.dtype))
        return y if self.bias is None else y + _like(self.bias[...].astype(x.dtype), y)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight over the last axis, the statistics in float32."""

    def __init__(self, dim: int, arch: Architecture):
        self.weight = nnx.Param(jnp.zeros(dim) if arch.norm_plus_one else jnp.ones(dim))
        self.eps, self.plus_one = arch.norm_eps, arch.norm_plus_one

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        if self.plus_one:
            return (normed * _like(1 + self.weight[...].astype(jnp.float32), x)).astype(x.dtype)
        return normed.astype(x.dtype) * _like(self.weight[...].astype(x.dtype), x)


class Attention(nnx.Module):
    """Causal grouped-query attention over a row's own tokens and, where given, its prompt's prefix."""

    def __init__(self, arch: Architecture, *, lora: LoRA | None = None, rngs: nnx.Rngs):
        self.arch = arch
        adapter = functools.partial(adapter_of, lora)
        q_dim, kv_dim = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
        self.q = Linear(arch.dim, q_dim, use_bias=arch.qkv_bias, lora=adapter("q_proj"), rngs=rngs)
        self.k = Linear(arch.dim, kv_dim, use_bias=arch.qkv_bias, lora=adapter("k_proj"), rngs=rngs)
        self.v = Linear(arch.dim, kv_dim, use_bias=arch.qkv_bias, lora=adapter("v_proj"), rngs=rngs)
        self.o = Linear(q_dim, arch.dim, scale=(2 * arch.num_layers) ** -0.5, lora=adapter("o_proj"), rngs=rngs)
        self.q_norm = RMSNorm(arch.head_dim, arch) if arch.qk_norm else None
        self.k_norm = RMSNorm(arch.head_dim, arch) if arch.qk_norm else None

    def __call__(self, x_BTD, view: AttentionView, prefix: KVCache | None, cache: KVCache | None, slot):
        """-> (output_BTD, this call's keys and values, or `cache` with them written from `slot` on)."""
        heads = (*x_BTD.shape[:2], -1, self.arch.head_dim)
        q_BTNH, k_BTKH, v_BTKH = (proj(x_BTD).reshape(heads) for proj in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        own = KVCache.of(rotate(k_BTKH, view.rope), v_BTKH)
        own = own if cache is None else cache.update(own, slot)
        scale = self.arch.head_dim**-0.5 if self.arch.query_scale is None else self.arch.query_scale
        out_BTNH = attend(rotate(q_BTNH, view.rope), own, view, prefix, scale)
        return self.o(out_BTNH.reshape(*x_BTD.shape[:2], -1)), own


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU, or GeGLU."""

    def __init__(self, arch: Architecture, *, lora: LoRA | None = None, rngs: nnx.Rngs):
        self.arch = arch
        adapter = functools.partial(adapter_of, lora)
        self.gate = Linear(arch.dim, arch.ffn_dim, lora=adapter("gate_proj"), rngs=rngs)
        self.up = Linear(arch.dim, arch.ffn_dim, lora=adapter("up_proj"), rngs=rngs)
        self.down = Linear(arch.ffn_dim, arch.dim, scale=(2 * arch.num_layers) ** -0.5, lora=adapter("down_proj"), rngs=rngs)

    def __call__(self, x):
        return self.down(ACTIVATIONS[self.arch.activation](self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One pre-norm layer; with `post_norms` what it adds is normed too."""

    def __init__(self, arch: Architecture, *, lora: LoRA | None = None, rngs: nnx.Rngs):
        self.attn_norm = RMSNorm(arch.dim, arch)
        self.attn = Attention(arch, lora=lora, rngs=rngs)
        self.attn_post_norm = RMSNorm(arch.dim, arch) if arch.post_norms else None
        self.mlp_norm = RMSNorm(arch.dim, arch)
        self.mlp = MLP(arch, lora=lora, rngs=rngs)
        self.mlp_post_norm = RMSNorm(arch.dim, arch) if arch.post_norms else None

    def __call__(self, x_BTD, view: AttentionView, prefix: KVCache | None = None, cache: KVCache | None = None, slot=0):
        attn_BTD, kv = self.attn(self.attn_norm(x_BTD), view, prefix, cache, slot)
        x_BTD = x_BTD + (attn_BTD if self.attn_post_norm is None else self.attn_post_norm(attn_BTD))
        mlp_BTD = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + (mlp_BTD if self.mlp_post_norm is None else self.mlp_post_norm(mlp_BTD)), kv


class Decoder(nnx.Module):
    """Token ids -> final hidden states. The head is applied elsewhere, in chunks (`grpo_jax.learner.logprobs`)."""

    def __init__(
        self,
        arch: Architecture,
        *,
        dtype: Any = jnp.float32,
        remat: str = "none",
        lora: LoRA | None = None,
        gather: GatherLayer | None = None,
        rngs: nnx.Rngs,
    ):
        """Draw fresh parameters.

        Args:
          dtype: of the computation; parameters are float32. remat: a key of `fsdp.REMAT`.
          lora: the adapters of each layer, or None. gather: makes a layer's sharded weights full, or None where they are.
        """
        self.arch, self.dtype, self.remat, self.gather = arch, jnp.dtype(dtype), remat, gather
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (arch.vocab_size, arch.dim)) * 0.02)
        self.layers = nnx.vmap(lambda r: Block(arch, lora=lora, rngs=r))(rngs.split(arch.num_layers))
        self.final_norm = RMSNorm(arch.dim, arch)
        self.head = (
            None
            if arch.tie_embeddings
            else nnx.Param(jax.random.normal(rngs.params(), (arch.vocab_size, arch.dim)) * arch.dim**-0.5)
        )

    @property
    def head_VD(self):
        """The output matrix, in the compute dtype."""
        return (self.embed if self.head is None else self.head)[...].astype(self.dtype)

    @property
    def logit_cap(self) -> float | None:
        """What the head's logits are capped at, softly (`models.linear.head_logits`); None: not at all."""
        return self.arch.logit_cap

    def embed_tokens(self, tokens):
        """What enters the first layer, [..., D] in the compute dtype."""
        x = self.embed[...].astype(self.dtype)[tokens]
        return x if self.arch.embed_scale == 1 else x * jnp.asarray(self.arch.embed_scale, self.dtype)

    def __call__(self, tokens_BT, mask_BT):
        """Full causal forward of rows by themselves.

        Args:
          tokens_BT: int. mask_BT: bool, False on padding (either side).
        Returns:
          hidden_BTD after the final norm (undefined but finite, on padding).
        """
        views = self._views(mask_BT)

        def layer(block: Block, x_BTD, is_local):
            return block(x_BTD, select_view(views, is_local))[0], None

        hidden_BTD, _ = self._scan_layers(layer, self.embed_tokens(tokens_BT))
        return self.final_norm(hidden_BTD)

    def encode_prompts(self, tokens_PS, mask_PS):
        """Left-padded prompts -> (hidden_PD at each prompt's last token, Prefix)."""
        views = self._views(mask_PS)

        def layer(block: Block, x_PSD, is_local):
            return block(x_PSD, select_view(views, is_local))

        hidden_PSD, cache = self._scan_layers(layer, self.embed_tokens(tokens_PS))
        return self.final_norm(hidden_PSD[:, -1]), Prefix.of(cache, mask_PS)

    def forward_with_prefix(self, tokens_PS, mask_PS, tokens_BT, mask_BT):
        """Left-padded prompts and the B = P * G completions on top of them, in one pass over the layers.

        -> (hidden_PD at each prompt's last token, hidden_BTD). Each prompt is run once; a layer's weights are needed, and their
        gradient is there, once.
        """
        prompt_views, views = self._views(mask_PS), self._views(mask_BT, Prefix.of(None, mask_PS))

        def layer(block: Block, x, is_local):
            x_PSD, x_BTD = x
            x_PSD, kv = block(x_PSD, select_view(prompt_views, is_local))
            x_BTD, _ = block(x_BTD, select_view(views, is_local), kv)
            return (x_PSD, x_BTD), None

        (x_PSD, x_BTD), _ = self._scan_layers(layer, (self.embed_tokens(tokens_PS), self.embed_tokens(tokens_BT)))
        return self.final_norm(x_PSD[:, -1]), self.final_norm(x_BTD)

    def _views(self, mask_BT, prefix: Prefix | None = None) -> tuple[AttentionView, AttentionView]:
        """What causal rows see, where they continue prompts also of those."""
        mask_BT = mask_BT.astype(bool)
        positions_BT = jnp.maximum(jnp.cumsum(mask_BT, -1) - 1, 0)
        if prefix is not None:
            positions_BT = positions_BT + jnp.repeat(prefix.lengths_P, len(mask_BT) // len(prefix.lengths_P))[:, None]
        causal_TT = jnp.tril(jnp.ones((mask_BT.shape[1],) * 2, bool))
        return make_views(self.arch, positions_BT, positions_BT, causal_TT[None] & mask_BT[:, None, :], prefix)

    def _scan_layers(self, layer: Callable[[Block, Any, Any], tuple[Any, Any]], x: Any) -> tuple[Any, Any]:
        """layer(block, x, is_local as `select_view` takes it) -> (x, what to keep), of one layer after the other."""
        graphdef, stacked = nnx.split(self.layers)

        def step(x, weights_and_kind):
            weights, is_local = weights_and_kind
            weights = weights if self.gather is None else self.gather(weights)
            return layer(nnx.merge(graphdef, weights), x, is_local)

        L, local = self.arch.num_layers, self.arch.local_layers
        is_unrolled = L <= MAX_UNROLLED
        step = apply_remat(step, self.remat, is_gathered=self.gather is not None, is_unrolled=is_unrolled)
        is_local_L = jnp.isin(jnp.arange(L), jnp.asarray(local)) if 0 < len(local) < L else None
        return jax.lax.scan(step, x, (stacked, is_local_L), unroll=L if is_unrolled else 1)

    def unstack_layers(self) -> list[Any]:
        """The layers' weights one by one: slicing them inside a decode loop would copy them at every token."""
        _, stacked = nnx.split(self.layers)
        return [jax.tree.map(operator.itemgetter(i), stacked) for i in range(self.arch.num_layers)]

    def decode_step(self, layers: list[Any], caches: list[KVCache], tokens_B, slot, prefix: Prefix):
        """One token a row, written to cache slot `slot` (one for all rows, or [B]).

        Args:
          layers: from `unstack_layers`. caches: one a layer. tokens_B: the tokens at `slot`.
        Returns: hidden_BD, and the caches with slot `slot` filled.
        """
        lengths_B1 = jnp.repeat(prefix.lengths_P, len(tokens_B) // len(prefix.lengths_P))[:, None]
        slots_1U, slot_B1 = jnp.arange(caches[0].num_slots)[None], jnp.reshape(slot, (-1, 1))
        mask_B1U = (slots_1U <= slot_B1)[:, None]
        views = make_views(self.arch, lengths_B1 + slot_B1, lengths_B1 + slots_1U, mask_B1U, prefix)
        graphdef, _ = nnx.split(self.layers)
        x_B1D = self.embed_tokens(tokens_B)[:, None]
        filled = []
        for i, (weights, cache) in enumerate(zip(layers, caches, strict=True)):
            its_prefix = KVCache(prefix.cache.k[i], prefix.cache.v[i])
            view = views[i in self.arch.local_layers]
            x_B1D, cache = nnx.merge(graphdef, weights)(x_B1D, view, its_prefix, cache, slot)
            filled.append(cache)
        return self.final_norm(x_B1D)[:, 0], filled


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
    remat: str = "none"
    lora: LoRA | None = None

    @property
    def remat_policy(self) -> str:
        """`remat`, decided. auto: few unrolled layers keep what they computed; a scan of many would stack it."""
        if self.remat != "auto":
            return self.remat
        return "none" if self.arch.num_layers <= MAX_UNROLLED else "dots"

    def bind(self, params: Params) -> Decoder:
        """The decoder with these parameters (cheap: call it inside the traced function).

        Where fsdp has cut them, those of the layers are gathered layer by layer, the others here.
        """
        shapes, layers = self.param_shapes(), params["layers"]
        abstract = self._abstract(make_layer_gather(layers, shapes.pop("layers"), self.dtype))
        others = all_gather_params({name: params[name] for name in shapes}, shapes, self.dtype)
        return nnx.merge(nnx.graphdef(abstract), nnx.State({**others, "layers": layers}))

    def param_shapes(self) -> Params:
        """The tree that `bind` takes, adapters included, as shapes."""
        return nnx.to_pure_dict(nnx.state(self._abstract(), nnx.Param))

    def _abstract(self, gather: GatherLayer | None = None) -> Decoder:
        """The decoder with shapes in place of its parameters."""

        def build() -> Decoder:
            remat, rngs = self.remat_policy, nnx.Rngs(0)
            return Decoder(self.arch, dtype=self.dtype, remat=remat, lora=self.lora, gather=gather, rngs=rngs)

        return nnx.eval_shape(build)
