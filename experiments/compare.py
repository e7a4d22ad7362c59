"""Two clones by turns: the seconds of a step, a rollout or an update, call by call, and their ratio.

    git clone . ../base && git -C ../base checkout 20536fe
    python -m experiments.compare --base=../base --what=step --model=tiny --rounds=41

Both programs are compiled and alive at once, and take one call after the other, in an order that alternates: so a machine that
is busy now and then is busy for both. Of each pair the ratio, this clone's seconds over the other's: their median is what to
quote. A rollout is one with its prompts and rewards.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parent.parent
WARMUP = 2  # calls


def serve(what: str, model: str) -> None:
    """Make a call for each line of standard input, and answer with its seconds."""
    from experiments import benchmark  # of the clone that this process was started for

    run, state = benchmark.prepare(benchmark.parse([f"--what={what}", f"--model={model}"]))
    batch: Any = None
    if what == "update":
        state, batch, _ = run.collect(state)

    def advance(state):
        if what == "rollout":
            return run.collect(state)[0]
        if what == "update":
            return run.update(state, batch)[0]
        if run.config.steps_per_call:
            return run.iterate(state)[0]
        state, collected, _ = run.collect(state)
        return run.update(state, collected)[0]

    for _ in range(WARMUP):
        state = jax.block_until_ready(advance(state))
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        state = jax.block_until_ready(advance(state))
        print(time.perf_counter() - began, flush=True)


def start(clone: pathlib.Path, what: str, model: str) -> subprocess.Popen[str]:
    """Start a process that imports the package of a clone."""
    # The file itself, and not the module: the other clone may be older than it.
    command = [sys.executable, str(pathlib.Path(__file__).resolve()), "--serve", f"--what={what}", f"--model={model}"]
    return subprocess.Popen(
        command,
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def ask(process: subprocess.Popen[str]) -> str:
    """Return the next line of a process. Raises SystemExit where it has ended."""
    line = process.stdout.readline() if process.stdout else ""
    if not line:
        raise SystemExit(f"error: the program of {process.args} has ended; start it by hand to see why")
    return line.strip()


def compare(clones: dict[str, pathlib.Path], what: str, model: str, rounds: int) -> dict:
    """Time both by turns. Returns: medians in seconds, and the median and quartiles of the pairs' ratios."""
    processes = {name: start(clone.resolve(), what, model) for name, clone in clones.items()}
    for process in processes.values():
        while ask(process) != "ready":
            pass
    secs = {name: [] for name in processes}
    for number in range(rounds):
        for name in sorted(processes, reverse=bool(number % 2)):
            process = processes[name]
            print("go", file=process.stdin, flush=True)
            secs[name].append(float(ask(process)))
    for process in processes.values():
        process.communicate()
    ratios = [here / base for here, base in zip(secs["here"], secs["base"], strict=True)]
    return {
        "what": what,
        "model": model,
        "pairs": rounds,
        **{f"{name}_secs": statistics.median(found) for name, found in secs.items()},
        "ratio": statistics.median(ratios),
        "ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def main():
    """Print the JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=pathlib.Path, help="the other clone")
    parser.add_argument("--what", choices=("step", "rollout", "update"), default="step")
    parser.add_argument("--model", choices=("tiny", "smol", "qwen"), default="tiny")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.what, args.model)
    elif args.base is None:
        parser.error("--base: which clone to compare with")
    else:
        print(json.dumps(compare({"base": args.base, "here": ROOT}, args.what, args.model, args.rounds), indent=1))


if __name__ == "__main__":
    main()
