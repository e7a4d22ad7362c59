"""Randomness is a function of (seed, purpose, step) and nothing else, so a resumed run repeats itself bitwise."""

from __future__ import annotations

from typing import Any

import jax

PURPOSES = ("init", "prompts", "rollout", "shuffle", "minibatches", "warm_start", "evaluate", "adapters")


def key_for(seed: Any, purpose: str, step: Any = 0):
    """The key for one purpose at one step (seed and step may be traced)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), PURPOSES.index(purpose)), step)
