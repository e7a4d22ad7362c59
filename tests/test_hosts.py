"""Several processes on loopback, each with its own simulated devices, do what one process does; kills and signals included."""

import re
import signal
import time

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

from grpo_jax.config import parse_config
from grpo_jax.configs import gtpo
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


def wait_for_both(two, workdir, step):
    """Until the run's log has reached `step`; if it never does, what both said and where each hangs."""
    try:
        wait_for_step(two[0], workdir, step)
    except AssertionError as error:
        for process in two:
            process.send_signal(hosts_program.SHOW_STACKS)
        time.sleep(1)
        for process in two:
            process.kill()
        raise AssertionError("\n".join(ended(two)[1])) from error


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """-> (folder, outputs) of two processes that trained `two`, `whole` and `torn`, until the first was killed in `torn`.

    One run after another, for processes that start and compile are most of the time. `torn` was stopped before by a signal to
    the second process, which both obeyed.
    """
    folder = tmp_path_factory.mktemp("hosts")
    save_hf_tokenizer(folder / "model", {}, eos_token="<eos>", pad_token="<pad>")
    torch_model("llama tied", vocab_size=259, num_hidden_layers=1).save_pretrained(folder / "model")
    hosts_program.write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.syspath_prepend(str(folder))
        with started(folder, "two", "whole", "torn", "torn") as two:  # the second time it goes on
            wait_for_both(two, folder / "torn", 2)
            two[1].send_signal(signal.SIGTERM)
            wait_for_both(two, folder / "torn", 5)
            two[0].kill()
            statuses, outputs = ended(two)
        left = 1 if jax.__version_info__ < (0, 8) else -signal.SIGABRT  # how JAX ends a process that has lost another
        assert statuses == [-signal.SIGKILL, left], "\n".join(outputs)
        yield folder, outputs


def started(folder, *names):
    """Two processes with two devices each that train the runs of these names."""

    def args(port, process):
        return [str(port), "2", str(process), str(folder), *names]

    return programs.together("tests.hosts_program", 2, args, num_devices=2, cache=folder)


@pytest.mark.slow
def test_two_processes_do_what_one_does_and_only_the_first_speaks(pair):
    """With GTPO, whose statistics are of the whole batch: rows of both processes."""
    folder, outputs = pair
    assert "step 3/3" in outputs[0] and not {"step", "curve", "gtpo"} & set(outputs[1].split())
    config = gtpo.get_config("runlocal")
    config.update_from_flattened_dict({**hosts_program.SMALL, "mesh.data": 4})
    trainer.train(parse_config(config), folder / "one by flags")
    same_numbers(folder / "two", folder / "one by flags")


@pytest.mark.slow
def test_a_host_task_on_two_processes_stopped_killed_and_resumed(pair):
    """Rewards of a user, dynamic sampling, weights in parts over both. One process gets the signal, both obey it."""
    folder, outputs = pair
    one, whole, torn = (folder / name for name in ("one", "whole", "torn"))
    ends = [re.findall(r"(\w+) has ended at (\d)", output) for output in outputs]
    assert ends[0] == ends[1] and [name for name, _ in ends[0]] == ["whole", "torn"]
    assert [step for _, step in ends[0]] in (["6", "2"], ["6", "3"], ["6", "4"])
    assert "Terminating process because the JAX distributed service detected fatal errors" in outputs[1]
    with started(folder, "torn") as two:
        statuses, outputs = ended(two)
    assert statuses == [0, 0], "\n".join(outputs)

    records = programs.records(whole)
    assert [record["step"] for record in records] == list(range(hosts_program.NUM_STEPS + 1))
    assert any(record.get("groups/pending", 0) > 0 for record in records), "no groups were waiting: nothing is tested"
    assert len({record.get("groups/rounds") for record in records}) > 2
    assert programs.records(torn) == records
    assert (torn / "completions.jsonl").read_text() == (whole / "completions.jsonl").read_text()
    trainer.train(hosts_program.config_of(folder, 4), one)
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
