"""Ceilings of the machine, measured, and the least that the work needs, counted from the decoder's own parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from grpo_jax.models.architecture import Architecture
from grpo_jax.models.gated_delta import chunk_size
from grpo_jax.models.transformer import ModelDef
from grpo_jax.parallel.sharding import PARAM_LOGICAL_AXES
from grpo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates of one device: of square matrix products, and of reading memory."""

    flops_per_s: float
    bytes_per_s: float


@dataclasses.dataclass(frozen=True)
class Sizes:
    """P prompts of S tokens, P * G completions of T tokens; means where they are ragged."""

    P: float
    G: int
    S: float
    T: float


def measure_ceilings(dtype: Any, bytes_read: float) -> Ceilings:
    """Measure this machine's rates: the best of several sizes, kinds and calls.

    dtype: of the matrix products. bytes_read: read over and over, for a small model's weights stay in the cache.
    """
    sizes = (4096, 8192)
    if jax.default_backend() == "cpu":
        sizes = (1024, 2048)  # a core reaches its rate there already, and the larger ones would take seconds a call
    # A ceiling must not be lower than what the work itself reaches, or shares of more than 1 come out. So the best counts, and
    # reading is tried in the ways in which XLA compiles it: its speed on a CPU differs between them.
    products = [product_rate(n, dtype) for n in sizes]
    return Ceilings(max(products), max(read_rate(probe, bytes_read) for probe in PROBES))


def product_rate(n: int, dtype: Any) -> float:
    """Measure the FLOP/s of an [n, n] product."""
    square = jax.random.normal(jax.random.key(0), (n, n)).astype(dtype)
    return 2.0 * n**3 / best_secs(jax.jit(lambda a: a @ a), square)


def _as_head(matrix_VD, x_D):
    """Compute the logits of one row, as decoding does."""
    return jnp.einsum("bd,vd->bv", x_D[None], matrix_VD)[0]


def _as_product(matrix_VD, x_D):
    return matrix_VD @ x_D


def _as_reduction(matrix_VD, x_D):
    return jnp.maximum(matrix_VD, x_D[None]).max(1)


PROBES = (_as_head, _as_product, _as_reduction)


def read_rate(probe: Callable[[Any, Any], Any], bytes_read: float) -> float:
    """Measure the bytes/s of reading a float32 matrix of about so many bytes again and again."""
    D = 512
    V = max(D, int(bytes_read) // (4 * D))
    matrix_VD = jax.random.normal(jax.random.key(0), (V, D))
    num_passes = max(4, (1 << 28) // matrix_VD.nbytes)

    # Each pass works on the last one's result: XLA would run independent ones only once. They are many in one call, so that
    # the time of starting it does not count.
    @jax.jit
    def passes(matrix_VD, x_D):
        return jax.lax.fori_loop(0, num_passes, lambda _, x_D: probe(matrix_VD, x_D)[:D] * 1e-2, x_D)

    return num_passes * matrix_VD.nbytes / best_secs(passes, matrix_VD, jnp.ones(D))


def best_secs(call: Callable[..., Any], *args: Any, repeats: int = 8) -> float:
    """Time the quickest of several calls, after one that compiles. Seconds."""
    # The quickest and not the median: other processes of the machine only ever make a call slower.
    jax.block_until_ready(call(*args))
    secs = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(call(*args))
        secs.append(time.perf_counter() - began)
    return min(secs)


@dataclasses.dataclass(frozen=True)
class PerToken:
    """Numbers of a decoder that one token meets, counted from the decoder's own parameters and caches.

    layer_weights: in the matrices of all layers, of experts in those k that take the token. expert_weights: in all matrices of
    all experts. head_shape: (V, D) of the output matrix. cached: keys and values that all layers keep of the token.
    held: numbers of the states that they keep of its row, however long. expert_share: k / E, 0 without experts.
    """

    layer_weights: int
    expert_weights: int
    head_shape: tuple[int, int]
    cached: int
    held: int
    expert_share: float

    @property
    def weights(self) -> int:
        """Numbers in all matrices that a token is multiplied with, the head's too."""
        return self.layer_weights + math.prod(self.head_shape)

    def weights_read(self, num_rows: float) -> float:
        """Count the numbers in all matrices that so many tokens are multiplied with, each taking experts at random."""
        one_taken = round(self.expert_weights * self.expert_share)
        return self.weights - one_taken + self.expert_weights * (1 - (1 - self.expert_share) ** num_rows)


@functools.lru_cache
def per_token(model: ModelDef) -> PerToken:
    """Count a decoder's matrices and caches. Raises ValueError: it holds something that this counting does not know."""
    params = model.param_shapes()
    matrices = layer_matrices(params)
    layers = sum(leaf.size for leaf in matrices.values() if leaf.ndim == 3)
    experts = sum(leaf.size for leaf in matrices.values() if leaf.ndim == 4)
    share = 0.0
    if experts:
        share = model.arch.experts_per_token / model.arch.num_experts
    kept = cached_numbers(model, params)
    return PerToken(layers + round(experts * share), experts, head_matrix(params).shape, *kept, share)


def layer_matrices(params: Params) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Find every matrix of the layers by its path: a token and layer costs 2 * out * in operations in each.

    [L, out, in], and [L, E, out, in] where the table of shardings knows it as experts', of which a token meets a few.
    A leaf of any other rank would make the counts wrong without a word (of a second table next to the embedding nobody knows
    how often a token meets it), so it raises ValueError.
    """
    leaves: dict[tuple[str, ...], Any] = flatten_dict(params)
    found = {}
    for path, leaf in leaves.items():
        if path in (("embed",), ("head",)):
            continue  # looked up, and counted by `head_matrix`
        is_layer = path[0] == "layers"
        rank = len(leaf.shape) - is_layer  # without the layers' axis
        is_experts = len(PARAM_LOGICAL_AXES.get(path[-2] if len(path) > 1 else "", ())) == 3
        if is_layer and rank == 2 + is_experts:
            found[path] = leaf
        elif rank > 1:
            raise ValueError(f"{'/'.join(path)} {leaf.shape}: no matrix [L, out, in] of a layer and no vector; count it here")
    return found


def head_matrix(params: Params) -> jax.ShapeDtypeStruct:
    """Find the output matrix [V, D]: the head, or the embedding where the two are tied."""
    return params.get("head", params["embed"])


def cached_numbers(model: ModelDef, params: Params) -> tuple[int, int]:
    """Count what all layers keep, from what `Decoder.encode_prompts` returns: (keys and values of a token, states of a row).

    Raises ValueError: the cache does not grow by the same for each token, as `step_bytes` takes it.
    """

    def numbers(num_tokens: int) -> int:
        tokens_PS = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32)
        _, prefix = jax.eval_shape(lambda p, t: model.bind(p).encode_prompts(t, t > 0), params, tokens_PS)
        return sum(x.size for x in jax.tree.leaves(prefix.cache))

    one, two, three = map(numbers, (1, 2, 3))
    if three - two != two - one:
        raise ValueError(f"caches of {one}, {two} and {three} numbers for one, two and three tokens: not in proportion")
    return two - one, 2 * one - two


def attention_flops(arch: Architecture, pairs: float) -> float:
    """Count the products of so many pairs of query and key, and of weights and values, in all heads of all attention layers."""
    # No parameter has these products, so they are not in `layer_matrices` and this formula is written by hand: 2 x H operations
    # for a score and 2 x H to add its value. Sliding windows are left out.
    return 4 * arch.num_attention_layers * arch.num_heads * arch.head_dim * pairs


def delta_flops(arch: Architecture, num_tokens: int) -> float:
    """Count a token's products with states and with other tokens of its chunk, in all heads of all gated delta nets.

    Args:
      arch: the decoder's. num_tokens: of the rows, which decides how long a chunk is.
    """
    if arch.delta is None:
        return 0.0
    # By hand as well, from `gated_delta.run_chunks`: a token meets the state three times, C tokens for the overlaps of keys,
    # for its value, its key and its output; and its share of the system's inverse, 2 C^2 for each of 2 log2(C) products.
    K, V, C = arch.delta.key_dim, arch.delta.value_dim, chunk_size(num_tokens)
    of_value_head = 6 * K * V + 2 * C * (2 * V + K) + 4 * C**2 * math.log2(C)
    of_layer = arch.delta.num_value_heads * of_value_head + arch.delta.num_key_heads * 4 * C * K
    return (arch.num_layers - arch.num_attention_layers) * of_layer


def forward_flops(model: ModelDef, sizes: Sizes) -> float:
    """Count one pass over prompts and their completions: every matrix product, and causal attention's lower half.

    A rollout's decode steps do the same products one by one. The last token of a completion is predicted, never read; the
    head is applied to completions only. Sliding windows, norms and softmax are left out.
    """
    P, rows, S, T = sizes.P, sizes.P * sizes.G, sizes.S, sizes.T
    tokens = P * S + rows * (T - 1)
    # A prompt's tokens see 1, 2, ..., S keys. The t-th of a completion's T - 1 tokens sees S + t, S + T / 2 in the mean.
    pairs = P * S * (S + 1) / 2 + rows * (T - 1) * (S + T / 2)
    each = per_token(model)
    states = P * S * delta_flops(model.arch, int(S)) + rows * (T - 1) * delta_flops(model.arch, int(T) - 1)
    in_layers = 2 * each.layer_weights * tokens + attention_flops(model.arch, pairs) + states
    return in_layers + 2 * math.prod(each.head_shape) * rows * T


def step_bytes(model: ModelDef, sizes: Sizes, itemsize: int) -> float:
    """Count the bytes that a decode step has to read: all weights and the head, each prompt's cache, the rows' own half full.

    States that are kept in place of a cache, in float32, are read and written.

    Args:
      model: the decoder.
      sizes: the batch that is decoded side by side.
      itemsize: bytes of a number in the compute dtype.
    """
    # A prompt's cache is read once for its G rows, which stand together; a row's own is half full in the mean over its steps.
    each = per_token(model)
    cached = each.cached * (sizes.P * sizes.S + sizes.P * sizes.G * sizes.T / 2)
    return (each.weights_read(sizes.P * sizes.G) + cached) * itemsize + 2 * 4 * each.held * sizes.P * sizes.G


def decode_bytes(model: ModelDef, sizes: Sizes, itemsize: int) -> float:
    """Count the bytes that the T - 1 decode steps of a rollout have to read; its first token comes of the prompts' pass.

    Args:
      model: the decoder.
      sizes: the batch that is decoded side by side.
      itemsize: bytes of a number in the compute dtype.
    """
    return (sizes.T - 1) * step_bytes(model, sizes, itemsize)
