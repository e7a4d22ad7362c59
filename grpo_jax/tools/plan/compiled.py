"""The real programs of a job, compiled for simulated devices on shapes alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import jax
from jax.sharding import Mesh, NamedSharding

from grpo_jax.errors import UserError
from grpo_jax.parallel.sharding import AXES, ROWS, make_mesh
from grpo_jax.tools.plan.job import Job
from grpo_jax.training.run import Run, assemble
from grpo_jax.training.samplers import end_tokens, make_rollout, make_sampler_weights

MAX_DEVICES = 256


def require_simulable(num_devices: int) -> None:
    """Raises UserError if so many devices cannot be simulated in a sensible time."""
    if num_devices > MAX_DEVICES:
        raise UserError(f"--devices={num_devices}: --compile simulates at most {MAX_DEVICES}, plan it without --compile")


def in_child(argv: list[str], num_devices: int) -> int:
    """Run the same command in a process with that many simulated CPU devices; -> its exit status."""
    # XLA reads the number of devices once, at start-up. Level 0 saves LLVM's optimisation of code that never runs; collectives
    # and buffers are decided before it.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0"}
    return subprocess.run([sys.executable, "-m", "grpo_jax", "plan", *argv], env=env, check=False).returncode


def run_of(job: Job, mesh: Mesh | None = None) -> Run:
    """Assemble the job's run, with the update compiled for one width: the longest. mesh: None: this process's devices."""
    # Buckets would add a branch for each width, to be compiled as well; the longest one decides about memory.
    learner = dataclasses.replace(job.config.learner, bucket_tokens=0)
    sizes = dataclasses.replace(job.config.mesh, **{axis: job.mesh.shape[axis] for axis in AXES})
    config = dataclasses.replace(job.config, learner=learner, mesh=sizes)
    run = assemble(config, mesh or make_mesh(config.mesh.sizes), job.task, job.model)
    state, dtype = run.abstract_state, job.model.dtype
    # A model that is planned by its shape has no folder, but its frozen weights are taken as they would be loaded from one.
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), state.base)
    return dataclasses.replace(run, abstract_state=dataclasses.replace(state, base=base))


def compile_update(job: Job, mesh: Mesh | None = None) -> jax.stages.Compiled:
    """Compile the train step as `trainer` calls it. mesh: as in `run_of`."""
    run = run_of(job, mesh)
    batch = run.fns.example_batch(run.abstract_state.policy)
    # A batch comes from the rollout with its rows spread over the devices; without this it would be planned on each in full.
    rows = NamedSharding(run.mesh, ROWS)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    return run.update.lower(run.abstract_state, batch).compile()


def compile_rollout(job: Job, mesh: Mesh | None = None) -> jax.stages.Compiled:
    """Compile one program that makes the weights ready and samples completions, as a traceable task has it.

    mesh: as in `run_of`.
    """
    run = run_of(job, mesh)
    weights = make_sampler_weights(run.config, run.mesh)
    rolled = make_rollout(run.model, run.config.rollout, end_tokens(run.task), run.mesh)
    prompts = jax.eval_shape(lambda: run.task.train_prompts(0, run.config.rollout.num_prompts))
    key = jax.eval_shape(lambda: jax.random.key(0))
    # One program, so that the gathered weights count as its working memory and not as an argument.
    program = jax.jit(lambda policy, prompts, key: rolled(weights(policy), prompts, key))
    return program.lower(run.abstract_state.policy, prompts, key).compile()


def compile_iteration(job: Job, mesh: Mesh | None = None) -> jax.stages.Compiled:
    """Compile a whole iteration in one call, rollout, rewards and update, as a traceable task has it. mesh: as in `run_of`."""
    run = run_of(job, mesh)
    return run.iterate.lower(run.abstract_state).compile()


def temporary_bytes(program: jax.stages.Compiled) -> float:
    """Read the bytes that a device holds beside arguments and results while the program runs, by XLA's own account."""
    analysis = program.memory_analysis()
    assert analysis is not None, f"{jax.default_backend()}: this backend gives no account of memory"
    return analysis.temp_size_in_bytes


def hlo_text(program: jax.stages.Compiled) -> str:
    """Return the compiled program's text, as `collectives.traffic` reads it."""
    text = program.as_text()
    assert text is not None, f"{jax.default_backend()}: this backend gives no text of a program"
    return text
