"""What is maximised: one choice on each of a few independent axes. It knows the names of the choices, not the functions."""

from __future__ import annotations

import dataclasses
import math

import jax

Number = float | jax.Array  # an array where it is a number of the state, inside a compiled step


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is maximised. The defaults are GRPO (Shao et al., arXiv 2402.03300).

    advantage: how rewards become credit. ratio: importance ratio, per token or per sequence. surrogate: what is made of
    ratio and advantage. clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]. dual_clip: c > 1, for
    A < 0 the surrogate is at least c A (None: unbounded). aggregation: per-token objective -> scalar. kl_coef: weight of
    the penalty towards the reference (0: no reference model exists), estimated by kl_estimator. std_ddof, adv_eps: the std
    is sqrt(sum sq / (n - ddof)) + adv_eps. success_threshold: a task reward from here on is a success (O+).
    entropy_floor (nats), entropy_clip (low, high in nats, or None): bounds on the entropy in the shaped rewards.
    base_weight, entropy_weight: a1, a2 of GTPO and b1, b2 of GRPO-S. stat_scope: over what the shaped rewards are
    normalised. sequence_mean_kind: how GRPO-S averages entropy over a row. include_other_side: whether the other side's
    zeros belong to the shaped rewards' statistics (False is a mistaken reading, for comparison).
    """

    advantage: str = "group_norm"
    ratio: str = "token"
    surrogate: str = "ppo_clip"
    clip_low: Number = 0.2
    clip_high: Number = 0.2
    dual_clip: float | None = None
    aggregation: str = "sequence_mean"
    kl_coef: Number = 0.04
    kl_estimator: str = "k3"
    std_ddof: int = 1
    adv_eps: float = 1e-6
    success_threshold: float = 0.5
    entropy_floor: float = 1e-4
    entropy_clip: tuple[float, ...] | None = None
    base_weight: float = 1.0
    entropy_weight: Number = 0.1
    stat_scope: str = "batch"
    sequence_mean_kind: str = "arithmetic"
    include_other_side: bool = True

    def __post_init__(self) -> None:
        at_least = {"clip_low": 0, "clip_high": 0, "kl_coef": 0, "std_ddof": 0, "adv_eps": 0, "entropy_weight": 0}
        for field, low in at_least.items():
            value = getattr(self, field)
            if isinstance(value, jax.Array):  # a number of the state: it was checked with its config
                continue
            if not (value >= low and math.isfinite(value)):
                raise ValueError(f"objective.{field} = {value!r}: must be a finite number >= {low}")
        if self.entropy_floor <= 0:
            raise ValueError(f"objective.entropy_floor = {self.entropy_floor!r}: must be > 0 nats (1/H is taken)")
        if self.dual_clip is not None and not (self.dual_clip > 1 and math.isfinite(self.dual_clip)):
            raise ValueError(f"objective.dual_clip = {self.dual_clip!r}: must be None or a finite number > 1")
        if self.entropy_clip is not None:
            clip = tuple(self.entropy_clip)
            if len(clip) != 2 or not 0 <= clip[0] <= clip[1]:
                raise ValueError(f"objective.entropy_clip = {self.entropy_clip!r}: must be None or (low, high), 0 <= low")
            object.__setattr__(self, "entropy_clip", clip)  # a list would not be hashable

    @property
    def has_kl(self) -> bool:
        """Whether there is a KL term, and so a reference. A traced coefficient is one: 0 is never traced."""
        return not isinstance(self.kl_coef, int | float) or self.kl_coef > 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the advantage reads the sampling policy's entropy."""
        return self.advantage in ("token_entropy", "sequence_entropy")
