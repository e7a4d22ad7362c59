"""Several processes on loopback, each with its own simulated devices, do what one process does; kills and signals included."""

import re
import signal

import numpy as np
import pytest
from absl.testing import flagsaver

from configs import gtpo
from grpo_jax.config import parse_config
from grpo_jax.errors import UserError
from grpo_jax.parallel import hosts
from grpo_jax.parallel.sharding import make_mesh
from grpo_jax.tools import train
from grpo_jax.training import trainer
from grpo_jax.training.runlog import read_completions
from tests import hosts_program, programs, tiny
from tests.hf_models import torch_model
from tests.test_resume import wait_for_step
from tests.test_tasks_host import save_hf_tokenizer


def same_numbers(workdir, expected):
    """Every metric of every step, to float32 rounding, and the completions."""
    for record, other in zip(programs.records(workdir), programs.records(expected), strict=True):
        assert record == pytest.approx(other, rel=1e-4, abs=1e-5)
    texts = [[row["completion"] for row in read_completions(folder)] for folder in (workdir, expected)]
    assert texts[0] == texts[1] and len(texts[0]) > 20


def ended(together):
    """-> (exit statuses, outputs) of processes, waited for."""
    outputs = [process.communicate(timeout=300)[0] for process in together]
    return [process.returncode for process in together], outputs


def test_two_processes_do_what_one_does_and_only_the_first_speaks(tmp_path):
    """With GTPO, whose statistics are of the whole batch: rows of both processes."""

    def flags(port, process):
        joining = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={process}")
        small = ("--config.warm_start.num_steps=100", "--config.eval.num_samples=0")
        return ["--config=configs/gtpo.py:runlocal", f"--workdir={tmp_path / 'two'}", *small, *joining]

    with programs.together("experiments.train", 2, flags, num_devices=2) as two:
        statuses, outputs = ended(two)
    assert statuses == [0, 0], "\n".join(outputs)
    assert "step 3/3" in outputs[0] and not {"step", "curve", "gtpo"} & set(outputs[1].split())
    config = gtpo.get_config("runlocal")
    config.warm_start.num_steps, config.eval.num_samples, config.mesh.data = 100, 0, 4
    trainer.train(parse_config(config), tmp_path / "one")
    same_numbers(tmp_path / "two", tmp_path / "one")


def test_a_host_task_on_two_processes_stopped_killed_and_resumed(tmp_path, monkeypatch):
    """Rewards of a user, dynamic sampling, weights in parts over both. One process gets the signal, both obey it."""
    save_hf_tokenizer(tmp_path / "model", {}, eos_token="<eos>", pad_token="<pad>")
    torch_model("llama tied", vocab_size=259, num_hidden_layers=1).save_pretrained(tmp_path / "model")
    hosts_program.write_data(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    one, whole, torn = (tmp_path / name for name in ("one", "whole", "torn"))

    def start(*names):
        def args(port, process):
            return [str(port), "2", str(process), str(tmp_path), *names]

        return programs.together("tests.hosts_program", 2, args, num_devices=2, cache=tmp_path)

    with start("whole", "torn", "torn") as two:  # the second time it goes on
        wait_for_step(two[0], torn, 2)
        two[1].send_signal(signal.SIGTERM)
        wait_for_step(two[0], torn, 5)
        two[0].kill()
        statuses, outputs = ended(two)
    assert statuses == [-signal.SIGKILL, -signal.SIGABRT], "\n".join(outputs)
    ends = [re.findall(r"(\w+) ended at step (\d)", output) for output in outputs]
    assert ends[0] == ends[1] and [name for name, _ in ends[0]] == ["whole", "torn"]
    assert [step for _, step in ends[0]] in (["6", "2"], ["6", "3"], ["6", "4"])
    assert "Terminating process because the JAX distributed service detected fatal errors" in outputs[1]
    with start("torn") as two:
        statuses, outputs = ended(two)
    assert statuses == [0, 0], "\n".join(outputs)

    records = programs.records(whole)
    assert [record["step"] for record in records] == list(range(hosts_program.NUM_STEPS + 1))
    assert any(record.get("groups/pending", 0) > 0 for record in records), "no groups were waiting: nothing is tested"
    assert len({record.get("groups/rounds") for record in records}) > 2
    assert programs.records(torn) == records
    assert (torn / "completions.jsonl").read_text() == (whole / "completions.jsonl").read_text()
    trainer.train(hosts_program.config_of(tmp_path, 4), one)
    same_numbers(whole, one)


def test_every_row_is_made_once_and_answered_for_once():
    """Also where `tensor` copies rows; all that one process has to do in the two steps of a batch."""
    mesh = make_mesh(tiny.config_of(changes={"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}).mesh.sizes)
    asked = []

    def read(first, num):
        asked.append((first, num))
        return {"a": np.arange(first, first + num), "b": np.arange(first, first + num)[:, None] * np.ones((1, 3), np.float32)}

    tree = hosts.make_global_batch(read, 8, mesh)
    assert asked == [(0, 2), (2, 2), (4, 2), (6, 2)]
    rows, own = hosts.addressable_rows(tree)
    assert rows.tolist() == list(range(8)) and own["a"].tolist() == rows.tolist() and own["b"][:, 2].tolist() == rows.tolist()
    half = hosts.allgather_rows(rows[1::2], own["a"][1::2] + 10, 8)
    assert half.tolist() == [0, 11, 0, 13, 0, 15, 0, 17]


@pytest.mark.parametrize(
    "flags",
    [["--coordinator=127.0.0.1:1"], ["--distributed", "--process_id=0"], ["--num_processes=2", "--process_id=0"]],
)
def test_flags_that_say_half_of_it_are_refused(tmp_path, flags):
    with flagsaver.flagsaver():
        train.flags.FLAGS(["train", *flags])
        with pytest.raises(UserError, match="--coordinator"):
            train.join_hosts()
