"""Where the answer of a completion stands, its plain form, and the numbers it holds."""

# ruff: noqa: RUF001 (signs of other scripts that look like ASCII are what this is about)

from __future__ import annotations

import doctest
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest

from grpo_jax.config import reward_expression
from grpo_jax.rewards.scorers import answers, formulas, normal_form, quantities
from grpo_jax.rewards.scorers.answers import final_answer, judged_text, marked_answer
from grpo_jax.rewards.scorers.formulas import is_formula, split_unit
from grpo_jax.rewards.scorers.math_answer import is_equal
from grpo_jax.rewards.scorers.normal_form import as_words, normalise_answer, text_of_number
from grpo_jax.rewards.scorers.quantities import read_quantity


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<answer> 42 </answer> and 7", "42"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("<answer>it is \\boxed{5}</answer> \\boxed{6}", "5"),
        ("<answer>1", "1"),
        ("</answer> 3 <answer>", "3"),
        ("\\boxed{1} then \\boxed{\\frac{1}{2}} of 3", "\\frac{1}{2}"),
        ("\\boxed{4} then \\boxed{\\frac{1}{2} of 3", "4"),
        ("\\boxed{\\boxed{7}}", "7"),
        ("\\boxed {a \\} b}", "a \\} b"),
        ("first #### 3, no\n#### $1,234 \nmore 5", "1234"),
        # a mark with nothing behind it
        ("#### ", ""),
        ("42 ####", ""),
        ("42 \\boxed{}", ""),
        ("42 <answer></answer>", ""),
        # a heading of Markdown marks nothing, a value does
        ("#### Step 1\nAdd 3.\n#### Step 2\nSo 7.", "7"),
        ("#### 42\n\n#### Check\nIt is 7.", "42"),
        ("#### x^2 + 1\nas 3 shows", "x^2 + 1"),
        ("1\n#### Paris", "Paris"),
        ("##### 5\n7", "7"),
        # what is announced
        ("The answer is 18. Check: 9 * 2 and 3", "18"),
        ("The answer is Paris.", "Paris"),
        ("The answer is 5 more than 13, so 18.", "18"),
        ("The answer is as follows:\n18", "18"),
        ("Answer: yes\nBecause 3 > 2", "yes"),
        ("The answer is (B).", "(B)"),
        ("The answer is (-1, 2).", "(-1, 2)"),
        ("The answer is 1, 2, 3.", "1, 2, 3"),
        ("答案是42。因为6乘7", "42"),
        # the last number, with all that belongs to it
        ("6 * 7 = 42.", "42"),
        ("from 5-3 to -1,234.50!", "-1234.5"),
        ("x − 2 = −4", "-4"),
        ("= – 4", "-4"),
        ("half: 1/2", "1/2"),
        ("2 2/3 cups", "2 2/3"),
        ("in 3 1,000 more", "1000"),
        ("It is eighteen (18).", "18"),
        ("(see 18)", "18"),
        ("at 12:30 pm.", "12:30 pm"),
        ("on 2024-05-01.", "2024-05-01"),
        ("a score of 3:2", "3:2"),
        ("call 555-0100", "555-0100"),
        ("50%", "50%"),
        ("about 50 percent of them", "50%"),
        ("3 million people", "3 million"),
        ("共42个苹果。", "42"),
        ("the point (1, 2).", "(1, 2)"),
        ("\\(1,234\\)", "1234"),
        ("over $(-\\infty, 3)$", "(-\\infty, 3)"),
        ("so it's x^2 + 1.", "x^2 + 1"),
        ("a \\frac{1}{2} chance", "\\frac{1}{2}"),
        ("Thus $x = \\frac{2}{4}$.", "\\frac{2}{4}"),
        ("that makes $2 \\cdot 5 = 10$", "10"),
        ("x \\ge 3", "x \\ge 3"),
        ("2√3", "2\\sqrt 3"),
        ("5x", "5x"),
        ("5 km", "5"),
        ("5m", "5"),
        ("1'234'567 or so", "1234567"),
        ("1 234 567", "1234567"),
        ("12,34,567 rupees", "1234567"),
        ("1.5e6", "1500000"),
        ("٤٢", "42"),
        ("COVID-19", "19"),
        ("Total - 42", "42"),
        ("- 18", "18"),
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.", "18"),
        ("-5°C", "-5"),
        ("0x1F", "0x1F"),
        ("(3+4)*2", "(3+4)*2"),
        ("8 = 10 - 2", "10 - 2"),
        ("5-7=-2", "-2"),
        ("$1.5 million", "1.5 million"),
        ("1/3 ≈ 0.333", "0.333"),
        ("3 - 5 = -2.", "-2"),
        ("in 1999, 42 people", "42"),
        ("I have 3,4,5", "3,4,5"),
        ("The answer is 42.\n\nQ: what is 3+3?\nA: 6", "42"),
        ("42</s>", "42"),
        ("2 + 3i", "2 + 3i"),
        ("H2O and CO2", "H2O and CO2"),
        ("Vitamin B12 is 42 mg", "42"),
        # of a list all, so that a guess at each is no answer
        ("1/2 or .75", "1/2 or .75"),
        ("12,34 and 1,2345", "12,34 and 1,2345"),
        ("It is $41$ or $42$.", "41 or 42"),
        ("3, 4 or 5", "4 or 5"),
        # no number
        ("  New   York. ", "New York"),
        ("", ""),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    assert final_answer(text) == answer


def test_doctests() -> None:
    for module in (answers, formulas, normal_form, quantities, reward_expression):
        results = doctest.testmod(module)
        assert results.attempted and not results.failed


UNITS = [
    "\\boxed{",
    "{",
    "}",
    "1,000",
    "1,",
    "<answer>",
    "a1",
    "1/",
    ".",
    "####",
    "\0",
    "-",
    "$",
    "#### \n",
    "#### 1\n",
    "(",
    "(1,",
]
UNITS += [
    "answer is ",
    "answer:1",
    "1 ",
    "1 111",
    "`",
    "*",
    "**a",
    "\\text{",
    "é",
    "1 or ",
    "\\frac",
    "1e5",
    "\\,1",
    "1-",
    "<think>",
    "</think>",
]


@pytest.mark.parametrize("unit", UNITS)
def test_the_answer_of_a_long_text_is_found(unit: str) -> None:
    """Quadratic time would take hours."""
    text = unit * (2**16 // len(unit))
    assert isinstance(final_answer(text), str)
    assert isinstance(normalise_answer(text), str)
    nested = unit * 2**13 + "}" * 2**13
    assert isinstance(is_equal("1", nested), bool)
    assert isinstance(is_equal("1", text), bool) and isinstance(is_equal(text[: 2**14], text), bool)


# --- reasoning


@pytest.mark.parametrize(
    "completion, judged",
    [
        ("7", "7"),
        ("<think>1</think>7", "7"),
        ("1</think>7", "7"),
        ("<think>1</think>2</think>7", "7"),
        ("<think><think>1</think>7", "7"),
        ("<think>1", None),
        ("7<think>1", None),
        ("<think>1</think>7<think>8", None),
        ("<think>1</think>", ""),
        ("", ""),
    ],
)
def test_what_is_judged_stands_behind_the_reasoning(completion: str, judged: str | None) -> None:
    assert judged_text(completion, {}) == judged
    assert judged_text(completion, {}, ()) == completion
    other = completion.replace("<think>", "[THINK]").replace("</think>", "[/THINK]")
    assert judged_text(other, {}, ("[THINK]", "[/THINK]")) == judged
    assert final_answer(completion) == (judged or "")


def test_what_the_prompt_opened_begins_the_completion() -> None:
    item = {"prompt_opens": "<think>\n"}
    assert judged_text("it is 42", item) is None
    assert judged_text("hm</think>it is 42", item) == "it is 42"
    assert judged_text("it is 42", {"prompt_opens": ""}) == judged_text("it is 42", {"prompt_opens": None}) == "it is 42"


def test_the_datas_solutions_keep_their_headings() -> None:
    assert marked_answer("# A\n\n#### Overview\nIt adds 2 numbers.\n\n#### Install\npip install it\n") is None
    assert marked_answer("Natalia sold 48/2 = <<48/2=24>>24.\n#### 24") == "24"


# --- plain forms


@pytest.mark.parametrize(
    "written, plain",
    [
        ("$1,024.50", "1024.5"),
        ("\\$ 1{,}024", "1024"),
        ("**42**.", "42"),
        ("`42`", "42"),
        ("***42***", "42"),
        ("_42_", "42"),
        ("x**2 + y**2", "x**2 + y**2"),
        ("a_1 + a_2", "a_1 + a_2"),
        ("42.0", "42"),
        ("-0.0", "0"),
        ("+5", "5"),
        (".50", "0.5"),
        ("007", "007"),
        ("1.5e3", "1500"),
        ("2 \\times 10^{-3}", "0.002"),
        ("1\\,234\\,567", "1234567"),
        ("1\u202f234,5", "1234.5"),
        ("1.234.567", "1234567"),
        ("1.234", "1.234"),
        ("1,234", "1234"),
        ("(1,234)", "(1,234)"),
        ("\\{1,234\\}", "\\{1,234\\}"),
        ("[1,234]", "[1,234]"),
        ("\\frac{1,000}{3}", "\\frac{1000}{3}"),
        ("1,2,3", "1,2,3"),
        ("１２，３４５", "12345"),
        ("−５", "-5"),
        ("\\left( 1, 2 \\right)", "( 1, 2 )"),
        ("a \\leftarrow b", "a \\leftarrow b"),
        ("1 & 2 \\\\ 3 & 4", "1 & 2 \\\\ 3 & 4"),
        ("and so on...", "and so on..."),
        ("10^{16}", "10^{16}"),
        ("1e99999", "1e99999"),
    ],
)
def test_answers_in_their_plain_form(written: str, plain: str) -> None:
    assert normalise_answer(written) == plain
    assert normalise_answer(plain) == plain, "once is enough"


def test_words_are_compared_without_dress() -> None:
    same = [
        "New York",
        " new  york.",
        "\\text{New York}",
        "\\textbf{ New York }",
        '"New York"',
        "**New York**",
        "(New York)",
        "New York!",
    ]
    assert {as_words(text) for text in same} == {"new york"}
    assert len({as_words(text) for text in ("5!", "5", "n!", "n", "x_1", "x1", "(1, 2)", "1, 2", "12")}) == 9


@pytest.mark.parametrize(
    "value, text",
    [
        (1e16, "10000000000000000"),
        (6.02e23, "602000000000000000000000"),
        (0.00001, "0.00001"),
        (-1e-7, "-0.0000001"),
        (42.0, "42"),
        (-0.0, "0"),
        (0.30000000000000004, "0.30000000000000004"),
        (2**70, "1180591620717411303424"),
        (Decimal("42.10"), "42.1"),
        (Decimal("1E+3"), "1000"),
        (Fraction(1, 3), "1/3"),
        (Fraction(6, 3), "2"),
        (np.int64(3), "3"),
        (np.float64(0.1), "0.1"),
        (np.float32(0.1), "0.1"),
        (np.uint8(7), "7"),
    ],
)
def test_numbers_of_the_data_become_plain_text(value: object, text: str) -> None:
    assert text_of_number(value) == text


@pytest.mark.parametrize("value", [True, np.True_, "1", None, 1j, [1]])
def test_what_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="is no number"):
        text_of_number(value)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -float("inf"), Decimal("NaN"), np.float32("inf"), Decimal("1e999999")]
)
def test_numbers_without_digits_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"is no finite number|has thousands of digits"):
        text_of_number(value)


def test_plain_numbers_read_back_as_themselves() -> None:
    rng = np.random.default_rng(0)
    for value in (rng.standard_normal(300) * 10.0 ** rng.integers(-30, 30, 300)).tolist():
        text = text_of_number(value)
        assert float(text) == value and "e" not in text
        quantity = read_quantity(text)
        assert quantity is not None and quantity.value == Fraction(repr(value))


# --- quantities and formulas


@pytest.mark.parametrize(
    "text, value, unit",
    [
        ("2 1/2", "5/2", ""),
        ("2\\frac{1}{2}", "5/2", ""),
        ("-2½", "-5/2", ""),
        ("\\frac{-3}{4}", "-3/4", ""),
        ("-\\dfrac34", "-3/4", ""),
        ("1.5/3", "1/2", ""),
        ("0.1\\overline{6}", "1/6", ""),
        ("0.(3)", "1/3", ""),
        ("-\\$5.25", "-21/4", ""),
        ("\\$-5", "-5", ""),
        ("1.5 million", "1500000", ""),
        ("3万", "30000", ""),
        ("about 7", "7", ""),
        ("18 apples", "18", "apple"),
        ("18个", "18", "个"),
        ("5 meters", "5", "m"),
        ("5\\text{ m}", "5", "m"),
        ("5 cm^2", "5", "cm2"),
        ("25\\text{ cm}^2", "25", "cm2"),
        ("60 km/h", "60", "km h"),
        ("90^\\circ", "90", "°"),
        ("90 degrees", "90", "°"),
        ("3 hours", "3", "h"),
    ],
)
def test_quantities(text: str, value: str, unit: str) -> None:
    quantity = read_quantity(text)
    assert quantity is not None and (quantity.value, quantity.unit) == (Fraction(value), unit)


NO_QUANTITIES = [
    "",
    "x",
    "2x",
    "5m",
    "2ab",
    "2 pi",
    "5!",
    "5^2",
    "5 squared",
    "1/0",
    "12:30",
    "1/2/3",
    "40 41",
    "10-5",
    "3 to 4",
    "1,5",
]
NO_QUANTITIES += [
    "(1, 2)",
    "(1,200)",
    "5 May",
    "3 am",
    "42, not 41",
    "2 or 3",
    "1_2",
    "192.168.0.1",
    "x5",
    "7 times 3",
    "9" * 2000,
    "1e99999",
]


@pytest.mark.parametrize("text", NO_QUANTITIES)
def test_no_quantities(text: str) -> None:
    assert read_quantity(text) is None


def test_mathematics_is_told_from_words() -> None:
    formulas = "x|xy|x+y|2x|x^2+1|\\sqrt{2}|\\pi|(1, 2)|[0, 1)|\\frac{1}{2}|2ab|sin(x)|n!|x > 3|a_1|f(x)|3+4i|"
    formulas += "x=1 \\text{ or } x=2|1, 2"
    words = "no|CO|ab|XIV|GATTACA|not spam|a b c|Apollo 11|12:30|3:4|2024-05-01|1/2/2024|10-15|3-2|555-0100|1.2.3|"
    words += "H2O|B12|e4|0x1F|007|40 41"
    assert [text for text in formulas.split("|") if not is_formula(text)] == []
    assert [text for text in words.split("|") if is_formula(text)] == []


def test_units_behind_formulas() -> None:
    assert split_unit("\\frac{\\sqrt{3}}{2}\\text{ cm}") == ("\\frac{\\sqrt{3}}{2}", "cm")
    assert split_unit("25\\pi \\text{ cm}^2")[0] == "25\\pi"
    assert split_unit("x \\text{ if odd}") == ("x \\text{ if odd}", "")
