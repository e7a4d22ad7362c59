"""Kill the whole program at moments of chance and start it again: python -m tests.campaigns.kills --num=100 --config=FILE

A chain starts in a new folder and is killed (SIGKILL, with all it has started) again and again, in part while it resumes,
until it comes to its end. Good is a chain whose records and completions are bitwise those of a run that nobody disturbed.
Further flags go to the program: --config.async_steps=1.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import tempfile
import time

from grpo_jax.training.checkpoint import saved_steps
from tests import programs
from tests.campaigns.common import Tally

SHORT = (
    "--config.num_steps=12",
    "--config.eval_every=6",
    "--config.checkpoint.every=2",
    "--config.log.completions_every=1",
    "--config.warm_start.num_steps=100",
)


def start(workdir: pathlib.Path, args: argparse.Namespace, more: list[str], cache: pathlib.Path):
    """Start the program, or go on with it."""
    return programs.start("experiments.train", f"--config={args.config}", f"--workdir={workdir}", *SHORT, *more, cache=cache)


def results(workdir: pathlib.Path):
    """Everything that a run writes but times; the records have the norm of every gradient, so they tell of the weights."""
    rows = [json.loads(line) for line in (workdir / "completions.jsonl").read_text().splitlines()]
    summary = json.loads((workdir / "summary.json").read_text())
    return programs.records(workdir), rows, [summary[name] for name in ("steps", "success_before", "success_after")]


def kill(process) -> None:
    """SIGKILL to the program and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def num_lines(workdir: pathlib.Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def campaign(args: argparse.Namespace, more: list[str], folder: pathlib.Path) -> tuple[Tally, int]:
    """Do chains until there were args.num kills; -> (a case for each kill and each end, kills while a run resumed)."""
    chance, cache = random.Random(args.seed), folder / "compiled"
    tally = Tally(f"kills, {args.config} {' '.join(more)}".strip())
    for name in ("compiles", "whole"):
        began = time.monotonic()
        output, _ = start(folder / name, args, more, cache).communicate()
        took = time.monotonic() - began
    expected = results(folder / "whole")
    num_kills = num_resuming = chain = 0
    while num_kills < args.num:
        workdir, chain = folder / f"chain{chain}", chain + 1
        while True:
            before = num_lines(workdir)
            process = start(workdir, args, more, cache)
            try:
                output, _ = process.communicate(timeout=chance.uniform(0.2, 1.1) * took)
                break
            except programs.subprocess.TimeoutExpired:
                kill(process)
            num_kills += 1
            # It had a checkpoint to go on from, and had written nothing yet: it was resuming.
            num_resuming += bool(saved_steps(workdir)) and num_lines(workdir) <= before
            tally.add("harmless", f"kill {num_kills}")
        kind, said = "harmless", output
        if "Traceback" in output:
            kind = "traceback"
        elif process.returncode or not (workdir / "summary.json").exists():
            kind = "clear line"
        elif results(workdir) != expected:
            kind = "silent"
        tally.add(kind, f"the end of chain {chain}", said)
    return tally, num_resuming


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="configs/dapo.py:runlocal")
    args, more = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        tally, num_resuming = campaign(args, more, pathlib.Path(folder))
    tally.show()
    print(f"{num_resuming} of the kills while a run resumed")
    raise SystemExit(not tally.is_good or tally.count("clear line") > 0)


if __name__ == "__main__":
    main()
