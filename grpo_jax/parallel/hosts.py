"""Several hosts as one machine, by JAX's multi-controller runtime: every process runs the same program on its own devices.

What only one process knows (its rows, a file, a signal) is shared here. All processes must come to each of these calls, in
the same order; with one process they cost nothing.
"""

from __future__ import annotations

import contextlib
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
from grpo_jax.files import note_once
from grpo_jax.parallel.sharding import SAMPLED_ROWS

HEARTBEAT_TIMEOUT_SECS = 30  # a process that was not heard of for so long is dead, and all others end


def start(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes; before anything is computed. Without arguments the cluster's environment says who they are.

    If the others do not come within five minutes, or one of them dies later, JAX says so and ends this process (SIGABRT).

    Args:
      coordinator: host:port of process 0, where it will listen. num_processes: of all. process_id: of this one, from 0.
    Raises: UserError if there is no cluster that JAX knows.
    """
    faulthandler.disable()  # or the message about a dead process would drown in the stacks of all threads of this one
    with contextlib.suppress(AttributeError):  # jax 0.7 has no such setting
        # The service would swallow SIGTERM; the training loop has its own way.
        jax.config.update("jax_enable_preemption_service", False)
    method, where = None, "--distributed"
    if coordinator:
        # Inside a Slurm job JAX would detect the cluster although it was told who is who, and leave us a single device.
        method, where = "deactivate", f"--coordinator={coordinator}"
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method=method,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{where}: cannot join the other processes ({reason}); docs/scale.md says how to start them") from error


def is_first() -> bool:
    """Tell if this is the process that writes the records and speaks to the console."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Say something on the console, once and by the first process. JAX need not have made its devices."""
    if not (is_joined() and jax.process_index()):
        note_once(text)


def is_joined() -> bool:
    """Tell if `start` was called: this is one of several processes."""
    return jax.distributed.is_initialized()


def exit_without_barrier(status: int) -> NoReturn:
    """Leave without waiting for the others, as an ordinary exit would: they end when they miss our heartbeat."""
    sys.stdout.flush()
    sys.stderr.flush()
    # With process 0 goes the service that all depend on, and others may have an error to tell first.
    time.sleep(2)
    os._exit(status)


def process_allgather(tree: Any) -> Any:
    """Gather numbers that each process has: those of all, stacked on a leading axis of processes."""
    return multihost_utils.process_allgather(tree)


def broadcast_from_process0(tree: Any) -> Any:
    """Return numbers as the first process has them."""
    return multihost_utils.broadcast_one_to_all(tree)


def any_process(flag: bool) -> bool:
    """Tell if the flag is set in any process."""
    return bool(process_allgather(np.asarray(flag)).any())


def gather_to_host(tree: Any) -> Any:
    """Gather global arrays: full numpy arrays in every process."""

    def gather(x: Any) -> Any:
        # What this process holds in full is copied from its own devices: no other process need be asked, nor wait for it.
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.device_get(jax.tree.map(gather, tree))


def make_global_array(tree: Any, shardings: Any) -> Any:
    """Make global arrays of numbers that are the same in all processes."""

    def make(x: Any, sharding: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(make, tree, shardings)


def make_global_batch(function: Callable[[int, int], Any], num_rows: int, mesh: Mesh) -> Any:
    """Make a tree of global arrays, rows spread over the mesh. Each process makes the rows of its own devices only.

    Args:
      function: (first, number) -> a tree of numpy arrays with these rows. num_rows: of all processes.
    Returns: the tree, of global arrays [num_rows, ...].
    """
    sharding = NamedSharding(mesh, SAMPLED_ROWS)
    # A set: the devices of `tensor` share their rows, which are made once for all of them.
    spans = {row_bounds(index, num_rows) for index in sharding.addressable_devices_indices_map((num_rows,)).values()}
    made = {(first, end): function(first, end - first) for first, end in sorted(spans)}

    def join(*leaves: Any) -> jax.Array:
        rows_of = dict(zip(made, leaves, strict=True))
        shape = (num_rows, *leaves[0].shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: rows_of[row_bounds(index, num_rows)])

    return jax.tree.map(join, *made.values())


def addressable_rows(tree: Any) -> tuple[np.ndarray, Any]:
    """Return (the numbers of the rows that this process answers for, those rows of each array).

    Every row is one process's.
    """

    def own_shards(x: jax.Array) -> list[Any]:
        # Rows are replicated over `tensor`, maybe over processes: the first replica alone counts, or rewards would be doubled.
        own = [shard for shard in x.addressable_shards if shard.replica_id == 0]
        return sorted(own, key=lambda shard: row_bounds(shard.index, len(x))[0])

    def rows(x: jax.Array) -> np.ndarray:
        # The empty array is for a process that holds no first replica: nothing to concatenate would be an error.
        return np.concatenate([np.zeros((0, *x.shape[1:]), x.dtype), *(np.asarray(shard.data) for shard in own_shards(x))])

    first = jax.tree.leaves(tree)[0]
    numbers = [np.arange(*row_bounds(shard.index, len(first))) for shard in own_shards(first)]
    return np.concatenate([np.arange(0), *numbers]), jax.tree.map(rows, tree)


def allgather_rows(rows: np.ndarray, tree: Any, num_rows: int) -> Any:
    """Gather all rows in every process from what each has for its `addressable_rows`.

    Args:
      rows: the numbers of this process's rows. tree: numpy arrays of these rows. num_rows: of all processes.
    Returns: the tree, of numpy arrays [num_rows, ...].
    """

    def spread(x: Any) -> np.ndarray:
        full = np.zeros((num_rows, *x.shape[1:]), x.dtype)
        full[rows] = x
        return full

    # Processes may have different numbers of rows, and an all-gather wants equal shapes: each sends all rows, 0 where they are
    # another's, and the sum has one term for each row, so it is exact. Meant for a few numbers a row.
    return jax.tree.map(lambda x: x.sum(0, dtype=x.dtype), process_allgather(jax.tree.map(spread, tree)))


def row_bounds(index: Any, num_rows: int) -> tuple[int, int]:
    """Return (first, end) of the rows of a shard."""
    first, end, _ = index[0].indices(num_rows)
    return first, end
