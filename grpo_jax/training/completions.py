"""Records of what was sampled: one a completion, with the text, entropy and advantage of each of its tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from grpo_jax.parallel import hosts
from grpo_jax.tasks import Tokenizer
from grpo_jax.types import Arrays, Batch

UNFINISHED = "\ufffd"  # what a tokenizer says for bytes that are not a character yet


@functools.partial(jax.jit, static_argnums=1)
def _first_groups(tree: Any, num: int) -> Any:
    """Take the first of each array. One program: rows of several processes are cut by a collective."""
    return jax.tree.map(lambda x: x[:num], tree)


def completion_rows(
    batch: Batch,
    adv_PGT: Float[Arrays, "P G T"],
    grpo_PG: Float[Arrays, "P G"],
    tokenizer: Tokenizer,
    num_groups: int,
) -> list[dict[str, Any]]:
    """Make the records of the first groups of a batch, one a completion; dropped rows have none.

    Args:
      batch: that was trained on. adv_PGT, grpo_PG: of `advantages_with_grpo`. tokenizer: of the task.
      num_groups: how many groups are recorded.
    Returns: records of plain Python values. Lists have one entry a token: `token_text` (the pieces put together are the
      completion; a stop token's is empty, and so are all but the last of the tokens that share a character), `token_entropy`
      in nats, `token_advantage`. Numbers have four significant digits. The rewards of a row that is not `is_scored` are None.
    """
    # Sliced on the device: of a large batch, no more than what is recorded goes to the host.
    few, adv_PGT, grpo_PG = hosts.gather_to_host(_first_groups((batch, adv_PGT, grpo_PG), num_groups))
    rolled, rows = few.rollout, []
    for p, g in np.ndindex(rolled.tokens_PGT.shape[:2]):
        num = int(rolled.mask_PGT[p, g].sum())
        # An empty slot of dynamic sampling's buffer: a real completion has one token at least.
        if num == 0:
            continue
        is_scored = few.is_scored_PG is None or bool(few.is_scored_PG[p, g])
        ids, entropies = rolled.tokens_PGT[p, g, :num], rolled.entropy_PGT[p, g, :num]
        rows.append(
            {
                "group": p,
                "prompt": tokenizer.decode_prompt(rolled.prompts.tokens_PS[p][rolled.prompts.mask_PS[p]]),
                "completion": tokenizer.decode(ids),
                "is_scored": is_scored,
                "task_reward": short(few.task_reward_PG[p, g]) if is_scored else None,
                "reward": short(few.reward_PG[p, g]) if is_scored else None,
                "tokens": num,
                "is_truncated": bool(rolled.is_truncated_PG[p, g]),
                "entropy": short(entropies.mean()),
                "grpo_advantage": short(grpo_PG[p, g]),
                "token_text": text_pieces(tokenizer, ids),
                "token_entropy": [short(x) for x in entropies],
                "token_advantage": [short(x) for x in adv_PGT[p, g, :num]],
            }
        )
    return rows


def text_pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Split a text into what each token adds; joined, the pieces are the text of all tokens.

    Byte-level tokenizers cut characters into tokens: such a token adds nothing, and the one that completes the character
    adds it. Each token is decoded behind the one before it, for some tokenizers drop the space of a first token.
    """
    ids = [int(each) for each in ids]
    pieces, begin, end = [], 0, 0  # ids[begin:end] is the context: the tokens of the last piece
    for now in range(1, len(ids) + 1):
        # From the last piece on only, not from the beginning: a long completion would take quadratic time.
        before, text = tokenizer.decode(ids[begin:end]), tokenizer.decode(ids[begin:now])
        if text.endswith(UNFINISHED) and now < len(ids):
            pieces.append("")
            continue
        pieces.append(text[len(before) :])
        if pieces[-1]:
            begin, end = end, now
    return pieces


def short(x: Any) -> float:
    """Round to four significant digits, which keeps the file small."""
    return float(f"{float(x):.4g}")
