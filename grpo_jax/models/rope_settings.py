"""The rotary settings of a config.json -> `Rope`: two layouts of old and new files, and the ways of slowing it down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.models.architecture import Rope, Yarn
from grpo_jax.models.settings import Settings, positive, unsupported

TYPES = ("default", "linear", "llama3", "yarn")
KINDS = ("full_attention", "sliding_attention")  # of layers, where each has an embedding of its own


def rotary_settings(file: Path, config: Settings, has_local_rope: bool) -> tuple[str, Settings, Settings]:
    """Find the settings of the rotary embedding.

    Args:
      file: config.json. config: its settings. has_local_rope: local layers have an embedding of their own.
    Returns: (the key they are under, those of all layers or of the global ones, those of local layers).
    Raises: UserError if they are in a layout that the family does not read.
    """
    # transformers 5 keeps all of it in `rope_parameters` (one for each kind of layer, if they differ), older ones in
    # `rope_theta`, `rope_scaling` and `rope_local_base_freq`. The key is kept, as messages name it.
    key = "rope_parameters"
    if config.get("rope_scaling"):
        key = "rope_scaling"
        if has_local_rope and config.get("rope_parameters"):
            raise UserError(f"{file}: rope_scaling beside rope_parameters; leave one of them out")
    given = config.get(key) or {}
    if not isinstance(given, dict):
        raise UserError(f"{file}: {key}: expected an object, got {type(given).__name__}")
    is_nested = any(kind in given for kind in KINDS)
    if is_nested and (not has_local_rope or key == "rope_scaling"):
        raise UserError(f"{file}: {key}: this family has one rotary embedding for all layers, here are two")
    if has_local_rope and key == "rope_scaling" and "type" in given and "rope_type" not in given:
        # transformers has set `rope_type` to "default" by then, and would not look at the older name.
        raise unsupported(file, "rope_scaling.type", given["type"], "the same as rope_type")
    if not has_local_rope or key == "rope_scaling":
        return key, given, {}
    if given and not is_nested:
        raise UserError(f"{file}: {key}: this family has two rotary embeddings, under {' and '.join(KINDS)}; here is one")
    if is_nested and given.get("truncate") is not None:
        raise unsupported(file, f"{key}.truncate", given["truncate"], "absent")
    of_all, of_local = (_object(file, f"{key}.{kind}", given.get(kind) or {}) for kind in KINDS)
    return key, of_all, of_local


def _object(file: Path, key: str, value: Any) -> Settings:
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key}: expected an object, got {type(value).__name__}")
    if value.get("truncate") is False:  # transformers would not see it there
        raise unsupported(file, f"{key}.truncate", False, True)
    return value


def read_rope(
    file: Path, config: Settings, key: str, given: Settings, theta: Any, types: tuple[str, ...], share: float
) -> Rope:
    """Read one rotary embedding.

    Args:
      file: config.json. config: its settings. key, given: of the rotary ones, from `rotary_settings`.
      theta: where `given` has none. types: that the family has. share: of the channels that turn.
    Raises: UserError naming the setting that is malformed or not supported.
    """
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in types:
        raise unsupported(file, f"{key}.rope_type", kind, ", ".join(types))
    rope = Rope(positive(given.get("rope_theta", theta), f"{file}: rope_theta"), share=share)
    if kind == "default":
        return rope

    def number(name: str, default: Any = None) -> float:
        value = given.get(name)
        if value is None:
            value = default
        return positive(value, f"{file}: {key}.{name}", f", for {kind} scaling")

    if kind == "linear":
        return dataclasses.replace(rope, factor=number("factor"))
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if high <= low:
            raise UserError(f"{file}: {key}.high_freq_factor = {high}: must be above low_freq_factor = {low}")
        return dataclasses.replace(rope, factor=number("factor"), llama3=(low, high, _context(file, config, key, number)))
    fast, slow, factor = number("beta_fast", 32.0), number("beta_slow", 1.0), number("factor")
    if fast < slow:
        raise UserError(f"{file}: {key}.beta_fast = {fast}: must not be below beta_slow = {slow}")
    yarn = Yarn(fast, slow, _context(file, config, key, number), given.get("truncate", True) is not False)
    return dataclasses.replace(rope, factor=factor, yarn=yarn, magnitude=_magnitude(file, key, given, factor))


def _context(file: Path, config: Settings, key: str, number: Callable[..., float]) -> int:
    """Read the context, in tokens, that the model was trained for before it was extended."""
    context = int(number("original_max_position_embeddings", config.get("max_position_embeddings")))
    # Some families take this one, others the one beside `factor`.
    outer = config.get("original_max_position_embeddings")
    if outer is not None and outer != context:
        raise unsupported(file, "original_max_position_embeddings", outer, f"{context}, as in {key}")
    return context


def _magnitude(file: Path, key: str, given: Settings, factor: float) -> float:
    """Return YaRN's attention factor: as it is set, or as it follows from `factor`."""
    if given.get("attention_factor") is not None:
        return positive(given["attention_factor"], f"{file}: {key}.attention_factor")

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if not (given.get("mscale") and given.get("mscale_all_dim")):
        return grown(1.0)
    scale, scale_all = (positive(given[name], f"{file}: {key}.{name}") for name in ("mscale", "mscale_all_dim"))
    return grown(scale) / grown(scale_all)


def read_growth(file: Path, key: str, given: Settings) -> tuple[float, int]:
    """Read the growth of queries with their positions, `Architecture.query_growth`.

    Args:
      file: config.json. key, given: of the rotary settings, from `rotary_settings`.
    Raises: UserError.
    """
    beta, context = "llama_4_scaling_beta", "original_max_position_embeddings"
    return (
        positive(given.get(beta), f"{file}: {key}.{beta}"),
        int(positive(given.get(context), f"{file}: {key}.{context}")),
    )
