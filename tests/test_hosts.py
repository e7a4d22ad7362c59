"""Several processes on loopback, each with its own simulated devices, do what one process does; kills and signals included."""

import json
import os
import random
import signal

import pytest

from configs import dapo
from grpo_jax import trainer
from grpo_jax.config import Config
from grpo_jax.runlog import read_completions
from tests import programs
from tests.hf_models import torch_model
from tests.test_resume import wait_for_step
from tests.test_tasks_host import save_hf_tokenizer

NUM_STEPS = 12
# The completions are noise of a random model; about half of the groups have both kinds.
REWARD = """
def early(completion, item):
    assert item["answer"] == str(2 * int(item["prompt"].split()[2]))
    return float(completion < "P")
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def same_numbers(workdir, expected):
    """Every metric of every step, to float32 rounding, and the completions."""
    for record, other in zip(programs.records(workdir), programs.records(expected), strict=True):
        assert record == pytest.approx(other, rel=1e-4, abs=1e-5)
    texts = [[row["completion"] for row in read_completions(folder)] for folder in (workdir, expected)]
    assert texts[0] == texts[1] and len(texts[0]) > 30


def ended(together):
    """-> (exit statuses, outputs) of processes, waited for."""
    outputs = [process.communicate(timeout=120)[0] for process in together]
    return [process.returncode for process in together], outputs


def test_two_processes_do_what_one_does_and_only_the_first_speaks(tmp_path):
    flags = ["--config=configs/dapo.py:runlocal", "--config.warm_start.num_steps=100", "--config.eval.num_samples=0"]
    statuses, outputs = ended(programs.start_together(2, 4, *flags, f"--workdir={tmp_path / 'two'}"))
    assert statuses == [0, 0], "\n".join(outputs)
    assert "step 3/3" in outputs[0] and not {"step", "curve", "dapo"} & set(outputs[1].split())
    config = dapo.get_config("runlocal")
    config.warm_start.num_steps, config.eval.num_samples = 100, 0
    trainer.train(Config.from_config_dict(config), tmp_path / "one")
    same_numbers(tmp_path / "two", tmp_path / "one")


@pytest.fixture
def flags(tmp_path):
    """A task on the host with a user's reward and dynamic sampling; a model in a Hugging Face folder, fsdp over all hosts."""
    folder = tmp_path / "model"
    save_hf_tokenizer(folder, {}, eos_token="<eos>", pad_token="<pad>")
    torch_model("llama tied", vocab_size=259).save_pretrained(folder)
    rows = [{"prompt": f"Tom has {i} eggs and buys as many. How many has he?", "answer": 2 * i} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    return [
        "--config=configs/dapo.py:runlocal",
        f"--config.model.path={folder}",
        "--config.task.name=jsonl",
        f"--config.task.jsonl.path={tmp_path / 'sums.jsonl'}",
        "--config.task.use_chat_template=False",
        "--config.reward.task=my_rewards:early",
        "--config.reward.scoring.time_limit_secs=60",
        "--config.warm_start.num_steps=0",
        "--config.rollout.group_size=2",
        "--config.eval.num_prompts=12",
        "--config.eval.num_samples=0",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        "--config.mesh.fsdp_min_elements=0",
        f"--config.num_steps={NUM_STEPS}",
        "--config.eval_every=6",
        "--config.checkpoint.every=3",
    ]


def test_two_processes_with_a_host_task_are_killed_and_stopped_and_leave_the_records_of_an_undisturbed_run(
    tmp_path, cache, flags, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    one, whole, torn = tmp_path / "one", tmp_path / "whole", tmp_path / "torn"
    status, output = programs.run("experiments.train", *flags, f"--workdir={one}", num_devices=8, cache=cache)
    assert status == 0, output
    statuses, outputs = ended(programs.start_together(2, 4, *flags, f"--workdir={whole}", cache=cache))
    assert statuses == [0, 0], "\n".join(outputs)
    same_numbers(whole, one)
    records = programs.records(whole)
    assert any(record.get("groups/pending", 0) > 0 for record in records), "no groups were waiting: nothing is tested"
    assert len({record.get("groups/rounds") for record in records}) > 2

    killed = programs.start_together(2, 4, *flags, f"--workdir={torn}", cache=cache)
    wait_for_step(killed[0], torn, random.Random(os.urandom(8)).choice([3, 4, 5]))
    killed[0].kill()
    statuses, outputs = ended(killed)
    assert statuses == [-signal.SIGKILL, -signal.SIGABRT]
    assert "Terminating process because the JAX distributed service detected fatal errors" in outputs[1]

    stopped = programs.start_together(2, 4, *flags, f"--workdir={torn}", cache=cache)
    wait_for_step(stopped[0], torn, 8)
    stopped[1].send_signal(signal.SIGTERM)
    statuses, outputs = ended(stopped)
    assert statuses == [0, 0], "\n".join(outputs)
    stopped_at = programs.records(torn)[-1]["step"]
    assert 8 <= stopped_at < NUM_STEPS and (torn / "checkpoints" / str(stopped_at)).is_dir()

    statuses, outputs = ended(programs.start_together(2, 4, *flags, f"--workdir={torn}", cache=cache))
    assert statuses == [0, 0], "\n".join(outputs)
    assert programs.records(torn) == records
    assert (torn / "completions.jsonl").read_text() == (whole / "completions.jsonl").read_text()
