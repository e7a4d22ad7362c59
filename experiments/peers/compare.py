"""Our measurements and the peers', interleaved, on the CPU: python -m experiments.peers.compare --what=update --beta=0.04

Each measurement is a process of its own, one at a time; round after round, each beginning with another system. Prints a JSON
line for each, then a table. A ratio is the median of the rounds' ratios, for machines drift. The peers' virtual environments
are made on first use. A system that fails is reported, and the rest goes on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
from typing import Any

from experiments.peers import workload
from grpo_jax.caches import cache_folder
from grpo_jax.tools import cli

ROOT = pathlib.Path(__file__).parents[2]
OURS = "grpo_jax"
MODULES = {OURS: "experiments.benchmark", "trl": "experiments.peers.trl_grpo", "tunix": "experiments.peers.tunix_grpo"}
# Pinned, because the scripts call private functions. torch first and by version, as in the Makefile.
REQUIREMENTS = {
    "trl": (("torch==2.13.0",), ("trl==1.16.0", "transformers==5.23.0", "datasets", "accelerate")),
    "tunix": (("google-tunix==0.1.7",),),
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
}
SLOWED_BY_HUGE_PAGES = ("trl",)  # its tiny update takes 1.2 to 1.9 times as long with them; Tunix's and ours take less
QUIET = 0.1  # share of the machine that others may have before the table says that it is not to be trusted


@dataclasses.dataclass(frozen=True)
class MeasureError(Exception):
    """Why a system could not be measured, in one line."""

    reason: str


def parse() -> tuple[argparse.Namespace, list[str]]:
    """-> (our flags, the workload's flags as they were given)."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other flags: see experiments.benchmark.",
    )
    parser.add_argument("--systems", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--rounds", type=int, default=3, help="processes of each system")
    parser.add_argument("--limit-secs", type=float, default=1800.0, help="for one process")
    parser.add_argument("--venvs", type=pathlib.Path, default=cache_folder() / "peers")
    args, rest = parser.parse_known_args()
    workload.parse(rest)  # a mistake ends here, not in every process
    return args, rest


def python_of(system: str, venvs: pathlib.Path) -> str:
    """The interpreter of a system; a peer's environment is made, or made up to date. Raises MeasureError."""
    if system == OURS:
        return sys.executable
    folder = venvs / system
    python, done = folder / "bin" / "python", folder / "requirements.json"
    wanted = json.dumps(REQUIREMENTS[system])
    if done.exists() and done.read_text() == wanted:
        return str(python)
    print(f"installing {system} into {folder}", file=sys.stderr)
    commands = [[sys.executable, "-m", "venv", str(folder)]]
    commands += [[str(python), "-m", "pip", "install", "--quiet", *names] for names in REQUIREMENTS[system]]
    for command in commands:
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise MeasureError(f"{' '.join(command)}: {last_line(finished.stderr)}")
    done.write_text(wanted)
    return str(python)


def measure(system: str, flags: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One process; -> its record and what else the machine did meanwhile. Raises MeasureError."""
    command = [python_of(system, args.venvs), "-m", MODULES[system], *flags]
    env = {**os.environ, **ENVIRONMENT, "GLIBC_TUNABLES": "" if system in SLOWED_BY_HUGE_PAGES else cli.HUGE_PAGES}
    before = machine_secs()
    try:
        finished = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=args.limit_secs)
    except subprocess.TimeoutExpired:
        raise MeasureError(f"not done after {args.limit_secs:g} s") from None
    if finished.returncode:
        raise MeasureError(f"exit status {finished.returncode}: {last_line(finished.stderr)}")
    return {**json.loads(last_line(finished.stdout)), **disturbance(before, machine_secs())}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def machine_secs() -> tuple[float, float, float] | None:
    """CPU seconds that all cores had, that somebody used (or the hypervisor took), and that our processes used (Linux)."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return None
    ticks = [int(value) / os.sysconf("SC_CLK_TCK") for value in stat.read_text().split()[1:9]]
    ours = resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(ticks), sum(ticks) - ticks[3] - ticks[4], ours.ru_utime + ours.ru_stime


def disturbance(before: Any, after: Any) -> dict[str, float]:
    """The share of the machine that others had between two readings."""
    if before is None:
        return {}
    had, used, ours = (b - a for a, b in zip(before, after, strict=True))
    return {"others_cpu_share": round(max(0.0, used - ours) / max(had, 1e-9), 3)}


def rounds(flags: list[str], args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every system once a round; -> the records of each, a failed one as {"error": ...}. Prints them as they come."""
    records: dict[str, list[dict[str, Any]]] = {system: [] for system in args.systems}
    for number in range(args.rounds):
        first = number % len(args.systems)
        for system in args.systems[first:] + args.systems[:first]:
            try:
                record = measure(system, flags, args)
            except MeasureError as failure:
                record = {"system": system, "error": failure.reason}
            records[system].append(record)
            print(json.dumps({"round": number, **record}), flush=True)
    return records


def ratio(records: dict[str, list[dict[str, Any]]], system: str, field: str) -> float | None:
    """Median over rounds of ours / the system's; None where one of them has no number."""
    pairs = zip(records.get(OURS, []), records[system], strict=False)
    ratios = [ours[field] / its[field] for ours, its in pairs if ours.get(field) and its.get(field)]
    return statistics.median(ratios) if ratios else None


def table(records: dict[str, list[dict[str, Any]]], flags: list[str]) -> Any:
    """Medians over rounds, and ratios."""
    from rich.table import Table

    columns = ("tokens_per_s", "median_s", "first_call_s", "peak_rss_mb", "peak_rss_steady_mb", "others_cpu_share")
    names = (
        "tokens/s",
        "(rounds)",
        "s",
        "first call, s",
        "peak MB",
        "steady MB",
        "others' CPU",
        "speed ours/its",
        "peak ours/its",
    )
    result = Table("system", *names, title=" ".join(flags))
    for system, all_of_it in records.items():
        good = [record for record in all_of_it if "error" not in record]
        if not good:
            result.add_row(system, all_of_it[-1]["error"] if all_of_it else "not measured")
            continue
        cells = [median_text([r[c] for r in good if r.get(c) is not None]) for c in columns]
        cells.insert(1, " ".join(f"{record['tokens_per_s']:.0f}" for record in good))
        both = [ratio(records, system, field) for field in ("tokens_per_s", "peak_rss_mb")]
        result.add_row(system, *cells, *("-" if value is None else f"{value:.2f}" for value in both))
    return result


def median_text(values: list[float]) -> str:
    return f"{statistics.median(values):.4g}" if values else "-"


def main() -> None:
    from rich.console import Console

    args, flags = parse()
    records = rounds(flags, args)
    Console(width=None if sys.stdout.isatty() else 160).print(table(records, flags))
    disturbed = max((r.get("others_cpu_share", 0.0) for of_system in records.values() for r in of_system), default=0.0)
    if disturbed > QUIET:
        print(f"others used up to {disturbed:.0%} of the machine: not a comparison, repeat it on an idle one")
    versions = [record["version"] for of_system in records.values() for record in of_system[-1:] if "version" in record]
    print("; ".join(versions))
    if any("error" in record for of_system in records.values() for record in of_system):
        sys.exit(1)


if __name__ == "__main__":
    main()
