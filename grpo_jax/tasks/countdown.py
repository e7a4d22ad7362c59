"""Countdown: reach a target with given numbers, each used once. `03,05,09:07` is answered by `09-05=04,04+03=07`.

Each step takes two of the numbers that are there and puts their sum or difference in their place; with n numbers there are
n - 1 steps, and the last result must be the target. All numbers have two digits, so a step stands at a fixed place. Any order
that gets there is right. The careless teacher confuses the signs of the last step.
"""

from __future__ import annotations

import random
from collections import defaultdict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from grpo_jax.tasks.table import MAX_PROBLEMS, TableTask, take_at
from grpo_jax.tasks.tokenizers import NUM_SPECIAL
from grpo_jax.types import Arrays

STEP = 9  # tokens of one, with the comma or stop token behind it
DRAWN = 60_000  # walks, from which problems and their answers are taken

Problem = tuple[tuple[int, ...], int]  # numbers, target


class CountdownTask(TableTask):
    """Numbers and a target; a problem is ((number, ...), target)."""

    name, alphabet = "countdown", "0123456789+-=,:"

    def problems(self, rng: random.Random) -> list[Problem]:
        """Draw walks: where one ends is a target, and the walk an answer. Numbers and targets are noted."""
        answers = defaultdict(set)
        for _ in range(DRAWN):
            numbers = tuple(sorted(rng.randint(1, self.config.max_number) for _ in range(self.config.num_numbers)))
            steps, target = walk(numbers, rng)
            answers[numbers, target].add(steps)
        found = list(answers)
        rng.shuffle(found)
        found = found[:MAX_PROBLEMS]
        self._answers = {problem: sorted(answers[problem]) for problem in found}
        self._numbers_NK = np.asarray([numbers for numbers, _ in found], np.int32)
        self._target_N = np.asarray([target for _, target in found], np.int32)
        return found

    def question(self, problem: Problem) -> str:
        """Write `03,05,09:07`."""
        numbers, target = problem
        return f"{','.join(f'{number:02d}' for number in numbers)}:{target:02d}"

    def teach(self, problem: Problem, rng: random.Random, label_noise: float) -> str:
        """Write one of the answers; with probability `label_noise` the last step has the other sign."""
        steps = rng.choice(self._answers[problem])
        before, left, sign, right = steps[: 1 - STEP], steps[1 - STEP : -6], steps[-6], steps[-5:-3]
        if rng.random() < label_noise:
            return f"{before}{write_step(int(left), '-' if sign == '+' else '+', int(right))}"
        return steps

    def is_right(
        self, row_P: Int[Arrays, " P"], tokens_PGT: Int[Arrays, "P G T"], end_PG: Int[Arrays, "P G"]
    ) -> Bool[Arrays, "P G"]:
        """Do the steps with the numbers that are there. Args: those of `TableTask.is_right`."""
        num_steps = self.config.num_numbers - 1
        highest = self.config.num_numbers * self.config.max_number
        plus, minus, equals, comma = self.tokenizer.encode("+-=,")

        def count(value_PG: Int[jax.Array, "P G"]) -> Int[jax.Array, "P G M"]:
            return (value_PG[..., None] == jnp.arange(highest + 1)[None, None]).astype(jnp.int32)

        # How many of each number are there still: a step takes two and adds one.
        there_PGM = count(jnp.asarray(self._numbers_NK)[row_P]).sum(1)[:, None]
        is_right_PG = end_PG == STEP * num_steps - 1
        result_PG = jnp.zeros_like(end_PG)
        for number in range(num_steps):
            slot_PGT = take_at(tokens_PGT, jnp.broadcast_to(jnp.arange(STEP) + STEP * number, (*end_PG.shape, STEP)))
            left_PG, right_PG, result_PG = (two_digits(slot_PGT[..., place : place + 2]) for place in (0, 3, 6))
            sign_PG = slot_PGT[..., 2]
            expected_PG = jnp.where(sign_PG == plus, left_PG + right_PG, left_PG - right_PG)
            is_right_PG &= ((sign_PG == plus) | (sign_PG == minus)) & (slot_PGT[..., 5] == equals)
            is_right_PG &= (result_PG == expected_PG) & (result_PG >= 0) & (left_PG >= 0) & (right_PG >= 0)
            if number < num_steps - 1:
                is_right_PG &= slot_PGT[..., 8] == comma
            there_PGM = there_PGM - count(left_PG) - count(right_PG)
            is_right_PG &= (there_PGM >= 0).all(-1) & (jnp.maximum(left_PG, right_PG) <= highest)
            there_PGM = there_PGM + count(result_PG)
        return is_right_PG & (result_PG == jnp.asarray(self._target_N)[row_P][:, None])


def walk(numbers: tuple[int, ...], rng: random.Random) -> tuple[str, int]:
    """Combine numbers at random until one is left. Returns: the steps as text, and the last result."""
    there, steps = list(numbers), []
    while len(there) > 1:
        rng.shuffle(there)
        left, right = there.pop(), there.pop()
        steps.append(write_step(left, rng.choice("+-"), right))
        there.append(int(steps[-1][-2:]))
    return ",".join(steps), there[0]


def write_step(left: int, sign: str, right: int) -> str:
    """Write `09-05=04`, of a difference the larger number first."""
    if sign == "-":
        left, right = max(left, right), min(left, right)
    result = left + right if sign == "+" else left - right
    return f"{left:02d}{sign}{right:02d}={result:02d}"


def two_digits(token_PG2: Int[jax.Array, "P G 2"]) -> Int[jax.Array, "P G"]:
    """Read two tokens as a number; -100 if one of them is no digit."""
    digit_PG2 = token_PG2 - NUM_SPECIAL
    is_digit_PG2 = (digit_PG2 >= 0) & (digit_PG2 <= 9)
    return jnp.where(is_digit_PG2.all(-1), digit_PG2[..., 0] * 10 + digit_PG2[..., 1], -100)
