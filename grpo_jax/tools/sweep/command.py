"""Many runs: grpo-jax sweep --config=sweeps/variants:tiny --workdir=runs/sweep

Every config file x set of changes x seed of the sweep (configs/sweeps/base.py says how one is written), several at a time, in
runs/sweep/runs/<name>-seed<seed>, each as grpo-jax train would leave it. runs/sweep/sweep.json lists them.

    --config.seeds="(0, 1, 2)"   other seeds       --set=num_steps=400   a field of every run; may be repeated
    --config.num_processes=4     runs at a time    --config.cohort_size=8   runs in one vmapped program (0: all alike)

Runs that differ only in seed and scalar settings share their compiled programs, and all runs of a seed its warm start. The
same command goes on where a sweep was left: finished runs are kept, others resume from their checkpoints. SIGTERM saves. A
failing run is reported and stops no other; then the exit status is 1. Each finished run leaves its last checkpoints, gigabytes
for a real model; --set=checkpoint.keep=0 leaves none.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import TYPE_CHECKING

from absl import flags

from grpo_jax.errors import UserError
from grpo_jax.tools import cli

if TYPE_CHECKING:
    from grpo_jax.tools.sweep.run import Cluster

SET = flags.DEFINE_multi_string("set", [], "<field>=<value> of configs/base.py, for every run of the sweep")
LAUNCHER = flags.DEFINE_enum(
    "launcher", "processes", ["processes", "slurm", "local", "debug"], "of this machine, or one of submitit's clusters"
)
SUBMITIT = flags.DEFINE_string("submitit", "{}", 'JSON, {"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 60}')


def main() -> None:
    """Do the sweep that the flags describe; exit with 1 if a run failed. Raises UserError."""
    from grpo_jax.tools.sweep import plan
    from grpo_jax.tools.sweep.run import run_sweep

    if cli.CONFIG.value is None:
        raise UserError("--config is missing; for example --config=sweeps/variants:tiny")
    if cli.WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/sweep")
    sweep = plan.Sweep.from_config_dict(cli.CONFIG.value)
    board = run_sweep(sweep, pathlib.Path(cli.WORKDIR.value), plan.parse_assignments(SET.value), cluster_from_flags())
    # Failed runs are reported by then, and all others are done; only the status tells a script about them.
    if board.errors:
        sys.exit(1)


def cluster_from_flags() -> Cluster | None:
    """Read --launcher and --submitit; None for processes of this machine. Raises UserError."""
    from grpo_jax.tools.sweep.run import Cluster

    if LAUNCHER.value == "processes":
        return None
    # `dict` too is inside: JSON that is a list or a number fails there.
    try:
        return Cluster(LAUNCHER.value, dict(json.loads(SUBMITIT.value)))
    except (ValueError, TypeError):
        raise UserError(f"--submitit={SUBMITIT.value}: expected a JSON object") from None


def command() -> None:
    """Run from the command line."""
    cli.run(main)
