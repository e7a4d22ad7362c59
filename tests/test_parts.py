"""The parts of a reward that look at form, choices and repetition, and `score`, which asks one part about one completion."""

from __future__ import annotations

import doctest
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_jax.config import RewardConfig, reward_expression
from grpo_jax.errors import UserError
from grpo_jax.rewards import score
from grpo_jax.rewards.parts import settings_of
from grpo_jax.rewards.scorers import FUNCTIONS

# --- score


def test_every_part_but_length_can_be_asked_about_one_completion() -> None:
    assert set(reward_expression.NAMES) == {*FUNCTIONS, "length"} == {*settings_of(RewardConfig()), "length"}
    assert score("exact", "It is $1,024.00.", {"answer": "1024"}) == 1
    assert score("regex", "so 5", {"answer": "5"}, pattern=r"so (\d)") == 1
    with pytest.raises(UserError, match=r"no part 'length' to score a text by.*counted in tokens"):
        score("length", "", {})
    with pytest.raises(UserError, match=r"no part 'exakt' to score a text by; there are math_verify, .*module:function"):
        score("exakt", "", {})
    with pytest.raises(TypeError, match="patern"):
        score("format", "", {}, patern="x")


def test_the_examples_of_the_page_run() -> None:
    results = doctest.testfile("../docs/rewards.md")
    assert results.attempted > 3 and not results.failed


def test_functions_of_users_are_asked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "parts_under_test.py").write_text(
        "def one(completion, item, *, factor=1):\n    return factor * len(completion) + item['plus']\n"
        "def group(completions, item):\n    return [len(text) for text in completions]\n"
        "def abstains(completion, item):\n    return None\n"
        "def fails(completion, item):\n    raise RuntimeError('no')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert score("parts_under_test:one", "abc", {"plus": 1}, factor=2) == 7
        assert score("parts_under_test:group", "abc", {}) == 3
        assert score("parts_under_test:abstains", "abc", {}) is None
        with pytest.raises(RuntimeError, match="no"):
            score("parts_under_test:fails", "abc", {})
    finally:
        sys.modules.pop("parts_under_test", None)


def test_asking_changes_nothing() -> None:
    item = {"answer": ["1", "2"], "prompt_opens": "<think>"}
    before = repr(item)
    assert score("math_verify", "3</think>2", item) == 1
    assert score("math_verify", "2", item) == 0
    assert score("exact", "2", item, reasoning_tags=()) == 1
    assert repr(item) == before


# --- format


BLOCK = "<think>\na\n</think>\n<answer>b</answer>\n"


@pytest.mark.parametrize(
    "completion, right",
    [
        (BLOCK, 1),
        ("<think></think><answer></answer>", 1),
        ("x" + BLOCK, 0),
        (BLOCK + "x", 0),
        ("", 0),
        ("<answer>b</answer><think>a</think>", 0),
        (BLOCK + BLOCK, 0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a<think>b</think></think><answer>c</answer>", 0),
        ("<think><answer>a</answer></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b<think>c</think></answer>", 0),
        ("<think>a</think><answer>b</answer></answer>", 0),
        ("<think>a<answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
    ],
)
def test_format_wants_one_block_of_each(completion: str, right: float) -> None:
    assert score("format", completion, {}) == right


def test_format_counts_what_the_prompt_opened() -> None:
    item = {"prompt_opens": "<think>\n"}
    assert score("format", "a</think><answer>b</answer>", item) == 1
    assert score("format", "<think>a</think><answer>b</answer>", item) == 0
    assert score("format", "a</think><answer>b</answer>", {}) == 0


def test_format_of_other_patterns() -> None:
    steps = r"(?:<step>.*?</step>)+"
    assert score("format", "<step>a</step><step>b</step>", {}, pattern=steps) == 1
    assert score("format", "<step>a</step><step>b</step>", {}, pattern=steps, once=("<step>",)) == 0
    assert score("format", "[T]a[/T]b[/T]", {}, pattern=r"\[T\].*\[/T\]", once=("[/T]",)) == 0
    assert score("format", "[T]a[/T]", {}, pattern=r"\[T\].*\[/T\]", once=("[/T]", "<answer>")) == 1


# --- regex


def test_regex_looks_for_an_answer_behind_the_reasoning_and_for_a_form_anywhere() -> None:
    item = {"answer": "1,234"}
    last = r"Answer: (\S+)"
    given = ("Answer: 1234", "Answer: 5\nAnswer: 1,234.", "Answer: 1,234\nAnswer: 5", "1234", "<think>Answer: 1234")
    assert [score("regex", text, item, pattern=last) for text in given] == [1, 1, 0, 0, 0]
    assert score("regex", "<think>Answer: 1234</think> 7", item, pattern=last) == 0
    texts = ("and therefore", "<think>therefore", "so")
    assert [score("regex", text, item, pattern="[Tt]herefore") for text in texts] == [1, 1, 0]
    assert score("regex", "", {"answer": ""}, pattern="(x?)") == 1


# --- choice

ROWS: list[dict[str, Any]] = [
    {"answer": "B", "choices": ["Paris", "London", "Rome", "Berlin"]},
    {"answer": "London", "choices": ["Paris", "London", "Rome", "Berlin"]},
    {"answer": "b", "choices": {"A": "Paris", "B": "London", "C": "Rome", "D": "Berlin"}},
    {"answer": "B", "choices": {"label": ["A", "B", "C"], "text": ["Paris", "London", "Rome"]}},
    {"answer": "B", "prompt": "Where?\nA) Paris\nB) London\nC) Rome\nAnswer with a letter."},
    {"answer": "B", "prompt": "Q: 1 + 1?\n(A) 1\n(B) 2\nA: B\n\nQ: Where?\n(A) Paris\n(B) London\n(C) Rome"},
    {"answer": "London", "prompt": "Where? (A) Paris (B) London (C) Rome"},
    {
        "answer": "B",
        "prompt": [{"role": "user", "content": "- A. Paris\n- B. London\n- C. Rome"}],
    },
    {"answer": ["B", "D"], "choices": ["Paris", "London", "Rome", "Berlin"]},
]
CHOSEN = """B|(B)|B.|b|B) London|B: London|B - London|London|london.|**B**|**B) London**|`B`|Option B|option (B)
#### B|It must be B.|The answer is B.|The answer is (B).|The answer is (B) London.|The answer is London
Answer: B|Answer: **B**|**Answer:** B|answer: (b)|The correct answer is B: London|The correct option is B
I choose option B because London is large.|B because A is wrong|So, (B).|\\boxed{B}|\\boxed{\\text{B}}
\\boxed{\\textbf{(B)}\\ London}|$\\boxed{(B)}$|<answer>B</answer>|<answer>London</answer>
<answer>\\boxed{B}</answer>|<think>A</think>B|<think>A or C</think> The answer is B.
A dog. The answer is B|(A) is wrong, (C) is wrong, so the answer is (B)|答案是B|答案：B"""  # noqa: RUF001
NOT_CHOSEN = """A|C|A) London|B) Paris|Paris|The answer is A.|\\boxed{A}|<answer>Rome</answer>||I don't know|E
<answer>E</answer>|ABC|ABCD|B or C|A, B|B and A|B/C|<answer>B or C</answer>|<answer>A, B</answer>
\\boxed{A, B}|The answer is B or C.|The answer is both A and B|<think>B|<think>The answer is B.
<think>B</think>|<think>B</think>A|The answer is B. No, the answer is A.|\\boxed{}|not B
<answer></answer>"""


@pytest.mark.parametrize("row", ROWS)
def test_a_choice_is_made_by_label_or_by_text(row: dict[str, Any]) -> None:
    chosen, others = (text.replace("\n", "|").split("|") for text in (CHOSEN, NOT_CHOSEN))
    assert [text for text in chosen if score("choice", text, row) != 1] == []
    assert [text for text in others if score("choice", text, row) != 0] == []


def test_options_that_are_numbers() -> None:
    row = {"choices": ["12", "42", "7", "1/2", "1,200"], "answer": "B"}
    right = ("42", "The answer is 42.", "B", "so it is 42.0", "\\boxed{42}", "6 * 7 = 42")
    assert [text for text in right if score("choice", text, row) != 1] == []
    assert [text for text in ("12", "0.5", "D", "42 or 7", "B) 12") if score("choice", text, row)] == []
    assert score("choice", "It is 0.5.", {**row, "answer": "1/2"}) == score("choice", "1200", {**row, "answer": "E"}) == 1


def test_answers_that_are_an_index_or_labels_that_are_numbers() -> None:
    row = {"choices": ["a", "b", "c"], "answer": "2"}
    assert [score("choice", text, row, answer="index") for text in ("C", "c", "B", "2")] == [1, 1, 0, 0]
    row = {"options": {"label": ["1", "2"], "text": ["x", "y"]}, "answer": "2"}
    assert [score("choice", text, row, options="options") for text in ("2", "y", "1", "The answer is 2.")] == [1, 1, 0, 1]
    assert score("choice", "Q", {"question": "A) P\nB) Q", "answer": "B"}, prompt="question") == 1


def test_a_row_without_options_knows_letters_alone() -> None:
    assert [score("choice", text, {"answer": "C"}) for text in ("C", "\\boxed{C}", "The answer is (C).", "D", "")] == [
        1,
        1,
        1,
        0,
        0,
    ]


@pytest.mark.parametrize("answer, form", [("E", "label"), ("Madrid", "label"), ("3", "index"), ("B", "index"), ("", "label")])
def test_an_answer_that_is_no_option_is_an_error(answer: str, form: str) -> None:
    with pytest.raises(ValueError, match=r"is none of the options A, B, C \(config.reward.choice\)"):
        score("choice", "B", {"choices": ["Paris", "London", "Rome"], "answer": answer}, answer=form)


# --- repetition


@pytest.mark.parametrize(
    "text, ngram_size, expected",
    [
        ("", 3, 0),
        ("a b", 3, 0),
        ("a b c d e", 3, 0),
        ("a b c a b c", 3, 3 / 4 - 1),  # abc bca cab abc
        ("a a a a a a", 3, 1 / 4 - 1),
        ("a b a b", 1, 2 / 4 - 1),
        ("The the THE", 1, 1 / 3 - 1),
        ("no no, no", 1, 2 / 4 - 1),  # the comma is a word
        ("我是我是我", 2, 2 / 4 - 1),  # 我是 是我 我是 是我
        ("ab" * 100, 2, 0),  # one word
    ],
)
def test_repetition_is_the_share_of_ngrams_that_stood_before(text: str, ngram_size: int, expected: float) -> None:
    assert score("repetition", text, {}, ngram_size=ngram_size) == pytest.approx(expected)


def test_repetition_grows_with_a_loop_and_stays_above_minus_one() -> None:
    scores = [score("repetition", "I think so. " * times, {}) or 0.0 for times in (1, 2, 5, 50, 5000)]
    assert scores == sorted(scores, reverse=True) and scores[0] == 0 and -1 < scores[-1] < -0.999
    assert score("repetition", "a a a", {"prompt_opens": "<think>"}, ngram_size=1) == pytest.approx(4 / 6 - 1)
