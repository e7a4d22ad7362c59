"""A variant is data: one choice on each of a few independent axes. `ENTRIES` is all that tells the variants apart.

`Objective` names the choices and knows none of the functions behind them. So the files of the axes can import it, and a
hyper-parameter of a new variant is declared in the file that lists the variant.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from grpo_jax.knobs import knob, walk
from grpo_jax.objectives.functions import name_of
from grpo_jax.objectives.params import Number, Params, read_params

Choice = str | Callable[..., Any]  # a name in the axis's table, "module:function", or a function
NO_PARAMS = Params()
LARGE = 1e6  # whose square, and sums of it, float32 still holds


@dataclasses.dataclass(frozen=True)
class Objective:
    """The quantity to maximise. The defaults are GRPO (Shao et al., arXiv 2402.03300).

    Every field can be set from the command line, `--config.objective.clip_high=0.3`, and swept.
    """

    # advantage, ratio, surrogate, kl_estimator and aggregation name a function in the table at the end of its axis's file, or
    # one of your own, as module:function (functions.py).
    advantage: Choice = knob("group_norm", "rewards -> credit of each token (advantages.py)")
    ratio: Choice = knob("token", "importance ratio, of each token or of a whole completion (ratios.py)")
    surrogate: Choice = knob("ppo_clip", "ratio and advantage -> objective of each token (surrogates.py)")
    clip_low: Number = knob(0.2, "the ratio is clipped to [1 - clip_low, 1 + clip_high]", at_least=0, at_most=1e6)
    clip_high: Number = knob(0.2, "the same above 1", at_least=0, at_most=1e6)
    dual_clip: float | None = knob(None, "c > 1: for A < 0 the surrogate is at least c A; None: unbounded")
    aggregation: Choice = knob("sequence_mean", "objective of each token -> scalar (aggregation.py)")
    kl_coef: Number = knob(0.04, "weight of the KL penalty in the loss; 0: none", at_least=0, at_most=1e3)
    kl_estimator: Choice = knob("k3", "of that penalty (ratios.py)")
    kl_in_reward: float = knob(
        0.0, "weight of the KL that is subtracted from the reward, before the advantage; 0: none", at_least=0, at_most=1e3
    )
    std_ddof: int = knob(1, "std = sqrt(sum of squares / (n - ddof)) + adv_eps", at_least=0, at_most=2**16)
    adv_eps: float = knob(1e-6, "added to the std", at_least=0, at_most=1e6)
    success_threshold: float = knob(0.5, "a task reward from here on is a success (O+)")
    entropy_floor: float = knob(
        1e-4, "lowest entropy in the shaped rewards, which divide by it", unit="nats", at_least=1e-8, at_most=1e6
    )
    entropy_clip: tuple[float, ...] | None = knob(None, "(low, high) that the same entropy is clipped to, or None", unit="nats")
    base_weight: float = knob(1.0, "a1 of GTPO, b1 of GRPO-S", at_least=-1e6, at_most=1e6)
    entropy_weight: Number = knob(0.1, "a2 of GTPO, b2 of GRPO-S", at_least=0, at_most=1e6)
    stat_scope: str = knob("batch", "the shaped rewards are normalised over it", choices=("batch", "group"))
    sequence_mean_kind: str = knob("arithmetic", "mean entropy of a completion in GRPO-S", choices=("arithmetic", "geometric"))
    include_other_side: bool = knob(True, "the other side's zeros count in the shaped rewards' statistics; False: a misreading")
    entropy_share: str = knob(
        "position",
        "GTPO's entropy over the group's at the position, or over the row's geometric mean",
        choices=("position", "row_geometric"),
    )
    row_filter: Choice = knob("all", "completions that are compared: all, or of each group keep_rows (filters.py)")
    keep_rows: int = knob(0, "k of row_filter; 0 with all", at_least=0)
    token_filter: Choice = knob("all", "tokens that keep their advantage (filters.py)")
    token_share: float = knob(0.2, 'of "top_entropy": share of the tokens that keep it', above=0, at_most=1)
    cov_share: float = knob(2e-4, 'of "low_covariance" and cov_penalty: share of tokens they choose', above=0, at_most=1)
    cov_range: tuple[float, ...] = knob((1.0, 5.0), 'of "low_covariance": chosen tokens lie between')
    cov_penalty: float = knob(
        0.0, "weight of |log w| on the tokens of highest covariance of advantage and logp (KL-Cov); 0: none", at_least=0
    )
    part_weights: tuple[float, ...] = knob((), 'of "reward_parts": weight of each part; empty: 1 each')
    pass_k: int = knob(2, 'k of "pass_at_k_analytic"', at_least=1)
    gate_sharpness: tuple[float, ...] = knob((1.0, 1.05), 'of "soft_gate": tau for A > 0 and for the others')
    max_ratio: float = knob(20.0, 'of "trust_region_tv" and "_kl": largest weight of a token', above=0)
    gamma_weight: tuple[float, ...] = knob((2.0, 3.0, 3.0, 2.0), 'of "gamma_weight": k and lambda for A >= 0, then for A < 0')
    future_half_life: float = knob(32.0, 'of "future_kl": a later token counts half at this distance', unit="tokens", above=0)
    future_clip: tuple[float, ...] = knob((1.0, 1.2), 'of "future_kl": bounds of the influence weight')
    max_off_policy_kl: float | None = knob(
        None, "rows with A < 0 whose mean log(old / new) is above it leave the policy loss; None: none do"
    )
    kl_by_ratio: bool = knob(False, "the KL penalty is weighted by the token's ratio: unbiased off policy")
    drift_coef: float = knob(
        0.0,
        "weight of (log w)^2 in the loss, which holds the policy near the one that sampled; 0: none",
        at_least=0,
        at_most=1e3,
    )
    entropy_coef: float = knob(0.0, "weight of the policy's entropy, added to the objective of each token; 0: none", at_least=0)
    params: Mapping[str, Any] = knob(NO_PARAMS, "numbers by name, for functions of your own: objective.params.width")

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", read_params(self.params))
        for name, value, declared in walk(self):
            # A number of the state, inside a compiled step, was checked with its config.
            is_traced = isinstance(value, jax.Array)
            if declared and not is_traced and (complaint := declared.complaint(value)):
                raise ValueError(f"objective.{name} = {value!r}: {complaint}")
        if self.dual_clip is not None and not 1 < self.dual_clip <= LARGE:
            raise ValueError(
                f"objective.dual_clip = {self.dual_clip!r}: must be None or a finite number > 1, at most {LARGE:g}"
            )
        if self.entropy_clip is not None:
            clip = tuple(self.entropy_clip)
            if len(clip) != 2 or not 0 <= clip[0] <= clip[1] <= LARGE:
                raise ValueError(f"objective.entropy_clip = {self.entropy_clip!r}: must be None or (low, high), 0 <= low")
            object.__setattr__(self, "entropy_clip", clip)  # a list would not be hashable
        self._check_tuples()
        if self.max_off_policy_kl is not None and not (self.max_off_policy_kl >= 0 and math.isfinite(self.max_off_policy_kl)):
            raise ValueError(f"objective.max_off_policy_kl = {self.max_off_policy_kl!r}: must be None or a number >= 0")
        if self.row_filter == "all" and self.keep_rows:
            raise ValueError(
                f"objective.keep_rows = {self.keep_rows}: nothing reads it with row_filter = 'all', set one of them"
            )
        if self.row_filter in ("shortest", "efficient") and not self.keep_rows:
            raise ValueError(f"objective.keep_rows = 0: row_filter = {self.row_filter!r} needs how many rows it keeps")

    def _check_tuples(self) -> None:
        """Check the fields of several numbers. Raises ValueError."""
        shapes = {"cov_range": "low, high", "gate_sharpness": "tau, tau", "gamma_weight": "k, lambda, k, lambda"}
        for field, names in {**shapes, "future_clip": "low, high"}.items():
            value = tuple(getattr(self, field))
            if len(value) != len(names.split(",")) or not all(math.isfinite(each) for each in value):
                raise ValueError(f"objective.{field} = {value!r}: must be ({names}), finite numbers")
            if field == "gate_sharpness" and not min(value) > 0:
                raise ValueError(f"objective.{field} = {value!r}: both must be above 0")
            if "low" in names and value[0] > value[1]:
                raise ValueError(f"objective.{field} = {value!r}: must be (low, high), low first")
            object.__setattr__(self, field, value)
        object.__setattr__(self, "part_weights", tuple(self.part_weights))

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a config has them: functions by name, params as a dict."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        functions = {name: name_of(value) for name, value in fields.items() if callable(value)}
        return {**fields, **functions, "params": dict(self.params)}

    @property
    def has_kl(self) -> bool:
        """A KL penalty is part of the loss."""
        return _is_on(self.kl_coef)

    @property
    def has_kl_in_reward(self) -> bool:
        """A KL is subtracted from the rewards."""
        return _is_on(self.kl_in_reward)

    @property
    def needs_reference(self) -> bool:
        """A KL is taken anywhere, so the reference's log-probabilities are needed."""
        return self.has_kl or self.has_kl_in_reward

    @property
    def needs_entropy(self) -> bool:
        """The advantage, or the filter of tokens, reads the sampling policy's entropy."""
        return self.advantage in ("token_entropy", "sequence_entropy") or self.token_filter == "top_entropy"

    @property
    def needs_logp(self) -> bool:
        """The filter of tokens, or the choice of those to penalise, reads the log-probabilities of the start of the update."""
        return self.token_filter == "low_covariance" or self.cov_penalty > 0

    @property
    def has_entropy_bonus(self) -> bool:
        """The policy's entropy is part of the loss."""
        return _is_on(self.entropy_coef)


def _is_on(coefficient: Any) -> bool:
    """True of a coefficient > 0. A traced one is on without looking: runs with 0 never share a program with the others."""
    return not isinstance(coefficient, int | float) or coefficient > 0


@dataclasses.dataclass(frozen=True)
class Variant:
    """An objective with what a reader wants to know of it; the tables in README.md and docs/ are made from these.

    Attributes:
      title: name as the paper writes it, "Dr. GRPO". paper: arXiv id, or what else the objective was read in.
      formula: one line of plain text, what it does that GRPO does not.
    """

    title: str
    paper: str
    formula: str
    objective: Objective


_DECOUPLED: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28}
_DAPO = Objective(**_DECOUPLED, aggregation="token_mean", kl_coef=0.0)
_DR_GRPO = Objective(advantage="group_center", aggregation="constant")
_REINFORCE_PP = Objective(advantage="batch_norm", aggregation="token_mean", kl_coef=0.0)

ENTRIES: Mapping[str, Variant] = MappingProxyType(
    {
        # Shao et al., DeepSeekMath, eq. 3 with outcome supervision.
        "grpo": Variant("GRPO", "2402.03300", "A = (r - mean) / std of the group", Objective()),
        # Yu et al., eqs. 8-12; its dynamic sampling and overlong punishment are not part of the loss.
        "dapo": Variant(
            "DAPO",
            "2503.14476",
            "GRPO's A; groups of equal rewards are replaced by new ones, overlong completions punished",
            _DAPO,
        ),
        # Liu et al. Differs from source: a KL term is kept; kl_coef = 0 gives the paper's objective.
        "dr_grpo": Variant("Dr. GRPO", "2503.20783", "A = r - mean of the group", _DR_GRPO),
        # Tan et al., eqs. 2-5 (not the trajectory- or turn-level methods of the same name).
        "gtpo": Variant(
            "GTPO",
            "2508.04349",
            "rewards shaped token by token with the policy's entropy",
            Objective(advantage="token_entropy", **_DECOUPLED, aggregation="token_mean", kl_coef=0.0),
        ),
        # The same paper, eqs. 6-8.
        "grpo_s": Variant(
            "GRPO-S",
            "2508.04349",
            "rewards shaped row by row with mean entropy",
            Objective(advantage="sequence_entropy", ratio="sequence", **_DECOUPLED, kl_coef=0.0, stat_scope="group"),
        ),
        # Zheng et al.: the proof that the axes compose.
        "gspo": Variant(
            "GSPO",
            "2507.18071",
            "GRPO's A; w = exp(mean of log w over the row)",
            Objective(ratio="sequence_geometric", clip_low=3e-4, clip_high=4e-4, kl_coef=0.0),
        ),
        # Ahmadian et al. Differs from source: its KL is part of the reward (kl_in_reward), here it is off.
        "rloo": Variant(
            "RLOO",
            "2402.14740",
            "A = r - mean of the others; A logp, no ratio",
            Objective(advantage="leave_one_out", surrogate="reinforce", aggregation="sequence_sum", kl_coef=0.0),
        ),
        # Hu et al. Differs from source: its KL is part of the reward (kl_in_reward), here it is off.
        "reinforce_pp": Variant("REINFORCE++", "2501.03262", "A = (r - mean) / std of the batch", _REINFORCE_PP),
        # MiniMax-M1, eqs. 4-5, without lower bound; the paper keeps its upper one to itself: a weight of at most 5 is
        # ScaleRL's (arXiv 2510.13786).
        "cispo": Variant(
            "CISPO",
            "2506.13585",
            "GRPO's A; sg(clip(w)) A logp: the weight is clipped, not the update",
            Objective(surrogate="clipped_weight", clip_low=1.0, clip_high=4.0, aggregation="token_mean", kl_coef=0.0),
        ),
        # Zhao et al.: token ratios within (e^-0.4, e^0.4).
        "gmpo": Variant(
            "GMPO",
            "2507.20673",
            "GRPO's A; geometric mean of token ratios, each clipped by itself",
            Objective(
                ratio="sequence_geometric",
                surrogate="token_clip",
                clip_low=1 - math.exp(-0.4),
                clip_high=math.exp(0.4) - 1,
                kl_coef=0.0,
            ),
        ),
    }
)

_REINFORCE: dict[str, Any] = {"surrogate": "reinforce", "kl_coef": 0.0}
_GSPO = ENTRIES["gspo"].objective
_GTPO, _GRPO_S = ENTRIES["gtpo"].objective, ENTRIES["grpo_s"].objective
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
        # He et al. adapt the weight to a target; here it is fixed.
        "entropy_bonus": Variant(
            "GRPO with entropy bonus",
            "2505.22312",
            "GRPO without KL, plus 0.001 H",
            Objective(entropy_coef=1e-3, kl_coef=0.0),
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
