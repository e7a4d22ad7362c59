"""The policy's own view of completions: their log-probabilities under the distribution they were sampled from.

The mirror image of `rollout`: same prefix, same attention, same temperature and support, all positions at once.
"""

from __future__ import annotations

import jax.numpy as jnp

from grpo_jax.logprobs import token_logprobs
from grpo_jax.models.transformer import ModelDef
from grpo_jax.sampling import Sampling
from grpo_jax.types import Params, Rollout


def score(model: ModelDef, params: Params, rollout: Rollout, sampling: Sampling, chunk_tokens: int):
    """-> (logp_PGT, entropy_PGT), float32 nats; rubbish but finite where masked. Gradient flows through logp_PGT only.

    Each prompt runs through the layers once for its whole group.
    """
    decoder = model.bind(params)
    P, G, T = rollout.tokens_PGT.shape
    tokens_BT = rollout.tokens_PGT.reshape(P * G, T)
    prompts = rollout.prompts.tokens_PS, rollout.prompts.mask_PS
    if T == 1:
        last_PD, _ = decoder.encode_prompts(*prompts)
        later = []
    else:
        last_PD, later_BTD = decoder.continued(*prompts, tokens_BT[:, :-1], rollout.mask_PGT.reshape(P * G, T)[:, :-1])
        later = [later_BTD]
    # The prompt's last state predicts the first token.
    hidden_BTD = jnp.concatenate([jnp.repeat(last_PD, G, axis=0)[:, None], *later], axis=1)
    logp_N, entropy_N = token_logprobs(
        hidden_BTD.reshape(P * G * T, -1),
        decoder.head_VD,
        tokens_BT.reshape(-1),
        None if rollout.support_PGT is None else rollout.support_PGT.reshape(-1),
        sampling,
        chunk_tokens,
        decoder.logit_cap,
    )
    return logp_N.reshape(P, G, T), entropy_N.reshape(P, G, T)
