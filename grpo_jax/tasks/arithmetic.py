"""Sums and differences as text: the embedded task. Traceable, so a whole training iteration compiles into one call.

With the built-in character tokenizer the text is `12+34=`; with a language model's tokenizer it is `12 + 34 =`, after
`num_shots` worked lines. A completion is right if it is exactly the answer followed by a stop token.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import ArithmeticConfig
from grpo_jax.errors import UserError
from grpo_jax.rng import key_for
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.tokenizers import CharTokenizer
from grpo_jax.types import Prompts, Reward

ALPHABET = "0123456789+-="
SPLIT_SEED = 0  # one held-out set for all runs, so that seeds are compared on the same questions


class ArithmeticTask:
    """All problems `a op b` within the operand range, split once into training and held-out ones."""

    is_traceable = True

    def __init__(self, config: ArithmeticConfig, tokenizer: Tokenizer, *, seed: int, num_eval: int, max_answer_tokens: int):
        """num_eval: held-out problems. max_answer_tokens: the completion budget, checked against the longest answer.

        Raises: UserError if the held-out set would eat the training set, or an answer does not fit the budget.
        """
        self.tokenizer, self.seed = tokenizer, seed
        self.is_plain = isinstance(tokenizer, CharTokenizer)
        newline = tuple(tokenizer.encode("\n")) if not self.is_plain else ()
        self.stop_ids = (*tokenizer.eos_ids, *(newline if len(newline) == 1 else ()))
        problems, train_rows, eval_rows = split_problems(config, num_eval)
        rng = np.random.default_rng(SPLIT_SEED)
        shots = [rng.choice(train_rows, config.num_shots, replace=False) for _ in problems]
        questions = [
            tokenizer.encode("\n".join([*(self._line(problems[k]) for k in ks), self._question(problem)]))
            for problem, ks in zip(problems, shots, strict=True)
        ]
        answers = [tokenizer.encode(self._answer(problem)) for problem in problems]
        longest = max(map(len, answers)) + 1
        if longest > max_answer_tokens:
            raise UserError(
                f"config.rollout.max_completion_tokens = {max_answer_tokens}: "
                f"the longest answer and its stop token take {longest}"
            )
        self.prompt_tokens = max(map(len, questions))
        self._table = jax.device_put(self._pack(questions, answers))
        careless = [tokenizer.encode(self._answer(problem, is_careless=True)) for problem in problems]
        self._careless_NA = jnp.asarray(self._pack(questions, careless, self._table.answer.shape[1]).answer)
        self._train_rows, self._eval_rows = jnp.asarray(train_rows), jnp.asarray(eval_rows)

    def _question(self, problem: tuple[int, str, int]) -> str:
        a, op, b = problem
        return f"{a}{op}{b}=" if self.is_plain else f"{a} {op} {b} ="

    def _answer(self, problem: tuple[int, str, int], *, is_careless: bool = False) -> str:
        a, op, b = problem
        value = without_carrying(a, op, b) if is_careless else a + b if op == "+" else a - b
        return f"{value}" if self.is_plain else f" {value}"

    def _line(self, problem: tuple[int, str, int]) -> str:
        return self._question(problem) + self._answer(problem)

    def _pack(self, questions: list[list[int]], answers: list[list[int]], answer_width: int = 0) -> Prompts:
        """All problems as one Prompts table; `answer` is [N, A], -1 beyond each answer's end."""
        tokens_NS = np.full((len(questions), self.prompt_tokens), self.tokenizer.pad_id, np.int32)
        mask_NS = np.zeros(tokens_NS.shape, bool)
        answer_NA = np.full((len(questions), answer_width or max(map(len, answers)) + 1), -1, np.int32)
        for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
            tokens_NS[row, -len(question) :] = question
            mask_NS[row, -len(question) :] = True
            answer_NA[row, : len(answer)] = answer
        return Prompts(tokens_NS, mask_NS, answer_NA)

    def train_prompts(self, position: Any, num_prompts: int, seed: Any = None) -> Prompts:
        """Training prompts number position.. : each drawn uniformly with a key made from its own number.

        Args:
          position: int32, of the first one. num_prompts: P. seed: of the order, may be traced; None: the task's own.
        Returns: Prompts [P, S].
        """
        seed = self.seed if seed is None else seed
        keys = jax.vmap(lambda i: key_for(seed, "prompts", i))(position + jnp.arange(num_prompts))
        picks = jax.vmap(lambda key: jax.random.randint(key, (), 0, len(self._train_rows)))(keys)
        return jax.tree.map(lambda x: x[self._train_rows[picks]], self._table)

    def eval_prompts(self) -> Prompts:
        """Every held-out problem."""
        return jax.tree.map(lambda x: x[self._eval_rows], self._table)

    def reward(self, answer: Any, tokens_PGT: Any, mask_PGT: Any) -> Reward:
        """1 for the answer's tokens followed at once by a stop token, else 0."""
        del mask_PGT  # the stop token must stand right behind the answer, so the mask says nothing more
        A = answer.shape[-1]
        given_PGA = tokens_PGT[..., :A]
        expected_P1A = answer[:, None]
        is_stop_PGA = jnp.isin(given_PGA, jnp.asarray(self.stop_ids))
        is_end_P1A = jnp.arange(A)[None, None] == (expected_P1A >= 0).sum(-1, keepdims=True)
        is_right_PGA = jnp.where(is_end_P1A, is_stop_PGA, (given_PGA == expected_P1A) | (expected_P1A < 0))
        is_right_PG = is_right_PGA.all(-1).astype(jnp.float32)
        return Reward(is_right_PG, jnp.zeros_like(is_right_PG), {})

    def final_answers(self, tokens_PGT: Any, mask_PGT: Any) -> list[list[str]]:
        """The completions as text."""
        pairs = zip(np.asarray(tokens_PGT), np.asarray(mask_PGT) > 0, strict=True)
        return [[self.tokenizer.decode(t_T[m_T]).strip() for t_T, m_T in zip(*pair, strict=True)] for pair in pairs]

    def supervised(self, key: Any, num_examples: int, label_noise: float) -> tuple[Prompts, Any, Any]:
        """Worked training examples for the warm start: (prompts, tokens_P1A, mask_P1A), each answer ended by a stop token.

        label_noise: share of the examples whose teacher forgot to carry or borrow.
        """
        pick_key, error_key = jax.random.split(key)
        rows = self._train_rows[jax.random.randint(pick_key, (num_examples,), 0, len(self._train_rows))]
        prompts = jax.tree.map(lambda x: x[rows], self._table)
        is_careless_P1 = jax.random.bernoulli(error_key, label_noise, (num_examples, 1))
        answer_PA = jnp.where(is_careless_P1, self._careless_NA[rows], prompts.answer)
        lengths_P1 = (answer_PA >= 0).sum(-1, keepdims=True)
        columns_1A = jnp.arange(answer_PA.shape[-1])[None]
        tokens_PA = jnp.where(columns_1A == lengths_P1, self.stop_ids[0], jnp.maximum(answer_PA, 0))
        return prompts, tokens_PA[:, None], (columns_1A <= lengths_P1).astype(jnp.float32)[:, None]

    def close(self) -> None:
        """Nothing to release."""


def without_carrying(a: int, op: str, b: int) -> int:
    """Digit by digit, modulo ten: what someone gets who never carries or borrows (58 + 67 -> 15)."""
    digits = [(int(x) + int(y) if op == "+" else int(x) - int(y)) % 10 for x, y in zip(f"{a:09d}", f"{b:09d}", strict=True)]
    return int("".join(map(str, digits)))


def split_problems(config: ArithmeticConfig, num_eval: int):
    """-> (problems, training rows, held-out rows). a + b and b + a count as one question: both fall on the same side."""
    operands = range(config.min_operand, config.max_operand + 1)
    problems = [(a, op, b) for op in config.operators for a in operands for b in operands if op == "+" or a >= b]
    keys = [(op, *sorted((a, b))) for a, op, b in problems]
    distinct = sorted(set(keys))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(distinct))
    rank = {distinct[k]: place for place, k in enumerate(order)}
    by_rank = sorted(range(len(problems)), key=lambda row: (rank[keys[row]], row))
    cut = num_eval
    while 0 < cut < len(by_rank) and keys[by_rank[cut]] == keys[by_rank[cut - 1]]:
        cut += 1  # do not tear a commuted pair apart
    if num_eval < 1 or cut >= len(by_rank) - config.num_shots:
        raise UserError(
            f"config.eval.num_prompts = {num_eval}: must be from 1 to well below the {len(problems)} problems that "
            f"config.task.arithmetic.max_operand = {config.max_operand} allows"
        )
    return problems, np.asarray(by_rank[cut:]), np.asarray(by_rank[:num_eval])
