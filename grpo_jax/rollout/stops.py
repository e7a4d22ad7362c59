"""Stop strings on the device: an automaton over the text of tokens, made once from a tokenizer's vocabulary.

A state is the longest end of the text so far that a stop string could begin with. Each token moves it through all of its
bytes at once, so a string is found in whichever tokens it lies: in several, in the middle of one, over itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Num


@dataclasses.dataclass(frozen=True, eq=False)
class StopStrings:
    """The automaton of some strings over one vocabulary. State 0 is the beginning, the last one is the end.

    table: [states, classes of tokens], the state after a token. Tokens that move every state alike share a column, so it is
    small. class_V: the class of each token; class 0 moves nothing.
    """

    table: Num[np.ndarray, "states classes"]
    class_V: Num[np.ndarray, " V"]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, StopStrings) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    # By content, not by identity: compiled programs are kept by the ends they were made with, and the runs of a sweep each make
    # their own.
    @functools.cached_property
    def _content(self) -> tuple[tuple[int, ...], bytes, bytes]:
        return self.table.shape, self.table.tobytes(), self.class_V.tobytes()

    @property
    def end(self) -> int:
        """The state of a text that contains a stop string; nothing leaves it."""
        return len(self.table) - 1

    def advance(self, state_B: Int[jax.Array, " B"], token_B: Int[jax.Array, " B"]) -> Int[jax.Array, " B"]:
        """Compute the states after one more token in each row. Ids beyond the tokenizer's have no text."""
        class_B = jnp.asarray(self.class_V).at[token_B].get(mode="fill", fill_value=0)
        return jnp.asarray(self.table)[state_B, class_B.astype(jnp.int32)].astype(jnp.int32)


def stop_strings(strings: Sequence[str], token_texts: Sequence[bytes]) -> StopStrings:
    """Make the automaton that ends with the first occurrence of any of `strings`.

    Args:
      strings: none of them empty. token_texts: the bytes that each token id adds to a text.
    Returns: the automaton.
    """
    step = _byte_table([string.encode() for string in strings])
    num_states = len(step)
    # Longest first: those that have a byte number `place` are then the first of them.
    order = sorted(range(len(token_texts)), key=lambda i: -len(token_texts[i]))
    lengths = np.array([len(token_texts[i]) for i in order])
    joined = np.frombuffer(b"".join(token_texts[i] for i in order), np.uint8)
    starts = np.cumsum(lengths) - lengths
    moves = np.repeat(np.arange(num_states, dtype=step.dtype)[:, None], len(order), axis=1)
    for place in range(int(lengths.max(initial=0))):
        num = int((lengths > place).sum())
        moves[:, :num] = step[moves[:, :num], joined[starts[:num] + place]]
    nothing = np.arange(num_states, dtype=step.dtype)[:, None]
    columns, classes = np.unique(np.concatenate([nothing, moves], axis=1), axis=1, return_inverse=True)
    # Class 0 is to be the one that moves nothing: it stands in for ids that no token has.
    swap = np.arange(columns.shape[1])
    swap[[0, classes[0]]] = swap[[classes[0], 0]]
    class_V = np.empty(len(order), np.min_scalar_type(columns.shape[1]))
    class_V[order] = swap[classes[1:]]
    return StopStrings(np.ascontiguousarray(columns[:, swap]), class_V)


def cut_at_stop(text: str, strings: Sequence[str]) -> str:
    """Return the text before the stop string that ends first; of those that end together, before the longest."""
    found = [(start + len(string), start) for string in strings if (start := text.find(string)) >= 0]
    if not found:
        return text
    return text[: min(found)[1]]


def _byte_table(strings: Sequence[bytes]) -> Num[np.ndarray, "states 256"]:
    """Make the automaton of Aho and Corasick: the state after each state and byte."""
    beginnings = sorted({string[:num] for string in strings for num in range(len(string))}, key=lambda x: (len(x), x))
    number = {text: i for i, text in enumerate(beginnings)}
    end = len(beginnings)
    table = np.full((end + 1, 256), end, np.min_scalar_type(end))
    for text, i in number.items():
        for byte in range(256):
            seen = text + bytes([byte])
            if not any(seen.endswith(string) for string in strings):
                table[i, byte] = next(number[seen[k:]] for k in range(len(seen) + 1) if seen[k:] in number)
    return table
