"""Seconds of an iteration at the least: arithmetic, memory and links at their peak rates; and the bytes that devices send."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec

from grpo_jax.parallel.sharding import ROW_AXES, param_spec
from grpo_jax.tools.plan.chips import Chip, axis_rate
from grpo_jax.tools.plan.job import Job
from grpo_jax.tools.plan.memory import (
    F32,
    ROLLOUT,
    UPDATE,
    local_bytes,
    num_bytes,
    numbers_here,
    saved_for_backward,
    state_like,
)
from grpo_jax.tools.roofline import Sizes, decode_bytes, forward_flops, layer_matrices, per_token
from grpo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that a device sends along one mesh axis in an iteration. how: their arithmetic."""

    phase: str
    axis: str
    what: str
    how: str
    num_bytes: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """Seconds of one stage on each of the three rooflines."""

    phase: str
    what: str
    compute: float
    memory: float
    links: float

    @property
    def secs(self) -> float:
        """Seconds of the stage: arithmetic hides behind memory traffic or the other way round; nothing hides the links."""
        return max(self.compute, self.memory) + self.links

    @property
    def bound(self) -> str:
        """The one of the three that takes longest."""
        return max(("compute", "memory", "links"), key=lambda name: getattr(self, name))


def stages_of(job: Job, chip: Chip) -> list[Stage]:
    """List the stages of an iteration, all completions as long as the budget."""
    model, batch, live, learner = job.local_model, job.sampled_batch, job.live_batch, job.config.learner
    # Where fewer rows are live than there are completions, the loop runs as often as it takes to decode them all: each turn
    # reads the weights again, and that is the price of the smaller caches.
    turns = batch.P * batch.G / (live.P * live.G)
    weights = per_token(model).weights_read(batch.P * batch.S) * job.itemsize
    prompts = forward_flops(model, Sizes(batch.P, 0, batch.S, 1))  # no completions, so no head
    everything = forward_flops(model, batch)
    sent = {
        phase: sum(each.num_bytes / axis_rate(chip, job.mesh, each.axis) for each in sent_by(job) if each.phase == phase)
        for phase in (ROLLOUT, UPDATE)
    }
    saved = sum(map(num_bytes, saved_for_backward(job, job.model.remat)))
    state = state_like(job)
    steps, microbatches = learner.num_epochs * learner.num_minibatches, learner.microbatches
    # The optimizer reads and writes parameters and its state, and reads the gradient, once a step. A microbatch touches the
    # weights six times and writes and reads what is saved for its backward pass.
    touched = 2 * (local_bytes(state.params) + local_bytes(state.opt_state)) + local_bytes(state.params)
    return [
        Stage(ROLLOUT, "prompts", prompts / chip.flops_per_s, weights / chip.hbm_bytes_per_s, 0),
        Stage(
            ROLLOUT,
            f"{turns * (batch.T - 1):g} tokens",
            (everything - prompts) / chip.flops_per_s,
            turns * decode_bytes(model, live, job.itemsize) / chip.hbm_bytes_per_s,
            sent[ROLLOUT],
        ),
        Stage(
            UPDATE,
            f"{steps} optimizer steps of {microbatches} microbatches",
            passes(job) * forward_of_update(job) / chip.flops_per_s,
            steps * (touched + microbatches * (6 * weights + 2 * saved)) / chip.hbm_bytes_per_s,
            sent[UPDATE],
        ),
    ]


def forward_of_update(job: Job) -> float:
    """Count the arithmetic of running a device's batch of the update forward once."""
    parts = job.mesh.shape["context"]
    batch = job.local_batch
    # Devices of `context` run the prompts each for itself, and an equal part of the completions' attention, not of short ones.
    prompts = forward_flops(job.local_model, Sizes(batch.P, 0, batch.S, 1))
    return prompts + (forward_flops(job.local_model, dataclasses.replace(batch, T=batch.T * parts)) - prompts) / parts


def passes(job: Job) -> float:
    """Count an update's arithmetic in forward passes: forward, by activations, by weights; what is computed again."""
    # Frozen weights need no gradient, which saves the third; that of the adapters is small beside it.
    each = 3 - (job.model.lora is not None) + (job.model.remat == "full")
    return each * job.config.learner.num_epochs + num_scored(job)


def num_scored(job: Job) -> int:
    """Count the forward passes before the update: of the reference policy, of the learner itself."""
    return int(job.config.objective.needs_reference) + (job.config.learner.old_logp == "learner")


def iteration_secs(stages: list[Stage]) -> float:
    return sum(stage.secs for stage in stages)


def sent_by(job: Job) -> list[Sent]:
    """List all traffic of an iteration, as it follows from the layout, without metrics, log-probabilities and token ids."""
    traffic = *row_traffic(job), *expert_traffic(job), *context_traffic(job), *tensor_traffic(job)
    return [each for each in traffic if each.num_bytes]


def row_traffic(job: Job) -> list[Sent]:
    """List what weights make: over `fsdp` they are gathered by the devices that compute with them; gradients are summed."""
    learner, item, fsdp = job.config.learner, job.itemsize, job.mesh.shape["fsdp"]
    steps, microbatches = learner.num_epochs * learner.num_minibatches, learner.microbatches
    state = state_like(job)
    layers, tables = gathered_numbers(job, state.policy)
    # Of the embedding an update fetches the tokens' rows (`fsdp.look_up`), and sends their gradient back.
    looked_up = gathered_numbers(job, {"embed": state.policy["embed"]})[1]
    rows = num_tokens(job.local_batch) * job.model.arch.dim * (looked_up > 0) * (2 * steps + num_scored(job))
    # With adapters all weights are gathered, but only the adapters have a gradient.
    head = tables - looked_up * (not job.model.arch.tie_embeddings)
    grad_layers, grad_tables = gathered_numbers(job, state.params)
    if grad_tables and not job.model.arch.tie_embeddings:
        grad_tables -= looked_up
    share = (fsdp - 1) / fsdp
    # A layer is gathered forward and backward, and so is the head by parts; whole it is gathered once and kept.
    readings = 1 + job.chunks.is_by_vocab(job.model.tiles)
    gathers = microbatches * (steps * (2 * layers + readings * head) + num_scored(job) * (layers + head))
    scatters = microbatches * steps * (grad_layers + grad_tables)
    return [
        Sent(
            ROLLOUT,
            "fsdp",
            "weights gathered once",
            f"{layers + tables:,.0f} x {item} B x {share:g}",
            (layers + tables) * item * share,
        ),
        Sent(UPDATE, "fsdp", "weights gathered", f"{gathers:,.0f} x {item} B x {share:g}", gathers * item * share),
        Sent(UPDATE, "fsdp", "rows of the embedding", f"{rows:,.0f} x {item} B x {share:g}", rows * item * share),
        Sent(UPDATE, "fsdp", "gradients scattered", f"{scatters:,.0f} x {F32} B x {share:g}", scatters * F32 * share),
        *(gradient_sum(job, axes, numbers, steps) for axes, numbers in summed_numbers(job, state.params).items()),
    ]


def gradient_sum(job: Job, axes: tuple[str, ...], numbers: float, steps: int) -> Sent:
    """Return the sum of a device's gradients over the axes that their weights are replicated over.

    A gradient of a sharded weight is scattered over fsdp first, so that the other axes sum shards only: that is why data's
    share does not grow with the model's devices.
    """
    n = math.prod(job.mesh.shape[axis] for axis in axes)
    crossed = [axis for axis in axes if job.mesh.shape[axis] > 1]
    what = "gradients of whole weights summed" if "fsdp" in axes else "gradients of parts summed"
    how = f"{steps} x 2 x {numbers:,.0f} x {F32} B x {(n - 1) / n:g}"
    # The first of them is the slowest.
    return Sent(UPDATE, (*crossed, "data")[0], what, how, steps * 2 * numbers * F32 * (n - 1) / n)


def gathered_numbers(job: Job, params: Params) -> tuple[float, float]:
    """Count the numbers that a device has once fsdp has gathered them: (of layers, of tables), of what fsdp shards.

    params: sharded shapes, as `state_like` has them.
    """
    layers = tables = 0.0
    for path, leaf, spec in _leaves(job, params):
        if "fsdp" in spec:
            numbers = numbers_here(leaf) * job.mesh.shape["fsdp"]
            layers, tables = layers + numbers * ("layers" in path), tables + numbers * ("layers" not in path)
    return layers, tables


def summed_numbers(job: Job, params: Params) -> dict[tuple[str, ...], float]:
    """Count {axes of rows and tokens that weights are replicated over: numbers of them that a device has}.

    params: as in `gathered_numbers`.
    """
    found: dict[tuple[str, ...], float] = collections.defaultdict(float)
    for _, leaf, spec in _leaves(job, params):
        found[tuple(axis for axis in (*ROW_AXES, "context") if axis not in spec)] += numbers_here(leaf)
    return found


def _leaves(job: Job, params: Params) -> Iterator[tuple[tuple[str, ...], Any, PartitionSpec]]:
    leaves: dict[Any, Any] = flatten_dict(params)
    for path, leaf in leaves.items():
        yield path, leaf, param_spec(path, leaf.shape, job.mesh, job.config.mesh.fsdp_min_elements)


def expert_traffic(job: Job) -> list[Sent]:
    """List the tokens that visit other devices' experts: each is gathered, and the answers to it are summed where it was."""
    expert, arch, learner = job.mesh.shape["expert"], job.model.arch, job.config.learner
    # A token in the compute dtype, and of each of its experts number and weight; the answer is a token again.
    there, back = arch.dim * job.itemsize + arch.experts_per_token * 2 * F32, arch.dim * job.itemsize
    # Backwards the same the other way round; layers that are computed again gather again, their answers are not asked for.
    again = job.model.remat_policy != "none"
    update = learner.num_epochs * ((2 + again) * there + 2 * back) + num_scored(job) * (there + back)
    tokens = num_tokens(job.local_batch)
    return [
        Sent(
            phase,
            "expert",
            "tokens to experts and back",
            f"{arch.num_layers} layers x {tokens:g} tokens x {width:,} B x {expert - 1}",
            arch.num_layers * tokens * width * (expert - 1),
        )
        for phase, width in ((ROLLOUT, there + back), (UPDATE, update))
    ]


def context_traffic(job: Job) -> list[Sent]:
    """List the keys and values that go round the devices of `context`, and the float32 gradients that come round with them."""
    num, arch, item, learner = job.mesh.shape["context"], job.model.arch, job.itemsize, job.config.learner
    if num == 1:
        return []
    batch = job.local_batch
    numbers = batch.P * batch.G * batch.T * 2 * arch.num_kv_heads * arch.head_dim / job.mesh.shape["tensor"]
    # Round once forward, and once more backward with their gradients. With remat "full" a layer's attention is computed again.
    forward = learner.num_epochs * (1 + (job.model.remat == "full")) + num_scored(job)
    # The last hop of keys and values serves nobody; of two devices it is the second one, which the compiler leaves out.
    hops = num - (num == 2)
    each = (forward + learner.num_epochs) * hops * item + learner.num_epochs * num * F32
    L = arch.num_attention_layers
    how = f"{L} layers x {numbers:,.0f} x {each:g} B"
    return [Sent(UPDATE, "context", "keys and values round the ring", how, L * numbers * each)]


def num_tokens(batch: Sizes) -> float:
    """Count the tokens that a device's rows run through the layers, a prompt's once."""
    return batch.P * batch.S + batch.P * batch.G * (batch.T - 1)


def tensor_traffic(job: Job) -> list[Sent]:
    """List the sums of a layer's activations over `tensor`, which the compiler adds. Embedding's and head's are left out.

    So is what a gated delta net's joined queries, keys and values take to come to their heads' devices.
    """
    tensor, item = job.mesh.shape["tensor"], job.itemsize
    repeats = job.model.arch.num_layers // job.model.arch.period  # where kinds of layers alternate, of all of them together
    if tensor == 1:
        return []
    learner, ring = job.config.learner, 2 * (tensor - 1) / tensor
    forward, backward = summed_widths(job)
    num_forward = learner.num_epochs + num_scored(job)
    if job.model.remat == "full":
        num_forward += learner.num_epochs  # a layer that is computed again sums again
    updates = collections.Counter({width: num_forward * num for width, num in forward.items()})
    updates.update({width: learner.num_epochs * num for width, num in backward.items()})
    return [
        Sent(
            phase,
            "tensor",
            "activations summed",
            f"{num} x {repeats} layers x {num_tokens(batch):g} tokens x {width} x {item} B x {ring:g}",
            num * repeats * num_tokens(batch) * width * item * ring,
        )
        for phase, sums, batch in ((ROLLOUT, forward, job.sampled_batch), (UPDATE, updates, job.local_batch))
        for width, num in sums.items()
    ]


def summed_widths(job: Job) -> tuple[collections.Counter[int], collections.Counter[int]]:
    """Count {width of an activation: such activations of a layer that are summed over `tensor`}, forward and backward.

    A product with a matrix that is sharded along what it takes gives each device a part of the sum; going backward the same
    holds for a matrix that is sharded along what it gives. So the table of shardings decides, and a new matrix is counted.
    """
    forward: collections.Counter[int] = collections.Counter()
    backward: collections.Counter[int] = collections.Counter()
    for path, leaf in layer_matrices(job.model.param_shapes()).items():
        if path[-2] == "conv":  # no sum over channels
            continue
        spec = (*param_spec(path, leaf.shape, job.mesh, job.config.mesh.fsdp_min_elements), *[None] * leaf.ndim)[: leaf.ndim]
        *stack, num_out, num_in = leaf.shape
        of_out, of_in, copies = *spec[-2:], 1
        if len(stack) > 1:  # a token is a row of each of its experts
            copies = job.model.arch.experts_per_token
            if path[-1] == "weight":  # [E, in, out]
                num_out, num_in, of_out, of_in = num_in, num_out, of_in, of_out
        if of_in == "tensor":
            forward[num_out] += copies
        if of_out == "tensor":
            backward[num_in] += copies
    return forward, backward
