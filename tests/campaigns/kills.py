"""Kill the whole program at moments of chance and start it again: python -m tests.campaigns.kills --num=100 --kind=dapo

A chain starts in a new folder and is killed (SIGKILL, with all it has started) again and again, in part while it resumes,
until it comes to its end. Good is a chain whose records and completions are bitwise those of a run that nobody disturbed.
--kind: one of dapo, kl, host (rewards from worker processes, async_steps), lora, sweep (four runs), or all. Further flags go
to the program: --config.mesh.data=1.
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
from tests.campaigns.common import Tally, write_host_data

SETTINGS = {
    "num_steps": 12,
    "eval_every": 6,
    "checkpoint.every": 2,
    "log.completions_every": 1,
    "warm_start.num_steps": 100,
}
KINDS: dict[str, tuple[str, dict[str, object]]] = {
    "dapo": ("configs/dapo.py:runlocal", {}),
    "kl": ("configs/grpo.py:runlocal", {"objective.kl_coef": 0.1, "checkpoint.keep_best": "eval/success"}),
    "host": (
        "configs/dapo.py:runlocal",
        {"async_steps": 1, "reward.task": "tests.campaigns.hostile:right", "reward.shaping": "0.1*length"},
    ),
    "lora": ("configs/grpo.py:runlocal", {"lora.rank": 2, "objective.kl_coef": 0.1}),
    "sweep": ("configs/sweeps/variants.py:runlocal", {}),
}
SWEEP = ("--config.configs=('grpo','dapo')", "--config.seeds=(0,1)", "--config.num_processes=2")
LONGER = 1.05
SHARE = 1.1  # of the time of an undisturbed run, after which the program is killed at the latest
DURING_RESUME = 0.4  # of the kills of programs that go on: before they write their first record
POLL_SECS = 0.05


class Program:
    """The program of a kind, started and started again by the same flags."""

    def __init__(self, kind: str, more: list[str], folder: pathlib.Path):
        self.config, changes = KINDS[kind]
        self.is_sweep, self.more, self.cache = kind == "sweep", more, folder / "compiled"
        self.settings = SETTINGS | changes
        if kind == "host":
            self.settings |= write_host_data(folder)

    def start(self, workdir: pathlib.Path):
        """Start it, or go on with it."""
        set_to = "--set=" if self.is_sweep else "--config."
        flags = [f"{set_to}{name}={value}" for name, value in self.settings.items()]
        module, own = ("experiments.sweep", SWEEP) if self.is_sweep else ("experiments.train", ())
        return programs.start(
            module, f"--config={self.config}", f"--workdir={workdir}", *own, *flags, *self.more, cache=self.cache
        )

    def folders(self, workdir: pathlib.Path) -> list[pathlib.Path]:
        """The folders of its runs, those that there are."""
        return sorted((workdir / "runs").glob("*")) if self.is_sweep else [workdir]

    def results(self, workdir: pathlib.Path):
        """Everything that its runs have come to."""
        return [results(folder) for folder in self.folders(workdir)]


def results(workdir: pathlib.Path):
    """Everything that a run writes but times; the records have the norm of every gradient, so they tell of the weights."""
    rows = [json.loads(line) for line in (workdir / "completions.jsonl").read_text().splitlines()]
    summary = json.loads((workdir / "summary.json").read_text())
    return programs.records(workdir), rows, [summary[name] for name in ("steps", "success_before", "success_after")]


def difference(found, expected) -> str:
    """Name the first place where two results differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
        return f".{keys[0]}" + difference(found.get(keys[0]), expected.get(keys[0]))
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple) and len(found) == len(expected):
        place = next(i for i, (x, y) in enumerate(zip(found, expected, strict=True)) if x != y)
        return f"[{place}]" + difference(found[place], expected[place])
    return f": {str(found)[:80]} in place of {str(expected)[:80]}"


def kill(process) -> None:
    """SIGKILL to the program and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def num_lines(folders: list[pathlib.Path]) -> int:
    paths = [folder / "metrics.jsonl" for folder in folders]
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


class Waiting:
    """Waits for programs to end, for a time of chance, and learns how long those that go on take to their first record."""

    def __init__(self, program: Program, whole_secs: float, chance: random.Random):
        self.program, self.chance = program, chance
        self.whole_secs, self.resume_secs = whole_secs, whole_secs / 2

    def wait(self, process, workdir: pathlib.Path) -> tuple[str | None, bool]:
        """-> (what the program said, None if it was killed; whether it was resuming then: it had written no record)."""
        before, began = num_lines(self.program.folders(workdir)), time.monotonic()
        has_begun, goes_on = False, any(map(saved_steps, self.program.folders(workdir)))
        limit = self.chance.uniform(0.2, SHARE) * self.whole_secs
        if goes_on and self.chance.random() < DURING_RESUME:
            limit = self.chance.uniform(0.05, 1.0) * self.resume_secs
        while time.monotonic() - began < limit:
            try:
                return process.communicate(timeout=POLL_SECS)[0], False
            except programs.subprocess.TimeoutExpired:
                has_written = num_lines(self.program.folders(workdir)) > before
                if goes_on and has_written and not has_begun:
                    self.resume_secs = time.monotonic() - began
                has_begun = has_written
        kill(process)
        if not has_begun and not goes_on:
            self.whole_secs *= LONGER  # others may have come to this machine since it was measured
        return None, goes_on and num_lines(self.program.folders(workdir)) <= before


def campaign(kind: str, num: int, seed: int, more: list[str], folder: pathlib.Path) -> tuple[Tally, int]:
    """Do chains until there were `num` kills; -> (a case for each kill and each end, kills while a run resumed)."""
    chance, program = random.Random(seed), Program(kind, more, folder)
    tally = Tally(f"kills, {kind} {' '.join(more)}".strip())
    took = 0.0
    for name in ("compiles", "whole"):
        began = time.monotonic()
        output, _ = program.start(folder / name).communicate()
        took = time.monotonic() - began
        assert (folder / name).exists() and "rror" not in output, output
    expected, waiting = program.results(folder / "whole"), Waiting(program, took, chance)
    num_kills = num_resuming = chain = 0
    while num_kills < num:
        workdir, chain = folder / f"chain{chain}", chain + 1
        while True:
            process = program.start(workdir)
            output, was_resuming = waiting.wait(process, workdir)
            if output is not None:
                break
            num_kills += 1
            num_resuming += was_resuming
            tally.add("harmless", f"kill {num_kills}")
        kind_of_end, said = "harmless", output
        if "Traceback" in output:
            kind_of_end = "traceback"
        elif process.returncode or not all((each / "summary.json").exists() for each in program.folders(workdir)):
            kind_of_end = "clear line"
        elif program.results(workdir) != expected:
            kind_of_end, said = "silent", difference(program.results(workdir), expected)
        tally.add(kind_of_end, f"the end of chain {chain}", said)
        print(f"{num_kills} kills, {num_resuming} while resuming; chain {chain}: {kind_of_end}", flush=True)
    return tally, num_resuming


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[*KINDS, "all"], default="dapo")
    parser.add_argument("--keep", help="a folder to work in, which stays")
    args, more = parser.parse_known_args()
    is_good = True
    for kind in KINDS if args.kind == "all" else (args.kind,):
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(args.keep or temporary) / kind
            folder.mkdir(parents=True)
            tally, num_resuming = campaign(kind, args.num, args.seed, more, folder)
        tally.show()
        print(f"{num_resuming} of the kills while a run resumed", flush=True)
        is_good = is_good and tally.is_good and not tally.count("clear line")
    raise SystemExit(not is_good)


if __name__ == "__main__":
    main()
