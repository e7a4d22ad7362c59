"""Prompts -> completions, as one traced function: prefill each prompt once, decode G completions of it, stop early."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from grpo_jax.models.linear import head_logits
from grpo_jax.models.transformer import ModelDef
from grpo_jax.rollout.decoding import DecodeContext, decode_batched, decode_continuous
from grpo_jax.rollout.sampling import Sampling
from grpo_jax.types import Params, Prompts, Rollout


@dataclasses.dataclass(frozen=True)
class RolloutSpec:
    """The static half of a rollout (hashable). stop_ids: a completion ends at any of them and keeps it.

    max_live_sequences: completions decoded at a time, 0: all.
    """

    group_size: int
    max_completion_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    pad_id: int
    max_live_sequences: int = 0


def row_keys(key, num_prompts: int, group_size: int):
    """A key for each row, [P, G], from its number in the global batch: not from the device it happens to be on."""
    rows = jnp.arange(num_prompts * group_size)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows).reshape(num_prompts, group_size)


def rollout(model: ModelDef, params: Params, prompts: Prompts, row_keys_PG, spec: RolloutSpec) -> Rollout:
    """Sample G completions of each prompt.

    The loop ends with the longest live row. Token t of a row is drawn with fold_in(row key, t), whatever else is in the
    batch. What is recorded (log-probability, entropy, support) is of the distribution really drawn from.

    Args:
      params: in any dtype; computed with in the model's. prompts: [P, S], left-padded. row_keys_PG: from `row_keys`.
    Returns: a Rollout with T = spec.max_completion_tokens.
    """
    decoder = model.bind(jax.tree.map(lambda x: x.astype(model.dtype), params))  # cast once, not at every token
    P, G = len(prompts.tokens_PS), spec.group_size
    hidden_PD, prefix = decoder.encode_prompts(prompts.tokens_PS, prompts.mask_PS)
    head_VD = decoder.head_VD
    ctx = DecodeContext(
        decoder,
        decoder.unstack_layers(),
        head_VD,
        prefix,
        first_logits_PV=head_logits(hidden_PD, head_VD, decoder.logit_cap),
        keys_B=row_keys_PG.reshape(P * G),
        sampling=spec.sampling,
        stop_ids=spec.stop_ids,
        pad_id=spec.pad_id,
        max_completion_tokens=spec.max_completion_tokens,
    )
    is_refilled = 0 < spec.max_live_sequences < P * G
    done = decode_continuous(ctx, spec.max_live_sequences) if is_refilled else decode_batched(ctx)
    done = jax.tree.map(lambda x: x.reshape(P, G, *x.shape[1:]), done)
    return Rollout(
        prompts=prompts,
        tokens_PGT=done.drawn.token_B,
        mask_PGT=done.mask_BT,
        sampler_logp_PGT=done.drawn.logp_B,
        entropy_PGT=done.drawn.entropy_B,
        support_PGT=done.drawn.support_B if spec.sampling.is_cut else None,
        is_truncated_PG=~done.is_done_B,
    )
