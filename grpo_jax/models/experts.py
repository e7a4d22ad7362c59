"""A mixture of experts: a router gives each token to a few of many small MLPs (Shazeer et al., arXiv 1701.06538).

Rows are sorted by expert, and one grouped product multiplies each run of them with its expert's matrix. No expert has a limit:
no token is ever dropped, and what a token gets does not depend on the others in its batch.

On a mesh with the axis `expert` each of its devices has some of the experts. Tokens go to all of them, which add up what their
own experts say, and the sum comes back. Where a token takes k experts, nearly every one of up to k devices has one of them, so
that little travels in vain; and arrays have one size whatever the router chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.linear import project
from grpo_jax.models.lora import LoRA, adapter_of

# Tokens of all devices along `expert` are answered in parts of at least so many: with fewer, weights are read too often.
PART_TOKENS = 4096


@flax.struct.dataclass
class Routing:
    """Where a pass over prompts and completions sent its tokens.

    load_LE: float32, how many tokens each expert of each layer took, padding not counted. chosen_BTX: the experts of the
    completions' tokens, layer by layer, as `choices_of` writes them.
    """

    load_LE: Float[Any, "L E"]
    chosen_BTX: UInt[Any, "B T X"]


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
          x_MI: rows, sorted by expert. sizes_E: how many of them each expert has; what rows behind them become is undefined.
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
      x_MI: rows, sorted by expert. weight_EIO: the matrices. sizes_E: the lengths of the runs, M in all or less.
    Returns: in the dtype of x_MI; undefined behind the last run.
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
        x_MD = x.reshape(-1, x.shape[-1])
        weight_Mk, chosen_Mk = self.router(x_MD)
        if self.num_held == self.arch.num_experts:
            y_MD = self._answer(x_MD, weight_Mk, chosen_Mk)
        else:
            y_MD = self._answer_all(x_MD, weight_Mk, chosen_Mk)
        return y_MD.reshape(x.shape), chosen_Mk.reshape(*x.shape[:-1], -1)

    @property
    def num_held(self) -> int:
        """Experts whose weights this device has: a shard is known by its shape."""
        return self.expert_gate.weight.shape[0]

    def _answer(
        self, x_MD: Float[Array, "M D"], weight_Mk: Float[Array, "M k"], chosen_Mk: Int[Array, "M k"]
    ) -> Float[Array, "M D"]:
        """Add up what those of the tokens' experts say that are here.

        Args:
          x_MD: tokens. weight_Mk: of each of a token's experts. chosen_Mk: their numbers among those here; any other number is
            an expert elsewhere.
        """
        num_held, num_copies = self.num_held, chosen_Mk.size
        chosen = chosen_Mk.reshape(-1)
        chosen = jnp.where((chosen >= 0) & (chosen < num_held), chosen, num_held)  # those elsewhere are sorted behind all runs
        order, sizes_E = jnp.argsort(chosen), count_choices(chosen, None, num_held)
        place_Mk, num_own = jnp.argsort(order).reshape(chosen_Mk.shape), sizes_E.sum()

        def answer(num_rows: int) -> Float[Array, "M D"]:
            copies = order[:num_rows]
            rows = _spread(x_MD, copies, place_Mk, num_own)
            gated = self.activation(self.expert_gate(rows, sizes_E)) * self.expert_up(rows, sizes_E)
            return _collect(self.expert_down(gated, sizes_E), weight_Mk, copies, place_Mk, num_own).astype(x_MD.dtype)

        # Of all devices' tokens an even router sends a device its share. Rows for twice that many nearly always do.
        num_likely = -(-2 * num_copies * num_held // self.arch.num_experts)
        if num_likely >= num_copies:
            return answer(num_copies)
        return jax.lax.cond(num_own <= num_likely, lambda: answer(num_likely), lambda: answer(num_copies))

    def _answer_all(
        self, x_MD: Float[Array, "M D"], weight_Mk: Float[Array, "M k"], chosen_Mk: Int[Array, "M k"]
    ) -> Float[Array, "M D"]:
        """Answer the tokens of all devices along `expert` with the experts here, and add up the answers to this one's own.

        Args: this device's tokens, with the weights and numbers of their experts among all. Returns: the tokens' outputs.
        """
        num_devices = self.arch.num_experts // self.num_held
        first = jax.lax.axis_index("expert") * self.num_held
        x_AD, weight_Ak, chosen_Ak = (jax.lax.all_gather(each, "expert", tiled=True) for each in (x_MD, weight_Mk, chosen_Mk))
        y_AD = self._answer_in_parts((x_AD, weight_Ak, chosen_Ak - first), num_parts(num_devices, len(x_MD)))
        return jax.lax.psum_scatter(y_AD, "expert", tiled=True)

    def _answer_in_parts(self, tokens: tuple[Array, Array, Array], num: int) -> Float[Array, "A D"]:
        """Do what `_answer` does in so many parts, one after the other: its arrays are those of one part.

        Each of them must have room for the case that all of a token's experts are here.
        """
        if num == 1:
            return self._answer(*tokens)
        graphdef, state = nnx.split(self)
        # The weights' gradient is a sum over the parts, and in bfloat16 later ones would be rounded away.
        state = jax.tree.map(lambda weight: weight.astype(jnp.float32), state)
        parts = jax.tree.map(lambda x: x.reshape(num, -1, *x.shape[1:]), tokens)
        y = jax.lax.map(jax.checkpoint(lambda part: nnx.merge(graphdef, state)._answer(*part)), parts)
        return y.reshape(-1, y.shape[-1])


def num_parts(num_devices: int, num_tokens: int) -> int:
    """Return the number of parts that the tokens of all devices along `expert` are answered in, a divisor of the devices.

    Args:
      num_devices: along `expert`. num_tokens: of one of them.
    """
    least = max(1, num_devices * num_tokens // PART_TOKENS)
    return max(num for num in range(1, num_devices + 1) if num_devices % num == 0 and num <= least)


# Copies of tokens go to rows sorted by expert, and answers back, by two gathers that are each other's derivative: sums over a
# token's experts are then in one order, where a scatter would add in any. Copy m k + i is the one for expert i of token m.


@jax.custom_vjp
def _spread(
    x_MD: Float[Array, "M D"], copies_C: Int[Array, " C"], place_Mk: Int[Array, "M k"], num_own: Int[Array, ""]
) -> Float[Array, "C D"]:
    """Make the rows of the experts here.

    Args:
      x_MD: tokens. copies_C: of each row its copy's number. place_Mk: of each copy its row's number; it counts below num_own.
    """
    return x_MD[copies_C // place_Mk.shape[1]]


def _spread_gradient(residuals: tuple[Array, Array], d_rows_CD: Array) -> tuple[Array, None, None, None]:
    d_x_MkD = _at_places(d_rows_CD, *residuals)
    return d_x_MkD.astype(jnp.float32).sum(1).astype(d_rows_CD.dtype), None, None, None


_spread.defvjp(lambda x, copies, place, num_own: (_spread(x, copies, place, num_own), (place, num_own)), _spread_gradient)


@jax.custom_vjp
def _collect(
    y_CD: Float[Array, "C D"],
    weight_Mk: Float[Array, "M k"],
    copies_C: Int[Array, " C"],
    place_Mk: Int[Array, "M k"],
    num_own: Int[Array, ""],
) -> Float[Array, "M D"]:
    """Add up the answers to each token, times their weights, in float32.

    Args:
      y_CD: rows of answers. weight_Mk: of the answers. copies_C, place_Mk, num_own: as in `_spread`.
    """
    return (_at_places(y_CD, place_Mk, num_own).astype(jnp.float32) * weight_Mk[..., None]).sum(1)


def _collect_gradient(residuals: tuple[Array, ...], d_out_MD: Array) -> tuple[Array, Array, None, None, None]:
    y_CD, weight_Mk, copies_C, place_Mk, num_own = residuals
    weight_C1 = jnp.where(jnp.arange(len(copies_C)) < num_own, weight_Mk.reshape(-1)[copies_C], 0)[:, None]
    d_y_CD = (d_out_MD[copies_C // weight_Mk.shape[1]] * weight_C1).astype(y_CD.dtype)
    d_weight_Mk = (_at_places(y_CD, place_Mk, num_own).astype(jnp.float32) * d_out_MD[:, None]).sum(-1)
    return d_y_CD, d_weight_Mk, None, None, None


_collect.defvjp(lambda *args: (_collect(*args), args), _collect_gradient)


def _at_places(rows_CD: Array, place_Mk: Array, num_own: Array) -> Float[Array, "M k D"]:
    """Return the row of each copy; 0 for those that have none here, whose rows are undefined if they are there at all."""
    rows_MkD = rows_CD[jnp.minimum(place_Mk, len(rows_CD) - 1)]
    return jnp.where((place_Mk < num_own)[..., None], rows_MkD, 0)


def choices_of(chosen: Sequence[Int[Array, "*lead k"]], num_experts: int) -> UInt[Array, "*lead X"]:
    """Write a token's experts of all layers side by side, X = L k, in the smallest type that holds their numbers.

    One axis and not two: on TPUs an axis of k numbers would take the room of 128.
    """
    dtype = jnp.uint8 if num_experts <= 256 else jnp.uint16
    return jnp.concatenate([each.astype(dtype) for each in chosen], axis=-1)


def share_elsewhere(
    chosen_BTX: UInt[Array, "B T X"], other_BTX: UInt[Array, "B T X"], experts_per_token: int
) -> Float[Array, "B T"]:
    """Return the share of a token's experts, over all layers, that the other choice has not: 0 if both are the same sets.

    Args:
      chosen_BTX, other_BTX: as `choices_of` writes them. experts_per_token: k.
    """
    left, right = (x.reshape(*x.shape[:-1], -1, experts_per_token) for x in (chosen_BTX, other_BTX))
    is_in_both = (left[..., :, None] == right[..., None, :]).any(-1)
    return 1 - is_in_both.mean((-2, -1), dtype=jnp.float32)


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
