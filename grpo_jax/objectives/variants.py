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
    entropy_coef: Number = knob(
        0.0, "weight of the policy's entropy, added to the objective of each token; 0: none", at_least=0, at_most=1e3
    )
    entropy_target: float | None = knob(
        None,
        "the weight rises in each update whose entropy is at most this, else it falls and is off; None: fixed",
        unit="nats",
    )
    entropy_coef_step: float = knob(5e-3, "of entropy_target: how much it rises or falls", above=0, at_most=1e3)
    entropy_coef_max: float = knob(1.0, "of entropy_target: its upper bound; the lower one is 0", above=0, at_most=1e3)
    length_exponent: Number = knob(
        0.0, 'lambda of "length_preference": above 0 long completions weigh more', at_least=-100, at_most=100
    )
    length_spread: float = knob(1 / 9, "r of the same: a completion's length counts as 1 + r z", at_least=0, at_most=1)
    length_exponent_rate: float = knob(
        0.0, "step size of the gradient descent that lambda takes in each update; 0: it is fixed", at_least=0, at_most=1e3
    )
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
        if self.entropy_target is not None and not (self.entropy_target >= 0 and math.isfinite(self.entropy_target)):
            raise ValueError(f"objective.entropy_target = {self.entropy_target!r}: must be None or a number >= 0")
        if self.length_exponent_rate and self.advantage != "length_preference":
            raise ValueError(
                f"objective.length_exponent_rate = {self.length_exponent_rate}: advantage = {name_of(self.advantage)!r} has no "
                'lambda to learn, use "length_preference", or set it to 0'
            )
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
    def needs_step_rewards(self) -> bool:
        """The advantage is made of rewards of single steps."""
        return self.advantage == "step_returns"

    @property
    def needs_logp(self) -> bool:
        """The filter of tokens, or the choice of those to penalise, reads the log-probabilities of the start of the update."""
        return self.token_filter == "low_covariance" or self.cov_penalty > 0

    @property
    def has_entropy_bonus(self) -> bool:
        """The policy's entropy is part of the loss, or may become one."""
        return self.entropy_target is not None or _is_on(self.entropy_coef)


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
