"""Hidden states -> log-probability of given tokens and entropy of the distribution, in chunks: never [B, T, V] in float32.

The gradient is written by hand: d logp / d logits = onehot - p, recomputed chunk by chunk, so that neither direction keeps
more than one [C, V] block of logits. With an entropy bonus d H / d logits = -p (log p + H) is added.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from grpo_jax.learner.vocab_parts import HeadWork, backward_by_vocab, num_vocab_shards, score_by_vocab
from grpo_jax.models.experts import Routing
from grpo_jax.models.grad_sums import TableSums
from grpo_jax.models.linear import head_logits
from grpo_jax.models.tiles import Tiles
from grpo_jax.models.transformer import Decoder, ModelDef
from grpo_jax.parallel.context import Share, share_of
from grpo_jax.parallel.sharding import vary_like
from grpo_jax.rollout.sampling import Sampling, allowed_tokens, occurring_tokens, repetition_factor, score, support_like
from grpo_jax.types import Params, Rollout

CPU_CHUNK_TOKENS = 512  # positions at a time on a CPU, where more of them leave its caches and are no faster
# Logits that exist at a time on one accelerator: 256 MiB in float32, less than a gradient of most models.
MAX_LOGITS = 2**26
ALIGNED = 128  # an accelerator's tile: what is cut up is cut between tiles


@dataclasses.dataclass(frozen=True)
class Chunks:
    """Sizes of the pieces that the head works on.

    tokens: positions at a time. vocab: tokens of the vocabulary at a time, all positions at once; 0: it goes over positions.
    """

    tokens: int
    vocab: int = 0

    def is_by_vocab(self, tiles: Tiles | None) -> bool:
        """The forward pass takes parts of the vocabulary as well; exact numbers are the sampler's, which takes all of it."""
        return self.vocab > 0 and tiles is None

    @classmethod
    def of(cls, model: ModelDef, chunk_tokens: int, num_tokens: int, sampling: Sampling) -> Chunks:
        """Choose them for a model's hardware.

        Args:
          model: its vocabulary and hardware count. chunk_tokens: learner.logprob_chunk_tokens; 0: to be chosen.
          num_tokens: positions of a microbatch. sampling: some need all logits of a position at once.
        """
        if chunk_tokens:
            return cls(chunk_tokens)
        if model.hardware is None:
            return cls(CPU_CHUNK_TOKENS)
        V, mesh = model.arch.vocab_size, model.hardware.mesh
        num_parts = 1 if mesh is None else num_vocab_shards(V, mesh.shape["tensor"])
        tokens = even_part(num_tokens, MAX_LOGITS * num_parts // V)
        # The head's gradient is as large as the head and in float32. Over chunks of positions all of it is read and written at
        # each, which takes longer than the products; over parts of the vocabulary each part is written once, and only the
        # states' gradient, which is smaller, is added up. A head that fsdp shards is never gathered in full then, nor is its
        # gradient. Where `tensor` shards the vocabulary, each device goes through its own.
        needs_all = sampling.is_cut or sampling.rules_out or sampling.has_penalty
        if needs_all or num_tokens >= V // num_parts:
            return cls(tokens)
        return cls(tokens, min(V // num_parts, max(ALIGNED, MAX_LOGITS // num_tokens // ALIGNED * ALIGNED)))


def even_part(total: int, wanted: int) -> int:
    """Return the size of equal parts of about `wanted`: whole tiles, and the last one with little padding."""
    # The number of parts comes first: parts of the size wanted could end with one that is nearly empty.
    num_parts = max(1, round(total / max(wanted, ALIGNED)))
    return -(-total // (num_parts * ALIGNED)) * ALIGNED


class Past(NamedTuple):
    """Tokens before each of F positions, for distributions that depend on them.

    t_F: the token's number in its completion. row_F: its row. num_before_F: slots of that row before it.
    tokens_BX: the rows, prompt and completion. mask_BX: True where there is a token.
    """

    t_F: Int[jax.Array, " F"]
    row_F: Int[jax.Array, " F"]
    num_before_F: Int[jax.Array, " F"]
    tokens_BX: Int[jax.Array, "B X"]
    mask_BX: Bool[jax.Array, "B X"]

    def seen(self, vocab: int) -> Bool[jax.Array, "F V"]:
        """Mark the tokens that occurred."""
        is_before_FX = jnp.arange(self.tokens_BX.shape[1])[None] < self.num_before_F[:, None]
        return occurring_tokens(self.tokens_BX[self.row_F], is_before_FX & self.mask_BX[self.row_F], vocab)


def past_of(rollout: Rollout, sampling: Sampling, t_X: Int[jax.Array, " X"]) -> Past | None:
    """Return what stands before the tokens t_X of each completion, in P * G * X places; None if `sampling` asks for none."""
    if not (sampling.rules_out or sampling.has_penalty):
        return None
    P, G, T = rollout.tokens_PGT.shape
    S = rollout.prompts.tokens_PS.shape[1]

    def join(of_prompts_PS: jax.Array, of_completions_PGT: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.repeat(of_prompts_PS, G, axis=0), of_completions_PGT.reshape(P * G, T)], axis=1)

    t_F = jnp.tile(t_X, P * G)
    return Past(
        t_F=t_F,
        row_F=jnp.repeat(jnp.arange(P * G), len(t_X)),
        num_before_F=t_F + S,
        tokens_BX=join(rollout.prompts.tokens_PS, rollout.tokens_PGT),
        mask_BX=join(rollout.prompts.mask_PS, rollout.mask_PGT > 0),
    )


def token_logprobs(
    hidden_FD: Float[jax.Array, "F D"],
    head_VD: Float[jax.Array, "V D"],
    targets_F: Int[jax.Array, " F"],
    support_F: Int[jax.Array, " F"] | None,
    sampling: Sampling,
    chunks: Chunks,
    cap: float | None,
    past: Past | None = None,
    has_entropy_gradient: bool = False,
    tiles: Tiles | None = None,
    sum_VD: Float[jax.Array, "V D"] | None = None,
) -> tuple[Float[jax.Array, " F"], Float[jax.Array, " F"]]:
    """Compute the log-probability of each target, and the entropy, under the distribution that `sampling` draws from.

    Args:
      hidden_FD: the state that predicts each target. head_VD: output matrix; of one that fsdp shards over D, where chunks.vocab
        says parts, this device's columns. targets_F: int32.
      support_F: int32, how many tokens the sampler kept at each position, or None if it kept all.
      sampling: the distribution, its temperature above 0. chunks: logits at a time; peak memory is chunks.tokens * V.
      cap: of the logits, as in `head_logits`. past: from `past_of`. has_entropy_gradient: the entropy is a part of a loss.
      tiles: of exact numbers, which are then the sampler's. sum_VD: float32, what the head's gradient is added to, and the
        gradient by which that sum is (`models.grad_sums`); None: the head has one of its own.
    Returns: (logp_F, entropy_F), float32 nats. Gradient flows through logp_F to hidden and head, through entropy_F if asked.
    """
    # A scan needs chunks of one shape. Padded positions predict token 0 from a state of zeros and are left out of the result.
    num = len(targets_F)
    chunk = min(chunks.tokens, num)
    padding = -num % chunk

    def split(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:])

    hidden = split(hidden_FD)
    fixed = jax.tree.map(split, (targets_F, support_F, past and past[:3]))  # None stays None
    work = HeadWork(sampling, cap, chunks.vocab, chunks.is_by_vocab(tiles), tiles, has_entropy_gradient)
    rows = past and past[3:]
    logp, entropy = _chunked(work, hidden, head_VD, fixed, rows, sum_VD)  # pyright: ignore[reportGeneralTypeIssues]
    logp, entropy = (x.reshape(-1)[:num] for x in (logp, entropy))
    return logp, entropy if has_entropy_gradient else jax.lax.stop_gradient(entropy)


class _Distribution(NamedTuple):
    """The distributions of C positions. keep_CV: the tokens in it, None for all of V.

    factor_CV: of the repetition penalty, None without one. tempered_CV: the logits before it.
    """

    logits_CV: Float[jax.Array, "C V"]
    keep_CV: Bool[jax.Array, "C V"] | None
    factor_CV: Float[jax.Array, "C V"] | None
    tempered_CV: Float[jax.Array, "C V"]


def _distribution(sampling: Sampling, cap: float | None, hidden_CD, head_VD, fixed, rows, tiles=None) -> _Distribution:
    """Do to the logits what `draw` did: temperature, penalty, tokens that are ruled out, cuts."""
    targets_C, support_C, places = fixed
    tempered_CV = head_logits(hidden_CD, head_VD, cap, tiles) / sampling.temperature
    vocab = tempered_CV.shape[-1]
    logits_CV, keep_CV, factor_CV = tempered_CV, None, None
    if sampling.has_penalty:
        seen_CV = Past(*places, *rows).seen(vocab)
        factor_CV = repetition_factor(tempered_CV, seen_CV, sampling.repetition_penalty)
        logits_CV = tempered_CV * factor_CV
    if sampling.rules_out:
        # The sampler never draws a token that is ruled out. Where masked slots hold one, its log-probability stays finite.
        is_target_CV = jnp.arange(vocab)[None] == targets_C[:, None]
        keep_CV = allowed_tokens(places[0], sampling, vocab) | is_target_CV
    if sampling.is_cut:
        allowed_CV = logits_CV if keep_CV is None else jnp.where(keep_CV, logits_CV, -jnp.inf)
        keep_CV = support_like(allowed_CV, targets_C, support_C, sampling.top_k)
    return _Distribution(logits_CV, keep_CV, factor_CV, tempered_CV)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(work: HeadWork, hidden, head_VD, fixed, rows, sum_VD):
    return _forward(work, hidden, head_VD, fixed, rows, sum_VD)[0]


def _forward(work: HeadWork, hidden, head_VD, fixed, rows, sum_VD):
    """Go through the chunks. Of each, only its log-partition is kept for the backward pass: C numbers instead of [C, V]."""

    def chunk(_, xs):
        hidden_CD, fixed_C = xs
        of = _distribution(work.sampling, work.cap, hidden_CD, head_VD, fixed_C, rows, work.tiles)
        return None, score(of.logits_CV, of.keep_CV, fixed_C[0], work.tiles)

    if work.is_by_vocab:
        logp, entropy, log_z = score_by_vocab(work, hidden, head_VD, fixed[0])
    else:
        _, (logp, entropy, log_z) = jax.lax.scan(chunk, None, (hidden, fixed))
    kept = log_z, entropy if work.has_entropy_gradient else None
    return (logp, entropy), (hidden, head_VD, fixed, rows, *kept, sum_VD)


def _backward(work: HeadWork, residuals, cotangents):
    """Go through the chunks once more: d logp / d logits = onehot - p on the support, which counts as fixed."""
    d_logp, d_entropy = cotangents
    if not work.has_entropy_gradient:
        d_entropy = None
    if work.vocab:
        return backward_by_vocab(work, residuals, d_logp, d_entropy)
    sampling, cap = work.sampling, work.cap
    hidden, head_VD, fixed, rows, log_z, entropy, sum_VD = residuals

    def chunk(d_head_VD, xs):
        hidden_CD, fixed_C, log_z_C, d_logp_C, entropy_C, d_entropy_C = xs
        of = _distribution(sampling, cap, hidden_CD, head_VD, fixed_C, rows)
        p_CV = jnp.exp(of.logits_CV - log_z_C[:, None])
        if of.keep_CV is not None:
            p_CV = jnp.where(of.keep_CV, p_CV, 0.0)
        is_target_CV = jnp.arange(p_CV.shape[-1])[None] == fixed_C[0][:, None]
        if sampling.forced_prefix_ids:
            # Their probability is 1 whatever the policy: 1 - p is 0 but for rounding.
            d_logp_C = jnp.where(fixed_C[2][0] < len(sampling.forced_prefix_ids), 0.0, d_logp_C)
        d_logits_CV = (is_target_CV - p_CV) * (d_logp_C[:, None] / sampling.temperature)
        if work.has_entropy_gradient:
            surprise_CV = of.logits_CV - log_z_C[:, None] + entropy_C[:, None]
            d_logits_CV -= p_CV * surprise_CV * (d_entropy_C[:, None] / sampling.temperature)
        if of.factor_CV is not None:
            d_logits_CV *= of.factor_CV
        if cap is not None:  # the slope of tanh
            d_logits_CV *= 1 - jnp.square(of.tempered_CV * (sampling.temperature / cap))
        # Both products take the compute dtype's factors, as the forward pass does. The head's gradient is a sum over all
        # chunks, so it is carried in float32: in bfloat16 later chunks would be rounded away.
        d_logits_CV = d_logits_CV.astype(head_VD.dtype)
        d_hidden_CD = jnp.einsum("cv,vd->cd", d_logits_CV, head_VD)
        d_head_VD += jnp.einsum("cv,cd->vd", d_logits_CV, hidden_CD, preferred_element_type=jnp.float32)
        return d_head_VD, d_hidden_CD.astype(hidden_CD.dtype)

    so_far_VD = vary_like(jnp.zeros(head_VD.shape, jnp.float32), fixed[0]) if sum_VD is None else sum_VD
    d_head_VD, d_hidden = jax.lax.scan(chunk, so_far_VD, (hidden, fixed, log_z, d_logp, entropy, d_entropy))
    if sum_VD is not None:
        return d_hidden, None, None, None, d_head_VD
    return d_hidden, d_head_VD.astype(head_VD.dtype), None, None, None


_chunked.defvjp(_forward, _backward)


def policy_logprobs(
    model: ModelDef,
    params: Params,
    rollout: Rollout,
    sampling: Sampling,
    chunk_tokens: int,
    has_entropy_gradient: bool = False,
) -> tuple[Float[jax.Array, "P G T"], Float[jax.Array, "P G T"]]:
    """Compute the log-probability of each completion token under the policy, and the entropy of its distribution.

    Each prompt runs through the layers once for its whole group.

    Args:
      params: all weights of the policy. rollout: G completions of each of P prompts.
      sampling: the settings that the rollout was sampled with, so that both speak of one distribution.
      chunk_tokens: positions whose logits exist at a time; 0: as many as suit the hardware (`Chunks.of`).
      has_entropy_gradient: as in `token_logprobs`.
    Returns: (logp_PGT, entropy_PGT), float32 nats; undefined but finite where masked. Gradient flows through logp_PGT, and
      through entropy_PGT if asked.
    """
    return logprobs_and_routing(model, params, rollout, sampling, chunk_tokens, has_entropy_gradient)[:2]


def logprobs_and_routing(
    model: ModelDef,
    params: Params,
    rollout: Rollout,
    sampling: Sampling,
    chunk_tokens: int,
    has_entropy_gradient: bool = False,
    sums: Params | None = None,
) -> tuple[Float[jax.Array, "P G T"], Float[jax.Array, "P G T"], Routing | None]:
    """Compute what `policy_logprobs` does, and which experts took the tokens.

    Args: as there. sums: what the gradients of layers, embedding and head are added to (`models.grad_sums`), like `params`;
      None: they are new ones.
    Returns: (logp_PGT, entropy_PGT, the experts, of a completion's first T - 1 tokens; None in a model without experts).
    """
    decoder = model.bind(params)
    P, G, T = rollout.tokens_PGT.shape
    share, sums = share_of(T), dict(sums or {})
    of_layers, tables = sums.pop("layers", None), TableSums(sums)
    given = decoder, rollout, share, of_layers, tables
    hidden_BXD, t_X, routing = _predicting_states(*given, is_aligned=model.hardware is not None)

    def here(x_PGT: jax.Array) -> jax.Array:
        """Return what belongs to the tokens t_X of all rows."""
        if share is None:
            return x_PGT.reshape(-1)
        return x_PGT.reshape(P * G, T)[:, t_X].reshape(-1)

    num = P * G * len(t_X)
    chunks = Chunks.of(model, chunk_tokens, num, sampling)
    head = decoder.head_here if chunks.is_by_vocab(decoder.tiles) else decoder.head_VD
    found = token_logprobs(
        hidden_BXD.reshape(num, -1),
        head,
        here(rollout.tokens_PGT),
        jax.tree.map(here, rollout.support_PGT),  # None stays None
        sampling,
        chunks,
        decoder.logit_cap,
        past_of(rollout, sampling, t_X),
        has_entropy_gradient,
        decoder.tiles,
        tables.take("head" if "head" in params else "embed", head.shape),
    )
    found = tables.close(found)
    if share is not None:
        found = tuple(share.spread(x.reshape(P * G, -1), t_X) for x in found)
    logp, entropy = found
    return logp.reshape(P, G, T), entropy.reshape(P, G, T), routing


def _predicting_states(
    decoder: Decoder, rollout: Rollout, share: Share | None, sums: Params | None, tables: TableSums, *, is_aligned: bool
) -> tuple[Float[jax.Array, "B X D"], Int[jax.Array, " X"], Routing | None]:
    """Run the layers -> (the states that predict the tokens t_X of each completion, t_X, experts of the first T - 1 tokens).

    share: slots that this device runs; None: all, and t_X is 0 .. T - 1. sums, tables: as in `Decoder.forward_with_prefix`.
    is_aligned: layers take all T slots.
    """
    P, G, T = rollout.tokens_PGT.shape
    tokens_BT, mask_BT = rollout.tokens_PGT.reshape(P * G, T), rollout.mask_PGT.reshape(P * G, T)
    prompts = rollout.prompts.tokens_PS, rollout.prompts.mask_PS
    if share is not None:
        last_PD, read_BXD, routing = decoder.forward_with_prefix(*prompts, tokens_BT, mask_BT, share, sums, tables)
        # A slot's state predicts the next token. The row's last slot predicts none, so in its place stands the prompt's last
        # state, which predicts the first token.
        is_end_X1 = (share.slots_X == T - 1)[:, None]
        return jnp.where(is_end_X1, jnp.repeat(last_PD, G, axis=0)[:, None], read_BXD), (share.slots_X + 1) % T, routing
    # The last token of a completion predicts nothing, so it is no input. On accelerators it is one, and its state is dropped:
    # T is a multiple of a tile where T - 1 is not, and every array of a layer would be padded to it.
    num_read = T - 1
    if is_aligned:
        num_read = T
    routing = decoder.no_routing(tokens_BT)
    if num_read == 0:  # a completion of one token has no input at all
        last_PD, _ = decoder.encode_prompts(*prompts)
        later = []
    else:
        read = tokens_BT[:, :num_read], mask_BT[:, :num_read]
        last_PD, later_BTD, routing = decoder.forward_with_prefix(*prompts, *read, sums=sums, tables=tables)
        later = [later_BTD[:, : T - 1]]
        if routing is not None:
            routing = dataclasses.replace(routing, chosen_BTX=routing.chosen_BTX[:, : T - 1])
    # The prompt's last state predicts the first token.
    return jnp.concatenate([jnp.repeat(last_PD, G, axis=0)[:, None], *later], axis=1), jnp.arange(T), routing
