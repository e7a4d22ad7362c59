"""All five variants learn, and with rewards handed to the wrong rows none does.

The task is to repeat the prompt's only token: learnt from nothing in seconds, and impossible to learn by accident.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.config import parse_config
from grpo_jax.configs import base
from grpo_jax.errors import UserError
from grpo_jax.rng import key_for
from grpo_jax.tasks.tokenizers import CharTokenizer
from grpo_jax.training import build, trainer
from grpo_jax.training.checkpoint import saved_steps
from grpo_jax.training.iteration import prefetch_first_batches
from grpo_jax.training.run import make_run
from grpo_jax.types import Prompts, Reward
from tests import programs, tiny

VARIANTS = ("grpo", "dapo", "gtpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("dr_grpo", "grpo_s")))
LETTERS = "abcdefgh"


class Repeat:
    """Reward 1 if the first token is the prompt's."""

    is_traceable = True
    prompt_tokens = 1

    def __init__(self, seed):
        self.seed, self.tokenizer = seed, CharTokenizer(LETTERS)
        self.stop_ids = self.tokenizer.eos_ids

    def train_prompts(self, position, num_prompts, seed=None):
        seed = self.seed if seed is None else seed
        keys = jax.vmap(lambda i: key_for(seed, "prompts", i))(position + jnp.arange(num_prompts))
        return self.ask(jax.vmap(lambda key: jax.random.randint(key, (), 0, len(LETTERS)))(keys))

    def eval_prompts(self):
        return self.ask(jnp.arange(len(LETTERS)))

    def ask(self, letter_P):
        tokens_PS = (letter_P + 2)[:, None].astype(jnp.int32)
        return Prompts(tokens_PS, jnp.ones_like(tokens_PS, bool), tokens_PS[:, 0])

    def reward(self, answer, tokens_PGT, mask_PGT):
        is_right_PG = (tokens_PGT[..., 0] == answer[:, None]).astype(jnp.float32)
        return Reward(is_right_PG, jnp.zeros_like(is_right_PG), {})

    def final_answers(self, tokens_PGT, mask_PGT):
        del mask_PGT
        return tokens_PGT[..., 0].astype(str).tolist()

    def close(self):
        pass


def success_by_step(monkeypatch, variant, *, is_shuffled=False, num_steps=60):
    """Success of the sampled completions at each step, from random weights."""
    config = base.get_config("runlocal", variant)
    config.dynamic_sampling.enabled = variant == "dapo"
    config.warm_start.num_steps = 0
    config.num_steps, config.shuffle_rewards, config.steps_per_call = num_steps, is_shuffled, 20
    config.eval_every = config.checkpoint.every = config.log.completions_every = 0
    config.rollout.num_prompts, config.rollout.max_completion_tokens = 16, 2
    config.model.dim, config.model.ffn_dim = 16, 32
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-2, "constant"
    config.mesh.data = 1
    monkeypatch.setattr(build, "make_task", lambda config: Repeat(config.seed))
    run = make_run(parse_config(config))
    state = run.initial_state()
    curve = []
    for _ in range(0, num_steps, config.steps_per_call):
        state, _, metrics = run.iterate(state)
        success = metrics["reward/success"]
        curve.append(success.total / success.count)
    return np.concatenate(curve), run, state


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns(monkeypatch, variant):
    curve, run, state = success_by_step(monkeypatch, variant)
    assert curve[0] < 0.35
    assert curve[-5:].mean() > 0.85
    assert run.evaluate(state.params)["success"].value == 1.0


@pytest.mark.parametrize("variant", ["dapo", "gtpo"])
@pytest.mark.slow
def test_nothing_is_learnt_from_shuffled_rewards(monkeypatch, variant):
    curve, _, _ = success_by_step(monkeypatch, variant, is_shuffled=True)
    assert curve[-20:].mean() < curve[0] + 0.1


@pytest.mark.slow
def test_many_steps_in_one_call_are_the_steps_one_by_one(tmp_path):
    """The records of a run of 4 steps: two calls of two, with an evaluation after each, against four.

    Dr. GRPO divides by no spread. Here all answers are wrong, and GTPO would make the rounding of nearly equal entropies large.
    """
    changes = {"num_steps": 4, "eval_every": 2, "checkpoint.every": 2, "log.completions_every": 2, "overlong.cache_tokens": 6}
    changes |= {"optimizer.learning_rate": 1e-2, "optimizer.warmup_steps": 0, "eval.num_samples": 0}
    for num in (0, 2):
        config = tiny.config_of("dr_grpo", changes | {"steps_per_call": num, "checkpoint.keep": num})
        trainer.train(config, tmp_path / str(num))
        assert saved_steps(tmp_path / str(num)) == ([2, 4] if num else []), "with keep = 0 an ended run leaves none"
        if not num:
            with pytest.raises(UserError, match="nothing to go on from"):
                trainer.train(config, tmp_path / str(num))
    one_by_one, together = (programs.records(tmp_path / name) for name in ("0", "2"))
    assert [record["step"] for record in together] == [0, 1, 2, 3, 4] and "eval/success" in together[2]
    for expected, found in zip(one_by_one, together, strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
    assert (tmp_path / "2" / "completions.jsonl").read_text().count("\n") == 2 * 2 * 8
    for name, value in (("steps_per_call", 3), ("log.completions_every", 1)):
        with pytest.raises(UserError, match="must be a multiple of"):
            tiny.config_of("dr_grpo", changes | {"steps_per_call": 2, name: value})


@pytest.mark.parametrize("learner", [{}, {"old_logp": "learner", "importance_cap": 2.0}])
def test_in_one_call_batches_are_as_old_as_asked_for_and_the_steps_are_those_one_by_one(learner):
    """Two steps old, as a host's would be: each trained on when two more have been sampled; any number of steps in a call."""
    changes = {
        "async_steps": 2,
        "steps_per_call": 3,
        "num_steps": 3,
        "optimizer.learning_rate": 1e-2,
        "optimizer.warmup_steps": 0,
    }
    changes |= {"overlong.cache_tokens": 6, "eval_every": 0, "checkpoint.every": 0, "log.completions_every": 0}
    changes |= {f"learner.{name}": value for name, value in learner.items()}
    config = tiny.config_of("dr_grpo", changes)
    run = make_run(config)
    state, _ = prefetch_first_batches(run.collect, run.initial_state())
    waiting = [state.next_batch, *state.later_batches]
    assert [int(batch.sampled_at_P.max()) for batch in waiting] == [-2, -1]
    whole, _, metrics = run.iterate(jax.tree.map(jnp.copy, state))
    assert "policy/sampler_logp_gap" not in metrics

    alone, waiting = state, [jax.tree.map(jnp.copy, batch) for batch in waiting]
    for step in range(3):
        held, newest, _ = run.collect(jax.tree.map(jnp.copy, alone))
        assert int(newest.sampled_at_P.max()) == step
        waiting.append(newest)
        alone, _ = run.update(alone, waiting.pop(0))
        alone = dataclasses.replace(alone, num_prompts_drawn=held.num_prompts_drawn)
    assert tiny.largest_difference(whole.params, alone.params) < 1e-6
    assert [int(batch.sampled_at_P.max()) for batch in (whole.next_batch, *whole.later_batches)] == [1, 2]
