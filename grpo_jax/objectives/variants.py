"""A variant is data: one choice on each of a few independent axes. This table is all that tells the variants apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from grpo_jax.objectives.advantages import ADVANTAGES
from grpo_jax.objectives.aggregation import AGGREGATIONS
from grpo_jax.objectives.objective import Objective
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
    }
)

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
    obj = dataclasses.replace(VARIANTS[variant], **overrides)
    check_choices(obj)
    return obj


def check_choices(obj: Objective) -> None:
    """Raises ValueError if a name is not in its axis's table, listing what is, or if two choices exclude each other."""
    for field, known in CHOICES.items():
        if getattr(obj, field) not in known:
            raise ValueError(f"objective.{field} = {getattr(obj, field)!r}: unknown; known: {', '.join(known)}")
    if obj.dual_clip is not None and obj.surrogate not in CLIPPED_RATIO:
        raise ValueError(
            f"objective.dual_clip = {obj.dual_clip!r}: surrogate {obj.surrogate!r} has no gradient through a ratio "
            "to bound, set it to None"
        )


def describe(obj: Objective) -> str:
    """The nearest variant's name and what differs from it: "dapo", or "dapo + clip_high=0.3"."""

    def differences(variant: str) -> list[str]:
        named = dataclasses.asdict(VARIANTS[variant])
        return [f"{field}={value}" for field, value in dataclasses.asdict(obj).items() if value != named[field]]

    nearest = min(VARIANTS, key=lambda variant: len(differences(variant)))
    return " + ".join([nearest, *differences(nearest)])
