"""Many runs: python -m experiments.sweep --config=configs/sweeps/variants.py:tiny --workdir=runs/sweep

Every config file x set of changes x seed of the sweep (configs/sweeps/base.py says how one is written), several at a time, in
runs/sweep/runs/<name>-seed<seed>, each as experiments.train would leave it. runs/sweep/sweep.json lists them.

    --config.seeds="(0, 1, 2)"   other seeds       --set=num_steps=400   a field of every run; may be repeated
    --config.num_processes=4     runs at a time    --config.cohort_size=8   runs in one vmapped program (0: all alike)

Runs that differ only in seed and scalar settings share their compiled programs, and all runs of a seed its warm start. The
same command goes on where a sweep was left: finished runs are kept, others resume from their checkpoints. SIGTERM saves. A
failing run is reported and stops no other; then the exit status is 1.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import flags

from experiments import cli
from experiments.sweep import plan, pool
from experiments.sweep.board import Board
from experiments.sweep.plan import RunSpec, Sweep
from experiments.sweep.worker import jobs_of
from grpo_jax.checkpoint import require_same_config
from grpo_jax.errors import UserError
from grpo_jax.trainer import StopSignal

SET = flags.DEFINE_multi_string("set", [], "<field>=<value> of configs/base.py, for every run of the sweep")
LAUNCHER = flags.DEFINE_enum(
    "launcher", "processes", ["processes", "slurm", "local", "debug"], "of this machine, or one of submitit's clusters"
)
SUBMITIT = flags.DEFINE_string("submitit", "{}", 'JSON, {"slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 60}')


def main() -> None:
    if cli.CONFIG.value is None:
        raise UserError("--config is missing; for example --config=configs/sweeps/variants.py:tiny")
    if cli.WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/sweep")
    sweep, workdir = Sweep.from_config_dict(cli.CONFIG.value), pathlib.Path(cli.WORKDIR.value)
    specs = plan.expand(sweep, plan.parsed(SET.value))
    for spec in specs:
        require_same_config(workdir / spec.folder, spec.config.to_dict())
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with StopSignal() as stop:
        board = run(sweep, specs, workdir, stop)
    closing_words(board, time.monotonic() - began)
    if board.errors:
        sys.exit(1)


def run(sweep: Sweep, specs: Sequence[RunSpec], workdir: pathlib.Path, stop: StopSignal) -> Board:
    """Do what is left of the sweep."""
    is_here = LAUNCHER.value == "processes"
    num_processes = sweep.num_processes or (pool.default_num_processes() if is_here else len(specs))
    board = Board(specs, workdir, num_processes)
    jobs = jobs_of(specs, [spec for spec in specs if board.status[spec.folder] != "finished"], sweep.cohort_size, workdir)
    if is_here:
        events = pool.in_processes(jobs, num_processes, stop)
    else:
        events = pool.by_submitit(jobs, LAUNCHER.value, submitit_settings(), workdir, stop)
    with board, contextlib.closing(events):
        for event in events:
            board.refresh()
            if event is None:
                continue
            job, happened, error = event
            for spec in job.runs:
                board.set(spec, "running") if happened == "running" else board.ended(spec, error)
    return board


def submitit_settings() -> dict[str, Any]:
    """What --submitit says. Raises UserError."""
    try:
        return dict(json.loads(SUBMITIT.value))
    except (ValueError, TypeError):
        raise UserError(f"--submitit={SUBMITIT.value}: expected a JSON object") from None


def closing_words(board: Board, secs: float) -> None:
    """What became of the sweep, and what took its time."""
    for folder, error in board.errors.items():
        print(f"failed: {folder}: {error}   (output: {board.workdir / folder / 'output.txt'})", file=sys.stderr)
    print(f"{board.summary()}; {secs:.0f} s. {board.what_bounds_it(secs)}")
    print(f"runs: {board.workdir}/sweep.json   compare: python -m experiments.report {board.workdir}")


if __name__ == "__main__":
    cli.run(main)
