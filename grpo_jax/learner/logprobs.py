"""Hidden states -> log-probability of given tokens and entropy of the distribution, in chunks: never [B, T, V] in float32.

The gradient is written by hand: d logp / d logits = onehot - p, recomputed chunk by chunk, so that neither direction keeps
more than one [C, V] block of logits. With an entropy bonus d H / d logits = -p (log p + H) is added.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from grpo_jax.models.linear import head_logits
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import vary_like
from grpo_jax.rollout.sampling import Sampling, log_partition_and_entropy, support_like
from grpo_jax.types import Params, Rollout


def token_logprobs(
    hidden_FD: Float[jax.Array, "F D"],
    head_VD: Float[jax.Array, "V D"],
    targets_F: Int[jax.Array, " F"],
    support_F: Int[jax.Array, " F"] | None,
    sampling: Sampling,
    chunk_tokens: int,
    cap: float | None,
    has_entropy_gradient: bool = False,
) -> tuple[Float[jax.Array, " F"], Float[jax.Array, " F"]]:
    """Compute the log-probability of each target, and the entropy, under the distribution that `sampling` draws from.

    Args:
      hidden_FD: the state that predicts each target. head_VD: output matrix. targets_F: int32.
      support_F: int32, how many tokens the sampler kept at each position, or None if it kept all.
      sampling: temperature (> 0), top-k, top-p. chunk_tokens: positions at a time; peak memory is chunk_tokens * V.
      cap: of the logits, as in `head_logits`. has_entropy_gradient: the entropy is a part of a loss.
    Returns: (logp_F, entropy_F), float32 nats. Gradient flows through logp_F to hidden and head, through entropy_F if asked.
    """
    # A scan needs chunks of one shape. Padded positions predict token 0 from a state of zeros and are left out of the result.
    num = len(targets_F)
    chunk = min(chunk_tokens, num)
    padding = -num % chunk

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    hidden, targets, support = jax.tree.map(split, (hidden_FD, targets_F, support_F))  # None stays None
    static = sampling, cap, has_entropy_gradient
    logp, entropy = _chunked(*static, hidden, head_VD, targets, support)  # pyright: ignore[reportGeneralTypeIssues]
    logp, entropy = (x.reshape(-1)[:num] for x in (logp, entropy))
    return logp, entropy if has_entropy_gradient else jax.lax.stop_gradient(entropy)


def _chunk_logits(sampling: Sampling, cap: float | None, hidden_CD, head_VD, targets_C, support_C):
    """Compute logits [C, V], divided by the temperature, and the tokens in the support (None: all)."""
    logits_CV = head_logits(hidden_CD, head_VD, cap) / sampling.temperature
    if not sampling.is_cut:
        return logits_CV, None
    return logits_CV, support_like(logits_CV, targets_C, support_C, sampling.top_k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked(sampling: Sampling, cap: float | None, has_entropy_gradient: bool, hidden, head_VD, targets, support):
    return _forward(sampling, cap, has_entropy_gradient, hidden, head_VD, targets, support)[0]


def _forward(sampling, cap, has_entropy_gradient, hidden, head_VD, targets, support):
    """Go through the chunks. Of each, only its log-partition is kept for the backward pass: C numbers instead of [C, V]."""

    def chunk(_, xs):
        hidden_CD, targets_C, support_C = xs
        logits_CV, keep_CV = _chunk_logits(sampling, cap, hidden_CD, head_VD, targets_C, support_C)
        log_z_C, entropy_C = log_partition_and_entropy(logits_CV, keep_CV)
        logp_C = jnp.take_along_axis(logits_CV, targets_C[:, None], -1)[:, 0] - log_z_C
        return None, (logp_C, entropy_C, log_z_C)

    _, (logp, entropy, log_z) = jax.lax.scan(chunk, None, (hidden, targets, support))
    return (logp, entropy), (hidden, head_VD, targets, support, log_z, entropy if has_entropy_gradient else None)


def _backward(sampling, cap, has_entropy_gradient, residuals, cotangents):
    """Go through the chunks once more: d logp / d logits = onehot - p on the support, which counts as fixed."""
    hidden, head_VD, targets, support, log_z, entropy = residuals
    d_logp, d_entropy = cotangents
    if not has_entropy_gradient:
        d_entropy = None

    def chunk(d_head_VD, xs):
        hidden_CD, targets_C, support_C, log_z_C, d_logp_C, entropy_C, d_entropy_C = xs
        logits_CV, keep_CV = _chunk_logits(sampling, cap, hidden_CD, head_VD, targets_C, support_C)
        p_CV = jnp.exp(logits_CV - log_z_C[:, None])
        if keep_CV is not None:
            p_CV = jnp.where(keep_CV, p_CV, 0.0)
        is_target_CV = jnp.arange(p_CV.shape[-1])[None] == targets_C[:, None]
        d_logits_CV = (is_target_CV - p_CV) * (d_logp_C[:, None] / sampling.temperature)
        if has_entropy_gradient:
            surprise_CV = logits_CV - log_z_C[:, None] + entropy_C[:, None]
            d_logits_CV -= p_CV * surprise_CV * (d_entropy_C[:, None] / sampling.temperature)
        if cap is not None:  # the slope of tanh
            d_logits_CV *= 1 - jnp.square(logits_CV * (sampling.temperature / cap))
        # Both products take the compute dtype's factors, as the forward pass does. The head's gradient is a sum over all
        # chunks, so it is carried in float32: in bfloat16 later chunks would be rounded away.
        d_logits_CV = d_logits_CV.astype(head_VD.dtype)
        d_hidden_CD = jnp.einsum("cv,vd->cd", d_logits_CV, head_VD)
        d_head_VD += jnp.einsum("cv,cd->vd", d_logits_CV, hidden_CD, preferred_element_type=jnp.float32)
        return d_head_VD, d_hidden_CD.astype(hidden_CD.dtype)

    zeros_VD = vary_like(jnp.zeros(head_VD.shape, jnp.float32), targets)
    d_head_VD, d_hidden = jax.lax.scan(chunk, zeros_VD, (hidden, targets, support, log_z, d_logp, entropy, d_entropy))
    return d_hidden, d_head_VD.astype(head_VD.dtype), None, None


_chunked.defvjp(_forward, _backward)


def policy_logprobs(
    model: ModelDef,
    params: Params,
    rollout: Rollout,
    sampling: Sampling,
    chunk_tokens: int,
    has_entropy_gradient: bool = False,
) -> tuple[Float[jax.Array, "P G T"], Float[jax.Array, "P G T"]]:
    """Compute the log-probability of each completion token under the policy, and the entropy of its distribution.

    Each prompt runs through the layers once for its whole group.

    Args:
      params: all weights of the policy. rollout: G completions of each of P prompts.
      sampling: the settings that the rollout was sampled with, so that both speak of one distribution.
      chunk_tokens: positions whose logits exist at a time. has_entropy_gradient: as in `token_logprobs`.
    Returns: (logp_PGT, entropy_PGT), float32 nats; undefined but finite where masked. Gradient flows through logp_PGT, and
      through entropy_PGT if asked.
    """
    decoder = model.bind(params)
    P, G, T = rollout.tokens_PGT.shape
    tokens_BT = rollout.tokens_PGT.reshape(P * G, T)
    prompts = rollout.prompts.tokens_PS, rollout.prompts.mask_PS
    # The last token of a completion predicts nothing, so it is no input. On accelerators it is one, and its state is dropped:
    # T is a multiple of a tile where T - 1 is not, and every array of a layer would be padded to it.
    num_read = T - 1
    if model.hardware is not None:
        num_read = T
    if num_read == 0:  # a completion of one token has no input at all
        last_PD, _ = decoder.encode_prompts(*prompts)
        later = []
    else:
        last_PD, later_BTD = decoder.forward_with_prefix(
            *prompts, tokens_BT[:, :num_read], rollout.mask_PGT.reshape(P * G, T)[:, :num_read]
        )
        later = [later_BTD[:, : T - 1]]
    # The prompt's last state predicts the first token.
    hidden_BTD = jnp.concatenate([jnp.repeat(last_PD, G, axis=0)[:, None], *later], axis=1)
    logp_F, entropy_F = token_logprobs(
        hidden_BTD.reshape(P * G * T, -1),
        decoder.head_VD,
        tokens_BT.reshape(-1),
        jax.tree.map(lambda x: x.reshape(-1), rollout.support_PGT),  # None stays None
        sampling,
        chunk_tokens,
        decoder.logit_cap,
        has_entropy_gradient,
    )
    return logp_F.reshape(P, G, T), entropy_F.reshape(P, G, T)
