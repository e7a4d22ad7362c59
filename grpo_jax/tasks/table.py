"""The part that embedded tasks of long answers share: questions in a table on the device, lessons for the warm start.

A task says which problems there are, how they are asked, how a teacher answers them, and which completions are right. All
else is here: the split, prompts by number inside a compiled step, and the teacher's lessons.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key, Shaped

from grpo_jax.errors import UserError
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.drawing import draw_rows, pad_left
from grpo_jax.tasks.tokenizers import CharTokenizer
from grpo_jax.types import Arrays, Prompts, Reward

SPLIT_SEED = 0  # one held-out set for all runs, so that seeds are compared on the same questions
MAX_PROBLEMS = 8192  # in the table; of a larger space that many are drawn
LESSONS = 4  # of each problem, for the warm start


class TableTask:
    """Base of the embedded tasks. `Prompts.answer` is the problem's row in the table, int32 [P]."""

    is_traceable = True
    name = ""
    alphabet = ""

    def __init__(self, config: Any, *, seed: int, num_eval: int, max_answer_tokens: int):
        """Draw the problems, and encode their questions.

        Args:
          config: of config.task, the task's own. seed: of the training prompts. num_eval: held-out problems.
          max_answer_tokens: the completion budget, checked against the longest answer.
        Raises: UserError if the held-out set would eat the training set, or an answer does not fit the budget.
        """
        self.config, self.seed, self.num_eval = config, seed, num_eval
        self.tokenizer: Tokenizer = CharTokenizer(self.alphabet)
        self.stop_ids = self.tokenizer.eos_ids
        if config.longest_answer > max_answer_tokens:
            raise UserError(
                f"config.rollout.max_completion_tokens = {max_answer_tokens}: the longest answer of task {self.name!r} and its "
                f"stop token take {config.longest_answer}; 0 leaves it to the task"
            )
        # Each problem once, in an order that no run changes; the first are held out. `random` and not numpy: the teacher draws
        # one symbol at a time, where it is ten times as fast.
        self._problems = self.problems(random.Random(SPLIT_SEED))[:MAX_PROBLEMS]
        if not 1 <= num_eval <= len(self._problems) // 2:
            raise UserError(
                f"config.eval.num_prompts = {num_eval}: must be from 1 to half of the {len(self._problems)} problems that "
                f"config.task.{self.name} allows"
            )
        questions = [self.tokenizer.encode_prompt(self.question(problem)) for problem in self._problems]
        self.prompt_tokens = max(map(len, questions))
        tokens_NS, mask_NS = pad_left(questions, self.prompt_tokens, self.tokenizer.pad_id)
        # On the device from the start, so that prompts and rewards are lookups in a compiled step.
        self._table = jax.device_put(Prompts(tokens_NS, mask_NS, np.arange(len(questions), dtype=np.int32)))

    def problems(self, rng: random.Random) -> list[Any]:
        """Return distinct problems in random order: all of them, or at least MAX_PROBLEMS of very many."""
        raise NotImplementedError

    def question(self, problem: Any) -> str:
        """Write a problem as its prompt."""
        raise NotImplementedError

    def teach(self, problem: Any, rng: random.Random, label_noise: float) -> str:
        """Write a worked answer, at most `config.longest_answer` - 1 tokens; right for sure if label_noise is 0."""
        raise NotImplementedError

    def is_right(
        self, row_P: Int[Arrays, " P"], tokens_PGT: Int[Arrays, "P G T"], end_PG: Int[Arrays, "P G"]
    ) -> Bool[Arrays, "P G"]:
        """Judge completions. row_P: the problems' rows. end_PG: place of the stop token; T of one without."""
        raise NotImplementedError

    def train_prompts(
        self, position: int | Int[Arrays, ""], num_prompts: int, seed: int | Int[Arrays, ""] | None = None
    ) -> Prompts:
        """Draw training prompts number position.. : each uniformly, with a key made from its own number.

        Args:
          position: int32, of the first one. num_prompts: P. seed: of the order, may be traced; None: the task's own.
        Returns: Prompts [P, S].
        """
        seed = self.seed if seed is None else seed
        rows_P = draw_rows(seed, position, num_prompts, self.num_eval, len(self._problems))
        return jax.tree.map(lambda x: x[rows_P], self._table)

    def eval_prompts(self) -> Prompts:
        """Return every held-out problem."""
        return jax.tree.map(lambda x: x[: self.num_eval], self._table)

    def reward(
        self,
        answer: Int[Arrays, " P"],
        tokens_PGT: Int[Arrays, "P G T"],
        mask_PGT: Shaped[Arrays, "P G T"],
    ) -> Reward:
        """Give 1 for a right completion, else 0.

        Args:
          answer: int32, rows of the table. tokens_PGT: int32. mask_PGT: > 0 through the stop token.
        Returns: a Reward of float32 arrays [P, G], without shaping.
        """
        tokens_PGT = jnp.asarray(tokens_PGT)
        is_stop_PGT = jnp.isin(tokens_PGT, jnp.asarray(self.stop_ids)) & (jnp.asarray(mask_PGT) > 0)
        end_PG = jnp.where(is_stop_PGT.any(-1), is_stop_PGT.argmax(-1), tokens_PGT.shape[-1])
        is_right_PG = self.is_right(jnp.asarray(answer), tokens_PGT, end_PG).astype(jnp.float32)
        return Reward(is_right_PG, jnp.zeros_like(is_right_PG), {})

    def final_answers(self, tokens_PGT: Int[Arrays, "P G T"], mask_PGT: Shaped[Arrays, "P G T"]) -> list[list[str]]:
        """Return what counts of each completion as text, [P][G]."""
        pairs = zip(np.asarray(tokens_PGT), np.asarray(mask_PGT) > 0, strict=True)
        return [[self.final(self.tokenizer.decode(t_T[m_T])) for t_T, m_T in zip(*pair, strict=True)] for pair in pairs]

    def final(self, completion: str) -> str:
        """Return the part of a completion that votes for an answer: all of it."""
        return completion

    def reference(self, answer: Int[Arrays, ""]) -> list[int]:
        """Return a right completion, without a stop token. answer: of the prompt."""
        return self.tokenizer.encode(self.teach(self._problems[int(answer)], random.Random(SPLIT_SEED), 0.0))

    def supervised(
        self, key: Key[jax.Array, ""], num_examples: int, label_noise: float
    ) -> tuple[Prompts, Int[jax.Array, "P 1 A"], Float[jax.Array, "P 1 A"]]:
        """Draw worked training examples for the warm start.

        Args:
          key: of the draw. num_examples: P. label_noise: how often the teacher is careless.
        Returns: (prompts, tokens_P1A, mask_P1A): int32 answers, each ended by a stop token, and 1 through that.
        """
        lessons = [
            [self.tokenizer.encode(self.teach(problem, rng, label_noise)) for _ in range(LESSONS)]
            for rng in [random.Random(SPLIT_SEED + 1)]
            for problem in self._problems[self.num_eval :]
        ]
        tokens_NLA, lengths_NL = pack(lessons, self.config.longest_answer, self.stop_ids[0])
        pick_P, lesson_P = (
            jax.random.randint(each, (num_examples,), 0, size)
            for each, size in zip(jax.random.split(key), lengths_NL.shape, strict=True)
        )
        prompts = jax.tree.map(lambda x: x[self.num_eval + pick_P], self._table)
        tokens_PA, length_P = (jnp.asarray(x)[pick_P, lesson_P] for x in (tokens_NLA, lengths_NL))
        mask_PA = jnp.arange(tokens_PA.shape[1])[None] < length_P[:, None]
        return prompts, tokens_PA[:, None], mask_PA.astype(jnp.float32)[:, None]

    def close(self) -> None:
        """Nothing to release."""


def pack(
    lessons: Sequence[Sequence[Sequence[int]]], width: int, stop_id: int
) -> tuple[Int[np.ndarray, "N L A"], Int[np.ndarray, "N L"]]:
    """Pack lists of ids into one array, and give their lengths with the stop token that follows each."""
    tokens_NLA = np.full((len(lessons), len(lessons[0]), width), stop_id, np.int32)
    lengths_NL = np.zeros(tokens_NLA.shape[:2], np.int32)
    for row, several in enumerate(lessons):
        for place, ids in enumerate(several):
            tokens_NLA[row, place, : len(ids)] = ids
            lengths_NL[row, place] = len(ids) + 1
    return tokens_NLA, lengths_NL


def take_at(tokens_PGT: Int[Arrays, "P G T"], place_PGK: Int[Arrays, "P G K"]) -> Int[jax.Array, "P G K"]:
    """Take the tokens at these places; -1 outside of a completion's slots."""
    T = tokens_PGT.shape[-1]
    is_inside_PGK = (place_PGK >= 0) & (place_PGK < T)
    found_PGK = jnp.take_along_axis(tokens_PGT, jnp.clip(place_PGK, 0, T - 1), axis=-1)
    return jnp.where(is_inside_PGK, found_PGK, -1)


def sample_distinct(draw: Any, num: int) -> list[Any]:
    """Draw until `num` distinct problems are found, or new ones have become rare. draw: () -> a hashable problem."""
    found: dict[Any, None] = {}
    misses = 0
    while len(found) < num and misses < 20_000:
        problem = draw()
        misses = misses + 1 if problem in found else 0
        found[problem] = None
    return list(found)
