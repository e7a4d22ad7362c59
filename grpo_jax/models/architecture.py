"""The shape of a decoder in plain, hashable facts, read from a Hugging Face config.json.

Hashable, because an `Architecture` is a static argument of compiled programs: equal ones share a program.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al., arXiv 2104.09864): channel pair i of H/2 turns by theta^(-2i/H) a token.

    factor: the pairs turn so many times slower; all of them (linear scaling), or with `llama3` only those that turn
    fewer than low_freq_factor times in the original context; those above high_freq_factor keep their speed, and the
    speeds in between are blended. llama3: (low_freq_factor, high_freq_factor, original context in tokens).
    """

    theta: float = 10_000.0
    factor: float = 1.0
    llama3: tuple[float, float, int] | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """All that distinguishes one decoder from another. `models/families.py` reads it from a model's folder."""

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_dim: int
    rope: Rope = Rope()
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    activation: str = "silu"  # of the gate; a key of transformer.ACTIVATIONS
    norm_plus_one: bool = False  # norms multiply by 1 + weight, before rounding to the compute dtype
    post_norms: bool = False  # what attention and MLP add to the stream is normed once more
    embed_scale: float = 1.0  # of the embeddings that enter the first layer
    query_scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    logit_cap: float | None = None  # logits become cap * tanh(logits / cap)
    sliding_window: int | None = None  # tokens that a query of a local layer sees, itself included
    local_layers: tuple[int, ...] = ()  # numbers of the layers that have the window
    local_rope: Rope | None = None  # of those layers; None: `rope`

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
        return {
            "tensor": {"num_heads": self.num_heads, "num_kv_heads": self.num_kv_heads, "ffn_dim": self.ffn_dim},
            "fsdp": {"dim": self.dim},
        }
