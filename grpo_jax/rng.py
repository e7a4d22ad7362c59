"""Randomness is a function of (seed, purpose, step) and nothing else, so a resumed run repeats itself bitwise."""

from __future__ import annotations

import jax
from jaxtyping import Int, Key

from grpo_jax.types import Arrays

# A purpose's number is folded into its keys: append new ones, for another order would change every run.
PURPOSES = ("init", "prompts", "rollout", "shuffle", "minibatches", "warm_start", "evaluate", "adapters")


def key_for(seed: int | Int[Arrays, ""], purpose: str, step: int | Int[Arrays, ""] = 0) -> Key[jax.Array, ""]:
    """Make the key for one purpose at one step.

    Args:
      seed: of the run. purpose: one of PURPOSES.
      step: updates done, or any other number that tells two draws for one purpose apart. seed and step may be traced.
    Returns: a random key.
    """
    # Folded in one after the other: a sum of both would give two purposes the same key at different steps.
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose)), step)
