"""Forks: a few decisive tokens among filler, so that the true credit of every token is known in closed form.

The prompt has k digits, `3706:`. A completion has k stretches of filler, any tokens at all, and behind each a fork: `L` if the
stretch's digit is even, `R` if it is odd. It is right if all forks are. The teacher draws filler of a set entropy, and is
careless about the highest digits.
"""

from __future__ import annotations

import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from grpo_jax.config.embedded import NUM_FILLERS
from grpo_jax.tasks.table import MAX_PROBLEMS, TableTask, sample_distinct, take_at
from grpo_jax.types import UNKNOWN, Arrays

FILLERS = "abcdefghijklmnop"[:NUM_FILLERS]
BRANCHES = "LR"


class ForksTask(TableTask):
    """All words of `num_forks` digits; a problem is such a word."""

    name, alphabet = "forks", f"0123456789:{BRANCHES}{FILLERS}"

    def problems(self, rng: random.Random) -> list[str]:
        """List the words in random order, and note the right branches."""
        k = self.config.num_forks
        if 10**k <= MAX_PROBLEMS:
            words = ["".join(each) for each in itertools.product("0123456789", repeat=k)]
            rng.shuffle(words)
        else:
            words = sample_distinct(lambda: "".join(rng.choice("0123456789") for _ in range(k)), MAX_PROBLEMS)
        self._branch_NK = np.asarray([self.tokenizer.encode("".join(BRANCHES[int(x) % 2] for x in word)) for word in words])
        self._shares = filler_shares(self.config.filler_entropy)
        return words

    def question(self, problem: str) -> str:
        """Write `3706:`."""
        return f"{problem}:"

    def teach(self, problem: str, rng: random.Random, label_noise: float) -> str:
        """Write fillers and forks; a fork of a hard digit is wrong with probability `label_noise`."""
        told = []
        for digit in map(int, problem):
            is_careless = digit >= 10 - self.config.hard_digits and rng.random() < label_noise
            told += rng.choices(FILLERS, self._shares, k=self.config.filler_tokens)
            told.append(BRANCHES[(digit + is_careless) % 2])
        return "".join(told)

    @property
    def places(self) -> Int[np.ndarray, " K"]:
        """Slots of the forks in a completion."""
        return (np.arange(self.config.num_forks) + 1) * (self.config.filler_tokens + 1) - 1

    def is_right(
        self, row_P: Int[Arrays, " P"], tokens_PGT: Int[Arrays, "P G T"], end_PG: Int[Arrays, "P G"]
    ) -> Bool[Arrays, "P G"]:
        """Tell if all forks are right; what follows the last one does not matter. Args: those of `TableTask.is_right`."""
        return self._right_forks(row_P, tokens_PGT).all(-1) & (end_PG > self.places[-1])

    def _right_forks(self, row_P: Int[Arrays, " P"], tokens_PGT: Int[Arrays, "P G T"]) -> Bool[jax.Array, "P G K"]:
        P, G, _ = tokens_PGT.shape
        found_PGK = take_at(tokens_PGT, jnp.broadcast_to(self.places, (P, G, len(self.places))))
        return found_PGK == jnp.asarray(self._branch_NK)[row_P][:, None]

    def final(self, completion: str) -> str:
        """Return the branches that were taken."""
        return "".join(completion[place : place + 1] for place in self.places)

    def token_credit(
        self,
        answer: Int[Arrays, " P"],
        tokens_PGT: Int[Arrays, "P G T"],
        mask_PGT: Shaped[Arrays, "P G T"],
        logp_PGT: Float[Arrays, "P G T"],
    ) -> Float[jax.Array, "P G T"]:
        """Compute each token's true advantage: how much more probable it made success, Q(s, a) - V(s).

        With p_j the probability of the right branch at fork j it is 0 on filler; at fork j, as long as all before it were
        right, (1 - p_j) times the product of p_i over the later forks if it is right, and -p_j times that product if it is
        wrong; and 0 once a fork was wrong. Added up over a completion it is the reward minus the product of all p.

        Args:
          answer: int32, rows of the table. tokens_PGT, mask_PGT: completions.
          logp_PGT: float, nats, of these tokens by the policy that drew them. p is exp(logp) where the right branch was drawn,
            else 1 - exp(logp): what a policy gives to tokens that are no branch is counted as right there.
        Returns: of logp's dtype; UNKNOWN on completions that end before their last fork, whose later p nobody knows.
        """
        row_P, place_K = jnp.asarray(answer), self.places
        P, G, T = tokens_PGT.shape
        is_right_PGK = self._right_forks(row_P, jnp.asarray(tokens_PGT))
        drawn_PGK = jnp.exp(jnp.take(jnp.asarray(logp_PGT), place_K, axis=-1))
        p_PGK = jnp.where(is_right_PGK, drawn_PGK, 1 - drawn_PGK)
        right_PGK = is_right_PGK.astype(p_PGK.dtype)
        ones_PG1 = jnp.ones((P, G, 1), p_PGK.dtype)
        before_PGK = jnp.concatenate([ones_PG1, jnp.cumprod(right_PGK, -1)[..., :-1]], -1)
        after_PGK = jnp.concatenate([jnp.cumprod(p_PGK[..., ::-1], -1)[..., ::-1][..., 1:], ones_PG1], -1)
        credit_PGK = before_PGK * after_PGK * (right_PGK - p_PGK)
        credit_PGT = jnp.zeros((P, G, T), p_PGK.dtype).at[..., place_K].set(credit_PGK)
        is_whole_PG1 = (jnp.asarray(mask_PGT) > 0)[..., place_K[-1:]]
        return jnp.where(is_whole_PG1, credit_PGT, UNKNOWN)


def filler_shares(entropy: float) -> list[float]:
    """Return shares of the fillers, each a fixed part of the one before it, with this entropy.

    Args:
      entropy: nats, from 0 to log of their number.
    Returns: shares that add up to 1.
    """
    low, high = 0.0, 1.0  # ratio of neighbours: the entropy rises with it
    for _ in range(60):
        ratio = (low + high) / 2
        shares = [ratio**i for i in range(NUM_FILLERS)]
        shares = [each / sum(shares) for each in shares]
        if -sum(each * math.log(each) for each in shares if each) < entropy:
            low = ratio
        else:
            high = ratio
    return shares
