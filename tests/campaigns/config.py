"""Change one or two settings by chance, to anything at all, and run one step: python -m tests.campaigns.config --num=1000

Good is a step whose numbers are all finite, or one line. A part of the changes is refused before anything is compiled;
--only_parse does no more than that.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import traceback

from grpo_jax.config import Config, parse_config
from grpo_jax.configs import dapo
from grpo_jax.errors import UserError
from grpo_jax.knobs import walk
from grpo_jax.tools import cli, train
from tests import programs, tiny
from tests.campaigns.common import KINDS, SMALL, Tally

FLOATS = (0.0, -0.0, 1e-45, 1e-30, 1e-8, 0.5, 1.0, 2.0, -1.0, 1e6, 1e30, 1e39, 1e300, math.inf, -math.inf, math.nan)
INTEGERS = (0, 1, 2, 3, 7, 64, 1000, -1, -(2**31), 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**30)
TEXTS = ("", "x", "\x00", "\ud800", "../..", "a" * 20_000, "learner", "bfloat16", "[/x]", "\x1b[31m", "all-linear")
TIME_LIMIT_SECS = 300


def values_for(value):
    """Values of the field's kind, likely and unlikely, and of other kinds."""
    if isinstance(value, bool):
        return (True, False)
    if isinstance(value, int):
        return INTEGERS
    if isinstance(value, float):
        return (*FLOATS, *INTEGERS)
    if isinstance(value, tuple):
        return ((), ("x",), ("q_proj",), ("\x00",), (1.0,))
    if isinstance(value, str):
        return TEXTS
    return (None, *FLOATS, *INTEGERS)


def draw(chance: random.Random):
    """-> {field: value} of one or two changes."""
    fields = list(walk(Config()))
    chosen = chance.sample(fields, chance.choice((1, 1, 2)))
    return {name: chance.choice(values_for(value)) for name, value, _ in chosen}


def parse(changes) -> Config:
    """Raises UserError."""
    values = tiny.config_of("dapo", {**SMALL, "num_steps": 1, "eval_every": 0}).to_dict()
    for name, value in changes.items():
        *groups, last = name.split(".")
        inner = values
        for group in groups:
            inner = inner[group]
        inner[last] = value
    return parse_config(values)


class Programs:
    """Runs the program train again and again, each time in a process of its own that is forked from one with all imports.

    That process has computed nothing, so a fork of it is as good as a start, and takes a quarter of the time. Compiled programs
    are kept in `cache`.
    """

    def __init__(self, cache: pathlib.Path):
        # Read when jax is imported, by the process that is forked.
        os.environ.update(programs.environment(cache=cache))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tests.campaigns.common", "grpo_jax.tools.train"])

    def run(self, flags: list[str], output: pathlib.Path) -> tuple[int | None, str]:
        """-> (exit status, None if it did not end in time; what was said)."""
        process = self.context.Process(target=run_command_line, args=(flags, str(output)))
        process.start()
        process.join(TIME_LIMIT_SECS)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
        return status, output.read_text(errors="replace") if output.exists() else ""


def run_command_line(flags: list[str], output: str) -> None:
    """Do what `python -m experiments.train` does with these flags."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    for number in (1, 2):
        os.dup2(descriptor, number)
    sys.argv = ["experiments.train", *flags]
    cli.run(train.main)


def flags_of(config: Config) -> list[str]:
    """The settings that are others than those of the config file, as flags."""
    usual = {name: value for name, value, _ in walk(parse_config(dapo.get_config("runlocal")))}
    changed = [(name, value) for name, value, _ in walk(config) if repr(value) != repr(usual[name])]
    return [f"--config.{name}={value!r}" if isinstance(value, tuple) else f"--config.{name}={value}" for name, value in changed]


def run_one_step(config: Config, folder: pathlib.Path, started: Programs) -> tuple[str, str]:
    """Run a config that was accepted, by the command line; -> (one of KINDS, what was said)."""
    flags = ["--config=configs/dapo.py:runlocal", f"--workdir={folder}", *flags_of(config)]
    status, output = started.run(flags, folder.with_suffix(".txt"))
    if status is None:
        return "silent", f"it did not end within {TIME_LIMIT_SECS} s"
    if "Traceback" in output:
        return "traceback", output.strip().splitlines()[-1]
    if status:
        return "clear line" if "error: " in output else "silent", f"status {status}: {output[-300:]}"
    numbers = [value for record in programs.records(folder) for value in record.values()]
    return ("harmless" if all(map(math.isfinite, numbers)) else "silent"), f"not finite: {numbers}"


def add(tally: Tally, kind: str, changes, said: str = "") -> None:
    """Count a case, and tell of a bad one at once: a campaign is long."""
    tally.add(kind, str(changes)[:300], said)
    if kind in ("traceback", "silent"):
        print(f"{kind}: {changes!r:.300}: {said!r:.600}", flush=True)


def run_together(tally: Tally, accepted, folder: pathlib.Path, started: Programs) -> None:
    """Run all changes of some cases in one step; where it is not harmless, or they do not go together, each case by itself."""
    fields = [name for changes, _ in accepted for name in changes]
    if len(accepted) > 1 and len(set(fields)) == len(fields):
        with contextlib.suppress(UserError):
            config = parse({name: value for changes, _ in accepted for name, value in changes.items()})
            if run_one_step(config, folder, started)[0] == "harmless":
                for changes, _ in accepted:
                    add(tally, "harmless", changes)
                return
    for place, (changes, config) in enumerate(accepted):
        own = folder.with_name(f"{folder.name}-{place}")
        kind, said = run_one_step(config, own, started)
        shutil.rmtree(own, ignore_errors=True)
        add(tally, kind, changes, said)


def campaign(num: int, seed: int, folder: pathlib.Path, *, only_parse: bool = False, together: int = 1) -> Tally:
    """Do `num` changes. together: accepted ones that are tried in one run first."""
    chance, tally = random.Random(seed), Tally("config, parsed" if only_parse else "config")
    started = None if only_parse else Programs(folder / "compiled")
    if started:
        # A line that says something else would else be taken for one about the change.
        kind, said = run_one_step(parse({}), folder / "unchanged", started)
        assert kind == "harmless", said
    accepted = []
    for number in range(num):
        changes = draw(chance)
        try:
            config = parse(changes)
        except UserError as error:
            add(tally, "clear line" if "\n" not in str(error) else "silent", changes, str(error))
        except Exception:
            add(tally, "traceback", changes, traceback.format_exc().strip().splitlines()[-1])
        else:
            if started is None:
                add(tally, "harmless", changes)
            else:
                accepted.append((changes, config))
        if len(accepted) == together or (accepted and number == num - 1):
            run_together(tally, accepted, folder / str(number), started)
            accepted = []
        if number % 50 == 49 and started:
            print(f"{number + 1}: {[tally.count(kind) for kind in KINDS]}", flush=True)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only_parse", action="store_true")
    parser.add_argument("--together", type=int, default=1, help="so many accepted cases are first run in one step")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(args.num, args.seed, pathlib.Path(folder), only_parse=args.only_parse, together=args.together)
    tally.show()
    raise SystemExit(not tally.is_good)


if __name__ == "__main__":
    main()
