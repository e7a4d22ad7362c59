"""Prompts -> completions, as one traced function: prefill each prompt once, decode G completions of it, stop early."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Key

from grpo_jax.config import RolloutConfig
from grpo_jax.models.attention import Prefix
from grpo_jax.models.linear import head_logits
from grpo_jax.models.transformer import Decoder, ModelDef
from grpo_jax.rollout.decoding import Completions, DecodeContext, EndTokens, decode_batched, decode_continuous
from grpo_jax.rollout.prompt_parts import parts_of
from grpo_jax.rollout.sampling import Sampling, occurring_tokens
from grpo_jax.types import Params, Prompts, Rollout


def sampling_of(config: RolloutConfig) -> Sampling:
    """Return the distribution that a rollout draws from."""
    return Sampling(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Sampling)})


def greedy(config: RolloutConfig) -> RolloutConfig:
    """Return the same rollout with the most probable token at every position, once for each prompt."""
    return dataclasses.replace(config, group_size=1, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


def row_keys(key: Key[jax.Array, ""], num_prompts: int, group_size: int) -> Key[jax.Array, "P G"]:
    """Make a key for each completion from its number in the global batch.

    Args:
      key: of the round. num_prompts: P, of all devices. group_size: G.
    Returns: random keys [P, G].
    """
    # Not from the device that a row happens to be on: the mesh then changes no sample.
    rows = jnp.arange(num_prompts * group_size)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows).reshape(num_prompts, group_size)


def rollout(
    model: ModelDef,
    params: Params,
    prompts: Prompts,
    row_keys_PG: Key[jax.Array, "P G"],
    config: RolloutConfig,
    ends: EndTokens,
) -> Rollout:
    """Sample G completions of each prompt.

    The loop ends with the longest live row. Token t of a row is drawn with fold_in(row key, t), whatever else is in the
    batch. What is recorded (log-probability, entropy, support) is of the distribution really drawn from.

    Args:
      model: decoder. params: its weights in any dtype; computed with in the model's.
      prompts: [P, S], left-padded; with `long_rows` the others are computed at a width of their own.
      row_keys_PG: a PRNG key for each completion, from `row_keys`.
      config: group size G, budget T in tokens, distribution, and how many completions are decoded at a time.
      ends: what completions end with.
    Returns: a Rollout with T = config.max_completion_tokens slots.
    """
    # Cast once here, not at every token: the loop would read float32 masters T times.
    decoder = model.bind(jax.tree.map(lambda x: x.astype(model.dtype), params))
    P, G = len(prompts.tokens_PS), config.group_size
    sampling = sampling_of(config)
    # With room for all completions there is nothing to refill, and the plain loop has less to do at each token.
    is_continuous = 0 < config.max_live_sequences < P * G
    parts = None
    if not is_continuous and decoder.tiles is None:  # rows that take others' places, and exact blocks, have one width
        parts = parts_of(prompts)
    by_width = (prompts,)
    if parts is not None:
        by_width, row_keys_PG = parts.split(prompts), row_keys_PG[parts.order_P]
    hidden_PD, prefix, seen_PV = _encode(decoder, by_width, sampling)
    ctx = DecodeContext(
        decoder,
        decoder.unstack_layers(),
        decoder.head_VD,
        decoder.unstack_prefix(prefix),
        first_logits_PV=head_logits(hidden_PD, decoder.head_VD, decoder.logit_cap, decoder.tiles),
        keys_B=row_keys_PG.reshape(P * G),
        sampling=sampling,
        ends=ends,
        max_completion_tokens=config.max_completion_tokens,
        seen_PV=seen_PV,
    )
    done = decode_continuous(ctx, config.max_live_sequences) if is_continuous else decode_batched(ctx)
    done = jax.tree.map(lambda x: x.reshape(P, G, *x.shape[1:]), done)
    if parts is not None:
        done = parts.put_back(done)
    return _as_rollout(prompts, done, sampling)


def _as_rollout(prompts: Prompts, done: Completions, sampling: Sampling) -> Rollout:
    """Return completions, all their arrays [P, G, ...], as a Rollout of their prompts."""
    # The fields of a Draw are named for one token of each row; here they hold [P, G, T].
    return Rollout(
        prompts=prompts,
        tokens_PGT=done.drawn.token_B,
        mask_PGT=done.mask_BT,
        sampler_logp_PGT=done.drawn.logp_B,
        entropy_PGT=done.drawn.entropy_B,
        support_PGT=done.drawn.support_B if sampling.is_cut else None,
        is_truncated_PG=~done.is_done_B,
        experts_PGTX=done.experts_BTX,
    )


def _encode(
    decoder: Decoder, by_width: tuple[Prompts, ...], sampling: Sampling
) -> tuple[Float[jax.Array, "P D"], Prefix, Bool[jax.Array, "P V"] | None]:
    """Run prompts, each part at its width.

    Returns: (hidden_PD and Prefix as `Decoder.encode_prompts` has them, one part's rows behind the other's; the tokens of each
      prompt, None without a repetition penalty).
    """
    seen_PV = None
    if sampling.has_penalty:
        vocab = decoder.arch.vocab_size
        seen_PV = jnp.concatenate([occurring_tokens(each.tokens_PS, each.mask_PS, vocab) for each in by_width])
    parts = [decoder.encode_prompts(each.tokens_PS, each.mask_PS) for each in by_width]
    if len(parts) == 1:
        return *parts[0], seen_PV
    hidden_PD = jnp.concatenate([hidden_PD for hidden_PD, _ in parts])
    return hidden_PD, Prefix.join([prefix for _, prefix in parts]), seen_PV
