"""One decoder for all families of `families.py`: grouped-query attention or a gated delta net, RoPE, RMSNorm, a gated MLP.

A prompt is run once; its keys and values (the *prefix*) are attended to by all G completions of it without a copy, in the
rollout and in the update alike. Linear weights are [out, in] and the head is [V, D], as Hugging Face stores them: nothing
is transposed on loading, and on a CPU decoding reads memory in order. The L layers are stacked on a leading axis; where they
are of several kinds that repeat with a period, there is one stack for each place in it.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped, UInt

from grpo_jax.models import exact
from grpo_jax.models.architecture import Architecture
from grpo_jax.models.attention import AttentionView, KVCache, Prefix, make_views, select_view
from grpo_jax.models.block import Block, Kept
from grpo_jax.models.experts import Routing, choices_of, count_choices
from grpo_jax.models.flash import CausalRows, single
from grpo_jax.models.fsdp import (
    GatherLayer,
    add_rows,
    apply_remat,
    gather,
    look_up,
    make_layer_gather,
    tensor_spec,
)
from grpo_jax.models.gated_delta import DeltaState
from grpo_jax.models.grad_sums import NO_SUMS, TableSums, scan_layers
from grpo_jax.models.linear import fence_vectors
from grpo_jax.models.lora import LoRA
from grpo_jax.models.norms import RMSNorm, scaled
from grpo_jax.models.ring import Ring
from grpo_jax.models.tiles import Tiles, tiles_of
from grpo_jax.parallel.context import Share
from grpo_jax.parallel.hardware import Hardware
from grpo_jax.parallel.sharding import logical_axes, path_names, vary_like
from grpo_jax.types import Params

# So few layers are unrolled: a scan would stack, and so copy, what the backward pass needs of each. A deep model is scanned
# all the same, because the time to compile it would grow with its layers.
MAX_UNROLLED = 4


class _Places(nnx.Module):
    """Stacks of layers by their place in the period. flax 0.11 has no module that is a dict."""

    def __init__(self, layers: dict[str, Block]):
        for place, stack in layers.items():
            setattr(self, place, stack)

    def __getitem__(self, place: str) -> Block:
        return getattr(self, place)


class Decoder(nnx.Module):
    """Token ids -> final hidden states. The head is applied elsewhere, in chunks (`grpo_jax.learner.logprobs`)."""

    def __init__(
        self,
        arch: Architecture,
        *,
        dtype: Any = jnp.float32,
        remat: str = "none",
        lora: LoRA | None = None,
        gathers: tuple[GatherLayer | None, ...] | None = None,
        hardware: Hardware | None = None,
        has_kernels: bool = True,
        tiles: Tiles | None = None,
        rngs: nnx.Rngs,
    ):
        """Draw fresh parameters.

        Args:
          dtype: of the computation; parameters are float32. remat: a key of `fsdp.REMAT`.
          lora: the adapters of each layer, or None. gathers: by place in the period, each makes a layer's sharded weights full,
            or None where they are. hardware: accelerators that the program is compiled for, or None.
          has_kernels: attention is by that hardware's, where it has them. tiles: of exact numbers (`exact`), or None.
        """
        self.arch, self.dtype, self.remat, self.hardware, self.tiles = arch, jnp.dtype(dtype), remat, hardware, tiles
        self.has_kernels = has_kernels
        self.gathers = gathers or (None,) * arch.period
        self.embed = nnx.Param(jax.random.normal(rngs.params(), (arch.vocab_size, arch.dim)) * 0.02)

        def stack(kind: str) -> Block:
            make = nnx.vmap(lambda rngs: Block(arch, kind, lora=lora, rngs=rngs))
            return nnx.split_rngs(splits=arch.num_layers // arch.period)(make)(rngs)

        layers = arch.join_places([stack(kind) for kind in arch.mixers])
        self.layers = _Places(layers) if isinstance(layers, dict) else layers
        self.final_norm = RMSNorm(arch.dim, arch)
        if arch.tie_embeddings:
            self.head = None
        else:
            self.head = nnx.Param(jax.random.normal(rngs.params(), (arch.vocab_size, arch.dim)) * arch.dim**-0.5)

    @property
    def head_VD(self) -> Float[Array, "V D"]:
        """The output matrix, in the compute dtype; gathered, where fsdp shards it."""
        here = self.head_here
        if here.shape[-1] == self.arch.dim:
            return here
        name = "embed" if self.head is None else "head"
        return gather(here, 1, tensor_spec((name,), (self.arch.vocab_size, self.arch.dim)), self.dtype)

    @property
    def head_here(self) -> Float[Array, "V E"]:
        """The output matrix, in the compute dtype; where fsdp shards it this device's columns, in float32."""
        matrix = (self.embed if self.head is None else self.head)[...]
        return matrix if matrix.shape[-1] != self.arch.dim else matrix.astype(self.dtype)

    @property
    def logit_cap(self) -> float | None:
        """The bound of the head's logits, a soft one (`models.linear.head_logits`); None: they have none."""
        return self.arch.logit_cap

    def finish(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        """Return the final hidden states of the residual stream behind the last layer."""
        # Logits are products of these with the head: whatever divides the logits divides them.
        return scaled(exact.run_norm(self.tiles, self.final_norm, x), 1 / self.arch.logit_divisor)

    def embed_tokens(self, tokens: Int[Array, "*lead"], tables: TableSums = NO_SUMS) -> Float[Array, "*lead D"]:
        """Return what enters the first layer, in the compute dtype. tables: as in `forward_with_prefix`."""
        find = functools.partial(_find_rows, self.arch.dim, self.dtype)
        x = tables.look_up("embed", find, add_rows, self.embed[...], tokens)
        if self.arch.embed_scale != 1:
            # Rounded to the compute dtype first, as Gemma's own code does: in bfloat16 sqrt(640) = 25.298 is 25.25.
            x = x * jnp.asarray(self.arch.embed_scale, self.dtype)
        return x

    def __call__(self, tokens_BT: Int[Array, "B T"], mask_BT: Shaped[Array, "B T"]) -> Float[Array, "B T D"]:
        """Run rows by themselves, in one causal forward pass.

        Args:
          tokens_BT: int. mask_BT: True (or not 0) on tokens, False on padding (either side).
        Returns: hidden_BTD after the final norm, in the compute dtype (undefined but finite, on padding).
        """
        views = self._views(mask_BT)

        def layer(block: Block, x_BTD, is_local):
            return exact.run_block(self.tiles, block, x_BTD, select_view(views, is_local))[0], None

        hidden_BTD, _ = self._scan_layers(layer, self.embed_tokens(tokens_BT))
        return self.finish(hidden_BTD)

    def encode_prompts(self, tokens_PS: Int[Array, "P S"], mask_PS: Shaped[Array, "P S"]) -> tuple[Float[Array, "P D"], Prefix]:
        """Run left-padded prompts -> (hidden_PD at each prompt's last token, Prefix)."""
        tokens_PS, mask_PS = exact.pad_prompts(self.tiles, tokens_PS, mask_PS)
        views = self._views(mask_PS)

        def layer(block: Block, x_PSD, is_local):
            return exact.run_block(self.tiles, block, x_PSD, select_view(views, is_local))[:2]

        hidden_PSD, cache = self._scan_layers(layer, self.embed_tokens(tokens_PS))
        return self.finish(hidden_PSD[:, -1]), Prefix.of(cache, mask_PS)

    def forward_with_prefix(
        self,
        tokens_PS: Int[Array, "P S"],
        mask_PS: Shaped[Array, "P S"],
        tokens_BT: Int[Array, "B T"],
        mask_BT: Shaped[Array, "B T"],
        share: Share | None = None,
        sums: Params | None = None,
        tables: TableSums = NO_SUMS,
    ) -> tuple[Float[Array, "P D"], Float[Array, "B T D"], Routing | None]:
        """Run prompts, and their B = P * G completions on top of them, in one pass over the layers.

        Args:
          tokens_PS: left-padded. mask_PS, mask_BT: True (or not 0) on tokens. tokens_BT: right-padded, groups contiguous.
          share: the completions' slots that this device runs, T of them in the result; None: all.
          sums: like the layers' parameters, what their gradient is added to (`grad_sums.scan_layers`); None: it is a new one.
          tables: the same for the embedding, if it has a sum.
        Returns: (hidden_PD at each prompt's last token, hidden_BTD, the tokens' experts). States are behind the final norm;
          without experts there is None.
        """
        # A layer takes prompts and completions together, so that its weights are read, gathered over fsdp and given their
        # gradient once. Two passes would gather every matrix twice, and keep all layers' prompt keys in between.
        tokens_PS, mask_PS = exact.pad_prompts(self.tiles, tokens_PS, mask_PS)
        prompt_views, views = self._views(mask_PS), self._views(mask_BT, Prefix.of(None, mask_PS), share)
        if share is not None:
            tokens_BT = tokens_BT[:, share.slots_X]

        def layer(block: Block, x, is_local):
            x_PSD, x_BTD = x
            x_PSD, kept, chosen_PSk = exact.run_block(self.tiles, block, x_PSD, select_view(prompt_views, is_local))
            x_BTD, _, chosen_BTk = exact.run_block(self.tiles, block, x_BTD, select_view(views, is_local), kept)
            if chosen_PSk is None or chosen_BTk is None:
                return (x_PSD, x_BTD), None
            E = self.arch.num_experts
            load_E = count_choices(chosen_PSk, mask_PS, E) + count_choices(chosen_BTk, mask_BT, E)
            return (x_PSD, x_BTD), (load_E.astype(jnp.float32), choices_of([chosen_BTk], E))

        first = self.embed_tokens(tokens_PS, tables), self.embed_tokens(tokens_BT, tables)
        (x_PSD, x_BTD), kept = self._scan_layers(layer, first, sums)
        routing = None
        if self.arch.num_experts:  # those of one period are neighbours
            load_LE, chosen_LBTk = (jnp.stack(each, 1).reshape(-1, *each[0].shape[1:]) for each in zip(*kept, strict=True))
            routing = Routing(load_LE, jnp.moveaxis(chosen_LBTk, 0, 2).reshape(*tokens_BT.shape, -1))
        return self.finish(x_PSD[:, -1]), self.finish(x_BTD), routing

    def no_routing(self, tokens_BT: Int[Array, "B T"]) -> Routing | None:
        """Return the routing of `forward_with_prefix` before any token; it varies over the mesh axes that the tokens do."""
        L, E, arch = self.arch.num_layers, self.arch.num_experts, self.arch
        if not E:
            return None
        none_B0X = choices_of([jnp.zeros((len(tokens_BT), 0, L * arch.experts_per_token), jnp.int32)], E)
        return vary_like(Routing(jnp.zeros((L, E)), none_B0X), tokens_BT)

    def _views(self, mask_BT, prefix: Prefix | None = None, share: Share | None = None) -> tuple[AttentionView, AttentionView]:
        """Return what causal rows, or this device's slots of them, see of themselves and of their prompts, if any."""
        mask_BT = mask_BT.astype(bool)
        # Positions count tokens, not slots: padding on the left must not turn the first token.
        positions_BT = jnp.maximum(jnp.cumsum(mask_BT, -1) - 1, 0)
        if prefix is not None:
            positions_BT = positions_BT + jnp.repeat(prefix.lengths_P, len(mask_BT) // len(prefix.lengths_P))[:, None]
        if share is not None:
            assert prefix is not None
            slots_X, all_111 = share.slots_X, jnp.ones((1, 1, 1), bool)
            positions_BX, mask_BX = positions_BT[:, slots_X], mask_BT[:, slots_X]
            hardware = self.hardware if self.has_kernels else None
            masks = (x.astype(jnp.int32) for x in (mask_BX, prefix.mask_PS))
            ring = Ring(share, *masks, hardware=hardware)
            return make_views(self.arch, positions_BX, positions_BX, all_111, prefix, None, mask_BX, ring)
        causal_TT = jnp.tril(jnp.ones((mask_BT.shape[1],) * 2, bool))
        rows = None
        if self.hardware is not None and self.has_kernels:
            window = self.arch.sliding_window if self.arch.local_layers else None
            prompt_PS = None if prefix is None else prefix.mask_PS.astype(jnp.int32)
            # Completions are padded on the right alone.
            rows = CausalRows(mask_BT.astype(jnp.int32), prompt_PS, None, window, prefix is None, self.hardware)
        mask_BTU = causal_TT[None] & mask_BT[:, None, :]
        return make_views(self.arch, positions_BT, positions_BT, mask_BTU, prefix, rows, mask_BT)

    def _scan_layers(
        self, layer: Callable[[Block, Any, Any], tuple[Any, Any]], x: Any, sums: Params | None = None
    ) -> tuple[Any, tuple[Any, ...]]:
        """Run layer(block, x, is_local as `select_view` takes it) -> (x, what to keep) for one layer after the other.

        sums: as in `forward_with_prefix`.
        Returns: (x, what is kept by place in the period, stacked).
        """
        L, local, period = self.arch.num_layers, self.arch.local_layers, self.arch.period
        is_unrolled = L <= MAX_UNROLLED
        graphdefs, states = zip(*map(nnx.split, self.arch.split_places(self.layers)), strict=True)
        stacks = tuple(map(nnx.to_pure_dict, states))

        def run(graphdef: Any, gather: GatherLayer | None, x: Any, weights_and_kind: Any) -> tuple[Any, Any]:
            weights, is_local = weights_and_kind
            weights = nnx.State(weights)
            if gather is not None:
                weights = gather(weights)
            return layer(nnx.merge(graphdef, weights), x, is_local)

        # The gathering is inside what is recomputed: outside, every layer's full weights would wait for the backward pass.
        runs = [
            apply_remat(functools.partial(run, *each), self.remat, is_gathered=each[1] is not None, is_unrolled=is_unrolled)
            for each in zip(graphdefs, self.gathers, strict=True)
        ]

        def step(x, weights_and_kinds):
            kept = []
            for place, run_layer in enumerate(runs):
                x, each = run_layer(x, weights_and_kinds[place])
                kept.append(each)
            return x, tuple(kept)

        kinds = [None] * period
        if 0 < len(local) < L:  # one program for all layers: their kind is data
            kinds = list(jnp.isin(jnp.arange(L), jnp.asarray(local)).reshape(-1, period).T)
        assert sums is None or not is_unrolled, "unrolled layers have no sums: see `adds_gradients_in_place`"
        if sums is not None:
            by_place = tuple(self.arch.split_places(sums))
            return scan_layers(lambda x, *given: step(x, tuple(zip(*given, strict=True))), x, stacks, tuple(kinds), by_place)
        return jax.lax.scan(step, x, tuple(zip(stacks, kinds, strict=True)), unroll=is_unrolled)

    def unstack_layers(self) -> list[nnx.State]:
        """Return the layers' weights one by one: slicing them inside a decode loop would copy them at every token."""
        stacks = [nnx.split(layers)[1] for layers in self._decoding_places()]
        return fence_vectors([self._of_layer(i, stacks) for i in range(self.arch.num_layers)], self.hardware)

    def _decoding_places(self) -> list[Block]:
        """List the stacks of layers by place in the period, as a decode loop runs them."""
        places = self.arch.split_places(self.layers)
        if self.hardware is None or self.tiles is not None:
            return places
        mesh = self.hardware.mesh
        num_shards = 1 if mesh is None else mesh.shape["tensor"]
        return [layers.join(has_kernel=self.decodes_by_kernel, num_shards=num_shards) for layers in places]

    @property
    def decodes_by_kernel(self) -> bool:
        """Say if single queries are attended to by a kernel (`flash.single`)."""
        return self.has_kernels and self.tiles is None and single.suits(self.hardware, self.arch.head_dim)

    def unstack_prefix(self, prefix: Prefix) -> Prefix:
        """Return the prompts' keys and values layer by layer, of whole blocks of slots, where a kernel decodes."""
        if not self.decodes_by_kernel:
            return prefix
        # Like the weights they would be copied at every token, for a kernel reads no slice of an array.

        def whole(kept: Any) -> Any:
            return kept.pad_to(single.round_prompt(self.hardware, kept.num_slots)) if isinstance(kept, KVCache) else kept

        layers = [self._of_layer(i, prefix.cache) for i in range(self.arch.num_layers)]
        layers = jax.tree.map(whole, layers, is_leaf=lambda kept: isinstance(kept, KVCache))
        return dataclasses.replace(prefix, cache=None, layers=layers)

    def _of_layer(self, i: int, by_place: Sequence[Any]) -> Any:
        """Return what belongs to layer i, of stacks by place in the period."""
        return jax.tree.map(operator.itemgetter(i // self.arch.period), by_place[i % self.arch.period])

    def empty_caches(self, num_rows: int, num_slots: int) -> list[Kept]:
        """Make what the layers keep of rows that have no token yet.

        Args:
          num_rows: B. num_slots: tokens that fit in a row.
        Returns: one for each layer.
        """
        arch = self.arch
        empty: dict[str, Kept] = {"attention": KVCache.empty(num_rows, num_slots, arch, self.dtype)}
        if arch.delta is not None:
            empty["gated_delta"] = DeltaState.empty(num_rows, arch.delta, self.dtype)
        return [empty[arch.mixers[i % arch.period]] for i in range(arch.num_layers)]

    def decode_step(
        self,
        layers: list[nnx.State],
        caches: list[Kept],
        tokens_B: Int[Array, " B"],
        slot: int | Int[Array, "..."],
        prefix: Prefix,
    ) -> tuple[Float[Array, "B D"], list[Kept], UInt[Array, "B X"] | None]:
        """Run one token of each row and write what the layers keep of it to the caches.

        Args:
          layers: from `unstack_layers`. caches: one a layer. tokens_B: the tokens at `slot`.
          slot: where they are written, one for all rows or [B].
          prefix: of the P prompts, as `unstack_prefix` returns it; B is a multiple of P.
        Returns: (hidden_BD after the final norm, the caches with slot `slot` filled, the tokens' experts as `choices_of`
          writes them or None).
        """
        # Later slots are masked, not cut off: the cache's size is static, and they may hold anything.
        lengths_B1 = jnp.repeat(prefix.lengths_P, len(tokens_B) // len(prefix.lengths_P))[:, None]
        slots_1U, slot_B1 = jnp.arange(max(cache.num_slots for cache in caches))[None], jnp.reshape(slot, (-1, 1))
        mask_B1U = (slots_1U <= slot_B1)[:, None]
        views = make_views(self.arch, lengths_B1 + slot_B1, lengths_B1 + slots_1U, mask_B1U, prefix)
        if prefix.layers is not None:
            views = self._newest_views(views, jnp.broadcast_to(slot, tokens_B.shape), prefix)
        graphdefs = [nnx.split(layers)[0] for layers in self._decoding_places()]
        x_B1D = self.embed_tokens(tokens_B)[:, None]
        # A Python loop over layers: their weights are separate arrays (`unstack_layers` says why), and as each layer's kind is
        # static, its view needs no select.
        filled, choices = [], []
        for i, (weights, cache) in enumerate(zip(layers, caches, strict=True)):
            block = nnx.merge(graphdefs[i % self.arch.period], weights)
            view = views[i in self.arch.local_layers]
            kept = self._of_layer(i, prefix.cache) if prefix.layers is None else prefix.layers[i]
            x_B1D, cache, chosen_B1k = exact.run_block(self.tiles, block, x_B1D, view, kept, cache, slot)
            filled.append(cache)
            if chosen_B1k is not None:
                choices.append(chosen_B1k[:, 0])
        chosen_BX = choices_of(choices, self.arch.num_experts) if choices else None
        return self.finish(x_B1D)[:, 0], filled, chosen_BX

    def _newest_views(
        self, views: tuple[AttentionView, AttentionView], slot_B: Int[Array, " B"], prefix: Prefix
    ) -> tuple[AttentionView, AttentionView]:
        """Add what the kernel that decodes is told of global layers and of local ones."""
        masks = prefix.mask_PS if isinstance(prefix.mask_PS, tuple) else (prefix.mask_PS,)

        def told(view: AttentionView, window: int | None) -> AttentionView:
            newest = single.newest_tokens(self.hardware, slot_B, masks, prefix.lengths_P, window)
            return dataclasses.replace(view, newest=newest)

        return told(views[0], None), told(views[1], self.arch.sliding_window)


def _find_rows(dim: int, dtype: Any, embed_VE: Float[Array, "V E"], tokens: Int[Array, "*lead"]) -> Float[Array, "*lead D"]:
    """Return tokens' rows of an embedding of which each device may have some columns alone."""
    if embed_VE.shape[-1] != dim:
        return jnp.asarray(look_up(embed_VE, tokens, dtype))
    return embed_VE.astype(dtype)[tokens]


def init_params(arch: Architecture, key: Array) -> Params:
    """Draw fresh float32 parameters, a nested dict of arrays."""
    return nnx.to_pure_dict(nnx.state(Decoder(arch, rngs=nnx.Rngs(key)), nnx.Param))


def _freeze_router(layers: Params) -> Params:
    mlp = layers["mlp"]
    return {**layers, "mlp": {**mlp, "router": jax.lax.stop_gradient(mlp["router"])}}


@dataclasses.dataclass(frozen=True)
class ModelDef:
    """The static half of a model: hashable, so a jitted function can take it as a static argument."""

    arch: Architecture
    dtype: str = "float32"
    remat: str = "none"
    lora: LoRA | None = None
    hardware: Hardware | None = None  # accelerators that programs are made for; None: CPUs
    is_router_frozen: bool = False
    numerics: str = "fast"  # "exact": the sampler's and the learner's numbers are one, bit for bit
    attention: str = "auto"  # "plain": by no kernels

    @property
    def tiles(self) -> Tiles | None:
        """Sizes that rows and keys are cut into, where numbers are exact; None: they are not."""
        return tiles_of(self.hardware) if self.numerics == "exact" else None

    @property
    def remat_policy(self) -> str:
        """A key of `fsdp.REMAT`. "auto": few unrolled layers keep what they computed; a scan of many would stack it.

        Accelerators have less memory beside their arithmetic than hosts, so there a scan keeps less.
        """
        if self.remat != "auto":
            return self.remat
        if self.arch.num_layers <= MAX_UNROLLED:
            return "none"
        if self.hardware is not None:
            return "narrow"
        return "dots"

    @property
    def adds_gradients_in_place(self) -> bool:
        """A microbatch's gradients of layers, embedding and head can be added to a sum as they are made (`grad_sums`).

        Not those of few layers, which are unrolled, nor where some of their weights are not trained.
        """
        is_scanned = self.arch.num_layers > MAX_UNROLLED
        return self.hardware is not None and is_scanned and self.lora is None and not self.is_router_frozen

    def bind(self, params: Params) -> Decoder:
        """Return the decoder with these parameters (cheap: call it inside the traced function).

        Those that are sharded along fsdp are gathered: the layers' layer by layer, the head where it is asked for. Rows of the
        embedding come from where they are.
        """
        # A device knows that it holds a shard by its shape alone: the traced function has no other sign of it.
        layers = params["layers"]
        places = zip(*map(self.arch.split_places, (layers, self.param_shapes()["layers"])), strict=True)
        abstract = self._abstract(tuple(make_layer_gather(own, full, self.dtype) for own, full in places))
        if self.hardware is not None and not any(abstract.gathers):
            layers = jax.tree_util.tree_map_with_path(self._cast_matrix, layers)
        if self.is_router_frozen:
            layers = self.arch.join_places([_freeze_router(each) for each in self.arch.split_places(layers)])
        return nnx.merge(nnx.graphdef(abstract), nnx.State({**params, "layers": layers}))

    def _cast_matrix(self, path: Any, x: Array) -> Array:
        """Cast a stacked matrix to the compute dtype; biases, norms and what no table knows stay."""
        # Cast inside the loop over layers, a matrix's gradient would leave it in float32: twice the memory and traffic, for
        # digits that its product's type does not have (XLA may leave that rounding out). And what no microbatch changes is
        # cast once.
        if x.ndim < 3 or not logical_axes(path_names(path)):
            return x
        return x.astype(self.dtype)

    def param_shapes(self) -> Params:
        """Return the tree that `bind` takes, adapters included, as shapes."""
        return nnx.to_pure_dict(nnx.state(self._abstract(), nnx.Param))

    def _abstract(self, gathers: tuple[GatherLayer | None, ...] | None = None) -> Decoder:
        """Return the decoder with shapes in place of its parameters."""

        def build() -> Decoder:
            static = {"dtype": self.dtype, "remat": self.remat_policy, "lora": self.lora, "hardware": self.hardware}
            static |= {"has_kernels": self.attention == "auto", "tiles": self.tiles}
            return Decoder(self.arch, **static, gathers=gathers, rngs=nnx.Rngs(0))

        return nnx.eval_shape(build)
