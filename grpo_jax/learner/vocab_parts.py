"""The head by parts of the vocabulary, all positions at once: log-probabilities, and the gradient of head and states.

A head that fsdp shards over its width is gathered part by part, and its gradient scattered so: neither is ever there in
full. One that `tensor` shards over the vocabulary is worked on where it is, each device its own tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from grpo_jax.models.fsdp import gather_columns, scatter_columns
from grpo_jax.models.linear import head_logits
from grpo_jax.models.tiles import Tiles
from grpo_jax.parallel.sharding import vary_like
from grpo_jax.rollout.sampling import Sampling

VOCAB_SHARD = PartitionSpec("tensor", None)


@dataclasses.dataclass(frozen=True)
class HeadWork:
    """The static part of `token_logprobs`: fields are its arguments, vocab and is_by_vocab are of its chunks."""

    sampling: Sampling
    cap: float | None
    vocab: int
    is_by_vocab: bool
    tiles: Tiles | None
    has_entropy_gradient: bool


def num_vocab_shards(vocab: int, num_devices: int) -> int:
    """Return the number of parts that a vocabulary has on the devices of `tensor`."""
    return num_devices if vocab % num_devices == 0 else 1


def num_shards_here(vocab: int) -> int:
    """Return it where this is traced: 1 outside of `shard_map` over the rows, where nothing is known of `tensor`."""
    return num_vocab_shards(vocab, jax.sharding.get_abstract_mesh().shape.get("tensor", 1))


def score_by_vocab(work: HeadWork, hidden, head_VD, targets):
    """Do what `score` does, by parts of the vocabulary, all positions at once: sums that grow from part to part."""

    def of_device(head_VD, first_here, hidden_FD, targets_F1):
        def part(sums, head_UD, first):
            highest_F, z_F, weighted_F, target_F = sums
            logits_FU = head_logits(hidden_FD, head_UD, work.cap) / work.sampling.temperature
            higher_F = jnp.maximum(highest_F, logits_FU.max(-1))
            below_FU = logits_FU - higher_F[:, None]
            weight_FU = jnp.exp(below_FU)
            is_target_FU = first + jnp.arange(len(head_UD))[None] == here_F1
            z_F, weighted_F = _shrink(z_F, weighted_F, highest_F - higher_F)
            sums = (
                higher_F,
                z_F + weight_FU.sum(-1),
                weighted_F + (weight_FU * below_FU).sum(-1),
                target_F + jnp.where(is_target_FU, logits_FU, 0.0).sum(-1),
            )
            return sums, None

        here_F1 = targets_F1 - first_here
        zeros_F = vary_like(jnp.zeros(len(here_F1), jnp.float32), here_F1)
        # Not minus infinity: what the first part takes away from it must be a number.
        sums = (zeros_F - 1e30, zeros_F, zeros_F, zeros_F)
        (highest_F, z_F, weighted_F, target_F), _ = _over_vocab(work, hidden_FD, head_VD, part, sums)
        if is_shared:
            of_all_F = jax.lax.pmax(highest_F, "tensor")
            z_F, weighted_F = _shrink(z_F, weighted_F, highest_F - of_all_F)
            highest_F, (z_F, weighted_F, target_F) = of_all_F, jax.lax.psum((z_F, weighted_F, target_F), "tensor")
        log_z_F = highest_F + jnp.log(z_F)
        return target_F - log_z_F, jnp.log(z_F) - weighted_F / z_F, log_z_F

    is_shared = num_shards_here(len(head_VD)) > 1
    run = _on_vocab_shards(of_device, is_shared, num_others=2, out_specs=PartitionSpec())
    found = run(head_VD, hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1, 1))
    return tuple(x_F.reshape(targets.shape) for x_F in found)


def _shrink(z_F: jax.Array, weighted_F: jax.Array, drop_F: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Refer sums of e^l and of e^l l to a maximum of the l that is higher by -drop."""
    shrunk_F = jnp.exp(drop_F)
    return z_F * shrunk_F, (weighted_F + drop_F * z_F) * shrunk_F


def backward_by_vocab(work: HeadWork, residuals, d_logp, d_entropy):
    """Go through parts of the vocabulary, all positions at once.

    The log-partition is known, so each part's share of p is; a cut distribution has no such parts.
    """
    hidden, head_VD, (targets, _, _), _, log_z, entropy, sum_VD = residuals
    temperature, cap = work.sampling.temperature, work.cap

    def of_device(tables, first_here, hidden_FD, targets_F1, log_z_F1, d_logp_F1, *of_entropy):
        def part(carry, head_UD, first):
            d_hidden_FD, sum_VD = carry
            logits_FU = head_logits(hidden_FD, head_UD, cap) / temperature
            is_target_FU = first + jnp.arange(len(head_UD))[None] == here_F1
            below_FU = logits_FU - log_z_F1
            p_FU = jnp.exp(below_FU)
            d_logits_FU = (is_target_FU - p_FU) * (d_logp_F1 / temperature)
            if of_entropy:
                entropy_F1, d_entropy_F1 = of_entropy
                d_logits_FU -= p_FU * (below_FU + entropy_F1) * (d_entropy_F1 / temperature)
            if cap is not None:  # the slope of tanh
                d_logits_FU *= 1 - jnp.square(logits_FU * (temperature / cap))
            d_logits_FU = d_logits_FU.astype(head_UD.dtype)
            d_hidden_FD += jnp.einsum("fu,ud->fd", d_logits_FU, head_UD, preferred_element_type=jnp.float32)
            dtype = jnp.float32 if is_sharded or sum_VD is not None else None
            d_head_UD = jnp.einsum("fu,fd->ud", d_logits_FU, hidden_FD, preferred_element_type=dtype)
            if is_sharded:
                d_head_UD = scatter_columns(d_head_UD)
            if sum_VD is None:
                return (d_hidden_FD, None), d_head_UD
            so_far_UD = jax.lax.dynamic_slice_in_dim(sum_VD, first, len(d_head_UD))
            return (d_hidden_FD, jax.lax.dynamic_update_slice_in_dim(sum_VD, so_far_UD + d_head_UD, first, 0)), None

        head_VD, sum_VD = tables
        here_F1, is_sharded = targets_F1 - first_here, _is_sharded(hidden_FD, head_VD)
        zeros_FD = vary_like(jnp.zeros(hidden_FD.shape, jnp.float32), here_F1)
        (d_hidden_FD, sum_VD), d_head_VD = _over_vocab(work, hidden_FD, head_VD, part, (zeros_FD, sum_VD))
        if is_shared:
            d_hidden_FD = jax.lax.psum(d_hidden_FD, "tensor")
        d_table_VD = d_head_VD.astype(head_VD.dtype) if sum_VD is None else sum_VD
        return d_table_VD, d_hidden_FD.astype(hidden_FD.dtype)

    of_rows = [targets, log_z, d_logp, *(() if d_entropy is None else (entropy, d_entropy))]
    is_shared = num_shards_here(len(head_VD)) > 1
    run = _on_vocab_shards(of_device, is_shared, num_others=1 + len(of_rows), out_specs=(VOCAB_SHARD, PartitionSpec()))
    tables, hidden_FD = (head_VD, sum_VD), hidden.reshape(-1, hidden.shape[-1])
    d_table_VD, d_hidden_FD = run(tables, hidden_FD, *(x.reshape(-1, 1) for x in of_rows))
    by_table = (d_table_VD, None) if sum_VD is None else (None, d_table_VD)
    return d_hidden_FD.reshape(hidden.shape), by_table[0], None, None, by_table[1]


def _on_vocab_shards(function: Callable[..., Any], is_shared: bool, num_others: int, out_specs: Any) -> Callable[..., Any]:
    """Return run(tables, ...), that is function(its rows of the head, the first one's token, ...) on each device of `tensor`.

    tables: the head, or a tree of arrays of its shape. Where `tensor` does not shard it, a device's rows are all, and 0. All
    else each device has in full.
    """
    if not is_shared:
        return lambda tables, *others: function(tables, 0, *others)

    def run(tables: Any, *others: Any) -> Any:
        # Data, and not `jax.lax.axis_index`: below another `shard_map` jax 0.7 cannot compile that.
        vocab = len(jax.tree.leaves(tables)[0])
        num_parts = num_shards_here(vocab)
        firsts = jnp.arange(num_parts)[:, None] * (vocab // num_parts)
        in_specs = (VOCAB_SHARD, VOCAB_SHARD, *[PartitionSpec()] * num_others)
        return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={"tensor"})(tables, firsts, *others)

    return run


def _is_sharded(hidden_FD: jax.Array, head_VD: jax.Array) -> bool:
    """Tell if a head is this device's columns alone; its shape is the only sign of it."""
    return head_VD.shape[-1] != hidden_FD.shape[-1]


def _over_vocab(
    work: HeadWork, hidden_FD: jax.Array, head_VD: jax.Array, part: Callable[..., Any], carry: Any
) -> tuple[Any, Any]:
    """Call part(carry, head_UD, first) -> (carry, result) for parts of the vocabulary; what is left over is one of its own.

    Args:
      head_VD: in the compute dtype, or this device's columns, of which each part is gathered by itself.
      part: with its tokens' rows of the head, and the first token's number. carry: of the first call.
    Returns: (the last carry, the results of all parts, one behind the other, or None).
    """
    V, size = len(head_VD), work.vocab
    here_VD = head_VD.astype(hidden_FD.dtype)

    def call(carry: Any, first: Any, rows: jax.Array) -> tuple[Any, Any]:
        return part(carry, gather_columns(rows) if _is_sharded(hidden_FD, rows) else rows, first)

    def step(carry: Any, i: jax.Array) -> tuple[Any, Any]:
        return call(carry, i * size, jax.lax.dynamic_slice_in_dim(here_VD, i * size, size))

    carry, results = jax.lax.scan(step, carry, jnp.arange(V // size))
    results = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)
    done = V // size * size
    if done < V:
        carry, rest = call(carry, done, here_VD[done:])
        results = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), results, rest)
    return carry, results
