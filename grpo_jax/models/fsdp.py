"""Sharded weights (ZeRO stage 3; Rajbhandari et al., arXiv 1910.02054): full only while a layer uses them.

Inside `shard_map` each device of the mesh axis `fsdp` holds a shard of a matrix. A layer gathers its own before it computes;
the backward pass gathers again and scatters the summed gradient, so that it arrives sharded as well.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from grpo_jax.models.flash import SAVED_NAME
from grpo_jax.parallel.sharding import LOGICAL_AXIS_RULES, logical_axes, path_names, vary_like
from grpo_jax.types import Params

GatherLayer = Callable[[nnx.State], nnx.State]  # one layer's weights as this device holds them -> in full

# model.remat -> what the forward pass keeps for the backward pass, beside the layers' inputs. "dots" keeps products with
# weights, which are dear to repeat, and repeats those of attention, whose results grow with the square of the length; of a
# kernel that keeps no scores, what it gave is kept. "narrow" keeps of these what is no wider than what went in: an MLP's two
# wide products take most of the memory, and are a fifth of the arithmetic.
_KERNELS = jax.checkpoint_policies.save_only_these_names(SAVED_NAME)
_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(jax.checkpoint_policies.dots_with_no_batch_dims_saveable, _KERNELS)


def _narrow_products(primitive: Any, *args: Any, **params: Any) -> bool:
    """Keep what "dots" keeps, but no product that is wider than its rows."""
    if primitive.name == "dot_general":
        weight, ((_, contracted), _) = args[1], params["dimension_numbers"]
        num_in = math.prod(weight.shape[i] for i in contracted)
        if weight.size > num_in * num_in:
            return False
    return _PRODUCTS(primitive, *args, **params)


REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": _PRODUCTS,
    "narrow": _narrow_products,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def make_layer_gather(layers: Params, shapes: Params, dtype: Any) -> GatherLayer | None:
    """Return the function that gathers one layer's weights; None if none of them is sharded along `fsdp`.

    Args:
      layers: the stacked layers' parameters [L, ...], as this device holds them. shapes: the same tree, as full shapes.
      dtype: of the gathered weights.
    """
    axes = jax.tree_util.tree_map_with_path(sharded_axis, layers, shapes)
    if not jax.tree.leaves(axes):  # None is no leaf
        return None
    of_one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    return lambda weights: nnx.State(all_gather_params(nnx.to_pure_dict(weights), of_one, dtype))


def all_gather_params(shards: Params, shapes: Params, dtype: Any) -> Params:
    """Gather the leaves that are sharded along `fsdp`.

    Args:
      shards: parameters as this device holds them. shapes: the same tree, as full shapes. dtype: of the gathered ones.
    Returns: full parameters; those that were not sharded as they are, in their own dtype.
    """

    def gather_leaf(path: Any, shard: Array, shape: jax.ShapeDtypeStruct) -> Array:
        axis = sharded_axis(path, shard, shape)
        if axis is None:
            return shard
        return gather(shard, axis, tensor_spec(path_names(path), shape.shape), dtype)

    return jax.tree_util.tree_map_with_path(gather_leaf, shards, shapes)


def sharded_axis(path: Any, shard: Array, shape: jax.ShapeDtypeStruct) -> int | None:
    """Return the axis along which fsdp has made `shard` shorter than `shape`; None: it is full.

    Experts that another device has are no shard of this one's: along their axis nothing is gathered.
    """
    axes = logical_axes(path_names(path))[-shard.ndim :]
    for i, (name, here, full) in enumerate(zip(axes, shard.shape, shape.shape, strict=False)):
        if here != full and LOGICAL_AXIS_RULES.get(name or "") == "fsdp":
            return i
    return None


def tensor_spec(names: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """Return the sharding along `tensor` of one layer's parameter (or of one that belongs to no layer)."""
    # Inside shard_map over the rows `tensor` is the compiler's: arrays show their full size along it, and the only way to know
    # that it shards them is the table once more.
    num_devices = jax.sharding.get_abstract_mesh().shape["tensor"]
    if num_devices == 1:
        return PartitionSpec()
    axes = logical_axes(names)[-len(shape) :]  # without the layers' axis

    def mesh_axis(axis: str | None, size: int) -> str | None:
        if LOGICAL_AXIS_RULES.get(axis or "") == "tensor" and size % num_devices == 0:
            return "tensor"
        return None

    return PartitionSpec(*(mesh_axis(axis, size) for axis, size in zip(axes, shape, strict=False)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(shard: Float[Array, "..."], axis: int, spec: PartitionSpec, dtype: Any) -> Float[Array, "..."]:
    """Gather a matrix from the devices of `fsdp`.

    Args:
      shard: float32, this device's. axis: the one that is sharded. spec: the sharding along `tensor`.
      dtype: of the result, and of what travels.
    Returns: the full matrix. Its gradient is summed in float32 and scattered.
    """
    # A derivative of our own, because JAX's would sum the gradient in the dtype that travelled, and in bfloat16 1 + 2^-8 is 1:
    # the more devices, the more of a gradient would be lost.
    return _gather(shard, axis, spec, dtype)


def _gather(shard: Array, axis: int, spec: PartitionSpec, dtype: Any) -> Array:
    def all_gather(shard: Array) -> Array:
        return jax.lax.all_gather(shard.astype(dtype), "fsdp", axis=axis, tiled=True)

    return _shard_map_over_tensor(all_gather, spec)(shard)


def _forward(shard: Array, axis: int, spec: PartitionSpec, dtype: Any) -> tuple[Array, None]:
    return _gather(shard, axis, spec, dtype), None


def _backward(axis: int, spec: PartitionSpec, dtype: Any, _: None, d_full: Array) -> tuple[Array]:
    del dtype

    def scatter(d_full: Array) -> Array:
        return jax.lax.psum_scatter(d_full.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True)

    return (_shard_map_over_tensor(scatter, spec)(d_full),)


gather.defvjp(_forward, _backward)


def gather_columns(shard: Float[Array, "U E"]) -> Float[Array, "U D"]:
    """Gather a few rows of a matrix whose columns are spread over fsdp, without a derivative (`scatter_columns` is its)."""
    return jax.lax.all_gather(shard, "fsdp", axis=1, tiled=True)


def scatter_columns(d_rows: Float[Array, "U D"]) -> Float[Array, "U E"]:
    """Sum such rows over the devices of fsdp, each of which gets its columns of the sum. d_rows: float32."""
    return jax.lax.psum_scatter(d_rows, "fsdp", scatter_dimension=1, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(shard_VE: Float[Array, "V E"], tokens: Int[Array, "*lead"], dtype: Any) -> Float[Array, "*lead D"]:
    """Return the rows of an embedding whose columns are spread over the devices of `fsdp`, which nobody gathers.

    Args:
      shard_VE: float32, this device's columns. tokens: this device's, as many as any other's. dtype: of what travels.
    Returns: the tokens' rows in full. The gradient of the columns is summed in float32, over the tokens of all devices.
    """
    # The devices tell each other their tokens, each looks all of them up in its columns, and what it finds goes to those that
    # asked: a few thousand rows in place of a table.
    rows = shard_VE[jax.lax.all_gather(tokens, "fsdp")].astype(dtype)
    return jax.lax.all_to_all(rows, "fsdp", 0, rows.ndim - 1, tiled=True)[0]


def _look_up_forward(shard_VE: Array, tokens: Array, dtype: Any) -> tuple[Array, Any]:
    return look_up(shard_VE, tokens, dtype), (shard_VE, tokens)


def _look_up_backward(dtype: Any, residuals: Any, d_rows: Array) -> tuple[Array, None]:
    del dtype
    shard_VE, tokens = residuals
    return add_rows(vary_like(jnp.zeros(shard_VE.shape, jnp.float32), d_rows.astype(jnp.int32)), tokens, d_rows), None


def add_rows(total_VE: Float[Array, "V E"], tokens: Int[Array, "*lead"], d_rows: Float[Array, "*lead D"]) -> Array:
    """Return a float32 sum of gradients with those of the tokens' rows; as in `look_up`, or D = E where nothing is sharded."""
    if total_VE.shape[-1] == d_rows.shape[-1]:
        return total_VE.at[tokens].add(d_rows.astype(jnp.float32))
    asked = jax.lax.all_gather(tokens, "fsdp")
    d_found = jax.lax.all_to_all(d_rows[None], "fsdp", d_rows.ndim, 0, tiled=True).astype(jnp.float32)
    return total_VE.at[asked].add(d_found)


look_up.defvjp(_look_up_forward, _look_up_backward)


def _shard_map_over_tensor(function: Callable[[Any], Any], spec: PartitionSpec) -> Callable[[Any], Any]:
    """Run on each device's own shard along `tensor`: the compiler alone would gather that axis first."""
    if "tensor" not in spec:
        return function
    return jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names={"tensor"})


def apply_remat(layer: Callable[..., Any], remat: str, *, is_gathered: bool, is_unrolled: bool) -> Callable[..., Any]:
    """Put a layer under `jax.checkpoint` as `model.remat` says.

    Args:
      layer: a step of the scan over layers. remat: a key of REMAT. is_gathered: it gathers its own weights.
      is_unrolled: the scan around it is unrolled.
    Returns: the layer, of which the backward pass computes again what is not kept. Gathered weights are never kept.
    """
    if remat == "none" and not is_gathered:
        return layer

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        return primitive.name != "all_gather" and REMAT[remat](primitive, *args, **params)

    # Unrolled layers are in one program with their recomputation: without the barrier the compiler would merge the two, and
    # keep everything. Inside a scan nothing can be merged with the forward pass anyway.
    return jax.checkpoint(layer, prevent_cse=is_unrolled, policy=policy)
