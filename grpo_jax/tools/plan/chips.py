"""Public figures of accelerators, and the rates of the links between them."""

from __future__ import annotations

import dataclasses
import math

from jax.sharding import AbstractMesh

from grpo_jax.errors import UserError
from grpo_jax.parallel.sharding import AXES

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one device.

    flops_per_s: bfloat16, dense. hbm_bytes, hbm_bytes_per_s: its memory. link_bytes_per_s: sent to devices of its slice or
    NVLink domain, one way, all links together; host_bytes_per_s: its share of its host's network.
    linked_devices: the most devices of a slice or NVLink domain. source: of the figures. clock_hz: what XLA's cycles are of, as
    it follows from the peak and the size of the matrix units; 0: no compiler gives cycles.
    """

    flops_per_s: float
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    host_bytes_per_s: float
    linked_devices: int
    source: str
    clock_hz: float = 0.0

    @property
    def platform(self) -> str:
        """Return "tpu" or "gpu"."""
        return "tpu" if self.clock_hz else "gpu"


# Links: TPUs 6 (v4, v5p) or 4 (v5e, v6e) a chip, one way each; NVLink half of the two-way figure that data sheets give.
# Hosts: TPUs 25 GB/s shared by 4 (v4, v5p) or 8 chips; GPUs one adapter each, 200 (A100) or 400 Gbit/s.
_BOOK = "jax-ml.github.io/scaling-book/tpus (links, hosts)"
CHIPS = {
    "v4": Chip(275e12, 32 * GIB, 1.2e12, 6 * 4.5e10, 25e9 / 4, 4096, f"cloud.google.com/tpu/docs/v4; {_BOOK}", clock_hz=1.05e9),
    "v5e": Chip(197e12, 16e9, 0.819e12, 4 * 5e10, 25e9 / 8, 256, f"cloud.google.com/tpu/docs/v5e; {_BOOK}", clock_hz=1.5e9),
    "v5p": Chip(459e12, 95e9, 2.765e12, 6 * 1e11, 25e9 / 4, 8960, f"cloud.google.com/tpu/docs/v5p; {_BOOK}", clock_hz=1.75e9),
    "v6e": Chip(918e12, 32e9, 1.638e12, 4 * 1e11, 25e9 / 8, 256, f"cloud.google.com/tpu/docs/v6e; {_BOOK}", clock_hz=1.75e9),
    "tpu7x": Chip(
        1153.5e12, 96 * GIB, 3.69e12, 6 * 1e11, 25e9 / 8, 9216, f"cloud.google.com/tpu/docs/tpu7x, half a chip; {_BOOK}", 2.2e9
    ),
    "a100": Chip(
        312e12, 80e9, 2.039e12, 300e9, 25e9, 8, "NVIDIA A100 80GB SXM data sheet (nvidia-a100-datasheet-us-nvidia-1758950)"
    ),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9, 50e9, 8, "NVIDIA H100 SXM data sheet; docs.nvidia.com/dgx-basepod (network)"),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9, 50e9, 8, "NVIDIA H200 SXM data sheet; docs.nvidia.com/dgx-basepod (network)"),
}


def find_chip(name: str) -> Chip:
    """Look a chip up, in upper or lower case. Raises UserError."""
    if name.lower() not in CHIPS:
        raise UserError(f"--chip={name}: unknown; known: {', '.join(CHIPS)}")
    return CHIPS[name.lower()]


def axis_rate(chip: Chip, mesh: AbstractMesh, axis: str) -> float:
    """Return the rate at which a device sends along a mesh axis: by links within a slice, else by the host's network.

    Args:
      chip: the device's public figures.
      mesh: its sizes count, the devices need not exist.
      axis: one of AXES.
    Returns: bytes a second, one way.
    """
    # Devices are numbered with `tensor` fastest and `data` slowest, as in `sharding.make_mesh`: a group along an axis
    # reaches over all axes inside it too, so `tensor` stays in a slice the longest and `data` leaves it first.
    span = math.prod(mesh.shape[inner] for inner in AXES[AXES.index(axis) :])
    if span <= chip.linked_devices:
        return chip.link_bytes_per_s
    # A ring is as fast as its slowest hop: one that leaves the slice makes the whole axis run at the host's rate.
    return chip.host_bytes_per_s
