"""The device mesh, and what each stage may assume about where its arrays lie."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax.config import MeshConfig
from grpo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec("data")  # the prompt axis of prompts, rollouts and batches
REPLICATED = PartitionSpec()


def make_mesh(config: MeshConfig) -> Mesh:
    """Mesh (data, fsdp, tensor) over all devices. Raises UserError if the sizes do not multiply to their number."""
    num_devices = jax.device_count()
    sizes = {axis: getattr(config, axis) for axis in AXES}
    for axis in ("fsdp", "tensor"):
        if sizes[axis] not in (1, -1):
            raise UserError(
                f"config.mesh.{axis} = {sizes[axis]}: only 1 is supported; parameters are replicated, use mesh.data"
            )
        sizes[axis] = 1
    if sizes["data"] == -1:
        sizes["data"] = num_devices
    if not 1 <= sizes["data"] <= num_devices:
        raise UserError(f"config.mesh.data = {sizes['data']}: there are {num_devices} devices; use -1 for all of them")
    devices = jax.devices()[: sizes["data"]]
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def constrain(tree: Any, mesh: Mesh, spec: PartitionSpec) -> Any:
    """Place every leaf of a traced tree as `spec` says."""
    return jax.lax.with_sharding_constraint(tree, NamedSharding(mesh, spec))
