"""One of several processes that train: python -m tests.hosts_program port processes process folder run...

The run `two` is GTPO's, by the flags of experiments.train; it can only be the first, for it joins the processes. All others are
of one task on the host, by the same compiled calls one after another, each from where it left off; `torn torn` is one run
twice.
"""

import faulthandler
import json
import pathlib
import signal
import sys

from grpo_jax.config import parse_config
from grpo_jax.configs import dapo
from grpo_jax.parallel import hosts
from grpo_jax.tools import cli, train
from grpo_jax.training import trainer
from grpo_jax.training.run import make_run

SHOW_STACKS = signal.SIGUSR1
NUM_STEPS = 6
SMALL = {"warm_start.num_steps": 20, "eval.num_samples": 0}  # of the run `two`
# The completions are noise of a random model; about half of the groups have both kinds.
REWARD = """
def early(completion, item):
    assert item["answer"] == str(2 * int(item["prompt"].split()[2]))
    return float(completion < "P")
"""


def write_data(folder):
    """The questions and the user's reward; the model is written by someone who has torch."""
    rows = [{"prompt": f"Tom has {i} eggs and buys as many. How many has he?", "answer": 2 * i} for i in range(40)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my_rewards.py").write_text(REWARD)


def config_of(folder, num_devices):
    """A user's reward, dynamic sampling, and weights in parts over all devices."""
    config = dapo.get_config("runlocal")
    config.model.path = str(folder / "model")
    config.task.name, config.task.jsonl.path = "jsonl", str(folder / "sums.jsonl")
    config.task.use_chat_template = False
    config.reward.task = "my_rewards:early"
    config.reward.scoring.time_limit_secs, config.reward.scoring.num_workers = 60.0, 1
    config.warm_start.num_steps = 0
    config.rollout.group_size = 2
    config.eval.num_prompts, config.eval.num_samples = 12, 0
    config.mesh.data, config.mesh.fsdp, config.mesh.fsdp_min_elements = 1, num_devices, 0
    config.num_steps, config.eval_every, config.checkpoint.every = NUM_STEPS, 3, 2
    return parse_config(config)


def train_by_flags(port, num_processes, process, workdir):
    """What `python -m experiments.train` does, with its flags, but for the end of the process."""
    joining = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={num_processes}", f"--process_id={process}"]
    small = [f"--config.{name}={value}" for name, value in SMALL.items()]
    sys.argv[1:] = ["--config=configs/gtpo.py:runlocal", f"--workdir={workdir}", *small, *joining]
    try:
        cli.run(train.main)
    except SystemExit as end:
        if end.code:
            raise


def main(port, num_processes, process, folder, *names):
    faulthandler.register(SHOW_STACKS)
    folder = pathlib.Path(folder)
    if names[0] == "two":
        train_by_flags(port, num_processes, process, folder / "two")
        names = names[1:]
    else:
        hosts.start(f"127.0.0.1:{port}", int(num_processes), int(process))
    run = make_run(config_of(folder, 4))
    for name in names:
        trainer.train_run(run, folder / name)
        saved = max(int(path.name) for path in (folder / name / "checkpoints").iterdir() if path.name.isdigit())
        print(f"{name} has ended at {saved}", flush=True)
    run.task.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
