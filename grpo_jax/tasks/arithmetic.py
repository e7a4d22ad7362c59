"""Sums and differences as text: the embedded task. Traceable, so a whole training iteration compiles into one call.

With the built-in character tokenizer the text is `12+34=`; with a language model's tokenizer it is `12 + 34 =`, after
`num_shots` worked lines. A completion is right if it is exactly the answer followed by a stop token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Key, Shaped

from grpo_jax.config import ArithmeticConfig
from grpo_jax.errors import UserError
from grpo_jax.tasks import Tokenizer
from grpo_jax.tasks.drawing import draw_rows, pad_left
from grpo_jax.tasks.tokenizers import CharTokenizer
from grpo_jax.types import Arrays, Prompts, Reward

ALPHABET = "0123456789+-="
SPLIT_SEED = 0  # one held-out set for all runs, so that seeds are compared on the same questions


class ArithmeticTask:
    """All problems `a op b` within the operand range, split once into training and held-out ones."""

    is_traceable = True

    def __init__(self, config: ArithmeticConfig, tokenizer: Tokenizer, *, seed: int, num_eval: int, max_answer_tokens: int):
        """Encode all problems.

        Args:
          config: operators, range and worked lines. tokenizer: for text and stop tokens. seed: of the training prompts.
          num_eval: held-out problems. max_answer_tokens: the completion budget, checked against the longest answer.
        Raises: UserError if the held-out set would eat the training set, or an answer does not fit the budget.
        """
        self.tokenizer, self.seed = tokenizer, seed
        self.is_plain = isinstance(tokenizer, CharTokenizer)
        # A base model ends its line as the worked lines do, and would go on with problems of its own. A newline of several
        # tokens cannot be a stop token, and the character tokenizer has none.
        newline = []
        if not self.is_plain:
            newline = tokenizer.encode("\n")
        if len(newline) > 1:
            newline = []
        self.stop_ids = (*tokenizer.eos_ids, *newline)
        problems, train_rows, eval_rows = split_problems(config, num_eval)
        rng = np.random.default_rng(SPLIT_SEED)
        # Worked lines are training problems only, so that no held-out answer is shown; drawn once for each problem, so that a
        # question is the same prompt in every run.
        shots = [rng.choice(train_rows, config.num_shots, replace=False) for _ in problems]
        questions = [
            tokenizer.encode_prompt("\n".join([*(self._line(problems[k]) for k in ks), self._question(problem)]))
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
        # Every prompt and answer is on the device from the start, so that prompts and rewards are lookups in a compiled step.
        self._table = jax.device_put(self._pack(questions, answers))
        # As wide as the right answers, since one select takes from both.
        careless = [tokenizer.encode(self._answer(problem, is_careless=True)) for problem in problems]
        self._careless_PA = jnp.asarray(self._pack(questions, careless, self._table.answer.shape[1]).answer)
        self._train_rows, self._eval_rows = jnp.asarray(train_rows), jnp.asarray(eval_rows)

    def _question(self, problem: tuple[int, str, int]) -> str:
        a, op, b = problem
        if self.is_plain:
            return f"{a}{op}{b}="
        return f"{a} {op} {b} ="

    def _answer(self, problem: tuple[int, str, int], *, is_careless: bool = False) -> str:
        evaluate = without_carrying if is_careless else compute
        answer = str(evaluate(*problem))
        if self.is_plain:
            return answer
        # The space belongs to the answer and not to the question: language models' tokens begin with their space.
        return f" {answer}"

    def _line(self, problem: tuple[int, str, int]) -> str:
        return self._question(problem) + self._answer(problem)

    def _pack(self, questions: list[list[int]], answers: list[list[int]], answer_width: int = 0) -> Prompts:
        """Pack all problems into one Prompts table; `answer` is [P, A], -1 beyond each answer's end."""
        tokens_PS, mask_PS = pad_left(questions, self.prompt_tokens, self.tokenizer.pad_id)
        # -1 is no token, so that padding of an answer is never taken for a part of it; pad_id is one that a model may draw.
        answer_PA = np.full((len(questions), answer_width or max(map(len, answers)) + 1), -1, np.int32)
        for row, answer in enumerate(answers):
            answer_PA[row, : len(answer)] = answer
        return Prompts(tokens_PS, mask_PS, answer_PA)

    def train_prompts(
        self, position: int | Int[Arrays, ""], num_prompts: int, seed: int | Int[Arrays, ""] | None = None
    ) -> Prompts:
        """Draw training prompts number position.. : each uniformly, with a key made from its own number.

        Args:
          position: int32, of the first one. num_prompts: P. seed: of the order, may be traced; None: the task's own.
        Returns: Prompts [P, S].
        """
        seed = self.seed if seed is None else seed
        picks = draw_rows(seed, position, num_prompts, 0, len(self._train_rows))
        return jax.tree.map(lambda x: x[self._train_rows[picks]], self._table)

    def eval_prompts(self) -> Prompts:
        """Return every held-out problem."""
        return jax.tree.map(lambda x: x[self._eval_rows], self._table)

    def reward(
        self,
        answer: Int[Arrays, "P A"],
        tokens_PGT: Int[Arrays, "P G T"],
        mask_PGT: Shaped[Arrays, "P G T"],
    ) -> Reward:
        """Give 1 for the answer's tokens followed at once by a stop token, else 0.

        Args:
          answer: int32, -1 beyond an answer's end. tokens_PGT: int32. mask_PGT: not used.
        Returns: a Reward of float32 arrays [P, G], without shaping.
        """
        del mask_PGT  # the stop token must stand right behind the answer, so the mask says nothing more
        A = answer.shape[-1]
        given_PGA = tokens_PGT[..., :A]
        expected_P1A = answer[:, None]
        is_stop_PGA = jnp.isin(given_PGA, jnp.asarray(self.stop_ids))
        is_end_P1A = jnp.arange(A)[None, None] == (expected_P1A >= 0).sum(-1, keepdims=True)
        # Slots behind the stop token may hold anything.
        is_right_PGA = jnp.where(is_end_P1A, is_stop_PGA, (given_PGA == expected_P1A) | (expected_P1A < 0))
        is_right_PG = is_right_PGA.all(-1).astype(jnp.float32)
        return Reward(is_right_PG, jnp.zeros_like(is_right_PG), {})

    def final_answers(self, tokens_PGT: Int[Arrays, "P G T"], mask_PGT: Shaped[Arrays, "P G T"]) -> list[list[str]]:
        """Return the completions as text."""
        pairs = zip(np.asarray(tokens_PGT), np.asarray(mask_PGT) > 0, strict=True)
        return [[self.tokenizer.decode(t_T[m_T]).strip() for t_T, m_T in zip(*pair, strict=True)] for pair in pairs]

    def reference(self, answer: Int[Arrays, " A"]) -> list[int]:
        """Return the right completion, without a stop token. answer: of the prompt."""
        ids = np.asarray(answer)
        return ids[ids >= 0].tolist()

    def supervised(
        self, key: Key[jax.Array, ""], num_examples: int, label_noise: float
    ) -> tuple[Prompts, Int[jax.Array, "P 1 A"], Float[jax.Array, "P 1 A"]]:
        """Draw worked training examples for the warm start.

        Args:
          key: of the draw. num_examples: P.
          label_noise: share of the examples whose teacher forgot to carry or borrow.
        Returns: (prompts, tokens_P1A, mask_P1A): int32 answers, each ended by a stop token, and 1 through that.
        """
        pick_key, error_key = jax.random.split(key)
        rows = self._train_rows[jax.random.randint(pick_key, (num_examples,), 0, len(self._train_rows))]
        prompts = jax.tree.map(lambda x: x[rows], self._table)
        is_careless_P1 = jax.random.bernoulli(error_key, label_noise, (num_examples, 1))
        answer_PA = jnp.where(is_careless_P1, self._careless_PA[rows], prompts.answer)
        lengths_P1 = (answer_PA >= 0).sum(-1, keepdims=True)
        columns_1A = jnp.arange(answer_PA.shape[-1])[None]
        tokens_PA = jnp.where(columns_1A == lengths_P1, self.stop_ids[0], jnp.maximum(answer_PA, 0))
        return prompts, tokens_PA[:, None], (columns_1A <= lengths_P1).astype(jnp.float32)[:, None]

    def close(self) -> None:
        """Nothing to release."""


def compute(a: int, op: str, b: int) -> int:
    """Return a + b or a - b."""
    return a + b if op == "+" else a - b


def without_carrying(a: int, op: str, b: int) -> int:
    """Add or subtract digit by digit, modulo ten, as someone who never carries or borrows (58 + 67 -> 15).

    Args:
      a, b: at most nine digits. op: "+" or "-", with a >= b.
    Returns: a number that is wrong where a carry is due.
    """
    digits = [compute(int(x), op, int(y)) % 10 for x, y in zip(f"{a:09d}", f"{b:09d}", strict=True)]
    return int("".join(map(str, digits)))


def split_problems(
    config: ArithmeticConfig, num_eval: int
) -> tuple[list[tuple[int, str, int]], Int[np.ndarray, " train"], Int[np.ndarray, " held_out"]]:
    """List all problems -> (problems, training rows, held-out rows)."""
    # a + b and b + a count as one question, so both are on the same side: a model that has learnt one would know the other.
    operands = range(config.min_operand, config.max_operand + 1)
    problems = [(a, op, b) for op in config.operators for a in operands for b in operands if op == "+" or a >= b]
    keys = [(op, *sorted((a, b))) for a, op, b in problems]
    distinct = sorted(set(keys))
    order = np.random.default_rng(SPLIT_SEED).permutation(len(distinct))
    rank = {distinct[k]: place for place, k in enumerate(order)}
    # By the rank of the pair first, so that its two problems are neighbours and it is enough to look at the cut.
    by_rank = sorted(range(len(problems)), key=lambda row: (rank[keys[row]], row))
    cut = num_eval
    while 0 < cut < len(by_rank) and keys[by_rank[cut]] == keys[by_rank[cut - 1]]:
        cut += 1  # the other one of a pair is dropped, rather than trained on
    if num_eval < 1 or cut >= len(by_rank) - config.num_shots:
        raise UserError(
            f"config.eval.num_prompts = {num_eval}: must be from 1 to well below the {len(problems)} problems that "
            f"config.task.arithmetic.max_operand = {config.max_operand} allows"
        )
    return problems, np.asarray(by_rank[cut:]), np.asarray(by_rank[:num_eval])
