"""A watch over numbers that are not finite: in the updates that were left out for them, and in a state before it is saved."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from grpo_jax.config import Config
from grpo_jax.parallel.finite import find_not_finite
from grpo_jax.parallel.sharding import path_names
from grpo_jax.training.checkpoint import saved_fields
from grpo_jax.types import TrainState

# Where to look, by the first of these metrics that is not finite: what is computed first comes first.
PLACES = (
    (("reward/",), "the rewards: see completions.jsonl and the functions of config.reward"),
    (("policy/entropy", "policy/sampler", "policy/learner_entropy"), "the policy's own log-probabilities: see its weights"),
    (("policy/kl",), "the KL to the reference: see its weights and config.objective.kl_coef"),
    (("advantage/",), "the advantages: see the numbers of config.objective"),
    (("loss/", "policy/ratio"), "the loss: see config.objective, and whether config.optimizer.learning_rate is too high"),
)
GRADIENT = "the gradient alone: config.optimizer.learning_rate may be too high, or config.model.dtype too coarse"


@dataclasses.dataclass
class SkippedSteps:
    """Steps in a row in which an update was left out. config: of the run."""

    config: Config
    num: int = 0

    def count(self, step: int, values: Mapping[str, float]) -> str:
        """Count a step by its record, and say what was left out; "" if nothing was.

        Args:
          step: of the record. values: its metrics.
        """
        share = values.get("update/skipped", 0.0)
        if not share:
            self.num = 0
            return ""
        self.num += 1
        names = [name for name, value in values.items() if not math.isfinite(value)]
        return f"step {step}: {share:.0%} of its updates left out, not finite: {', '.join(names)}; look at {place_of(names)}"

    @property
    def are_too_many(self) -> bool:
        """The run should stop."""
        return self.num >= self.config.optimizer.max_skipped_steps


def place_of(names: list[str]) -> str:
    """Say where to look, from the names of the metrics that are not finite."""
    for prefixes, place in PLACES:
        if any(name.startswith(prefixes) for name in names):
            return place
    return GRADIENT


def find_fault(state: TrainState) -> tuple[str, bool]:
    """Look for NaN and infinity in what a checkpoint of a state holds.

    Returns: what is wrong with the first array that has some, "" if none has; and True if it is a weight or the optimizer's,
      which stay, and no part of a batch that waits, which is gone after its update.
    """
    # The updates were watched by gradient and loss alone: a weight may be NaN that no token of a batch has asked for.
    broken = [".".join(path_names(path)) for path, _ in find_not_finite(saved_fields(state))]
    lasting = [name for name in broken if name.startswith(("params", "opt_state"))]
    if not broken:
        return "", False
    return f"{(lasting or broken)[0]} holds NaN or infinity", bool(lasting)
