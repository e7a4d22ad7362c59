"""What crosses from one stage to the next, and the letters its axes are named by.

    P  prompts of a batch             S  prompt slots (left-padded)
    G  completions of each prompt     T  completion slots (right-padded)
    B  rows, P * G, groups contiguous V  vocabulary
    D  model width   N  query heads   K  key/value heads   H  head width   L  layers

Everything here is a pytree with the prompt axis first, so that sharding over devices, cutting into minibatches and
dynamic sampling are all operations on axis 0 and a group is never torn apart by accident.
"""

from __future__ import annotations

from typing import Any

import flax.struct
import jax
from flax.traverse_util import flatten_dict, unflatten_dict

AxisName = str | tuple[str, ...]  # one or several axes of a mesh
Params = Any  # nested dict of arrays: the trainable part of an NNX module, as `nnx.to_pure_dict` gives it


@flax.struct.dataclass
class Prompts:
    """What a task hands to the rollout.

    tokens_PS: int32, left-padded. mask_PS: bool, True on real tokens (at least one a row).
    answer: whatever the task's reward needs, leading axis P (traceable tasks: arrays; host tasks: int32 row numbers).
    """

    tokens_PS: Any
    mask_PS: Any
    answer: Any


@flax.struct.dataclass
class Rollout:
    """G completions of each prompt, with what the sampler knew when it drew them.

    tokens_PGT: int32, pad id after the stop token. mask_PGT: float32, 1 through the stop token *included*.
    sampler_logp_PGT, entropy_PGT: float32, nats, of the distribution sampled from (temperature, top-k and top-p included).
    support_PGT: int32, how many tokens that distribution kept; None when nothing was cut off (no top-k, no top-p).
    is_truncated_PG: bool, ran into the length limit without a stop token.
    """

    prompts: Prompts
    tokens_PGT: Any
    mask_PGT: Any
    sampler_logp_PGT: Any
    entropy_PGT: Any
    support_PGT: Any
    is_truncated_PG: Any


@flax.struct.dataclass
class Reward:
    """What a task says about the completions of a round.

    task_PG: float32, what counts: success, dynamic sampling and O+/O- look at this one only.
    shaping_PG: float32, only added to what the advantage is computed from. metrics: the task's own, name -> Metric.
    """

    task_PG: Any
    shaping_PG: Any
    metrics: Any


@flax.struct.dataclass
class Batch:
    """A rollout with its rewards: all that an update needs.

    task_reward_PG: float32, what the task says; success, O+/O- and dynamic sampling look at this one only.
    reward_PG: float32, task reward plus shaping and overlong punishment; what the advantage is computed from.
    sampled_at_P: int32, the step whose policy sampled the group (older than the current one: it waited in the buffer).
    """

    rollout: Rollout
    task_reward_PG: Any
    reward_PG: Any
    sampled_at_P: Any


@flax.struct.dataclass
class GroupBuffer:
    """Informative groups waiting to be trained on (dynamic sampling). Static shape; slots from `count` on are undefined."""

    batch: Batch
    count: Any  # int32 scalar


@flax.struct.dataclass
class Hyperparams:
    """Numbers of a config that no shape and no branch of a program depends on: data of the state, not constants of the program.

    Runs that differ in these alone share their compiled programs, and many such runs are one run vmapped over states.
    seed: int32. The others: float32 scalars, named as the config names them. kl_coef is never 0 where there is a reference.
    """

    seed: Any
    clip_low: Any
    clip_high: Any
    kl_coef: Any
    entropy_weight: Any
    learning_rate: Any
    weight_decay: Any
    max_grad_norm: Any


@flax.struct.dataclass
class TrainState:
    """Everything that changes while a run goes on; the whole of it is checkpointed.

    step: int32, updates done. num_prompts_drawn: int32, the data position.
    params: what is trained: all weights, or LoRA's adapters. base: the frozen weights under the adapters, else None.
    ref_params: the reference policy; None unless kl_coef > 0, and with LoRA, whose base it is.
    pending: groups that dynamic sampling found beyond the batch; None when it is off.
    next_batch: the batch of the next update, sampled one step early; None without async_steps.
    hyperparams: see there; None only in checkpoints and in states that nothing is trained with.
    `base`, `ref_params` and `hyperparams` never change and are left out of checkpoints.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    base: Params | None
    ref_params: Params | None
    num_prompts_drawn: jax.Array
    pending: GroupBuffer | None
    next_batch: Batch | None = None
    hyperparams: Hyperparams | None = None

    @property
    def policy(self) -> Params:
        """All weights of the policy."""
        return join_params(self.base, self.params)


def join_params(base: Params | None, trained: Params) -> Params:
    """Frozen and trained weights, which have no leaf in common, as one tree."""
    return trained if base is None else unflatten_dict({**flatten_dict(base), **flatten_dict(trained)})
