"""LoRA (Hu et al., arXiv 2106.09685): the weights stay as they are, low-rank differences to them are trained.

y = x W^T + alpha / rank * (x A^T) B^T, with A [rank, in] random and B [out, rank] zero at the start, so that training begins
at the base model. The base is the policy with its adapters off: with a KL penalty it is the reference, and no second copy
is held. Written out here because the layers are stacked and scanned; libraries that patch matrix products do not see them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from grpo_jax.types import Params

ADAPTERS = ("lora_a", "lora_b")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Which matrices get adapters (by Hugging Face's names, in every layer), of what rank, scaled by alpha / rank."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied by."""
        return self.alpha / self.rank


def adapter_of(lora: LoRA | None, name: str) -> LoRA | None:
    """Return `lora` if the matrix of this Hugging Face name ("q_proj") gets an adapter, else None."""
    if lora is None or name not in lora.targets:
        return None
    return lora


def init_adapters(shapes: Params, key: Any) -> Params:
    """Fresh float32 adapters for a tree of parameter shapes: A uniform within 1 / sqrt(in), B zero (as PEFT has it)."""
    flat: dict[Any, Any] = flatten_dict(split_adapters(shapes)[1])

    def fresh(number: int, name: str, shape: Any):
        if name == "lora_b":
            return jnp.zeros(shape.shape)
        bound = shape.shape[-1] ** -0.5
        return jax.random.uniform(jax.random.fold_in(key, number), shape.shape, minval=-bound, maxval=bound)

    return unflatten_dict({path: fresh(i, path[-1], shape) for i, (path, shape) in enumerate(sorted(flat.items()))})


def split_adapters(params: Params) -> tuple[Params, Params]:
    """-> (base weights, adapters), the inverse of `types.join_params`."""
    flat: dict[Any, Any] = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if path[-1] in ADAPTERS}
    return unflatten_dict({path: leaf for path, leaf in flat.items() if path not in adapters}), unflatten_dict(adapters)


def merge_adapters(base: Params, adapters: Params, lora: LoRA) -> Params:
    """Ordinary float32 weights, W + alpha / rank * B A: the policy as a model without adapters."""
    flat: dict[Any, Any] = flatten_dict(base)
    low_rank: dict[Any, Any] = flatten_dict(adapters)

    def weight(path: tuple[str, ...], W: Any):
        a, b = (low_rank.get((*path[:-1], name)) for name in ADAPTERS)
        W = jnp.asarray(W, jnp.float32)
        return W if path[-1] != "weight" or a is None else W + lora.scale * jnp.einsum("lor,lri->loi", b, a)

    return unflatten_dict({path: weight(path, W) for path, W in flat.items()})
