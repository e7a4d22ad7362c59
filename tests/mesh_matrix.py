"""Every variant x mesh x accumulation against one device, 12 minutes: python -m tests.mesh_matrix [variant ...]"""

import os
import sys

from tests.programs import COMPILED_QUICKLY

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {COMPILED_QUICKLY}"

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from tests import test_mesh

VARIANTS = tuple(sys.argv[1:]) or ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (4, 1, 2), (1, 1, 2))
MICROBATCHES = (1, 2, 4)
TOLERANCE = 1e-5  # of a parameter after three updates, by its tensor's largest; of a loss, by itself


def updated(sizes, num_microbatches, variant):
    """-> (parameters, metrics); programs are forgotten, for a process can hold so many only."""
    _, params, metrics = test_mesh.updated.__wrapped__(sizes, num_microbatches, variant)
    jax.clear_caches()
    return params, metrics


def difference(result, expected):
    """The larger of the two, relative."""
    (params, metrics), (one, one_metrics) = result, expected
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(one), strict=True)
    losses = [(each["loss/total"], other["loss/total"]) for each, other in zip(metrics, one_metrics, strict=True)]
    return max(*(np.abs(x - y).max() / np.abs(y).max() for x, y in pairs), *(abs(x - y) / abs(y) for x, y in losses))


def main():
    jax.config.update("jax_default_matmul_precision", "highest")
    table = Table(title="Largest relative difference from one device, three updates")
    for name in ("variant", "data x fsdp x tensor", *(f"accumulation {num}" for num in MICROBATCHES)):
        table.add_column(name)
    worst = 0.0
    for variant in VARIANTS:
        expected = updated(test_mesh.ONE, 1, variant)
        for sizes in MESHES:
            found = [float(difference(updated(sizes, num, variant), expected)) for num in MICROBATCHES]
            worst = max(worst, *found)
            table.add_row(variant, " x ".join(map(str, sizes)), *(f"{each:.1e}" for each in found))
            print(variant, sizes, *(f"{each:.1e}" for each in found), flush=True)
    Console().print(table)
    assert worst < TOLERANCE, worst


if __name__ == "__main__":
    main()
