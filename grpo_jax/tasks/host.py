"""The task of all questions that live on the host: a `Split` says where they come from, a `RewardFunction` scores answers."""

from __future__ import annotations

import collections
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from grpo_jax.config import Config
from grpo_jax.errors import UserError
from grpo_jax.rewards.reward_function import RewardFunction
from grpo_jax.rewards.scorers.answers import final_answer
from grpo_jax.rollout.stops import cut_at_stop
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.prompting import Prompting
from grpo_jax.tasks.questions import Question, Split, choose_distinct, exclude
from grpo_jax.tasks.tokenizers import end_of_turn
from grpo_jax.types import Arrays, Prompts, Reward

_log = logging.getLogger(__name__)


class HostTask:
    """Questions in memory, completions decoded here and scored in worker processes.

    The first `task.num_shots` training questions, in the order of a hash, become worked examples. Prompts longer than
    `task.max_prompt_tokens` are dropped; dropped: side -> reason -> how many questions were left out. S is the longest
    prompt kept. An epoch is `num_train` prompts.
    Raises UserError if no question is short enough, and what `RewardFunction` raises.
    """

    is_traceable = False

    def __init__(self, config: Config, tokenizer: Tokenizer, split: Split) -> None:
        task = config.task
        self.tokenizer = tokenizer
        self.stop_ids = all_stop_ids(config, tokenizer)
        self.stop_strings = config.rollout.stop
        # Worked examples leave the training side: a prompt that shows its own answer would teach copying.
        shots = choose_distinct(split.train, task.num_shots)
        train = exclude(split.train, shots)
        if not train:
            raise UserError(f"config.task.num_shots = {task.num_shots}: no question is left to train on; lower it")
        self.dropped: dict[str, collections.Counter[str]] = {side: collections.Counter() for side in ("training", "held-out")}
        self.dropped["training"]["worked examples"] = len(split.train) - len(train)
        prompting = Prompting(task, tokenizer, shots)
        kept_train = self._keep_fitting(train, prompting, task.max_prompt_tokens, "training")
        kept_held_out = self._keep_fitting(split.held_out, prompting, task.max_prompt_tokens, "held-out")
        left_out = [f"{num} {side} ({why})" for side, counts in self.dropped.items() for why, num in counts.items() if num]
        if left_out:
            _log.warning("questions left out: %s", ", ".join(left_out))
        # One table for both, so that a row number is all that a batch has to carry.
        questions, self._ids = zip(*kept_train, *kept_held_out, strict=True)
        self._items = [question.item for question in questions]
        self._held_out_rows = np.arange(len(kept_train), len(self._ids), dtype=np.int32)
        self.num_train = len(kept_train)
        self.prompt_tokens = max(map(len, self._ids))
        self._order = training_order([question.stream for question, _ in kept_train], split.weights, config.seed)
        self._reward_function = RewardFunction(config.reward, task.name, config.rollout.max_completion_tokens)

    def _keep_fitting(
        self, questions: Sequence[Question], prompting: Prompting, limit: int, side: str
    ) -> list[tuple[Question, np.ndarray]]:
        """Keep the questions whose prompt is within the limit, with their ids; the others are counted."""
        # Dropped, not truncated: a prompt without its beginning is another question, with an answer that no longer fits.
        kept = []
        for question in questions:
            ids = prompting(question)
            if not ids:
                raise UserError(f"prompt {question.text!r:.60} has no tokens: the sampler needs one to begin from")
            if len(ids) > limit:
                self.dropped[side][f"over task.max_prompt_tokens = {limit}"] += 1
            else:
                kept.append((question, np.asarray(ids, np.int32)))
        if not kept and (questions or side == "training"):
            raise UserError(f"config.task.max_prompt_tokens = {limit}: no {side} prompt is that short; raise it")
        return kept

    def train_prompts(self, position: int | Int[Arrays, ""], num_prompts: int) -> Prompts:
        """Return training prompts number position .. position + num_prompts - 1, the same however they are batched."""
        first = int(position)
        return self._prompts([int(self._order[first + i]) for i in range(num_prompts)])

    def eval_prompts(self) -> Prompts:
        """Return all held-out prompts; none of them is ever a training prompt."""
        return self._prompts(self._held_out_rows)

    def reward(self, answer: Int[Arrays, " P"], tokens_PGT: Int[Arrays, "P G T"], mask_PGT: Shaped[Arrays, "P G T"]) -> Reward:
        """Score completions by config.reward, with the share of them on which a part failed or ran out of time.

        Args:
          answer: int32, `Prompts.answer`. tokens_PGT: int32. mask_PGT: > 0 where the completion is.
        Returns: a Reward of float32 arrays [P, G].
        """
        items = [self._items[row] for row in np.asarray(answer)]
        return self._reward_function(items, self._texts(tokens_PGT, mask_PGT), (np.asarray(mask_PGT) > 0).sum(-1))

    def final_answers(self, tokens_PGT: Int[Arrays, "P G T"], mask_PGT: Shaped[Arrays, "P G T"]) -> list[list[str]]:
        """Return the answer that each completion ends on, normalised: equal texts are votes for the same answer."""
        return [[final_answer(text) for text in row] for row in self._texts(tokens_PGT, mask_PGT)]

    def close(self) -> None:
        """End the scoring processes."""
        self._reward_function.close()

    def _texts(self, tokens_PGT: Int[Arrays, "P G T"], mask_PGT: Shaped[Arrays, "P G T"]) -> list[list[str]]:
        """Decode completions, without what ended them."""
        pairs = zip(np.asarray(tokens_PGT), np.asarray(mask_PGT) > 0, strict=True)
        return [[self._text(t_T[m_T]) for t_T, m_T in zip(t_GT, m_GT, strict=True)] for t_GT, m_GT in pairs]

    def _text(self, ids: Int[np.ndarray, " T"]) -> str:
        """Decode a completion up to its stop: that is trained on, but nothing to be judged."""
        if len(ids) and ids[-1] in self.stop_ids:
            ids = ids[:-1]
        return cut_at_stop(self.tokenizer.decode(ids), self.stop_strings)

    def _prompts(self, rows: Sequence[int] | np.ndarray) -> Prompts:
        # Left-padded: all prompts end in the same slot, and completions begin right behind them.
        tokens_PS = np.full((len(rows), self.prompt_tokens), self.tokenizer.pad_id, np.int32)
        mask_PS = np.zeros(tokens_PS.shape, bool)
        for place, row in enumerate(rows):
            ids = self._ids[row]
            tokens_PS[place, -len(ids) :] = ids
            mask_PS[place, -len(ids) :] = True
        return Prompts(tokens_PS, mask_PS, np.asarray(rows, np.int32))


def all_stop_ids(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    """List the tokens that end a completion: the model's end tokens, the chat template's end of a turn, rollout.stop_ids."""
    ids = (*tokenizer.eos_ids, *config.rollout.stop_ids)
    # Base models come with the template of their chat model, but with the end of a document as their only end token: they
    # would go on with a question of their own, and be judged by that.
    turn = end_of_turn(tokenizer) if config.task.use_chat_template else None
    if turn and turn[0] not in ids:
        _log.warning("token %d, %s, ends a completion: the chat template writes it behind an assistant's turn", *turn)
        ids = (*ids, turn[0])
    return tuple(dict.fromkeys(ids))


def training_order(streams: Sequence[str], weights: Mapping[str, float], seed: int) -> Any:
    """Make the endless order of training rows: every stream in a new order each epoch, the streams mixed by weight.

    Args:
      streams: the stream of each row. weights: of each stream.
      seed: of the order.
    Returns: a grain.MapDataset, position -> row: data resumes at any position without going through those before.
    Raises: UserError if a stream has no rows.
    """
    import grain  # seconds, so only when asked for

    orders = []
    for number, name in enumerate(weights):
        rows = [row for row, stream in enumerate(streams) if stream == name]
        if not rows:
            raise UserError(f"config.task.max_prompt_tokens: no training prompt of {name!r} is that short; raise it")
        # One seed more for each stream: streams of equal size would else be shuffled alike, side by side.
        orders.append(grain.MapDataset.source(rows).shuffle(seed=(seed + number) % 2**32).repeat())
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, list(weights.values()))
