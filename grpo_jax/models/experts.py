"""A mixture of experts: a router gives each token to a few of many small MLPs (Shazeer et al., arXiv 1701.06538).

Rows are sorted by expert, and one grouped product multiplies each run of them with its expert's matrix. No expert has a limit:
no token is ever dropped, and what a token gets does not depend on the others in its batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.linear import project
from grpo_jax.models.lora import LoRA, adapter_of


class ExpertLinear(nnx.Module):
    """y = x W_e for runs of rows that share an expert e; with adapters as `Linear` has them.

    W is [E, in, out], where Hugging Face stores each expert's [out, in]: TPUs' grouped products read it so, and would copy the
    other order at every call. Adapters, which are small, are in the order of all others.
    """

    def __init__(
        self,
        num_experts: int,
        num_in: int,
        num_out: int,
        *,
        scale: float = 1.0,
        lora: LoRA | None = None,
        rngs: nnx.Rngs,
    ):
        """Draw the weights from N(0, scale^2 / num_in).

        Args:
          scale: as in `Linear`. lora: rank and scale of each expert's adapter, or None.
        """
        draw = jax.random.normal(rngs.params(), (num_experts, num_in, num_out))
        self.weight = nnx.Param(draw * (scale * num_in**-0.5))
        self.lora = lora
        if lora is not None:
            self.lora_a = nnx.Param(jnp.zeros((num_experts, lora.rank, num_in)))
            self.lora_b = nnx.Param(jnp.zeros((num_experts, num_out, lora.rank)))

    def __call__(self, x_MI: Float[Array, "M I"], sizes_E: Int[Array, " E"]) -> Float[Array, "M O"]:
        """Multiply.

        Args:
          x_MI: rows, sorted by expert. sizes_E: how many of them each expert has.
        """
        y = grouped_product(x_MI, self.weight[...], sizes_E)
        if self.lora is None:
            return y
        low = grouped_product(x_MI, self.lora_a[...].swapaxes(1, 2), sizes_E)
        return y + self.lora.scale * grouped_product(low, self.lora_b[...].swapaxes(1, 2), sizes_E)


def grouped_product(
    x_MI: Float[Array, "M I"], weight_EIO: Float[Array, "E I O"], sizes_E: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """Multiply each run of rows with its expert's matrix.

    Args:
      x_MI: rows, sorted by expert. weight_EIO: the matrices. sizes_E: the lengths of the runs, M in all.
    Returns: in the dtype of x_MI.
    """
    return jax.lax.ragged_dot(x_MI, weight_EIO.astype(x_MI.dtype), sizes_E)


class Router(nnx.Module):
    """The choice of a token's experts, and their weights: the most probable ones of a softmax over all."""

    def __init__(self, arch: Architecture, *, rngs: nnx.Rngs):
        self.arch = arch
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (arch.num_experts, arch.dim)) * arch.dim**-0.5)

    def __call__(self, x_MD: Float[Array, "M D"]) -> tuple[Float[Array, "M k"], Int[Array, "M k"]]:
        """Return (the chosen experts' weights, float32; their numbers), the most probable first."""
        # float32 from the product on: in bfloat16 many experts of 128 would be equally probable, and which of them are taken
        # would be an accident of rounding, another one in the sampler than in the learner.
        logits_ME = project(x_MD, self.weight[...].astype(x_MD.dtype), jnp.float32)
        weight_Mk, chosen_Mk = jax.lax.top_k(jax.nn.softmax(logits_ME, -1), self.arch.experts_per_token)
        if self.arch.is_router_normalised:
            weight_Mk = weight_Mk / weight_Mk.sum(-1, keepdims=True)
        return weight_Mk, chosen_Mk


class Experts(nnx.Module):
    """The sum of a token's experts, each a gated MLP, times their weights."""

    def __init__(
        self,
        arch: Architecture,
        activation: Callable[[Any], Any],
        *,
        lora: LoRA | None = None,
        rngs: nnx.Rngs,
    ):
        """Draw router and experts.

        Args:
          arch: gives their numbers and sizes. activation: of the gate. lora: adapters of the experts' matrices, or None.
        """
        self.arch, self.activation = arch, activation
        E, D, F = arch.num_experts, arch.dim, arch.ffn_dim
        adapter = functools.partial(adapter_of, lora)
        self.router = Router(arch, rngs=rngs)
        self.expert_gate = ExpertLinear(E, D, F, lora=adapter("gate_proj"), rngs=rngs)
        self.expert_up = ExpertLinear(E, D, F, lora=adapter("up_proj"), rngs=rngs)
        scale = (2 * arch.num_layers) ** -0.5
        self.expert_down = ExpertLinear(E, F, D, scale=scale, lora=adapter("down_proj"), rngs=rngs)

    def __call__(self, x: Float[Array, "*lead D"]) -> tuple[Float[Array, "*lead D"], Int[Array, "*lead k"]]:
        """Return (the output, the numbers of each token's experts)."""
        E, k = self.arch.num_experts, self.arch.experts_per_token
        x_MD = x.reshape(-1, x.shape[-1])
        weight_Mk, chosen_Mk = self.router(x_MD)
        chosen = chosen_Mk.reshape(-1)
        order = jnp.argsort(chosen)
        sizes_E = count_choices(chosen, None, E)
        # A permutation of the rows' copies, and its inverse: gradients are then gathered too, and sums over a token's experts
        # are in one order, where a scatter would add in any.
        rows = _permute(jnp.repeat(x_MD, k, axis=0), order)
        gated = self.activation(self.expert_gate(rows, sizes_E)) * self.expert_up(rows, sizes_E)
        y_MkD = _permute(self.expert_down(gated, sizes_E), jnp.argsort(order)).reshape(-1, k, x.shape[-1])
        y_MD = (y_MkD.astype(jnp.float32) * weight_Mk[..., None]).sum(1).astype(x.dtype)
        return y_MD.reshape(x.shape), chosen_Mk.reshape(*x.shape[:-1], k)


@jax.custom_vjp
def _permute(x: Array, order: Array) -> Array:
    """Return x[order], for a permutation of the rows; its derivative is the inverse permutation."""
    return x[order]


_permute.defvjp(lambda x, order: (x[order], order), lambda order, dy: (dy[jnp.argsort(order)], None))


def count_choices(chosen: Int[Array, "*any"], is_token: Array | None, num_experts: int) -> Int[Array, " E"]:
    """Count how often each expert was chosen.

    Args:
      chosen: numbers of experts, of any shape, or [*lead, k] with is_token. is_token: [*lead], True (or not 0) on tokens,
        False on padding, which is not counted; None: all are. num_experts: E.
    Returns: int32.
    """
    # Compared and summed in one pass: a scatter would be slower on accelerators.
    is_chosen = chosen[..., None] == jnp.arange(num_experts).reshape((1,) * chosen.ndim + (-1,))
    if is_token is not None:
        is_chosen &= (is_token != 0)[..., None, None]
    return is_chosen.reshape(-1, num_experts).sum(0, dtype=jnp.int32)
