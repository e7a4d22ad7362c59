"""x W^T, in the order of factors that the backend is quickest at; with bias and adapter, a layer's `Linear`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from grpo_jax.models.lora import LoRA
from grpo_jax.models.tiles import Tiles, in_tiles
from grpo_jax.parallel.hardware import Hardware, target_platform
from grpo_jax.parallel.sharding import in_full_over_tensor, vary_like

FEW_ROWS = 128  # measured on 2 cores: 1.6 to 2 times as fast from 2 rows on, no faster beyond 256


def project(x: Float[Array, "*lead I"], weight_OI: Float[Array, "O I"], dtype: Any = None) -> Float[Array, "*lead O"]:
    """Multiply rows by a weight matrix.

    Args:
      x: rows. weight_OI: the matrix as it is stored, of the same dtype.
      dtype: of the result and of its sums; None: x's own.
    Returns: x W^T.
    """
    # XLA's CPU products repack their right factor at every call. Of a few rows that is most of the work, so the weight goes
    # on the left. A single row is a product with a vector, where nothing is repacked; other backends do not care.
    rows, platform = x.size // x.shape[-1], target_platform()
    if rows > FEW_ROWS and platform != "gpu":  # on a TPU 3 % of an update of Qwen2.5-0.5B, by its compiler's estimate
        return _cotangent_once(jnp.einsum("...i,oi->...o", x, weight_OI, preferred_element_type=dtype))
    if platform != "cpu" or rows == 1:
        return jnp.einsum("...i,oi->...o", x, weight_OI, preferred_element_type=dtype)
    y_OB = jnp.einsum("oi,bi->ob", weight_OI, x.reshape(rows, -1), preferred_element_type=dtype)
    # Without the barrier the compiler sees a product and its transpose, and swaps the factors back.
    return jax.lax.optimization_barrier(y_OB).T.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _project_spread(x: Float[Array, "*lead I"], weight_OI: Float[Array, "O I"]) -> Float[Array, "*lead O"]:
    """Return `project` of rows whose channels the compiler may spread over the devices that have the outputs' parts."""
    # XLA:TPU would bring the rows to the weight's gradient in pieces, a product each, and put what it gets together in arrays
    # that it fills with zeros before: by its estimate 5 % of an update of Qwen2.5-7B.
    return jnp.einsum("...i,oi->...o", x, weight_OI)


def _project_spread_forward(x: Array, weight_OI: Array) -> tuple[Array, tuple[Array, Array]]:
    # The product itself and no call, so that `fsdp.REMAT` sees it.
    return jnp.einsum("...i,oi->...o", x, weight_OI), (x, weight_OI)


def _project_spread_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, weight_OI = saved
    dy = jax.lax.optimization_barrier(dy)  # as in `_cotangent_once`
    return jnp.einsum("...o,oi->...i", dy, weight_OI), jnp.einsum("...o,...i->oi", dy, in_full_over_tensor(x))


_project_spread.defvjp(_project_spread_forward, _project_spread_backward)


def head_logits(
    hidden_CD: Float[Array, "C D"], head_VD: Float[Array, "V D"], cap: float | None, tiles: Tiles | None = None
) -> Float[Array, "C V"]:
    """Compute float32 logits from hidden states.

    Args:
      hidden_CD: in the compute dtype. head_VD: the output matrix, in the compute dtype.
      cap: logits become cap * tanh(logits / cap), where the architecture says so; None: they stay as they are.
      tiles: of exact numbers; None: all rows at once.
    Returns: float32 [C, V].
    """

    def logits(head_VD: Array, hidden_CD: Array) -> Array:
        # float32 from the product on: a log-probability is a small difference of large logits, and bfloat16 would round it
        # away.
        return soft_cap(project(hidden_CD, head_VD, jnp.float32), cap)

    if tiles is None:
        return logits(head_VD, hidden_CD)
    return in_tiles(logits, tiles.rows, head_VD, hidden_CD)


def fence_vectors(tree: Any, hardware: Hardware | None) -> Any:
    """Return a tree of weights, its vectors taken out of the stacks of layers once, on accelerators. None: CPUs, which do."""
    if hardware is None:
        return tree
    # XLA:TPU would take them in the decoding loop at every token, each by an operation: 1 % of a token's estimate.
    return jax.tree.map(lambda x: jax.lax.optimization_barrier(x) if x.ndim == 1 else x, tree)


def _fence_rows(x: Float[Array, "*lead I"]) -> Float[Array, "*lead I"]:
    """Return the rows that an adapter reads."""
    # An adapter's gradient wants them with tokens last. Without the barrier XLA:TPU turned the stacks that all layers keep for
    # their backward pass, whole and once a layer: 45 % of an update of Qwen2.5-7B's adapters on v6e, by its estimate.
    return x if target_platform() == "cpu" else jax.lax.optimization_barrier(x)


def soft_cap(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """Return cap * tanh(x / cap); x itself if there is no cap."""
    if cap is None:
        return x
    return cap * jnp.tanh(x / cap)


@jax.custom_vjp
def _cotangent_once(y):
    """Return y. Its cotangent is a factor of two products, and XLA would compute it for each of them, transposed for one.

    For the gate of a SiLU that was 7 % of an update of SmolLM2's shape, as exp in the order of columns is slow.
    """
    return y


_cotangent_once.defvjp(lambda y: (y, None), lambda _, dy: (jax.lax.optimization_barrier(dy),))


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
        shards_inputs: bool = False,
        rngs: nnx.Rngs,
    ):
        """Draw the weight from N(0, scale^2 / num_in); the bias is zero.

        Args:
          scale: below 1 for what is added to the residual stream, so that its variance does not grow with the layers.
          lora: rank and scale of this matrix's adapter, or None.
          shards_inputs: the mesh axis `tensor` shards its inputs; else its outputs.
        """
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (num_out, num_in)) * (scale * num_in**-0.5))
        self.bias = nnx.Param(jnp.zeros(num_out)) if use_bias else None
        self.lora, self.shards_inputs = lora, shards_inputs
        if lora is not None:
            # Zeros, and no random numbers: their values come from `lora.init_adapters`, and the base weights must be drawn
            # alike with and without adapters.
            self.lora_a = nnx.Param(jnp.zeros((lora.rank, num_in)))
            self.lora_b = nnx.Param(jnp.zeros((num_out, lora.rank)))

    def __call__(self, x: Float[Array, "*lead I"]) -> Float[Array, "*lead O"]:
        weight_OI = self.weight[...].astype(x.dtype)
        if self._has_spread_rows(x):
            y = _project_spread(x, vary_like(weight_OI, x.ravel()[:1].astype(jnp.int32)))
        else:
            y = project(x, weight_OI)
        if self.lora is not None:
            # Two thin products: W + scale * B A would build a full matrix, and its full gradient, for each layer.
            low = project(_fence_rows(x), self.lora_a[...].astype(x.dtype))
            y = y + self.lora.scale * project(low, self.lora_b[...].astype(x.dtype))
        if self.bias is not None:
            y = y + like(self.bias[...].astype(x.dtype), y)
        return y

    def _has_spread_rows(self, x: Array) -> bool:
        if target_platform() != "tpu" or x.size // x.shape[-1] <= FEW_ROWS:
            return False
        # A weight with an adapter has no gradient.
        is_split = jax.sharding.get_abstract_mesh().shape.get("tensor", 1) > 1
        return is_split and not self.shards_inputs and self.lora is None


def joined(linears: Sequence[Linear], num_shards: int = 1) -> Linear:
    """Return one layer of the outputs of several that have no adapters, for `split_outputs` to take apart.

    Of few rows one product takes less than several. XLA:GPU makes one of them by itself, and would put their weights together
    at every call.

    Args:
      num_shards: devices that each have a part of every layer's outputs; they keep it, for the order is by their parts.
    """
    graphdef, _ = nnx.split(linears[0])
    states = [nnx.split(each)[1] for each in linears]

    def put_together(path: Any, *leaves: Array) -> Array:
        # Weights are [..., out, in] and biases [..., out], of one layer or of a stack of them.
        axis = leaves[0].ndim - (1 if "bias" in jax.tree_util.keystr(path) else 2)
        shards = [x.reshape(*x.shape[:axis], num_shards, -1, *x.shape[axis + 1 :]) for x in leaves]
        together = jnp.concatenate(shards, axis + 1)
        return together.reshape(*together.shape[:axis], -1, *together.shape[axis + 2 :])

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(put_together, states[0], *states[1:]))


def split_outputs(y: Array, sizes: Sequence[int], num_shards: int = 1, axis: int = -1) -> list[Array]:
    """Return the outputs of the layers that `joined` made one of, as many as `sizes` says; some in a row may count as one.

    axis: of y, along which they lie: channels, or whole heads of them.
    """
    lead, rest = y.shape[: axis % y.ndim], y.shape[axis % y.ndim + 1 :]
    places = [place // num_shards for place in itertools.accumulate(sizes)][:-1]
    if num_shards == 1:
        return jnp.split(y, places, len(lead))
    # The axis of shards to the front: among the others XLA:TPU lays it along the lanes, one number in each 128, where channels
    # do not fill whole tiles.
    y = jnp.moveaxis(y.reshape(*lead, num_shards, -1, *rest), len(lead), 0)
    return [jnp.moveaxis(part, 0, len(lead)).reshape(*lead, -1, *rest) for part in jnp.split(y, places, len(lead) + 1)]


def like(vector: Array, x: Array) -> Array:
    """Return an array with leading axes of size 1: the rank of x (implicit rank promotion is an error in our tests)."""
    return vector.reshape((1,) * (x.ndim - vector.ndim) + vector.shape)
