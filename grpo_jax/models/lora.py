"""LoRA (Hu et al., arXiv 2106.09685): the weights stay as they are, low-rank differences to them are trained.

y = x W^T + alpha / rank * (x A^T) B^T, with A [rank, in] random and B [out, rank] zero at the start, so that training begins
at the base model. The base is the policy with its adapters off: with a KL penalty it is the reference, and no second copy
is held. Written out here because the layers are stacked and scanned; libraries that patch matrix products do not see them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from grpo_jax.models.architecture import Architecture
from grpo_jax.types import Params

ADAPTERS = ("lora_a", "lora_b")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # matrices that can have adapters
DELTA_TARGETS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")  # and of gated delta nets
ALL_LINEAR = "all-linear"  # PEFT's name for all that a model has


def targets_of(arch: Architecture) -> tuple[str, ...]:
    """Return the names of the matrices of this model that can have adapters."""
    attention, mlp = TARGETS[:4], TARGETS[4:]
    return (
        *(attention if "attention" in arch.mixers else ()),
        *(DELTA_TARGETS if "gated_delta" in arch.mixers else ()),
        *mlp,
    )


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The adapters of a model: their rank, alpha, and the matrices that have one (Hugging Face's names, in every layer).

    use_rslora: scaled by alpha / sqrt(rank) (Kalajdzievski, arXiv 2312.03732) in place of alpha / rank.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """The factor of the product B A."""
        # Divided by the rank, so that a learning rate found at one rank serves at another.
        if self.use_rslora:
            return self.alpha / math.sqrt(self.rank)
        return self.alpha / self.rank


def adapter_of(lora: LoRA | None, name: str) -> LoRA | None:
    """Return `lora` if the matrix of this Hugging Face name ("q_proj") gets an adapter, else None."""
    if lora is None or name not in lora.targets:
        return None
    return lora


def init_adapters(shapes: Params, key: Array) -> Params:
    """Draw float32 adapters for a tree of parameter shapes: A uniform within 1 / sqrt(in), B zero (as PEFT has it)."""
    flat: dict[Any, Any] = flatten_dict(split_adapters(shapes)[1])

    def draw(number: int, name: str, shape: jax.ShapeDtypeStruct) -> Array:
        # Only one of the two is zero: with both no gradient would reach either. Zero B keeps A's gradient at 0 for one step.
        if name == "lora_b":
            return jnp.zeros(shape.shape)
        bound = shape.shape[-1] ** -0.5
        return jax.random.uniform(jax.random.fold_in(key, number), shape.shape, minval=-bound, maxval=bound)

    # Sorted: the number that an adapter's random key is made of must not depend on the order of a dict.
    return unflatten_dict({path: draw(i, path[-1], shape) for i, (path, shape) in enumerate(sorted(flat.items()))})


def split_adapters(params: Params) -> tuple[Params, Params]:
    """Split parameters -> (base weights, adapters); the inverse of `types.join_params`."""
    flat: dict[Any, Any] = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1] in ADAPTERS}
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path not in adapters}), unflatten_dict(adapters)


def merge_adapters(base: Params, adapters: Params, lora: LoRA) -> Params:
    """Compute ordinary float32 weights, W + alpha / rank * B A: the policy as a model without adapters.

    Args:
      base: the frozen weights, of any dtype. adapters: of `split_adapters`. lora: gives the scale.
    Returns: float32, the tree of `base`.
    """
    flat: dict[Any, Any] = flatten_dict(base)
    low_rank: dict[Any, Any] = flatten_dict(adapters)

    def merge(path: tuple[str, ...], W: Array) -> Array:
        a, b = (low_rank.get((*path[:-1], name)) for name in ADAPTERS)
        # float32 before the sum: a base in bfloat16 has too few digits for a small difference, and would swallow it.
        W = jnp.asarray(W, jnp.float32)
        if path[-1] != "weight" or a is None:
            return W
        if W.ndim == 4:  # experts', [L, E, in, out]
            return W + lora.scale * jnp.einsum("leor,leri->leio", b, a)
        return W + lora.scale * jnp.einsum("lor,lri->loi", b, a)

    return unflatten_dict({path: merge(path, W) for path, W in flat.items()})
