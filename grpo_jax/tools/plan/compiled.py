"""The real programs of a job, compiled for simulated devices on shapes alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import jax
from jax.sharding import NamedSharding

from grpo_jax.errors import UserError
from grpo_jax.parallel.sharding import AXES, ROWS, make_mesh
from grpo_jax.tools.plan.job import Job
from grpo_jax.training.run import Run, assemble
from grpo_jax.training.samplers import end_tokens, make_rollout, make_sampler_weights

MAX_DEVICES = 256


def require_simulable(num_devices: int) -> None:
    """Raises UserError."""
    if num_devices > MAX_DEVICES:
        raise UserError(f"--devices={num_devices}: --compile simulates at most {MAX_DEVICES}, plan it without --compile")


def in_child(argv: list[str], num_devices: int) -> int:
    """The same command where that many CPU devices are simulated; -> its exit status. Their number is fixed at start-up."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={num_devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0"}
    return subprocess.run([sys.executable, "-m", "grpo_jax.tools.plan.command", *argv], env=env, check=False).returncode


def run_of(job: Job) -> Run:
    """The job's run on this process's devices, with the update compiled for one width: the longest."""
    learner = dataclasses.replace(job.config.learner, bucket_tokens=0)
    mesh = dataclasses.replace(job.config.mesh, **{axis: job.mesh.shape[axis] for axis in AXES})
    config = dataclasses.replace(job.config, learner=learner, mesh=mesh)
    return assemble(config, make_mesh(config.mesh.sizes), job.task, job.model)


def compiled_update(job: Job) -> Any:
    """The train step as `trainer` calls it."""
    run = run_of(job)
    batch = run.fns.example_batch(run.abstract_state.policy)
    rows = NamedSharding(run.mesh, ROWS)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    return run.update.lower(run.abstract_state, batch).compile()


def compiled_rollout(job: Job) -> Any:
    """Weights made ready and completions sampled, in one program, as a traceable task has it."""
    run = run_of(job)
    weights = make_sampler_weights(run.config, run.mesh)
    rolled = make_rollout(job.model, run.config.rollout, end_tokens(run.task), run.mesh)
    prompts = jax.eval_shape(lambda: run.task.train_prompts(0, run.config.rollout.num_prompts))
    key = jax.eval_shape(lambda: jax.random.key(0))
    program = jax.jit(lambda policy, prompts, key: rolled(weights(policy), prompts, key))
    return program.lower(run.abstract_state.policy, prompts, key).compile()


def temporary_bytes(program: Any) -> float:
    """What a device holds beside arguments and results while the program runs, by XLA's own account."""
    return program.memory_analysis().temp_size_in_bytes
