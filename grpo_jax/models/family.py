"""The form of an entry of `families.FAMILIES`: how a family's config.json becomes an Architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.models.rope_settings import TYPES
from grpo_jax.models.settings import Settings

# A setting of config.json -> (field of Architecture, what makes its value of the setting's).
Reads = Mapping[str, tuple[str, Callable[[Path, Settings, str], Any]]]


@dataclasses.dataclass(frozen=True)
class Family:
    """The facts that a `model_type` implies without saying so in config.json, and what else it reads there."""

    models: str  # that have it, and `beside`: its parts beside Llama's; for docs/models.md
    beside: str
    facts: Settings = dataclasses.field(default_factory=dict)  # fields of Architecture that all its models share
    defaults: Settings = dataclasses.field(default_factory=dict)  # of settings that its config.json may leave out
    aliases: Settings = dataclasses.field(default_factory=dict)  # other names of settings -> their own
    # Settings that become a field as they are. The folder of a family that does not read them must not have them.
    reads: Reads = dataclasses.field(default_factory=dict)
    required: Settings = dataclasses.field(default_factory=dict)  # settings it reads, of which the decoder has one value
    activations: tuple[str, ...] = ("silu",)  # the names of the one it has
    ffn_key: str = "intermediate_size"  # the setting that is F
    windows: str = "none"  # the layers that have one: a key of LOCAL_LAYERS, "none" or "without rope"
    period: int | str = 1  # the number in that rule, or the setting that holds it
    has_layer_types: bool = False  # `layer_types`, if there, says it instead
    is_embedding_scaled: bool = False  # embeddings are multiplied by sqrt(D)
    rope_types: tuple[str, ...] = TYPES
    has_local_rope: bool = False  # local layers have a rotary embedding of their own
    has_partial_rope: bool = False  # `partial_rotary_factor` counts
    is_rope_interleaved: bool = False  # pairs of channels that turn together are neighbours
    has_image_rope: bool = False  # its RoPE names sections for an image's axes, `mrope_*`
    has_delta: bool = False  # some layers are gated delta nets: `layer_types`, or all but every `full_attention_interval`-th
    has_query_growth: bool = False  # `llama_4_scaling_beta` counts


# Whether layer i has the window, of the family's period: (i, period) -> bool.
LOCAL_LAYERS: dict[str, Callable[[int, int], bool]] = {
    "all": lambda i, period: True,
    "from": lambda i, period: i >= period,
    "all but every last": lambda i, period: bool((i + 1) % period),
    "all but every first": lambda i, period: bool(i % period),
}


@dataclasses.dataclass(frozen=True)
class TextPart:
    """The change that makes a config.json of a known family of that of a model which does more than continue a text.

    models, becomes: those that have it, and the family of their text; for docs/models.md. settings: that replace its own.
    left_out: settings that are no text's.
    """

    models: str
    becomes: str
    settings: Settings = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ("vision_config", "auto_map")
