"""A sweep from its config to its last run, for the command line and for notebooks."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from grpo_jax.tools.sweep import plan, pool
from grpo_jax.tools.sweep.board import Board
from grpo_jax.tools.sweep.plan import Sweep
from grpo_jax.tools.sweep.worker import jobs_of
from grpo_jax.training.data_record import pin_template_date
from grpo_jax.training.settings import check_same_config
from grpo_jax.training.signals import StopSignal


@dataclasses.dataclass(frozen=True)
class Cluster:
    """One of submitit's, "slurm", or "local" or "debug" to try it. settings: {"slurm_partition": "gpu", "timeout_min": 60}."""

    name: str
    settings: Mapping[str, Any]


def run_sweep(sweep: Sweep, workdir: pathlib.Path, changes: Mapping[str, Any], cluster: Cluster | None = None) -> Board:
    """Do what is left of a sweep, and report all along.

    Args:
      sweep: the runs.
      workdir: of the sweep; what it holds of an earlier one with the same configs is kept.
      changes: to all runs, by field of configs/base.py, dotted.
      cluster: None for processes of this machine.
    Returns: the board, with the status of each run and the errors of those that failed.
    Raises: UserError on bad input, before anything is written.
    """
    specs = plan.expand(sweep, changes)
    # Once for all: a sweep that goes on over midnight compares runs with the same prompts.
    workdirs = [workdir / spec.folder for spec in specs]
    specs = [
        dataclasses.replace(spec, config=pin_template_date(spec.config, [own, *workdirs]))
        for spec, own in zip(specs, workdirs, strict=True)
    ]
    # All runs before the first begins: nobody wants to learn after hours that the last one's folder is another config's.
    for spec in specs:
        check_same_config(workdir / spec.folder, spec.config.to_dict())
    warning = plan.too_few_seeds(sweep)
    if warning:
        print(f"note: {warning}", file=sys.stderr)
    workdir.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    num_processes = sweep.num_processes or default_num_at_once(cluster, len(specs))
    board = Board(specs, workdir, num_processes)
    jobs = jobs_of(specs, [spec for spec in specs if board.status[spec.folder] != "finished"], sweep.cohort_size, workdir)
    with StopSignal() as stop:
        if cluster is None:
            events = pool.run_in_processes(jobs, num_processes, stop)
        else:
            events = pool.run_by_submitit(jobs, cluster.name, cluster.settings, workdir, stop)
        # Closing the generator ends its processes, whatever happens in this loop; the board is saved after that.
        with board, contextlib.closing(events):
            for event in events:
                board.refresh()
                if event is None:
                    continue
                job, happened, errors = event
                for spec, error in zip(job.runs, errors, strict=True):
                    if happened == "running":
                        board.set(spec, "running")
                    else:
                        board.record_end(spec, error)
    print_outcome(board, time.monotonic() - began)
    return board


def default_num_at_once(cluster: Cluster | None, num_runs: int) -> int:
    """Return how many runs go on at a time if the config does not say: a cluster queues its jobs, so it gets all of them."""
    if cluster is None:
        return pool.default_num_processes()
    return num_runs


def print_outcome(board: Board, secs: float) -> None:
    """Print the failures, the counts, and where the time of the sweep went."""
    for folder, error in board.errors.items():
        print(f"failed: {folder}: {error}   (output: {board.workdir / folder / 'output.txt'})", file=sys.stderr)
    print(f"{board.summary()}; {secs:.0f} s. {board.describe_time(secs)}")
    print(f"runs: {board.workdir}/sweep.json   compare: grpo-jax report {board.workdir}")
