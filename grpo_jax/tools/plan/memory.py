"""Bytes that each device holds: in the state from shapes and shardings, in update and rollout from the traced functions.

JAX's own differentiation says which arrays an update keeps for its backward pass, on shapes alone. What XLA adds to it
(copies, working memory) or saves (fusion) is not modelled; `--compile` shows it.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from grpo_jax.learner.hyperparams import hyperparams_of
from grpo_jax.learner.logprobs import policy_logprobs
from grpo_jax.models.attention import KVCache
from grpo_jax.models.block import Kept
from grpo_jax.models.gated_delta import DeltaState
from grpo_jax.models.linear import head_logits
from grpo_jax.models.lora import split_adapters
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import with_shardings
from grpo_jax.rollout.decoding import DecodeContext, EndTokens, cache_sizes
from grpo_jax.rollout.rollout import sampling_of
from grpo_jax.rollout.sampling import GREEDY, Sampling
from grpo_jax.tools.plan.chips import Chip
from grpo_jax.tools.plan.job import Job, mesh_of
from grpo_jax.tools.roofline import Sizes, per_token
from grpo_jax.training import run
from grpo_jax.training.fit import choices, fit, share_of, with_microbatches
from grpo_jax.types import Prompts, Rollout, TrainState, join_params

F32 = 4  # bytes
STATE, UPDATE, ROLLOUT = "state", "update", "rollout"


@dataclasses.dataclass(frozen=True)
class Part:
    """One line of the sum. phase: "state" is held all the time, the others come on top in turn. how: its arithmetic."""

    phase: str
    what: str
    how: str
    num_bytes: float


def parts_of(job: Job) -> list[Part]:
    """List every part of a device's memory, as the arithmetic of its bytes."""
    return [part for part in (*state_parts(job), *update_parts(job), *rollout_parts(job)) if part.num_bytes]


def fitted(job: Job, chip: Chip) -> Job:
    """Return the job with the microbatches and the remat that a run on these chips would choose (`training.fit`)."""
    job = dataclasses.replace(job, chips=Hardware(chip.platform, memory_bytes=chip.hbm_bytes))
    config, model = fit(job.config, job.mesh, job.model_on_chips, state_like(job), job.prompt_tokens)
    return dataclasses.replace(job, config=config, model=dataclasses.replace(job.model, remat=model.remat))


def fitted_ways(job: Job, chip: Chip, num: int) -> list[Job]:
    """Return the job with each of the `num` best microbatches and remats, as a run on these chips ranks them."""
    job = dataclasses.replace(job, chips=Hardware(chip.platform, memory_bytes=chip.hbm_bytes))
    share = share_of(job.config, job.mesh, job.model_on_chips, state_like(job), job.prompt_tokens)
    return [
        dataclasses.replace(
            job,
            config=with_microbatches(job.config, each.num_microbatches),
            model=dataclasses.replace(job.model, remat=each.remat),
        )
        for each in choices(job.config, job.model_on_chips, share, chip.hbm_bytes)[:num]
    ]


def phase_bytes(parts: list[Part], phase: str) -> float:
    return sum(part.num_bytes for part in parts if part.phase == phase)


def peak_bytes(parts: list[Part]) -> float:
    """Add the larger of the two phases to the state."""
    # Rollout and update take turns within an iteration, and neither leaves anything to the other but the batch.
    return phase_bytes(parts, STATE) + max(phase_bytes(parts, UPDATE), phase_bytes(parts, ROLLOUT))


# ------------------------------------------------------------------------------------------------------------- the state


def state_like(job: Job) -> TrainState:
    """Return the shapes and shardings of the state, as `run.assemble` has them."""
    # Shapes do not depend on the mesh. Asking for them on a mesh of one lets a sweep over meshes trace them only once.
    alone = dataclasses.replace(job, mesh=mesh_of({}))
    return run.abstract_state_of(job.config, job.mesh, state_shapes(alone))


@functools.lru_cache(maxsize=1)
def state_shapes(job: Job) -> TrainState:
    base, adapters = split_adapters(job.model.param_shapes())
    if adapters:
        base = in_compute_dtype(base, job.model)  # as frozen weights are loaded
    hyperparams = jax.eval_shape(functools.partial(hyperparams_of, job.config))
    fns = run.TrainFns(job.config, job.mesh, job.task, job.model)
    return jax.eval_shape(fns.init, base, adapters or None, hyperparams)


def state_parts(job: Job) -> list[Part]:
    """Count what is there from step to step. Exact."""
    state = state_like(job)
    sampling = None
    if job.config.async_steps:
        # The update donates its state, while the rollout beside it still reads the policy: that needs a copy of its own.
        sampling = state.policy
    return [
        state_part("parameters", state.params),
        state_part("frozen weights under adapters", state.base),
        state_part("optimizer state", state.opt_state),
        state_part("reference policy", (state.ref_params, state.moving_ref)),
        state_part("groups waiting (dynamic sampling)", state.pending),
        state_part("batches sampled ahead (async_steps)", (state.next_batch, state.later_batches)),
        state_part("the weights that sample it", sampling),
    ]


def state_part(what: str, tree: Any) -> Part:
    """Count the bytes of a tree of sharded shapes on one device; what waits on the host is left out."""
    leaves = [x for x in jax.tree.leaves(tree) if not is_on_host(x)]
    total = sum(x.size for x in leaves)
    here = sum(map(numbers_here, leaves))
    dtypes = " and ".join(sorted({str(x.dtype) for x in leaves}))
    return Part(STATE, what, f"{here:,} of {total:,} numbers, {dtypes}", local_bytes(leaves))


def is_on_host(x: Any) -> bool:
    """True for a sharded shape that `optimizer.offload` keeps in the host's memory."""
    return x.sharding.memory_kind == "pinned_host"


def local_bytes(tree: Any) -> float:
    return sum(numbers_here(x) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def numbers_here(x: Any) -> int:
    """Count the numbers of a sharded shape that one device holds."""
    return math.prod(x.sharding.shard_shape(x.shape))


# ------------------------------------------------------------------------------------------------------------ the update


def update_parts(job: Job) -> list[Part]:
    """Count what comes on top of the state while one microbatch is differentiated.

    With microbatches a gradient waits for the next one to be added. When the backward pass has ended the optimizer holds the
    gradient and its update of every weight, and its state if that waits on the host.
    """
    # The backward pass and the optimizer's turn do not overlap: of the latter only what exceeds the former counts. The same
    # holds for the head, whose chunk of logits and gradient exist before the gradients of the layers do.
    sizes = job.local_microbatch
    kept = saved_for_backward(job, job.model.remat)
    saved = sum(map(num_bytes, kept))
    offloaded = local_bytes([x for x in jax.tree.leaves(state_like(job).opt_state) if is_on_host(x)])
    params = state_like(job).params
    gradient = local_bytes(params)
    # A microbatch's own gradients, beside the sum of those so far: all of them, or only the head's, where that is gathered.
    again = gradient if job.config.learner.microbatches > 1 else 0.0
    if again and job.model_on_chips.adds_gradients_in_place:
        is_gathered = job.mesh.shape["fsdp"] > 1 and not job.chunks.vocab
        again = is_gathered * local_bytes(params.get("head", params["embed"]))
    # Logits of a chunk and their cotangent, and the head's gradient, which the chunks add up in float32.
    num_tokens = int(sizes.P * sizes.G * sizes.T)
    chunks = job.chunks
    chunk = min(chunks.tokens, num_tokens)
    V, D = per_token(job.local_model).head_shape
    head, how_head = F32 * V * (2 * chunk + D), f"{F32} B x {V:,} x (2 x {chunk} + {D})"
    if chunks.vocab:  # parts of the vocabulary, all positions at once, whose states have a gradient in float32
        head = F32 * num_tokens * (2 * chunks.vocab + D)
        how_head = f"{F32} B x {num_tokens} x (2 x {chunks.vocab} + {D})"
    rows, slots = job.local_batch.P * job.local_batch.G, job.config.rollout.max_completion_tokens
    choices = job.model.arch.num_layers * job.model.arch.experts_per_token
    width = 1 + (job.model.arch.num_experts > 256)
    # About ten arrays [rows, T] of 4 bytes: tokens, masks, log-probabilities, entropies, advantages and weights.
    return [
        Part(UPDATE, "batch and targets", f"10 x {rows:g} rows x {slots} tokens x {F32} B", 10 * rows * slots * F32),
        Part(
            UPDATE,
            "experts as sampled",
            f"{rows:g} rows x {sizes.T:g} tokens x {choices} x {width} B",
            rows * sizes.T * choices * width,
        ),
        Part(UPDATE, "saved for the backward pass", describe_residuals(kept, sizes), saved),
        recomputed_part(job),
        Part(UPDATE, "gradients", f"{gradient:,.0f} + {again:,.0f} B", gradient + again),
        Part(
            UPDATE,
            "logits of a chunk, beyond a gradient",
            f"{how_head} - {gradient:,.0f} B",
            max(0.0, head - gradient),
        ),
        Part(
            UPDATE,
            "the optimizer's turn, beyond the backward pass",
            f"2 x {gradient:,.0f} B + {offloaded:,.0f} B from the host - gradients and saved",
            max(0.0, gradient - again + offloaded - saved),
        ),
        *gather_parts(job),
        exchange_part(job),
    ]


def saved_for_backward(job: Job, remat: str) -> list[Any]:
    """List the shapes that one device's forward pass keeps, beside the weights: the residuals of `jax.vjp`.

    With fsdp, weights arrive in the compute dtype and are gathered again in the backward pass.
    """
    sizes = job.local_microbatch
    model = dataclasses.replace(job.local_model, remat=remat)
    return residuals(
        model, sizes, job.config.learner.logprob_chunk_tokens, job.mesh.shape["fsdp"] > 1, sampling_of(job.config.rollout)
    )


@functools.lru_cache
def residuals(
    model: ModelDef, sizes: Sizes, chunk_tokens: int, is_gathered: bool, sampling: Sampling
) -> list[jax.ShapeDtypeStruct]:
    """Trace `policy_logprobs`, as the loss calls it, and list what its backward pass keeps.

    Args:
      model: the decoder of one device, with the `remat` that is asked about.
      sizes: of the microbatch.
      chunk_tokens: learner.logprob_chunk_tokens.
      is_gathered: by fsdp, which casts the weights before it gathers them.
      sampling: of the config; with top-k or top-p the rollout has one field more.
    Returns: a shape for each array that is no argument.
    """
    base, adapters = split_adapters(model.param_shapes())
    frozen, trained = None, base
    if adapters:
        frozen, trained = in_compute_dtype(base, model), adapters
    if is_gathered:
        # A float32 weight would be cast inside and the cast kept as a residual, though fsdp gathers it again instead.
        trained = in_compute_dtype(trained, model)

    def kept(frozen: Any, trained: Any, rollout: Rollout) -> list[Any]:
        def logp(trained: Any):
            return policy_logprobs(model, join_params(frozen, trained), rollout, sampling, chunk_tokens)[0]

        _, backward = jax.vjp(logp, trained)
        # Residuals that are arguments (weights, tokens) are the same tracers: they are there anyway, and count elsewhere.
        given = {id(x) for x in jax.tree.leaves((frozen, trained, rollout))}
        return [x for x in jax.tree.leaves(backward) if id(x) not in given]

    return jax.eval_shape(kept, frozen, trained, rollout_like(sizes, sampling.is_cut))


def rollout_like(sizes: Sizes, is_cut: bool) -> Rollout:
    """Make the fields of a rollout that `policy_logprobs` reads, as shapes."""
    P, G, S, T = int(sizes.P), sizes.G, int(sizes.S), int(sizes.T)
    tokens_PS, tokens_PGT = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((P, S), (P, G, T)))
    prompts = Prompts(tokens_PS, jax.ShapeDtypeStruct((P, S), bool), None)
    mask_PGT = jax.ShapeDtypeStruct((P, G, T), jnp.float32)
    support_PGT = None
    if is_cut:
        support_PGT = tokens_PGT  # int32 as well
    return Rollout(prompts, tokens_PGT, mask_PGT, None, None, support_PGT, None)


def describe_residuals(kept: list[Any], sizes: Sizes) -> str:
    """Write the number of arrays, their rows, and the shape that takes most of the bytes."""
    counts = collections.Counter((x.shape, x.dtype) for x in kept)
    largest = max(counts, key=lambda each: counts[each] * math.prod(each[0]) * each[1].itemsize)
    shape = ",".join(map(str, largest[0]))
    rows = f"{sizes.P:g} prompts of {sizes.S:g}, {sizes.P * sizes.G:g} rows of {sizes.T:g} tokens"
    return f"{len(kept)} arrays ({rows}), above all {counts[largest]} x {largest[1]}[{shape}]"


def recomputed_part(job: Job) -> Part:
    """Count what one layer keeps, with remat, once it has been computed again."""
    if job.model.remat_policy == "none":
        return Part(UPDATE, "a layer computed again", "", 0)
    arch = job.model.arch
    if arch.period > 1:  # the kind that keeps most decides
        alone = [with_arch(job, num_layers=1, mixers=(kind,)) for kind in sorted(set(arch.mixers))]
        most = max(sum(map(num_bytes, saved_for_backward(each, "none"))) for each in alone)
        return Part(UPDATE, "a layer computed again", f"{most:,.0f} B without remat, of one layer of the largest kind", most)
    # Layers are alike, so one of them keeps its share of a pass without remat. The head's residuals are in the sum too: a
    # little much, on the safe side.
    everything = sum(map(num_bytes, saved_for_backward(job, "none")))
    layers = arch.num_layers
    return Part(UPDATE, "a layer computed again", f"{everything:,.0f} B without remat / {layers} layers", everything / layers)


def with_arch(job: Job, **changes: Any) -> Job:
    """Return the job with fields of the decoder's architecture replaced."""
    arch = dataclasses.replace(job.model.arch, **changes)
    return dataclasses.replace(job, model=dataclasses.replace(job.model, arch=arch))


def exchange_part(job: Job) -> Part:
    """Count the tokens of all devices along `expert`, and what the experts here say to them."""
    expert, sizes = job.mesh.shape["expert"], job.local_microbatch
    tokens, D = sizes.P * (sizes.S + sizes.G * sizes.T), job.model.arch.dim
    how = f"2 x {expert} x {tokens:g} tokens x {D} x {job.itemsize} B"
    return Part(UPDATE, "tokens of a layer, exchanged", how, (expert > 1) * 2 * expert * tokens * D * job.itemsize)


def gather_parts(job: Job) -> list[Part]:
    """Count what fsdp gathers for a while, in the compute dtype, and its gradient in float32."""
    if job.mesh.shape["fsdp"] == 1:
        return []
    # The head is gathered behind the layers, of which one at a time is full. Of the embedding rows are fetched, in the compute
    # dtype, whose gradient goes in float32.
    _, table = layer_and_table_numbers(job)
    each = F32 + job.itemsize
    arch, sizes = job.model.arch, job.local_microbatch
    rows = (sizes.P * (sizes.S + sizes.G * sizes.T)) * arch.dim
    if not arch.tie_embeddings:
        table -= numbers_here(held_weights(job)["embed",])
    layer = max(layer_and_table_numbers(with_arch(job, num_layers=1, mixers=(kind,)))[0] for kind in sorted(set(arch.mixers)))
    if job.chunks.is_by_vocab(job.model.tiles):  # no more of it is full at a time
        table = job.chunks.vocab * arch.dim
    return [
        Part(UPDATE, "head, gathered", f"{table:,} numbers x ({job.itemsize} + {F32}) B", table * each),
        Part(UPDATE, "rows of the embedding, exchanged", f"{rows:,.0f} numbers x ({job.itemsize} + {F32}) B", rows * each),
        Part(UPDATE, "a layer's weights, gathered", f"{layer:,} numbers x ({job.itemsize} + {F32}) B", layer * each),
    ]


def held_weights(job: Job) -> dict[tuple[str, ...], Any]:
    """Return the shapes of the policy's weights on one device once fsdp has gathered them, by path."""
    held = mesh_of({axis: job.mesh.shape[axis] for axis in ("expert", "tensor")})
    return flatten_dict(with_shardings(job.model.param_shapes(), held, 0))


def layer_and_table_numbers(job: Job) -> tuple[int, int]:
    """Count the policy's weights on one device once fsdp has gathered them: (of all layers, of everything else)."""
    leaves = held_weights(job)
    # By path and not by name: a parameter that is new is in one of the two, never in none.
    layers = sum(numbers_here(leaf) for path, leaf in leaves.items() if "layers" in path)
    return layers, sum(map(numbers_here, leaves.values())) - layers


def in_compute_dtype(tree: Any, model: ModelDef) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), tree)


def num_bytes(x: Any) -> float:
    return x.size * x.dtype.itemsize


def tree_bytes(tree: Any) -> float:
    return sum(map(num_bytes, jax.tree.leaves(tree)))


# ----------------------------------------------------------------------------------------------------------- the rollout


@flax.struct.dataclass
class SamplerArrays:
    """Arrays of a rollout, as shapes: the layers one by one, the prompts' cache, and the caches of the live rows' tokens."""

    layers: Any
    prompts: tuple[Kept, ...]
    completions: list[Kept]

    @property
    def prompt_states(self) -> list[DeltaState]:
        """The states of the prompts in gated delta nets."""
        return [each for each in self.prompts if isinstance(each, DeltaState)]

    @property
    def completion_states(self) -> list[DeltaState]:
        """The states of the live rows."""
        return [each for each in self.completions if isinstance(each, DeltaState)]


@functools.lru_cache
def trace_sampler(model: ModelDef, prompts_shape: tuple[int, int], num_rows: int, max_completion_tokens: int) -> SamplerArrays:
    """Trace how `rollout` prepares its decode loop, on shapes: the caches are the decoder's own, whatever they consist of.

    Args:
      model: the decoder of one device, parameters in its compute dtype.
      prompts_shape: (P, S).
      num_rows: completions that are decoded side by side.
      max_completion_tokens: T.
    Returns: shapes with the dtypes that they really have.
    """

    def prepare(params: Any, tokens_PS: Any, keys_B: Any) -> SamplerArrays:
        decoder = model.bind(params)
        hidden_PD, prefix = decoder.encode_prompts(tokens_PS, tokens_PS > 0)
        layers, head_VD = decoder.unstack_layers(), decoder.head_VD
        logits_PV = head_logits(hidden_PD, head_VD, decoder.logit_cap, decoder.tiles)
        ctx = DecodeContext(
            decoder, layers, head_VD, prefix, logits_PV, keys_B, GREEDY, EndTokens((), 0), max_completion_tokens
        )
        # The loop begins with shorter caches and pads them; the last size is the largest.
        num_slots = cache_sizes(max_completion_tokens, model.tiles)[-1]
        return SamplerArrays(layers, prefix.cache, ctx.decoder.empty_caches(num_rows, num_slots))

    params = in_compute_dtype(model.param_shapes(), model)  # `rollout` casts once, not at every token
    tokens_PS = jax.ShapeDtypeStruct(prompts_shape, jnp.int32)
    return jax.eval_shape(prepare, params, tokens_PS, jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num_rows)))


def rollout_parts(job: Job) -> list[Part]:
    """Count what comes on top of the state while completions are sampled."""
    sizes, live, item = job.sampled_batch, job.live_batch, job.itemsize
    rows, slots = int(live.P * live.G), cache_sizes(int(sizes.T))[-1]
    copies = rows * (live != sizes)  # a row that is refilled has its prompt's keys and values for itself
    layers, tables = layer_and_table_numbers(job)
    # fsdp's gather casts before it sends, so what it gives needs no cast of its own. The layers are sliced out of their stack
    # in any case: inside the decode loop the slices would be copied at every token.
    gathered = (layers + tables) * (job.mesh.shape["fsdp"] > 1)
    cast = tables * (item < F32 and not gathered)
    arrays = trace_sampler(job.local_model, (int(sizes.P), int(sizes.S)), rows, int(sizes.T))
    arch = job.local_model.arch
    cached = f"2 x {arch.num_attention_layers} layers x {arch.num_kv_heads} heads x {arch.head_dim} x {item} B"
    prompts, completions = (
        [each for each in kept if isinstance(each, KVCache)] for kept in (arrays.prompts, arrays.completions)
    )
    state = tree_bytes(arrays.prompt_states) / sizes.P
    # Scores of the prompts exist before the loop, logits within it. About three copies of logits: as computed, tempered, and
    # their exponentials; two of scores: as computed and their exponentials.
    V, N = per_token(job.local_model).head_shape[0], arch.num_heads
    return [
        Part(ROLLOUT, "decoding copy, gathered over fsdp", f"{gathered:,} numbers x {item} B", gathered * item),
        Part(ROLLOUT, "decoding copy, layer by layer", f"{layers:,} numbers x {item} B", tree_bytes(arrays.layers)),
        Part(ROLLOUT, "embedding and head, cast", f"{cast:,} numbers x {item} B", cast * item),
        Part(ROLLOUT, "prompts' keys and values", f"{cached} x {sizes.P:g} x {sizes.S:g}", tree_bytes(prompts)),
        Part(
            ROLLOUT,
            "live rows' copies of them",
            f"{cached} x {copies:g} x {sizes.S:g}",
            copies / sizes.P * tree_bytes(prompts),
        ),
        Part(ROLLOUT, "completions' keys and values", f"{cached} x {rows:g} x {slots:g}", tree_bytes(completions)),
        Part(ROLLOUT, "prompts' states", f"{state:,.0f} B x ({sizes.P:g} + {copies:g})", state * (sizes.P + copies)),
        Part(ROLLOUT, "completions' states", f"{state:,.0f} B x {rows:g}", tree_bytes(arrays.completion_states)),
        Part(
            ROLLOUT,
            "logits of a token, or a layer's scores of the prompts",
            f"{F32} B x max(3 x {rows:g} x {V:,}, 2 x {sizes.P:g} x {N} x {sizes.S:g}^2)",
            F32 * max(3 * rows * V, 2 * sizes.P * N * sizes.S**2),
        ),
    ]
