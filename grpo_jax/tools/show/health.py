"""Checks of a run's records: a number, a light and one sentence each. The thresholds are the table at the end."""

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


Text = str | Callable[[Config], str]  # words of a rule, some of which depend on the config


@dataclasses.dataclass(frozen=True)
class Check:
    """Outcome of a rule on a run, as the page shows it. light: one of LIGHTS."""

    title: str
    value: str
    light: str
    sentence: str


@dataclasses.dataclass(frozen=True)
class Rule:
    """Rule that makes a Check. measure: None where there is nothing to measure, then the sentence is `absent`.

    worse: "high" (warn and bad are exceeded) or "low" (reached from above). form: how the value is written.
    applies: False for configs that the rule says nothing about.
    """

    title: str
    measure: Measure
    form: str
    worse: str
    warn: float
    bad: float
    good: str
    advice: Text
    absent: Text
    applies: Callable[[Config], bool] = lambda config: True


def health(config: Config, records: Sequence[Record]) -> list[Check]:
    """Make all checks of a run, the worst first. records: of metrics.jsonl, in order."""
    checks = [apply_rule(rule, config, records) for rule in RULES if rule.applies(config)]
    return sorted(checks, key=lambda each: LIGHTS.index(each.light))


def apply_rule(rule: Rule, config: Config, records: Sequence[Record]) -> Check:
    """Apply one rule to one run.

    Args:
      rule: one of RULES.
      config: of the run.
      records: of metrics.jsonl, in order.
    Returns: the check; its light is "none" where there is nothing to measure.
    """
    value = rule.measure(config, records)
    if value is None:
        return Check(rule.title, "-", "none", said(rule.absent, config))

    # A threshold of 0 has to work both ways: no error at all is not past 0, but a success of exactly 0 is.
    def is_past(limit: float) -> bool:
        return value > limit if rule.worse == "high" else value <= limit

    text = rule.form.format(value)
    # bad first: what is past it is past warn as well.
    if is_past(rule.bad):
        return Check(rule.title, text, "bad", said(rule.advice, config))
    if is_past(rule.warn):
        return Check(rule.title, text, "warn", said(rule.advice, config))
    return Check(rule.title, text, "good", rule.good)


# ----------------------------------------------------------------------------------------------------------- measures


# A measure is made for what it watches: a late mean for what training changes, a mean over all steps for what is rare (a few
# errors early count too), the largest value for what must not happen once.


def values_of(records: Sequence[Record], name: str) -> list[float]:
    """Return the finite values under a name, in order."""
    # One NaN would make the mean NaN, which is past no threshold: the light would be green. `count_broken_steps` reports it.
    return [record[name] for record in records if name in record and math.isfinite(record[name])]


def mean(values: Sequence[float]) -> float | None:
    """Return the mean, None of no values."""
    if not values:
        return None
    return sum(values) / len(values)


def window(values: Sequence[float]) -> int:
    """Return how many of the values are "early" or "late"."""
    return max(1, math.ceil(WINDOW * len(values)))


def late_mean(name: str) -> Measure:
    """Measure the mean over the last steps."""

    def measure(config: Config, records: Sequence[Record]) -> float | None:
        values = values_of(records, name)
        return mean(values[-window(values) :])

    return measure


def overall_mean(name: str) -> Measure:
    """Measure the mean over all steps."""
    return lambda config, records: mean(values_of(records, name))


def largest_value(name: str) -> Measure:
    """Measure the largest value of any step."""
    return lambda config, records: max(values_of(records, name), default=None)


def rise(name: str, at_least: int) -> Measure:
    """Measure late mean minus early mean; None with fewer than `at_least` values."""

    def measure(config: Config, records: Sequence[Record]) -> float | None:
        values = values_of(records, name)
        if len(values) < at_least:
            return None
        size = window(values)
        return sum(values[-size:]) / size - sum(values[:size]) / size

    return measure


def variant_activity(config: Config, records: Sequence[Record]) -> float | None:
    """Measure the late share of tokens whose advantage is not GRPO's, among those of informative groups."""
    # A group of equal rewards has advantage 0 under every variant, so its tokens cannot differ: without the division a run on
    # hard prompts would look as if its variant were off. Dynamic sampling has thrown such groups out of the batch already,
    # while groups/uninformative counts all that were sampled.
    share = late_mean("advantage/differs_from_grpo")(config, records)
    silent = late_mean("groups/uninformative")(config, records)
    if config.dynamic_sampling.enabled:
        silent = 0.0
    if config.objective.advantage == "group_norm" or share is None or silent is None or silent == 1.0:
        return None
    # One is a share of tokens, the other of groups: where informative groups are the longer ones the quotient exceeds 1.
    return min(share / (1.0 - silent), 1.0)


def credit_follows_success(config: Config, records: Sequence[Record]) -> float | None:
    """Measure the late mean of the correlation of advantage with success."""
    # Exactly 0 is recorded for a step in which all tokens got the same: nothing to correlate, not a bad correlation.
    values = [x for x in values_of(records, "advantage/success_correlation") if x != 0.0]
    return mean(values[-window(values) :])


def entropy_left(config: Config, records: Sequence[Record]) -> float | None:
    """Measure the late entropy as a share of the early one."""
    # As a share, because the entropy that a healthy policy has depends on model, task and temperature.
    values = values_of(records, "policy/entropy")
    size = window(values)
    early = mean(values[:size])
    if len(values) < ENOUGH_STEPS or not early:
        return None
    return sum(values[-size:]) / size / early


def count_broken_steps(config: Config, records: Sequence[Record]) -> float | None:
    """Count the steps that recorded something that is no finite number."""
    return float(sum(not all(map(math.isfinite, record.values())) for record in records))


# -------------------------------------------------------------------------------------------------------------- table


def advise_on_silent_groups(config: Config) -> str:
    """Say what to do about groups of equal rewards, by what is done already."""
    if config.dynamic_sampling.enabled:
        return (
            "Most sampled groups have equal rewards and are thrown away: try prompts neither easy nor hard, or larger groups."
        )
    return "Most groups have equal rewards: prompts are too easy or too hard; try others, larger groups, dynamic_sampling."


def explain_no_activity(config: Config) -> str:
    """Say why a variant's advantage cannot be compared with GRPO's."""
    if config.objective.advantage == "group_norm":
        return "This variant takes GRPO's advantage and differs in clipping, averaging or sampling."
    return NOT_YET


def said(text: Text, config: Config) -> str:
    """Return a rule's words for a config."""
    return text if isinstance(text, str) else text(config)


PERCENT, NATS, NUMBER, CHANGE, COUNT = "{:.1%}", "{:.2g} nats", "{:.2f}", "{:+.3f}", "{:.0f}"
NOT_YET = "Not recorded, or not yet."
FAR = "so the policy moves far within one batch: lower optimizer.learning_rate, or use fewer epochs and minibatches."

RULES: tuple[Rule, ...] = (
    Rule(
        "The variant is active", variant_activity, PERCENT, "low", 0.5, 0.05,
        good="Most tokens that are learnt from get another advantage than plain GRPO would give them.",
        advice="Few tokens get another advantage than GRPO's, so this run mostly tests GRPO: check objective.entropy_weight.",
        absent=explain_no_activity,
    ),
    Rule(
        "Credit follows success", credit_follows_success, NUMBER, "low", 0.1, 0.0,
        good="Tokens of right completions get the higher advantages.",
        advice="Advantage does not go with success: look for a wrong sign, rewards in wrong rows, or too strong shaping.",
        absent="No step had tokens with different advantages, or none is recorded.",
    ),
    Rule(
        "Success is within reach", late_mean("reward/success"), PERCENT, "low", 0.02, 0.0,
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
        "Groups that say nothing", late_mean("groups/uninformative"), PERCENT, "high", 0.5, 0.8,
        good="Most groups have both better and worse completions to learn from.",
        advice=advise_on_silent_groups,
        absent=NOT_YET,
    ),
    Rule(
        "Groups missing from batches", overall_mean("groups/missing"), PERCENT, "high", 0.01, 0.3,
        good="Dynamic sampling fills its batches.",
        advice="Dynamic sampling runs out of rounds and trains on less: raise its max_sampling_rounds, or change the prompts.",
        absent="Dynamic sampling is off.",
    ),
    Rule(
        "Clipped below", late_mean("policy/clip_fraction_low"), PERCENT, "high", 0.2, 0.4,
        good="Few tokens are held at the ratio's lower bound; none can be with one update a batch.",
        advice=f"Many tokens are held at the ratio's lower bound, {FAR}",
        absent=NOT_YET,
    ),
    Rule(
        "Clipped above", late_mean("policy/clip_fraction_high"), PERCENT, "high", 0.2, 0.4,
        good="Few tokens are held at the ratio's upper bound; none can be with one update a batch.",
        advice=f"Many tokens are held at the ratio's upper bound, {FAR}",
        absent=NOT_YET,
    ),
    Rule(
        "Sampler against learner, float32", largest_value("policy/sampler_logp_gap"), NATS, "high", 1e-3, 1e-1,
        good="Sampler and learner give the same log-probabilities, so the ratio means what it should.",
        advice="Sampler and learner disagree beyond rounding: look for a mask, position or temperature that differs.",
        absent=NOT_YET,
        applies=lambda config: config.model.dtype == "float32",
    ),
    Rule(
        "Sampler against learner, bfloat16", largest_value("policy/sampler_logp_gap"), NATS, "high", 0.5, 3.0,
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
        "Cut off by the budget", late_mean("completion/truncated"), PERCENT, "high", 0.1, 0.5,
        good="Completions end by themselves.",
        advice="Completions run into the budget: raise rollout.max_completion_tokens, or set overlong.cache_share.",
        absent=NOT_YET,
    ),
    Rule(
        "Scoring errors", overall_mean("reward/errors"), PERCENT, "high", 0.0, 0.05,
        good="The scorer handled every completion.",
        advice="The scorer raised on some completions, which were then left out: make it accept any text.",
        absent="This task is scored inside the program.",
    ),
    Rule(
        "Scoring timeouts", overall_mean("reward/timeouts"), PERCENT, "high", 0.0, 0.05,
        good="The scorer was always in time.",
        advice="Some completions ran out of scoring time and were left out: raise reward.scoring.time_limit_secs.",
        absent="This task is scored inside the program.",
    ),
    Rule(
        "Completions without a score", overall_mean("reward/unscored"), PERCENT, "high", 0.1, 0.5,
        good="Nearly all that was sampled is trained on.",
        advice="Many completions were left out, since a part failed, came late or had no opinion: look at reward/errors, "
        "reward/timeouts and reward/abstained, and at reward_errors in the run's folder.",
        absent="Records of this version have no such number.",
    ),
    Rule(
        "Steps with broken numbers", count_broken_steps, COUNT, "high", 0.0, 0.0,
        good="Every recorded number is finite.",
        advice="NaN or infinity was recorded: lower optimizer.learning_rate; if it comes at step 1, look at the weights.",
        absent=NOT_YET,
    ),
)  # fmt: skip
