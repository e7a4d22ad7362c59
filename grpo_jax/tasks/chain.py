"""Sums with written steps: `3+4+2=` is answered by `3+4=7,7+2=9`. What counts is the number behind the last `=`.

The steps are the model's own: any text is right that ends with the sum. The careless teacher forgets to carry, in each step by
itself, and goes on with what he has written; so a completion has as many places to go wrong as its sum passes tens.
"""

from __future__ import annotations

import random

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from grpo_jax.tasks.arithmetic import without_carrying
from grpo_jax.tasks.table import MAX_PROBLEMS, TableTask, sample_distinct, take_at
from grpo_jax.tasks.tokenizers import NUM_SPECIAL
from grpo_jax.types import UNKNOWN, Arrays

MAX_RESULT = 10_000  # beyond every sum; a longer number is none of them either


class ChainTask(TableTask):
    """Sums of `num_terms` numbers up to `max_term`; a problem is a tuple of them."""

    name, alphabet = "chain", "0123456789+=,"

    def problems(self, rng: random.Random) -> list[tuple[int, ...]]:
        """Draw tuples of terms, and note the digits of their sums."""
        n, highest = self.config.num_terms, self.config.max_term
        found = sample_distinct(lambda: tuple(rng.randint(0, highest) for _ in range(n)), MAX_PROBLEMS)
        width = len(str(n * highest))
        # -1 is no token: as the rest of a shorter number it is equal to none that a model may draw.
        self._sum_NA = np.full((len(found), width), -1, np.int32)
        for row, terms in enumerate(found):
            digits = [NUM_SPECIAL + int(digit) for digit in str(sum(terms))]
            self._sum_NA[row, : len(digits)] = digits
        self._partial_sum_NK = np.cumsum(np.asarray(found, np.int32), axis=1)[:, 1:]
        return found

    def question(self, problem: tuple[int, ...]) -> str:
        """Write `3+4+2=`."""
        return f"{'+'.join(map(str, problem))}="

    def teach(self, problem: tuple[int, ...], rng: random.Random, label_noise: float) -> str:
        """Write the steps; in each the teacher forgets to carry with probability `label_noise`."""
        total, steps = problem[0], []
        for term in problem[1:]:
            result = total + term
            if rng.random() < label_noise:
                result = without_carrying(total, "+", term)
            steps.append(f"{total}+{term}={result}")
            total = result
        return ",".join(steps)

    def is_right(
        self, row_P: Int[Arrays, " P"], tokens_PGT: Int[Arrays, "P G T"], end_PG: Int[Arrays, "P G"]
    ) -> Bool[Arrays, "P G"]:
        """Compare what stands between the last `=` and the stop token with the sum. Args: those of `TableTask.is_right`."""
        sum_P1A = jnp.asarray(self._sum_NA)[row_P][:, None]
        num_digits_P1 = (sum_P1A >= 0).sum(-1)
        begin_PG = end_PG - num_digits_P1
        equals_PG = take_at(tokens_PGT, begin_PG[..., None] - 1)[..., 0]
        place_PGA = begin_PG[..., None] + jnp.arange(sum_P1A.shape[-1])[None, None]
        is_digit_right_PGA = (take_at(tokens_PGT, place_PGA) == sum_P1A) | (sum_P1A < 0)
        is_ended_PG = end_PG < tokens_PGT.shape[-1]
        return is_ended_PG & (equals_PG == self.tokenizer.encode("=")[0]) & is_digit_right_PGA.all(-1)

    def step_rewards(
        self, answer: Int[Arrays, " P"], tokens_PGT: Int[Arrays, "P G T"], mask_PGT: Shaped[Arrays, "P G T"]
    ) -> Float[jax.Array, "P G T"]:
        """Give each written step its own reward, at the comma or stop token behind it: 1 if its result is the true partial sum.

        Args:
          answer: int32, rows of the table. tokens_PGT, mask_PGT: completions.
        Returns: float32, 0 or 1 where a step ends, else UNKNOWN. A step beyond the last one is wrong.
        """
        comma, equals = self.tokenizer.encode(",=")
        is_end_PGT = ((tokens_PGT == comma) | jnp.isin(tokens_PGT, jnp.asarray(self.stop_ids))) & (jnp.asarray(mask_PGT) > 0)
        result_PGT = results(jnp.asarray(tokens_PGT), equals)
        sums_NK = jnp.asarray(self._partial_sum_NK)
        number_PGT = jnp.cumsum(is_end_PGT, -1) - 1
        K = sums_NK.shape[1]
        sum_PGT = jnp.take_along_axis(sums_NK[jnp.asarray(answer)][:, None], jnp.clip(number_PGT, 0, K - 1), axis=-1)
        is_right_PGT = (result_PGT == sum_PGT) & (number_PGT < K)
        return jnp.where(is_end_PGT, is_right_PGT.astype(jnp.float32), UNKNOWN)

    def final(self, completion: str) -> str:
        """Return what stands behind the last `=`."""
        return completion.rpartition("=")[2]


def results(tokens_PGT: Int[jax.Array, "P G T"], equals: int) -> Int[jax.Array, "P G T"]:
    """Read the number that stands between an `=` and each token; -1 where there is none.

    Args:
      tokens_PGT: completions. equals: the id of `=`.
    """

    def read(before_PG: jax.Array, token_PG: jax.Array) -> tuple[jax.Array, jax.Array]:
        digit_PG = token_PG - NUM_SPECIAL
        is_digit_PG = (digit_PG >= 0) & (digit_PG <= 9)
        # -1: no number has begun; -2: it has, without a digit so far.
        grown_PG = jnp.minimum(jnp.maximum(before_PG, 0) * 10 + digit_PG, MAX_RESULT)
        goes_on_PG = is_digit_PG & (before_PG != -1)
        after_PG = jnp.where(token_PG == equals, -2, jnp.where(goes_on_PG, grown_PG, -1))
        return after_PG, jnp.maximum(before_PG, -1)

    tokens_TPG = jnp.moveaxis(tokens_PGT, -1, 0)
    _, found_TPG = jax.lax.scan(read, jnp.full_like(tokens_TPG[0], -1), tokens_TPG)
    return jnp.moveaxis(found_TPG, 0, -1)
