"""Microbatches and remat that the memory of an accelerator holds: what 0 and "auto" mean there.

A count of an update's largest arrays from their shapes, before anything is compiled. It is an estimate;
experiments/studies/aot holds it against what the chips' own compilers allocate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from grpo_jax.config import Config
from grpo_jax.learner.logprobs import Chunks
from grpo_jax.models.transformer import MAX_UNROLLED, ModelDef
from grpo_jax.parallel import hosts
from grpo_jax.parallel.sharding import num_row_shards, specs_of
from grpo_jax.rollout.rollout import sampling_of
from grpo_jax.types import TrainState

GB = 1e9
F32 = 4  # bytes
FREE = 0.1  # of the memory, which the count leaves alone
# Fewer rows than these leave matrix units idle: rather more is computed again.
MIN_TOKENS = 4096
# What each remat computes again, as a share of forward and backward pass: nothing, an MLP's wide products, all of a layer.
AGAIN = {"none": 0.0, "dots": 0.02, "narrow": 0.2, "full": 1 / 3}
# What a microbatch costs beside its tokens, in tokens: a weight's 14 bytes (two readings in bfloat16, its gradient and the sum
# of them in float32), at 240 products for a byte, over a token's six for a weight; with fsdp a little more, by what XLA:TPU
# estimates of Qwen2.5-7B in 2 to 16 microbatches, where most of what travels does so meanwhile.
MICROBATCH_TOKENS, GATHERED_TOKENS = 560, 140


@dataclasses.dataclass(frozen=True)
class Choice:
    """Microbatches of an optimizer step on each device, and a key of `fsdp.REMAT`. num_bytes: of a device, estimated."""

    num_microbatches: int
    remat: str
    num_bytes: float


@dataclasses.dataclass(frozen=True)
class Share:
    """One device's part of the work. groups, group_size: of a minibatch. prompt_tokens, tokens: slots of each row.

    state_bytes: what lies there all the time. trained: numbers here that get gradients. weights: numbers of the whole policy,
    of experts those of one device along `expert`. tensor_size, fsdp_size, expert_size: devices along these axes.
    """

    groups: int
    group_size: int
    prompt_tokens: int
    tokens: int
    state_bytes: float
    trained: float
    weights: float
    tensor_size: int
    fsdp_size: int
    expert_size: int = 1

    def tokens_of(self, num_microbatches: int) -> int:
        """Count the tokens of a microbatch, prompts once a piece of their group (`batching.split_microbatches`)."""
        pieces = max(1, num_microbatches // self.groups)
        prompts = self.groups * pieces // num_microbatches
        return prompts * (self.group_size // pieces * self.tokens + self.prompt_tokens)

    def allowed(self) -> Iterator[int]:
        """Go through the numbers of microbatches that cut groups, or pieces of them, evenly."""
        yield from (num for num in range(1, self.groups + 1) if self.groups % num == 0)
        yield from (self.groups * num for num in range(2, self.group_size + 1) if self.group_size % num == 0)


def fit(config: Config, mesh: Mesh, model: ModelDef, state: TrainState, prompt_tokens: int) -> tuple[Config, ModelDef]:
    """Decide `learner.num_microbatches` = 0 and, beside it, `model.remat` = "auto".

    Args:
      config: of the run. mesh: its devices. model: with the hardware that it is for. state: shapes and shardings.
      prompt_tokens: width of the prompts.
    Returns: the config and the model with what was decided. On CPUs one microbatch, and the remat that the depth suggests.
    """
    asked = config.learner.num_microbatches
    memory = None if model.hardware is None else model.hardware.memory_bytes
    if asked and (model.remat != "auto" or memory is None):
        return config, model
    if memory is None:
        return with_microbatches(config, 1), model
    # Devices of one kind may say a little less or more, and all processes must compile the same program.
    memory = float(hosts.broadcast_from_process0(np.float64(memory)))
    share = share_of(config, mesh, model, state, prompt_tokens)
    choice = choose(config, model, share, memory)
    hosts.say(
        f"config.learner.num_microbatches = {choice.num_microbatches}, config.model.remat = {choice.remat!r}, for an update of "
        f"about {choice.num_bytes / GB:.1f} of {memory / GB:.1f} GB a device, by an estimate; set either to change it"
    )
    return with_microbatches(config, choice.num_microbatches), dataclasses.replace(model, remat=choice.remat)


def share_of(config: Config, mesh: Mesh, model: ModelDef, state: TrainState, prompt_tokens: int) -> Share:
    """Return the part of one device; arguments as in `fit`."""
    learner, rollout = config.learner, config.rollout
    return Share(
        groups=rollout.num_prompts // learner.num_minibatches // num_row_shards(mesh),
        group_size=rollout.group_size,
        prompt_tokens=prompt_tokens,
        tokens=rollout.max_completion_tokens // mesh.shape["context"],
        state_bytes=_local_bytes(state),
        trained=_local_numbers(state.params),
        weights=num_weights(model, mesh),
        tensor_size=mesh.shape["tensor"],
        fsdp_size=mesh.shape["fsdp"],
        expert_size=mesh.shape["expert"],
    )


def with_microbatches(config: Config, num: int) -> Config:
    """Return the config with so many microbatches."""
    return dataclasses.replace(config, learner=dataclasses.replace(config.learner, num_microbatches=num))


def choose(config: Config, model: ModelDef, share: Share, memory_bytes: float) -> Choice:
    """Return the first of `choices`."""
    return choices(config, model, share, memory_bytes)[0]


def choices(config: Config, model: ModelDef, share: Share, memory_bytes: float) -> list[Choice]:
    """List what may be chosen: first what the memory holds, the cheapest first, which computes little again in few pieces.

    Args:
      config: what is given there stays. model: its shape, precision and remat count. share: of a device.
      memory_bytes: of a device.
    Returns: the choices; behind them those that are too large, the smallest first.
    """
    given = config.learner.num_microbatches
    remats = (model.remat,) if model.remat != "auto" else _remats(model)
    found = [
        Choice(num, remat, update_bytes(config, model, share, num, remat))
        for remat in remats
        for num in ((given,) if given else share.allowed())
    ]
    each_tokens = MICROBATCH_TOKENS + (share.fsdp_size > 1) * GATHERED_TOKENS

    def order(choice: Choice) -> tuple[bool, bool, float]:
        if choice.num_bytes > (1 - FREE) * memory_bytes:
            return True, True, choice.num_bytes
        cost = share.tokens_of(1) * (1 + AGAIN[choice.remat]) + choice.num_microbatches * each_tokens
        return False, share.tokens_of(choice.num_microbatches) < MIN_TOKENS, cost

    return sorted(found, key=order)


def _remats(model: ModelDef) -> tuple[str, ...]:
    if model.arch.num_layers <= MAX_UNROLLED:
        return ("none", "dots", "narrow", "full")
    return ("dots", "narrow", "full")


def update_bytes(config: Config, model: ModelDef, share: Share, num_microbatches: int, remat: str) -> float:
    """Estimate the bytes of a device during an update: state, gradients, what a microbatch keeps, a layer, the head.

    Args:
      config: the head's chunk and the distribution count. model: its shape and precision. share: of a device.
      num_microbatches: of an optimizer step. remat: a key of `fsdp.REMAT`.
    """
    arch, tensor, item = model.arch, share.tensor_size, jax.numpy.dtype(model.dtype).itemsize
    D, L, V = arch.dim, arch.num_layers, arch.vocab_size
    heads = arch.num_heads * arch.head_dim / tensor
    pairs = 2 * arch.num_kv_heads * arch.head_dim / tensor
    wide = 2 * arch.ffn_dim * max(1, arch.experts_per_token) / tensor
    tokens = share.tokens_of(num_microbatches)
    # Numbers of a token and a layer: what enters, what attention's and the MLP's last product give, queries, keys and values,
    # and the heads' outputs; then the MLP's wide products, and with nothing computed again norms and activations too.
    # In `grad_sums.scan_layers` XLA:TPU spreads the residual stream's channels over tensor; in JAX's scan, of adapters, not.
    is_spread = model.adds_gradients_in_place and model.hardware is not None and model.hardware.platform == "tpu"
    kept_D = D / tensor if is_spread else D
    narrow = 3 * kept_D + 2 * heads + pairs
    kept = {"full": kept_D, "narrow": narrow, "dots": narrow + wide, "none": narrow + 2 * wide + 4 * D}[remat]
    layer = 0 if remat == "none" else 6 * D + 3 * heads + 2 * wide
    chunks = Chunks.of(model, config.learner.logprob_chunk_tokens, tokens, sampling_of(config.rollout))
    logits, head = 2 * F32 * chunks.tokens * V / tensor, V * D / tensor * F32
    if chunks.vocab:  # parts of it, all positions at once; under fsdp no more of it is gathered
        part = chunks.vocab * D * (item + F32) if share.fsdp_size > 1 else V * D / tensor * item
        logits, head = 2 * F32 * tokens * chunks.vocab, part
    head += tokens * D * (F32 + item)
    weights, tables = share.weights / tensor, (1 + (not arch.tie_embeddings)) * V * D / tensor
    # The sum of those so far, and a microbatch's: all of it, or only the head's where that is gathered.
    again = (share.fsdp_size > 1 and not chunks.vocab) * V * D / tensor / share.fsdp_size
    if not model.adds_gradients_in_place:
        again = share.trained
    gradients = F32 * (share.trained + (num_microbatches > 1) * again)
    copies = item * weights
    if share.fsdp_size > 1:  # a layer at a time, and the head with its float32 gradient
        copies = (item + F32) * ((not chunks.vocab) * V * D / tensor + (weights - tables) / L)
    exchanged = (share.expert_size > 1) * 2 * share.expert_size * D  # all devices' tokens of a layer, and the answers
    return share.state_bytes + gradients + copies + item * tokens * (L * kept + layer + exchanged) + logits + head


def num_weights(model: ModelDef, mesh: Mesh) -> float:
    """Count the policy's numbers, of experts those of one device along `expert`."""
    shapes = model.param_shapes()
    specs = jax.tree.leaves(specs_of(shapes, mesh, 0), is_leaf=lambda x: isinstance(x, PartitionSpec))
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(shapes)]
    return sum(size / mesh.shape["expert"] ** ("expert" in spec) for size, spec in zip(sizes, specs, strict=True))


def _local_bytes(tree: TrainState) -> float:
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != "pinned_host"]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _local_numbers(tree: object) -> float:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
