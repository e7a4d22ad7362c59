"""Completions spread over the mesh axis `context`, in the update: which of a row's slots are on which device.

A row of T slots is cut into 2 C pieces for C devices, and device r has piece r and piece 2 C - 1 - r: one from the front, which
sees little, and one from the back, so that attention is the same work for all (Llama 3, arXiv 2407.21783, section 3.3.2). What
is one number a token, such as a log-probability, is small: every device has all of it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from grpo_jax.errors import UserError

AXIS = "context"


@flax.struct.dataclass
class Share:
    """A device's slots of rows.

    rank: int32, the device's place along the axis. num_devices: C. num_slots: T, of whole rows.
    """

    rank: Any
    num_devices: int = flax.struct.field(pytree_node=False)
    num_slots: int = flax.struct.field(pytree_node=False)

    @property
    def piece(self) -> int:
        """The slots of a piece; a device has two."""
        return self.num_slots // (2 * self.num_devices)

    @property
    def slots_X(self) -> Int[Array, " X"]:
        """This device's slots, rising."""
        return self.slots_of(self.rank)

    def slots_of(self, rank: Int[Array, ""]) -> Int[Array, " X"]:
        """Return the slots of the device at a place along the axis."""
        first = jnp.stack([rank, 2 * self.num_devices - 1 - rank]) * self.piece
        return (first[:, None] + jnp.arange(self.piece)[None]).reshape(-1)

    def spread(self, x_BX: Shaped[Array, "B X"], slots_X: Int[Array, " X"]) -> Shaped[Array, "B T"]:
        """Return, on every device, rows of which each device has some slots."""
        # A sum with one term for each slot and not a gather: so JAX knows that the result is the same on all devices, and its
        # derivative gives each of them its own slots' cotangent once.
        own_BT = jnp.zeros((len(x_BX), self.num_slots), x_BX.dtype).at[:, slots_X].set(x_BX)
        return jax.lax.psum(own_BT, AXIS)

    def pass_on(self, tree: Any) -> Any:
        """Give arrays to the next device along the axis, the last one's to the first, and return those of the one before."""
        ring = [(i, (i + 1) % self.num_devices) for i in range(self.num_devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, ring), tree)


def share_of(num_slots: int) -> Share | None:
    """Return this device's share of rows of so many slots; None where rows are whole, and outside of `shard_map`."""
    if num_devices_here() == 1:
        return None
    return Share(rank_here(), num_devices_here(), num_slots)


def num_devices_here() -> int:
    """Count the devices along the axis, inside `shard_map`; outside of it 1."""
    return jax.sharding.get_abstract_mesh().shape.get(AXIS, 1)


def rank_here() -> Int[Array, ""]:
    """Return this device's place along the axis, inside `shard_map`; outside of it 0."""
    if num_devices_here() == 1:
        return jnp.int32(0)
    return jax.lax.axis_index(AXIS)


def check(num_devices: int, widths: Iterable[int], refusals: dict[str, bool]) -> None:
    """Check that completions can be spread over so many devices.

    Args:
      num_devices: along the axis. widths: of completions that programs are compiled for, tokens.
      refusals: {what cannot be spread: this run has it}.
    Raises: UserError naming the field and the fix.
    """
    if num_devices == 1:
        return
    field = f"config.mesh.{AXIS} = {num_devices}"
    for what, is_here in refusals.items():
        if is_here:
            raise UserError(f"{field}: {what} cannot be spread over devices; set it to 1")
    for width in widths:
        if width % (2 * num_devices):
            raise UserError(
                f"{field}: completions of {width} tokens are no multiple of two pieces a device; make "
                f"config.rollout.max_completion_tokens and config.learner.bucket_tokens multiples of {2 * num_devices}"
            )
