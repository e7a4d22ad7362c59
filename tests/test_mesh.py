"""Eight devices as data x fsdp x expert x tensor: the numbers of one device, and in the programs only the expected traffic."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax import metrics as metrics_lib
from grpo_jax import objectives
from grpo_jax.config import RolloutConfig
from grpo_jax.learner.hyperparams import hyperparams_of
from grpo_jax.learner.logprobs import Chunks, token_logprobs
from grpo_jax.learner.optimizer import make_optimizer
from grpo_jax.learner.train_step import make_train_step
from grpo_jax.models import grad_sums, transformer
from grpo_jax.models.fsdp import gather
from grpo_jax.models.lora import TARGETS, LoRA, split_adapters
from grpo_jax.models.transformer import MAX_UNROLLED, ModelDef
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import (
    logical_axes,
    make_mesh,
    param_spec,
    shard_map_over_batch,
    shardings_of,
    vary_like,
    with_shardings,
)
from grpo_jax.rollout.rollout import EndTokens
from grpo_jax.rollout.sampling import Sampling, draw
from grpo_jax.training import build
from grpo_jax.training.checkpoint import Checkpointer
from grpo_jax.training.run import make_run
from grpo_jax.training.samplers import make_rollout, make_sampler_weights
from grpo_jax.types import join_params
from tests import tiny

# Layers enough for a loop, so that each collective of a layer stands in the program once; every size is another one.
ARCH = dataclasses.replace(
    tiny.LLAMA, dim=16, num_layers=MAX_UNROLLED + 1, vocab_size=28, head_dim=6, ffn_dim=40, qk_norm=True, qkv_bias=True
)
EXPERTS = dataclasses.replace(
    ARCH, num_layers=1, ffn_dim=10, qkv_bias=False, mlp="experts", num_experts=4, experts_per_token=2, is_router_normalised=True
)
EXPERTS_DEEP = dataclasses.replace(EXPERTS, num_layers=MAX_UNROLLED + 1)
DELTA = dataclasses.replace(
    tiny.DELTA, vocab_size=ARCH.vocab_size, num_layers=2, mixers=("gated_delta", "attention"), norm_eps=0.1
)
TWICE = dataclasses.replace(DELTA, num_layers=4)  # scanned over the period, by the test
SHALLOW = dataclasses.replace(ARCH, num_layers=2)
MATRICES = {"q": (24, 16), "k": (12, 16), "v": (12, 16), "o": (16, 24), "gate": (40, 16), "up": (40, 16), "down": (16, 40)}
OPS = ("stablehlo.all_gather", "stablehlo.reduce_scatter")
COLLECTIVE = re.compile(r"= (\S+?)\[([\d,]*)\]\S* (all-gather|reduce-scatter)\(.*?replica_groups=(.+?), (?:dim|use)")
ONE, EIGHT = (1, 1, 1), (2, 2, 2)


def config_of(sizes, changes=None):
    """sizes: along data, fsdp, tensor, and along expert if there is a fourth."""
    axes = dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor", "mesh.expert"), sizes, strict=False))
    return tiny.config_of("grpo", {"mesh.fsdp_min_elements": 65, "optimizer.warmup_steps": 0, **axes, **(changes or {})})


def collectives(program, kind):
    """Of a compiled program: {size of the result: how many of them are written in it}, of floats."""
    found = [(m[3], m[2]) for m in COLLECTIVE.finditer(program.as_text()) if "32" not in m[1] or "f32" in m[1]]
    assert found, "no collective was recognised: does the pattern still fit?"
    return collections.Counter(tuple(map(int, dims.split(","))) for name, dims in found if name == kind)


# ----------------------------------------------------------------------------------------------------------- the update


@functools.cache
def updated(sizes, num_microbatches, variant="gtpo", arch=ARCH, bucket_tokens=64, in_place=False):
    """Three updates of the decoder; -> (compiled program, parameters, metrics). gtpo has statistics over the batch.

    in_place: it was made with gradients that are added up in place, as on accelerators.
    """
    config = config_of(sizes, {"learner.num_microbatches": num_microbatches, "learner.bucket_tokens": bucket_tokens})
    config = dataclasses.replace(config, objective=objectives.get(variant))
    model, mesh = ModelDef(arch), make_mesh(config.mesh.sizes)
    optimizer_of = functools.partial(make_optimizer, config.optimizer, config.num_updates)
    optimizer = optimizer_of(hyperparams_of(config))
    params = tiny.random_params(arch)
    ref_params = jax.tree.map(lambda x: 0.9 * x, params) if config.objective.has_kl else None
    state = tiny.state_of(params, optimizer, ref_params, config=config)
    places = shardings_of(with_shardings(state, mesh, config.mesh.fsdp_min_elements))
    state = jax.device_put(state, places)
    step = jax.jit(make_train_step(model, optimizer_of, config, mesh), out_shardings=(places, None))
    program, metrics = step.lower(state, batch_of(0)).compile(), []
    for seed in range(3):
        state, each = program(state, batch_of(seed))
        metrics.append(metrics_lib.to_floats(each))
    return program, jax.device_get(state.params), metrics


def batch_of(seed):
    return tiny.random_batch(8, 4, 5, vocab=ARCH.vocab_size, seed=seed)


@pytest.mark.parametrize("arch, bucket_tokens", [(ARCH, 64), (EXPERTS_DEEP, 2)], ids=["llama", "experts, widths"])
@pytest.mark.slow
def test_gradients_that_are_added_up_in_place_are_the_same(arch, bucket_tokens, monkeypatch):
    """As accelerators add them, over microbatches, with all of a layer's weights sharded."""
    _, expected, metrics = updated(EIGHT, 2, arch=arch, bucket_tokens=bucket_tokens)
    monkeypatch.setattr(ModelDef, "adds_gradients_in_place", True)
    calls, scan = [], grad_sums.scan_layers
    monkeypatch.setattr(transformer, "scan_layers", lambda *given: calls.append(given) or scan(*given))
    _, params, in_place_metrics = updated(EIGHT, 2, arch=arch, bucket_tokens=bucket_tokens, in_place=True)
    assert calls
    for leaf, one in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        assert np.abs(leaf - one).max() < 1e-5 * np.abs(one).max()
    for each, one in zip(in_place_metrics, metrics, strict=True):
        assert each["grad/norm"] == pytest.approx(one["grad/norm"], rel=1e-4)


@pytest.mark.parametrize(
    "sizes, num_microbatches, arch",
    [(EIGHT, 2, ARCH), ((1, 1, 2), 1, ARCH), ((1, 2, 2, 2), 2, EXPERTS), (EIGHT, 2, DELTA)]
    + [
        pytest.param(*each, marks=pytest.mark.nightly)
        for each in [
            (EIGHT, 2, TWICE),
            *(((8, 1, 1), num, arch) for num, arch in ((2, DELTA), (1, EXPERTS))),
            *(((1, 8, 1), num, arch) for num, arch in ((2, DELTA), (1, EXPERTS))),
            # A group that two microbatches share has its prompt in both, and its tokens count twice in the experts' load.
            *((sizes, num, EXPERTS) for sizes, num in ((EIGHT, 2), ((2, 1, 1, 4), 1), ((1, 4, 1, 2), 1))),
        ]
    ],
)
@pytest.mark.slow
def test_three_updates_are_those_of_one_device(sizes, num_microbatches, arch, monkeypatch):
    """Other meshes, variants and a KL penalty: rows in test_train_step.py; all of them: `python -m tests.mesh_matrix`."""
    if arch is TWICE:
        monkeypatch.setattr(transformer, "MAX_UNROLLED", 1)
    _, params, metrics = updated(sizes, num_microbatches, arch=arch)
    _, expected, expected_metrics = updated(ONE, 1, arch=arch)
    before = tiny.random_params(arch)
    for leaf, one, start in zip(*map(jax.tree.leaves, (params, expected, before)), strict=True):
        assert np.abs(leaf - one).max() < 1e-5 * np.abs(one).max()
        assert np.abs(one - start).max() > 1e-4 * np.abs(one).max(), "nothing was learnt"
    for each, one in zip(metrics, expected_metrics, strict=True):
        assert each["loss/total"] == pytest.approx(one["loss/total"], rel=1e-5)
        assert each["grad/norm"] == pytest.approx(one["grad/norm"], rel=1e-4)
        if arch.num_experts:
            assert each["experts/load_entropy"] == pytest.approx(one["experts/load_entropy"], rel=1e-5)
            assert 0 < one["experts/load_entropy"] < math.log(arch.num_experts) and one["experts/load_max"] > 1


@pytest.mark.slow
def test_updates_of_sharded_adapters_are_those_of_one_device():
    """No adapter is too small here; by default only those of real models' size are sharded along fsdp."""
    changes = {
        "lora.rank": 3,
        "lora.targets": TARGETS,
        "mesh.fsdp_min_elements": 1,
        "model.num_kv_heads": 2,
        "eval.num_samples": 0,
    }
    states = []
    for sizes in ((1, 2, 2), ONE):
        run = make_run(config_of(sizes, changes))
        state = run.initial_state()
        for seed in range(3):
            batch = tiny.random_batch(
                4, run.config.rollout.group_size, run.config.rollout.max_completion_tokens, seed=seed,
                prompt_width=run.task.prompt_tokens, vocab=run.model.arch.vocab_size,
            )  # fmt: skip
            state, _ = run.update(state, batch)
        states.append(state)
    layers = states[0].params["layers"]
    for matrix, adapter in (
        (layers["attn"]["q"], "lora_a"),
        (layers["attn"]["o"], "lora_b"),
        (layers["mlp"]["down"], "lora_b"),
    ):
        assert "fsdp" in matrix[adapter].sharding.spec
    for leaf, one in zip(*(jax.tree.leaves(jax.device_get(state.params)) for state in states), strict=True):
        assert np.abs(leaf - one).max() < 1e-5 * np.abs(one).max() and np.abs(one).max() > 0


@pytest.mark.nightly
def test_devices_that_exchange_tokens_take_one_width():
    """Of completions, in a branch of the program: in another one each would wait for the others for ever."""
    _, params, _ = updated((1, 2, 1, 4), 1, arch=EXPERTS, bucket_tokens=2)
    _, expected, _ = updated(ONE, 1, arch=EXPERTS)
    longest = [batch_of(seed).rollout.mask_PGT.sum(-1).max(-1) for seed in range(3)]  # of each device's one group
    assert any(len({2 * (each > 2) + (each > 4) for each in np.asarray(of_batch).tolist()}) > 1 for of_batch in longest)
    assert tiny.largest_difference(params, expected) < 1e-5


@pytest.mark.slow
def test_the_update_gathers_each_layer_once_a_pass_and_scatters_its_gradient():
    """Passes: forward and backward, prompts with completions. Of a device's half along tensor; nothing stacked travels."""
    program = updated(EIGHT, 2)[0]
    V, D = ARCH.vocab_size // 2, ARCH.dim
    # The head. Of the embedding only the tokens' rows travel.
    gathers, scatters = collections.Counter({(V, D): 1}), collections.Counter({(V, D // 2): 1})
    for name in MATRICES:
        gathers[half_of(name)] += 2
        num_out, num_in = half_of(name)
        scatters[(num_out // 2, num_in) if name in ("o", "down") else (num_out, num_in // 2)] += 1
    assert (collectives(program, "all-gather"), collectives(program, "reduce-scatter")) == (gathers, scatters)
    received = sum(math.prod(size) * num for size, num in gathers.items() if size != (V, D)) // 2
    assert received == sum(map(math.prod, MATRICES.values())) // 2  # numbers a layer and pass, all for use


def half_of(name):
    """The shape of a layer's matrix, cut in two along tensor."""
    num_out, num_in = MATRICES[name]
    return (num_out, num_in // 2) if name in ("o", "down") else (num_out // 2, num_in)


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_travel_in_the_compute_dtype_and_their_gradients_are_summed_in_float32(axis):
    mesh, parts = make_mesh(config_of((1, 8, 1)).mesh.sizes), PartitionSpec(*("fsdp" if i == axis else None for i in range(2)))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(16, 24)), jnp.float32)
    slope_8 = jnp.asarray([1, *[2.0**-8] * 7], jnp.float32)  # in bfloat16 1 + 2^-8 is 1

    def product(part, slope_1):
        return (gather(part, axis, PartitionSpec(), jnp.bfloat16) * slope_1[0].astype(jnp.bfloat16)).sum()[None]

    def total(weight, slope_8):
        rows = PartitionSpec("fsdp")
        return jax.shard_map(product, mesh=mesh, in_specs=(parts, rows), out_specs=rows)(weight, slope_8).sum()

    grads = jax.jit(jax.value_and_grad(total), in_shardings=(NamedSharding(mesh, parts), None)).lower(weight, slope_8)
    (gathered,), (scattered,) = (re.findall(rf"{name}.*?-> tensor<\w+x(\w+)>", grads.as_text(), re.S) for name in OPS)
    assert (gathered, scattered) == ("bf16", "f32")
    np.testing.assert_array_equal(grads.compile()(weight, slope_8)[1], np.full((16, 24), 1 + 7 * 2.0**-8))


@pytest.mark.parametrize(
    ("sizes", "vocab_tokens"), [((1, 8, 1), 7), ((1, 8, 1), 10), ((1, 4, 2), 7), ((2, 1, 4), 3), ((2, 2, 2), 5)]
)
def test_a_head_worked_on_by_parts_of_the_vocabulary_is_never_there_in_full(sizes, vocab_tokens):
    """Values and gradients of one device, where each has its own positions, and its own columns and rows of the head."""
    mesh, rng = make_mesh(config_of(sizes).mesh.sizes), np.random.default_rng(0)
    hidden_FD, head_VD, weight_F = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((40, 16), (28, 16), 40))
    targets_F = jnp.asarray(rng.integers(0, 28, 40), jnp.int32)

    def weighed(hidden_FD, head_VD, targets_F, weight_F):
        head_VD = vary_like(head_VD, targets_F)  # its gradient is summed over data at the end, as an update does
        given = hidden_FD, head_VD, targets_F, None, Sampling(0.7), Chunks(5, vocab_tokens), 3.0
        logp_F, entropy_F = token_logprobs(*given, has_entropy_gradient=True)
        return weight_F * (logp_F + 0.5 * entropy_F)

    def total(of_device):
        return lambda hidden_FD, head_VD: of_device(hidden_FD, head_VD, targets_F, weight_F).sum()

    rows, columns = PartitionSpec(("data", "fsdp")), PartitionSpec(None, "fsdp")
    shared = shard_map_over_batch(weighed, mesh, (rows, columns, rows, rows), rows)
    places = NamedSharding(mesh, rows), NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    program = jax.jit(jax.value_and_grad(total(shared), (0, 1)), in_shardings=places, out_shardings=(None, places))
    program = program.lower(hidden_FD, head_VD).compile()
    found, expected = program(hidden_FD, head_VD), jax.value_and_grad(total(weighed), (0, 1))(hidden_FD, head_VD)
    assert tiny.largest_difference(found, expected) < 1e-5
    travelled = {tuple(map(int, dims.split(","))) for _, dims, *_ in COLLECTIVE.findall(program.as_text())}
    if sizes[1] > 1:
        assert {(vocab_tokens, 16), (vocab_tokens, 16 // sizes[1])} <= travelled
    assert not [size for size in travelled if size[0] == 28 or size[0] == 28 // sizes[2]]


# ---------------------------------------------------------------------------------------------------------- the rollout


ROLLOUT = RolloutConfig(group_size=4, max_completion_tokens=6)


@functools.cache
def sampled(sizes, arch=SHALLOW, max_live_sequences=0):
    """A policy with adapters sampled from; -> (compiled program, its Rollout)."""
    config = config_of(sizes)
    model, mesh = ModelDef(arch, lora=LoRA(3, 5.0, ("q_proj", "down_proj"))), make_mesh(config.mesh.sizes)
    adapters = jax.tree.map(lambda x: jnp.full(x.shape, 0.1), split_adapters(model.param_shapes())[1])
    policy = join_params(tiny.random_params(arch), adapters)
    policy = jax.device_put(policy, shardings_of(with_shardings(policy, mesh, config.mesh.fsdp_min_elements)))
    rollout = dataclasses.replace(ROLLOUT, max_live_sequences=max_live_sequences)
    weights, run = make_sampler_weights(config, mesh), make_rollout(model, rollout, EndTokens((3, 18), 0), mesh)
    program = jax.jit(lambda policy, prompts, key: run(weights(policy), prompts, key))
    arguments = policy, tiny.random_prompts(8, 4, ARCH.vocab_size), jax.random.key(0)
    program = program.lower(*arguments).compile()
    return program, jax.device_get(program(*arguments))


@pytest.mark.parametrize(
    ("sizes", "arch", "max_live_sequences"),
    [
        (EIGHT, SHALLOW, 0),
        ((1, 1, 2, 4), EXPERTS, 0),  # devices whose rows have ended go on for those that need their experts
        pytest.param((2, 1, 1, 4), EXPERTS, 3, marks=pytest.mark.nightly),
    ],
)
@pytest.mark.slow
def test_a_mesh_samples_the_same_tokens(sizes, arch, max_live_sequences):
    rolled, expected = sampled(sizes, arch, max_live_sequences)[1], sampled(ONE, arch)[1]
    jax.tree.map(np.testing.assert_array_equal, rolled.experts_PGTX, expected.experts_PGTX)
    np.testing.assert_array_equal(rolled.tokens_PGT, expected.tokens_PGT)
    np.testing.assert_allclose(rolled.sampler_logp_PGT, expected.sampler_logp_PGT, atol=1e-5)
    assert len(np.unique(expected.tokens_PGT)) > 10 and 0 < expected.is_truncated_PG.mean() < 1


@pytest.mark.slow
def test_weights_are_gathered_before_the_decode_loop_and_caches_are_cut_by_heads():
    program, _ = sampled(EIGHT)
    loops, main = program.as_text().split("\nENTRY ")
    gathered = {dims for _, dims, kind, _ in COLLECTIVE.findall(main) if kind == "all-gather"}
    L = SHALLOW.num_layers
    for name in MATRICES:
        assert ",".join(map(str, (L, *half_of(name)))) in gathered, name
    inside = [math.prod(map(int, dims.split(","))) for _, dims, kind, _ in COLLECTIVE.findall(loops) if kind == "all-gather"]
    B, K, U, H = 8, 1, 5, ARCH.head_dim  # of one device: a quarter of the rows, one of two heads
    # The sums that a token is drawn by, no weights; in so short a vocabulary each token is a sum of its own.
    assert max(inside, default=0) <= B * ARCH.vocab_size
    assert f"f32[{B},{K},{U},{H}]" in loops and f"f32[{B},{2 * K},{U},{H}]" not in loops


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9)], ids=["all", "top_p"])  # top_k ranks the whole row
def test_a_draw_gathers_sums_and_no_logits_where_the_vocabulary_is_sharded(sampling):
    rows, vocab = 8, 4096
    mesh = make_mesh({"data": 4, "fsdp": 1, "tensor": 2})
    logits = jax.ShapeDtypeStruct((rows, vocab), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data", "tensor")))
    keys = jax.ShapeDtypeStruct((rows,), jax.random.key(0).dtype, sharding=NamedSharding(mesh, PartitionSpec("data")))
    text = jax.jit(lambda logits, keys: draw(logits, keys, sampling)).lower(logits, keys).compile().as_text()
    gathered = [math.prod(map(int, dims.split(","))) for _, dims, kind, _ in COLLECTIVE.findall(text) if kind == "all-gather"]
    assert gathered and max(gathered) <= rows // 4 * vocab // 64


def test_weights_travel_to_the_rollout_in_the_compute_dtype():
    config = config_of((2, 4, 1), {"model.dtype": "bfloat16"})
    shapes = with_shardings(tiny.random_params(ARCH), make_mesh(config.mesh.sizes), config.mesh.fsdp_min_elements)
    text = jax.jit(make_sampler_weights(config, make_mesh(config.mesh.sizes))).lower(shapes).as_text()
    dtypes = re.findall(r"sharding_constraint.*tensor<[\dx]+x(\w+)>", text)
    assert len(dtypes) == 2 * (len(MATRICES) + 2) and set(dtypes) == {"bf16"}


# ------------------------------------------------------------------------------------------------------- what lies where


def test_every_matrix_is_cut_and_every_vector_is_whole_or_cut_by_heads():
    """A parameter that the table of `sharding` does not know would lie whole on every device."""
    mesh = make_mesh(config_of((1, 2, 2)).mesh.sizes)
    shapes = ModelDef(ARCH, lora=LoRA(2, 1.0, TARGETS))
    leaves = flatten_dict(shapes.param_shapes())
    for path, leaf in leaves.items():
        is_matrix = leaf.ndim - ("layers" in path) == 2
        cut = [axis for axis in param_spec(path, leaf.shape, mesh, 0) if axis]
        wanted = {"lora_a": 1, "lora_b": 1, "bias": 1}.get(path[-1], 2) if is_matrix or path[-1] == "bias" else 0
        assert len(cut) == wanted, path
        # One name for each axis: a layer's, that has lost the first, is looked up from the end.
        assert len(logical_axes(path)) in (0, leaf.ndim), path
    assert param_spec(("layers", "mlp", "up", "weight"), (5, 40, 16), mesh, 641) == PartitionSpec(None, "tensor")


@pytest.mark.skipif(jax.__version_info__ < (0, 8), reason="its compiler refuses this on several devices, and so do we")
@pytest.mark.slow
def test_offloaded_moments_wait_on_the_host_and_change_nothing(tmp_path):
    changes = {"eval.num_samples": 0, "learner.num_minibatches": 2, "objective.kl_coef": 0.0}
    away, here = (make_run(config_of((2, 1, 1), {**changes, "optimizer.offload": offload})) for offload in (True, False))

    def kinds(state):
        return {(x.ndim > 0, x.sharding.memory_kind) for x in jax.tree.leaves(state.opt_state)}

    sizes = {"num_prompts": 4, "group_size": 8, "max_tokens": away.config.rollout.max_completion_tokens}
    batch = tiny.random_batch(**sizes, prompt_width=away.task.prompt_tokens, vocab=away.model.arch.vocab_size)
    state, expected = away.initial_state(), here.initial_state()
    assert kinds(state) == kinds(away.abstract_state) == {(True, "pinned_host"), (False, "device")}
    state, expected = (run.update(each, batch)[0] for run, each in ((away, state), (here, expected)))
    assert kinds(state) == {(True, "pinned_host"), (False, "device")}
    checkpointer = Checkpointer(tmp_path, away.config.checkpoint)
    try:
        checkpointer.save(1, state, away.config.to_dict())
        state = away.restore_state(checkpointer, 1)
    finally:
        checkpointer.close()
    assert kinds(state) == {(True, "pinned_host"), (False, "device")}
    state, expected = (run.update(each, batch)[0] for run, each in ((away, state), (here, expected)))
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get((x.params, x.opt_state)) for x in (state, expected)))
    assert int(state.step) == 2 and max(np.abs(x).max() for x in jax.tree.leaves(jax.device_get(state.opt_state[1][0].mu))) > 0


@pytest.mark.slow
def test_a_state_is_born_in_parts_and_its_checkpoint_moves_between_meshes(tmp_path):
    small = {"model.num_kv_heads": 2, "objective.kl_coef": 0.0, "eval.num_samples": 0}

    def run_on(*sizes):
        return make_run(config_of(sizes, small))

    there = run_on(*EIGHT)
    state = there.initial_state()
    up = [tree["layers"]["mlp"]["up"]["weight"] for tree in (state.params, state.opt_state[1][0].mu, state.opt_state[1][0].nu)]
    assert {leaf.addressable_shards[0].data.shape for leaf in up} == {(1, 12, 8)} and up[0].shape == (1, 24, 16)
    state = state.replace(opt_state=jax.tree.map(lambda x: x + 3, state.opt_state), step=state.step + 7)

    for number, sizes in enumerate([(1, 4, 1), ONE, EIGHT]):
        here = run_on(*sizes)
        checkpointer = Checkpointer(tmp_path / str(number), here.config.checkpoint)
        try:
            checkpointer.save(7, state, here.config.to_dict())
            after = here.restore_state(checkpointer, 7)
        finally:
            checkpointer.close()
        assert shardings_of(after) == shardings_of(here.abstract_state)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), jax.device_get(state))
        state = after


def test_a_warm_start_is_each_processs_own(monkeypatch):
    """A kernel over the whole mesh would wait for the other processes."""
    run = make_run(config_of(EIGHT, {"model.num_kv_heads": 2, "warm_start.num_steps": 1}))
    run = dataclasses.replace(run, model=dataclasses.replace(run.model, hardware=Hardware("tpu", run.mesh)))
    decoders = []

    def make_warm_start(decoder, *_):
        decoders.append(decoder)
        return lambda params, seed: params

    monkeypatch.setattr(build, "make_warm_start", make_warm_start)
    build.initial_params(run.config, run.model, run.task, shardings_of(run.abstract_state.params))
    (decoder,) = decoders
    assert decoder.hardware == Hardware("tpu")
