"""The task of all questions that live on the host: a `Source` gives them, a `RewardFunction` scores answers."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from grpo_jax.config import Config
from grpo_jax.config.reward_expression import of_task
from grpo_jax.errors import UserError
from grpo_jax.rewards.pool.pool import Context
from grpo_jax.rewards.reward_function import RewardFunction
from grpo_jax.rewards.scorers.answers import final_answer
from grpo_jax.rollout.stops import cut_at_stop
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.drawing import pad_left
from grpo_jax.tasks.questions import Source
from grpo_jax.tasks.selection import Selected, Selection, select
from grpo_jax.tasks.tokenizers import end_of_turn
from grpo_jax.types import Arrays, Prompts, Reward

REWARD_ERRORS = "reward_errors"  # of a run's folder, where tracebacks of its rewards are

_log = logging.getLogger(__name__)


class HostTask:
    """Questions in memory, completions decoded here and scored in worker processes.

    What is asked, held out and left out: `selection.select`. dropped: side -> reason -> how many questions were left out. S is
    the longest prompt kept. An epoch is `num_train` prompts. step: updates done, for rewards that ask.
    Raises UserError if no question is short enough, and what `RewardFunction` raises.
    """

    is_traceable = False
    step = 0

    def __init__(self, config: Config, tokenizer: Tokenizer, sources: Sequence[Source]) -> None:
        task = config.task
        self.tokenizer = tokenizer
        self._reasoning_tags = config.reward.reasoning_tags
        self.stop_ids = all_stop_ids(config, tokenizer)
        self.stop_strings = config.rollout.stop
        selection = select(task, tokenizer, sources)
        self.dropped = selection.dropped
        # One table for both, so that a row number is all that a batch has to carry.
        selected = [*selection.train, *selection.held_out]
        self._ids = [np.asarray(each.prompt.ids, np.int32) for each in selected]
        self.prompt_opens = frozenset(each.prompt.opens for each in selected) - {""}
        self._items = [_item(each) for each in selected]
        self._places = [each.question.where for each in selected]
        self.num_train = len(selection.train)
        self._held_out_rows = np.arange(self.num_train, len(self._ids), dtype=np.int32)
        self.prompt_tokens = max(map(len, self._ids))
        streams = [each.question.stream for each in selection.train]
        self._order = training_order(streams, selection.weights, config.seed, shuffle=task.shuffle)
        self.data_metrics = data_metrics_of(selection)
        # As the data has them, a chat or a text: rewards that ask for the prompt are told which of the two it was.
        self._prompts_of_rows = [each.question.prompt for each in selected]
        columns = {name for item in self._items for name in item}
        default = config.reward.task or of_task(task.name)
        self._expressions = [each.question.reward or default for each in selected]
        budget = config.rollout.max_completion_tokens
        self._reward_function = RewardFunction(config.reward, task.name, budget, columns, set(self._expressions))

    @property
    def prompt_lengths(self) -> Int[np.ndarray, " N"]:
        """The tokens of all prompts, those to train on first."""
        return np.asarray([len(ids) for ids in self._ids])

    @property
    def expressions(self) -> frozenset[str]:
        """The rewards that rows are scored by; one, config.reward.task, if no column or source has its own."""
        return frozenset(self._expressions)

    def row(self, number: int) -> tuple[Mapping[str, Any], str]:
        """Return (what a prompt is scored by, the place of its row). number: `Prompts.answer` of the prompt."""
        return self._items[number], self._places[number]

    @property
    def summary(self) -> str:
        """The data in one line: how many questions, and how long."""
        said = (
            f"{self.num_train} questions to train on, {len(self._held_out_rows)} held out; "
            f"prompts of {min(map(len, self._ids))} to {self.prompt_tokens} tokens"
        )
        if self.prompt_opens:
            said += f"; prompts begin the answer with {', '.join(map(repr, sorted(self.prompt_opens)))}"
        return said

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all that is asked, in its order, and of what it is scored by."""
        digest = hashlib.sha256(str(self.num_train).encode())
        is_mixed = len(self.expressions) > 1
        for ids, item, expression in zip(self._ids, self._items, self._expressions, strict=True):
            digest.update(ids.tobytes())
            if is_mixed:
                digest.update(expression.encode())
            # Of a value that is no JSON the type alone: what Python writes for it may differ between two processes.
            digest.update(json.dumps(item, default=lambda value: type(value).__name__).encode())
        return digest.hexdigest()[:16]

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
        rows, is_real_PGT = np.asarray(answer), np.asarray(mask_PGT) > 0
        ids_PG = None
        if self._reward_function.wants_ids:
            pairs = zip(np.asarray(tokens_PGT), is_real_PGT, strict=True)
            ids_PG = [[t_T[m_T].tolist() for t_T, m_T in zip(t_GT, m_GT, strict=True)] for t_GT, m_GT in pairs]
        context = Context([self._prompts_of_rows[row] for row in rows], ids_PG, self.step)
        items = [self._items[row] for row in rows]
        expressions = [self._expressions[row] for row in rows]
        return self._reward_function(items, self._texts(tokens_PGT, mask_PGT), is_real_PGT.sum(-1), context, expressions)

    def keep_errors_in(self, folder: pathlib.Path) -> None:
        """Have the first traceback of each part of the reward written into a folder."""
        self._reward_function.errors_folder = folder

    def final_answers(self, tokens_PGT: Int[Arrays, "P G T"], mask_PGT: Shaped[Arrays, "P G T"]) -> list[list[str]]:
        """Return the answer that each completion ends on, normalised: equal texts are votes for the same answer."""
        # A template that opens the reasoning does so for every prompt; which prompt a completion is of, nobody says here.
        opens = "".join(self.prompt_opens) if len(self.prompt_opens) == 1 else ""
        texts = self._texts(tokens_PGT, mask_PGT)
        return [[final_answer(opens + text, self._reasoning_tags) for text in row] for row in texts]

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
        tokens_PS, mask_PS = pad_left([self._ids[row] for row in rows], self.prompt_tokens, self.tokenizer.pad_id)
        return Prompts(tokens_PS, mask_PS, np.asarray(rows, np.int32))


def _item(selected: Selected) -> Mapping[str, Any]:
    """Return what a question is scored by, with what its prompt has begun of the answer under "prompt_opens"."""
    if not selected.prompt.opens:
        return selected.question.item
    return {**selected.question.item, "prompt_opens": selected.prompt.opens}


def data_metrics_of(selection: Selection) -> dict[str, float]:
    """Count questions for a run's records, by the metrics' names."""
    dropped = {
        f"data/dropped/{side.replace('-', '_')}/{why}": float(num)
        for side, counts in selection.dropped.items()
        for why, num in counts.items()
        if num
    }
    counts = {"data/train": float(len(selection.train)), "data/held_out": float(len(selection.held_out)), **dropped}
    if selection.num_conflicts:
        counts["data/conflicts"] = float(selection.num_conflicts)
    if selection.unknown:
        counts["data/unknown_text"] = float(len(selection.unknown))
    return counts


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


def training_order(streams: Sequence[str], weights: Mapping[str, float], seed: int, *, shuffle: bool = True) -> Any:
    """Make the endless order of training rows: every stream in a new order each epoch, the streams mixed by weight.

    Args:
      streams: the stream of each row. weights: of each stream.
      seed: of the order. shuffle: False: the rows of a stream keep their order.
    Returns: a grain.MapDataset, position -> row: data resumes at any position without going through those before.
    Raises: UserError if a stream has no rows.
    """
    import grain  # seconds, so only when asked for

    orders = []
    for number, name in enumerate(weights):
        rows = [row for row, stream in enumerate(streams) if stream == name]
        if not rows:
            raise UserError(
                f"no training question of {name!r} is left: raise config.task.max_prompt_tokens, "
                "or lower config.eval.num_prompts"
            )
        order = grain.MapDataset.source(rows)
        if shuffle:
            # One seed more for each stream: streams of equal size would else be shuffled alike, side by side.
            order = order.shuffle(seed=(seed + number) % 2**32)
        orders.append(order.repeat())
    if len(orders) == 1:
        return orders[0]
    return grain.MapDataset.mix(orders, list(weights.values()))
