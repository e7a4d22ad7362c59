"""What the README says of any device, on the accelerator that is here; a JSON line each.

python -m experiments.studies.gpu.claims resume    a run that is killed and goes on has the records of one that is not
python -m experiments.studies.gpu.claims vmapped   seconds of a step of 40 runs in one call, and of one run
"""

import argparse
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
from grpo_jax.training.stacking import stack_states

TIMINGS = ("time/", "tokens/s")
MEMBERS = 40  # five settings of eight seeds


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
    """Time steps of one run, and of 40 that one call advances."""
    raw = base.get_config("tiny", "dapo")
    raw.update_from_flattened_dict({"warm_start.num_steps": 0, "mesh.data": 1, "steps_per_call": 5})
    run = make_run(parse_config(raw))

    def secs(iterate, state) -> float:
        times = []
        for _ in range(6):
            began = time.perf_counter()
            state = jax.block_until_ready(iterate(state))[0]
            times.append((time.perf_counter() - began) / 5)
        return statistics.median(times[2:])

    one = secs(run.iterate, run.initial_state())
    together = secs(run.vmapped().iterate, stack_states([run.initial_state() for _ in range(MEMBERS)], shares_base=False))
    return {
        "claim": "vmapped",
        "members": MEMBERS,
        "step_secs_of_one": one,
        "step_secs_of_all": together,
        "share_of_one_after_the_other": together / (MEMBERS * one),
    }


def main() -> None:
    """Print the claim's line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=["resume", "vmapped"])
    found = {"resume": resume, "vmapped": vmapped}[parser.parse_args().claim]()
    print(json.dumps({**found, "device": jax.devices()[0].device_kind}), flush=True)


if __name__ == "__main__":
    main()
