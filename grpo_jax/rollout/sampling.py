"""The distribution a token is drawn from: temperature, then top-k, then top-p; and the draw itself.

The support (the tokens kept) is always "all logits at or above a threshold", so its size alone is enough for the learner
to evaluate the same distribution later, without a [B, T, V] mask: it keeps as many of its own most probable tokens.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int, Key


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the draw. temperature 0 is greedy; top_k 0 and top_p 1 keep everything."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    @property
    def is_greedy(self) -> bool:
        """True at temperature 0: the most probable token is taken."""
        return self.temperature == 0

    @property
    def is_cut(self) -> bool:
        """True if some tokens get probability zero."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1)


GREEDY = Sampling(temperature=0.0)


class Draw(NamedTuple):
    """One token a row. logp_B, entropy_B: float32 nats, of the distribution drawn from. support_B: int32, tokens it kept."""

    token_B: Int[jax.Array, " B"]
    logp_B: Float[jax.Array, " B"]
    entropy_B: Float[jax.Array, " B"]
    support_B: Int[jax.Array, " B"]


def log_partition_and_entropy(
    logits_CV: Float[jax.Array, "C V"], keep_CV: Bool[jax.Array, "C V"] | None = None
) -> tuple[Float[jax.Array, " C"], Float[jax.Array, " C"]]:
    """float32 logits -> (log-partition, entropy), each [C] in nats, over the tokens kept. Two passes: maximum, then sums."""
    if keep_CV is not None:
        logits_CV = jnp.where(keep_CV, logits_CV, -jnp.inf)
    top_C1 = logits_CV.max(-1, keepdims=True)
    below_CV = logits_CV - top_C1
    p_CV = jnp.exp(below_CV)
    total_C = p_CV.sum(-1)
    # A token left out has p = 0 at a logit of -inf, and their product would be NaN.
    finite_CV = below_CV
    if keep_CV is not None:
        finite_CV = jnp.where(keep_CV, below_CV, 0.0)
    # H = log(sum p) - sum(p * below) / sum p, from what is there already: normalising p first would be another pass over V.
    log_total_C = jnp.log(total_C)
    return log_total_C + top_C1[:, 0], log_total_C - (p_CV * finite_CV).sum(-1) / total_C


def support_threshold(logits_BV: Float[jax.Array, "B V"], top_k: int, top_p: float) -> Float[jax.Array, " B"]:
    """Find the smallest logit kept: of the top_k largest, the fewest that reach top_p together.

    Args:
      logits_BV: float32, divided by the temperature.
      top_k: tokens, 0 for all of V. top_p: probability, relative to what top_k leaves.
    Returns: float32 [B]; a token is in the support if its logit is not below.
    """
    ranked_BJ = jax.lax.top_k(logits_BV, _num_ranks(top_k, logits_BV.shape[-1]))[0]
    if top_p >= 1:
        return ranked_BJ[:, -1]
    p_BJ = jax.nn.softmax(ranked_BJ, axis=-1)
    is_needed_BJ = jnp.cumsum(p_BJ, -1) - p_BJ < top_p  # the mass before it falls short: always true of the first
    return jnp.where(is_needed_BJ, ranked_BJ, jnp.inf).min(-1)


def support_like(
    logits_CV: Float[jax.Array, "C V"], targets_C: Int[jax.Array, " C"], support_C: Int[jax.Array, " C"], top_k: int
) -> Bool[jax.Array, "C V"]:
    """Rebuild the sampler's support by the learner's ranking: the target and its support_C - 1 best rivals.

    The target always belongs, so that its log-probability stays finite and continuous as the policy moves.

    Args:
      logits_CV: float32, the learner's, divided by the temperature. targets_C: the tokens that were drawn.
      support_C: tokens that the sampler kept. top_k: the sampler's, 0 for all of V.
    Returns: bool [C, V], True on the tokens kept.
    """
    vocab = logits_CV.shape[-1]
    is_target_CV = jnp.arange(vocab)[None] == targets_C[:, None]
    rivals_CV = jnp.where(is_target_CV, -jnp.inf, logits_CV)
    ranked_CJ = jax.lax.top_k(rivals_CV, _num_ranks(top_k, vocab))[0]
    # Logits tied at the threshold can make the support larger than top_k; the last rank's value then stands for all of them.
    last_rank_C = jnp.clip(support_C - 2, 0, ranked_CJ.shape[-1] - 1)
    last_C = jnp.take_along_axis(ranked_CJ, last_rank_C[:, None], -1)
    threshold_C1 = jnp.where(support_C[:, None] > 1, last_C, jnp.inf)
    return is_target_CV | (rivals_CV >= threshold_C1)


def _num_ranks(top_k: int, vocab: int) -> int:
    """Count the logits that have to be ranked: the whole vocabulary only where top_k does not limit it."""
    if top_k > 0:
        return min(top_k, vocab)
    return vocab


def argmax(x_BV: Float[jax.Array, "B V"]) -> Int[jax.Array, " B"]:
    """Find the first maximum's index. Two reductions over stored values: on a CPU XLA's own takes four times as long."""
    x_BV = jax.lax.optimization_barrier(x_BV)
    is_top_BV = x_BV >= x_BV.max(-1, keepdims=True)
    return jnp.where(is_top_BV, jnp.arange(x_BV.shape[-1])[None], x_BV.shape[-1]).min(-1)


def draw(logits_BV: Float[jax.Array, "B V"], keys_B: Key[jax.Array, " B"], sampling: Sampling) -> Draw:
    """Draw a token a row, each row with its own key (so that results do not depend on how rows are spread over devices).

    Args:
      logits_BV: before the temperature. keys_B: random keys; greedy draws do not use them.
      sampling: temperature, top-k, top-p.
    Returns: a Draw, [B]. Greedy draws report log-probability and entropy at temperature 1, over all of V.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    keep_BV = None
    if sampling.is_greedy:
        token_B = argmax(logits_BV)
    else:
        logits_BV = logits_BV / sampling.temperature
        if sampling.is_cut:
            keep_BV = logits_BV >= support_threshold(logits_BV, sampling.top_k, sampling.top_p)[:, None]
        # Gumbel noise and an argmax draw from the softmax without computing it. One key for the whole block would make a row's
        # noise depend on how many rows this device has.
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(keys_B)
        candidates_BV = logits_BV
        if keep_BV is not None:
            candidates_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
        token_B = argmax(candidates_BV + noise_BV)
    log_z_B, entropy_B = log_partition_and_entropy(logits_BV, keep_BV)
    logp_B = jnp.take_along_axis(logits_BV, token_B[:, None], -1)[:, 0] - log_z_B
    support_B = jnp.full_like(token_B, logits_BV.shape[-1]) if keep_BV is None else keep_BV.sum(-1)
    return Draw(token_B.astype(jnp.int32), logp_B, entropy_B, support_B.astype(jnp.int32))
