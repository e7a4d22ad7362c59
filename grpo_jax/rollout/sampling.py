"""The distribution a token is drawn from, and the draw itself.

A repetition penalty changes the logits, some tokens are ruled out, the temperature divides; then top-k, top-p and min-p cut
the tail, in this order. The learner evaluates the same distribution later. The tokens that the cuts keep are always "all logits
at or above a threshold", so their number alone is enough for that, without a [B, T, V] mask: the learner keeps as many of its
own most probable tokens. Everything else follows from the token's place and the tokens before it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key

from grpo_jax.models.tiles import Tiles, in_tiles
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.rollout import tpu_draw
from grpo_jax.rollout.search import argmax, block_sums, least_kept, pick_token, uniforms


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of the draw, as `RolloutConfig` describes them. temperature 0 is greedy; the defaults keep every token."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    bad_ids: tuple[int, ...] = ()
    bad_first_ids: tuple[int, ...] = ()
    forced_prefix_ids: tuple[int, ...] = ()

    @property
    def is_greedy(self) -> bool:
        """True at temperature 0: the most probable token is taken."""
        return self.temperature == 0

    @property
    def is_cut(self) -> bool:
        """True if the least probable tokens get probability zero."""
        return not self.is_greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    @property
    def has_penalty(self) -> bool:
        """True if the tokens that occurred already count."""
        return self.repetition_penalty != 1

    @property
    def rules_out(self) -> bool:
        """True if some tokens are ruled out by their ids."""
        return bool(self.bad_ids or self.bad_first_ids or self.forced_prefix_ids)


GREEDY = Sampling(temperature=0.0)


class Draw(NamedTuple):
    """One token a row. logp_B, entropy_B: float32 nats, of the distribution drawn from. support_B: int32, tokens it kept."""

    token_B: Int[jax.Array, " B"]
    logp_B: Float[jax.Array, " B"]
    entropy_B: Float[jax.Array, " B"]
    support_B: Int[jax.Array, " B"]


class Partition(NamedTuple):
    """Sums over exp(logits) of C positions. top_C1: the largest logit. sums_CN: `block_sums` of exp(logits - top_C1)."""

    log_z_C: Float[jax.Array, " C"]
    entropy_C: Float[jax.Array, " C"]
    top_C1: Float[jax.Array, "C 1"]
    sums_CN: Float[jax.Array, "C N"]


# ------------------------------------------------------------------------------------------------ before the cuts


def repetition_factor(
    logits_CV: Float[jax.Array, "C V"], seen_CV: Bool[jax.Array, "C V"], penalty: float
) -> Float[jax.Array, "C V"]:
    """Compute what the logits of tokens that occurred are multiplied by: a penalty above 1 makes them less probable.

    Args:
      logits_CV: at any temperature. seen_CV: True on tokens of the prompt and of the completion so far.
      penalty: divides positive logits and multiplies negative ones (CTRL, arXiv 1909.05858).
    Returns: float32 [C, V], 1 on tokens that did not occur.
    """
    return jnp.where(seen_CV, jnp.where(logits_CV > 0, 1 / penalty, penalty), 1.0)


def occurring_tokens(
    tokens_CX: Int[jax.Array, "C X"], is_there_CX: Bool[jax.Array, "C X"], vocab: int
) -> Bool[jax.Array, "C V"]:
    """Mark the tokens that each row has.

    Args:
      tokens_CX: ids. is_there_CX: True on slots that count.
      vocab: V.
    Returns: bool [C, V].
    """
    num = len(tokens_CX)
    ids_CX = jnp.where(is_there_CX, tokens_CX, vocab)
    return jnp.zeros((num, vocab), bool).at[jnp.arange(num)[:, None], ids_CX].set(True, mode="drop")


def allowed_tokens(t_C: Int[jax.Array, " C"], sampling: Sampling, vocab: int) -> Bool[jax.Array, "C V"]:
    """Tell which tokens are not ruled out by their ids.

    Args:
      t_C: the place of each token in its completion, from 0. sampling: its three fields of ids.
      vocab: V.
    Returns: bool [C, V].
    """
    t_C1 = t_C[:, None]
    allowed_CV = ~_is_among(sampling.bad_ids, vocab) & ((t_C1 > 0) | ~_is_among(sampling.bad_first_ids, vocab))
    prefix = sampling.forced_prefix_ids
    if not prefix:
        return allowed_CV
    forced_C1 = jnp.asarray(prefix, jnp.int32)[jnp.minimum(t_C1, len(prefix) - 1)]
    return jnp.where(t_C1 < len(prefix), jnp.arange(vocab)[None] == forced_C1, allowed_CV)


def _is_among(ids: tuple[int, ...], vocab: int) -> Bool[jax.Array, "1 V"]:
    """Mark ids. A constant of the program: to compare with each of them would be as many passes over V."""
    return jnp.asarray(np.isin(np.arange(vocab), ids))[None]


def partition(logits_CV: Float[jax.Array, "C V"], keep_CV: Bool[jax.Array, "C V"] | None = None) -> Partition:
    """Sum up the tokens kept (None: all) of float32 logits, in two passes: maximum, then sums."""
    if keep_CV is not None:
        logits_CV = jnp.where(keep_CV, logits_CV, -jnp.inf)
    top_C1 = logits_CV.max(-1, keepdims=True)
    below_CV = logits_CV - top_C1
    p_CV = jnp.exp(below_CV)
    sums_CN = block_sums(p_CV)
    total_C = sums_CN.sum(-1)
    # A token left out has p = 0 at a logit of -inf, and their product would be NaN.
    finite_CV = below_CV
    if keep_CV is not None:
        finite_CV = jnp.where(keep_CV, below_CV, 0.0)
    # H = log(sum p) - sum(p * below) / sum p, from what is there already: normalising p first would be another pass over V.
    log_total_C = jnp.log(total_C)
    entropy_C = log_total_C - block_sums(p_CV * finite_CV).sum(-1) / total_C
    return Partition(log_total_C + top_C1[:, 0], entropy_C, top_C1, sums_CN)


def score(
    logits_CV: Float[jax.Array, "C V"],
    keep_CV: Bool[jax.Array, "C V"] | None,
    token_C: Int[jax.Array, " C"],
    tiles: Tiles | None,
) -> tuple[Float[jax.Array, " C"], Float[jax.Array, " C"], Float[jax.Array, " C"]]:
    """Compute the log-probability of tokens, and the sums that it takes.

    Args:
      logits_CV, keep_CV: as in `partition`. token_C: of each position. tiles: of exact numbers; None: all positions at once.
    Returns: (logp_C, entropy_C, log_z_C), nats.
    """

    def of_rows(_: None, rows: Any) -> Any:
        logits_CV, keep_CV, token_C = rows
        sums = partition(logits_CV, keep_CV)
        logp_C = jnp.take_along_axis(logits_CV, token_C[:, None], -1)[:, 0] - sums.log_z_C
        return logp_C, sums.entropy_C, sums.log_z_C

    rows = logits_CV, keep_CV, token_C
    return of_rows(None, rows) if tiles is None else in_tiles(of_rows, tiles.rows, None, rows)


# ------------------------------------------------------------------------------------------------------------- the cuts


def support_threshold(logits_BV: Float[jax.Array, "B V"], sampling: Sampling) -> Float[jax.Array, " B"]:
    """Find the smallest logit kept: of the top_k largest, the fewest that reach top_p together, none below min_p of the best.

    Args:
      logits_BV: float32, divided by the temperature; -inf where ruled out.
      sampling: top_p is relative to what top_k leaves.
    Returns: float32 [B]; a token is in the support if its logit is not below. NaN where a logit is.
    """
    top_B1 = logits_BV.max(-1, keepdims=True)
    # Without a limit of ranks all of V would have to be sorted: a search for the threshold itself needs no order.
    if sampling.top_k > 0:
        threshold_B = _threshold_of_ranks(logits_BV, sampling)
    elif sampling.top_p < 1:
        p_BV = jnp.exp(logits_BV - top_B1)
        limit_B = sampling.top_p * block_sums(p_BV).sum(-1)
        threshold_B = least_kept(logits_BV, lambda t_B1: block_sums(jnp.where(logits_BV > t_B1, p_BV, 0)).sum(-1), limit_B)
    else:
        threshold_B = jnp.full(len(logits_BV), -jnp.inf)
    if sampling.min_p > 0:
        threshold_B = jnp.maximum(threshold_B, top_B1[:, 0] + math.log(sampling.min_p))
    threshold_B = jnp.maximum(threshold_B, jnp.finfo(jnp.float32).min)
    # A ranking would pass over a NaN, and what is left would look like a distribution.
    return jnp.where(jnp.isnan(top_B1[:, 0]), jnp.nan, threshold_B)


def _threshold_of_ranks(logits_BV: Float[jax.Array, "B V"], sampling: Sampling) -> Float[jax.Array, " B"]:
    """Find the smallest logit that top_k, and top_p of what it leaves, keep."""
    ranked_BJ = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0]
    if sampling.top_p >= 1:
        return ranked_BJ[:, -1]
    p_BJ = jax.nn.softmax(ranked_BJ, axis=-1)
    is_needed_BJ = jnp.cumsum(p_BJ, -1) - p_BJ < sampling.top_p  # the mass before it falls short: always true of the first
    return jnp.where(is_needed_BJ, ranked_BJ, jnp.inf).min(-1)


def support_like(
    logits_CV: Float[jax.Array, "C V"], targets_C: Int[jax.Array, " C"], support_C: Int[jax.Array, " C"], top_k: int
) -> Bool[jax.Array, "C V"]:
    """Rebuild the sampler's support by the learner's ranking: the target and its support_C - 1 best rivals.

    The target always belongs, so that its log-probability stays finite and continuous as the policy moves.

    Args:
      logits_CV: float32, the learner's, divided by the temperature; -inf where ruled out.
      targets_C: the tokens that were drawn. support_C: tokens that the sampler kept.
      top_k: the sampler's, 0 for all of V.
    Returns: bool [C, V], True on the tokens kept.
    """
    vocab = logits_CV.shape[-1]
    is_target_CV = jnp.arange(vocab)[None] == targets_C[:, None]
    rivals_CV = jnp.where(is_target_CV, -jnp.inf, logits_CV)
    if top_k > 0:
        ranked_CJ = jax.lax.top_k(rivals_CV, min(top_k, vocab))[0]
        # Logits tied at the threshold can make the support larger than top_k; the last rank's value then stands for all.
        last_rank_C = jnp.clip(support_C - 2, 0, ranked_CJ.shape[-1] - 1)
        last_C = jnp.take_along_axis(ranked_CJ, last_rank_C[:, None], -1)[:, 0]
    else:
        last_C = least_kept(rivals_CV, lambda t_C1: (rivals_CV > t_C1).sum(-1), jnp.maximum(support_C - 1, 1))
    threshold_C1 = jnp.where(support_C > 1, last_C, jnp.inf)[:, None]
    return is_target_CV | ((rivals_CV >= threshold_C1) & (rivals_CV > -jnp.inf))


# ------------------------------------------------------------------------------------------------------------- the draw


def draw(
    logits_BV: Float[jax.Array, "B V"],
    keys_B: Key[jax.Array, " B"],
    sampling: Sampling,
    t_B: Int[jax.Array, " B"] | None = None,
    seen_BV: Bool[jax.Array, "B V"] | None = None,
    tiles: Tiles | None = None,
    hardware: Hardware | None = None,
) -> Draw:
    """Draw a token a row, each row with its own key (so that results do not depend on how rows are spread over devices).

    Args:
      logits_BV: before the temperature. keys_B: random keys; greedy draws do not use them.
      sampling: the distribution.
      t_B: places in the completions, from 0; read if `sampling` rules tokens out. seen_BV: as in `repetition_factor`; read if
        there is a penalty.
      tiles: as in `score`. hardware: accelerators that may have a kernel for it; None: CPUs.
    Returns: a Draw, [B]. Greedy draws report log-probability and entropy at temperature 1, over all of V.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    vocab = logits_BV.shape[-1]
    if not sampling.is_greedy:
        logits_BV = logits_BV / sampling.temperature
    if sampling.has_penalty:
        assert seen_BV is not None
        logits_BV = logits_BV * repetition_factor(logits_BV, seen_BV, sampling.repetition_penalty)
    keep_BV, support_B = None, jnp.full(len(logits_BV), vocab)
    if sampling.rules_out:
        assert t_B is not None
        keep_BV = allowed_tokens(t_B, sampling, vocab)
        logits_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
    if sampling.is_cut:
        keep_BV = logits_BV >= support_threshold(logits_BV, sampling)[:, None]
        logits_BV = jnp.where(keep_BV, logits_BV, -jnp.inf)
    if keep_BV is not None:
        support_B = keep_BV.sum(-1)
    if hardware is not None and tiles is None and not sampling.is_greedy and tpu_draw.suits(hardware, vocab):
        token_B, logp_B, entropy_B = tpu_draw.draw_tokens(hardware, logits_BV, uniforms(keys_B))
        return Draw(token_B, logp_B, entropy_B, support_B.astype(jnp.int32))
    sums = partition(logits_BV, keep_BV)
    if sampling.is_greedy:
        token_B = argmax(logits_BV)
    else:
        # One key for the whole block would make a row's numbers depend on how many rows this device has.
        token_B = pick_token(logits_BV, sums.top_C1, sums.sums_CN, uniforms(keys_B))
    if tiles is not None:  # whatever the draw itself was by, what it is said to be worth is what the learner will find
        logp_B, entropy_B, _ = score(logits_BV, keep_BV, token_B, tiles)
        return Draw(token_B.astype(jnp.int32), logp_B, entropy_B, support_B.astype(jnp.int32))
    logp_B = jnp.take_along_axis(logits_BV, token_B[:, None], -1)[:, 0] - sums.log_z_C
    return Draw(token_B.astype(jnp.int32), logp_B, sums.entropy_C, support_B.astype(jnp.int32))
