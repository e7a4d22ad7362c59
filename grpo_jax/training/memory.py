"""The memory that a run cannot do without, compared with what there is, before anything of that size is made."""

from __future__ import annotations

import math
import os
from typing import Any

import jax

from grpo_jax.errors import UserError
from grpo_jax.training.disk import in_units
from grpo_jax.training.run import Run


def require_memory(run: Run) -> None:
    """Check that a run's state and one batch fit. Raises UserError saying what takes how much.

    Far less than a run needs (activations, caches and gradients come on top, `experiments.plan` knows them): what does not
    even have this would end in the middle of an allocation, on a CPU by the system's hand and without a word.
    """
    limit = memory_of_a_device(run)
    if limit is None:
        return
    state = bytes_on_a_device(run.abstract_state)
    batch = batch_bytes(run)
    if state > limit:
        raise UserError(
            f"config.model: weights and optimizer state take {in_units(state)} on each device, which has {in_units(limit)}; "
            "use a smaller model, adapters (config.lora.rank) or more devices (config.mesh.fsdp)"
        )
    if state + batch > limit:
        rollout = run.config.rollout
        raise UserError(
            f"config.rollout: a batch of {rollout.num_prompts} x {rollout.group_size} completions of "
            f"{rollout.max_completion_tokens} tokens takes {in_units(batch)} on each device, weights and optimizer state "
            f"{in_units(state)}, and it has {in_units(limit)}; use fewer or shorter ones"
        )


def require_memory_together(run: Run, num_members: int) -> None:
    """Check that the states and batches of several runs fit, which one call advances. Raises UserError with how many do.

    run: vmapped; a base that its members share is counted once.
    """
    limit = memory_of_a_device(run)
    if limit is None:
        return
    state = bytes_on_a_device(run.abstract_state)
    shared = bytes_on_a_device(run.abstract_state.base) if run.shares_base else 0.0
    each = state - shared + batch_bytes(run)
    together = shared + num_members * each
    if together > limit:
        most = int((limit - shared) // each)
        fix = f"use {most}" if most > 1 else "use 1, which trains them one after another"
        raise UserError(
            f"config.cohort_size: {num_members} runs in one call take {in_units(together)} on each device for their states "
            f"and batches, and it has {in_units(limit)}; {fix}"
        )


def batch_bytes(run: Run) -> float:
    """Return the bytes of one device's part of a batch."""
    return bytes_on_a_device(run.fns.example_batch(run.abstract_state.policy)) / max(run.mesh.size, 1)


def bytes_on_a_device(tree: Any) -> float:
    """Add up the bytes of shapes, of each the shard of one device; what waits in the host's memory does not count."""
    total = 0.0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if sharding is not None and sharding.memory_kind == "pinned_host":
            continue
        shape = sharding.shard_shape(x.shape) if sharding is not None else x.shape
        total += math.prod(map(float, shape)) * x.dtype.itemsize
    return total


def memory_of_a_device(run: Run) -> float | None:
    """Return the bytes that a device of the mesh has; None if it does not say."""
    device = run.mesh.devices.flat[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    if device.platform != "cpu" or not hasattr(os, "sysconf"):
        return None
    # Simulated devices share the machine's memory.
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(run.mesh.local_devices)
