"""A variant is data: one choice on each of a few independent axes. This table is all that tells the variants apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from grpo_jax.objectives.advantages import ADVANTAGES
from grpo_jax.objectives.aggregation import AGGREGATIONS
from grpo_jax.objectives.ratios import KL_ESTIMATORS, RATIOS
from grpo_jax.objectives.surrogates import CLIPPED_RATIO, SURROGATES

CHOICES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "advantage": tuple(ADVANTAGES),
        "ratio": tuple(RATIOS),
        "surrogate": tuple(SURROGATES),
        "kl_estimator": tuple(KL_ESTIMATORS),
        "aggregation": tuple(AGGREGATIONS),
        "stat_scope": ("batch", "group"),
        "sequence_mean_kind": ("arithmetic", "geometric"),
        "shaped_zeros": ("kept", "left_out"),
    }
)


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
    normalised. sequence_mean_kind: how GRPO-S averages entropy over a row. shaped_zeros: whether the other side's zeros
    belong to the shaped rewards' statistics ("left_out" is a mistaken reading, for comparison).
    """

    advantage: str = "group_norm"
    ratio: str = "token"
    surrogate: str = "ppo_clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    aggregation: str = "sequence_mean"
    kl_coef: float = 0.04
    kl_estimator: str = "k3"
    std_ddof: int = 1
    adv_eps: float = 1e-6
    success_threshold: float = 0.5
    entropy_floor: float = 1e-4
    entropy_clip: tuple[float, ...] | None = None
    base_weight: float = 1.0
    entropy_weight: float = 0.1
    stat_scope: str = "batch"
    sequence_mean_kind: str = "arithmetic"
    shaped_zeros: str = "kept"

    def __post_init__(self) -> None:
        for field, known in CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(f"objective.{field} = {getattr(self, field)!r}: unknown; known: {', '.join(known)}")
        at_least = {"clip_low": 0, "clip_high": 0, "kl_coef": 0, "std_ddof": 0, "adv_eps": 0, "entropy_weight": 0}
        for field, low in at_least.items():
            value = getattr(self, field)
            if not (value >= low and math.isfinite(value)):
                raise ValueError(f"objective.{field} = {value!r}: must be a finite number >= {low}")
        if self.entropy_floor <= 0:
            raise ValueError(f"objective.entropy_floor = {self.entropy_floor!r}: must be > 0 nats (1/H is taken)")
        if self.dual_clip is not None and not (self.dual_clip > 1 and math.isfinite(self.dual_clip)):
            raise ValueError(f"objective.dual_clip = {self.dual_clip!r}: must be None or a finite number > 1")
        if self.dual_clip is not None and self.surrogate not in CLIPPED_RATIO:
            raise ValueError(
                f"objective.dual_clip = {self.dual_clip!r}: surrogate {self.surrogate!r} has no gradient through a ratio "
                "to bound, set it to None"
            )
        if self.entropy_clip is not None:
            clip = tuple(self.entropy_clip)
            if len(clip) != 2 or not 0 <= clip[0] <= clip[1]:
                raise ValueError(f"objective.entropy_clip = {self.entropy_clip!r}: must be None or (low, high), 0 <= low")
            object.__setattr__(self, "entropy_clip", clip)  # a list would not be hashable

    @property
    def has_kl(self) -> bool:
        """Whether there is a KL term, and so a reference. A traced coefficient (`cohort`) is one: 0 is never traced."""
        return not isinstance(self.kl_coef, int | float) or self.kl_coef > 0

    @property
    def needs_entropy(self) -> bool:
        """Whether the advantage reads the sampling policy's entropy."""
        return self.advantage in ("token_entropy", "sequence_entropy")


_DECOUPLED: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}

_GRPO = Objective()
_DAPO = Objective(**_DECOUPLED, aggregation="token_mean", kl_coef=0.0)
_DR_GRPO = Objective(advantage="group_center", aggregation="constant")
_REINFORCE_PP = Objective(advantage="batch_norm", aggregation="token_mean", kl_coef=0.0)

# The same algorithms with the constants of a paper or a framework's source: docs/variants.md, "Where constants come from".
PRESETS: Mapping[str, Objective] = MappingProxyType(
    {
        # Group mean as baseline before the batch's scale (REINFORCE++ with baseline).
        "reinforce_pp_baseline": dataclasses.replace(_REINFORCE_PP, advantage="group_center_batch_norm"),
        # The papers' equations divide by the bare std; ours guards a group without spread by itself.
        "deepseekmath": dataclasses.replace(_GRPO, adv_eps=0.0),
        "dapo_paper": dataclasses.replace(_DAPO, adv_eps=0.0),
        "dr_grpo_paper": dataclasses.replace(_DR_GRPO, kl_coef=0.0),
        # TRL 1.16.0, GRPOConfig: loss_type "dapo", scale_rewards "group", beta 0, epsilon 0.2 both ways.
        "trl_default": Objective(aggregation="token_mean", kl_coef=0.0, adv_eps=1e-4),
        # verl 0.9.1, ppo_trainer.yaml with algorithm.adv_estimator=grpo: token-mean, no KL, clip_ratio_c 3.
        "verl_default": Objective(aggregation="token_mean", kl_coef=0.0, dual_clip=3.0),
        # google-tunix 0.1.7, GRPOConfig: beta 0.04 on kl_loss_mode "kl", which is k1.
        "tunix_default": Objective(kl_estimator="k1"),
    }
)

VARIANTS: Mapping[str, Objective] = MappingProxyType(
    {
        # Shao et al., DeepSeekMath, arXiv 2402.03300, eq. 3 with outcome supervision.
        "grpo": _GRPO,
        # Yu et al., arXiv 2503.14476, eqs. 8-12; its dynamic sampling and overlong punishment are not part of the loss.
        "dapo": _DAPO,
        # Liu et al., arXiv 2503.20783. Differs from source: a KL term is kept; kl_coef = 0 gives the paper's objective.
        "dr_grpo": _DR_GRPO,
        # Tan et al., arXiv 2508.04349, eqs. 2-5 (not the trajectory- or turn-level methods of the same name).
        "gtpo": Objective(advantage="token_entropy", **_DECOUPLED, aggregation="token_mean", kl_coef=0.0),
        # The same paper, eqs. 6-8.
        "grpo_s": Objective(advantage="sequence_entropy", ratio="sequence", **_DECOUPLED, kl_coef=0.0, stat_scope="group"),
        # Zheng et al., arXiv 2507.18071: the proof that the axes compose.
        "gspo": Objective(ratio="sequence_geometric", clip_low=3e-4, clip_high=4e-4, kl_coef=0.0),
        # Ahmadian et al., arXiv 2402.14740. Differs from source: its KL is part of the reward, here there is none.
        "rloo": Objective(advantage="leave_one_out", surrogate="reinforce", aggregation="sequence_sum", kl_coef=0.0),
        # Hu et al., arXiv 2501.03262. Differs from source: its KL is part of the reward, here there is none.
        "reinforce_pp": _REINFORCE_PP,
        # MiniMax-M1, arXiv 2506.13585, eqs. 4-5, without lower bound; the paper keeps its upper one to itself: a weight of
        # at most 5 is ScaleRL's (arXiv 2510.13786).
        "cispo": Objective(surrogate="clipped_weight", clip_low=1.0, clip_high=4.0, aggregation="token_mean", kl_coef=0.0),
        # Zhao et al., arXiv 2507.20673: token ratios within (e^-0.4, e^0.4).
        "gmpo": Objective(
            ratio="sequence_geometric",
            surrogate="token_clip",
            clip_low=1 - math.exp(-0.4),
            clip_high=math.exp(0.4) - 1,
            kl_coef=0.0,
        ),
        **PRESETS,
    }
)


def get(variant: str, **overrides: Any) -> Objective:
    """The named variant, with any fields replaced. Raises ValueError listing what is known."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    fields = [field.name for field in dataclasses.fields(Objective)]
    unknown = sorted(set(overrides) - set(fields))
    if unknown:
        raise ValueError(f"unknown objective field {unknown[0]!r}; known: {', '.join(fields)}")
    return dataclasses.replace(VARIANTS[variant], **overrides)


def describe(obj: Objective) -> str:
    """The nearest variant's name and what differs from it: "dapo", or "dapo + clip_high=0.3"."""

    def differences(variant: str) -> list[str]:
        named = dataclasses.asdict(VARIANTS[variant])
        return [f"{field}={value}" for field, value in dataclasses.asdict(obj).items() if value != named[field]]

    nearest = min(VARIANTS, key=lambda variant: len(differences(variant)))
    return " + ".join([nearest, *differences(nearest)])
