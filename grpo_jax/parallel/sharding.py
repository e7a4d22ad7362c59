"""The device mesh, and what lies where on it.

Rows are spread over `data` and `fsdp`; that part of a program is written by hand, in `shard_map`. Parameters, and all that
is shaped like them, are cut along `fsdp` and `tensor` by one table; what is computed on a cut along `tensor` is left to the
compiler, which adds one sum over devices after attention and one after the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from grpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")  # each of their devices has rows of its own; those of `tensor` share theirs
ROWS = PartitionSpec(ROW_AXES)  # the prompt axis of prompts, rollouts and batches
REPLICATED = PartitionSpec()

# What an axis of a parameter stands for -> the mesh axis that it is cut along.
LOGICAL_AXIS_RULES = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor", "width": "fsdp"}
# What the matrices [out, in] of a layer map to what. Their biases and adapters follow.
PARAM_LOGICAL_AXES = {
    "q": ("heads", "width"),
    "k": ("kv_heads", "width"),
    "v": ("kv_heads", "width"),
    "o": ("width", "heads"),
    "gate": ("ffn", "width"),
    "up": ("ffn", "width"),
    "down": ("width", "ffn"),
}


def make_mesh(wanted: Mapping[str, int]) -> Mesh:
    """Mesh (data, fsdp, tensor) over all devices, or the first ones. Raises UserError if there are not enough.

    wanted: devices along each of AXES, -1 (one at most) for what the others leave. On several hosts all devices must be in
    it: one that had none would have nothing to do.
    """
    num_devices = jax.device_count()
    sizes = axis_sizes(wanted, num_devices)
    if jax.process_count() > 1 and math.prod(sizes.values()) < num_devices:
        raise UserError(f"config.mesh: {sizes} leaves some of {num_devices} devices out; on several hosts take all, or one -1")
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def axis_sizes(wanted: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """How many devices lie along each axis. Raises UserError if there are not enough, or -1 leaves a remainder."""
    taken = math.prod(size for size in wanted.values() if size != -1)
    sizes = ", ".join(f"{axis} = {size}" for axis, size in wanted.items())
    if taken > num_devices:
        raise UserError(f"config.mesh: {sizes} needs {taken} devices, there are {num_devices}; use smaller ones, or one -1")
    if -1 in wanted.values() and num_devices % taken:
        raise UserError(f"config.mesh: {sizes}: {num_devices} devices do not divide by {taken}; say how many instead of -1")
    return {axis: num_devices // taken if size == -1 else size for axis, size in wanted.items()}


def num_row_shards(mesh: Mesh) -> int:
    """How many parts rows are cut into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def check_divisible(sizes: Mapping[str, Mapping[str, int]], mesh: Mesh) -> None:
    """A decoder of these sizes can be sharded as the mesh asks. Raises UserError naming the size that does not divide.

    sizes: mesh axis -> {name of a size: the size}, as `Architecture.sharded_sizes` gives it.
    """
    for axis, fields in sizes.items():
        for name, size in fields.items():
            if size % mesh.shape[axis]:
                divisor = math.gcd(*fields.values())
                raise UserError(
                    f"config.mesh.{axis} = {mesh.shape[axis]}: does not divide the model's {name} = {size}; "
                    f"use a divisor of {divisor}"
                )


def row_axes(mesh: Mesh) -> tuple[str, ...] | None:
    """The axes that a sum over all rows goes over; None: there is one part of them."""
    return ROW_AXES if num_row_shards(mesh) > 1 else None


def shard_map_over_batch(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`shard_map` over the devices that have rows of their own; `tensor`, where it is used, stays with the compiler.

    With one part of rows all of it does: the axes of `row_axes` have no names in the function then.
    """
    if row_axes(mesh) is None:
        return function
    by_hand = ROW_AXES if mesh.shape["tensor"] > 1 else AXES
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=set(by_hand))


def constrain(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Place every leaf of a traced tree as `spec` says."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def path_names(path: Any) -> tuple[str, ...]:
    """A leaf's path in a pytree as plain names."""
    return tuple(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)


def logical_axes(names: tuple[str, ...]) -> tuple[str | None, ...]:
    """What the axes of a parameter stand for, by its name: () if nothing is cut. Optimizer state has the same names."""
    *_, module, name = ("", *names)
    if name in ("embed", "head"):
        return ("vocab", "width")
    if module not in PARAM_LOGICAL_AXES:
        return ()
    num_out, num_in = PARAM_LOGICAL_AXES[module]  # behind the stacked layers
    of = {"weight": (None, num_out, num_in), "bias": (None, num_out), "lora_a": (None, None, num_in), "lora_b": (None, num_out)}
    return of.get(name, ())


def param_spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, min_elements: int) -> PartitionSpec:
    """Where a leaf of parameters, of optimizer state or of anything else lies.

    min_elements: a layer's tensor of fewer is not cut along `fsdp`.
    """
    cuts: list[str | None] = [LOGICAL_AXIS_RULES.get(axis or "") for axis in logical_axes(names)]
    num_elements = math.prod(shape[1:] if "layers" in names else shape)
    for i, axis in enumerate(cuts):
        is_small = axis == "fsdp" and num_elements < min_elements
        if axis and (mesh.shape[axis] == 1 or is_small or shape[i] % mesh.shape[axis]):
            cuts[i] = None
    while cuts and cuts[-1] is None:
        cuts.pop()
    return PartitionSpec(*cuts)


def specs_of(tree: Any, mesh: Mesh, min_elements: int) -> Any:
    """`param_spec` of every leaf (arrays or shapes)."""
    return jax.tree_util.tree_map_with_path(lambda path, x: param_spec(path_names(path), x.shape, mesh, min_elements), tree)


def with_shardings(tree: Any, mesh: Mesh, min_elements: int) -> Any:
    """Arrays or shapes -> shapes with the places they belong to."""

    def place(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree, specs_of(tree, mesh, min_elements))


def offload_to_host(like: Any) -> Any:
    """What `with_shardings` gives, with its arrays (numbers apart) in the page-locked memory of the device's host."""

    def move(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=x.sharding.with_memory_kind("pinned_host") if x.ndim else x.sharding
        )

    return jax.tree.map(move, like)


def to_memory_space(tree: Any, space: Any) -> Any:
    """The arrays (numbers apart) of a traced tree in the memory of the host or of the device. space: `jax.memory.Space`."""
    return jax.tree.map(lambda x: jax.device_put(x, space) if x.ndim else x, tree)


def shardings_of(like: Any) -> Any:
    """The shardings of arrays or of what `with_shardings` gives."""
    return jax.tree.map(lambda x: x.sharding, like)


def drop_mesh_axis(specs: Any, axis: str) -> Any:
    """The same places without cuts along one mesh axis."""
    return jax.tree.map(lambda spec: PartitionSpec(*(None if cut == axis else cut for cut in spec)), specs)


def gather_params_for_decoding(params: Any, mesh: Mesh, min_elements: int, dtype: Any) -> Any:
    """Weights as a rollout reads them at every token: whole but for `tensor`, in the compute dtype (which is what travels).

    Called once for any number of rollouts. Without fsdp the weights lie like this already, and nothing is done.
    """
    if mesh.shape["fsdp"] == 1:
        return params

    def gather(x: Any, spec: PartitionSpec) -> Any:
        if "fsdp" not in spec:
            return x
        small = constrain(x.astype(dtype), mesh, spec)  # or the cast might come after the gather
        return constrain(small, mesh, drop_mesh_axis(spec, "fsdp"))

    return jax.tree.map(gather, params, specs_of(params, mesh, min_elements))


def vary_like(tree: Any, reference_ints: Int[Array, "..."]) -> Any:
    """Mark every leaf as varying over the mesh axes that `reference_ints` varies over.

    Constants that enter a loop beside per-device data need it: a loop's carry must keep its type.
    """
    # `jax.lax.pcast` does this for axes that are named. The rollout and the log-probabilities are the same code in and out of
    # `shard_map`, and know no axes. JAX knows them from the reference's type, but has no public attribute for it: `vma` became
    # `manual_axis_type` in 0.10. A zero made from the reference varies as it does, in every version, and compiles to nothing.
    # Of integers, because x * 0 is no 0 where a float is inf or NaN, so that the compiler would have to keep it.
    zero = reference_ints.ravel()[0] * 0

    def mark(x: Array) -> Array:
        if x.dtype == bool:
            return x | (zero != 0)
        return x + zero.astype(x.dtype)

    return jax.tree.map(mark, tree)
