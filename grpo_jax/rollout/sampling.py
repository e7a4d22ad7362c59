"""The distribution a token is drawn from: temperature, then top-k, then top-p; and the draw itself.

The support (the tokens kept) is always "all logits at or above a threshold", so its size alone is enough for the learner
to evaluate the same distribution later, without a [B, T, V] mask: it keeps as many of its own most probable tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. temperature 0 is greedy; top_k 0 and top_p 1 keep everything."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def is_cut(self) -> bool:
        """Whether some tokens get probability zero."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1)


GREEDY = Sampling(temperature=0.0)


class Draw(NamedTuple):
    """One token a row. logp_B, entropy_B: nats, of the distribution drawn from. support_B: tokens it kept (int32)."""

    token_B: Any
    logp_B: Any
    entropy_B: Any
    support_B: Any


def log_partition_and_entropy(logits_CV, keep_CV=None):
    """float32 logits -> (log-partition, entropy), each [C] in nats, over the tokens kept. Two passes: maximum, then sums."""
    if keep_CV is not None:
        logits_CV = jnp.where(keep_CV, logits_CV, -jnp.inf)
    top_C1 = logits_CV.max(-1, keepdims=True)
    below_CV = logits_CV - top_C1
    p_CV = jnp.exp(below_CV)
    total_C = p_CV.sum(-1)
    finite_CV = below_CV if keep_CV is None else jnp.where(keep_CV, below_CV, 0.0)
    log_total_C = jnp.log(total_C)
    return log_total_C + top_C1[:, 0], log_total_C - (p_CV * finite_CV).sum(-1) / total_C


def support_threshold(logits_BV, top_k: int, top_p: float):
    """The smallest (tempered) logit kept: the top_k largest, and of those the fewest that reach top_p together."""
    num_ranked = min(top_k, logits_BV.shape[-1]) if top_k > 0 else logits_BV.shape[-1]
    ranked_BK = jax.lax.top_k(logits_BV, num_ranked)[0]
    if top_p >= 1:
        return ranked_BK[:, -1]
    p_BK = jax.nn.softmax(ranked_BK, axis=-1)
    is_needed_BK = jnp.cumsum(p_BK, -1) - p_BK < top_p  # the mass before it falls short: always true of the first
    return jnp.where(is_needed_BK, ranked_BK, jnp.inf).min(-1)


def support_like(logits_CV, targets_C, support_C, top_k: int):
    """bool[C, V]: the support the sampler had, by the learner's ranking: the target and its support_C - 1 best rivals.

    The target always belongs, so that its log-probability stays finite and continuous as the policy moves.
    """
    vocab = logits_CV.shape[-1]
    is_target_CV = jnp.arange(vocab)[None] == targets_C[:, None]
    rivals_CV = jnp.where(is_target_CV, -jnp.inf, logits_CV)
    ranked_CK = jax.lax.top_k(rivals_CV, min(top_k, vocab) if top_k > 0 else vocab)[0]
    # Logits tied at the threshold can make the support larger than top_k; the last rank's value then stands for all of them.
    last_rank_C = jnp.clip(support_C - 2, 0, ranked_CK.shape[-1] - 1)
    last_C = jnp.take_along_axis(ranked_CK, last_rank_C[:, None], -1)
    threshold_C1 = jnp.where(support_C[:, None] > 1, last_C, jnp.inf)
    return is_target_CV | (rivals_CV >= threshold_C1)


def argmax(x_BV):
    """The first maximum's place, int32[B]. Two reductions over stored values: on a CPU XLA's own takes four times as long."""
    x_BV = jax.lax.optimization_barrier(x_BV)
    is_top_BV = x_BV >= x_BV.max(-1, keepdims=True)
    return jnp.where(is_top_BV, jnp.arange(x_BV.shape[-1])[None], x_BV.shape[-1]).min(-1)


def draw(logits_BV, keys_B, sampling: Sampling) -> Draw:
    """Draw a token a row, each row with its own key (so that results do not depend on how rows are spread over devices).

    Greedy draws report log-probability and entropy at temperature 1.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    if sampling.is_greedy:
        keep_BV, token_B = None, argmax(logits_BV)
    else:
        logits_BV = logits_BV / sampling.temperature
        keep_BV = None
        if sampling.is_cut:
            keep_BV = logits_BV >= support_threshold(logits_BV, sampling.top_k, sampling.top_p)[:, None]
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        candidates_BV = logits_BV if keep_BV is None else jnp.where(keep_BV, logits_BV, -jnp.inf)
        token_B = argmax(candidates_BV + noise_BV)
    log_z_B, entropy_B = log_partition_and_entropy(logits_BV, keep_BV)
    logp_B = jnp.take_along_axis(logits_BV, token_B[:, None], -1)[:, 0] - log_z_B
    support_B = jnp.full_like(token_B, logits_BV.shape[-1]) if keep_BV is None else keep_BV.sum(-1)
    return Draw(token_B.astype(jnp.int32), logp_B, entropy_B, support_B.astype(jnp.int32))
