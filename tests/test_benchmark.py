"""The benchmark's counts: arithmetic against XLA's own count, bytes against the arrays that decoding reads; small runs."""

import argparse
import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments import benchmark, synthetic
from experiments.peers import compare, workload
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.models import block
from grpo_jax.models.architecture import Delta
from grpo_jax.models.lora import LoRA
from grpo_jax.models.transformer import Architecture, ModelDef, init_params
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.tools import cli, roofline
from grpo_jax.tools.roofline import Sizes, decode_bytes, forward_flops, step_bytes
from grpo_jax.types import Rollout
from tests import tiny

ARCH = Architecture(vocab_size=1024, dim=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, ffn_dim=512)
MODEL = ModelDef(ARCH)
CEILING = 1e8  # FLOP/s, of a slow machine: the small model should use a share of it that survives rounding


def counted_by_xla(function, *args):
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def one_each(P, S, T):
    """(parameters, a rollout of one completion a prompt): nothing is shared, so nothing is counted for a group."""
    rollout = tiny.random_batch(P, 2, T, S, ARCH.vocab_size).rollout
    alone = jax.tree.map(lambda x: x[:, :1], rollout.replace(prompts=None))
    return jax.eval_shape(lambda: init_params(ARCH, jax.random.key(0))), alone.replace(prompts=rollout.prompts)


def with_masked_half(P, S, T, model=MODEL):
    """Our count of a pass, and the half of attention that is computed only to be masked."""
    pairs = P * (S * (S - 1) / 2 + (T - 1) * (T - 2) / 2)
    return forward_flops(model, Sizes(P, 1, S, T)) + roofline.attention_flops(model.arch, pairs)


def logp(params, rollout, model=MODEL):
    return policy_logprobs(model, params, rollout, Sampling(1.0, 0, 1.0), 512)[0]


@pytest.mark.parametrize("lora", [None, LoRA(16, 32.0, ("q_proj", "o_proj", "up_proj"))])
def test_forward_flops_are_what_xla_counts(lora):
    """Its count has norms and softmax too, about 1 % at this width; adapters of that rank are 4 %."""
    P, S, T = 3, 16, 8
    model = dataclasses.replace(MODEL, lora=lora)
    _, rollout = one_each(P, S, T)
    xla = counted_by_xla(functools.partial(logp, model=model), model.param_shapes(), rollout)
    assert with_masked_half(P, S, T, model) == pytest.approx(xla, rel=0.02)


def test_the_products_of_a_gated_delta_net_are_counted():
    """Against XLA's count of a whole pass, whose chunks are padded to a power of 2; what is left are sums and exponentials."""
    P, S, T = 3, 64, 33
    delta = Delta(num_key_heads=2, num_value_heads=4, key_dim=32, value_dim=32, conv_width=4)
    model = ModelDef(dataclasses.replace(ARCH, num_layers=2, mixers=("gated_delta",), delta=delta))
    _, rollout = one_each(P, S, T)
    xla = counted_by_xla(functools.partial(logp, model=model), model.param_shapes(), rollout)
    assert forward_flops(model, Sizes(P, 1, S, T)) == pytest.approx(xla, rel=0.06)
    states = roofline.delta_flops(model.arch, S)
    assert states > 0.2 * 2 * roofline.per_token(model).layer_weights, "too few to be seen"


class TwoGates(block.MLP):
    """A new kind of layer: one matrix more, which no table and no formula of ours has heard of."""

    def __init__(self, arch, *, lora=None, rngs):
        super().__init__(arch, lora=lora, rngs=rngs)
        self.second = block.Linear(arch.dim, arch.dim, rngs=rngs)

    def __call__(self, x):
        y, chosen = super().__call__(x)
        return y * jax.nn.sigmoid(self.second(x)), chosen


def test_a_new_matrix_of_a_layer_is_counted(monkeypatch):
    P, S, T = 3, 16, 8
    model = ModelDef(dataclasses.replace(ARCH, norm_eps=1e-4))  # counts are kept by the architecture: one of its own
    sizes, tokens = Sizes(P, 1, S, T), P * S + P * (T - 1)
    plain_flops, plain_bytes = forward_flops(MODEL, sizes), step_bytes(MODEL, sizes, 2)
    monkeypatch.setitem(block.MLPS, "dense", TwoGates)
    _, rollout = one_each(P, S, T)
    xla = counted_by_xla(functools.partial(logp, model=model), model.param_shapes(), rollout)
    assert with_masked_half(P, S, T, model) == pytest.approx(xla, rel=0.02)
    more = ARCH.num_layers * ARCH.dim**2
    assert forward_flops(model, sizes) == plain_flops + 2 * more * tokens
    assert step_bytes(model, sizes, 2) == plain_bytes + 2 * more


@pytest.mark.parametrize(("path", "rank"), [(("layers", "mlp", "experts"), 4), (("table",), 2)])
def test_a_parameter_that_the_counting_does_not_know_is_an_error(path, rank):
    params = flatten_dict(MODEL.param_shapes())
    params[path] = jax.ShapeDtypeStruct((2,) * rank, jnp.float32)
    with pytest.raises(ValueError, match="/".join(path)):
        roofline.layer_matrices(unflatten_dict(params))


def test_an_update_is_three_forward_passes():
    """Our head computes its logits twice, to save memory; that is not arithmetic that the result needs."""
    P, S, T = 3, 16, 8
    head_again = 2 * ARCH.vocab_size * ARCH.dim * P * T
    xla = counted_by_xla(jax.grad(lambda params, rollout: logp(params, rollout).sum()), *one_each(P, S, T))
    assert 3 * with_masked_half(P, S, T) + head_again == pytest.approx(xla, rel=0.02)


def test_decoding_reads_every_matrix_and_the_caches():
    params = MODEL.param_shapes()
    matrices = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1 and min(x.shape[-2:]) > ARCH.num_layers)
    P, G, S, T = 3, 4, 16, 8
    tokens_PS = jax.ShapeDtypeStruct((P, S), jnp.int32)
    _, prefix = jax.eval_shape(lambda p, t: MODEL.bind(p).encode_prompts(t, t > 0), params, tokens_PS)
    prompts = sum(x.size for x in jax.tree.leaves(prefix.cache))
    rows = prompts // (P * S) * P * G * T / 2
    assert step_bytes(MODEL, Sizes(P, G, S, T), 4) == 4 * (matrices + prompts + rows)
    assert decode_bytes(MODEL, Sizes(P, G, S, T), 2) == 2 * (T - 1) * (matrices + prompts + rows)


@pytest.fixture
def small(monkeypatch):
    shape = workload.Shape(64, 16, 1, 2, 1, 32, 1e4, prompts=2, group_size=2, warmup=1, repeats=2)
    monkeypatch.setitem(workload.SHAPES, "tiny", shape)
    monkeypatch.setattr(benchmark.roofline, "measure_ceilings", lambda *_: benchmark.roofline.Ceilings(CEILING, CEILING))
    return ["--prompt-len=4", "--completion-len=3", "--model=tiny"]


@pytest.mark.slow
def test_a_measurement_counts_its_tokens_and_compiles_before_it_times(small):
    record = benchmark.measure(benchmark.parse([*small, "--what=step"]))
    assert record["tokens"] == 2 * 2 * 3
    assert record["first_call_s"] > record["max_s"] >= record["median_s"] > 0
    flops = (1 + 3) * forward_flops(ModelDef(synthetic.architecture("tiny")), Sizes(2, 2, 4, 3))
    assert record["model_flops_utilisation"] == pytest.approx(flops / record["median_s"] / CEILING, rel=0.05, abs=1e-4)


def test_what_was_measured_is_read_from_the_run(small):
    args = benchmark.parse([*small, "--what=step", "--beta=0.04", "--microbatch=2", "--dtype=bfloat16", "--remat"])
    run, state = benchmark.prepare(args)
    work = benchmark.describe_workload(run, args)
    assert (work.beta, work.microbatch, work.dtype, work.remat) == (0.04, 2, "bfloat16", True)
    assert (work.rows, work.prompt_len, work.completion_len) == (4, 4, 3)
    assert run.model.remat == "full" and run.config.learner.num_microbatches == 2 and state.ref_params is not None


def test_a_call_that_compiles_is_not_timed(small):
    args = benchmark.parse([*small, "--what=rollout"])
    shapes = iter(range(10, 20))

    def compiles_again(run, state, args):
        timing = workload.timed(lambda _: jax.jit(lambda x: x * 1.5 + 2)(np.ones(next(shapes))), lambda _: 1.0, 1, 2)
        sizes = Sizes(1, 1, 1, 1)
        return timing, sizes, sizes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "time_rollout", compiles_again)
        with pytest.raises(benchmark.UserError, match="--warmup=1: something compiled"):
            benchmark.measure(args)


def test_a_config_keeps_its_own_settings_but_for_flags():
    args = benchmark.parse(["--config=configs/dapo.py:runlocal", "--what=update", "--prompts=4", "--microbatch=8"])
    config = benchmark.apply_flags(cli.load_config(args.config, "--config"), args)
    assert config.objective.clip_high == 0.28 and config.objective.kl_coef == 0
    assert (config.rollout.num_prompts, config.rollout.group_size, config.learner.num_microbatches) == (4, 8, 4)
    with pytest.raises(SystemExit):
        benchmark.parse(["--config=configs/dapo.py", "--what=update", "--model=smol"])
    with pytest.raises(benchmark.UserError, match="does not divide the 32 rows"):
        benchmark.apply_flags(cli.load_config(args.config, "--config"), argparse.Namespace(**{**vars(args), "microbatch": 5}))
    with pytest.raises(benchmark.UserError, match=r"--config: no file configs/nothing\.py"):
        cli.load_config("configs/nothing.py", "--config")


@pytest.mark.slow
def test_a_peer_that_fails_does_not_stop_the_rest(monkeypatch, tmp_path, capsys):
    """Three systems in two rounds: one answers, one crashes, one cannot be installed."""
    (tmp_path / "good.py").write_text('import json; print("noise"); print(json.dumps(dict(tokens_per_s=10.0, version="v")))')
    (tmp_path / "bad.py").write_text('raise SystemExit("no such thing")')
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setattr(compare, "MODULES", {"grpo_jax": "good", "trl": "bad", "tunix": "good"})

    def python_of(system, venvs):
        if system == "tunix":
            raise compare.MeasureError("pip: no network")
        return sys.executable

    monkeypatch.setattr(compare, "python_of", python_of)
    args = argparse.Namespace(systems=["grpo_jax", "trl", "tunix"], rounds=2, limit_secs=60, venvs=tmp_path)
    records = compare.rounds([], args)
    assert [r["tokens_per_s"] for r in records["grpo_jax"]] == [10, 10]
    assert records["trl"][0]["error"] == "exit status 1: no such thing" and records["tunix"][1]["error"] == "pip: no network"
    order = [json.loads(line)["system"] for line in capsys.readouterr().out.splitlines() if "error" in line]
    assert order == ["trl", "tunix", "trl", "tunix"]
    compare.table(records, [])


def test_ratios_are_of_rounds():
    records = {"grpo_jax": [{"x": 2.0}, {"x": 8.0}, {"x": 9.0}], "trl": [{"x": 1.0}, {"error": "?"}, {"x": 3.0}]}
    assert compare.ratio(records, "trl", "x") == 2.5
    assert compare.ratio(records, "trl", "y") is None


def test_workloads_are_the_same_for_everybody():
    work = workload.parse(["--what=update", "--group-size=2", "--prompts=3", "--prompt-len=5", "--completion-len=7"])
    assert np.shape(work.prompt_ids()) == (3, 5) and np.shape(work.completion_ids()) == (6, 7)
    assert work.num_tokens == 6 * 12 and work.completion_ids() == work.completion_ids()
    batch_ids = np.array(work.completion_ids())
    assert batch_ids.min() >= workload.FIRST and batch_ids.max() < work.shape.never
    with pytest.raises(SystemExit):
        workload.parse(["--what=update", "--microbatch=5"])
    marks = workload.timed_by_marks(0.0, [5.0, 6.0, 8.0, 11.0], workload.parse(["--what=step", "--warmup=1", "--repeats=2"]))
    assert marks.first_secs == 5 and marks.secs == [1, 2]


def test_rollout_is_a_pytree_of_the_random_task(small):
    """The random batch has the shapes that a rollout of the same run would have."""
    run, state = benchmark.prepare(benchmark.parse([*small, "--what=update"]))
    batch = synthetic.random_batch(run)
    rollout = benchmark.make_rollout(run.model, run.config.rollout, benchmark.end_tokens(run.task), run.mesh)
    prompts = run.task.train_prompts(0, 2)
    sampled = jax.eval_shape(rollout, state.policy, prompts, jax.random.key(0))
    assert isinstance(sampled, Rollout)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), batch.rollout, sampled)
    assert all(jax.tree.leaves(same))
