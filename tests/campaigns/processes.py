"""Kill, stop or signal one of several hosts, and start them again: python -m tests.campaigns.processes --num=20 --seed=0

The hosts are processes of this machine with two simulated devices each. A case disturbs one of them once; good is that all of
them end, by themselves and with a line that says why, and that the same command on all goes on to bitwise what hosts that
nobody disturbed come to. Further flags go to the program: --config.mesh.fsdp=2.
"""

import argparse
import contextlib
import pathlib
import random
import signal
import subprocess
import tempfile
import time

from tests import programs
from tests.campaigns.common import Tally
from tests.campaigns.kills import results

SHORT = (
    "--config.num_steps=10",
    "--config.eval_every=5",
    "--config.checkpoint.every=2",
    "--config.log.completions_every=1",
    "--config.warm_start.num_steps=20",
    "--config.eval.num_samples=0",
)
LIMIT_SECS = 360  # for the others to notice: JAX asks for a sign of life for 30 s, and waits 5 minutes for all to come
SAVES = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OF_JAX = "Terminating process because the JAX distributed service detected fatal errors"


def started(workdir: pathlib.Path, args: argparse.Namespace, more: list[str], cache: pathlib.Path):
    """The hosts of a run, at work."""

    def flags(port, process):
        joining = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={args.hosts}", f"--process_id={process}"]
        return [f"--config={args.config}", f"--workdir={workdir}", *SHORT, *more, *joining]

    return programs.together("experiments.train", args.hosts, flags, num_devices=2, cache=cache)


def wait(processes) -> list[str] | None:
    """-> what each has said, or None if not all have ended in time."""
    deadline, outputs = time.monotonic() + LIMIT_SECS, []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=max(0.1, deadline - time.monotonic()))[0])
    except subprocess.TimeoutExpired:
        return None
    return outputs


def disturb(processes, chance: random.Random, within_secs: float) -> tuple[str, int, bool]:
    """Do something to one of them; -> (what, to whom, whether it goes on by itself)."""
    what = chance.choice(("SIGKILL", "SIGSTOP", "SIGTERM", "SIGINT", "SIGHUP", "a pause"))
    which = chance.randrange(len(processes))
    with contextlib.suppress(subprocess.TimeoutExpired):
        processes[which].wait(chance.uniform(0.25, 1.0) * within_secs)
    with contextlib.suppress(ProcessLookupError):  # it has ended
        if what == "a pause":
            processes[which].send_signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0.5, 5.0))
            processes[which].send_signal(signal.SIGCONT)
        else:
            processes[which].send_signal(getattr(signal, what))
    return what, which, what != "SIGSTOP"


def judge_ends(what: str, which: int, processes, outputs: list[str]) -> tuple[str, str]:
    """Look at how all have ended; -> (one of KINDS, what was said)."""
    clear = 0
    for number, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        said = f"process {number}, {what} to {which}, status {process.returncode}: {output[-400:]}"
        if "Traceback" in output:
            return "traceback", said
        is_victim = number == which and what in ("SIGKILL", "SIGSTOP", *[each.name for each in SAVES])
        if process.returncode and not is_victim:
            if "error: " not in output and OF_JAX not in output:
                return "silent", said
            clear += 1
    return ("clear line" if clear else "harmless"), what


def campaign(args: argparse.Namespace, more: list[str], folder: pathlib.Path) -> Tally:
    """Do args.num cases."""
    chance, cache = random.Random(args.seed), folder / "compiled"
    tally = Tally(f"processes, {args.hosts} hosts, {args.config} {' '.join(more)}".strip())
    for name in ("compiles", "whole"):
        began = time.monotonic()
        with started(folder / name, args, more, cache) as processes:
            assert wait(processes) is not None
        took = time.monotonic() - began
    expected = results(folder / "whole")
    for number in range(args.num):
        workdir = folder / f"case{number}"
        with started(workdir, args, more, cache) as processes:
            what, which, goes_on = disturb(processes, chance, took)
            others = [each for i, each in enumerate(processes) if goes_on or i != which]
            outputs = wait(others)
            if not goes_on:
                processes[which].kill()
                outputs = outputs and wait(processes)
        case = f"{number}: {what} to {which}"
        if outputs is None:
            tally.add("silent", case, f"the others did not end within {LIMIT_SECS} s")
            continue
        kind, said = judge_ends(what, which, processes, outputs)
        with started(workdir, args, more, cache) as processes:
            outputs = wait(processes)
        if outputs is None or any(process.returncode for process in processes) or results(workdir) != expected:
            kind, said = "silent", f"{said}; started again: {(outputs or ['no end'])[0][-400:]}"
        tally.add(kind, case, said)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--config", default="configs/dapo.py:runlocal")
    args, more = parser.parse_known_args()
    for number in SAVES:  # a shell has what it starts in the background ignore SIGINT, and nohup SIGHUP
        signal.signal(number, signal.SIG_DFL)
    with tempfile.TemporaryDirectory() as folder:
        tally = campaign(args, more, pathlib.Path(folder))
    tally.show()
    raise SystemExit(not tally.is_good)


if __name__ == "__main__":
    main()
