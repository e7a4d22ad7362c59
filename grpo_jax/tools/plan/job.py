"""The job that is planned: a config, a decoder, a mesh that need not exist, and the share of one of its devices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from grpo_jax.config import Config, ModelConfig
from grpo_jax.errors import UserError
from grpo_jax.learner.logprobs import Chunks
from grpo_jax.models.architecture import Architecture, Delta, Rope
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import AXES, axis_sizes, check_divisible, num_row_shards, num_sampling_shards
from grpo_jax.rollout.rollout import sampling_of
from grpo_jax.tasks.embedded import tokenizer_of
from grpo_jax.tools.plan.fixed_task import FixedTask
from grpo_jax.tools.roofline import Sizes
from grpo_jax.training import build
from grpo_jax.training.run import check_batch_divisible, check_context

# Written down, so that a model can be planned on a machine that does not have it.
# Public architecture numbers, from each model's config.json.
SHAPES = {
    "smollm2": Architecture(49_152, 576, 30, 9, 3, 64, 1536, Rope(100_000.0), 1e-5),
    "qwen2.5-0.5b": Architecture(151_936, 896, 24, 14, 2, 64, 4864, Rope(1e6), qkv_bias=True),
    "qwen2.5-7b": Architecture(152_064, 3584, 28, 28, 4, 128, 18_944, Rope(1e6), tie_embeddings=False, qkv_bias=True),
    "llama3-70b": Architecture(128_256, 8192, 80, 64, 8, 128, 28_672, Rope(500_000.0), 1e-5, tie_embeddings=False),
    "qwen3-1.7b": Architecture(151_936, 2048, 28, 16, 8, 128, 6144, Rope(1e6), qk_norm=True),
    "qwen3-30b-a3b": Architecture(
        *(151_936, 2048, 48, 32, 4, 128, 768, Rope(1e6)),
        tie_embeddings=False,
        qk_norm=True,
        mlp="experts",
        num_experts=128,
        experts_per_token=8,
        is_router_normalised=True,
    ),
    "qwen3.5-4b": Architecture(
        *(248_320, 2560, 32, 16, 4, 256, 9216, Rope(1e7, share=0.25)),
        qk_norm=True,
        norm_plus_one=True,
        has_output_gate=True,
        mixers=("gated_delta", "gated_delta", "gated_delta", "attention"),
        delta=Delta(num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, conv_width=4),
    ),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """A run to be planned.

    mesh: an AbstractMesh; where only sizes are asked for, it does as well as a Mesh. prompt_tokens: S, with padding.
    chips: that it is planned for. Its programs are traced as a CPU's all the same: `model` has no hardware.
    """

    config: Config
    model: ModelDef
    mesh: Any
    prompt_tokens: int
    chips: Hardware | None = None

    @property
    def model_on_chips(self) -> ModelDef:
        """The model as a run on the chips has it, to be asked what it chooses there."""
        return dataclasses.replace(self.model, hardware=self.chips and dataclasses.replace(self.chips, mesh=self.mesh))

    @property
    def chunks(self) -> Chunks:
        """The pieces that the head works on in a microbatch."""
        sizes, learner = self.local_microbatch, self.config.learner
        num_tokens = int(sizes.P * sizes.G * sizes.T)
        return Chunks.of(self.model_on_chips, learner.logprob_chunk_tokens, num_tokens, sampling_of(self.config.rollout))

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
        """The decoder that one device of `tensor` and `expert` computes, as a model of its own, to be traced and counted.

        Its parameters have the shapes of one device's shards, but for the router's (tests/test_plan.py): a size that is divided
        here and not by the table of `parallel.sharding`, or the other way round, would make the plan wrong.
        """
        arch, t = self.model.arch, self.mesh.shape["tensor"]
        # If all experts take as many tokens, a device is asked as often as its own tokens ask.
        num_experts = arch.num_experts // self.mesh.shape["expert"]
        vocab_size = arch.vocab_size
        if vocab_size % t == 0:  # otherwise embedding and head are replicated
            vocab_size //= t
        delta = arch.delta
        if delta is not None:
            key_heads, value_heads = delta.num_key_heads // t, delta.num_value_heads // t
            delta = dataclasses.replace(delta, num_key_heads=key_heads, num_value_heads=value_heads)
        local = dataclasses.replace(
            arch,
            delta=delta,
            num_heads=arch.num_heads // t,
            num_kv_heads=arch.num_kv_heads // t,
            ffn_dim=arch.ffn_dim // t,
            num_experts=num_experts,
            experts_per_token=min(arch.experts_per_token, num_experts),
            vocab_size=vocab_size,
        )
        return dataclasses.replace(self.model, arch=local)

    @property
    def local_batch(self) -> Sizes:
        """The completions that one device trains on, all of the budget used; along `context` it has a part of their tokens."""
        rollout = self.config.rollout
        groups, tokens = rollout.num_prompts // num_row_shards(self.mesh), rollout.max_completion_tokens
        return Sizes(groups, rollout.group_size, self.prompt_tokens, tokens // self.mesh.shape["context"])

    @property
    def sampled_batch(self) -> Sizes:
        """The completions that one device samples, all of the budget used."""
        rollout = self.config.rollout
        groups = rollout.num_prompts // num_sampling_shards(self.mesh)
        return Sizes(groups, rollout.group_size, self.prompt_tokens, rollout.max_completion_tokens)

    @property
    def live_batch(self) -> Sizes:
        """The completions that one device decodes side by side: all, or `rollout.max_live_sequences`."""
        batch, num_live = self.sampled_batch, self.config.rollout.max_live_sequences
        if not 0 < num_live < batch.P * batch.G:
            return batch
        # Rows that take one after another no longer stand with their group: each has a copy of its prompt's cache.
        return dataclasses.replace(batch, P=num_live, G=1)

    @property
    def local_microbatch(self) -> Sizes:
        """The completions that one device differentiates at a time (`batching.split_microbatches`)."""
        batch, learner = self.local_batch, self.config.learner
        groups, num = int(batch.P) // learner.num_minibatches, learner.microbatches
        # Groups are split only once each microbatch has a single one, because each piece runs the prompt again.
        pieces = max(1, num // groups)  # of each group
        return dataclasses.replace(batch, P=groups * pieces // num, G=batch.G // pieces)


def make_job(config: Config, shape: str, prompt_tokens: int, num_devices: int) -> Job:
    """Make the job that a config describes, without its task and without reading weights.

    Args:
      config: of the run.
      shape: a name of SHAPES; empty: the config's own model.
      prompt_tokens: S; 0: task.max_prompt_tokens.
      num_devices: of the machine; a mesh axis of -1 takes what the others leave.
    Raises: UserError if the shape is unknown or the mesh needs more devices.
    """
    mesh = mesh_of(axis_sizes(config.mesh.sizes, num_devices))
    model = build.make_model(dataclasses.replace(config, model=drop_path(config.model, shape)), tokenizer_of(config))
    if shape:
        model = dataclasses.replace(model, arch=SHAPES[shape])
    return Job(config, model, mesh, prompt_tokens or config.task.max_prompt_tokens)


def drop_path(model: ModelConfig, shape: str) -> ModelConfig:
    """Return the model's settings; with a shape of ours nothing is read from a folder. Raises UserError."""
    if not shape:
        return model
    if shape not in SHAPES:
        raise UserError(f"--shape={shape}: unknown; known: {', '.join(SHAPES)}")
    return dataclasses.replace(model, path="")


def mesh_of(wanted: Mapping[str, int]) -> Any:
    """Make a mesh without devices. wanted: devices along each of AXES; an axis that is not named has one."""
    # `Auto` as in `sharding.make_mesh`: the programs that are traced for it are the same.
    return AbstractMesh(tuple(wanted.get(axis, 1) for axis in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def require_allowed(job: Job) -> None:
    """Check that decoder and batch can be sharded as the mesh asks. Raises UserError."""
    check_divisible(job.model.arch.sharded_sizes, job.mesh)
    check_batch_divisible(job.config, job.mesh)
    check_context(job.config, job.mesh, job.model)


def allowed_meshes(job: Job) -> list[Job]:
    """List the same job on every allowed mesh of as many devices. Raises UserError if there is none."""
    num, found = job.mesh.size, []
    for tensor, context, expert, fsdp in itertools.product(divisors(num), repeat=4):
        data, rest = divmod(num, tensor * context * expert * fsdp)
        if rest:
            continue
        sizes = {"data": data, "fsdp": fsdp, "expert": expert, "context": context, "tensor": tensor}
        # The checks of a real run decide, so that a sweep never recommends a mesh that the run would refuse.
        other = dataclasses.replace(job, mesh=mesh_of(sizes))
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
