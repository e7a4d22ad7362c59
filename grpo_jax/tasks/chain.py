"""Sums with written steps: `3+4+2=` is answered by `3+4=7,7+2=9`. What counts is the number behind the last `=`.

The steps are the model's own: any text is right that ends with the sum. The careless teacher forgets to carry, in each step by
itself, and goes on with what he has written; so a completion has as many places to go wrong as its sum passes tens.
"""

from __future__ import annotations

import random

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.tasks.arithmetic import without_carrying
from grpo_jax.tasks.table import MAX_PROBLEMS, TableTask, sample_distinct, take_at
from grpo_jax.tasks.tokenizers import NUM_SPECIAL
from grpo_jax.types import Arrays


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

    def final(self, completion: str) -> str:
        """Return what stands behind the last `=`."""
        return completion.rpartition("=")[2]
