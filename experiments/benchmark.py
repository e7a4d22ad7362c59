"""Speed and memory of rollout, update and whole step: one JSON line, with the share of the machine's limits that is reached.

    python -m experiments.benchmark --what=update                            the tiny model
    python -m experiments.benchmark --model=smol --what=step --beta=0.04 --dtype=bfloat16
    python -m experiments.benchmark --config=configs/dapo.py:tiny --what=step --prompts=64     a run's own model and task

What the models and batches are: experiments/peers/workload.py. rollout and step count completion tokens; update and mem count
prompt and completion tokens of every row, as if each row ran its own prompt. experiments.peers.compare measures peers.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from experiments.peers import workload
from experiments.peers.workload import SHAPES, Timing, Workload
from experiments.synthetic import architecture, random_batch
from grpo_jax import metrics as metrics_lib
from grpo_jax.config import Config, parse_config
from grpo_jax.configs import base
from grpo_jax.errors import UserError
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import make_mesh
from grpo_jax.tools import cli, roofline
from grpo_jax.tools.plan.fixed_task import FixedTask
from grpo_jax.training.run import Run, assemble, check_batch_divisible, make_run
from grpo_jax.training.samplers import end_tokens, make_rollout
from grpo_jax.types import Rollout, TrainState

COMPILED = "/jax/core/compile/backend_compile_duration"
FIELDS = {  # flag -> field of the config
    "beta": "objective.kl_coef",
    "dtype": "model.dtype",
    "prompts": "rollout.num_prompts",
    "group_size": "rollout.group_size",
    "completion_len": "rollout.max_completion_tokens",
}
Measured = tuple[Timing, roofline.Sizes, roofline.Sizes]  # what was sampled, what was trained on


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the flags and fill in those that were not given. Exits on bad ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_flags(parser)
    parser.add_argument("--config", help="configs/<variant>.py[:scale], instead of --model and --prompt-len")
    args = parser.parse_args(argv)
    if args.config and (args.model or args.prompt_len):
        parser.error("--config: its model and prompts are the run's own, leave out --model and --prompt-len")
    filled = workload.fill(args)
    if not args.config:
        return filled
    # A run's own config has its own batch; only how often it is timed is the workload's.
    args.warmup, args.repeats = filled.warmup, filled.repeats
    return args


def prepare(args: argparse.Namespace) -> tuple[Run, TrainState]:
    """Make the run to measure, and its state. Raises UserError."""
    if args.config:
        run = make_run(apply_flags(cli.load_config(args.config, "--config"), args))
        return run, run.initial_state()
    # Random weights at a tiny learning rate: nothing should end a completion, and no repeat should change the work of the next.
    raw = base.get_config()
    raw.update_from_flattened_dict(
        {"warm_start.num_steps": 0, "optimizer.learning_rate": workload.LEARNING_RATE, "eval.num_samples": 0, "mesh.data": 1}
    )
    config, shape = apply_flags(raw, args), SHAPES[args.model]
    mesh = make_mesh(config.mesh.sizes)
    check_batch_divisible(config, mesh)
    model = ModelDef(architecture(args.model), dtype=config.model.dtype, remat=config.model.remat)
    task = FixedTask(workload.random_ids(args.prompts, args.prompt_len, shape.vocab_size, seed=0), workload.PAD)
    run = assemble(config, mesh, task, model)
    return run, run.initial_state()


def apply_flags(raw: Any, args: argparse.Namespace) -> Config:
    """Change a config by the flags that were given, and validate it. Raises UserError."""
    given = {field: getattr(args, name) for name, field in FIELDS.items() if getattr(args, name) is not None}
    raw.update_from_flattened_dict(given)
    if args.remat:
        raw.model.remat = "full"
    if args.microbatch:
        rows = raw.rollout.num_prompts * raw.rollout.group_size // raw.learner.num_minibatches
        if rows % args.microbatch:
            raise UserError(f"--microbatch={args.microbatch}: does not divide the {rows} rows of an optimizer step")
        raw.learner.num_microbatches = rows // args.microbatch
    return parse_config(raw)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time one thing and return the JSON object. Raises UserError."""
    # JAX itself says when something compiles: a call that compiles again (another shape, another dtype) would be slow without
    # anybody noticing, and its time would end up in the median.
    compiled_at: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == COMPILED:
            compiled_at.append(time.perf_counter())

    # For good: jax 0.7 has no public way to take a listener back, and this one is for one process.
    jax.monitoring.register_event_duration_secs_listener(listen)
    run, state = prepare(args)
    try:
        how = {"rollout": time_rollout, "step": time_step, "update": time_update, "mem": time_update}[args.what]
        timing, sampled, trained = how(run, state, args)
    finally:
        run.task.close()
    # No event at all means that JAX has renamed it, and the check below would pass for ever.
    in_timed_calls = [at for at in compiled_at if timing.began <= at <= timing.ended]
    assert compiled_at, f"JAX does not report {COMPILED} any more"
    if in_timed_calls:
        raise UserError(f"--warmup={args.warmup}: something compiled in a timed call, use more")
    version = f"jax {jax.__version__} {jax.devices()[0].device_kind}"
    record = workload.report("grpo_jax", version, describe_workload(run, args), timing)
    if args.what != "mem":
        record.update(limits(run, args.what, statistics.median(timing.secs), sampled, trained))
    return record


def describe_workload(run: Run, args: argparse.Namespace) -> Workload:
    """Describe what was measured, read from the run itself and not from the flags."""
    config, rollout = run.config, run.config.rollout
    rows = rollout.num_prompts * rollout.group_size
    microbatch = rows // (config.learner.num_minibatches * config.learner.microbatches)
    if microbatch == rows:
        microbatch = 0  # all at once, as the flag says it
    return Workload(
        model=args.config or args.model,
        what=args.what,
        beta=float(config.objective.kl_coef),
        dtype=run.model.dtype,
        remat=run.model.remat == "full",
        microbatch=microbatch,
        prompts=rollout.num_prompts,
        group_size=rollout.group_size,
        prompt_len=run.task.prompt_tokens,
        completion_len=rollout.max_completion_tokens,
        warmup=args.warmup,
        repeats=args.repeats,
    )


def time_rollout(run: Run, state: TrainState, args: argparse.Namespace) -> Measured:
    """Time rollouts of the same prompts, each with a key of its own.

    Args:
      run: the run; its rollout is compiled here, as a call of its own.
      state: of which only the policy is used.
      args: of which warmup and repeats are used.
    Returns: (timing that counts completion tokens, sizes sampled, the same sizes).
    """
    # A call of its own, because `run.collect` makes prompts and scores completions as well.
    rollout = jax.jit(make_rollout(run.model, run.config.rollout, end_tokens(run.task), run.mesh))
    prompts = run.task.train_prompts(0, run.config.rollout.num_prompts)
    last = []

    def call(i: int) -> Rollout:
        last[:] = [jax.block_until_ready(rollout(state.policy, prompts, jax.random.key(i)))]
        return last[0]

    timing = workload.timed(call, lambda result: float(result.mask_PGT.sum()), args.warmup, args.repeats)
    return timing, sizes_of(last[0]), sizes_of(last[0])


def time_step(run: Run, state: TrainState, args: argparse.Namespace) -> Measured:
    """Time a step as the trainer runs it: two calls, or config.steps_per_call of them in one, whose time is divided.

    Args:
      run: the run.
      state: where it begins; donated.
      args: of which warmup and repeats are used.
    Returns: (timing that counts completion tokens, sizes sampled, sizes of the batch that was trained on).
    """
    held: list[Any] = [state]
    num_steps = max(run.config.steps_per_call, 1)

    def call(_: int):
        if run.config.steps_per_call:
            state, batch, metrics = run.iterate(held[0])
            metrics = metrics_lib.unstack_metrics(metrics, num_steps)[-1]
        else:
            state, batch, metrics = run.collect(held[0])
            state = run.update(state, batch)[0]
        held[:] = state, batch, metrics
        return jax.block_until_ready(held)

    def count(_: Any) -> float:
        return float(held[2]["completion/length_mean"].total)  # what was sampled, also what dynamic sampling threw away

    # With dynamic sampling more rows are sampled than trained on, and of other lengths: the metric counts all of them.
    timing = workload.timed(call, count, args.warmup, args.repeats)
    timing = dataclasses.replace(timing, secs=[secs / num_steps for secs in timing.secs])
    trained, lengths = sizes_of(held[1].rollout), held[2]["completion/length_mean"]
    rows = float(lengths.count)
    return timing, dataclasses.replace(trained, P=rows / trained.G, T=float(lengths.total) / rows), trained


def time_update(run: Run, state: TrainState, args: argparse.Namespace) -> Measured:
    """Time updates on one random batch of full length.

    Args:
      run: the run.
      state: where it begins; donated.
      args: of which warmup and repeats are used.
    Returns: (timing that counts prompt and completion tokens of every row, sizes of the batch, the same sizes).
    """
    batch = random_batch(run)
    held: list[Any] = [state]
    del state  # it is donated: nobody else may hold it

    def call(_: int):
        held[:] = run.update(held[0], batch)
        return jax.block_until_ready(held)

    sizes = sizes_of(batch.rollout)
    num_tokens = sizes.P * sizes.G * (sizes.S + sizes.T)
    return workload.timed(call, lambda _: num_tokens, args.warmup, args.repeats), sizes, sizes


def sizes_of(rollout: Rollout) -> roofline.Sizes:
    """Count prompts, completions of each, and their mean lengths."""
    P, G, _ = rollout.mask_PGT.shape
    return roofline.Sizes(P, G, float(rollout.prompts.mask_PS.sum()) / P, float(rollout.mask_PGT.sum()) / (P * G))


def limits(run: Run, what: str, secs: float, sampled: roofline.Sizes, trained: roofline.Sizes) -> dict[str, float]:
    """Compute shares of the measured ceilings.

    Args:
      run: the run that was timed.
      what: rollout, update or step.
      secs: of one call, the median.
      sampled: sizes of what was sampled.
      trained: sizes of what was trained on.
    Returns: the ceilings; the share of arithmetic that the result needs (recomputing adds none); of a rollout also the share of
    the bytes that decoding reads.
    """
    # Memory is measured with as many bytes as a decode step reads: a small model's weights are read from the cache, and
    # against the rate of memory its share would be more than 1.
    model, config, itemsize = run.model, run.config, jnp.dtype(run.model.dtype).itemsize
    ceilings = roofline.measure_ceilings(run.model.dtype, roofline.step_bytes(model, sampled, itemsize))
    flops = 0.0
    if what != "update":
        flops += roofline.forward_flops(model, sampled)
    if what != "rollout":
        # Forward, by activations, by weights; frozen weights need no gradient.
        passes = (3 - (run.model.lora is not None)) * config.learner.num_epochs
        passes += config.objective.needs_reference + (config.learner.old_logp == "learner")
        flops += passes * roofline.forward_flops(model, trained)
    shares: dict[str, float] = {
        "ceiling_gflops_per_s": round(ceilings.flops_per_s / 1e9, 1),
        "ceiling_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
        "model_flops_utilisation": round(flops / secs / ceilings.flops_per_s / run.mesh.size, 4),
    }
    if what == "rollout":
        num_bytes = roofline.decode_bytes(model, sampled, itemsize)
        shares["bandwidth_share"] = round(num_bytes / secs / ceilings.bytes_per_s / run.mesh.size, 4)
    return shares


def main() -> None:
    """Print one JSON line; exit with a line on stderr on bad input."""
    try:
        workload.emit(measure(parse()))
    except UserError as error:
        cli.fail(str(error))


if __name__ == "__main__":
    main()
