"""The devices that a program is compiled for, as a static fact of a model: they choose kernels and sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Accelerators of one kind.

    platform: "tpu" or "gpu". mesh: of the program; None: one device. interpret: kernels run as plain operations, on any
    platform, for tests.
    """

    platform: str
    mesh: Any = None
    interpret: bool = False


def hardware_of(mesh: Mesh) -> Hardware | None:
    """Return the accelerators of a mesh; None on CPUs, whose programs are those without any choice."""
    # Of the mesh and not of this process: a program can be compiled for devices that are not here.
    platform = mesh.devices.flat[0].platform
    if platform == "cpu":
        return None
    return Hardware({"cuda": "gpu", "rocm": "gpu"}.get(platform, platform), mesh)
