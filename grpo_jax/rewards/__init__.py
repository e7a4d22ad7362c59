"""Completions -> rewards: scorers, the worker processes they run in, and shaping."""

from grpo_jax.rewards.parts import score

__all__ = ["score"]
