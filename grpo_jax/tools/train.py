"""Train: grpo-jax train --config=dapo:tiny --workdir=runs/dapo --config.seed=1

The same command goes on from the newest checkpoint in the workdir that can be read. SIGTERM, SIGHUP or Ctrl-C saves and exits
0; a second Ctrl-C ends at once. On several hosts it runs on
each of them, with --distributed or --coordinator (docs/scale.md).
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from absl import flags

from grpo_jax.errors import UserError
from grpo_jax.files import printable
from grpo_jax.tools import cli

if TYPE_CHECKING:
    import pathlib

    from grpo_jax.config import Config

FEWEST_STEPS = 20  # with fewer a rise of the held-out success would be luck
UNKNOWN = "?"  # its record was damaged
flags.declare_key_flag("step")
flags.declare_key_flag("strict")
PROFILE = flags.DEFINE_string(
    "profile", None, "steps to trace with jax.profiler, for example 10:12; the traces go to <workdir>/profile, for TensorBoard"
)
ALLOW_CONFIG_CHANGE = flags.DEFINE_list(
    "allow_config_change", [], "fields or groups, optimizer.learning_rate,mesh: go on in a workdir with other values of these"
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "one of several processes; how they meet is known from the TPU pod, Slurm, Kubernetes or Open MPI"
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "one of several processes that meet here: host:port of process 0")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "with --coordinator: how many there are", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "with --coordinator: which one this is, from 0", lower_bound=0)


def main() -> None:
    """Run the command: train, then show before and after as a table."""
    from grpo_jax.caches import enable_compilation_cache_on_accelerators
    from grpo_jax.training import trainer
    from grpo_jax.training.settings import Start

    config = cli.config_from_flags()
    if cli.WORKDIR.value is None:
        raise UserError("--workdir is missing; for example --workdir=runs/dapo")
    workdir = cli.workdir_of(cli.WORKDIR.value)
    profiled = parse_steps(PROFILE.value) if PROFILE.value else None
    # Flags are checked first: once a process has joined, others depend on it, and it cannot just exit. The cache comes after,
    # for it asks JAX for its devices, and these are fixed from then on.
    join_hosts()
    enable_compilation_cache_on_accelerators()
    start = Start(
        cli.chosen_step(workdir), cli.STRICT.value, [name.removeprefix("config.") for name in ALLOW_CONFIG_CHANGE.value]
    )
    summary = trainer.train(config, workdir, start, profiled=profiled)
    if summary is None:  # another host speaks
        return
    show_summary(summary, config, workdir)


def show_summary(summary: dict[str, Any], config: Config, workdir: pathlib.Path) -> None:
    """Print before and after as a table, and where the records are."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from grpo_jax import objectives

    # As Text: brackets in a folder's name are no markup.
    table = Table(title=Text(printable(f"{objectives.describe(config.objective)}, seed {config.seed}: {workdir}")))
    for name in ("steps", "held-out success before", "after", "training seconds"):
        table.add_column(name, justify="right")
    table.add_row(
        f"{summary['steps']}/{config.num_steps}",
        *(UNKNOWN if summary[name] is None else f"{summary[name]:.3f}" for name in ("success_before", "success_after")),
        f"{summary['training_secs']:.0f}",
    )
    console = Console()
    console.print(table)
    if config.num_steps < FEWEST_STEPS:
        note = f"note: {config.num_steps} steps show that everything runs; they are too few to learn from"
        console.print(note, soft_wrap=True)
    shown = printable(str(workdir))
    console.print(Text(f"curve: {shown}/learning_curve.png   records: {shown}/metrics.jsonl"), soft_wrap=True)


def join_hosts() -> None:
    """Become one of several processes, if a flag says so. Raises UserError."""
    from grpo_jax.parallel import hosts

    # A forgotten flag has to be an error: the process would train by itself while the others wait for it.
    named = {"--coordinator": COORDINATOR.value, "--num_processes": NUM_PROCESSES.value, "--process_id": PROCESS_ID.value}
    missing = [name for name, value in named.items() if value is None]
    if DISTRIBUTED.value and len(missing) == len(named):
        hosts.start()
    elif DISTRIBUTED.value:
        raise UserError(f"--distributed finds that out by itself; leave out {', '.join(named)}")
    elif not missing:
        hosts.start(*named.values())
    elif len(missing) < len(named):
        raise UserError(f"{missing[0]} is missing; --coordinator, --num_processes and --process_id go together")
    if hosts.is_joined() and not hosts.is_first():
        logging.getLogger("grpo_jax").setLevel(logging.ERROR)  # all have the same to say of the data


def parse_steps(text: str) -> range:
    """Read 10:12 as steps 10, 11 and 12. Raises UserError."""
    first, _, last = text.partition(":")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UserError(f"--profile={text}: expected two steps, first:last, for example 10:12")
    return range(int(first), int(last) + 1)


def command() -> None:
    """Run from the command line."""
    cli.run(main)
