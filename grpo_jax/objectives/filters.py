"""Filters: of the rows that are compared, before the advantage, and of the tokens that keep it, after it.

A filter leaves the denominators alone: what it drops has advantage 0 and counts as a token without credit. Both kinds look at
the whole batch, so they come before any split into microbatches.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Bool

from grpo_jax.masking import masked_mean
from grpo_jax.objectives.functions import Function
from grpo_jax.objectives.groups import Groups, Tokens
from grpo_jax.objectives.variants import Objective


def shortest(obj: Objective, groups: Groups) -> Bool[jax.Array, "P G"]:
    """Keep the `keep_rows` shortest rows of each group (GFPO, arXiv 2508.09726). Rows of equal length stay together."""
    return _lowest(groups.mask_PGT.sum(-1), groups.has_tokens_PG, obj.keep_rows)


def efficient(obj: Objective, groups: Groups) -> Bool[jax.Array, "P G"]:
    """Keep the `keep_rows` rows with the highest reward a token (GFPO's token efficiency). Equal ones stay together."""
    lengths_PG = jnp.maximum(groups.mask_PGT.sum(-1), 1.0)
    return _lowest(-groups.reward_PG / lengths_PG, groups.has_tokens_PG, obj.keep_rows)


def _lowest(key_PG, rows_PG, num: int):
    """Mark the rows whose key is at most the num-th lowest among the rows that count."""
    # Ties are kept whole: which of two equal rows came first says nothing about them.
    ordered_PG = jnp.sort(jnp.where(rows_PG, key_PG, jnp.inf), axis=1)
    bound_P1 = ordered_PG[:, min(num, ordered_PG.shape[1]) - 1][:, None]
    return rows_PG & (key_PG <= bound_P1)


ROW_FILTERS: Mapping[str, Function] = MappingProxyType({"shortest": shortest, "efficient": efficient})


def top_entropy(obj: Objective, tokens: Tokens) -> Bool[jax.Array, "B T"]:
    """Keep the `token_share` of the batch's tokens that have the highest entropy ("80/20", arXiv 2506.01939).

    The bound is the quantile 1 - token_share, interpolated linearly as TRL's is.
    """
    assert tokens.entropy_BT is not None, "`advantages` checks it"
    ordered, count = _ordered(tokens.entropy_BT, tokens)
    place = (1.0 - obj.token_share) * jnp.maximum(count - 1, 0)
    below = jnp.floor(place).astype(jnp.int32)
    low, high = ordered[below], ordered[jnp.minimum(below + 1, jnp.maximum(count - 1, 0))]
    # Where both neighbours are one number the bound is that number: its rounding would drop a token that ties with it.
    bound = jnp.where(low == high, low, low + (high - low) * (place - below))
    return tokens.entropy_BT >= bound


def low_covariance(obj: Objective, tokens: Tokens) -> Bool[jax.Array, "B T"]:
    """Drop the `cov_share` of tokens whose log-probability and advantage go together most (Clip-Cov, arXiv 2505.22617).

    cov = (A - mean A)(logp - mean logp) over the batch's tokens; of those inside `cov_range` the highest are dropped.
    Differs from source: the highest instead of a random choice, and logp of the start of the update instead of the current one,
    so that the choice depends neither on chance nor on how the batch is split.
    """
    low, high = obj.cov_range
    cov_BT = covariance(tokens)
    inside_BT = (cov_BT > low) & (cov_BT < high) & (tokens.mask_BT > 0)
    return ~_highest(cov_BT, inside_BT, obj.cov_share, tokens)


def high_covariance(obj: Objective, tokens: Tokens) -> Bool[jax.Array, "B T"]:
    """Mark the `cov_share` of tokens with the highest covariance, which KL-Cov penalises (arXiv 2505.22617).

    Differs from source: logp of the start of the update instead of the current one.
    """
    return _highest(covariance(tokens), tokens.mask_BT > 0, obj.cov_share, tokens)


def covariance(tokens: Tokens) -> jax.Array:
    """Compute (A - mean A)(logp - mean logp) of each token, the means over the global batch's tokens."""
    assert tokens.logp_BT is not None, "`advantages` checks it"
    centred = (x_BT - masked_mean(x_BT, tokens.mask_BT, axis_name=tokens.axis_name) for x_BT in (tokens.adv_BT, tokens.logp_BT))
    adv_BT, logp_BT = centred
    return adv_BT * logp_BT


def _highest(x_BT, chosen_BT, share: float, tokens: Tokens):
    """Mark the highest of the chosen tokens, as many as are `share` of all tokens of the batch and at least one."""
    ordered, count = _ordered(jnp.where(chosen_BT, -x_BT, jnp.inf), tokens)
    num = jnp.maximum(jnp.floor(share * count).astype(jnp.int32), 1)
    return chosen_BT & (-x_BT <= ordered[num - 1])


def _ordered(x_BT, tokens: Tokens):
    """Sort the values of all tokens of the global batch, the lowest first; masked ones are inf. -> (sorted, how many count)."""
    values = jnp.where(tokens.mask_BT > 0, x_BT, jnp.inf).reshape(-1)
    count = (tokens.mask_BT > 0).sum()
    if tokens.axis_name:
        values = jax.lax.all_gather(values, tokens.axis_name, tiled=True)
        count = jax.lax.psum(count, tokens.axis_name)
    return jnp.sort(values), count


TOKEN_FILTERS: Mapping[str, Function] = MappingProxyType({"top_entropy": top_entropy, "low_covariance": low_covariance})
