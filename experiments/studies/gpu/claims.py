"""What the README says of any device, on the accelerator that is here; a JSON line each.

python -m experiments.studies.gpu.claims resume    a run that is killed and goes on has the records of one that is not
python -m experiments.studies.gpu.claims vmapped   seconds of a step of five variants x eight seeds in one call, and alone
"""

import argparse
import dataclasses
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import jax

from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.training.run import make_run
from grpo_jax.training.stacking import places_of, several_of, stack_states

TIMINGS = ("time/", "tokens/s")
VARIANTS = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")  # none with a KL, and DAPO without its sampling: one program
SEEDS = 8
CHAINED = 5  # steps a call


def records(workdir: pathlib.Path) -> list[dict]:
    """Read a run's records, without what a clock decides."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMINGS)} for line in lines]


def resume() -> dict:
    """Run twice to the end; a third time killed in the middle, and on."""
    changes = ["--config.num_steps=120", "--config.checkpoint.every=20", "--config.eval_every=60"]

    def start(workdir: pathlib.Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "grpo_jax", "train", "--config=dapo:tiny", f"--workdir={workdir}", *changes]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    with tempfile.TemporaryDirectory() as folder:
        whole, again, killed = (pathlib.Path(folder) / name for name in ("whole", "again", "killed"))
        processes = [start(workdir) for workdir in (whole, again, killed)]
        file = killed / "metrics.jsonl"
        while processes[2].poll() is None and (not file.exists() or '"step": 70,' not in file.read_text()):
            time.sleep(0.1)
        processes[2].send_signal(signal.SIGKILL)
        processes[2].wait()
        at_kill = len(file.read_text().splitlines())
        processes[2] = start(killed)
        for process in processes:
            _, errors = process.communicate()
            if process.returncode:
                raise SystemExit(errors[-2000:])
        expected = records(whole)
        return {
            "claim": "resume",
            "records": len(expected),
            "records_at_kill": at_kill,
            "repeated_run_is_the_same": records(again) == expected,
            "resumed_run_is_the_same": records(killed) == expected,
            "success": [line["eval/success"] for line in expected if "eval/success" in line],
        }


def vmapped() -> dict:
    """Time steps of one run of each variant, and of all variants and seeds that one call advances."""
    changes = {"warm_start.num_steps": 0, "mesh.data": 1, "steps_per_call": CHAINED, "objective.kl_coef": 0.0}
    configs = []
    for variant in VARIANTS:
        raw = base.get_config("tiny", variant)
        raw.update_from_flattened_dict(changes)
        configs.append(parse_config(raw))
    runs = [make_run(configs[0])]
    runs += [runs[0].with_config(config) for config in configs[1:]]

    def secs(iterate, state) -> float:
        times = []
        for _ in range(6):
            began = time.perf_counter()
            state = jax.block_until_ready(iterate(state))[0]
            times.append((time.perf_counter() - began) / CHAINED)
        return statistics.median(times[2:])

    alone = {variant: secs(run.iterate, run.initial_state()) for variant, run in zip(VARIANTS, runs, strict=True)}
    seeded = [run.with_config(dataclasses.replace(run.config, seed=seed)) for run in runs for seed in range(SEEDS)]
    configs = [run.config for run in seeded]
    several = several_of(configs)
    states = stack_states([run.initial_state() for run in seeded], shares_base=False, places=places_of(configs, several))
    together = secs(runs[0].vmapped(several=several).iterate, states)
    return {
        "claim": "vmapped",
        "members": len(seeded),
        "step_secs_alone": alone,
        "step_secs_of_all": together,
        "share_of_one_after_the_other": together / (SEEDS * sum(alone.values())),
    }


def main() -> None:
    """Print the claim's line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=["resume", "vmapped"])
    found = {"resume": resume, "vmapped": vmapped}[parser.parse_args().claim]()
    print(json.dumps({**found, "device": jax.devices()[0].device_kind}), flush=True)


if __name__ == "__main__":
    main()
