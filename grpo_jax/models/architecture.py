"""The shape of a decoder in plain, hashable facts, read from a Hugging Face config.json.

Hashable, because an `Architecture` is a static argument of compiled programs: equal ones share a program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Yarn:
    """The channel pairs that YaRN slows down (Peng et al., arXiv 2309.00071).

    Those that turn more than beta_fast times in the original context keep their speed, those that turn fewer than beta_slow
    times are slowed down in full, and a ramp over the pairs' numbers leads from one to the other.
    context: the original one, in tokens. truncate: the ramp begins and ends at whole numbers.
    """

    beta_fast: float
    beta_slow: float
    context: int
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864): channel pair i of R/2 turns by theta^(-2i/R) a token.

    factor: the pairs turn so many times slower; all of them (linear scaling), or with `llama3` only those that turn
    fewer than low_freq_factor times in the original context; those above high_freq_factor keep their speed, and the
    speeds in between are blended; or with `yarn` those that it says. llama3: (low_freq_factor, high_freq_factor, original
    context in tokens). magnitude: of cosine and sine (YaRN's attention factor). share: R / H, the first R channels of a head
    turn. is_interleaved: pairs are neighbours, channels 2i and 2i + 1; else channel i turns with i + R/2.
    """

    theta: float = 10_000.0
    factor: float = 1.0
    llama3: tuple[float, float, int] | None = None
    yarn: Yarn | None = None
    magnitude: float = 1.0
    share: float = 1.0
    is_interleaved: bool = False


NO_ROPE = Rope(factor=math.inf)  # nothing turns: cosines are 1, sines 0


@dataclasses.dataclass(frozen=True)
class Delta:
    """The sizes of a gated delta net. Each key head has num_value_heads / num_key_heads value heads."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int  # channels of a key
    value_dim: int
    conv_width: int  # tokens that an output of its convolution sees, its own included

    @property
    def num_channels(self) -> int:
        """Channels of queries, keys and values together: those of the convolution."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim


@dataclasses.dataclass(frozen=True)
class Architecture:
    """All that distinguishes one decoder from another. `models/families.py` reads it from a model's folder."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int  # of the MLP, or of one expert
    rope: Rope = Rope()
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = False
    qk_norm_spans_heads: bool = False  # one norm over all heads' channels; else one a head
    qkv_bias: bool = False
    o_bias: bool = False
    mixers: tuple[str, ...] = ("attention",)  # the layers' kinds, again and again: keys of block.MIXERS
    delta: Delta | None = None  # of layers of the kind "gated_delta"
    has_output_gate: bool = False  # heads' outputs of attention are multiplied by sigmoids, of the input, channel by channel
    mlp: str = "dense"  # a key of block.MLPS
    num_experts: int = 0  # "experts": E, of which each token takes `experts_per_token`
    experts_per_token: int = 0
    is_router_normalised: bool = False  # the chosen experts' weights are divided by their sum
    activation: str = "silu"  # of the gate; a key of block.ACTIVATIONS
    norm_plus_one: bool = False  # norms multiply by 1 + weight, before rounding to the compute dtype
    norm_rounds_last: bool = False  # norms multiply by the weight before rounding to the compute dtype
    pre_norms: bool = True  # what enters attention and MLP is normed
    post_norms: bool = False  # what attention and MLP add to the stream is normed
    embed_scale: float = 1.0  # of the embeddings that enter the first layer
    residual_scale: float = 1.0  # of what attention and MLP add to the stream
    query_scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    query_growth: tuple[float, int] | None = None  # (b, c): queries x 1 + b ln(1 + floor(position / c)), positions in tokens
    score_cap: float | None = None  # attention scores become cap * tanh(scores / cap), before the mask
    logit_cap: float | None = None  # logits become cap * tanh(logits / cap)
    logit_divisor: float = 1.0  # of the logits
    sliding_window: int | None = None  # tokens that a query of a local layer sees, itself included; None: all before it
    local_layers: tuple[int, ...] = ()  # numbers of the layers that have the window, and `local_rope`
    local_rope: Rope | None = None  # of those layers; None: `rope`
    layout: tuple[str, ...] = ()  # how its folders name and join tensors: keys of tensor_names.LAYOUTS

    @property
    def period(self) -> int:
        """The number of layers after which their kinds repeat; it divides the number of layers."""
        return len(self.mixers)

    @property
    def num_attention_layers(self) -> int:
        """Layers that keep keys and values."""
        return self.mixers.count("attention") * (self.num_layers // self.period)

    def split_places(self, layers: Any) -> list[Any]:
        """Return the parameters of the layers by their place in the period, [L / period, ...] each."""
        if self.period == 1:
            return [layers]
        return [layers[str(place)] for place in range(self.period)]

    def join_places(self, places: Sequence[Any]) -> Any:
        """Return the tree that `split_places` splits."""
        if self.period == 1:
            return places[0]
        return {str(place): layers for place, layers in enumerate(places)}

    @property
    def attention_scale(self) -> float:
        """The factor of attention scores."""
        if self.query_scale is not None:
            return self.query_scale
        return self.head_dim**-0.5

    @property
    def sharded_sizes(self) -> dict[str, dict[str, int]]:
        """Mesh axis -> the sizes that it must divide."""
        # Query and key/value heads are sharded alike: a device that held a query without its key would have to fetch it.
        # The vocabulary is missing on purpose: one that does not divide is replicated (`sharding.param_spec`).
        cut = {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "ffn_dim": self.ffn_dim}
        if self.delta is not None:
            cut |= {"delta.num_key_heads": self.delta.num_key_heads, "delta.num_value_heads": self.delta.num_value_heads}
        experts = {"num_experts": self.num_experts} if self.num_experts else {}
        return {"tensor": cut, "expert": experts, "fsdp": {"dim": self.dim}}
