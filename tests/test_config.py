"""Configs: every file loads, every field is read, and bad input ends in one line that names the field."""

import ast
import dataclasses
import importlib
import pathlib

import pytest

from grpo_jax import objectives
from grpo_jax.config import Config, parse_config
from grpo_jax.config.resolve import resolve
from grpo_jax.configs import base
from grpo_jax.configs import variant as by_name
from grpo_jax.errors import UserError
from grpo_jax.knobs import walk
from grpo_jax.parallel.sharding import make_mesh
from grpo_jax.rewards.shaping import num_cache_tokens
from grpo_jax.tools import fields
from grpo_jax.training.run import check_batch_divisible, make_run

ROOT = pathlib.Path(__file__).parent.parent
VARIANTS = tuple(objectives.ENTRIES)
SCALES = ("tiny", "smollm2", "runlocal")


def has_own_file(variant):
    return (ROOT / "configs" / f"{variant}.py").is_file()


def raw_config(variant, scale="tiny"):
    """The variant's own config file at that scale, or the one that serves any name."""
    if has_own_file(variant):
        return importlib.import_module(f"configs.{variant}").get_config(scale)
    return by_name.get_config(f"{variant},{scale}")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_config_is_valid_and_is_the_variant_it_is_named_after(variant, scale):
    config = parse_config(raw_config(variant, scale))
    assert config.objective == objectives.get(variant)
    assert objectives.describe(config.objective) == variant


def test_any_variant_can_be_named_after_the_colon():
    for variant in objectives.VARIANTS:
        config = parse_config(by_name.get_config(variant))
        assert config.objective == objectives.get(variant)
        if has_own_file(variant):
            assert config == parse_config(raw_config(variant))
    assert parse_config(by_name.get_config("dapo,runlocal")) == parse_config(raw_config("dapo", "runlocal"))
    with pytest.raises(ValueError, match=r"unknown variant 'grpoo' after the colon; known: grpo, .*trl_default"):
        by_name.get_config("grpoo")


def test_only_dapo_turns_on_the_machinery_around_the_loss():
    configs = {variant: parse_config(raw_config(variant)) for variant in VARIANTS}
    assert [v for v in VARIANTS if configs[v].dynamic_sampling.enabled] == ["dapo"]
    assert [v for v in VARIANTS if configs[v].overlong.cache_share] == ["dapo"]


def test_default_scale_is_tiny():
    assert base.get_config().to_dict() == base.get_config("tiny", "grpo").to_dict()


def test_the_page_of_settings_is_what_the_schema_declares():
    """configs/base.py is written by `python -m experiments.fields --write=configs/base.py`."""
    text = (ROOT / "configs" / "base.py").read_text()
    assert text.partition(fields.BEGIN)[2].partition("\n")[2].partition(fields.END)[0] == fields.page()
    assert parse_config(base.get_config("tiny", "grpo")) == resolve(Config())


def test_every_field_says_what_it_does_and_has_a_default_in_its_range():
    declared = [(name, value, knob) for name, value, knob in walk(Config()) if not name.startswith("objective.")]
    assert len(declared) > 60
    assert [name for name, _, knob in declared if knob is None or not knob.about] == []
    assert [name for name, value, knob in declared if knob.complaint(value)] == []


def test_round_trip_through_plain_dicts():
    config = parse_config(base.get_config("tiny", "gtpo"))
    assert parse_config(config.to_dict()) == config


def test_config_files_stay_short():
    for variant in filter(has_own_file, VARIANTS):
        assert len((ROOT / "configs" / f"{variant}.py").read_text().splitlines()) <= 30, variant


def leaf_fields(cls=Config, path=()):
    for field in dataclasses.fields(cls):
        hint = Config.__annotations__.get(field.name) if cls is Config else field.type
        nested = getattr(importlib.import_module("grpo_jax.config"), str(hint), None)
        if dataclasses.is_dataclass(nested):
            yield from leaf_fields(nested, (*path, field.name))
        else:
            yield ".".join((*path, field.name))


def test_every_field_is_read_somewhere():
    """A flag that nobody reads is a lie; reading a value only to check its range does not count."""
    read = set()
    for file in ROOT.glob("grpo_jax/**/*.py"):
        if file.parent.name in ("config", "configs"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
    names = list(leaf_fields())
    assert len(names) > 60
    # The mesh's axes are read together, through MeshConfig.sizes.
    assert [name for name in names if name.split(".")[-1] not in read] == ["mesh.fsdp", "mesh.expert", "mesh.tensor"]


def broken(changes):
    config = base.get_config("runlocal", "dapo").to_dict()
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout.group_size": 1}, r"config\.rollout\.group_size = 1: .* at least 2"),
        ({"rollout.num_prompts": 0}, r"config\.rollout\.num_prompts = 0: must be at least 1"),
        ({"rollout.temperature": 0.0}, r"config\.rollout\.temperature = 0\.0: must be at least 0\.001"),
        ({"rollout.top_p": 1.5}, r"config\.rollout\.top_p = 1\.5"),
        ({"rollout.min_p": 1.5}, r"config\.rollout\.min_p = 1\.5: must be at most 1"),
        ({"rollout.repetition_penalty": 0.0}, r"config\.rollout\.repetition_penalty = 0\.0: must be above 0"),
        ({"rollout.stop": ("\n",)}, r"config\.rollout\.stop = \('\\n',\): answers of task 'arithmetic'"),
        ({"rollout.stop_ids": (3,)}, r"config\.rollout\.stop_ids = \(3,\): answers of task 'arithmetic'"),
        ({"rollout.stop": ("",)}, r"config\.rollout\.stop = \('',\): an empty text"),
        ({"rollout.forced_prefix_ids": (2,) * 6}, r"config\.rollout\.forced_prefix_ids: 6 tokens; must be fewer than"),
        ({"rollout.forced_prefix_ids": (2,), "rollout.bad_ids": (2,)}, r"forced_prefix_ids: 2 is in config\.rollout\.bad_ids"),
        ({"rollout.typo": 3}, r"config\.rollout\.typo: unknown field; known here: num_prompts"),
        ({"seed": "one"}, r"config\.seed = 'one': expected int, got str"),
        ({"seed": True}, r"config\.seed = True: expected int, got bool"),
        ({"rollout": 3}, r"config\.rollout: expected a group of fields"),
        ({"objective.advantage": "vibes"}, r"config\.objective\.advantage = 'vibes': unknown; known: group_norm"),
        ({"objective.clip_low": -0.1}, r"config\.objective\.clip_low = -0\.1"),
        ({"objective.dual_clip": 0.5}, r"config\.objective\.dual_clip = 0\.5: must be None or a finite number > 1"),
        (
            {"learner.importance_cap": 2.0, "learner.old_logp": "sampler"},
            r"config\.learner\.importance_cap = 2\.0: .* set that to 'learner'",
        ),
        ({"learner.importance_cap": 0.5}, r"config\.learner\.importance_cap = 0\.5: at least 1"),
        ({"objective.ratio": "sequence"}, r"config\.objective\.aggregation = 'token_mean': .* use 'sequence_mean'"),
        ({"learner.num_minibatches": 3}, r"config\.learner\.num_minibatches = 3: must divide config\.rollout\.num_prompts"),
        ({"overlong.cache_share": 1.5}, r"config\.overlong\.cache_share = 1\.5: must be at most 1"),
        ({"model.path": None}, r"config\.model\.path is not set: give it a value, for example --config\.model\.path="),
        (
            {"model.dtype": "bfloat16", "objective.clip_low": 3e-4, "learner.old_logp": "sampler"},
            r"config\.learner\.old_logp = 'sampler': in bfloat16 .* clip range 0\.0003, .* 'learner'",
        ),
        (
            {"model.dtype": "bfloat16", "objective.clip_low": 3e-4, "async_steps": 1},
            r"config\.learner\.old_logp = 'auto': in bfloat16 .* config\.async_steps to 0",
        ),
        ({"overlong.cache_tokens": 99}, r"config\.overlong\.cache_tokens = 99: must be at most"),
        ({"model.dtype": "float8"}, r"config\.model\.dtype = 'float8': unknown; known: float32, bfloat16"),
        ({"model.dim": 33}, r"config\.model\.dim = 33"),
        ({"task.name": "chess"}, r"config\.task\.name = 'chess': unknown; known: arithmetic"),
        ({"task.name": "jsonl"}, r"config\.model\.path is empty"),
        ({"task.arithmetic.operators": "*"}, r"config\.task\.arithmetic\.operators = '\*'"),
        ({"task.arithmetic.max_operand": 0}, r"config\.task\.arithmetic\.max_operand = 0"),
        ({"optimizer.b1": 1.0}, r"config\.optimizer\.b1 = 1\.0: must be at most 0\.999999"),
        ({"warm_start.label_noise": 1.5}, r"config\.warm_start\.label_noise = 1\.5: must be at most 1"),
        ({"optimizer.schedule": "magic"}, r"config\.optimizer\.schedule = 'magic'"),
        ({"async_steps": -1}, r"config\.async_steps = -1: must be at least 0"),
    ],
)
def test_bad_values_name_the_field_and_the_fix(changes, says):
    with pytest.raises(UserError, match=says) as caught:
        parse_config(broken(changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "old_logp"),
    [
        ({}, "sampler"),
        ({"learner.importance_cap": 2.0}, "learner"),
        ({"async_steps": 1}, "sampler"),
        ({"async_steps": 1, "learner.importance_cap": 2.0}, "learner"),
        ({"async_steps": 1, "learner.old_logp": "learner"}, "learner"),
        ({"model.dtype": "bfloat16"}, "sampler"),
        ({"model.dtype": "bfloat16", "objective.clip_low": 3e-4}, "learner"),
        ({"model.dtype": "float32", "objective.clip_low": 3e-4}, "sampler"),
        ({"model.dtype": "bfloat16", "learner.old_logp": "learner"}, "learner"),
    ],
)
def test_old_logp_follows_from_the_numerics_and_the_clip(changes, old_logp):
    assert parse_config(broken(changes)).learner.old_logp == old_logp


def test_the_overlong_cache_follows_the_budget_that_a_flag_changes():
    dapo = by_name.get_config("dapo,runlocal")
    dapo.rollout.max_completion_tokens = 256
    overlong = parse_config(dapo).overlong
    assert [num_cache_tokens(overlong, budget) for budget in (256, 20480, 6, 3)] == [64, 5120, 1, 1]
    assert num_cache_tokens(dataclasses.replace(overlong, cache_tokens=7), 256) == 7
    assert num_cache_tokens(dataclasses.replace(overlong, cache_share=0.0), 256) == 0


def test_a_missing_field_is_an_error():
    config = base.get_config().to_dict()
    del config["rollout"]["top_k"]
    with pytest.raises(UserError, match=r"config\.rollout\.top_k: missing"):
        parse_config(config)


def test_unknown_scale_lists_the_known_ones():
    with pytest.raises(ValueError, match="tiny, llm, smollm2, runlocal"):
        base.get_config("galactic")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rollout.num_prompts": 12}, r"config\.rollout\.num_prompts = 12 .* do not divide over 8 devices"),
        ({"rollout.num_prompts": 16, "learner.num_minibatches": 4}, r"4 groups do not divide over 8 devices"),
        ({"rollout.num_prompts": 16, "learner.num_microbatches": 3}, r"config\.learner\.num_microbatches = 3"),
        (
            {"mesh.data": 9},
            r"config\.mesh: data = 9, fsdp = 1, expert = 1, context = 1, tensor = 1 needs 9 devices, there are 8",
        ),
        (
            {"mesh.fsdp": 3},
            r"config\.mesh: data = -1, fsdp = 3, expert = 1, context = 1, tensor = 1: 8 devices do not divide by 3",
        ),
        ({"mesh.data": 1, "mesh.tensor": 8}, r"config\.mesh\.tensor = 8: does not divide the model's num_heads = 4; .* of 2"),
        ({"mesh.expert": 2}, r"config\.mesh\.expert = 2: the model has no experts; set it to 1"),
        ({"mesh.data": 1, "mesh.fsdp": 3, "rollout.num_prompts": 9}, r"config\.mesh\.fsdp = 3: does not divide .* dim = 32"),
        ({"rollout.max_completion_tokens": 2, "overlong.cache_share": 0.0}, r"config\.rollout\.max_completion_tokens = 2: the"),
        ({"eval.num_prompts": 99}, r"config\.eval\.num_prompts = 99"),
        ({"rollout.bad_ids": (2, 15)}, r"config\.rollout\.bad_ids: 15 is no token of the model, which has 15"),
        ({"rollout.bad_first_ids": (-1,)}, r"config\.rollout\.bad_first_ids: -1 is no token"),
        ({"rollout.forced_prefix_ids": (1,)}, r"config\.rollout\.forced_prefix_ids: 1 ends a completion"),
    ],
)
def test_what_does_not_fit_the_devices_or_the_task_is_named(changes, says):
    with pytest.raises(UserError, match=says):
        make_run(parse_config(broken(changes)))


@pytest.mark.parametrize(("num_microbatches", "num_prompts"), [(1, 8), (2, 16), (4, 8), (8, 8)])
def test_microbatches_may_cut_groups_or_within_groups(num_microbatches, num_prompts):
    changes = {"learner.num_microbatches": num_microbatches, "rollout.num_prompts": num_prompts}
    config = parse_config(broken(changes))
    check_batch_divisible(config, make_mesh(config.mesh.sizes))
    assert config.learner.num_microbatches == num_microbatches


def test_old_names_of_fields_are_taken_with_a_warning_that_says_the_new_one():
    old = base.get_config("tiny", "gtpo").to_dict()
    del old["rollout"]["max_live_sequences"], old["objective"]["include_other_side"], old["warm_start"]["label_noise"]
    old["rollout"]["live_rows"], old["objective"]["shaped_zeros"], old["warm_start"]["careless_rate"] = 5, "left_out", 0.25
    with pytest.warns(FutureWarning) as warned:
        config = parse_config(old)
    said = " ".join(str(each.message) for each in warned)
    assert "config.rollout.live_rows is now config.rollout.max_live_sequences" in said and len(warned) == 3
    assert (config.rollout.max_live_sequences, config.objective.include_other_side, config.warm_start.label_noise) == (
        5,
        False,
        0.25,
    )
