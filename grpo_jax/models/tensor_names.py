"""The place of each of the decoder's leaves in a Hugging Face folder: tensors' names, by an architecture's facts and layout."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.transformer import init_params

# Ours -> theirs; the first `{}` is the layer's number, our leading axis, a second one the expert's. Which of these exist
# follows from the architecture. Where kinds of layers alternate, ours have the place in the period behind "layers.".
NAMES = {
    "embed": "model.embed_tokens.weight",
    "layers.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "layers.attn.q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "layers.attn.q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "layers.attn.q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "layers.attn.k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "layers.attn.k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "layers.attn.k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "layers.attn.v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "layers.attn.v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "layers.attn.o.weight": "model.layers.{}.self_attn.o_proj.weight",
    "layers.attn.o.bias": "model.layers.{}.self_attn.o_proj.bias",
    "layers.attn.qkv.weight": "model.layers.{}.linear_attn.in_proj_qkv.weight",
    "layers.attn.output_gate.weight": "model.layers.{}.linear_attn.in_proj_z.weight",
    "layers.attn.strength.weight": "model.layers.{}.linear_attn.in_proj_b.weight",
    "layers.attn.rate.weight": "model.layers.{}.linear_attn.in_proj_a.weight",
    "layers.attn.conv.weight": "model.layers.{}.linear_attn.conv1d.weight",
    "layers.attn.log_rate": "model.layers.{}.linear_attn.A_log",
    "layers.attn.rate_bias": "model.layers.{}.linear_attn.dt_bias",
    "layers.attn.norm.weight": "model.layers.{}.linear_attn.norm.weight",
    "layers.attn.out.weight": "model.layers.{}.linear_attn.out_proj.weight",
    "layers.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp.gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "layers.mlp.up.weight": "model.layers.{}.mlp.up_proj.weight",
    "layers.mlp.down.weight": "model.layers.{}.mlp.down_proj.weight",
    "layers.mlp.router.weight": "model.layers.{}.mlp.gate.weight",
    "layers.mlp.expert_gate.weight": "model.layers.{}.mlp.experts.{}.gate_proj.weight",
    "layers.mlp.expert_up.weight": "model.layers.{}.mlp.experts.{}.up_proj.weight",
    "layers.mlp.expert_down.weight": "model.layers.{}.mlp.experts.{}.down_proj.weight",
    "final_norm.weight": "model.norm.weight",
    "head": "lm_head.weight",
}
EMBED, HEAD = NAMES["embed"], NAMES["head"]
DEPTHWISE = "layers.attn.conv.weight"  # [X, W]: a convolution of every channel by itself, which torch stores as [X, 1, W]
# With norms after attention and MLP, the name of Llama's second norm is given to another one.
POST_NORMS = {
    "layers.attn_post_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "layers.mlp_norm.weight": "model.layers.{}.pre_feedforward_layernorm.weight",
    "layers.mlp_post_norm.weight": "model.layers.{}.post_feedforward_layernorm.weight",
}
# `Architecture.layout`: what of the names follows from no fact of the computation. Several of ours under one name of theirs are
# joined there, one below the other, in this order.
LAYOUTS = {
    "glm4_norms": {
        "layers.attn_post_norm.weight": "model.layers.{}.post_self_attn_layernorm.weight",
        "layers.mlp_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
        "layers.mlp_post_norm.weight": "model.layers.{}.post_mlp_layernorm.weight",
    },
    "joined_qkv": {
        "layers.attn.q.weight": "model.layers.{}.self_attn.qkv_proj.weight",
        "layers.attn.k.weight": "model.layers.{}.self_attn.qkv_proj.weight",
        "layers.attn.v.weight": "model.layers.{}.self_attn.qkv_proj.weight",
    },
    "joined_gate_up": {
        "layers.mlp.gate.weight": "model.layers.{}.mlp.gate_up_proj.weight",
        "layers.mlp.up.weight": "model.layers.{}.mlp.gate_up_proj.weight",
    },
}


@dataclasses.dataclass(frozen=True)
class Slot:
    """One leaf of the parameters: the tensors it is made of, and what of each it is.

    names: one a layer if the leaf is stacked, and of experts one a layer and expert. shape: of each part, without `stack`.
    stack: the leaf's leading axes, () if it is one tensor. first_row: of the part in the stored tensor.
    stored_shape: of the stored tensor, which may hold other leaves too. is_transposed: a part is stored the other way round.
    is_depthwise: it is stored with an axis of size 1 in its middle.
    """

    names: list[str]
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    first_row: int
    stored_shape: tuple[int, ...]
    is_transposed: bool = False
    is_depthwise: bool = False

    @property
    def is_stacked(self) -> bool:
        """True if the leaf is made of several tensors."""
        return bool(self.stack)

    @property
    def is_joined(self) -> bool:
        """True if the stored tensors hold more than this leaf."""
        return self.stored_part != self.stored_shape

    @property
    def stored_part(self) -> tuple[int, ...]:
        """The shape of each part as it is stored."""
        if self.is_transposed:
            return self.shape[::-1]
        if self.is_depthwise:
            return (self.shape[0], 1, *self.shape[1:])
        return self.shape


def names_of(architecture: Architecture) -> dict[str, str]:
    """Return ours -> theirs, `{}` for the layer's number."""
    names = dict(NAMES)
    if architecture.post_norms:
        names.update(POST_NORMS)
    for layout in architecture.layout:
        names.update(LAYOUTS[layout])
    return names


def param_slots(architecture: Architecture) -> tuple[list[Slot], Any]:
    """Return the decoder's leaves as slots, in their order, and the tree they form."""
    leaf_shapes, treedef = _leaf_shapes(architecture)
    return [_slot(ours, architecture) for ours in leaf_shapes], treedef


def leaf_slot(ours: str, architecture: Architecture) -> Slot:
    """Return the slot of one leaf, "layers.attn.q.weight", or of a place in the period "layers.3.attn.q.weight"."""
    return _slot(ours, architecture)


@functools.lru_cache
def _leaf_shapes(architecture: Architecture) -> tuple[dict[str, tuple[int, ...]], Any]:
    """Return the shapes of the decoder's leaves, in their order, and the tree they form."""
    # From the decoder itself, abstractly: a second list of its parameters could differ from it.
    shapes = jax.eval_shape(lambda: init_params(architecture, jax.random.key(0)))
    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    return {".".join(str(key.key) for key in keys): leaf.shape for keys, leaf in leaves}, treedef


def _slot(ours: str, architecture: Architecture) -> Slot:
    """Return the slot of one leaf, from the names and shapes of all."""
    names, leaf_shapes = names_of(architecture), _leaf_shapes(architecture)[0]
    place, of_layer = _split_place(ours)
    pattern = names[of_layer]
    num_axes = pattern.count("{}")
    stack, shape = leaf_shapes[ours][:num_axes], leaf_shapes[ours][num_axes:]
    numbers = [range(size) for size in stack]
    if numbers:  # the layers at this place
        numbers[0] = range(place, architecture.num_layers, architecture.period)
    names_of_parts = [pattern.format(*each) for each in itertools.product(*numbers)]
    if num_axes > 1:  # experts'
        return Slot(names_of_parts, shape, stack, 0, shape[::-1], is_transposed=True)
    if of_layer == DEPTHWISE:
        return Slot(names_of_parts, shape, stack, 0, (shape[0], 1, *shape[1:]), is_depthwise=True)
    rows, first_row = 0, 0
    for other in [name for name in names if names[name] == pattern]:
        at_place = ours.removesuffix(of_layer.removeprefix("layers.")) + other.removeprefix("layers.")
        if at_place in leaf_shapes:
            if other == of_layer:
                first_row = rows
            rows += leaf_shapes[at_place][num_axes]
    return Slot(names_of_parts, shape, stack, first_row, (rows, *shape[1:]))


def _split_place(ours: str) -> tuple[int, str]:
    """Split "layers.3.attn.q.weight" -> (3, "layers.attn.q.weight"); without a place it is 0."""
    first, _, rest = ours.partition(".")
    place, _, inner = rest.partition(".")
    if first == "layers" and place.isdigit():
        return int(place), f"layers.{inner}"
    return 0, ours
