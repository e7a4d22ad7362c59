"""Microbatches and remat by the memory of an accelerator; on CPUs there is nothing to choose."""

import dataclasses

import jax
import numpy as np
import pytest

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.tools.plan.fixed_task import FixedTask
from grpo_jax.tools.plan.job import SHAPES
from grpo_jax.training import fit
from grpo_jax.training.fit import MIN_TOKENS, Share, choose, update_bytes
from grpo_jax.training.run import assemble
from tests import tiny

QWEN = ModelDef(SHAPES["qwen2.5-0.5b"], dtype="bfloat16", remat="auto", hardware=Hardware("tpu", memory_bytes=16e9))
NUMBERS = 494e6
SHARE = Share(8, 8, 256, 1024, 3 * 4 * NUMBERS, NUMBERS, NUMBERS, 1, 1)
CONFIG = tiny.config_of("dapo", {"learner.logprob_chunk_tokens": 0})


def chosen(memory_bytes, model=QWEN, **learner):
    config = dataclasses.replace(CONFIG, learner=dataclasses.replace(CONFIG.learner, **learner))
    return choose(config, model, SHARE, memory_bytes)


def test_less_memory_is_computed_again_and_in_smaller_parts():
    found = [chosen(gigabytes * 1e9) for gigabytes in (1000, 80, 24, 16, 12)]
    order = ("dots", "narrow", "full")
    assert (found[0].num_microbatches, found[0].remat) == (1, "dots")
    assert [each.num_bytes for each in found] == sorted((each.num_bytes for each in found), reverse=True)
    work = [(order.index(each.remat), each.num_microbatches) for each in found]
    assert all(remat in (0, 1, 2) for remat, _ in work) and work[1][1] < work[-1][1]
    for each, memory in zip(found[:-1], (1000, 80, 24, 16), strict=True):
        assert each.num_bytes <= 0.9 * memory * 1e9
        assert SHARE.tokens_of(each.num_microbatches) >= MIN_TOKENS


def test_what_is_given_stays():
    assert chosen(16e9, num_microbatches=4).num_microbatches == 4
    full = dataclasses.replace(QWEN, remat="full")
    assert chosen(16e9, full).remat == "full" and chosen(16e9, full).num_microbatches < chosen(16e9).num_microbatches * 8


def test_all_numbers_cut_groups_evenly():
    assert list(SHARE.allowed()) == [1, 2, 4, 8, 16, 32, 64]
    assert [SHARE.tokens_of(num) for num in (1, 8, 16)] == [8 * (8 * 1024 + 256), 8 * 1024 + 256, 4 * 1024 + 256]


def test_an_update_of_more_rows_takes_more():
    sizes = [update_bytes(CONFIG, QWEN, SHARE, num, "dots") for num in (1, 2, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert update_bytes(CONFIG, QWEN, SHARE, 8, "dots") > update_bytes(CONFIG, QWEN, SHARE, 8, "narrow")
    assert update_bytes(CONFIG, QWEN, SHARE, 8, "narrow") > update_bytes(CONFIG, QWEN, SHARE, 8, "full")


@pytest.mark.parametrize(("memory", "line"), [(None, ""), (2**18, "num_microbatches = 16,"), (1e12, "num_microbatches = 1,")])
def test_a_run_says_what_it_chose(memory, line, capsys):
    """A device that does not say its memory has one microbatch, as a CPU has."""
    config = tiny.config_of("dapo", {"rollout.num_prompts": 4, "rollout.group_size": 4, "mesh.data": 1})
    hardware = Hardware("gpu", memory_bytes=memory)
    arch = Architecture(tiny.VOCAB, 16, 5, 2, 1, 8, 24)
    run = assemble(config, tiny.mesh_of(1), task_of(config), ModelDef(arch, remat="auto", hardware=hardware))
    said = capsys.readouterr().err
    assert line in said and bool(line) == bool(said)
    assert run.config.learner.num_microbatches == (16 if "16" in line else 1)
    assert jax.tree.leaves(run.abstract_state)
    again = run.with_config(dataclasses.replace(config, seed=config.seed))
    assert again.config.learner.num_microbatches == run.config.learner.num_microbatches


def task_of(config):
    return FixedTask(np.ones((config.rollout.num_prompts, 6), np.int32), pad_id=0)


def test_a_cpu_has_one_microbatch(capsys):
    config = tiny.config_of("dapo", {"mesh.data": 1})
    run = assemble(config, tiny.mesh_of(1), task_of(config), ModelDef(tiny.LLAMA, remat="auto"))
    assert config.learner.num_microbatches == 0 and run.config.learner.num_microbatches == 1
    assert run.model.remat == "auto" and not capsys.readouterr().err


def test_where_each_microbatch_gathers_the_weights_there_are_fewer(monkeypatch):
    """Qwen2.5-7B on 4 x 4 chips of 16 GB. By the compiler 16 and dots take 6.7 s and hold 12.5 GB, 8 and narrow 7.0 and 11.3,
    4 and full 7.6 and 11.0."""
    model = dataclasses.replace(QWEN, arch=SHAPES["qwen2.5-7b"])
    share = Share(8, 8, 256, 1024, 3 * 4 * 476e6, 476e6, 7.6e9, 4, 4)
    found = {(each.num_microbatches, each.remat): each.num_bytes for each in fit.choices(CONFIG, model, share, 16e9)}
    compiled = {(16, "dots"): 12.5e9, (8, "narrow"): 11.3e9, (4, "full"): 11.0e9}
    assert [way for way in found if way in compiled] == list(compiled)
    assert {way: found[way] for way in compiled} == pytest.approx(compiled, rel=0.1)
    monkeypatch.setattr(fit, "GATHERED_TOKENS", 3000)
    assert choose(CONFIG, model, share, 16e9).num_microbatches == 2
