"""Several hosts as one machine, by JAX's multi-controller runtime: every process runs the same program on its own devices.

What only one process knows (its rows, a file, a signal) is shared here. All processes must come to each of these calls, in
the same order; with one process they cost nothing.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from grpo_jax.errors import UserError
from grpo_jax.parallel.sharding import ROWS

HEARTBEAT_TIMEOUT_SECS = 30  # a process that was not heard of for so long is dead, and all others end


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes; before anything is computed. Without arguments the cluster's environment says who they are.

    coordinator: host:port of process 0, where it will listen. Raises UserError if there is no cluster that JAX knows. If the
    others do not come within five minutes, or one of them dies later, JAX says so and ends this process (SIGABRT).
    """
    faulthandler.disable()  # or the message about a dead process would drown in the stacks of all threads of this one
    jax.config.update("jax_enable_preemption_service", False)  # it would swallow SIGTERM; the training loop has its own way
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if coordinator else None,  # or Slurm would leave us a single device
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECS,
        )
    except (ValueError, RuntimeError) as error:
        where = f"--coordinator={coordinator}" if coordinator else "--distributed"
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: cannot join the other processes ({reason}); docs/scale.md says how to start them") from error


def is_first() -> bool:
    """Whether this process writes the records and speaks to the console."""
    return jax.process_index() == 0


def is_joined() -> bool:
    """Whether `start` was called: this is one of several processes."""
    return jax.distributed.is_initialized()


def exit_without_barrier(status: int) -> NoReturn:
    """Leave without waiting for the others, as an ordinary exit would: they end when they miss our heartbeat."""
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(2)  # with process 0 goes the service that all depend on, and others may have an error to tell
    os._exit(status)


def process_allgather(tree: Any) -> Any:
    """Numbers that each process has -> those of all, stacked on a leading axis of processes."""
    return multihost_utils.process_allgather(tree)


def broadcast_from_process0(tree: Any) -> Any:
    """Numbers as the first process has them."""
    return multihost_utils.broadcast_one_to_all(tree)


def any_process(flag: bool) -> bool:
    """Whether it is set in any process."""
    return bool(process_allgather(np.asarray(flag)).any())


def gather_to_host(tree: Any) -> Any:
    """Global arrays -> numpy arrays, whole in every process."""

    def whole(x: Any) -> Any:
        is_cut = isinstance(x, jax.Array) and not x.is_fully_addressable
        return multihost_utils.process_allgather(x, tiled=True) if is_cut else x

    return jax.device_get(jax.tree.map(whole, tree))


def make_global_array(tree: Any, places: Any) -> Any:
    """Numbers that are the same in all processes -> global arrays. places: their shardings."""

    def place(x: Any, sharding: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, places)


def make_global_batch(function: Callable[[int, int], Any], num_rows: int, mesh: Mesh) -> Any:
    """A tree of global arrays, rows spread over the mesh. function: (first, number) -> these rows, as numpy arrays.

    Each process makes the rows of its own devices only.
    """
    place = NamedSharding(mesh, ROWS)
    spans = {row_bounds(index, num_rows) for index in place.addressable_devices_indices_map((num_rows,)).values()}
    pieces = {(first, end): function(first, end - first) for first, end in sorted(spans)}

    def join(*leaves: Any) -> jax.Array:
        of_span = dict(zip(pieces, leaves, strict=True))
        shape = (num_rows, *leaves[0].shape[1:])
        return jax.make_array_from_callback(shape, place, lambda index: of_span[row_bounds(index, num_rows)])

    return jax.tree.map(join, *pieces.values())


def addressable_rows(tree: Any) -> tuple[np.ndarray, Any]:
    """-> (the numbers of the rows that this process answers for, those rows of each array). Every row is one process's."""

    def pieces(x: jax.Array) -> list[Any]:
        own = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        return sorted(own, key=lambda shard: row_bounds(shard.index, len(x))[0])

    def rows(x: jax.Array) -> np.ndarray:
        return np.concatenate([np.zeros((0, *x.shape[1:]), x.dtype), *(np.asarray(shard.data) for shard in pieces(x))])

    first = jax.tree.leaves(tree)[0]
    numbers = [np.arange(*row_bounds(shard.index, len(first))) for shard in pieces(first)]
    return np.concatenate([np.arange(0), *numbers]), jax.tree.map(rows, tree)


def allgather_rows(rows: np.ndarray, tree: Any, num_rows: int) -> Any:
    """What each process has for its `addressable_rows` -> all rows, in every process."""

    def spread(x: Any) -> np.ndarray:
        whole = np.zeros((num_rows, *x.shape[1:]), x.dtype)
        whole[rows] = x
        return whole

    return jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), process_allgather(jax.tree.map(spread, tree)))


def row_bounds(index: Any, num_rows: int) -> tuple[int, int]:
    """-> (first, end) of the rows of a shard."""
    first, end, _ = index[0].indices(num_rows)
    return first, end
