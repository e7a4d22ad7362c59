"""Training whose rewards come from worker processes: it goes on whatever a reward function does, and it resumes bitwise."""

import contextlib
import dataclasses
import datetime
import json
import shutil
import signal

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.errors import UserError
from grpo_jax.models import families
from grpo_jax.tools.show.page import run_data
from grpo_jax.tools.sweep import worker
from grpo_jax.training import data_record, trainer
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.iteration import make_async_step
from grpo_jax.training.run import make_run
from grpo_jax.training.runlog import read_completions
from grpo_jax.training.settings import read_config
from tests import programs
from tests.hf_models import torch_model
from tests.test_tasks_host import save_hf_tokenizer

pytestmark = pytest.mark.slow

# Scores by the first letter of what was sampled, and misbehaves on some of it.
BAD_SCORER = """
import time
def score(completion, item):
    first = completion[:1]
    if first in "abcdef":
        raise RuntimeError("no")
    if first == "?":
        time.sleep(1e6)
    return float(first > "m")
"""


# The completions are noise: what is rewarded here is text that any of them may have.
MY_REWARDS = """
def boom(completion, item, scale):
    raise ValueError(f"\\x1b[31mred {scale + 1}")

def distance(completions, answer, level, **kwargs):
    # As TRL calls it. 0 is the best there is, and what a crash must not earn.
    assert answer[0] == str(2 * int(kwargs["prompts"][0].split()[2])) and level[0] in (0, 1, 2)
    if completions[0] < "P":
        raise ValueError("no judge")
    return [None if text < "8" else -float(len(text)) for text in completions]

def late(completions, item):
    assert item["answer"] == str(2 * int(item["prompt"].split()[2])) and item["level"] in (0, 1, 2)
    return [float(text > "P") for text in completions]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Llama with a byte-level tokenizer, a Hugging Face folder as any; questions and rewards beside it."""
    folder = tmp_path_factory.mktemp("shared")
    save_hf_tokenizer(folder / "model", {}, eos_token="<eos>", pad_token="<pad>")
    model = torch_model("llama tied", vocab_size=259, num_hidden_layers=1)  # as many tokens as the tokenizer has
    model.save_pretrained(folder / "model")
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in word_problems(40)))
    datasets.Dataset.from_list(word_problems(40)).save_to_disk(folder / "sums")
    (folder / "bad_scorer.py").write_text(BAD_SCORER)
    (folder / "my_rewards.py").write_text(MY_REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


def word_problems(num):
    """Rows as GSM8K has them."""
    text = "Tom has {i} eggs and buys as many. How many has he?"
    return [{"prompt": text.format(i=i), "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}", "level": i % 3} for i in range(num)]


@pytest.fixture
def config(folder):
    config = base.get_config("runlocal", "grpo")
    config.model.path = str(folder / "model")
    config.task.name = "jsonl"
    config.task.jsonl.path = str(folder / "sums.jsonl")
    config.task.use_chat_template = False
    config.reward.scoring.time_limit_secs = 60.0
    config.warm_start.num_steps = 0
    config.eval.num_prompts, config.eval.num_samples = 8, 0
    config.num_steps, config.eval_every, config.checkpoint.every = 4, 0, 2
    config.rollout.group_size = 8
    config.mesh.data = 1
    return config


@contextlib.contextmanager
def run_of(config):
    """The run of a config. What is trained with it, several times over, is compiled once and scored by the same processes."""
    run = make_run(parse_config(config))
    try:
        yield run
    finally:
        run.task.close()


def train_in_two(run, workdir, step):
    """Train until SIGTERM comes in `step`, then from what was saved to the end."""
    after_step = trainer.Member.after_step

    def stop(member, state, batch, pending):
        after_step(member, state, batch, pending)
        if pending.last_step == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Member, "after_step", stop)
        trainer.train_run(run, workdir)
    assert saved_steps(workdir)[-1] == step < run.config.num_steps
    trainer.train_run(run, workdir)


def test_a_reward_that_raises_or_hangs_is_counted_and_the_run_goes_on(tmp_path, config):
    config.reward.task = "bad_scorer:score"
    config.reward.scoring.time_limit_secs = 0.5
    trainer.train(parse_config(config), tmp_path / "run")
    steps = [record for record in programs.records(tmp_path / "run") if record["step"] > 0]
    assert len(steps) == 4
    assert sum(record["reward/errors"] for record in steps) > 0
    assert all(0 < record["reward/success"] < 1 for record in steps)
    shown = run_data(tmp_path / "run")
    assert [each["step"] for each in shown["steps"]] == [1, 2, 3, 4]
    rows = read_completions(tmp_path / "run")
    assert rows and all("".join(row["token_text"]) == row["completion"] for row in rows)
    (errors,) = [check for check in shown["checks"] if check["title"] == "Scoring errors"]
    assert errors["light"] in ("warn", "bad")


def test_a_run_over_midnight_has_the_same_prompts(tmp_path, monkeypatch, folder, config):
    """A chat template that writes the day, as Llama 3.2's does: the run keeps that of its first start."""
    shutil.copytree(folder / "model", tmp_path / "dated")
    dated = "{{ strftime_now('%d %b') }}{% for m in messages %}<|im_end|>{{ m.content }}{% endfor %}"
    (tmp_path / "dated" / "chat_template.jinja").write_text(dated)
    config.model.path = str(tmp_path / "dated")
    config.task.use_chat_template = True
    config.reward.task = "length"
    config.num_steps, config.checkpoint.every, config.rollout.max_completion_tokens = 2, 1, 4
    monkeypatch.setattr(data_record, "today", lambda: datetime.date(2026, 11, 26))
    trainer.train(parse_config(config), tmp_path / "whole")
    assert programs.records(tmp_path / "whole")[0]["data/train"] == 32
    assert json.loads((tmp_path / "whole" / "summary.json").read_text())["data/held_out"] == 8
    # As a kill in step 2 leaves it; the rest is trained on the next day, bitwise with the same prompts.
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr(data_record, "today", lambda: datetime.date(2026, 11, 27))
    for name in ("run", "new"):
        trainer.train(parse_config(config), tmp_path / name)
    whole, resumed, new = (programs.records(tmp_path / name) for name in ("whole", "run", "new"))
    assert resumed == whole != new and read_completions(tmp_path / "run") == read_completions(tmp_path / "whole")
    assert [read_config(tmp_path / name).task.template_date for name in ("run", "new")] == ["2026-11-26", "2026-11-27"]
    shown = [read_completions(tmp_path / name)[0]["prompt"][:6] for name in ("run", "new")]
    assert shown == ["26 Nov", "27 Nov"]


def test_a_reward_that_always_raises_stops_the_run_with_its_exception(tmp_path, folder, config):
    """Through the command line: one clear error and status 1, the traceback in the workdir, nothing that steers a terminal."""
    settings = {"reward.task": "my_rewards:boom", "model.path": config.model.path, "task.jsonl.path": config.task.jsonl.path}
    settings |= {
        "reward.params.scale": 0.5,
        "task.name": "jsonl",
        "task.use_chat_template": False,
        "warm_start.num_steps": 0,
        "eval.num_prompts": 4,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        args = ("--config=configs/grpo.py:runlocal", f"--workdir={tmp_path / 'run'}", "--config.mesh.data=1", *flags)
        status, output = programs.run("experiments.train", *args)
    kept = tmp_path / "run" / "reward_errors" / "my_rewards_boom.txt"
    error = "ValueError: \\x1b[31mred 1.5"
    assert status == 1
    assert output.splitlines()[0] == "my_rewards:boom is called for one completion: completion, item, scale"
    assert [line for line in output.splitlines() if line.startswith(("warning", "error"))] == [
        f"warning: reward my_rewards:boom failed: {error} (left out of training; further failures are only counted)",
        f"error: reward my_rewards:boom: all 4 completions of the first batch failed: {error}; traceback in {kept}",
    ]
    text = kept.read_text()
    assert "Traceback" not in output and "\x1b" not in output + text
    assert text.startswith("Traceback") and "in boom" in text and text.endswith(f"{error}\n") and "grpo_jax" not in text


def test_a_penalty_that_crashes_is_never_the_best_of_its_group(tmp_path, config):
    """A distance, 0 at best, written for TRL; some of its calls fail, and of some texts it has no opinion."""
    config.reward.task = "my_rewards:distance"
    config.objective.success_threshold = -100.0
    config.log.completions_every, config.log.num_groups = 1, 100
    trainer.train(parse_config(config), tmp_path / "run")
    steps = [record for record in programs.records(tmp_path / "run") if record["step"] > 0]
    assert sum(record["reward/errors"] for record in steps) > 0 and sum(record["reward/abstained"] for record in steps) > 0
    assert all(
        record["reward/unscored"] == pytest.approx(record["reward/errors"] + record["reward/abstained"]) for record in steps
    )
    assert all(
        record["reward/mean"] < -1 and record["reward/success"] == 1 for record in steps if record["reward/unscored"] < 1
    )
    assert all(np.isfinite(list(record.values())).all() for record in steps)
    rows = read_completions(tmp_path / "run")
    assert {row["is_scored"] for row in rows} == {True, False}
    for row in rows:
        assert (row["reward"] is None) == (not row["is_scored"])
        assert row["is_scored"] or not any(row["token_advantage"])
    shown = [each for step in run_data(tmp_path / "run")["steps"] for group in step["groups"] for each in group["completions"]]
    assert {(each["isScored"], each["isSuccess"]) for each in shown} == {(True, True), (False, False)}


def test_dynamic_sampling_on_the_host_and_going_on_where_it_stopped(tmp_path, config):
    """No completion is ever right: every round is spent, the step still ends, and 4 steps = 2 + 2."""
    config.dynamic_sampling.enabled, config.dynamic_sampling.max_sampling_rounds = True, 2
    with run_of(config) as run:
        trainer.train_run(run, tmp_path / "whole")
        train_in_two(run, tmp_path / "torn", 2)
    records = programs.records(tmp_path / "whole")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[1]["groups/missing"] == 1.0 and records[1]["groups/rounds"] == 2
    assert programs.records(tmp_path / "torn") == records


def test_a_dataset_and_a_users_reward_resume_with_the_very_next_prompt(tmp_path, folder, config):
    """Stopped in the middle of an epoch of 32 prompts: after it, as without it, every prompt comes once an epoch.

    On four devices that hold the weights in parts.
    """
    config.mesh.fsdp = config.mesh.tensor = 2
    config.mesh.fsdp_min_elements = 0
    config.task.name, config.task.dataset.path = "dataset", str(folder / "sums")
    config.reward.task, config.reward.shaping = "my_rewards:late", "0.5*length + format"
    config.log.completions_every, config.log.num_groups, config.num_steps = 1, 8, 6
    with run_of(config) as run:
        trainer.train_run(run, tmp_path / "whole")
        train_in_two(run, tmp_path / "torn", 3)

    def prompts(run):
        rows = [json.loads(line) for line in (tmp_path / run / "completions.jsonl").read_text().splitlines()]
        return [(row["step"], row["prompt"]) for row in rows if row["group"] is not None][::8]

    assert prompts("torn") == prompts("whole")
    asked = [prompt for _, prompt in prompts("whole")]
    assert len(asked) == 48 and len(set(asked[:32])) == 32 and len(set(asked[32:])) == 16
    for record in programs.records(tmp_path / "whole")[1:]:
        parts = {name: record[f"reward/part/{name}"] for name in ("my_rewards:late", "length", "format")}
        assert record["reward/success"] == pytest.approx(parts["my_rewards:late"], abs=1e-6)
        assert record["reward/mean"] == pytest.approx(parts["my_rewards:late"] + 0.5 * parts["length"], abs=1e-6)
        assert 0 < parts["my_rewards:late"] < 1 and record["reward/errors"] == parts["format"] == 0


def test_runs_of_one_call_are_the_single_runs(tmp_path, config):
    """Objectives and seeds on one base, each with its own questions and scored by its own task."""
    config.reward.task = "my_rewards:late"  # raises where a completion and its question do not fit together
    config.task.use_chat_template = False
    config.lora.rank, config.num_steps, config.log.completions_every = 2, 2, 2
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-2, 0
    configs = []
    for seed, advantage in ((0, "group_norm"), (0, "group_center"), (1, "group_norm")):
        config.seed, config.objective.advantage = seed, advantage
        configs.append(parse_config(config))
    folders = [tmp_path / str(place) for place in range(3)]
    assert worker.do_on_host(configs, folders) == [""] * 3
    prompts = [{row["prompt"] for row in read_completions(folder)} for folder in folders]
    assert prompts[0] == prompts[1] != prompts[2]
    found = [programs.records(folder) for folder in folders]
    assert all(records[-1]["reward/errors"] == 0 < records[-1]["reward/std"] for records in found)
    for place in (1, 2):
        alone = tmp_path / f"alone{place}"
        trainer.train(configs[place], alone)
        for expected, record in zip(programs.records(alone), found[place], strict=True):
            assert expected.keys() == record.keys()
            for key, value in expected.items():
                np.testing.assert_allclose(record[key], value, rtol=2e-4, atol=2e-5, err_msg=key)
        texts = [[row["completion"] for row in read_completions(folder)] for folder in (alone, folders[place])]
        assert texts[0] == texts[1]


def test_batches_scored_while_another_is_trained_on_are_as_old_as_asked_for_and_the_run_resumes(tmp_path, config, monkeypatch):
    """Against the same steps one after another, which no donated buffer can spoil."""
    config.reward.task, config.async_steps = "my_rewards:late", 2
    config.dynamic_sampling.enabled, config.optimizer.schedule = True, "constant"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 0
    with run_of(config) as run:
        train_in_two(run, tmp_path / "torn", 2)
        records = programs.records(tmp_path / "torn")
        assert run_data(tmp_path / "torn")["checks"]
        assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
        assert "policy/sampler_logp_gap" not in records[1]
        assert records[1]["policy/ratio"] == pytest.approx(1, abs=1e-6) and abs(records[2]["policy/ratio"] - 1) > 1e-4

        events = []
        score = run.task.reward
        monkeypatch.setattr(run.task, "reward", lambda *args: events.append("scored") or score(*args))
        state = run.initial_state()
        waiting = []
        for step in (-2, -1):
            held, batch, _ = run.collect(dataclasses.replace(state, step=jnp.int32(step)))
            state = dataclasses.replace(held, step=jnp.int32(0))
            waiting.append(batch)
        for step in range(4):
            held, ahead, _ = run.collect(jax.tree.map(jnp.copy, state))
            batch = waiting.pop(0)
            assert int(batch.sampled_at_P.max()) == step - 2
            state, _ = run.update(state, batch)
            state = dataclasses.replace(state, num_prompts_drawn=held.num_prompts_drawn, pending=held.pending)
            waiting.append(ahead)
        jax.tree.map(np.testing.assert_array_equal, state.params, run.restore_policy(tmp_path / "torn", 4))
        del events[:]

        def update(state):
            events.append("trained")
            return run.update(state, jax.tree.map(jnp.copy, state.next_batch))

        make_async_step(run.fns.collect, update)(dataclasses.replace(state, next_batch=waiting[0], later_batches=(waiting[1],)))
        assert events[:2] == ["trained", "scored"]


def test_bad_folders_end_before_anything_is_written(tmp_path, folder, config):
    weights = folder / "model" / "model.safetensors"
    good = weights.read_bytes()
    try:
        weights.write_bytes(good[: len(good) // 2])
        with pytest.raises(UserError, match=r"model\.safetensors"):
            trainer.train(parse_config(config), tmp_path / "run")
    finally:
        weights.write_bytes(good)
    config.task.jsonl.path = str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"none\.jsonl"):
        trainer.train(parse_config(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert families.read_architecture(str(folder / "model")).vocab_size == 259
