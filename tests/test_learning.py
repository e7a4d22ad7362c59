"""All five variants learn, and with rewards handed to the wrong rows none does.

The task is to repeat the prompt's only token: learnt from nothing in seconds, and impossible to learn by accident.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from grpo_jax import build
from grpo_jax import metrics as metrics_lib
from grpo_jax.config import Config
from grpo_jax.rng import key_for
from grpo_jax.run import initial_state, make_run
from grpo_jax.tasks.tokenizers import CharTokenizer
from grpo_jax.types import Prompts, Reward

VARIANTS = ("grpo", "dapo", "dr_grpo", "gtpo", "grpo_s")
LETTERS = "abcdefgh"


class Repeat:
    """Reward 1 if the first token is the prompt's."""

    is_traceable = True
    prompt_tokens = 1

    def __init__(self, seed):
        self.seed, self.tokenizer = seed, CharTokenizer(LETTERS)
        self.stop_ids = self.tokenizer.eos_ids

    def train_prompts(self, position, num_prompts):
        keys = jax.vmap(lambda i: key_for(self.seed, "prompts", i))(position + jnp.arange(num_prompts))
        return self.ask(jax.vmap(lambda key: jax.random.randint(key, (), 0, len(LETTERS)))(keys))

    def eval_prompts(self):
        return self.ask(jnp.arange(len(LETTERS)))

    def ask(self, letter_P):
        tokens_PS = (letter_P + 2)[:, None].astype(jnp.int32)
        return Prompts(tokens_PS, jnp.ones_like(tokens_PS, bool), tokens_PS[:, 0])

    def reward(self, answer, tokens_PGT, mask_PGT):
        is_right_PG = (tokens_PGT[..., 0] == answer[:, None]).astype(jnp.float32)
        return Reward(is_right_PG, jnp.zeros_like(is_right_PG), {})

    def close(self):
        pass


def success_by_step(monkeypatch, variant, *, is_shuffled=False, num_steps=60):
    """Success of the sampled completions at each step, from random weights."""
    config = base.get_config("runlocal", variant)
    config.dynamic_sampling.enabled = variant == "dapo"
    config.warm_start.num_steps = 0
    config.num_steps, config.shuffle_rewards, config.one_call = num_steps, is_shuffled, True
    config.rollout.num_prompts, config.rollout.max_completion_tokens = 16, 2
    config.model.dim, config.model.ffn_dim = 16, 32
    config.optimizer.learning_rate, config.optimizer.schedule = 1e-2, "constant"
    config.mesh.data = 1
    monkeypatch.setattr(build, "make_task", lambda config: Repeat(config.seed))
    run = make_run(Config.from_config_dict(config))
    state = initial_state(run)
    curve = []
    for _ in range(num_steps):
        state, _, metrics = run.iterate(state)
        curve.append(metrics_lib.to_floats(metrics)["reward/success"])
    return np.array(curve), run, state


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_learns(monkeypatch, variant):
    curve, run, state = success_by_step(monkeypatch, variant)
    assert curve[0] < 0.35
    assert curve[-5:].mean() > 0.85
    assert run.evaluate(state.params)["eval/success"] == 1.0


@pytest.mark.parametrize("variant", ["dapo", "gtpo"])
def test_nothing_is_learnt_from_shuffled_rewards(monkeypatch, variant):
    curve, _, _ = success_by_step(monkeypatch, variant, is_shuffled=True)
    assert curve[-20:].mean() < curve[0] + 0.1
