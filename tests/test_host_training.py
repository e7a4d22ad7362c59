"""Training whose rewards come from worker processes: it goes on whatever a reward function does, and it resumes bitwise."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from grpo_jax.config import parse_config
from grpo_jax.errors import UserError
from grpo_jax.models import families
from grpo_jax.tools.show.page import run_data
from grpo_jax.training import trainer
from grpo_jax.training.iteration import make_async_step
from grpo_jax.training.run import make_run
from grpo_jax.training.runlog import read_completions
from tests import programs
from tests.hf_models import torch_model
from tests.test_tasks_host import save_hf_tokenizer

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


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny random Llama with a byte-level tokenizer, as an ordinary Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_hf_tokenizer(folder, {}, eos_token="<eos>", pad_token="<pad>")
    torch_model("llama tied", vocab_size=259, num_hidden_layers=1).save_pretrained(
        folder
    )  # as many tokens as the tokenizer has
    return folder


def word_problems(num):
    """Rows as GSM8K has them."""
    text = "Tom has {i} eggs and buys as many. How many has he?"
    return [{"prompt": text.format(i=i), "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}", "level": i % 3} for i in range(num)]


@pytest.fixture
def config(tmp_path, model_folder):
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in word_problems(40)))
    config = base.get_config("runlocal", "grpo")
    config.model.path = str(model_folder)
    config.task.name = "jsonl"
    config.task.jsonl.path = str(tmp_path / "sums.jsonl")
    config.task.use_chat_template = False
    config.reward.scoring.time_limit_secs = 60.0
    config.warm_start.num_steps = 0
    config.eval.num_prompts, config.eval.num_samples = 8, 0
    config.num_steps, config.eval_every, config.checkpoint.every = 4, 0, 2
    config.rollout.group_size = 8
    config.mesh.data = 1
    return config


def test_a_reward_that_raises_or_hangs_is_counted_and_the_run_goes_on(tmp_path, config, monkeypatch):
    (tmp_path / "bad_scorer.py").write_text(BAD_SCORER)
    monkeypatch.syspath_prepend(str(tmp_path))
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


def test_dynamic_sampling_on_the_host_and_going_on_where_it_stopped(tmp_path, config):
    """No completion is ever right: every round is spent, the step still ends, and 4 steps = 2 + 2."""
    config.dynamic_sampling.enabled, config.dynamic_sampling.max_sampling_rounds = True, 2
    whole = parse_config(config)
    trainer.train(whole, tmp_path / "whole")
    trainer.train(dataclasses.replace(whole, num_steps=2), tmp_path / "torn")
    trainer.train(whole, tmp_path / "torn", allow_config_change=True)
    records = programs.records(tmp_path / "whole")
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert records[1]["groups/missing"] == 1.0 and records[1]["groups/rounds"] == 2
    # Step 2 was the last one of the first run, which evaluates there.
    torn = [{k: v for k, v in r.items() if k in records[i]} for i, r in enumerate(programs.records(tmp_path / "torn"))]
    assert torn == records


# The completions are noise: what is rewarded here is text that any of them may have.
MY_REWARDS = """
def late(completions, item):
    assert item["answer"] == str(2 * int(item["prompt"].split()[2])) and item["level"] in (0, 1, 2)
    return [float(text > "P") for text in completions]
"""


def test_a_dataset_and_a_users_reward_resume_with_the_very_next_prompt(tmp_path, config, monkeypatch):
    """Stopped in the middle of an epoch of 32 prompts: after it, as without it, every prompt comes once an epoch.

    On four devices that hold the weights in parts.
    """
    import datasets

    config.mesh.fsdp = config.mesh.tensor = 2
    config.mesh.fsdp_min_elements = 0

    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    datasets.Dataset.from_list(word_problems(40)).save_to_disk(tmp_path / "sums")
    config.task.name, config.task.dataset.path = "dataset", str(tmp_path / "sums")
    config.reward.task, config.reward.shaping = "my_rewards:late", "0.5*length + format"
    config.log.completions_every, config.log.num_groups, config.num_steps = 1, 8, 6
    whole = parse_config(config)
    trainer.train(whole, tmp_path / "whole")
    trainer.train(dataclasses.replace(whole, num_steps=3), tmp_path / "torn")
    trainer.train(whole, tmp_path / "torn", allow_config_change=True)

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


def test_batches_judged_while_another_is_trained_on_are_one_step_old_and_the_run_resumes(tmp_path, config, monkeypatch):
    """Against the same steps one after another, which no donated buffer can spoil."""
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    config.reward.task, config.async_steps = "my_rewards:late", 1
    config.dynamic_sampling.enabled, config.optimizer.schedule = True, "constant"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 1e-2, 0
    whole = parse_config(config)
    trainer.train(dataclasses.replace(whole, num_steps=2), tmp_path / "torn")
    trainer.train(whole, tmp_path / "torn", allow_config_change=True)
    records = programs.records(tmp_path / "torn")
    assert run_data(tmp_path / "torn")["checks"]
    assert [record["step"] for record in records] == [0, 1, 2, 3, 4]
    assert "policy/sampler_logp_gap" not in records[1]
    assert records[1]["policy/ratio"] == pytest.approx(1, abs=1e-6) and abs(records[2]["policy/ratio"] - 1) > 1e-4

    run = make_run(whole)
    events = []
    judge = run.task.reward
    monkeypatch.setattr(run.task, "reward", lambda *args: events.append("judged") or judge(*args))
    state = run.initial_state()
    held, batch, _ = run.collect(dataclasses.replace(state, step=state.step - 1))
    state = dataclasses.replace(held, step=state.step)
    try:
        for step in range(4):
            held, ahead, _ = run.collect(jax.tree.map(jnp.copy, state))
            assert int(batch.sampled_at_P.max()) == step - 1
            state, _ = run.update(state, batch)
            state = dataclasses.replace(state, num_prompts_drawn=held.num_prompts_drawn, pending=held.pending)
            batch = ahead
        jax.tree.map(np.testing.assert_array_equal, state.params, run.restore_policy(tmp_path / "torn", 4))
        del events[:]

        def update(state):
            events.append("trained")
            return run.update(state, jax.tree.map(jnp.copy, state.next_batch))

        make_async_step(run.fns.collect, update)(dataclasses.replace(state, next_batch=batch))
        assert events[:2] == ["trained", "judged"]
    finally:
        run.task.close()


def test_bad_folders_end_before_anything_is_written(tmp_path, config, model_folder):
    weights = model_folder / "model.safetensors"
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
    assert families.read_architecture(str(model_folder)).vocab_size == 259
