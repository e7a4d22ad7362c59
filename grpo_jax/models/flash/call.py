"""A call of attention without scores in memory: facts that are compiled in, and masks."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
from jaxtyping import Array, Float

from grpo_jax.parallel.hardware import Hardware

_log = logging.getLogger(__name__)


@functools.cache
def has_kernels(platform: str) -> bool:
    """Say if kernels for these devices are there; says once that a jax has none for GPUs any more."""
    if platform != "gpu":
        return platform == "tpu"
    # Deprecated since jax 0.11; of what is to come in its place nothing takes float32 or heads of any width.
    is_there = importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    if not is_there:
        say_once("attention by plain operations: this jax has no Pallas for Triton, which jax 0.7 to 0.12 have")
    return is_there


@functools.cache
def say_once(text: str) -> None:
    """Say which form of attention stands in for the one that is usual here."""
    _log.warning(text)


@flax.struct.dataclass
class CausalRows:
    """Rows that see themselves causally, and their prompt: what a kernel is told in place of masks.

    own_BT: int32, 1 on tokens. prompt_PS: int32, 1 on tokens of left-padded prompts; None without prompts. is_local: bool, the
    window holds; None: it does where there is one. window: tokens that a query sees, itself included; None: all before it.
    is_left_padded: padding stands before the tokens of own_BT, and must not be seen; behind them causality hides it.
    """

    own_BT: Any
    prompt_PS: Any
    is_local: Any
    window: int | None = flax.struct.field(pytree_node=False)
    is_left_padded: bool = flax.struct.field(pytree_node=False)
    hardware: Hardware = flax.struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True)
class Call:
    """Facts that are compiled into a call.

    hardware, window, is_left_padded: as in `CausalRows`. prompt_slots: S, before it was padded to blocks. cap: of the scores.
    is_before: rows' keys, of any number, are of earlier tokens than all queries. is_whole: arrays are those of `whole`.
    scale: of its scores; other kernels take scaled queries.
    """

    hardware: Hardware
    prompt_slots: int
    cap: float | None
    window: int | None = None
    is_left_padded: bool = False
    is_before: bool = False
    is_whole: bool = False
    scale: float = 1.0


KeysAndValues = tuple[Float[Array, "R K U H"], Float[Array, "R K U H"]]
Masks = tuple[Any, Any, Any]  # own_BT, prompt_PS, is_local of `CausalRows`


def by_kind(call: Call, masks: Masks, run: Callable[[int | None], Any]) -> Any:
    """Run with the window or without; where only the compiled program knows which, it chooses."""
    is_local = masks[2]
    if is_local is None or call.window is None:
        return run(call.window)
    return jax.lax.cond(is_local, lambda: run(call.window), lambda: run(None))
