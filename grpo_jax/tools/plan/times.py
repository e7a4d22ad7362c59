"""Seconds of an iteration at the least: arithmetic, memory and links at their peak rates; and the bytes that devices send."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from flax.traverse_util import flatten_dict

from grpo_jax.parallel.sharding import param_spec
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
    model, batch, live, learner = job.local_model, job.local_batch, job.live_batch, job.config.learner
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
            passes(job) * everything / chip.flops_per_s,
            steps * (touched + microbatches * (6 * weights + 2 * saved)) / chip.hbm_bytes_per_s,
            sent[UPDATE],
        ),
    ]


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
    return [each for each in (*row_traffic(job), *tensor_traffic(job)) if each.num_bytes]


def row_traffic(job: Job) -> list[Sent]:
    """List what goes over `data` and `fsdp`: weights gathered by the devices that compute with them, gradients summed."""
    data, fsdp, _ = job.mesh.shape.values()
    learner, item = job.config.learner, job.itemsize
    steps, microbatches = learner.num_epochs * learner.num_minibatches, learner.microbatches
    state = state_like(job)
    layers, tables, _ = sharded_numbers(job, state.policy)
    # With adapters all weights are gathered, but only the adapters have a gradient.
    grad_layers, grad_tables, full = sharded_numbers(job, state.params)
    share = (fsdp - 1) / fsdp
    # A layer is gathered forward and backward; a table once, what it gives is kept.
    gathers = microbatches * (steps * (2 * layers + tables) + num_scored(job) * (layers + tables))
    scatters = microbatches * steps * (grad_layers + grad_tables)
    # A gradient of a sharded weight is scattered over fsdp first, so that data sums shards only: that is why data's share does
    # not grow with the model's devices. What is not sharded is summed over both axes at once.
    shards = (grad_layers + grad_tables) / fsdp
    n = data * fsdp
    outer = "fsdp"
    if data > 1:
        outer = "data"  # the sum crosses it, and it is the slower one
    return [
        Sent(
            ROLLOUT,
            "fsdp",
            "weights gathered once",
            f"{layers + tables:,.0f} x {item} B x {share:g}",
            (layers + tables) * item * share,
        ),
        Sent(UPDATE, "fsdp", "weights gathered", f"{gathers:,.0f} x {item} B x {share:g}", gathers * item * share),
        Sent(UPDATE, "fsdp", "gradients scattered", f"{scatters:,.0f} x {F32} B x {share:g}", scatters * F32 * share),
        Sent(
            UPDATE,
            "data",
            "gradients of parts summed",
            f"{steps} x 2 x {shards:,.0f} x {F32} B x {(data - 1) / data:g}",
            steps * 2 * shards * F32 * (data - 1) / data,
        ),
        Sent(
            UPDATE,
            outer,
            "gradients of whole weights summed",
            f"{steps} x 2 x {full:,.0f} x {F32} B x {(n - 1) / n:g}",
            steps * 2 * full * F32 * (n - 1) / n,
        ),
    ]


def sharded_numbers(job: Job, params: Params) -> tuple[float, float, float]:
    """Count the numbers of one device of `tensor`: (of layers, of tables sharded along fsdp, of all that is not sharded).

    params: sharded shapes, as `state_like` has them.
    """
    layers = tables = full = 0.0
    leaves: dict[Any, Any] = flatten_dict(params)
    for path, leaf in leaves.items():
        spec = param_spec(path, leaf.shape, job.mesh, job.config.mesh.fsdp_min_elements)
        numbers = numbers_here(leaf)
        if "fsdp" not in spec:
            full += numbers
        elif "layers" in path:
            layers += numbers * job.mesh.shape["fsdp"]
        else:
            tables += numbers * job.mesh.shape["fsdp"]
    return layers, tables, full


def tensor_traffic(job: Job) -> list[Sent]:
    """List the sums of a layer's activations over `tensor`, which the compiler adds. Embedding's and head's are left out.

    So is what a gated delta net's joined queries, keys and values take to come to their heads' devices.
    """
    tensor, batch, item = job.mesh.shape["tensor"], job.local_batch, job.itemsize
    repeats = job.model.arch.num_layers // job.model.arch.period  # where kinds of layers alternate, of all of them together
    if tensor == 1:
        return []
    learner, ring = job.config.learner, 2 * (tensor - 1) / tensor
    tokens = batch.P * batch.S + batch.P * batch.G * (batch.T - 1)
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
            f"{num} x {repeats} layers x {tokens:g} tokens x {width} x {item} B x {ring:g}",
            num * repeats * tokens * width * item * ring,
        )
        for phase, sums in ((ROLLOUT, forward), (UPDATE, updates))
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
