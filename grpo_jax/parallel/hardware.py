"""The devices that a program is compiled for, as a static fact of a model: they choose kernels and sizes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

_absent: list[str] = []  # platforms that are compiled for in this process, the innermost last


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Accelerators of one kind.

    platform: "tpu" or "gpu". mesh: of the program; None: one device. interpret: kernels run as plain operations, on any
    platform, for tests. memory_bytes: of one device; None: not known.
    """

    platform: str
    mesh: Any = None
    interpret: bool = False
    memory_bytes: float | None = None


def hardware_of(mesh: Mesh) -> Hardware | None:
    """Return the accelerators of a mesh; None on CPUs, whose programs are those without any choice."""
    # Of the mesh and not of this process: a program can be compiled for devices that are not here.
    platform = platform_of(mesh)
    if platform == "cpu":
        return None
    here = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return Hardware(platform, mesh, memory_bytes=_memory_of(here[0]) if here else None)


def _memory_of(device: Any) -> float | None:
    """Return the bytes that a device can give to programs; None: it does not say, or is not here."""
    try:
        stats = device.memory_stats()
    except (AttributeError, NotImplementedError, RuntimeError):  # of a device that is only described there are none
        return None
    return (stats or {}).get("bytes_limit")


def platform_of(mesh: Mesh) -> str:
    """Return "cpu", "gpu" or "tpu"."""
    platform = str(mesh.devices.flat[0].platform)
    return {"cuda": "gpu", "rocm": "gpu"}.get(platform, platform)


def target_platform() -> str:
    """Return the platform that this process compiles for: its own, or inside `compiling_for` that one."""
    return _absent[-1] if _absent else jax.default_backend()


@contextlib.contextmanager
def compiling_for(mesh: Mesh) -> Iterator[None]:
    """Trace programs for a mesh whose devices may be absent; what knows no mesh asks `target_platform`."""
    _absent.append(platform_of(mesh))
    try:
        yield
    finally:
        _absent.pop()
