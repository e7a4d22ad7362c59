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

from configs import base
from experiments.peers import workload
from experiments.peers.workload import SHAPES, Timing, Workload
from experiments.synthetic import architecture, random_batch
from grpo_jax import metrics as metrics_lib
from grpo_jax.config import Config, parse_config
from grpo_jax.errors import UserError
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import make_mesh
from grpo_jax.tools import cli, roofline
from grpo_jax.tools.plan.fixed_task import FixedTask
from grpo_jax.training import build
from grpo_jax.training.iteration import make_rollout
from grpo_jax.training.run import Run, assemble, check_batch_divisible, initial_state, make_run
from grpo_jax.types import Rollout, TrainState

COMPILED = "/jax/core/compile/backend_compile_duration"
FIELDS = {  # flag -> field of the config
    "beta": "objective.kl_coef",
    "dtype": "model.dtype",
    "prompts": "rollout.num_prompts",
    "group_size": "rollout.group_size",
    "completion_len": "rollout.max_completion_tokens",
}
Measured = tuple[Timing, roofline.Sizes, roofline.Sizes]  # sizes of the rollout, sizes of the batch that is trained on


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Flags that were not given get the workload's values, or with --config stay None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_flags(parser)
    parser.add_argument("--config", help="configs/<variant>.py[:scale], instead of --model and --prompt-len")
    args = parser.parse_args(argv)
    if args.config and (args.model or args.prompt_len):
        parser.error("--config: its model and prompts are the run's own, leave out --model and --prompt-len")
    filled = workload.fill(args)
    if not args.config:
        return filled
    args.warmup, args.repeats = filled.warmup, filled.repeats
    return args


def prepare(args: argparse.Namespace) -> tuple[Run, TrainState]:
    """Make the run to measure, and its state. Raises UserError."""
    if args.config:
        run = make_run(apply_flags(cli.load_config(args.config, "--config"), args))
        return run, initial_state(run)
    # Nothing but the workload, or the numbers would not compare with the peers': no warm start, no evaluation, one device.
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
    return run, initial_state(run)


def apply_flags(raw: Any, args: argparse.Namespace) -> Config:
    """Return the config with the flags that were given. Raises UserError."""
    given = {field: getattr(args, name) for name, field in FIELDS.items() if getattr(args, name) is not None}
    raw.update_from_flattened_dict(given)
    if args.remat:
        raw.model.remat = "full"
    # The flag is in rows, as the peers have it, the config in microbatches of an optimizer step.
    if args.microbatch:
        rows = raw.rollout.num_prompts * raw.rollout.group_size // raw.learner.num_minibatches
        if rows % args.microbatch:
            raise UserError(f"--microbatch={args.microbatch}: does not divide the {rows} rows of an optimizer step")
        raw.learner.num_microbatches = rows // args.microbatch
    return parse_config(raw)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time one thing and return the JSON object. Raises UserError."""
    compiled_at: list[float] = []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        del duration_secs
        if event == COMPILED:
            compiled_at.append(time.perf_counter())

    # A call that compiles takes seconds where others take milliseconds: among few repeats it decides the result. The listener
    # is there from the start, so that the first compilation shows that JAX still reports them by this name.
    jax.monitoring.register_event_duration_secs_listener(listen)
    run, state = prepare(args)
    try:
        timers = {"rollout": time_rollout, "step": time_step, "update": time_update, "mem": time_update}
        timing, sampled, trained = timers[args.what](run, state, args)
    finally:
        run.task.close()
        jax.monitoring.unregister_event_duration_listener(listen)
    in_timed_calls = [at for at in compiled_at if timing.began <= at <= timing.ended]
    assert compiled_at, f"JAX does not report {COMPILED} any more"
    if in_timed_calls:
        raise UserError(f"--warmup={args.warmup}: something compiled in a timed call, use more")
    version = f"jax {jax.__version__} {jax.devices()[0].device_kind}"
    record = workload.report("grpo_jax", version, describe_workload(run, args), timing)
    if args.what != "mem":
        record.update(shares_of_limits(run, args.what, statistics.median(timing.secs), sampled, trained))
    return record


def describe_workload(run: Run, args: argparse.Namespace) -> Workload:
    """Return the workload that was measured, read from the run itself."""
    # From the run, not from the flags: with --config most of them are None, and a flag that had no effect would be believed.
    config, rollout = run.config, run.config.rollout
    num_microbatches = config.learner.num_minibatches * config.learner.num_microbatches
    microbatch = 0
    if num_microbatches > 1:
        microbatch = rollout.num_prompts * rollout.group_size // num_microbatches
    return Workload(
        model=args.config or args.model,
        what=args.what,
        beta=config.objective.kl_coef,
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
    """Time the rollout alone.

    Args:
      run, state: from `prepare`.
      args: the flags, with warmup and repeats.
    Returns: seconds of each call and completion tokens of one; the sizes of what was sampled, twice.
    """
    # The prompts are the same in every call and the key is not: with a model that can end a completion, lengths vary as they do
    # in training.
    rollout = jax.jit(make_rollout(run.model, build.rollout_spec(run.config, run.task), run.mesh))
    prompts = run.task.train_prompts(0, run.config.rollout.num_prompts)
    last = []

    def call(i: int) -> Rollout:
        last[:] = [jax.block_until_ready(rollout(state.policy, prompts, jax.random.key(i)))]
        return last[0]

    timing = workload.timed(call, lambda result: float(result.mask_PGT.sum()), args.warmup, args.repeats)
    return timing, sizes_of(last[0]), sizes_of(last[0])


def time_step(run: Run, state: TrainState, args: argparse.Namespace) -> Measured:
    """Time a step as the trainer runs it: two calls, or config.steps_per_call steps in one call.

    Args:
      run, state: from `prepare`.
      args: the flags, with warmup and repeats.
    Returns: seconds of a step (a call's divided by its steps) and completion tokens; sizes of the rollout and of the batch.
    """
    # The state is donated to the update, so each call needs the one that the call before it returned.
    held: list[Any] = [state]
    num_steps = max(run.config.steps_per_call, 1)

    def call(_: int):
        if run.config.steps_per_call:
            state, batch, metrics = run.iterate(held[0])
            metrics = metrics_lib.unstack_metrics(metrics, num_steps)[-1]
        else:
            state, batch, metrics = run.collect(held[0])
            state, _ = run.update(state, batch)
        held[:] = state, batch, metrics
        return jax.block_until_ready(held)

    def count(_: Any) -> float:
        return float(held[2]["completion/length_mean"].total)  # what was sampled, also what dynamic sampling threw away

    # With dynamic sampling more prompts are sampled than trained on, and the rollout's arithmetic is that of all of them: its
    # sizes come from the metric, which counts every completion, the batch's from the batch.
    timing = workload.timed(call, count, args.warmup, args.repeats)
    timing = dataclasses.replace(timing, secs=[secs / num_steps for secs in timing.secs])
    trained, lengths = sizes_of(held[1].rollout), held[2]["completion/length_mean"]
    rows = float(lengths.count)
    return timing, dataclasses.replace(trained, P=rows / trained.G, T=float(lengths.total) / rows), trained


def time_update(run: Run, state: TrainState, args: argparse.Namespace) -> Measured:
    """Time the update alone, on full-length random completions.

    Args:
      run, state: from `prepare`; the state is donated and cannot be used again.
      args: the flags, with warmup and repeats.
    Returns: seconds of each call and the tokens of one, prompts included; the sizes of the batch, twice.
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
    """Return the number of prompts, of completions of each, and their mean lengths in tokens."""
    P, G, _ = rollout.mask_PGT.shape
    return roofline.Sizes(P, G, float(rollout.prompts.mask_PS.sum()) / P, float(rollout.mask_PGT.sum()) / (P * G))


def shares_of_limits(run: Run, what: str, secs: float, sampled: roofline.Sizes, trained: roofline.Sizes) -> dict[str, float]:
    """Compute the shares of the machine's measured limits that were reached.

    Args:
      run: that was measured.
      what: rollout, update or step.
      secs: of a call, or of a step.
      sampled, trained: sizes of the rollout and of the batch.
    Returns: the limits in GFLOP/s and GB/s, and the shares, between 0 and 1: of arithmetic that the result needs (recomputing
      adds none), for a rollout also of the bytes that decoding reads.
    """
    # Measured here and now, not taken from a data sheet: machines that are shared or slowed down reach less of that.
    arch, config, itemsize = run.model.arch, run.config, jnp.dtype(run.model.dtype).itemsize
    ceilings = roofline.measure_ceilings(run.model.dtype, roofline.step_bytes(arch, sampled, itemsize))
    flops = 0.0
    if what != "update":
        flops += roofline.forward_flops(arch, sampled)
    if what != "rollout":
        # Forward, backward by activations, backward by weights. LoRA's frozen matrices have no gradient, and those of the
        # adapters are too small to count. The reference and the learner's old_logp are one forward pass each.
        passes = (2 if run.model.lora else 3) * config.learner.num_epochs
        passes += (config.objective.kl_coef > 0) + (config.learner.old_logp == "learner")
        flops += passes * roofline.forward_flops(arch, trained)
    shares: dict[str, float] = {
        "ceiling_gflops_per_s": round(ceilings.flops_per_s / 1e9, 1),
        "ceiling_gb_per_s": round(ceilings.bytes_per_s / 1e9, 1),
        "model_flops_utilisation": round(flops / secs / ceilings.flops_per_s / run.mesh.size, 4),
    }
    if what == "rollout":
        num_bytes = roofline.decode_bytes(arch, sampled, itemsize)
        shares["bandwidth_share"] = round(num_bytes / secs / ceilings.bytes_per_s / run.mesh.size, 4)
    return shares


def main() -> None:
    """Run the command line: one JSON line on stdout."""
    try:
        workload.emit(measure(parse()))
    except UserError as error:
        cli.fail(str(error))


if __name__ == "__main__":
    main()
