"""Weights that lie in parts (ZeRO stage 3; Rajbhandari et al., arXiv 1910.02054): whole only while a layer uses them.

Inside `shard_map` each device of the mesh axis `fsdp` holds a part of a matrix. A layer gathers its own before it computes;
the backward pass gathers again and scatters the summed gradient, so that it arrives in parts as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from grpo_jax.parallel.sharding import LOGICAL_AXIS_RULES, logical_axes, path_names
from grpo_jax.types import Params

GatherLayer = Callable[[nnx.State], nnx.State]  # one layer's weights as this device holds them -> in full

# model.remat -> what the forward pass keeps for the backward pass, beside the layers' inputs.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def make_layer_gather(layers: Params, shapes: Params, dtype: Any) -> GatherLayer | None:
    """Return the function that gathers one layer's weights; None if none of them is sharded along `fsdp`.

    Args:
      layers: the stacked layers' parameters [L, ...], as this device holds them. shapes: the same tree, as full shapes.
      dtype: of the gathered weights.
    """
    axes = jax.tree.map(sharded_axis, layers, shapes)
    if not jax.tree.leaves(axes):  # None is no leaf
        return None
    of_one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), shapes)
    return lambda weights: nnx.State(all_gather_params(nnx.to_pure_dict(weights), of_one, dtype))


def all_gather_params(parts: Any, shapes: Any, dtype: Any) -> Any:
    """Every leaf of `parts` in the shape that `shapes` says: as it is, or gathered in `dtype` from the devices of `fsdp`."""

    def gathered(path: Any, part: Any, shape: Any) -> Any:
        axis = sharded_axis(part, shape)
        return part if axis is None else gather(part, axis, tensor_spec(path_names(path), shape.shape), dtype)

    return jax.tree_util.tree_map_with_path(gathered, parts, shapes)


def sharded_axis(part: Any, shape: Any) -> int | None:
    """The axis along which `part` is shorter than `shape`; None: it is whole."""
    return next((i for i, sizes in enumerate(zip(part.shape, shape.shape, strict=True)) if sizes[0] != sizes[1]), None)


def tensor_spec(names: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The cut along `tensor` of one layer's parameter (or of one that belongs to no layer)."""
    num_devices = jax.sharding.get_abstract_mesh().shape["tensor"]
    if num_devices == 1:
        return PartitionSpec()
    axes = logical_axes(names)[-len(shape) :]  # without the layers' axis
    cuts = [
        LOGICAL_AXIS_RULES.get(axis or "") == "tensor" and size % num_devices == 0
        for axis, size in zip(axes, shape, strict=False)
    ]
    return PartitionSpec(*("tensor" if cut else None for cut in cuts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def gather(part, axis: int, spec: PartitionSpec, dtype):
    """The whole of a matrix, in `dtype`, from float32 parts. Their gradients are summed in float32 too."""
    return _gather(part, axis, spec, dtype)


def _gather(part, axis, spec, dtype):
    return _shard_map_over_tensor(lambda part: jax.lax.all_gather(part.astype(dtype), "fsdp", axis=axis, tiled=True), spec)(
        part
    )


def _forward(part, axis, spec, dtype):
    return _gather(part, axis, spec, dtype), None


def _backward(axis, spec, dtype, _, d_whole):
    del dtype

    def scatter(d_whole):
        return jax.lax.psum_scatter(d_whole.astype(jnp.float32), "fsdp", scatter_dimension=axis, tiled=True)

    return (_shard_map_over_tensor(scatter, spec)(d_whole),)


gather.defvjp(_forward, _backward)


def _shard_map_over_tensor(function: Callable[[Any], Any], spec: PartitionSpec) -> Callable[[Any], Any]:
    """On each device's own cut along `tensor`: the compiler alone would gather that axis first."""
    if "tensor" not in spec:
        return function
    return jax.shard_map(function, in_specs=spec, out_specs=spec, axis_names={"tensor"})


def apply_remat(layer: Callable[..., Any], remat: str, *, is_gathered: bool, is_unrolled: bool) -> Callable[..., Any]:
    """The layer under `jax.checkpoint` as `model.remat` says. Gathered weights are never kept."""
    if remat == "none" and not is_gathered:
        return layer

    def policy(primitive: Any, *args: Any, **params: Any) -> Any:
        return primitive.name != "all_gather" and REMAT[remat](primitive, *args, **params)

    # Inside a scan nothing can be merged with the forward pass anyway.
    return jax.checkpoint(layer, prevent_cse=is_unrolled, policy=policy)
