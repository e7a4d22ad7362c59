"""Causal attention without scores in memory, by the kernels of accelerators."""

from grpo_jax.models.flash.attend import MIN_QUERIES, SAVED_NAME, attend_causally, suits
from grpo_jax.models.flash.call import CausalRows
from grpo_jax.models.flash.single import NewestTokens, attend_filled, attend_newest

__all__ = [
    "MIN_QUERIES",
    "SAVED_NAME",
    "CausalRows",
    "NewestTokens",
    "attend_causally",
    "attend_filled",
    "attend_newest",
    "suits",
]
