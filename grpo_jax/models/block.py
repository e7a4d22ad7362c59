"""One layer of a decoder: attention or another mixer of tokens, and an MLP or experts."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.attention import Attention, AttentionView, KVCache
from grpo_jax.models.experts import Experts
from grpo_jax.models.gated_delta import DeltaState, GatedDelta
from grpo_jax.models.linear import Linear, joined, split_outputs
from grpo_jax.models.lora import LoRA, adapter_of
from grpo_jax.models.norms import norm_if, scaled
from grpo_jax.models.rope import RopeTables

ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)): SwiGLU, or GeGLU."""

    def __init__(self, arch: Architecture, *, lora: LoRA | None = None, rngs: nnx.Rngs):
        self.arch = arch
        adapter = functools.partial(adapter_of, lora)
        self.gate = Linear(arch.dim, arch.ffn_dim, lora=adapter("gate_proj"), rngs=rngs)
        self.up: Linear | None = Linear(arch.dim, arch.ffn_dim, lora=adapter("up_proj"), rngs=rngs)
        self.num_shards = 1  # of a joined product
        scale = (2 * arch.num_layers) ** -0.5
        self.down = Linear(arch.ffn_dim, arch.dim, scale=scale, lora=adapter("down_proj"), shards_inputs=True, rngs=rngs)

    def __call__(self, x: Float[Array, "*lead D"]) -> tuple[Float[Array, "*lead D"], None]:
        if self.up is None:  # `join`
            gate, up = split_outputs(self.gate(x), (self.arch.ffn_dim,) * 2, self.num_shards)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(ACTIVATIONS[self.arch.activation](gate) * up), None

    def join(self, num_shards: int) -> None:
        """Make one product of those of gate and up, if none has an adapter. num_shards: as in `joined`."""
        products = [each for each in (self.gate, self.up) if each is not None]
        if not any(each.lora for each in products):
            self.gate, self.up, self.num_shards = joined(products, num_shards), None, num_shards


def _experts(arch: Architecture, *, lora: LoRA | None = None, rngs: nnx.Rngs) -> Experts:
    return Experts(arch, ACTIVATIONS[arch.activation], lora=lora, rngs=rngs)


# `Architecture.mlp` -> what makes it. It returns its output, and the numbers of each token's experts if it has such.
MLPS = {"dense": MLP, "experts": _experts}
# Each of `Architecture.mixers` -> what makes it: the part of a layer in which tokens meet. It returns its output, and what it
# keeps of the tokens for later ones.
MIXERS: dict[str, Any] = {"attention": Attention, "gated_delta": GatedDelta}
Kept = KVCache | DeltaState


class Block(nnx.Module):
    """One layer. What enters attention and MLP is normed (`pre_norms`), or what they add (`post_norms`), or both."""

    def __init__(self, arch: Architecture, kind: str = "attention", *, lora: LoRA | None = None, rngs: nnx.Rngs):
        """Draw fresh parameters.

        Args:
          arch: the decoder's. kind: a key of MIXERS; whichever it is, it is called `attn`. lora: the adapters, or None.
        """
        self.attn_norm = norm_if(arch.pre_norms, arch.dim, arch)
        self.attn = MIXERS[kind](arch, lora=lora, rngs=rngs)
        self.attn_post_norm = norm_if(arch.post_norms, arch.dim, arch)
        self.mlp_norm = norm_if(arch.pre_norms, arch.dim, arch)
        self.mlp = MLPS[arch.mlp](arch, lora=lora, rngs=rngs)
        self.mlp_post_norm = norm_if(arch.post_norms, arch.dim, arch)
        self.residual_scale = arch.residual_scale

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        view: AttentionView,
        prefix: Kept | None = None,
        cache: Kept | None = None,
        slot: int | Int[Array, "..."] = 0,
    ) -> tuple[Float[Array, "B T D"], Kept, Int[Array, "B T k"] | None]:
        """Run the layer.

        Args: as `Attention.__call__` or `GatedDelta.__call__` has them; x_BTD is the residual stream.
        Returns: (the residual stream after the layer, what its kind keeps of the tokens, its tokens' experts or None).
        """
        attn_BTD, kept = self.attn(self.attn_norm(x_BTD), view, prefix, cache, slot)
        x_BTD, chosen_BTk = self._add(x_BTD, attn_BTD)
        return x_BTD, kept, chosen_BTk

    def join(self, *, has_kernel: bool, num_shards: int) -> Block:
        """Return the layer with products of the same rows made one, for decoding.

        Its weights may be those of a stack of layers. has_kernel: what attends to the rows' newest tokens is one.
        num_shards: the devices of `tensor`.
        """
        block = nnx.merge(*nnx.split(self))
        if isinstance(block.mlp, MLP):
            block.mlp.join(num_shards)
        # Without, the caches' layouts decide: by XLA:TPU's estimate a token of Qwen2.5-0.5B takes a tenth less with completions
        # of 1,024 tokens, and of smaller decoders a quarter more with 256.
        if has_kernel and isinstance(block.attn, Attention):
            block.attn.join(num_shards)
        return block

    def enter(self, x_BTD: Array, rope: RopeTables, query_scale: Array | None) -> tuple[Array, Array, Array, Array | None]:
        """Return what `Attention.project` does, of the residual stream: what a row does by itself before attention."""
        return self.attn.project(self.attn_norm(x_BTD), rope, query_scale)

    def leave(
        self, x_BTD: Array, out_BTNH: Float[Array, "B T N H"], gate_BTNH: Float[Array, "B T N H"] | None
    ) -> tuple[Array, Int[Array, "B T k"] | None]:
        """Return (the residual stream with the heads' outputs and the MLP's, the tokens' experts or None)."""
        return self._add(x_BTD, self.attn.close(out_BTNH, gate_BTNH))

    def _add(self, x_BTD: Array, attn_BTD: Array) -> tuple[Array, Int[Array, "B T k"] | None]:
        """Add what attention gives to the residual stream, then what the MLP makes of that."""
        x_BTD = x_BTD + scaled(self.attn_post_norm(attn_BTD), self.residual_scale)
        mlp_BTD, chosen_BTk = self.mlp(self.mlp_norm(x_BTD))
        return x_BTD + scaled(self.mlp_post_norm(mlp_BTD), self.residual_scale), chosen_BTk
