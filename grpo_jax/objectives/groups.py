"""The inputs of advantages and of filters: a batch by groups, and its tokens."""

from __future__ import annotations

from typing import NamedTuple

import jax

from grpo_jax.types import AxisName


class Groups(NamedTuple):
    """The inputs in group layout.

    reward_PG, mask_PGT: float32. entropy_PGT: float32, nats, bounded, 1 where masked; None if it was not given.
    is_success_PG: True in O+.
    has_tokens_PG: False on dropped rows, which no statistic counts. axis_name: mesh axis of batch statistics, or None.
    parts_PGK: float32, what the reward is made of; None if it was not given.
    step_reward_PGT: float32, the reward of a step at its last token, UNKNOWN elsewhere; None if it was not given.
    """

    reward_PG: jax.Array
    is_success_PG: jax.Array
    mask_PGT: jax.Array
    entropy_PGT: jax.Array | None
    has_tokens_PG: jax.Array
    axis_name: AxisName | None
    parts_PGK: jax.Array | None = None
    step_reward_PGT: jax.Array | None = None


class Tokens(NamedTuple):
    """The inputs of a filter of tokens, [B, T] and finite where masked.

    adv_BT: advantages before the filter. mask_BT: 1 on completion tokens of the rows that are compared.
    entropy_BT, logp_BT: nats, of the policy at the start of the update; None if not given. axis_name: mesh axes, or None.
    """

    adv_BT: jax.Array
    mask_BT: jax.Array
    entropy_BT: jax.Array | None
    logp_BT: jax.Array | None
    axis_name: AxisName | None
