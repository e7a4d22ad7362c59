"""A process that trains one run after another in the folders of its arguments: python -m tests.signals_program folder run...

Its rewards come from the host; settings.json in the folder says of what model and data. While there is a file `hang` in the
folder they do not come.
"""

import json
import os
import pathlib
import signal
import sys
import time

from grpo_jax.tools import cli
from grpo_jax.training import trainer
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.run import make_run
from tests import tiny

FOLDER = "GRPO_JAX_SIGNALS"  # environment variable
NUM_STEPS = 10_000


def hangs(completion, item):
    """A reward."""
    while (pathlib.Path(os.environ[FOLDER]) / "hang").exists():
        time.sleep(0.05)
    return float(completion < "5")


def main(folder, *names):
    # A shell has what it starts in the background ignore SIGINT, and nohup SIGHUP.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.environ[FOLDER], folder = folder, pathlib.Path(folder)
    changes = json.loads((folder / "settings.json").read_text())
    changes |= {"reward.task": "tests.signals_program:hangs", "reward.scoring.time_limit_secs": 600.0, "eval_every": 0}
    changes |= {"num_steps": NUM_STEPS, "checkpoint.every": 0, "eval.num_samples": 0}
    run = make_run(tiny.config_of("grpo", changes))
    for name in names:
        trainer.train_run(run, folder / name)
        print(f"{name}: saved {saved_steps(folder / name)}", flush=True)


if __name__ == "__main__":
    cli._call(lambda: main(*sys.argv[1:]))
