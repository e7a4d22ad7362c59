"""What all tasks scored on the host share: prompts cut to one width, their order, and rewards from a scoring pool."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.config import TaskConfig
from grpo_jax.errors import UserError
from grpo_jax.metrics import Mean, Metrics
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.scoring import ScoringPool
from grpo_jax.types import Prompts

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Question:
    """One prompt, and the item that the scorer judges its completions by."""

    prompt: str
    item: Mapping[str, Any]


class HostTask:
    """Questions in memory, completions decoded and scored in worker processes.

    train, held_out: the questions; the caller sees to it that none is in both. scorer: see `ScoringPool`.
    system_prompt: "" for none. use_chat: through the tokenizer's chat template, otherwise as plain text.
    seed: of the training order, which is a different one each epoch.
    num_dropped: questions left out because they are longer than `task.max_prompt_tokens`; S is the longest one kept.
    Raises UserError if no question is short enough.
    """

    is_traceable = False

    def __init__(
        self,
        config: TaskConfig,
        tokenizer: Tokenizer,
        train: Sequence[Question],
        held_out: Sequence[Question],
        *,
        scorer: str,
        system_prompt: str,
        use_chat: bool,
        seed: int,
    ) -> None:
        import grain  # seconds, so only when asked for

        self.tokenizer = tokenizer
        self.stop_ids = tokenizer.eos_ids
        limit = config.max_prompt_tokens
        kept_train = _encode(tokenizer, train, system_prompt, use_chat, limit)
        kept_held_out = _encode(tokenizer, held_out, system_prompt, use_chat, limit)
        for kept, questions, kind in ((kept_train, train, "training"), (kept_held_out, held_out, "held-out")):
            if questions and not kept:
                raise UserError(f"task.max_prompt_tokens = {limit}: all {kind} prompts are longer; raise it")
        if not kept_train:
            raise UserError(f"task {config.name!r}: there is no question to train on")
        self.num_dropped = len(train) + len(held_out) - len(kept_train) - len(kept_held_out)
        if self.num_dropped:
            num_all = len(train) + len(held_out)
            _log.warning("dropped %d of %d prompts: over task.max_prompt_tokens = %d", self.num_dropped, num_all, limit)
        # One table for both, so that a row number is all that a batch has to carry.
        self._ids, self._items = zip(*kept_train, *kept_held_out, strict=True)
        self._held_out_rows = np.arange(len(kept_train), len(self._ids), dtype=np.int32)
        self.num_train = len(kept_train)
        self.prompt_tokens = max(map(len, self._ids))
        self._order: Any = grain.MapDataset.source(range(self.num_train)).shuffle(seed=seed % 2**32).repeat()
        self._pool = ScoringPool(scorer, config.scoring.num_workers, config.scoring.time_limit_secs)

    def train_prompts(self, position: Any, num_prompts: int) -> Prompts:
        """The training prompts number position .. position + num_prompts - 1, the same however they are batched.

        An epoch is `num_train` of them: each question once.
        """
        first = int(position)
        return self._prompts([int(self._order[first + i]) for i in range(num_prompts)])

    def eval_prompts(self) -> Prompts:
        """All held-out prompts; none of them is ever a training prompt."""
        return self._prompts(self._held_out_rows)

    def reward(self, answer: Any, tokens_PGT: Any, mask_PGT: Any) -> tuple[np.ndarray, Metrics]:
        """Score completions by the scorer of the task.

        Args: answer: int32[P], `Prompts.answer`. tokens_PGT: int32. mask_PGT: > 0 where the completion is.
        Returns: float32[P, G], and the fractions of completions on which the scorer failed or ran out of time (those
        have reward 0).
        """
        tokens_PGT, is_real_PGT = np.asarray(tokens_PGT), np.asarray(mask_PGT) > 0
        num_prompts, group_size = tokens_PGT.shape[:2]
        rows = np.repeat(np.asarray(answer), group_size)
        flat = zip(tokens_PGT.reshape(len(rows), -1), is_real_PGT.reshape(len(rows), -1), strict=True)
        completions = [self.tokenizer.decode(tokens_T[is_real_T]) for tokens_T, is_real_T in flat]
        scores, num_errors, num_timeouts = self._pool.score([self._items[row] for row in rows], completions)
        count = np.float32(len(rows))
        metrics = {
            "reward/errors": Mean(np.float32(num_errors), count),
            "reward/timeouts": Mean(np.float32(num_timeouts), count),
        }
        return scores.reshape(num_prompts, group_size), metrics

    def close(self) -> None:
        """End the scoring processes."""
        self._pool.close()

    def _prompts(self, rows: Sequence[int] | np.ndarray) -> Prompts:
        tokens_PS = np.full((len(rows), self.prompt_tokens), self.tokenizer.pad_id, np.int32)
        mask_PS = np.zeros(tokens_PS.shape, bool)
        for place, row in enumerate(rows):
            ids = self._ids[row]
            tokens_PS[place, -len(ids) :] = ids
            mask_PS[place, -len(ids) :] = True
        return Prompts(tokens_PS, mask_PS, np.asarray(rows, np.int32))


def same_text(text: str) -> str:
    """What two prompts have in common if they count as the same: the text up to white space."""
    return " ".join(text.split())


def without(questions: Iterable[Question], held_out: Iterable[Question]) -> list[Question]:
    """The questions whose prompt is not held out."""
    taken = {same_text(question.prompt) for question in held_out}
    return [question for question in questions if same_text(question.prompt) not in taken]


def _encode(
    tokenizer: Tokenizer, questions: Sequence[Question], system_prompt: str, use_chat: bool, limit: int
) -> list[tuple[np.ndarray, Mapping[str, Any]]]:
    """Ids and item of each question that fits."""
    kept = []
    for question in questions:
        ids = _render(tokenizer, question.prompt, system_prompt, use_chat)
        if not ids:
            raise UserError(f"prompt {question.prompt!r:.60} has no tokens: the sampler needs one to begin from")
        if len(ids) <= limit:
            kept.append((np.asarray(ids, np.int32), question.item))
    return kept


def _render(tokenizer: Tokenizer, prompt: str, system_prompt: str, use_chat: bool) -> list[int]:
    chat = getattr(tokenizer, "chat", None)
    if not use_chat or chat is None:
        return tokenizer.encode(f"{system_prompt}\n\n{prompt}" if system_prompt else prompt)
    messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return chat([*messages, {"role": "user", "content": prompt}])
