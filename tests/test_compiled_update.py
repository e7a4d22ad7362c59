"""What the compiled update holds in memory: no float32 logits of the whole batch, whatever the vocabulary."""

import dataclasses
import functools
import math
import re

import jax
import pytest

from grpo_jax.learner.hyperparams import hyperparams_of
from grpo_jax.learner.optimizer import make_optimizer
from grpo_jax.learner.train_step import make_train_step
from grpo_jax.models.transformer import ModelDef
from tests import tiny

pytestmark = pytest.mark.slow

VOCAB, CHUNK = 4096, 16


@pytest.mark.parametrize("variant", ["dapo", "grpo"])
def test_no_float32_logits_of_the_whole_batch(variant):
    config = tiny.config_of(variant, {"learner.logprob_chunk_tokens": CHUNK})
    model = ModelDef(dataclasses.replace(tiny.LLAMA, vocab_size=VOCAB, tie_embeddings=True))
    params = tiny.random_params(model.arch)
    optimizer_of = functools.partial(make_optimizer, config.optimizer, config.num_updates)
    optimizer = optimizer_of(hyperparams_of(config))
    batch = tiny.random_batch(num_prompts=4, group_size=8, max_tokens=16, vocab=VOCAB)
    state = tiny.state_of(params, optimizer, ref_params=params if config.objective.kl_coef > 0 else None, config=config)
    step = make_train_step(model, optimizer_of, config, tiny.mesh_of(1))
    text = jax.jit(step).lower(state, batch).compile().as_text()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[(\d[\d,]*)\]", text)]
    num_tokens = 4 * 8 * 16
    assert CHUNK * VOCAB in sizes, "the chunk's logits were expected here: does the pattern still fit?"
    # The embedding and its optimizer state are [V, D]; nothing else comes near tokens * V.
    assert max(sizes) < num_tokens * VOCAB / 8
