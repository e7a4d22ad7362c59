"""A run's records -> checks: a number, a light and one sentence each. The thresholds are the table at the end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from grpo_jax.config import Config

Record = Mapping[str, float]
Measure = Callable[[Config, Sequence[Record]], float | None]

WINDOW = 0.2  # "early" and "late" are this share of the steps, at least one
ENOUGH_STEPS = 20  # fewer say nothing about a trend
LIGHTS = ("bad", "warn", "good", "none")  # the order in which they are shown


@dataclasses.dataclass(frozen=True)
class Check:
    """What the page shows. light: one of LIGHTS."""

    title: str
    value: str
    light: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to arrive at a Check. measure: None where there is nothing to measure, then the sentence is `absent`.

    worse: "high" (warn and bad are exceeded) or "low" (reached from above). form: how the value is written.
    applies: on which configs the rule stands at all.
    """

    title: str
    measure: Measure
    form: str
    worse: str
    warn: float
    bad: float
    good: str
    advice: str
    absent: str
    applies: Callable[[Config], bool] = lambda config: True


def health(config: Config, records: Sequence[Record]) -> list[Check]:
    """All checks of a run, the worst first. records: of metrics.jsonl, in order."""
    checks = [check(rule, config, records) for rule in RULES if rule.applies(config)]
    return sorted(checks, key=lambda each: LIGHTS.index(each.light))


def check(rule: Rule, config: Config, records: Sequence[Record]) -> Check:
    """One rule on one run."""
    value = rule.measure(config, records)
    if value is None:
        return Check(rule.title, "-", "none", rule.absent)

    def is_past(limit: float) -> bool:
        return value > limit if rule.worse == "high" else value <= limit

    light = "bad" if is_past(rule.bad) else "warn" if is_past(rule.warn) else "good"
    return Check(rule.title, rule.form.format(value), light, rule.good if light == "good" else rule.advice)


# ----------------------------------------------------------------------------------------------------------- measures


def values_of(records: Sequence[Record], name: str) -> list[float]:
    """The finite values under a name, in order."""
    return [record[name] for record in records if name in record and math.isfinite(record[name])]


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def window(values: Sequence[float]) -> int:
    """How many of the values are "early" or "late"."""
    return max(1, math.ceil(WINDOW * len(values)))


def late(name: str) -> Measure:
    """The mean over the last steps."""

    def measure(config: Config, records: Sequence[Record]) -> float | None:
        values = values_of(records, name)
        return mean(values[-window(values) :])

    return measure


def overall(name: str) -> Measure:
    """The mean over all steps."""
    return lambda config, records: mean(values_of(records, name))


def largest(name: str) -> Measure:
    """The largest value of any step."""
    return lambda config, records: max(values_of(records, name), default=None)


def rise(name: str, at_least: int) -> Measure:
    """Late mean minus early mean; None with fewer than `at_least` values."""

    def measure(config: Config, records: Sequence[Record]) -> float | None:
        values = values_of(records, name)
        size = window(values)
        return sum(values[-size:]) / size - sum(values[:size]) / size if len(values) >= at_least else None

    return measure


def variant_activity(config: Config, records: Sequence[Record]) -> float | None:
    """Late share of tokens whose advantage is not GRPO's, among those of groups that say anything."""
    share = late("advantage/differs_from_grpo")(config, records)
    silent = 0.0 if config.dynamic_sampling.enabled else late("groups/uninformative")(config, records)
    if config.objective.advantage == "group_norm" or share is None or silent is None or silent == 1.0:
        return None
    return min(share / (1.0 - silent), 1.0)


def credit_follows_success(config: Config, records: Sequence[Record]) -> float | None:
    """Late mean of the correlation; exactly 0 is a step in which all tokens got the same, which says nothing."""
    values = [x for x in values_of(records, "advantage/success_correlation") if x != 0.0]
    return mean(values[-window(values) :])


def entropy_left(config: Config, records: Sequence[Record]) -> float | None:
    """Late entropy as a share of the early one."""
    values = values_of(records, "policy/entropy")
    size = window(values)
    early = mean(values[:size])
    return sum(values[-size:]) / size / early if len(values) >= ENOUGH_STEPS and early else None


def broken_steps(config: Config, records: Sequence[Record]) -> float | None:
    """How many steps recorded something that is no finite number."""
    return float(sum(not all(map(math.isfinite, record.values())) for record in records))


# -------------------------------------------------------------------------------------------------------------- table

PERCENT, NATS, NUMBER, CHANGE, COUNT = "{:.1%}", "{:.2g} nats", "{:.2f}", "{:+.3f}", "{:.0f}"
NOT_YET = "Not recorded, or not yet."
FAR = "so the policy moves far within one batch: lower optimizer.learning_rate, or use fewer epochs and minibatches."

RULES: tuple[Rule, ...] = (
    Rule(
        "The variant is active", variant_activity, PERCENT, "low", 0.5, 0.05,
        good="Most tokens that are learnt from get another advantage than plain GRPO would give them.",
        advice="Few tokens get another advantage than GRPO's, so this run mostly tests GRPO: check objective.entropy_weight.",
        absent="This variant takes GRPO's advantage and differs in clipping, averaging or sampling; or nothing is recorded.",
    ),
    Rule(
        "Credit follows success", credit_follows_success, NUMBER, "low", 0.1, 0.0,
        good="Tokens of right completions get the higher advantages.",
        advice="Advantage does not go with success: look for a wrong sign, rewards in wrong rows, or too strong shaping.",
        absent="No step had tokens with different advantages, or none is recorded.",
    ),
    Rule(
        "Success is within reach", late("reward/success"), PERCENT, "low", 0.02, 0.0,
        good="Some sampled completions succeed, so there is something to reinforce.",
        advice="Almost nothing sampled succeeds, so there is nothing right to reinforce: try easier prompts or a warm start.",
        absent=NOT_YET,
    ),
    Rule(
        "Success rises in training", rise("reward/success", ENOUGH_STEPS), CHANGE, "low", 0.01, -0.05,
        good="Sampled completions succeed more often than at the start.",
        advice="Success does not rise: if there is room above, try another learning rate, easier prompts or a larger group.",
        absent=f"Fewer than {ENOUGH_STEPS} steps: too early to tell.",
    ),
    Rule(
        "Held-out success rises", rise("eval/success", 2), CHANGE, "low", 0.0, -0.05,
        good="Greedy success on held-out prompts is above its start.",
        advice="Held-out success does not rise: if training success does, the policy learns the prompts or games the reward.",
        absent="Only one evaluation so far; see eval_every.",
    ),
    Rule(
        "Groups that say nothing", late("groups/uninformative"), PERCENT, "high", 0.5, 0.8,
        good="Most groups have both better and worse completions to learn from.",
        advice="Most groups have equal rewards: prompts are too easy or too hard; try others, larger groups, dynamic_sampling.",
        absent=NOT_YET,
    ),
    Rule(
        "Groups missing from batches", overall("groups/missing"), PERCENT, "high", 0.01, 0.3,
        good="Dynamic sampling fills its batches.",
        advice="Dynamic sampling runs out of rounds and trains on less: raise its max_sampling_rounds, or change the prompts.",
        absent="Dynamic sampling is off.",
    ),
    Rule(
        "Clipped below", late("policy/clip_fraction_low"), PERCENT, "high", 0.2, 0.4,
        good="Few tokens are held at the ratio's lower bound; none can be with one update a batch.",
        advice=f"Many tokens are held at the ratio's lower bound, {FAR}",
        absent=NOT_YET,
    ),
    Rule(
        "Clipped above", late("policy/clip_fraction_high"), PERCENT, "high", 0.2, 0.4,
        good="Few tokens are held at the ratio's upper bound; none can be with one update a batch.",
        advice=f"Many tokens are held at the ratio's upper bound, {FAR}",
        absent=NOT_YET,
    ),
    Rule(
        "Sampler against learner, float32", largest("policy/sampler_logp_gap"), NATS, "high", 1e-3, 1e-1,
        good="Sampler and learner give the same log-probabilities, so the ratio means what it should.",
        advice="Sampler and learner disagree beyond rounding: look for a mask, position or temperature that differs.",
        absent=NOT_YET,
        applies=lambda config: config.model.dtype == "float32",
    ),
    Rule(
        "Sampler against learner, bfloat16", largest("policy/sampler_logp_gap"), NATS, "high", 0.5, 3.0,
        good="Sampler and learner differ by no more than bfloat16 rounds.",
        advice='Sampler and learner disagree: set learner.old_logp = "learner", or look for a mask or position that differs.',
        absent=NOT_YET,
        applies=lambda config: config.model.dtype != "float32",
    ),
    Rule(
        "Entropy left", entropy_left, PERCENT, "low", 0.1, 0.02,
        good="The policy still tries different things.",
        advice="Entropy has collapsed: fine where success is near 1; else raise objective.clip_high or lower the rate.",
        absent=f"Fewer than {ENOUGH_STEPS} steps: too early to tell.",
    ),
    Rule(
        "Cut off by the budget", late("completion/truncated"), PERCENT, "high", 0.1, 0.5,
        good="Completions end by themselves.",
        advice="Completions run into the budget: raise rollout.max_completion_tokens, or set overlong.cache_tokens.",
        absent=NOT_YET,
    ),
    Rule(
        "Scoring errors", overall("reward/errors"), PERCENT, "high", 0.0, 0.05,
        good="The scorer handled every completion.",
        advice="The scorer raised on some completions, which then count as wrong: make it accept any text.",
        absent="This task is scored inside the program.",
    ),
    Rule(
        "Scoring timeouts", overall("reward/timeouts"), PERCENT, "high", 0.0, 0.05,
        good="The scorer was always in time.",
        advice="Some completions ran out of scoring time and count as wrong: raise reward.scoring.time_limit_secs.",
        absent="This task is scored inside the program.",
    ),
    Rule(
        "Steps with broken numbers", broken_steps, COUNT, "high", 0.0, 0.0,
        good="Every recorded number is finite.",
        advice="NaN or infinity was recorded: lower optimizer.learning_rate; if it comes at step 1, look at the weights.",
        absent=NOT_YET,
    ),
)  # fmt: skip
