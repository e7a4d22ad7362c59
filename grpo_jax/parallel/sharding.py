"""The device mesh, and the shardings of rows, parameters and optimizer state on it.

Rows are spread over `data`, `fsdp` and `expert`, their tokens, in the update, over `context` (`parallel.context`); that part of
a program is written by hand, in `shard_map`. Parameters, and all that is shaped like them, are sharded along `fsdp`, `expert`
and `tensor` by one table; computing on shards along `tensor` is left to the compiler, which adds one sum over devices after
attention and one after the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from grpo_jax.errors import UserError
from grpo_jax.parallel import context

# `tensor` last, so that its devices have successive numbers, on GPUs those of one host: they exchange activations inside every
# layer; those of `context`, before it, keys and values, those of `expert` tokens in layers with experts, and the devices of the
# other axes no more than weights and gradients.
AXES = ("data", "fsdp", "expert", context.AXIS, "tensor")
ROW_AXES = ("data", "fsdp", "expert")  # each of their devices has rows of its own; those of `context` and `tensor` share theirs
ROWS = PartitionSpec(ROW_AXES)  # the prompt axis of batches, and of all that an update takes
# A row is sampled by one device: there the devices of `context` have rows of their own too.
SAMPLED_ROWS = PartitionSpec((*ROW_AXES, context.AXIS))  # the prompt axis of prompts and rollouts
REPLICATED = PartitionSpec()

# Logical axis of a parameter -> the mesh axis that it is sharded along. Matrices have one of each kind, so that both mesh axes
# divide their memory; heads and FFN channels go to `tensor`, because attention and the MLP compute on each independently.
LOGICAL_AXIS_RULES = {
    **{"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "ffn": "tensor"},
    **{"width": "fsdp", "experts": "expert"},
}
# The logical axes of a layer's matrices, (out, in) and of experts (E, out, in). Their biases and adapters follow. Experts' own
# weights are [E, in, out].
PARAM_LOGICAL_AXES = {
    "q": ("heads", "width"),
    "k": ("kv_heads", "width"),
    "v": ("kv_heads", "width"),
    "o": ("width", "heads"),
    "gate": ("ffn", "width"),
    "up": ("ffn", "width"),
    "down": ("width", "ffn"),
    # A gated delta net's. `qkv` is stored as one matrix and cut into equal parts, whose ends are no heads' ends: the compiler
    # moves what a device needs of another one's part.
    "qkv": ("heads", "width"),
    "output_gate": ("heads", "width"),
    "strength": ("heads", "width"),
    "rate": ("heads", "width"),
    "conv": ("heads", "taps"),
    "out": ("width", "heads"),
    # Along `expert` a device has some of the experts, along the other axes a part of each. The choice among all of them is
    # every device's own.
    "router": ("choices", "width"),
    "expert_gate": ("experts", "ffn", "width"),
    "expert_up": ("experts", "ffn", "width"),
    "expert_down": ("experts", "width", "ffn"),
}
HEAD_NUMBERS = ("log_rate", "rate_bias")  # of a gated delta net: vectors with a number for each value head


def make_mesh(wanted: Mapping[str, int]) -> Mesh:
    """Make the mesh of AXES over all devices, or the first ones.

    Args:
      wanted: devices along each of AXES, -1 (one at most) for what the others leave; an axis that is not named has one.
    Raises: UserError if there are not enough devices, or if on several hosts some would be left out.
    """
    num_devices = jax.device_count()
    sizes = axis_sizes({axis: wanted.get(axis, 1) for axis in AXES}, num_devices)
    # A process all of whose devices were left out would have nothing to compute, and yet must come to every collective call.
    if jax.process_count() > 1 and math.prod(sizes.values()) < num_devices:
        raise UserError(f"config.mesh: {sizes} leaves some of {num_devices} devices out; on several hosts take all, or one -1")
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def axis_sizes(wanted: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Return the number of devices along each axis. Raises UserError if there are too few, or -1 leaves a remainder."""
    taken = math.prod(size for size in wanted.values() if size != -1)
    sizes = ", ".join(f"{axis} = {size}" for axis, size in wanted.items())
    if taken > num_devices:
        raise UserError(f"config.mesh: {sizes} needs {taken} devices, there are {num_devices}; use smaller ones, or one -1")
    if -1 in wanted.values() and num_devices % taken:
        raise UserError(f"config.mesh: {sizes}: {num_devices} devices do not divide by {taken}; say how many instead of -1")
    return {axis: num_devices // taken if size == -1 else size for axis, size in wanted.items()}


def num_row_shards(mesh: Mesh) -> int:
    """Return the number of shards of the row axis, in an update."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def num_sampling_shards(mesh: Mesh) -> int:
    """Return the number of shards of the row axis, in a rollout."""
    return num_row_shards(mesh) * mesh.shape[context.AXIS]


def check_divisible(sizes: Mapping[str, Mapping[str, int]], mesh: Mesh) -> None:
    """Check that a decoder of these sizes can be sharded as the mesh asks.

    Args:
      sizes: mesh axis -> {name of a size: the size}, as `Architecture.sharded_sizes` gives it.
    Raises: UserError naming the size that does not divide, or the axis along which the model has nothing.
    """
    # `param_spec` would replicate what does not divide. For the vocabulary that is fine; for heads or width the mesh axis would
    # save no memory, silently.
    for axis, fields in sizes.items():
        if not fields and mesh.shape[axis] > 1:
            raise UserError(f"config.mesh.{axis} = {mesh.shape[axis]}: the model has no {axis}s; set it to 1")
        for name, size in fields.items():
            if size % mesh.shape[axis]:
                divisor = math.gcd(*fields.values())
                raise UserError(
                    f"config.mesh.{axis} = {mesh.shape[axis]}: does not divide the model's {name} = {size}; "
                    f"use a divisor of {divisor}"
                )


def row_axes(mesh: Mesh) -> tuple[str, ...] | None:
    """Return the axes that a sum over all rows goes over; None where neither rows nor their tokens are sharded."""
    if num_sampling_shards(mesh) == 1:
        return None
    return ROW_AXES


def shard_map_over_batch(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Apply `shard_map` over the devices that have rows or tokens of their own; `tensor`, where used, stays with the compiler.

    Args:
      function: of this device's shards. in_specs, out_specs: of its arguments and results, as `shard_map` takes them.
    Returns: the function of global arrays; where rows are not sharded `function` itself: the axes have no names in it then, but
      what it calls can ask for `tensor` (`jax.sharding.get_abstract_mesh`).
    """
    if row_axes(mesh) is None:
        return function if mesh.shape["tensor"] == 1 else _knowing(mesh, function)
    manual_axes = set(AXES)
    if mesh.shape["tensor"] > 1:
        manual_axes -= {"tensor"}
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=manual_axes)


def _knowing(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    def with_mesh(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return with_mesh


def constrain(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Constrain every leaf of a traced tree to the sharding `spec`.

    Args:
      tree: of arrays. mesh: the one that `spec` names axes of. spec: the same for all leaves.
    Returns: the same values.
    """
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))


def path_names(path: Any) -> tuple[str, ...]:
    """Return a leaf's path in a pytree as plain names; a tuple's places are numbers."""
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path)


def logical_axes(names: tuple[str, ...]) -> tuple[str | None, ...]:
    """Return the logical axes of a parameter by its name, one for each of its axes; () if none is sharded."""
    # By the last two names of the path alone: an optimizer's moments have them too, and are sharded like their parameters.
    *_, module, name = ("", *names)
    if name in ("embed", "head"):
        return ("vocab", "width")
    if name in HEAD_NUMBERS:
        return (None, "heads")
    if module not in PARAM_LOGICAL_AXES:
        return ()
    *experts, num_out, num_in = PARAM_LOGICAL_AXES[module]  # behind the stacked layers
    of = {"weight": (num_out, num_in), "bias": (num_out,), "lora_a": (None, num_in), "lora_b": (num_out, None)}
    if name not in of:
        return ()
    axes = of[name]
    if experts and name == "weight":
        axes = axes[::-1]
    return (None, *experts, *axes)


def param_spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, min_elements: int) -> PartitionSpec:
    """Return the sharding of a leaf of parameters, of optimizer state or of anything else.

    Args:
      names: its path. shape: of the full array. mesh: the sizes of its axes decide.
      min_elements: a layer's tensor of fewer is not sharded along `fsdp`: a gather of its own costs more than it saves.
    Returns: its spec, without trailing None.
    """
    axes: list[str | None] = [LOGICAL_AXIS_RULES.get(axis or "") for axis in logical_axes(names)]
    num_elements = math.prod(shape)
    if "layers" in names:  # one layer's: it is gathered by itself
        num_elements = math.prod(shape[1:])
    for i, axis in enumerate(axes):
        is_small = axis == "fsdp" and num_elements < min_elements
        if axis and (mesh.shape[axis] == 1 or is_small or shape[i] % mesh.shape[axis]):
            axes[i] = None
    # Specs are compared, and ("fsdp",) is not equal to ("fsdp", None) although both mean the same.
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def specs_of(tree: Any, mesh: Mesh, min_elements: int) -> Any:
    """Return `param_spec` of every leaf.

    Args:
      tree: arrays or shapes. mesh, min_elements: as in `param_spec`.
    """
    return jax.tree_util.tree_map_with_path(lambda path, x: param_spec(path_names(path), x.shape, mesh, min_elements), tree)


def with_shardings(tree: Any, mesh: Mesh, min_elements: int) -> Any:
    """Return shapes with the shardings that `param_spec` gives them.

    Args:
      tree: arrays or shapes. mesh, min_elements: as in `param_spec`.
    Returns: a tree of `jax.ShapeDtypeStruct`.
    """

    def with_sharding(x: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(with_sharding, tree, specs_of(tree, mesh, min_elements))


def offload_to_host(like: Any) -> Any:
    """Return the shapes of `with_shardings`, with arrays (numbers apart) in the page-locked memory of the device's host."""

    def move(x: Any) -> jax.ShapeDtypeStruct:
        sharding = x.sharding
        if x.ndim:  # a number, such as Adam's count, would save nothing
            sharding = sharding.with_memory_kind("pinned_host")
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(move, like)


def to_memory_space(tree: Any, space: Any) -> Any:
    """Move the arrays (numbers apart) of a traced tree to the memory of the host or of the device, a `jax.memory.Space`."""

    def move(x: Any) -> Any:
        if not x.ndim:
            return x
        return jax.device_put(x, space)

    return jax.tree.map(move, tree)


def shardings_of(like: Any) -> Any:
    """Return the shardings of arrays, or of the shapes that `with_shardings` gives."""
    return jax.tree.map(lambda x: x.sharding, like)


def drop_mesh_axis(specs: Any, axis: str) -> Any:
    """Return the same specs without one mesh axis."""
    return jax.tree.map(lambda spec: PartitionSpec(*(None if each == axis else each for each in spec)), specs)


def held_specs(tree: Any, mesh: Mesh) -> Any:
    """Return, leaf by leaf, the specs of weights that `fsdp` no longer shards, as `shard_map` over the rows takes them."""
    # Of the axes that are manual there only `expert` is left.
    specs = specs_of(tree, mesh, 0)
    for axis in ("fsdp", "tensor"):
        specs = drop_mesh_axis(specs, axis)
    return specs


def gather_params_for_decoding(params: Any, mesh: Mesh, min_elements: int, dtype: Any) -> Any:
    """Gather weights over fsdp as a rollout reads them at every token; they stay sharded along `expert` and `tensor`.

    Args:
      params: sharded as `param_spec` says. mesh, min_elements: as there. dtype: the compute dtype.
    Returns: the gathered weights in `dtype`; without fsdp `params` as they are.
    """
    # Once for any number of rollouts: gathered layer by layer, as in the update, all weights would travel at every token.
    if mesh.shape["fsdp"] == 1:
        return params

    def gather(x: Any, spec: PartitionSpec) -> Any:
        if "fsdp" not in spec:
            return x
        # The first constraint keeps the cast before the gather: in bfloat16 half as many bytes travel.
        shard = constrain(x.astype(dtype), mesh, spec)
        return constrain(shard, mesh, drop_mesh_axis(spec, "fsdp"))

    return jax.tree.map(gather, params, specs_of(params, mesh, min_elements))


def in_full_over_tensor(x: Array) -> Array:
    """Return an array in full on all devices of `tensor`, however the compiler has spread it. Inside `shard_map_over_batch`."""
    if jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def largest_in_step(x: Array, axes: tuple[str, ...]) -> Array:
    """Return the largest x, an integer or bool, of all runs of a call and among the devices of these mesh axes.

    Devices that exchange arrays inside a loop or a branch must go the same way: what decides it is made one with this. Runs of
    one call go the same way too: else `vmap` would compute every branch, and select all that a loop carries at every step.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
    if axes:
        x = jax.lax.pmax(x.astype(jnp.int32), axes).astype(x.dtype)
    return largest_of_members(x)


@jax.custom_batching.custom_vmap
def largest_of_members(x: Array) -> Array:
    """Return the largest x, an integer or bool, of all runs of a vmapped call, one for all of them; of a run by itself x."""
    return x


@largest_of_members.def_vmap
def _largest_of_members(axis_size: int, in_batched: list[bool], x: Array) -> tuple[Array, bool]:
    del axis_size
    return largest_of_members(x.max(0) if in_batched[0] else x), False


def vary_over(x: Array, axes: tuple[str, ...]) -> Array:
    """Mark an array, the same on all devices of these mesh axes, as each device's own copy. Inside `shard_map`."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)  # jax 0.7 # pyright: ignore[reportAttributeAccessIssue]


def vary_like(tree: Any, reference_ints: Int[Array, "..."]) -> Any:
    """Mark every leaf as varying over the mesh axes that `reference_ints` varies over.

    Constants that enter a loop beside per-device data need it: a loop's carry must keep its type.
    """
    # `jax.lax.pcast` does this for axes that are named. The rollout and the log-probabilities are the same code in and out of
    # `shard_map`, and know no axes. JAX knows them from the reference's type, but has no public attribute for it: `vma` became
    # `manual_axis_type` in 0.10. A zero made from the reference varies as it does, in every version, and compiles to nothing.
    # Of integers, because x * 0 is no 0 where a float is inf or NaN, so that the compiler would have to keep it.
    # And it is one for all runs of a call: a loop's counter that each had for itself would make its writes scatters.
    zero = largest_of_members(reference_ints.ravel()[0] * 0)

    def mark(x: Array) -> Array:
        if x.dtype == bool:
            return x | (zero != 0)
        return x + zero.astype(x.dtype)

    return jax.tree.map(mark, tree)
