"""A penalty for text that repeats itself."""

from __future__ import annotations

import re
from typing import Any

from grpo_jax.rewards.scorers.answers import whole_text

# Words, and single characters of the scripts that put no space between words.
_WORDS = re.compile(r"[぀-ヿ㐀-䶿一-鿿豈-﫿]|[^\W぀-ヿ㐀-䶿一-鿿豈-﫿]+|[^\w\s]")


def repetition_score(completion: str, item: dict[str, Any], *, ngram_size: int = 3) -> float:
    """Return minus the share of n-grams that stood before in the completion: 0 if none is repeated, towards -1 for a loop.

    The n-gram penalty of "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv 2502.03373), as the share of a text.

    Args:
      completion: the text, reasoning included. item: its row.
      ngram_size: n, in words; a Chinese or Japanese character is one.
    Returns: distinct n-grams / n-grams - 1, in (-1, 0]; 0 for a text of fewer words.
    """
    words = _WORDS.findall(whole_text(completion, item).casefold())
    num = len(words) - ngram_size + 1
    if num <= 0:
        return 0.0
    distinct = set(zip(*(words[i : i + num] for i in range(ngram_size)), strict=True))
    return len(distinct) / num - 1.0
