"""Speed and memory of rollout, update and whole step: one JSON line, with the share of the machine's limits that is reached.

    python -m experiments.benchmark --model=tiny --what=update            random weights, fixed lengths, seeded tokens
    python -m experiments.benchmark --model=smol --what=step --beta=0.04 --dtype=bfloat16
    python -m experiments.benchmark --config=configs/dapo.py:tiny --what=step          a real run's settings
    python -m experiments.benchmark --model=tiny --what=update --against=trl --against=tunix   peers, interleaved, ratios

tiny: 4 layers of width 256, 512 tokens; smol: SmolLM2-135M's shape. rollout and step count completion tokens, update counts
prompt and completion tokens of every row, as if each row ran its own prompt.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import base
from experiments.roofline import Ceilings, decode_bytes, measure_ceilings, rollout_flops, update_flops
from grpo_jax import build
from grpo_jax.config import Config
from grpo_jax.iteration import make_rollout
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.models.transformer import ModelDef, init_params
from grpo_jax.run import Run, assemble, initial_state, make_run, state_around
from grpo_jax.sharding import make_mesh
from grpo_jax.types import Batch, Prompts, Reward, TrainState

SHAPES = {
    "tiny": Architecture(512, 256, 4, 8, 4, 32, 704),
    "smol": Architecture(49_152, 576, 30, 9, 3, 64, 1536, rope=Rope(100_000.0)),
}
BATCHES = {"tiny": (4, 8), "smol": (2, 4)}  # prompts, completions of each
REPEATS = {"tiny": (2, 7), "smol": (1, 4)}  # untimed calls, timed calls
PEERS = ("trl", "tunix")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="tiny")
    parser.add_argument("--config", help="measure a run's own model and task: configs/<variant>.py[:scale]")
    parser.add_argument("--what", choices=["rollout", "update", "step", "mem"], required=True)
    parser.add_argument("--beta", type=float, default=0.0, help="kl_coef")
    parser.add_argument("--prompt-len", type=int, default=64)
    parser.add_argument("--completion-len", type=int, default=128)
    parser.add_argument("--prompts", type=int)
    parser.add_argument("--G", type=int)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--remat", type=int, choices=[0, 1], default=0)
    parser.add_argument("--microbatch", type=int, default=0, help="rows in a microbatch; 0: all at once")
    parser.add_argument("--warmup", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--against", action="append", choices=PEERS, default=[])
    parser.add_argument("--rounds", type=int, default=3, help="with --against: interleaved processes of each system")
    args = parser.parse_args()
    prompts, group = BATCHES[args.model]
    warmup, repeats = REPEATS[args.model]
    args.prompts, args.G = args.prompts or prompts, args.G or group
    args.warmup = warmup if args.warmup is None else args.warmup
    args.repeats = repeats if args.repeats is None else args.repeats
    return args


class RandomTask:
    """Prompts of one length, nothing ends a completion, and a reward that is anything but equal."""

    is_traceable, stop_ids = True, ()

    def final_answers(self, tokens_PGT: Any, mask_PGT: Any) -> list[list[str]]:
        raise NotImplementedError("nothing is evaluated here")

    def __init__(self, vocab_size: int, prompt_tokens: int):
        self.vocab_size, self.prompt_tokens = vocab_size, prompt_tokens
        self.tokenizer: Any = argparse.Namespace(pad_id=1)

    def train_prompts(self, position: Any, num_prompts: int) -> Prompts:
        shape = (num_prompts, self.prompt_tokens)
        tokens_PS = jax.random.randint(jax.random.key(position), shape, 3, self.vocab_size, jnp.int32)
        return Prompts(tokens_PS, jnp.ones(shape, bool), jnp.zeros(num_prompts, jnp.int32))

    def eval_prompts(self) -> Prompts:
        return self.train_prompts(0, 1)

    def reward(self, answer: Any, tokens_PGT: Any, mask_PGT: Any) -> Reward:
        del answer
        reward_PG = ((tokens_PGT * mask_PGT).sum(-1) % 7).astype(jnp.float32)
        return Reward(reward_PG, jnp.zeros_like(reward_PG), {})

    def close(self) -> None:
        pass


def workload(args: argparse.Namespace) -> tuple[Run, TrainState]:
    """The run to measure, and its state."""
    if args.config:
        run = make_run(config_of(args.config))
        return run, initial_state(run)
    raw = base.get_config()
    raw.update_from_flattened_dict(
        {
            "objective.kl_coef": args.beta,
            "warm_start.num_steps": 0,
            "rollout.num_prompts": args.prompts,
            "rollout.group_size": args.G,
            "rollout.max_completion_tokens": args.completion_len,
            "optimizer.learning_rate": 1e-6,
            "learner.num_microbatches": args.prompts * args.G // args.microbatch if args.microbatch else 1,
            "eval.num_samples": 0,
            "mesh.data": 1,
        }
    )
    config = Config.from_config_dict(raw)
    model = ModelDef(SHAPES[args.model], dtype=args.dtype, remat=bool(args.remat))
    run = assemble(config, make_mesh(config.mesh), RandomTask(model.arch.vocab_size, args.prompt_len), model)
    return run, state_around(run, init_params(model.arch, jax.random.key(0)), None)


def config_of(name: str) -> Config:
    """configs/dapo.py:tiny -> Config."""
    path, _, scale = name.partition(":")
    spec = importlib.util.spec_from_file_location("benchmarked_config", path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Config.from_config_dict(module.get_config(*([scale] if scale else [])))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time one thing; -> the JSON line."""
    run, state = workload(args)
    P, G = run.config.rollout.num_prompts, run.config.rollout.group_size
    rollout = jax.jit(make_rollout(run.model, build.rollout_spec(run.config, run.task), run.mesh))
    prompts = run.task.train_prompts(0, P)
    rss = {"rss_before_mb": rss_mb("VmRSS")}
    if args.what == "rollout":
        secs, first_secs, last = timed(lambda i: rollout(state.policy, prompts, jax.random.key(i)), args)
        num_tokens = float(last.mask_PGT.sum())
    elif args.what == "step":
        holder = [state]

        def step(_: int):
            holder[0], batch, _ = run.iterate(holder[0])
            return batch.rollout.mask_PGT

        secs, first_secs, last = timed(step, args)
        num_tokens = float(last.sum())
    else:
        batch = random_batch(run, prompts, state)
        holder = [state]

        def update(_: int):
            holder[0], metrics = run.update(holder[0], batch)
            return holder[0].step, metrics

        if args.what == "mem":
            args = argparse.Namespace(**{**vars(args), "warmup": 1, "repeats": 2})
        secs, first_secs, _ = timed(update, args, after_first=reset_peak)
        num_tokens = float(batch.rollout.mask_PGT.sum() + batch.rollout.prompts.mask_PS.sum() * G)
    median = statistics.median(secs)
    return {
        "system": "grpo_jax",
        "version": f"jax {jax.__version__} {jax.devices()[0].device_kind}",
        "model": args.config or args.model,
        "what": args.what if args.what == "rollout" else f"{args.what}_beta{args.beta:g}",
        "dtype": args.dtype,
        "tokens_per_s": round(num_tokens / median, 2),
        "median_s": round(median, 5),
        "min_s": round(min(secs), 5),
        "max_s": round(max(secs), 5),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "peak_rss_steady_mb": rss_mb("VmHWM"),
        **rss,
        "threads": os.cpu_count(),
        "tokens": num_tokens,
        "repeats": len(secs),
        "first_call_s": round(first_secs, 3),
        "B": P * G,
        "G": G,
        "prompt_len": run.task.prompt_tokens,
        "completion_len": run.config.rollout.max_completion_tokens,
        "beta": run.config.objective.kl_coef,
        "remat": int(run.model.remat),
        "microbatch": args.microbatch,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **limits(args.what, run, median, measure_ceilings(run.model.dtype)),
    }


def limits(what: str, run: Run, secs: float, ceilings: Ceilings) -> dict[str, float]:
    """Shares of the measured ceilings: arithmetic that the result needs (recomputing adds none), bytes that decoding reads."""
    arch, rollout = run.model.arch, run.config.rollout
    shape = (rollout.num_prompts, rollout.group_size, run.task.prompt_tokens, rollout.max_completion_tokens)
    shares: dict[str, float] = {f"ceiling_{name}": value for name, value in dataclasses.asdict(ceilings).items()}
    flops = 0.0
    if what in ("rollout", "step"):
        flops += rollout_flops(arch, *shape)
    if what != "rollout":
        has_reference = run.config.objective.kl_coef > 0
        flops += update_flops(arch, *shape, has_reference=has_reference)
    shares["model_flops_utilisation"] = round(flops / secs / ceilings.flops_per_s, 4)
    if what == "rollout":
        num_bytes = decode_bytes(arch, *shape, jnp.dtype(run.model.dtype).itemsize)
        shares["bandwidth_share"] = round(num_bytes / secs / ceilings.bytes_per_s, 4)
    return shares


def random_batch(run: Run, prompts: Prompts, state: TrainState) -> Batch:
    """A batch of full-length random completions with the rewards of a coin."""
    rollout = jax.eval_shape(
        make_rollout(run.model, build.rollout_spec(run.config, run.task), run.mesh), state.policy, prompts, jax.random.key(0)
    )
    rng = np.random.default_rng(0)
    P, G, T = rollout.tokens_PGT.shape
    blank = jnp.full((P, G, T), -np.log(run.model.arch.vocab_size), jnp.float32)
    rollout = dataclasses.replace(
        rollout,
        prompts=prompts,
        tokens_PGT=jnp.asarray(rng.integers(3, run.model.arch.vocab_size, (P, G, T)), jnp.int32),
        mask_PGT=jnp.ones((P, G, T)),
        sampler_logp_PGT=blank,
        entropy_PGT=-blank,
        support_PGT=None if rollout.support_PGT is None else jnp.full((P, G, T), run.model.arch.vocab_size, jnp.int32),
        is_truncated_PG=jnp.zeros((P, G), bool),
    )
    reward_PG = jnp.asarray(rng.integers(0, 2, (P, G)), jnp.float32)
    return Batch(rollout, reward_PG, reward_PG, jnp.zeros(P, jnp.int32))


def timed(call: Callable[[int], Any], args: argparse.Namespace, after_first: Callable[[], None] = lambda: None):
    """-> (seconds of each timed call, seconds of the first one, which compiles, the last result)."""
    began = time.perf_counter()
    result = jax.block_until_ready(call(0))
    first_secs = time.perf_counter() - began
    after_first()
    for i in range(1, args.warmup):
        jax.block_until_ready(call(i))
    secs = []
    for i in range(args.repeats):
        began = time.perf_counter()
        result = jax.block_until_ready(call(args.warmup + i))
        secs.append(time.perf_counter() - began)
    return secs, first_secs, result


def rss_mb(field: str) -> float | None:
    """A memory field of this process, MB (Linux; elsewhere None)."""
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((round(int(line.split()[1]) / 1024, 1) for line in lines if line.startswith(f"{field}:")), None)


def reset_peak() -> None:
    """Have VmHWM start again from what is held now (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    args = parse()
    if args.against:
        from experiments.peers.compare import compare

        compare(args)
    else:
        print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
