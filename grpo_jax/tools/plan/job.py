"""What is planned: a config, a decoder, a mesh that need not exist, and what one device of it has to do."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.models.architecture import Architecture, Rope
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import AXES, axis_sizes, check_divisible, num_row_shards
from grpo_jax.tasks.arithmetic import ALPHABET
from grpo_jax.tasks.tokenizers import CharTokenizer
from grpo_jax.tools.plan.fixed_task import FixedTask
from grpo_jax.tools.roofline import Sizes
from grpo_jax.training import build
from grpo_jax.training.run import check_batch_divisible

# Public architecture numbers, from each model's config.json.
SHAPES = {
    "smollm2": Architecture(49_152, 576, 30, 9, 3, 64, 1536, Rope(100_000.0), 1e-5),
    "qwen2.5-0.5b": Architecture(151_936, 896, 24, 14, 2, 64, 4864, Rope(1e6), qkv_bias=True),
    "qwen2.5-7b": Architecture(152_064, 3584, 28, 28, 4, 128, 18_944, Rope(1e6), tie_embeddings=False, qkv_bias=True),
    "llama3-70b": Architecture(128_256, 8192, 80, 64, 8, 128, 28_672, Rope(500_000.0), 1e-5, tie_embeddings=False),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """mesh: an AbstractMesh; where only sizes are asked for, it does as well as a Mesh. prompt_tokens: S, with padding."""

    config: Config
    model: ModelDef
    mesh: Any
    prompt_tokens: int

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the compute dtype."""
        return jnp.dtype(self.model.dtype).itemsize

    @property
    def task(self) -> FixedTask:
        """Prompts of the job's shape."""
        return FixedTask(np.ones((self.config.rollout.num_prompts, self.prompt_tokens), np.int32), pad_id=1)

    @property
    def local_model(self) -> ModelDef:
        """The decoder that one device of `tensor` computes, as a model of its own, to be traced and counted as such.

        Its parameters have the shapes of one device's shards (tests/test_plan.py): a size that is divided here and not by
        the table of `parallel.sharding`, or the other way round, would make the plan wrong.
        """
        arch, t = self.model.arch, self.mesh.shape["tensor"]
        vocab_size = arch.vocab_size
        if vocab_size % t == 0:  # otherwise embedding and head stay whole
            vocab_size //= t
        local = dataclasses.replace(
            arch,
            num_heads=arch.num_heads // t,
            num_kv_heads=arch.num_kv_heads // t,
            ffn_dim=arch.ffn_dim // t,
            vocab_size=vocab_size,
        )
        return dataclasses.replace(self.model, arch=local)

    @property
    def local_batch(self) -> Sizes:
        """What one device samples, all of the budget used."""
        rollout = self.config.rollout
        groups = rollout.num_prompts // num_row_shards(self.mesh)
        return Sizes(groups, rollout.group_size, self.prompt_tokens, rollout.max_completion_tokens)

    @property
    def live_batch(self) -> Sizes:
        """What one device decodes side by side: all of it, or `rollout.max_live_sequences`, each with a copy of its prompt."""
        batch, max_live_sequences = self.local_batch, self.config.rollout.max_live_sequences
        return dataclasses.replace(batch, P=max_live_sequences, G=1) if 0 < max_live_sequences < batch.P * batch.G else batch

    @property
    def local_microbatch(self) -> Sizes:
        """What one device differentiates at a time (`batching.split_microbatches`)."""
        batch, learner = self.local_batch, self.config.learner
        groups, cuts = int(batch.P) // learner.num_minibatches, learner.num_microbatches
        parts = max(1, cuts // groups)  # of each group
        return dataclasses.replace(batch, P=groups * parts // cuts, G=batch.G // parts)


def make_job(config: Config, shape: str, prompt_tokens: int, num_devices: int) -> Job:
    """shape: of SHAPES, or empty: the config's own model. prompt_tokens: 0: task.max_prompt_tokens. Raises UserError."""
    mesh = mesh_of(tuple(axis_sizes(config.mesh.sizes, num_devices).values()))
    model = build.make_model(dataclasses.replace(config, model=without_path(config.model, shape)), CharTokenizer(ALPHABET))
    if shape:
        model = dataclasses.replace(model, arch=SHAPES[shape])
    return Job(config, model, mesh, prompt_tokens or config.task.max_prompt_tokens)


def without_path(model: Any, shape: str) -> Any:
    """The model's settings; with a shape of ours nothing is read from a folder. Raises UserError."""
    if not shape:
        return model
    if shape not in SHAPES:
        raise UserError(f"--shape={shape}: unknown; known: {', '.join(SHAPES)}")
    return dataclasses.replace(model, path="")


def mesh_of(sizes: tuple[int, ...]) -> Any:
    """A mesh without devices."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def require_allowed(job: Job) -> None:
    """The decoder and the batch can be cut as the mesh asks. Raises UserError."""
    check_divisible(job.model.arch.sharded_sizes, job.mesh)
    check_batch_divisible(job.config, job.mesh)


def allowed_meshes(job: Job) -> list[Job]:
    """The same job on every data x fsdp x tensor of as many devices that it can be cut by. Raises UserError: on none."""
    num, found = job.mesh.size, []
    for tensor in divisors(num):
        for fsdp in divisors(num // tensor):
            other = dataclasses.replace(job, mesh=mesh_of((num // tensor // fsdp, fsdp, tensor)))
            try:
                require_allowed(other)
            except UserError:
                continue
            found.append(other)
    if not found:
        raise UserError(
            f"--devices={num}: no mesh of so many suits the model and config.rollout.num_prompts; try another number"
        )
    return found


def divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
