"""The wider field beside the ten of `variants.ENTRIES`, presets with the constants of papers and frameworks, all by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from grpo_jax.objectives.variants import ENTRIES, LARGE, Objective, Variant

_REINFORCE: dict[str, Any] = {"surrogate": "reinforce", "kl_coef": 0.0}
_DAPO, _DR_GRPO, _GTPO, _GRPO_S, _GSPO, _REINFORCE_PP = (
    ENTRIES[name].objective for name in ("dapo", "dr_grpo", "gtpo", "grpo_s", "gspo", "reinforce_pp")
)
_TOKEN_MEAN: dict[str, Any] = {"aggregation": "token_mean", "kl_coef": 0.0}

# What else the field has, most of it one choice on one axis: docs/variants.md, "The wider family". Where a paper leaves an axis
# open it is DAPO's mean over tokens without KL.
FAMILY: Mapping[str, Variant] = MappingProxyType(
    {
        # Tan et al., sec. 2.4.1: the normaliser is the row's own geometric mean.
        "gtpo_geometric": Variant(
            "GTPO, row-geometric",
            "2508.04349",
            "GTPO; a token's entropy over the geometric mean of its row",
            dataclasses.replace(_GTPO, entropy_share="row_geometric"),
        ),
        # Its Algorithm 1 and sec. 2.4.1; eq. 8, the default, has the arithmetic mean.
        "grpo_s_geometric": Variant(
            "GRPO-S, Algorithm 1",
            "2508.04349",
            "GRPO-S; w = exp(mean of log w over the row)",
            dataclasses.replace(_GRPO_S, ratio="sequence_geometric"),
        ),
        # Qi et al., binary divergences; 0.2 is prime-rl's bound, 0.05 the paper's for the KL.
        "dppo_tv": Variant(
            "DPPO-TV",
            "2602.04879",
            "GRPO's A; a token trains while its probability moved by at most 0.2",
            Objective(surrogate="trust_region_tv", **_TOKEN_MEAN),
        ),
        "dppo_kl": Variant(
            "DPPO-KL",
            "2602.04879",
            "the same by the KL of the token against all others",
            Objective(surrogate="trust_region_kl", clip_low=0.05, clip_high=0.05, **_TOKEN_MEAN),
        ),
        "sapo": Variant(
            "SAPO",
            "2511.20347",
            "GRPO's A; (4 / tau) sigmoid(tau (w - 1)) A, tau 1 or 1.05 by sign",
            Objective(surrogate="soft_gate", kl_coef=0.0),
        ),
        # Its OPSM and its KL; the paper prints no bound: 0.1 nats a token is ours.
        "deepseek_v32": Variant(
            "GRPO of DeepSeek-V3.2",
            "2512.02556",
            "GRPO; bad rows that became rare are left out, the KL is weighted by w",
            Objective(max_off_policy_kl=0.1, kl_by_ratio=True),
        ),
        "clip_cov": Variant(
            "Clip-Cov",
            "2505.22617",
            "GRPO's A; 0 on the tokens with the highest covariance of A and logp",
            Objective(token_filter="low_covariance", **_TOKEN_MEAN),
        ),
        "kl_cov": Variant(
            "KL-Cov",
            "2505.22617",
            "GRPO's A, w A without clip; |log w| is penalised on these tokens",
            Objective(surrogate="importance", cov_penalty=1.0, **_TOKEN_MEAN),
        ),
        "forking_tokens": Variant(
            "80/20",
            "2506.01939",
            "DAPO's loss; only the fifth of tokens with the highest entropy has A",
            dataclasses.replace(_DAPO, token_filter="top_entropy"),
        ),
        # Richemond et al., the policy's half of the loss, as verl has it: its value is the group's mean here.
        "dro": Variant(
            "DRO",
            "2405.19107",
            "A = r - mean; A logp - (b / 2) (log w)^2, b = 0.1",
            Objective(advantage="group_center", drift_coef=0.05, aggregation="token_mean", **_REINFORCE),
        ),
        "entropy_bonus": Variant(
            "GRPO with entropy bonus",
            "2505.22312",
            "GRPO without KL, plus 0.001 H",
            Objective(entropy_coef=1e-3, kl_coef=0.0),
        ),
        # He et al., Skywork-OR1; target and step are those of TRL's defaults.
        "adaptive_entropy": Variant(
            "Adaptive entropy control",
            "2505.22312",
            "GRPO's A; plus c H while H is at most 0.2, c rising by 0.005 an update then, else falling",
            Objective(entropy_target=0.2, **_TOKEN_MEAN),
        ),
        # Wang et al.; lambda begins at 0, DAPO's loss. How fast it moves is ours.
        "lambda_grpo": Variant(
            "lambda-GRPO",
            "2510.06870",
            "DAPO's loss; rows weigh G softmax((1 + z / 9)^lambda) by their length's z, lambda is learned",
            dataclasses.replace(_DAPO, advantage="length_preference", length_exponent_rate=0.1),
        ),
        "opo": Variant(
            "OPO",
            "2505.23585",
            "A = r - sum |o| r / sum |o|; A logp, no ratio",
            Objective(advantage="length_weighted_center", aggregation="sequence_sum", **_REINFORCE),
        ),
        "gpg": Variant(
            "GPG",
            "2504.02546",
            "A = (r - mean) groups / groups that differ; A logp, no ratio",
            Objective(advantage="group_center_rescaled", aggregation="token_mean", **_REINFORCE),
        ),
        "maxrl": Variant(
            "MaxRL",
            "2602.02710",
            "A = (r - mean) / mean of the group",
            Objective(advantage="group_mean_norm", aggregation="constant", kl_coef=0.0),
        ),
        "pass_at_k": Variant(
            "max@k",
            "2503.19595",
            "A = best - second for the best of a group, 0 for the others",
            Objective(advantage="best_of_group", **_TOKEN_MEAN),
        ),
        "pass_at_k_analytic": Variant(
            "Pass@k training",
            "2508.10751",
            "A by the pass@k of the subsets that hold the row",
            Objective(advantage="pass_at_k_analytic", **_TOKEN_MEAN),
        ),
        "lite_ppo": Variant(
            "Lite PPO",
            "2508.08221",
            "A = (r - mean of the group) / std of the batch's rewards",
            Objective(advantage="group_center_batch_std", **_TOKEN_MEAN),
        ),
        "gdpo": Variant(
            "GDPO",
            "2601.05242",
            "each part of the reward normalised in its group, then the batch's std",
            Objective(advantage="reward_parts", **_TOKEN_MEAN),
        ),
        # Shao et al., sec. 4.1.3, with whatever rewards of steps the task gives.
        "grpo_process": Variant(
            "GRPO, process supervision",
            "2402.03300",
            "A of a token = sum of the normalised rewards of the steps that end at it or later",
            Objective(advantage="step_returns", kl_coef=0.0),
        ),
        "gspo_token": Variant(
            "GSPO-token",
            "2507.18071",
            "GSPO; a row may have several A (set advantage to token_entropy)",
            dataclasses.replace(_GSPO, ratio="sequence_token"),
        ),
        "luspo": Variant(
            "LUSPO",
            "2602.05261",
            "GSPO times the row's length",
            dataclasses.replace(_GSPO, aggregation="sequence_sum"),
        ),
        "vespo": Variant(
            "VESPO",
            "2602.10693",
            "GRPO's A; sg(W^k exp(lambda (1 - W))) A logp, W the row's product of w",
            Objective(surrogate="gamma_weight", **_TOKEN_MEAN),
        ),
        "fipo": Variant(
            "FIPO",
            "2603.19835",
            "DAPO's loss times clip(exp(discounted sum of later log w))",
            dataclasses.replace(_DAPO, surrogate="future_kl"),
        ),
        "gfpo": Variant(
            "GFPO",
            "2508.09726",
            "DAPO's loss; the 4 shortest of a group are compared, A = 0 for the others",
            dataclasses.replace(_DAPO, row_filter="shortest", keep_rows=4),
        ),
    }
)

# The same algorithms with the constants of a paper or a framework's source: docs/variants.md, "Where constants come from".
PRESET_ENTRIES: Mapping[str, Variant] = MappingProxyType(
    {
        "reinforce_pp_baseline": Variant(
            "REINFORCE++ with baseline",
            "2501.03262",
            "A = (r - mean of the group) / std of that over the batch",
            dataclasses.replace(_REINFORCE_PP, advantage="group_center_batch_norm"),
        ),
        # The papers' equations divide by the bare std; ours guards a group without spread by itself.
        "deepseekmath": Variant("GRPO, its paper's", "2402.03300", "nothing is added to the std", Objective(adv_eps=0.0)),
        "dapo_paper": Variant(
            "DAPO, its paper's", "2503.14476", "nothing is added to the std", dataclasses.replace(_DAPO, adv_eps=0.0)
        ),
        "dr_grpo_paper": Variant("Dr. GRPO, its paper's", "2503.20783", "no KL", dataclasses.replace(_DR_GRPO, kl_coef=0.0)),
        # "Entropy clipped at 0.2, 0.28" taken as it stands; batch, budget and sampling are those of configs/gtpo_paper.py.
        "gtpo_paper": Variant(
            "GTPO, its paper's",
            "2508.04349",
            "entropies clipped to 0.2 and 0.28 nats, nothing is added to the std",
            dataclasses.replace(_GTPO, entropy_clip=(0.2, 0.28), adv_eps=0.0),
        ),
        "trl_default": Variant(
            "GRPO, TRL's",
            "TRL 1.16.0, GRPOConfig",
            'loss_type "dapo", scale_rewards "group", beta 0, epsilon 0.2 both ways',
            Objective(aggregation="token_mean", kl_coef=0.0, adv_eps=1e-4),
        ),
        "verl_default": Variant(
            "GRPO, verl's",
            "verl 0.9.1, ppo_trainer.yaml with algorithm.adv_estimator=grpo",
            "token-mean, no KL, clip_ratio_c 3",
            Objective(aggregation="token_mean", kl_coef=0.0, dual_clip=3.0),
        ),
        "skyrl_default": Variant(
            "GRPO, SkyRL's",
            "SkyRL 0.3.0, AlgorithmConfig",
            "token_mean, kl_loss_coef 0.001 on k3",
            Objective(aggregation="token_mean", kl_coef=1e-3),
        ),
        # Its default loss: DPPO's bound on probabilities, the weight itself unbounded, and kl_tau (log w)^2.
        "prime_rl_default": Variant(
            "prime-rl's loss",
            "prime-rl of August 2026, DefaultLossConfig",
            "DPPO-TV of A = r - mean, bounds 0.2, kl_tau 0.001",
            Objective(advantage="group_center", surrogate="trust_region_tv", max_ratio=LARGE, drift_coef=1e-3, **_TOKEN_MEAN),
        ),
        "maxtext_default": Variant(
            "GRPO, MaxText's",
            "MaxText 0.2.5, rl.yml, which trains with Tunix",
            "grpo_beta 0.08 on k1, grpo_epsilon 0.2",
            Objective(kl_coef=0.08, kl_estimator="k1"),
        ),
        "tunix_default": Variant(
            "GRPO, Tunix's",
            "google-tunix 0.1.7, GRPOConfig",
            'beta 0.04 on kl_loss_mode "kl", which is k1',
            Objective(kl_estimator="k1"),
        ),
    }
)

PRESETS: Mapping[str, Objective] = MappingProxyType({name: entry.objective for name, entry in PRESET_ENTRIES.items()})
VARIANTS: Mapping[str, Objective] = MappingProxyType(
    {**{name: entry.objective for name, entry in (*ENTRIES.items(), *FAMILY.items())}, **PRESETS}
)


def describe(obj: Objective) -> str:
    """Name the nearest variant and what differs from it: "dapo", or "dapo + clip_high=0.3"."""

    def differences(variant: str) -> list[str]:
        named = VARIANTS[variant].to_dict()
        return [f"{field}={value}" for field, value in obj.to_dict().items() if value != named[field]]

    nearest = min(VARIANTS, key=lambda variant: len(differences(variant)))
    return " + ".join([nearest, *differences(nearest)])
