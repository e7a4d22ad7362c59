"""Answers that are right, and answers that are not: what `math_verify` and `exact` say to each."""

# ruff: noqa: RUF001 (signs of other scripts that look like ASCII are what this is about)

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest

from grpo_jax.config import ColumnsConfig
from grpo_jax.rewards import score
from grpo_jax.rewards.scorers.answers import final_answer
from grpo_jax.rewards.scorers.math_answer import is_equal
from grpo_jax.tasks.questions import question_of

# (the data's answer, a completion, what math_verify says)
ROWS = [
    # where the answer may stand
    ("42", "Six times seven, so the answer is \\boxed{42}.", 1),
    ("42", "6 * 7 = 42", 1),
    ("42", "It is $42$, not 43... no: \\boxed{43}", 0),
    ("42", "so\n#### 42", 1),
    ("42", "", 0),
    ("42", "no idea", 0),
    ("1,234", "The total is 1234 dollars", 1),
    ("\\frac{1}{2}", "\\boxed{0.5}", 1),
    ("\\frac{1}{2}", "$\\frac{2}{4}$", 1),
    ("$\\frac{1}{2}$", "\\boxed{\\frac{1}{3}}", 0),
    ("x^2 + 1", "\\boxed{1 + x^2}", 1),
    ("(1, 2)", "\\boxed{(1,2)}", 1),
    ("(1, 2)", "\\boxed{(2,1)}", 0),
    ("\\boxed{7}", "\\boxed{7}", 1),
    ("Paris", " Paris\n", 1),
    ("Paris", "London", 0),
    ("42", "<think>41?</think><answer>42</answer>", 1),
    ("42", "<answer>41</answer> 42", 0),
    ("42", "<answer>42 apples</answer> 7", 1),
    ("1/2", "<answer>\\frac{2}{4}</answer>", 1),
    ("x^2+1", "<answer>1 + x^2</answer>", 1),
    ("1", "<answer>x+1</answer>", 0),
    ("1/3", "\\boxed{0.333333}", 1),
    ("1000", "<answer>$1,000</answer>", 1),
    # words are no products of letters
    ("listen", r"\boxed{silent}", 0),
    ("ab", r"\boxed{ba}", 0),
    ("yes", "<answer>sey</answer>", 0),
    ("Paris", r"\boxed{\text{Paris}}", 1),
    ("Paris", "The answer is Paris.", 1),
    ("Paris", "**paris**", 1),
    ("No", "no.", 1),
    ("true", "<answer>True</answer>", 1),
    ("north", "<answer>thorn</answer>", 0),
    ("IV", r"\boxed{VI}", 0),
    ("A", r"\boxed{\text{(A)}}", 1),
    ("B", r"\boxed{\textbf{(B)}}", 1),
    ("C", r"\boxed{D}", 0),
    ("B", "The answer is (B).", 1),
    ("H2O", r"\boxed{OH2}", 0),
    ("CO2", r"\boxed{CO_2}", 0),
    ("Apollo 11", "<answer>Apollo 12</answer>", 0),
    ("Apollo 11", "<answer>11 Apollo</answer>", 0),
    ("Apollo 11", "The answer is Apollo 11.", 1),
    ("red, blue", "<answer>blue, red</answer>", 0),
    ("abc", r"\boxed{cba}", 0),
    ("xy", r"\boxed{yx}", 1),
    ("2ab", r"\boxed{2ba}", 1),
    ("B12", r"\boxed{12B}", 0),
    ("0x1F", r"\boxed{0xF1}", 0),
    ("007", r"\boxed{7}", 0),
    ("007", r"\boxed{007}", 1),
    ("7", r"\boxed{007}", 1),
    ("02134", r"\boxed{2134}", 0),
    ("don't", r"\boxed{tond'}", 0),
    ("e4", r"\boxed{4e}", 0),
    ("Nf3", r"\boxed{3fN}", 0),
    ("café", r"\boxed{facé}", 0),
    ("Zürich", "Zürich", 1),
    ("evil twin", r"\boxed{live twin}", 0),
    ("stressed", "<answer>desserts</answer>", 0),
    ("a b c", "<answer>c b a</answer>", 0),
    ("ACGT", r"\boxed{TGCA}", 0),
    ("(A, B)", r"\boxed{(B, A)}", 0),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", 1),
    (r"\text{Evelyn}", r"\boxed{Evelyn}", 1),
    (r"\text{odd}", r"\boxed{\text{even}}", 0),
    (r"3 \text{ if odd}", r"\boxed{3 \text{ if even}}", 0),
    # dates, times, ratios, telephone numbers and ranges are no arithmetic
    ("2024-05-01", r"\boxed{2018}", 0),
    ("2024-05-01", r"\boxed{2024-05-01}", 1),
    ("2024-05-01", "It is 2024-05-01.", 1),
    ("2018", r"\boxed{2024-05-01}", 0),
    ("12:30", r"\boxed{12:30}", 1),
    ("12:30", "It is 12:30.", 1),
    ("0.4", r"\boxed{12:30}", 0),
    ("3:4", r"\boxed{3:4}", 1),
    ("3:4", r"\boxed{3 : 4}", 1),
    ("3:4", r"\boxed{4:3}", 0),
    ("0.75", r"\boxed{3:4}", 0),
    ("3:4", r"\boxed{\frac{3}{4}}", 0),
    ("555-1234", r"\boxed{-679}", 0),
    ("-679", r"\boxed{555-1234}", 0),
    ("555-1234", r"\boxed{555-1234}", 1),
    ("10-15", r"\boxed{-5}", 0),
    ("-5", r"\boxed{10-15}", 0),
    ("3-2", r"\boxed{1}", 0),
    ("05/01/2024", r"\boxed{01/05/2024}", 0),
    ("05/01/2024", r"\boxed{05/01/2024}", 1),
    ("May 5, 2024", "The answer is May 5, 2024.", 1),
    ("May 5", r"\boxed{5 May}", 0),
    ("1.2.3", r"\boxed{1.2.3}", 1),
    ("192.168.0.1", r"\boxed{192.168.1.0}", 0),
    # numbers and how they are written
    ("42", "42.0", 1),
    ("42", r"\boxed{42.00}", 1),
    ("1500000", r"\boxed{1.5 \times 10^6}", 1),
    ("1500000", r"\boxed{1.5e6}", 1),
    ("1500000", "1.5 million", 1),
    ("1.5e6", r"\boxed{1500000}", 1),
    ("0.00001", r"\boxed{10^{-5}}", 1),
    ("0.00001", r"\boxed{1\times10^{-5}}", 1),
    ("0.00001", r"\boxed{0.00002}", 0),
    ("1e-7", r"\boxed{2e-7}", 0),
    ("602000000000000000000000", r"\boxed{6.02 \times 10^{23}}", 1),
    ("602000000000000000000000", r"\boxed{6.03 \times 10^{23}}", 0),
    ("10000000000000000", r"\boxed{10^{16}}", 1),
    ("10000000000000000", r"\boxed{10000000000000001}", 0),
    ("18", r"\boxed{18 \text{ dollars}}", 1),
    ("18", r"\boxed{\$18.00}", 1),
    ("18", "It costs $18.", 1),
    ("18", "It costs 18$.", 1),
    ("18", "€18", 1),
    ("18.5", r"\$18.50", 1),
    ("18.5", r"It costs \$18.50 in all.", 1),
    ("18", r"\boxed{18\text{ cm}}", 1),
    ("5 cm", r"\boxed{5 m}", 0),
    ("5 cm", r"\boxed{5 cm}", 1),
    ("5 cm", r"\boxed{5}", 1),
    ("5 meters", r"\boxed{5\text{ m}}", 1),
    ("5", r"\boxed{5\%}", 1),
    ("50%", r"\boxed{50\%}", 1),
    ("50%", r"\boxed{50}", 1),
    ("50%", r"\boxed{\frac{1}{2}}", 1),
    ("0.5", r"\boxed{50\%}", 1),
    ("12.5%", r"\boxed{0.125}", 1),
    ("50", "The answer is 50 percent.", 1),
    ("-5", r"\boxed{-5}", 1),
    ("-5", r"\boxed{5}", 0),
    ("-5", "The answer is -5.", 1),
    ("-5", "It is −5.", 1),
    ("-5", "x = -5", 1),
    ("-5", r"\boxed{x=-5}", 1),
    ("1/2", r"\boxed{0.5}", 1),
    ("1/2", r"\boxed{\dfrac12}", 1),
    ("1/2", r"\boxed{\frac{2}{4}}", 1),
    ("-1/2", r"\boxed{-\frac{1}{2}}", 1),
    ("1/3", r"\boxed{0.333333}", 1),
    ("1/3", r"\boxed{0.33}", 0),
    ("2.5", r"\boxed{2\frac{1}{2}}", 1),
    ("2.5", r"\boxed{2 1/2}", 1),
    ("2.5", "2½", 1),
    ("8/3", "The answer is 2 2/3", 1),
    ("1234567", r"\boxed{1{,}234{,}567}", 1),
    ("1234567", r"\boxed{1,234,567}", 1),
    ("1234567", "1.234.567", 1),
    ("1234567", "1 234 567", 1),
    ("1234567", "1'234'567", 1),
    ("1234567", "12,34,567", 1),
    ("1234.56", "1.234,56", 1),
    ("3.5", "Die Antwort ist 3,5.", 1),
    ("5", "Die Antwort ist 3,5.", 0),
    ("567", "12,34,567", 0),
    ("42", "４２", 1),
    ("42", "٤٢", 1),
    ("42", "答案是４２。", 1),
    ("42", "答案：42", 1),
    ("3", r"\boxed{3个}", 1),
    ("3", "一共有3个苹果", 1),
    ("3", r"\boxed{3万}", 0),
    ("30000", r"\boxed{3万}", 1),
    ("42", "<answer>42 apples</answer>", 1),
    ("42", "<answer>The answer is 42</answer>", 1),
    ("42", "<answer>20 + 22 = 42</answer>", 1),
    ("42", "<answer>She has 42 apples.</answer>", 1),
    ("90", r"\boxed{90^\circ}", 1),
    (r"90^\circ", r"\boxed{90}", 1),
    (r"\sqrt{2}", r"\boxed{\sqrt2}", 1),
    (r"\sqrt{2}", r"\boxed{1.414214}", 1),
    (r"\sqrt{2}", r"\boxed{2^{1/2}}", 1),
    (r"\sqrt{2}", "√2", 1),
    ("sqrt(2)", r"\boxed{\sqrt{2}}", 1),
    (r"\pi", r"\boxed{π}", 1),
    (r"2\pi", r"\boxed{2π}", 1),
    ("2*pi", r"\boxed{2\pi}", 1),
    ("4", r"\boxed{\sqrt{16}}", 1),
    ("1024", r"\boxed{2^{10}}", 1),
    ("x^2+1", r"\boxed{x**2 + 1}", 1),
    ("x^2+1", "x²+1", 1),
    (r"\frac{1}{2^{99}}", r"\boxed{2^{-99}}", 1),
    ("2^{99}", r"\boxed{2^{99}}", 1),
    ("2^{99}", r"\boxed{2^{98}}", 0),
    # lists of candidates, and of answers
    ("42", "<answer>40 41 42</answer>", 0),
    ("42", "<answer>40, 41, 42</answer>", 0),
    ("42", "<answer>42 or 43</answer>", 0),
    ("42", r"\boxed{41, 42}", 0),
    ("42", r"\boxed{41 \text{ or } 42}", 0),
    ("42", "It is 41 or 42.", 0),
    ("42", "It is $41$ or $42$.", 0),
    ("42", "<answer>41/42</answer>", 0),
    ("42", r"\boxed{41; 42}", 0),
    ("42", r"\boxed{\{41, 42\}}", 0),
    ("x", r"\boxed{x, y}", 0),
    ("1/2", "<answer>1/2 1/3</answer>", 0),
    ("42", "<answer>42 apples or 43 pears</answer>", 0),
    ("42", "<answer>42, not 41</answer>", 0),
    ("B", r"\boxed{(B) 12}", 1),
    ("B", r"\boxed{\textbf{(B)}\ 12}", 1),
    ("B", "The answer is (B) 12.", 1),
    (r"\text{(A) and (B)}", r"\boxed{A}", 0),
    (r"\infty", r"\boxed{-3 \le x \le 4}", 0),
    (r"x < 3", r"\boxed{(-\infty, 3)}", 1),
    ("B", r"\boxed{C) 12}", 0),
    ("(B) 12", r"\boxed{B}", 1),
    (r"\textbf{(B)}\ 12", r"\boxed{12}", 1),
    (r"\textbf{(B)}\ 12", r"\boxed{C}", 0),
    (r"\textbf{(B)}\ 12", r"\boxed{\text{(C) }12}", 0),
    ("42", r"\boxed{41}, \boxed{42}", 0),
    ("41, 42", r"$\boxed{41}$ and $\boxed{42}$", 1),
    ("42", r"\boxed{42}, that is \boxed{42}", 1),
    ("42", r"\boxed{42} and \boxed{42}", 1),
    ("1, 2", r"\boxed{2, 1}", 1),
    ("1, 2", r"\boxed{1,2}", 1),
    ("1, 2", r"\boxed{1 and 2}", 1),
    ("1, 2", r"\boxed{1 \text{ and } 2}", 1),
    ("1, 2", r"\boxed{1}", 0),
    ("1, 2", r"\boxed{1,2,3}", 0),
    ("1331 and 1728", r"\boxed{1331, 1728}", 1),
    ("1331 and 1728", "The answers are $1331$ and $1728$.", 1),
    (r"x=1 \text{ or } x=2", r"\boxed{x=1, x=2}", 1),
    (r"x=1 \text{ or } x=2", r"\boxed{1, 2}", 1),
    ("-3, 3", r"\boxed{\pm 3}", 1),
    (r"\pm 3", r"\boxed{-3, 3}", 1),
    (r"\pm 3", r"\boxed{3}", 0),
    # tuples, intervals, sets, formulas
    ("(1, 2)", r"\boxed{(1,2)}", 1),
    ("(1, 2)", r"\boxed{(2,1)}", 0),
    ("(1, 2)", "The point is (1, 2).", 1),
    ("(1,200)", r"\boxed{(1200)}", 0),
    ("(1,200)", r"\boxed{1200}", 0),
    ("1200", r"\boxed{(1,200)}", 0),
    ("(1,200)", r"\boxed{(1, 200)}", 1),
    (r"\{1,200\}", r"\boxed{\{200, 1\}}", 1),
    (r"\{1,200\}", r"\boxed{1200}", 0),
    ("[1,200]", r"\boxed{[1200]}", 0),
    ("(1,234,567)", r"\boxed{1234567}", 0),
    ("1,200", r"\boxed{1200}", 1),
    (r"\{1,2,3\}", r"\boxed{1,2,3}", 1),
    (r"(\frac{1}{2}, 3)", r"\boxed{(0.5, 3)}", 1),
    (r"\left(\frac{1}{2}, 3\right)", r"\boxed{(\frac12,3)}", 1),
    ("[1, 2)", r"\boxed{[1,2)}", 1),
    ("[1, 2)", r"\boxed{(1,2)}", 0),
    ("[1, 2)", r"\boxed{[1,2]}", 0),
    (r"(-\infty, 3)", r"\boxed{(-\infty,3)}", 1),
    (r"(-\infty, 3)", r"\boxed{x<3}", 0),
    (r"(-\infty,3)\cup(5,\infty)", r"\boxed{(-\infty, 3) \cup (5, \infty)}", 1),
    ("x > 3", r"\boxed{x>3}", 1),
    ("x > 3", r"\boxed{x<3}", 0),
    (r"x \ge 3", r"\boxed{x \geq 3}", 1),
    (r"x \ge 3", r"\boxed{x >= 3}", 1),
    (r"x \ge 3", "x ≥ 3", 1),
    (r"x \ge 3", r"\boxed{3}", 0),
    (r"x \ne 3", r"\boxed{x \neq 3}", 1),
    (r"\emptyset", r"\boxed{\varnothing}", 1),
    (r"\emptyset", r"\boxed{∅}", 1),
    (r"\emptyset", r"\boxed{\{\}}", 1),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}}", 1),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\boxed{\begin{pmatrix}1&2\\4&3\end{pmatrix}}", 0),
    ("y=2x+3", r"\boxed{2x+3}", 1),
    ("y=2x+3", r"\boxed{y=3+2x}", 1),
    ("x=5", r"\boxed{5}", 1),
    ("5", r"\boxed{x=5}", 1),
    ("5", r"\boxed{x=5, y=6}", 0),
    ("3+4i", r"\boxed{4i+3}", 1),
    ("10!", r"\boxed{3628800}", 1),
    (r"\binom{5}{2}", r"\boxed{10}", 1),
    (r"\frac{\pi}{4}", r"\boxed{\pi/4}", 1),
    (r"\log_2 8", r"\boxed{3}", 1),
    ("1010_2", r"\boxed{1010_2}", 1),
    ("1010_2", r"\boxed{1010}", 1),
    ("1010_2", r"\boxed{10}", 0),
    ("1010_{2}", r"\boxed{1010_2}", 1),
    (r"0.\overline{3}", r"\boxed{\frac{1}{3}}", 1),
    (r"\frac{\sqrt{3}}{2}", r"\boxed{\frac{\sqrt{3}}{2}\text{ cm}}", 1),
    (r"\sqrt{3} cm", r"\boxed{\sqrt{3}\text{ cm}}", 1),
    (r"\sqrt{3}\text{ cm}", r"\boxed{\sqrt{3}\text{ m}}", 0),
    (r"25\pi\text{ cm}^2", r"\boxed{25\pi}", 1),
    ("100", r"\boxed{100m}", 1),
    ("5m", r"\boxed{5}", 0),
    ("2ab", r"\boxed{2}", 0),
    ("2x", r"\boxed{2}", 0),
    ("2", r"\boxed{2x}", 0),
    ("4", r"\boxed{4s}", 1),
    ("f(x)=2x", r"\boxed{2x}", 1),
    (r"12\text{ ways}", r"\boxed{12}", 1),
    ("7^{th}", r"\boxed{7}", 0),
    ("a^2-b^2", r"\boxed{(a-b)(a+b)}", 1),
    (r"\frac{x}{y}", r"\boxed{x/y}", 1),
    (r"\frac{x}{y}", r"\boxed{y/x}", 0),
    ("e^{x}", r"\boxed{e^x}", 1),
    (r"\sin x", r"\boxed{\sin(x)}", 1),
    ("sin(x)", r"\boxed{\sin x}", 1),
    ("(x+1)^2", r"\boxed{x^2+2x+1}", 1),
    ("2n", r"\boxed{n2}", 0),
    ("n^2", r"\boxed{n2}", 0),
    ("x_1", r"\boxed{x_2}", 0),
    ("0", r"\boxed{-0}", 1),
    ("0", r"\boxed{0.0000001}", 0),
    ("100", r"\boxed{1e2}", 1),
    ("+5", r"\boxed{5}", 1),
    ("5", r"\boxed{+5}", 1),
    (r"-\frac{3}{4}", r"\boxed{\frac{-3}{4}}", 1),
    (r"-\frac{3}{4}", r"\boxed{\frac{3}{-4}}", 1),
    (r"-\frac{3}{4}", r"\boxed{-0.75}", 1),
    ("-0.75", r"\boxed{-\frac{3}{4}}", 1),
    (r"\frac{3}{4}", r"\boxed{75\%}", 1),
    (r"6\frac{2}{3}", r"\boxed{\frac{20}{3}}", 1),
    (r"6\frac{2}{3}", r"\boxed{6 \frac23}", 1),
    (r"6\frac{2}{3}", r"\boxed{4}", 0),
    (r"1 \frac{1}{2}", r"\boxed{1.5}", 1),
    ("12 inches", r"\boxed{12\text{ in}}", 1),
    ("12 inches", r"\boxed{12 ft}", 0),
    ("3 hours", r"\boxed{3 hours}", 1),
    ("3 hours", r"\boxed{3 minutes}", 0),
    ("3 hours", r"\boxed{3}", 1),
    ("$3.50", r"\boxed{\$3.50}", 1),
    ("$3.50", r"\boxed{3.5}", 1),
    ("$3.50", "3.50 dollars", 1),
    ("€3.50", r"\boxed{3.5}", 1),
    ("1,000,000", r"\boxed{1 million}", 1),
    ("1,000,000", r"\boxed{10^6}", 1),
    ("-1,000", r"\boxed{-1000}", 1),
    ("(-1, 2)", r"\boxed{(-1,2)}", 1),
    ("(-1, 2)", "The answer is (-1, 2).", 1),
    ("(a, b)", r"\boxed{(a,b)}", 1),
    (r"x \in [1, 2]", r"\boxed{[1,2]}", 1),
    ("[1, 2]", r"\boxed{x \in [1,2]}", 1),
    ("1 < x < 2", r"\boxed{1<x<2}", 1),
    ("1 < x < 2", r"\boxed{2<x<1}", 0),
    ("x<1 or x>2", r"\boxed{x>2 or x<1}", 1),
    (r"\text{no solution}", r"\boxed{\text{No solution}}", 1),
    ("no real solutions", r"\boxed{0}", 0),
    (r"\infty", r"\boxed{∞}", 1),
    (r"-\infty", r"\boxed{\infty}", 0),
    (r"\mathbb{R}", r"\boxed{(-\infty,\infty)}", 1),
    (r"\overline{AB}", r"\boxed{\overline{BA}}", 0),
    (r"\angle ABC", r"\boxed{\angle CBA}", 0),
    (r"\text{Monday}", r"\boxed{\text{Tuesday}}", 0),
    ("CO", "<answer>CO.</answer>", 1),
    ('"hello"', "<answer>hello</answer>", 1),
    ("hello world", "<answer>Hello, world</answer>", 0),
    ("hello", r"\boxed{\texttt{hello}}", 1),
    ("10:30 am", "It starts at 10:30 AM.", 1),
    ("10:30", "<answer>10:30 AM</answer>", 0),
    ("12-25", r"\boxed{-13}", 0),
    ("2-1", r"\boxed{1-2}", 0),
    ("1/2/3", r"\boxed{1/6}", 0),
    ("100-200", r"\boxed{100–200}", 1),
    ("5-7", "<answer>5-7</answer>", 1),
    ("+1 555 123 4567", r"\boxed{+15551234567}", 0),
    ("(555) 123-4567", r"\boxed{(555) 123-4567}", 1),
    ("x^2 + 1", "so it's x^2 + 1.", 1),
    ("1", "so it's x^2 + 1.", 0),
    ("2", r"so it's \frac{1}{2}.", 0),
    ("1/2", r"so it's \frac{1}{2}.", 1),
    ("3/4", r"So $x = \frac{3}{4}$ is the answer.", 1),
    ("10", r"$2 \cdot 5 = 10$", 1),
    ("10", "The result of $2+8$ is $10$ and that's it.", 1),
    # reasoning
    ("42", "<think>x</think>42", 1),
    ("42", "x</think>The answer is 42", 1),
    ("42", r"<think>\boxed{42}</think>", 0),
    ("42", "<think>a</think>42<think>no", 0),
    ("42", r"<think><think>41</think> \boxed{42}", 1),
    ("42", "<answer>42</answer></think>7", 0),
    ("42", "<think>41</think><answer>42</answer>", 1),
    # marks
    ("42", r"I think 42. \boxed{}", 0),
    ("42", "42 <answer></answer>", 0),
    ("42", "42\n####", 0),
    ("0.5", "#### 1/2\nCheck: 3", 1),
    ("42", "#### Step 1\n2\n#### Step 2\n42", 1),
    ("42", "#### 42\n\n#### Check\nyes 7", 1),
    ("42", "#### **42**", 1),
    ("42", r"\boxed{**42**}", 1),
    ("42", r"\boxed{\boxed{42}}", 1),
    ("42", r"\boxed{\text{42}}", 1),
    ("42", r"$\boxed{42}$", 1),
    ("42", r"\fbox{42}", 1),
    ("42", r"\boxed 42", 1),
    ("42", "**Final Answer:** 42", 1),
    ("42", "**Final Answer**\n\n42", 1),
    ("42", "Answer: `42`", 1),
    ("42", "The answer is: *42*", 1),
    ("42", "answer = 42", 1),
    ("42", r"Therefore, the answer is \(42\).", 1),
    ("42", r"\[42\]", 1),
    ("42", r"The final answer is $\boxed{42}$. I hope it is correct.", 1),
    ("42", "The answer is 42, because 6*7=42 and 5 is odd.", 1),
    ("42", "The total is forty-two (42).", 1),
    ("42", '"42"', 1),
    ("42", "'42'", 1),
    ("42", "42!", 1),
    ("42", "_42_", 1),
    ("42", "__42__", 1),
    ("42", "~42~", 1),
    ("42", "=> 42", 1),
    ("42", "→ 42", 1),
    ("42", "= 42", 1),
    ("42", "#42", 1),
    ("42", "42 (forty-two)", 1),
]


@pytest.mark.slow
def test_math_verify_says_what_is_right() -> None:
    """All rows, so that a change shows everything it breaks."""
    wrong = [row for row in ROWS if score("math_verify", row[1], {"answer": row[0]}) != row[2]]
    assert wrong == []
    assert len(ROWS) > 300 and 0.3 < sum(right for *_, right in ROWS) / len(ROWS) < 0.8


def test_any_of_several_answers_is_right() -> None:
    item = {"answer": ["2", "-2"]}
    completions = ("\\boxed{2}", "It is -2.", "3", "<answer>2 or -2</answer>", "")
    assert [score("math_verify", text, item) for text in completions] == [1, 1, 0, 0, 0]
    assert [score("exact", text, item) for text in completions] == [1, 1, 0, 0, 0]
    assert score("regex", "so -2", item, pattern=r"so (\S+)") == 1
    assert score("math_verify", "Paris", {"answer": ("Lutetia", "Paris")}) == 1


# --- the data's own answer

ANSWERS = re.split(
    r"\|\n?",
    r"""
42|-7|3.14|1,234|\frac{3}{4}|-\frac{5}{2}|\dfrac{1}{3}|2\frac{1}{2}|\sqrt{2}|3\sqrt{5}|\frac{\sqrt{3}}{2}|2^{10}|
10^{-5}|\pi|\frac{\pi}{6}|e^2|(3, -4)|(1,200)|\left(\frac12,\frac13\right)|[0, 1)|(-\infty, 2]|
(-\infty,-1)\cup(1,\infty)|\{1,2,3\}|1, 2, 3|x^2+2x+1|3x-5|\frac{x+1}{x-1}|x=3|y = 2x + 1|x > 5|-3 \le x \le 4|
\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}|\text{(C)}|\textbf{(D)}|\text{even}|\text{Monday}|50\%|25%|90^\circ|
\$18.50|12\text{ cm}|36\pi\text{ cm}^2|5!|\binom{6}{3}|\infty|\emptyset|\text{no real solutions}|3+4i|-2i|1010_2|
0.\overline{3}|10:30|3:4|2024-05-01|555-1234|yes|No|True|XIV|Apollo 11|H2O|New York City|don't know|x^2+y^2=25|
f(x)=x^3|\log_2 3|\sin 30^\circ|\tan^{-1}(2)|\lfloor x \rfloor|x_1 + x_2|a_{n+1}|\overline{AB}|\triangle ABC|\angle A|
p \land q|A \cup B|O(n \log n)|0|-0.5|.75|007|0110|1e-5|6.02e23|1.5 million|3 apples|60 km/h|5'11"|7th|2, -2|\pm 3|
1 or 2|1 and 2|red, green|"hello"|[1, 2, 3]|{'a': 1}|a b c|SELECT x FROM t|print("hi")|答案|四十二|été|3个|½|5½|−5|10–15|
$x+y$|\(x\)|50 percent|A|(A)|b)|i|x|100m|-\infty|4.0|4.50|1/2|22/7|2/4|1 1/2|\frac{1}{2^{99}}|10^{100}|
the cat sat on the mat|What is it?|Yes!|C++|e4 e5|(555) 123-4567|+1 555 123 4567|192.168.0.1|a@b.com|http://x.org/1|
<b>1</b>|#1|No. 5|1st|3 to 2|AB=5|AB = 5, BC = 6|x=1 \text{ or } x=2|x = -1, 2|\frac{a}{b} = \frac{c}{d}|\mathbb{R}|
x \in \mathbb{Z}|\text{(A) and (B)}|\text{I, II}|II and III|12,34,567|1.234,56|1'234'567|
x^2+1|Apollo 11|(1, 2)|50%|12:30|3/4|-5|1,234|007|E=mc^2|C#|F#|C++|a_1|*|**bold**|$x$|\alpha|2 + 2|[1,2]|{1}|
v2.0|No. 7|10 m/s^2|90°|A/B|yes/no|1st|U.S.|U.S.A.|e.g.|St. John's|1.|2)|a.|x = 5|y|#hashtag|@home|...|?|!|π|
½|３|2024-05-01T10:00:00Z|10:30:15|1 : 2|3 - 2|(555) 010-0100|AC/DC|MP3|B2B|Route 66|R2-D2|Catch-22|4x4|1080p|
$5|5$|€5|5 €|50 %|1.0|1.50|0.0|-0|+1|1e3|1E3|1.5e-7|0x10|0b11|1_000|1 000|1.000,5|3.14159265358979|
The answer is 5|Answer: 5|5 or 6|5, 6|five|Ten|\text{yes}|\frac{1}{2}|\boxed|<b>5</b>|a < b|a > b|
it's 5|"5"|'5'|5;6|5:6|5/6|5-6|5–6|5 6
""".strip(),
)
WRAPS = (
    "%s",
    " %s\n",
    "$%s$",
    "\\boxed{%s}",
    "<answer>%s</answer>",
    "<answer> \\boxed{%s} </answer>",
    "Because 7.\n#### %s",
    "<think>9 or 10</think>\n%s",
    "<think>9</think> <answer>%s</answer>",
    "The final answer is \\boxed{%s}. I hope it is correct.",
)


@pytest.mark.parametrize("part", ["math_verify", "exact"])
def test_the_datas_own_answer_earns_1_and_nothing_earns_0(part: str) -> None:
    answers = ANSWERS
    assert len(answers) > 140
    for wrap in WRAPS:
        assert [answer for answer in answers if score(part, wrap % answer, {"answer": answer}) != 1] == [], wrap
    for completion in ("", " ", "<think>", "<answer></answer>", "\\boxed{}", "####", "$$"):
        assert [answer for answer in answers if score(part, completion, {"answer": answer}) != 0] == [], completion
    assert [answer for answer in answers if score(part, f"<think>{answer}", {"answer": answer}) != 0] == []


# Texts that are no mathematics, and what a computer algebra system makes equal to them.
ANAGRAMS = [
    ('listen', 'silent'), ('no', 'on'), ('CO', 'OC'), ('GATTACA', 'ACATTAG'), ('XIV', 'XVI'), ('spam not', 'not spam'),
    ('stop', 'pots'), ('ab', 'ba'), ('1a2b', '2b1a'), ('2024-05-01', '2018'), ('12:30', '2/5'), ('3:4', '0.75'),
    ('H2O', 'OH2'), ('555-0100', '455'), ('10-4', '6'), ('B-52', '52-B'), ('evil', 'live'), ('10 4', '14'),
    ('1/2/2024', '1/4048'), ('dcba', 'abcd'), ('the cat', 'cat the'), ('v1.2', '1.2v'), ('A1', '1A'), ('IV', 'VI'),
    ('007', '7'), ('0110', '110'), ('red', 'der'), ('dog', 'god'), ('RNA', 'NAR'), ('DNA', 'AND'), ('UTC', 'CUT'),
    ('sin', 'nis'), ('pi', 'ip'), ('max', 'xam'), ('ABBA', 'BAAB'), ('10110', '01101'), ('MCMXCIV', 'MCMXCVI'),
    ('SOS', 'OSS'), ('Tom and Jerry', 'Jerry and Tom'), ('up down', 'down up'), ('e', 'E='), ('Na', 'aN'),
    ('NaCl', 'ClNa'), ('RGB', 'BGR'), ('abcd', 'dcba'), ('tac', 'cat'), ('xyzw', 'wzyx'), ('AAB', 'ABA'),
    ('left, right', 'right, left'), ('do', 'od'), ('1st', 'st1'), ('R2D2', 'D2R2'), ('b4', '4b'), ('no no', 'no'),
    ('yes yes', 'yes'), ('cat cat', 'cat'), ('aaa', 'aa'), ('tic-tac', 'tac-tic'), ('and', 'nad'), ('a-b-c', 'c-b-a'),
    ('ab cd', 'cd ab'), ('é', 'e'), ('I', 'l'), ('O', '0'), ('i', '1'), ('II', '2'), ('forty', '42'),
    ('Q4 2023', '2023 Q4'), ('10 am', '10 pm'), ('10:00', '10'), ('1:2', '1/2'), ('1:2', '2:4'), ('0:30', '30'),
    ('5\'6"', '56'), ('1-1-1', '-1'), ('4-5', '-1'), ('2-0', '2'), ('7-7-7', '-7'), ('800-555-0199', '46'),
    ('1.2.3.4', '1.2'), ('10.0.0.1', '10.0.0.2'), ('v1', '1'), ('COVID-19', '-19'), ('Boeing 747', '747 Boeing'),
    ('G7', '7G'), ('7-Eleven', 'Eleven-7'), ('K-9', '9-K'), ('UTC+1', '1+UTC'),
]  # fmt: skip


@pytest.mark.parametrize("first, second", ANAGRAMS)
def test_texts_are_no_arithmetic(first: str, second: str) -> None:
    for mark in ("%s", "\\boxed{%s}", "<answer>%s</answer>", "\\boxed{\\text{%s}}", "#### %s"):
        assert score("math_verify", mark % second, {"answer": first}) == 0
        assert score("math_verify", mark % first, {"answer": first}) == 1
        assert score("exact", mark % second, {"answer": first}) == 0


@pytest.mark.parametrize(
    "value, text, others",
    [
        (1e16, "10000000000000000", ["1e16", "\\boxed{10^{16}}", "1 \\times 10^{16}"]),
        (6.02e23, "602000000000000000000000", ["6.02e23", "\\boxed{6.02 \\times 10^{23}}"]),
        (0.00001, "0.00001", ["1e-5", "\\boxed{10^{-5}}"]),
        (0.30000000000000004, "0.30000000000000004", ["0.3"]),
        (42.0, "42", ["42.0", "42.", "forty-two (42)"]),
        (2**70, "1180591620717411303424", ["\\boxed{2^{70}}"]),
        (-0.5, "-0.5", ["-1/2", "\\boxed{-\\frac{1}{2}}", "-.5"]),
    ],
)
def test_numbers_of_the_data_are_matched_as_they_are_written(value: float, text: str, others: list[str]) -> None:
    item = question_of({"q": "?", "a": value}, ColumnsConfig(prompt="q", answer="a"), "row").item
    assert item["answer"] == text
    assert score("exact", f"It is {text}.", item) == score("math_verify", f"It is {text}.", item) == 1
    assert [other for other in others if score("math_verify", other, item) != 1] == []


# --- final_answer and math_verify


def sentences(number: str) -> list[str]:
    """Ways to end a completion on a number."""
    said = [
        "%s", "%s.", "It is %s.", "So x = %s", "Answer:%s", "Answer: %s", "The answer is %s.",
        "**%s**", "*%s*", "`%s`", "_%s_", "(%s)",
        "\\boxed{%s}", "$\\boxed{%s}$", "#### %s", "<answer>%s</answer>", "<answer>\\boxed{%s}</answer>",
        "$%s$", "$x = %s$", "\\$%s",
        "It costs $%s.", "\\(%s\\)", "\\[%s\\]", "答案是%s。", "答案:%s", "一共有%s个。",
        "The answer is **%s**.", "%s apples", "= %s", "a\n%s\n",
        "First 3, then %s!", "Total: %s dollars", "- %s", "<think>7</think>%s",
        "<think>\\boxed{7}</think> It is %s.", "7\n#### %s\nq 9",
        "**Answer: \\$%s per day.**", "\\text{It is } %s", "€%s", '"%s"', "The answer is $%s$, since 3 < 5.",
    ]  # fmt: skip
    return [sentence % number for sentence in said]


def test_where_final_answer_finds_a_number_math_verify_finds_it_too() -> None:
    draw = random.Random(0)
    numbers = "0 7 -4 42 1,234 1,234,567 3.5 -0.25 100 2024 1/2 -3/4 12.50 .5 1e6 0.001".split()  # noqa: SIM905
    numbers += [str(draw.randint(-(10**9), 10**9)) for _ in range(10)]
    numbers += [f"{draw.uniform(-1e4, 1e4):.3f}" for _ in range(10)]
    for number in numbers:
        for text in sentences(number):
            if text == f"({number})" and "," in number:  # a point
                continue
            found = final_answer(text)
            assert score("math_verify", text, {"answer": number}) == 1, (text, found)
            assert is_equal(number, found), (text, found)
            assert score("math_verify", text, {"answer": found}) == 1, (text, found)
            for part in ("math_verify", "exact"):
                assert score(part, text, {"answer": "777777"}) == 0, (text, found)


def test_votes_for_a_number_are_one_text() -> None:
    unlike = ("$", "€", "apples", "dollars", "per day")
    for number in ("42", "-7", "3.5"):
        plain = [text for text in sentences(number) if not any(mark in text for mark in unlike)]
        assert {final_answer(text) for text in plain} == {number}


def test_random_texts_never_earn_by_accident(seed: int = 0) -> None:
    """Words of the same letters in another order: 0; in the same order, 1."""
    draw = random.Random(seed)
    for _ in range(200):
        word = "".join(draw.choice("abcdefghijklmnopqrstuvw") for _ in range(draw.randint(2, 8)))
        other = "".join(draw.sample(word, len(word)))
        assert score("math_verify", f"\\boxed{{{other}}}", {"answer": word}) == float(word == other)


def test_thousands_separators_are_none_inside_brackets() -> None:
    for (a, b), (left, right) in itertools.product([("1", "200"), ("12", "345"), ("-1", "000")], ["()", "[]", ("\\{", "\\}")]):
        gold = f"{left}{a},{b}{right}"
        for other in (f"{left}{a}{b}{right}", f"{a}{b}", f"{a},{b}"):
            for part in ("math_verify", "exact"):
                assert score(part, f"\\boxed{{{other}}}", {"answer": gold}) == 0, (gold, other)
        assert score("math_verify", f"\\boxed{{{gold}}}", {"answer": gold}) == 1


SAYS_18 = [
    'Answer：18', 'answer is18', 'Total=18', '18円', '18€', '€18', '£18', '¥18', '18 USD', 'USD 18', 'US$18', 'Rs. 18',
    '₹18', '合计18元', '共18', '得18。', '= 18', '≈ 18', '(18)', '[18]', '{18}', "'18'", '“18”', '18;', '18,', '18?', '18…',
    '18...', '|18|', '18/-', '~18', '18\n', '*18*.', '***18***', '**18.**', '***Answer***: 18', '__Answer__: 18', '> 18',
    '1) 18', '<b>18</b>', '18</s>', '18<|im_end|>', 'The answer: eighteen, i.e. 18', 'Ответ: 18', 'Antwort: 18',
    'La réponse est 18.', 'La respuesta es 18.', '答え:18', '정답은 18입니다.', 'الجواب ١٨', 'उत्तर १८',
    'The answer is \\textbf{18}.', 'The answer is \\text{18}', '$\\$18$', '\\$18', '$18$', '\\( 18 \\)', '\\[ 18 \\]',
    '$$18$$', '18 \\text{ apples}', 'so 18 apples.', '18-inch', 'There are 18.', 'x=18', '$x = 18$', '$x=18$.', 'x: 18',
    '18th', '18 (eighteen)', '18 = 2*9', '2*9 = 18', '2*9=18', '9+9=18 apples', 'Thus, 18 dollars/day',
    '18 per cent of it', '\\underline{18}', '\\mathbf{18}', '{\\bf 18}', '\\textit{18}', '\\fbox{18}', '\\framebox{18}',
    '`Answer: 18`', '```\n18\n```', '```18```', '<answer>`18`</answer>', '<answer>**18**</answer>',
    '<answer>\\$18</answer>', '<answer>Answer: 18</answer>', '<answer>\n18\n</answer>', '\\boxed{18.}', '\\boxed{18,}',
    '\\boxed{ 18 }', '\\boxed{\\$18}', '\\boxed{18\\,\\text{apples}}', '\\boxed{\\mathbf{18}}',
    '\\boxed{\\text{18 apples}}', '\\boxed{\\text{Answer: }18}', '\\boxed{x=18}', '\\boxed{18}\\%', '\\boxed{18^\\circ}',
    '\\boxed{18\\ \\mathrm{cm}}', '\\boxed{\\approx 18}', '\\boxed{+18}', '\\boxed{18个}', '\\boxed{18元}', '\\boxed{£18}',
    '\\boxed{18 dollars}', '\\boxed{\\textdollar18}', '\\boxed{18\\text{ apples and nothing else}}', '####18',
    '#### 18 apples', '#### $18.00', '####\n18', '#### **18**', '#### \\boxed{18}', '#### Answer: 18', '#### x = 18',
    'So #### 18 and that is it',
]  # fmt: skip
DOES_NOT_SAY_18 = [
    '180', '1.8', '118', '-18', '18.5', '1/8', '18:30', '2018-18-18', '18/2', '<answer>17 18</answer>',
    '<answer>17,18</answer>', '<answer>17/18</answer>', '<answer>17 or 18</answer>', '<answer>17; 18</answer>',
    '<answer>17|18</answer>', '<answer>17\n18</answer>', '<answer>18 18 18 19</answer>', '<answer>1..100</answer>',
    '<answer>1-100</answer>', '<answer>17-18</answer>', '<answer>17 to 18</answer>', '<answer>[17, 18]</answer>',
    '<answer>(17, 18)</answer>', '<answer>{17, 18}</answer>', '<answer>17 and 18</answer>',
    '<answer>either 17 or 18</answer>', '<answer>17? 18?</answer>', '<answer>17, maybe 18</answer>',
    '<answer>17 (or 18)</answer>', '<answer>a) 17 b) 18</answer>', '<answer>not 18</answer>',
    '<answer>x=17, x=18</answer>', '<answer>x=17 or x=18</answer>', '<answer>17 < 18</answer>',
    '<answer>18 ≠ 17</answer>', '\\boxed{17}\\boxed{18}', '\\boxed{17} or \\boxed{18}', '$\\boxed{17}$ or $\\boxed{18}$',
    '\\boxed{17 \\quad 18}', '\\boxed{17 \\\\ 18}', '\\boxed{\\pm 18}', '#### 17 or 18', '#### 17, 18',
    '<answer>18 million</answer>', '\\boxed{18!}', '\\boxed{18x}', '\\boxed{x>18}', '\\boxed{\\le 18}',
    '\\boxed{x \\le 18}', '\\boxed{\\{18,19\\}}', '\\boxed{}18', '18 \\boxed{}', '18 <answer></answer>', '18\n####',
    '<think>18', '<think>18</think>', '<think>18</think>no', '</think>', '\\boxed{18\\text{ or }19}',
    '\\boxed{18 or 19}', '\\boxed{18 \\vee 19}', '\\boxed{2018}',
]  # fmt: skip


def test_completions_that_say_18_and_that_do_not() -> None:
    assert [text for text in SAYS_18 if score("math_verify", text, {"answer": "18"}) != 1] == []
    assert [text for text in DOES_NOT_SAY_18 if score("math_verify", text, {"answer": "18"}) != 0] == []
    assert [text for text in DOES_NOT_SAY_18 if score("exact", text, {"answer": "18"}) != 0] == []


SAYS_300_MILLION = [
    '3E8', '3e8', '\\boxed{3e8}', '3 × 10^8', 'The answer is 3 × 10^8.', '3×10⁸', '\\boxed{3 \\times 10^8}',
    '$3 \\cdot 10^{8}$', 'about 3 x 10^8 m/s', '300,000,000', '300 million', '0.3 billion', '<answer>3E+8</answer>',
    '3.0e8', '#### 3e8', 'It is 3e8 m/s.',
]  # fmt: skip


def test_large_numbers_are_written_in_many_ways() -> None:
    assert [text for text in SAYS_300_MILLION if score("math_verify", text, {"answer": "300000000"}) != 1] == []
    assert [text for text in SAYS_300_MILLION if score("math_verify", text, {"answer": 3e8}) != 1] == []
    assert [text for text in SAYS_300_MILLION if score("math_verify", text, {"answer": "30000000"}) != 0] == []


# --- rows as the great data sets have them

DATA: list[tuple[str, dict[str, Any], str, str]] = [
    (
        "GSM8K",
        {"question": "?", "answer": "3 * 4 = <<3*4=12>>12 eggs.\nThat is $<<12*2=24>>24.\n#### 24"},
        "answer",
        "24",
    ),
    ("GSM8K", {"question": "?", "answer": "Half of 3,000 is 1,500.\n#### 1,500"}, "answer", "1500"),
    ("GSM8K", {"question": "?", "answer": "He loses 5.\n#### -5"}, "answer", "-5"),
    ("MATH", {"question": "?", "solution": "Since $2x=1$, $x=\\boxed{\\frac{1}{2}}$."}, "solution", "0.5"),
    ("MATH", {"question": "?", "solution": "The interval is $\\boxed{(-\\infty, 2] \\cup [3, \\infty)}$."}, "solution", ""),
    ("MATH", {"question": "?", "solution": "It is $\\boxed{\\text{Evelyn}}$."}, "solution", "Evelyn"),
    ("MATH", {"question": "?", "solution": "So $\\boxed{12\\text{ cm}^2}$."}, "solution", "12"),
    ("MATH", {"question": "?", "solution": "Thus $\\boxed{1010_2}$ and we are done with 3 steps."}, "solution", ""),
    ("MATH", {"question": "?", "solution": "The answer is $\\boxed{\\$18.50}$"}, "solution", "18.5"),
    ("verl", {"question": "?", "ground_truth": "24"}, "ground_truth", "24.0"),
    ("verl", {"question": "?", "ground_truth": 24}, "ground_truth", "24"),
]


@pytest.mark.parametrize("name, row, column, other", DATA)
def test_reference_answers_of_data_sets_earn_1(name: str, row: dict[str, Any], column: str, other: str) -> None:
    item = question_of(row, ColumnsConfig(prompt="question", answer=column), name).item
    for completion in (str(row[column]), item["answer"], f"\\boxed{{{item['answer']}}}", f"<think>1</think>{row[column]}"):
        assert score("math_verify", completion, item) == 1, completion
    if other:
        assert score("math_verify", f"So the answer is {other}.", item) == 1
    assert score("math_verify", "", item) == score("math_verify", "I do not know.", item) == 0
    assert score("math_verify", f"<think>{row[column]}", item) == 0


# A library that one generator needs leaves a file open.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.nightly
def test_reference_answers_of_all_reasoning_gym_generators_earn_1() -> None:
    factory = pytest.importorskip("reasoning_gym.factory")
    from grpo_jax.config import ReasoningGymConfig, TaskConfig
    from grpo_jax.tasks.reasoning_gym import load

    with_an_answer = set()
    for name in sorted(set(factory.DATASETS) - {"composite"}):  # a mixture of others, which it must be given
        task = TaskConfig(reasoning_gym=ReasoningGymConfig(datasets=(name,), num_train=4))
        for question in load(task, 2).train:
            answer = question.item["answer"]
            if answer is None:  # any solution will do
                continue
            with_an_answer.add(name)
            for completion in (f"<think>1 or 2</think><answer>{answer}</answer>", f" {answer}\n", f"</think>{answer}"):
                assert score("reasoning_gym", completion, question.item) == 1, (name, completion)
            for completion in ("", "<answer> </answer>", f"<think>{answer}"):
                assert score("reasoning_gym", completion, question.item) == 0, (name, completion)
    assert len(with_an_answer) >= 100
