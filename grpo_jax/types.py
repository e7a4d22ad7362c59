"""The data that crosses from one stage to the next, and the letters that name its axes.

    P  prompts                        G  completions of each prompt      B  rows, P * G, a group's side by side
    S  prompt slots (left-padded)     T  completion slots (right-padded) U  slots of a key/value cache
    V  vocabulary                     A  slots of an answer's tokens
    D  model width                    H  head width                      L  layers
    N  query heads                    K  key/value heads                 R  query heads of each key/value head
    O  outputs of a matrix            I  inputs of a matrix
    F  flattened positions, P * G * T C  positions of a chunk of them    J  ranks of sorted logits, the largest first
    W  rows of a decoding loop that has fewer than B
    E  evaluations along a run        M  seeds of a setting              Z  bootstrap resamples
    X  experts of a token, of all layers
    1  an axis of that size           x  any axes, in statistics

An array's name ends in its axes: `adv_BT`, `first_logits_PV`.

Everything here is a pytree with the prompt axis first, so that sharding over devices, minibatches and dynamic sampling are all
operations on axis 0 and a group is never torn apart by accident.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.struct
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool, Float, Int, PyTree, Shaped, UInt

Arrays = jax.Array | np.ndarray  # on a device, or on the host
# An array; but trees of the same classes also hold shapes, shardings, specs or None in its place, to compile a program or to
# restore a checkpoint before any array exists. So nothing checks these fields when an object is made.
Leaf = Any
UNKNOWN = -1e9  # a token's credit that a task cannot tell; no NaN, for which checkpoints are not saved
AxisName = str | tuple[str, ...]  # one or several axes of a mesh
Params = Any  # nested dict of arrays: the trainable part of an NNX module, as `nnx.to_pure_dict` gives it


class LongRows(NamedTuple):
    """A promise about the rows of prompts on each device: all but `num` have their tokens in the last `short_tokens` slots."""

    num: int
    short_tokens: int


@flax.struct.dataclass
class Prompts:
    """Prompts as a task hands them to the rollout.

    tokens_PS: int32, left-padded. mask_PS: True on real tokens (at least one a row).
    answer: whatever the task's reward needs (traceable tasks: arrays; host tasks: int32 row numbers).
    long_rows: static; if few rows are long, programs compute the others at a width of their own (`rollout.prompt_parts`).
    """

    tokens_PS: Int[Leaf, "P S"]
    mask_PS: Bool[Leaf, "P S"]
    answer: Shaped[Leaf, "P ..."]
    long_rows: LongRows | None = flax.struct.field(pytree_node=False, default=None)


@flax.struct.dataclass
class Rollout:
    """G completions of each prompt, with what the sampler knew when it drew them.

    tokens_PGT: int32, pad id after the stop token. mask_PGT: float32, 1 through the stop token *included*.
    sampler_logp_PGT, entropy_PGT: float32, nats, of the distribution sampled from (temperature, top-k and top-p included).
    support_PGT: int32, how many tokens that distribution kept; None when it kept all (no top-k, no top-p).
    is_truncated_PG: True if the completion ran into the length limit without a stop token.
    experts_PGTX: the experts that took each token as the sampler read it, of all layers, as `experts.choices_of` writes them; 0
      where it read none, as of a completion's last token. None in a model without experts.
    """

    prompts: Prompts
    tokens_PGT: Int[Leaf, "P G T"]
    mask_PGT: Float[Leaf, "P G T"]
    sampler_logp_PGT: Float[Leaf, "P G T"]
    entropy_PGT: Float[Leaf, "P G T"]
    support_PGT: Int[Leaf, "P G T"] | None
    is_truncated_PG: Bool[Leaf, "P G"]
    experts_PGTX: UInt[Leaf, "P G T X"] | None = None


@flax.struct.dataclass
class Reward:
    """A task's rewards for the completions of a round.

    task_PG: float32, what counts: success, dynamic sampling and O+/O- look at this one only.
    shaping_PG: float32, only added to what the advantage is computed from. metrics: the task's own, name -> Metric.
    is_scored_PG: False where there is no score, because a part of it failed, came late or was withheld; None: all have one.
    has_task_score_PG: the same of the task's parts alone, without shaping; held-out evaluation looks at this one.
    """

    task_PG: Float[Arrays, "P G"]
    shaping_PG: Float[Arrays, "P G"]
    metrics: Mapping[str, Any]
    is_scored_PG: Bool[Arrays, "P G"] | None = None
    has_task_score_PG: Bool[Arrays, "P G"] | None = None


@flax.struct.dataclass
class Batch:
    """A rollout with its rewards: all that an update needs.

    task_reward_PG: float32, the task's own; success, O+/O- and dynamic sampling look at this one only.
    reward_PG: float32, task reward plus shaping and overlong punishment; what the advantage is computed from.
    sampled_at_P: int32, the step whose policy sampled the group (older than the current one: it waited in the buffer).
    is_scored_PG: False on rows without a score: they are in no statistic and in no loss, and their rewards mean nothing.
      None, in batches made by hand: all have one.
    credit_PGT: float32, each token's true advantage, by a task that knows it (UNKNOWN where it does not); None: no task does.
    step_reward_PGT: float32, reward of a written step at its last token, UNKNOWN elsewhere; None: the objective reads none.
    """

    rollout: Rollout
    task_reward_PG: Float[Leaf, "P G"]
    reward_PG: Float[Leaf, "P G"]
    sampled_at_P: Int[Leaf, " P"]
    is_scored_PG: Bool[Leaf, "P G"] | None = None
    credit_PGT: Float[Leaf, "P G T"] | None = None
    step_reward_PGT: Float[Leaf, "P G T"] | None = None


@flax.struct.dataclass
class GroupBuffer:
    """Informative groups that wait to be trained on (dynamic sampling).

    The number of slots is static, as compiled programs need it; slots from `count` (int32) on are undefined.
    """

    batch: Batch
    count: Int[Leaf, ""]


@flax.struct.dataclass
class Hyperparams:
    """Numbers of a config that no shape and no branch of a program depends on: data of the state, not constants of the program.

    Runs that differ in these alone share their compiled programs, and many such runs are one run vmapped over states.
    seed: int32. The others: float32 scalars, named as the config names them. kl_coef is never 0 where there is a reference.
    params: name -> scalar, those of `objective.params`. objective: int32, place of the run's among several of one program;
    None: the program has one.
    """

    seed: Int[Leaf, ""]
    clip_low: Float[Leaf, ""]
    clip_high: Float[Leaf, ""]
    kl_coef: Float[Leaf, ""]
    entropy_weight: Float[Leaf, ""]
    learning_rate: Float[Leaf, ""]
    weight_decay: Float[Leaf, ""]
    max_grad_norm: Float[Leaf, ""]
    params: Mapping[str, Float[Leaf, ""]] = flax.struct.field(default_factory=dict)
    objective: Int[Leaf, ""] | None = None


@flax.struct.dataclass
class Adapted:
    """Numbers of the objective that training moves by itself, one step an update; None where the objective has it fixed.

    entropy_coef: float32, weight of the entropy bonus, with `objective.entropy_target`.
    length_exponent: float32, lambda of "length_preference", with `objective.length_exponent_rate`.
    """

    entropy_coef: Float[Leaf, ""] | None = None
    length_exponent: Float[Leaf, ""] | None = None


@flax.struct.dataclass
class TrainState:
    """Everything that changes while a run goes on, and the frozen weights beside it.

    step: int32, updates done. num_prompts_drawn: int32, the data position.
    params: what is trained: all weights, or LoRA's adapters. base: the frozen weights under the adapters, else None.
    ref_params: the reference policy; None without a KL, with LoRA, whose base it is, and where it moves (moving_ref).
    pending: groups that dynamic sampling found beyond the batch; None when it is off.
    next_batch: the batch of the next update, sampled async_steps earlier; None without them.
    later_batches: those behind it, in their order.
    hyperparams: see there; None only in checkpoints and in states that nothing is trained with.
    adapted: see there; None where the objective has all its numbers fixed.
    moving_ref: what the policy's params were when the reference was last refreshed; None without learner.ref_every.
    Checkpoints hold all of it but `base`, `ref_params` and `hyperparams`, which never change.
    """

    step: Int[jax.Array, ""]
    params: Params
    opt_state: PyTree
    base: Params | None
    ref_params: Params | None
    num_prompts_drawn: Int[jax.Array, ""]
    pending: GroupBuffer | None
    next_batch: Batch | None = None
    later_batches: tuple[Batch, ...] = ()
    hyperparams: Hyperparams | None = None
    adapted: Adapted | None = None
    moving_ref: Params | None = None

    @property
    def policy(self) -> Params:
        """All weights of the policy."""
        return join_params(self.base, self.params)


def join_params(base: Params | None, trained: Params) -> Params:
    """Merge frozen and trained weights, which have no leaf in common, into one tree."""
    if base is None:
        return trained
    return unflatten_dict({**flatten_dict(base), **flatten_dict(trained)})
