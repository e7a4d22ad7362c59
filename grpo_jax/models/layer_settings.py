"""Settings of a config.json that differ from layer to layer: kinds of layers, windows, rotary embeddings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from grpo_jax.errors import UserError
from grpo_jax.models.architecture import NO_ROPE, Delta
from grpo_jax.models.family import LOCAL_LAYERS, Family
from grpo_jax.models.rope_settings import read_growth, read_rope, rotary_settings
from grpo_jax.models.settings import Settings, positive, read_integer, unsupported

DELTA_SIZES = {  # settings -> fields of Delta
    "linear_num_key_heads": "num_key_heads",
    "linear_num_value_heads": "num_value_heads",
    "linear_key_head_dim": "key_dim",
    "linear_value_head_dim": "value_dim",
    "linear_conv_kernel_dim": "conv_width",
}


def read_positions(file: Path, config: Settings, family: Family) -> dict[str, Any]:
    """Return the fields of Architecture that say where layers look: windows and rotary embeddings.

    Args:
      file: config.json. config: its settings. family: says how they are read.
    Raises: UserError.
    """
    unturned = _layers_without_rope(file, config, family)
    window, windowed = _windows(file, config, family, unturned)
    key, given, local = rotary_settings(file, config, family.has_local_rope)
    share = config.get("partial_rotary_factor")
    if given.get("partial_rotary_factor") is not None:
        share = given["partial_rotary_factor"]
    share = positive(1.0 if share is None else share, f"{file}: partial_rotary_factor")
    if share > 1 or (share < 1 and not family.has_partial_rope):
        raise unsupported(file, f"{key}.partial_rotary_factor", share, 1.0)
    head_dim = config.get("head_dim")
    if share < 1 and isinstance(head_dim, int) and int(head_dim * share) % 2:  # transformers would turn one channel more
        raise unsupported(file, f"{key}.partial_rotary_factor", share, f"an even number of head_dim = {head_dim} channels")
    rope = read_rope(file, config, key, given, config.get("rope_theta", 10_000.0), family.rope_types, share)
    fields: dict[str, Any] = {"rope": dataclasses.replace(rope, is_interleaved=family.is_rope_interleaved)}
    if family.has_query_growth:
        fields["query_growth"] = read_growth(file, key, given)
    elif given.get("llama_4_scaling_beta") is not None:
        raise unsupported(file, f"{key}.llama_4_scaling_beta", given["llama_4_scaling_beta"], "absent")
    if windowed and unturned and windowed != unturned:
        raise unsupported(file, "layer_types", config.get("layer_types"), "windows in the layers without RoPE alone")
    if windowed or unturned:
        fields |= {"sliding_window": window, "local_layers": windowed or unturned}
    if unturned:
        fields["local_rope"] = NO_ROPE
    elif family.has_local_rope and windowed:
        theta = config["rope_local_base_freq"]
        fields["local_rope"] = read_rope(file, config, key, local, theta, family.rope_types, 1.0)
    return fields


def _layers_without_rope(file: Path, config: Settings, family: Family) -> tuple[int, ...]:
    """Return the numbers of the layers that have no rotary embedding, where a family has such."""
    if "no_rope_layers" not in family.defaults:
        return ()
    num_layers = read_integer(file, config, "num_hidden_layers")
    turned = config.get("no_rope_layers")
    if turned is None:
        period = read_integer(file, config, "no_rope_layer_interval")
        turned = [(i + 1) % period for i in range(num_layers)]
    if not isinstance(turned, list) or len(turned) < num_layers:
        raise UserError(f"{file}: no_rope_layers = {json.dumps(turned)}: expected a number for each of {num_layers} layers")
    return tuple(i for i in range(num_layers) if not turned[i])


def _windows(file: Path, config: Settings, family: Family, unturned: tuple[int, ...]) -> tuple[int | None, tuple[int, ...]]:
    """Return (tokens that a local layer's query sees, the local layers' numbers).

    Args:
      file: config.json. config: its settings. family: says how they are read. unturned: the layers without RoPE.
    """
    num_layers, kinds = read_integer(file, config, "num_hidden_layers"), config.get("layer_types")
    is_on = family.windows != "none" and (config.get("use_sliding_window") or "use_sliding_window" not in family.defaults)
    has_window = is_on and config.get("sliding_window") is not None
    known = ["full_attention"]
    if has_window and family.has_layer_types:
        known.append("sliding_attention")
    if family.has_delta:
        known.append("linear_attention")
    if not isinstance(kinds, list | None):
        raise UserError(f"{file}: layer_types = {json.dumps(kinds)}: expected a list, a kind for each layer")
    for kind in kinds or ():
        if kind not in known:
            raise unsupported(file, "layer_types", kind, ", ".join(known))
    if not has_window:
        return None, ()
    window = read_integer(file, config, "sliding_window")
    if kinds is not None and family.has_layer_types:
        if len(kinds) != num_layers:
            raise UserError(f"{file}: layer_types has {len(kinds)} entries; num_hidden_layers = {num_layers}")
        local = [kind == "sliding_attention" for kind in kinds]
    elif family.windows == "without rope":
        local = [i in unturned for i in range(num_layers)]
    else:
        local = [LOCAL_LAYERS[family.windows](i, _period(file, config, family)) for i in range(num_layers)]
    local_layers = tuple(i for i, is_local in enumerate(local) if is_local)
    if not local_layers:  # a window that no layer has would be another architecture, and another compiled program
        return None, ()
    return window, local_layers


def _period(file: Path, config: Settings, family: Family) -> int:
    """Return the number in the rule that says which layers have the window."""
    if isinstance(family.period, int):
        return family.period
    value = config[family.period]
    if value == 0 and family.windows == "from":  # from the first layer on
        return 0
    return read_integer(file, config, family.period)


def read_mixers(file: Path, config: Settings, family: Family) -> dict[str, Any]:
    """Return the fields of Architecture that say which layers are gated delta nets, and their sizes.

    Args: as in `read_positions`, which has checked the names in `layer_types`.
    Raises: UserError.
    """
    if not family.has_delta:
        return {}
    num_layers, kinds = read_integer(file, config, "num_hidden_layers"), config.get("layer_types")
    if kinds is None:
        interval = read_integer(file, config, "full_attention_interval")
        kinds = ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(num_layers)]
    if len(kinds) != num_layers:
        raise UserError(f"{file}: layer_types has {len(kinds)} entries; num_hidden_layers = {num_layers}")
    mixers = tuple("gated_delta" if kind == "linear_attention" else "attention" for kind in kinds)
    # The shortest run of layers that the stack repeats: each of its places is a stack of its own, and a program's text.
    period = next(p for p in range(1, num_layers + 1) if num_layers % p == 0 and mixers[:p] * (num_layers // p) == mixers)
    if "gated_delta" not in mixers:
        return {"mixers": mixers[:period]}
    sizes = {field: read_integer(file, config, key) for key, field in DELTA_SIZES.items()}
    if sizes["num_value_heads"] % sizes["num_key_heads"]:
        keys, values = sizes["num_key_heads"], sizes["num_value_heads"]
        raise UserError(f"{file}: linear_num_key_heads = {keys} must divide linear_num_value_heads = {values}")
    return {"mixers": mixers[:period], "delta": Delta(**sizes)}
