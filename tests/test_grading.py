"""The grading section of evaluate.py: where the answer stands, and whether it is the gold one."""

import itertools
import json
import logging
import random
import re
import time

import math_verify
import pytest

import evaluate

# (prediction, gold, right?), bare and boxed alike; more in ../shared/data/grading_cases.jsonl
CASES = {
    "number": [
        ("025", "25", 1), ("27", "27.0", 1), ("-5", "5", 0), ("- 18", "-18", 1),
        ("−18", "-18", 1),
        ("+18", "18", 1), ("1,000", "1000", 1), ("1 000", "1000", 1), ("10{,}000", "10000", 1),
        (r"32,\!349", "32349", 1), ("18.0", "18", 1), ("18.01", "18", 0), ("1.000", "1", 1),
        ("1,00", "1000", 0), ("1000000007", "1000000008", 0),
        ("12345678901234567890", "12345678901234567891", 0), ("0.1+0.2", "0.3", 1),
        (r"1.23\times10^{5}", "123000", 1), (r"6\cdot 10^{-3}", "0.006", 1), ("0", "", 0)],
    "fraction": [
        (r"\frac12", "0.5", 1), (r"\dfrac{3}{4}", "3/4", 1),
        (r"\frac{-1}{2}", r"-\frac{1}{2}", 1),
        (r"\frac{1}{-2}", "-0.5", 1), (r"\frac{\frac12}{3}", "1/6", 1), (r"\frac3{3}", "1", 1),
        (r"\frac{3}{8}", r"\frac{3}{16}", 0), ("1/0", "1/0", 1), ("1/0", "2/0", 0),
        (r"2\frac{1}{2}", "2.5", 1), ("2 1/2", "5/2", 1), ("-2 1/2", "-2.5", 1),
        ("-2 1/2", "-1.5", 0), (r"1\frac{1}{10}", r"1\frac{1}{9}", 0),
        (r"0.\overline{3}", "0.3", 0)],
    "rounded": [
        ("0.3333", "1/3", 0), ("0.0833333333333", "1/12", 1),
        ("0.3334", "1/3", 0), ("1/3", "0.3", 0),
        ("1.5708", r"\pi/2", 0), ("1.57", r"\pi/2", 0), ("0.25", "0.2499", 0),
        ("0.2499", "0.25", 0), ("100", "99.9999", 0), (r"\frac{22}{7}", r"\pi", 0),
        ("(0.6,2.5]", r"(\frac{3}{5},\frac{5}{2}]", 1), ("1/3", "0.33", 0),
        ("0.24996", "0.25", 0), ("1/3", "0.333", 0),
        ("0.3333", "0.33333", 0)],
    "percent, money, unit": [
        ("5%", "5", 1), ("0.05", "5%", 1), ("5%", "50%", 0), (r"50\%", "0.5", 1),
        ("5", r"5\%", 1),
        ("1/2", "50%", 1), (r"\$18", "18", 1), (r"\$1,234.50", "1234.5", 1),
        ("28 pct", "28%", 1),
        ("5 cm", "5", 1), (r"5\text{ cm}", "5", 1), ("5 apples", "5", 1),
        ("18 dollars", "18", 1),
        ("10 square feet", "10", 1), (r"15\mbox{ cm}^2", "15", 1), ("5 km", "5 m", 0),
        (r"90^\circ", "90", 1), ("90 degrees", r"90^{\circ}", 1), ("0.64N", "0.64", 0),
        (r"3\sqrt{2}\text{ inches}", r"3\sqrt2", 1), (r"8\sqrt{3} \text { square inches}",
                                                     r"8\sqrt{3}", 1)],
    "tuple, interval": [
        ("(1, 2)", "(1,2)", 1), ("(1,2)", "(2,1)", 0), ("(1,1)", "1", 0),
        ("[1,2]", "(1,2)", 0), ("[0,9)", "[0,1)", 0), ("(4,10]", "(4,10)", 0),
        ("[12,102]", "(12,102)", 0), ("(x+5]^2", "(x+5)^2", 0),
        ("1,3", "(1,3)", 1), ("(1,4.5)", r"(1,\frac{9}{2})", 1), ("(1,200)", "(1, 200)", 1),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", 1),
        (r"\bigl(3, 4\bigr)", "(3,4)", 1), ("1", "-[0,1)", 0),
        (r"(-\infty, 2) \cup (3, \infty)", r"(3,\infty)\cup(-\infty,2)", 1),
        (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)", 0)],
    "set, list": [
        ("1,2", "2,1", 1), (r"\{1,2\}", "2,1", 1), ("12, 13", "12", 0), ("12", "12, 13", 0),
        ("x = 1 or x = 2", "1,2", 1), ("1 and 2", "1, 2", 1), ("19, 46, and 82", "82,46,19", 1),
        (r"x \in \{1,2\}", r"\{2,1\}", 1), ("100,200", "200,100", 1), ("1,1,2", "1,2,2", 0),
        (r"\pm 3", "3,-3", 1), (r"\pm 3", "3", 0), ("3", r"\pm 3", 0), ("±3", r"\pm 3", 1),
        (r"3\pm\sqrt{2}", r"3+\sqrt2, 3-\sqrt2", 1), (r"(\pm 1, 2)", "(1,2)", 0),
        (r"x = \frac12, x = \frac{-1 \pm \sqrt{13}}{4}",
         r"\frac{-1-\sqrt{13}}{4}, \frac{-1+\sqrt{13}}{4}, 0.5", 1),
        ("(5, 8), (8, 5)", "(8,5) and (5,8)", 1), (r"\emptyset", "0", 0),
        (r"\emptyset", r"\emptyset", 1)],
    "name = value": [
        ("x^2-1 = (x-1)(x+1) = 3", "3", 1), ("x=5", "5", 1), ("5", "x=5", 1), ("x=5", "x=6", 0),
        ("y=5", "x=5", 0),
        ("x_2=5, x_1=4", "x_1=5, x_2=4", 0), ("x = 5+6 = 11", "11", 1),
        (r"x\approx11", "11", 1), (r"x = 1/3 \approx 0.3", "x = 1/3", 1), ("0", "a^2+b=0", 0),
        ("AB=4,CD=5", "4, 5", 1), ("x=1,y=2", "(1,2)", 1), ("x=1,y=2", "y=2,x=1", 1),
        ("x=2,y=1", "x=1,y=2", 0), ("(p,q)=(3,2)", "(3,2)", 1),
        (r"\Phi (x,y)=\frac{x+1}{2y}", r"\frac{x}{2y} + \frac{1}{2y}", 1),
        ("f(x)=2x", "2x", 1)],
    "equation, inequality": [
        ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}", 1), ("x^2=1-y^2", "x^2+y^2=1", 1),
        ("x^{2}-y^{2}=1", "x^2+y^2=1", 0), ("y=2x+1", "2x+1", 1), ("y=2x+1", "x=2y+1", 0),
        ("2x=4", "x=2", 1), ("2", "2x=4", 0), (r"5 \ge x", r"x \leq 5", 1), ("x<5", "x>5", 0),
        ("x<=5", "x<5", 0), (r"x \ge 5", r"[5,\infty)", 1),
        ("x > 5", r"[5,\infty)", 0), (r"-3<x\le 2", "(-3,2]", 1), ("0<f(x)<1", "(0,1)", 1),
        (r"x \neq 3", "x != 3", 1), (r"x \neq 3", "3", 0), ("1 < 2 = x < 3", "2", 0)],
    "matrix, base, ratio, time": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", 0),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 0),
        ("[1,2][3,4]", "11", 0),
        ("101", "101_2", 0), (r"2516_{8}", "2516_8", 1), ("3:4", "4:3", 0),
        ("12:00", "12:00", 1), ("12:30", "12:31", 0)],
    "text, choice": [
        ("(A)", "A", 1), ("A.", "A", 1), (r"\textbf{(B)}", "B", 1), ("B", "A", 0),
        ("a", "A", 0),
        ("even", r"\text{Even}", 1), ("odd", "even", 0), ("no solution", "one solution", 0),
        (r"\text{no solution}", "no solution", 1), ("dog bites man", "man bites dog", 0)],
    "formula": [
        ("(x+1)^2", "x^2+2x+1", 1), ("(x+1)^2", "x^2+1", 0), (r"\sqrt{8}", r"2\sqrt{2}", 1),
        (r"\frac{\sqrt{2}}2", r"\frac{1}{\sqrt2}", 1), (r"\sqrt{x^2}", "|x|", 1),
        (r"\sqrt{x^2}", "x", 0), ("x^{1/3}", r"\sqrt[3]{x}", 1),
        (r"\tan^2 x + 1", r"\frac{1}{\cos^2 x}", 1), (r"\sin^2 x", r"\sin x^2", 0),
        ("e^{x}e^{y}", "e^{x+y}", 1),
        (r"\log_2 8", "3x", 0), (r"\sin^{-1}(1)", "1", 0), ("n!", "n", 0), ("xy", "yx", 1),
        ("2xyz", "2", 0), ("2", "2xyz", 0), ("2xyz", "2xyz", 1), ("a_1", "a_2", 0),
        ("a_{1}", "a_1", 1),
        ("(1+i)^2", "2i", 1), (r"\sqrt2\sqrt2", "2", 1),
        (r"\frac{x}{2}", r"\frac{2}{x}", 0), ("2^{x}", "x^{2}", 0),
        (r"\frac{1}{x+1}+\frac{1}{x-1}", r"\frac{2x}{x^2-1}", 1), ("x", "y", 0),
        (r"16/3 \pi", r"\frac{16\pi}{3}", 1), ("10^{10}", "10^{10^{10^{10}}}", 0)]}


# One list for each kind of false or missing verdict that a careful reader found.
KINDS = {
    "a minus sign of Unicode": [
        ("The temperature is −3 degrees", "3", 0), ("The temperature is −3 degrees", "-3", 1),
        ("She owes −$40 in total.", "40", 0), ("She owes -$40.", "-40", 1),
        ("It fell to −2.5.", "2.5", 0), (r"\boxed{−\frac{1}{2}}", "-1/2", 1)],
    "given up while thinking": [
        (r"<think>So \boxed{5}. Hmm, no.</think> The answer is 7.", "5", 0),
        (r"<think>So \boxed{5}. Hmm, no.</think> The answer is 7.", "7", 1),
        (r"<think>\boxed{3}</think>\n**Answer: 4**", "3", 0),
        (r"It is \boxed{3}, wait.\n</think>\n\nSo \boxed{4}", "4", 1),
        (r"<think>Easy: \boxed{3}</think>", "3", 1)],
    "a sum with its result": [
        ("the answer is 256 + 37 = 293", "256", 0), ("the answer is 256 + 37 = 293", "293", 1),
        ("The answer is 256 + 37 = 293 apples.", "256", 0),
        ("It is 3 * 4 = 12 in all.", "12", 1),
        ("The answer is 3 * 4 = 12 in all.", "3", 0),
        ("The answer is 3x + 5 dollars.", "5", 0)],
    "negated": [
        ("The answer is not 5 but 7", "5", 0), ("The answer is not 5 but 7", "7", 1),
        ("The answer is 7, not 5.", "5", 0), ("The answer isn't 5; it is 7.", "7", 1),
        ("The answer is 7 rather than 5", "5", 0), ("So there are 7 ways, not $5$.", "7", 1)],
    "two units": [
        (r"\boxed{1 \text{ hour } 20 \text{ minutes}}", "20", 0),
        ("1 hour 20 minutes", "20", 0), ("It takes 1 hour and 20 minutes.", "20", 0),
        (r"\boxed{5 \text{ feet } 3 \text{ inches}}", "15", 0), ("2 m 500 mm", "2500", 0),
        ("1 hour 20 minutes", r"1 \text{ hour } 20 \text{ minutes}", 1),
        ("It weighs 3 pounds 4 ounces.", "4", 0), ("12 dollars 50 cents", "50", 0)],
    "words that change a number": [
        ("9 p.m.", "9 a.m.", 0), (r"\boxed{9:00 \text{ a.m.}}", r"9\text{ a.m.}", 1),
        ("They meet at 9 PM.", "9 a.m.", 0), ("9 AM", "9 a.m.", 1),
        ("They meet at 9 a.m.", "9 p.m.", 0), ("We meet at 9 a.m. sharp.", "9 a.m.", 1),
        ("3.5 billion", "3.5 million", 0), ("3.5", "3.5 million", 0),
        ("The answer is 3.5 billion people.", "3.5 million", 0), ("3500000", "3.5 million", 1),
        (r"10\% increase", r"10\% decrease", 0),
        ("A 10% increase in sales.", "10% decrease", 0),
        (r"\boxed{10\%\text{ increase}}", r"10\% increase", 1),
        ("5 miles north", "5 miles south", 0),
        ("65 tickets", r"65 \text{ children tickets}", 1), ("5 kg", "5 cm", 0)],
    "times of day": [
        ("1:15", "2:30", 0), ("2:30", "2:30", 1), ("02:30", "2:30", 1), ("12:00", "12:00", 1),
        (r"\text{4:30 p.m.}", r"\text{4:30 a.m.}", 0), ("1:03 p.m.", r"\text{1:03 PM}", 1),
        ("It starts at 2:30 p.m.", "2:30", 1), ("6:3:1", "4:2:1", 0)],
    "LaTeX without dollar signs": [
        (r"Therefore, \frac{4}{7}.", "7", 0), (r"Therefore, \frac{4}{7}.", "4/7", 1),
        (r"Hence x = \sqrt{5} here.", "5", 0), (r"We get 2\pi in the end.", "2", 0)],
    "one side of a gold equation": [
        ("11a+c", "7 = 11a+c", 0), ("7", "7 = 11a+c", 0), ("11a+c=7", "7 = 11a+c", 1),
        ("0", "a^2+b=0", 0), ("2", r"\sqrt{x}=2", 0), ("3", "|x|=3", 0), ("4", "2x=4", 0)],
    "behind the last equals sign": [
        (r"\boxed{m+n = 113}", "113", 1), (r"$\binom{5}{2} = 10$", "10", 1),
        ("$|AB| = 1$", "1", 1),
        (r"$17 \bmod 5 = 2$", "2", 1), ("m+n = 113", "112", 0), ("x = 1 or x = 2", "2", 0),
        ("1", "|AB| = 1", 1), (r"\boxed{x = 1, y = 2}", "2", 0)],
    "a unit behind a letter": [
        (r"\boxed{12\pi \text{ inches}}", r"12\pi", 1), (r"12\pi", r"12\pi\text{ inches}", 1),
        (r"12x \text{ dollars}", "12x", 1), (r"12\pi \text{ inches}", "12", 0),
        (r"\boxed{125\textnormal{ miles}}", "125", 1), ("6 pi feet", r"6\pi", 1)],
    "the final answer": [
        (r"\boxed{34}. I am confident that the final answer is correct.", "34", 1),
        ("Final Answer: The value of $n$ is $34$.", "34", 1),
        ("Final Answer: The volume of $ABCD$ is 120. I hope so.", "120", 1),
        (r"\boxed{34} at first. The final answer is $35$.", "34", 0)],
    "other spellings": [
        (r"\binom{5}{2}", "10", 1), (r"\binom{n}{2}", r"\frac{n(n-1)}{2}", 1),
        (r"\binom{5}{2}", "11", 0), ("x ∈ [1, 2]", r"x \in [1,2]", 1),
        ("x ∈ [1, 2]", "[1,2)", 0),
        ("1.2e5", "120000", 1), ("1.5E3", "1500", 1), ("1e-5", "0.00001", 1),
        ("1.2e5", "1.2e6", 0),
        ("0.00001", "1e-05", 1), ("0.00002", "1e-05", 0), ("１２", "12", 1), ("１２", "13", 0)],
    "thousands that look like lists": [
        (r"\boxed{1}", "1,001", 0), ("999", "999,999", 0), ("45", "45,045", 0),
        ("1001", "1,001", 1), ("10,000", r"10,000\pi", 0), ("5,000", "5,000x", 0),
        ("12,000/5", "12,000", 0), ("2400", "12,000/5", 1), ("1, 2, ...", "1, 2", 0),
        ("5, 5", "5", 1)],
    "raised and lowered digits": [
        (r"\boxed{10⁵}", "105", 0), ("2¹⁰", "210", 0), ("2¹⁰", "1024", 1), ("10⁴", "10000", 1),
        ("10⁻²", "0.01", 1), ("101₂", "1012", 0), ("101₂", "101_{2}", 1), ("2516_8", "25168", 0),
        ("a₁₂", "a_{12}", 1), ("36 cm²", "36", 1)],
    "signs and large powers": [
        ("|k|", "k", 0), ("|h|", "h", 0), ("|xy|", "xy", 0), ("n^{20}", "n^{20}-1", 0),
        ("z^{16}+1", "z^{16}", 0), (r"\sqrt{x}\sqrt{y}", r"\sqrt{xy}", 1)],
    "where a number begins and ends": [
        ("The area is 36 cm².", "36", 1), ("The area is 36 cm².", "2", 0),
        ("The area is 36 cm^2.", "36", 1), ("Then it is x/2.", "2", 0),
        ("We need x ≥ 5.", "5", 0), ("#### 5 apples and 6 oranges", "5", 0),
        ("The answer is 5 boys and 6 girls.", "5", 0), ("The answer is 5 lbs 6 oz.", "5", 0),
        ("The answer is negative 5.", "5", 0), ("The answer is negative 5.", "-5", 1),
        ("The answer is minus $5$.", "5", 0), ("The answer is:\n\n\\[\n5\n\\]", "5", 1)],
    "fractions and percent": [
        ("3¾", "15/4", 1), ("¼", "0.25", 1), ("3¾", "33/4", 0), ("10½", "10.5", 1),
        (r"\boxed{5\text{ percentage points}}", r"5\%", 1), ("5 percentage", "6%", 0)],
    "words that multiply": [
        (r"\boxed{5\text{ hundred}}", "5", 0), (r"\boxed{5\text{ hundred}}", "500", 1),
        (r"2\operatorname{arctan} x", "2x", 0), ("2 sinh(x)", "2x", 0)],
    "roots without braces": [
        ("2√13", r"2\sqrt{13}", 1), ("√16", "4", 1), ("√16", "6", 0)],
    "read with care": [
        (r"\frac{1}{23}", r"\frac{12}{3}", 0), ("12 0", "120", 0), ("N+1", "n+1", 0),
        (r"f(2) < f(5)", "f(2) < f(1)", 0), ("99999999999", "100000000000", 0),
        ("True", "1", 0),
        ("0 = 0", "x = 1", 0), (r"\{\}", "", 0),
        ("(1,2]", "[1,2)", 0), ("1 < x <= 2", "[1,2)", 0), ("1 < x <= 2", "(1,2]", 1),
        (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", 0)]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_careful_reader_found(kind):
    """Guards one kind of verdict each that was once wrong on real text."""
    wrong = [(prediction, gold) for prediction, gold, right in KINDS[kind]
             if evaluate.is_correct(prediction, gold) is not bool(right)]
    assert wrong == []


@pytest.mark.parametrize("kind", CASES)
def test_grading(kind):
    """Guards each rule of the policy at the head of the section, and its false positives."""
    got = [(text, gold, evaluate.is_correct(text, gold)) for prediction, gold, _ in CASES[kind]
           for text in (prediction, f"So it is $\\boxed{{{prediction}}}$. Done.")]
    want = [case for case in CASES[kind] for _ in range(2)]
    assert [(text, gold) for (text, gold, right), (*_, truth) in zip(got, want, strict=True)
            if right is not bool(truth)] == []


@pytest.mark.parametrize("prediction, gold, right", [
    ("so it is 12.\n#### 12", "12", True), ("#### 1,234", "Half of it.\n#### 1234", True),
    ("#### 12", "13", False), ("#### 4 and then \\boxed{5}", "4", False), ("", "", False),
    (r"\boxed{1} or rather \boxed{2}", "2", True),
        (r"\boxed{1} or rather \boxed{2}", "1", False),
    (r"\boxed{1} and $\boxed{2}$", "1, 2", True), (r"$\boxed{5}$ $\boxed{5}$", "5", True),
    (r"$\boxed{15\frac{39}{40}}$ or $\boxed{\frac{639}{40}}$", "15.975", True),
    (r"\boxed{200} at first. Final Answer: The final answer is $10,455$.", "10455", True),
    (r"\boxed{\text{a \{ b}} then \boxed{7}", "7", True), ("The answer is $18.00.", "18", True),
    ("The answer is therefore 18 of 20.", "18", True), ("it costs 3 dollars", "3", True),
    ("Answer $ 9 $", "9", True), ("Answer \\[ \n 9 \n \\]", "9", True),
    ("Answer $ \n 9 \n $", "9", False),
    ("There are 2 cases, so $x=3$ or, in words, 12 apples.", "12", True),
        ("AZYUK2A", "2", False),
    ("So $x \\geq 5$ is the solution", "x >= 5", True), ("which is 1,000.99m²", "1000.99", True),
    (r"$\boxed{\frac{1}{2}}$", r"We get $\boxed{0.5}$, since 3 is odd", True)])
def test_where_the_answer_stands(prediction, gold, right):
    """Guards the order of the places an answer is looked for."""
    assert evaluate.is_correct(prediction, gold) is right


def theirs(text: str, gold: str) -> bool:
    """The verdict of math-verify, the better of the text as it is and between dollar signs."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    pairs = [(text, gold)]
    if "$" not in text + gold:
        pairs.append((f"${text}$", f"${gold}$"))
    return any(math_verify.verify(math_verify.parse(b), math_verify.parse(a)) for a, b in pairs)


def test_grading_cases(shared):
    """Guards agreement with the labels of four other graders' tests: 205 of 230, 97 % on integers,
    decimals and fractions, no false positive; math-verify, which parses gold and prediction as
    LaTeX or expressions, with $ added where there is none, accepts wrong ones."""
    cases = [json.loads(line) for line in open(shared / "grading_cases.jsonl")]
    cases = [case for case in cases if not case.get("suspect")]
    ours = [evaluate.is_correct(case["prediction"], case["gold"]) for case in cases]
    agree = [got == case["expected"] for got, case in zip(ours, cases, strict=True)]
    simple = [right for right, case in zip(agree, cases, strict=True)
              if case["kind"] in ("integer", "decimal", "fraction", "integer with separators")]
    false = [(case["prediction"], case["gold"]) for got, case in zip(ours, cases, strict=True)
             if got and not case["expected"]]
    reference = sum(theirs(case["prediction"], case["gold"]) == case["expected"]
                    for case in cases[::8])  # math-verify is slow
    assert len(cases) == 230 and len(simple) == 91
    assert sum(agree) >= 205 and sum(simple) >= 0.97 * len(simple)
    assert false == [] and sum(agree[::8]) >= reference - 2


# What is accepted although its label says no: (prediction, gold): why.
DEFENDED: dict[tuple[str, str], str] = {}


def test_grading_cases_2(shared):
    """Guards agreement with 513 more labels from other graders' tests: 93 %, more than math-verify,
    and each false positive defended by name."""
    cases = [json.loads(line) for line in open(shared / "grading_cases_2.jsonl")]
    cases = [case for case in cases if not case["doubtful"]]
    ours = [evaluate.is_correct(case["prediction"], case["gold"]) for case in cases]
    labels = [case["expected"] for case in cases]
    agree = sum(got == label for got, label in zip(ours, labels, strict=True))
    false = {(case["prediction"], case["gold"]) for got, case in zip(ours, cases, strict=True)
             if got and not case["expected"]}
    assert len(cases) == 513 and agree >= 0.93 * len(cases) and false == set(DEFENDED)
    some = [got == label for got, label in zip(ours[::8], labels[::8], strict=True)]
    theirs_some = sum(theirs(case["prediction"], case["gold"]) == case["expected"]
                      for case in cases[::8])  # math-verify is slow
    assert sum(some) >= theirs_some - 2


def test_golds_in_other_spellings(shared):
    """Guards golds of OlympiadBench against themselves, stated and boxed, and golds of MATH500 in
    the spellings that models use."""
    golds = [json.loads(line)["final_answer"][0]
             for line in open(shared / "benchmarks/olympiadbench/test.jsonl")]
    stated = [gold for gold in golds
              if not evaluate.is_correct(f"The final answer is {gold}. I hope so.", gold)]
    assert len(golds) == 675 and len(stated) <= 1, stated
    wrong = []
    for line in open(shared / "benchmarks/math500/test.math_oai.jsonl"):
        gold = json.loads(line)["answer"]
        spellings = [gold.replace("\\frac", "\\dfrac"), gold.replace("-", "−").replace("\\pi", "π")]
        spellings.append(re.sub(r"\\frac\{(\w+)\}\{(\w+)\}", r"{\1/\2}", gold))
        if re.fullmatch("[0-9]{4,6}", gold):
            spellings.append(f"{int(gold):,}")
        if re.fullmatch("[0-9]+", gold):
            spellings += [f"\\text{{{gold}}}", f"x = {gold}", f"{gold}.0"]
        wrong += [(text, gold) for text in spellings
                  if not evaluate.is_correct(f"So \\boxed{{{text}}}.", gold)]
    assert len(wrong) <= 3, wrong


def test_every_gold_answer_of_math_is_read(shared):
    """Guards golds that cannot agree with themselves: all 5000 with a box agree, and next to none
    of 2500 with the next problem's."""
    golds = [json.loads(line)["solution"] for line in open(shared / "benchmarks/math/test.jsonl")]
    boxed = [f"It is $\\boxed{{{evaluate.extract_answer(gold)}}}$, I think." for gold in golds]
    assert all(map(evaluate.is_correct, boxed, golds))
    boxed, golds = boxed[:2500], golds[:2501]
    chance = sum(map(evaluate.is_correct, boxed, golds[1:]))
    plain = sum(evaluate.extract_answer(a) == evaluate.extract_answer(b)
                for a, b in itertools.pairwise(golds))
    assert plain <= chance <= plain + 5


def test_a_changed_sign_or_digit_is_seen(shared):
    """Guards a comparison that is too lenient: of MATH's answers with one digit, sign, bracket or
    letter changed, next to none pass (an exponent of a unit does, since units are dropped)."""
    rng, tried, passed = random.Random(0), 0, []
    for line in itertools.islice(open(shared / "benchmarks/math/test.jsonl"), 1200):
        gold = evaluate.extract_answer(json.loads(line)["solution"])
        changes = [(rng.choice(re.findall("[0-9]", gold) or "?"), rng.choice("123456789"))]
        changes += [("+", "-"), ("-", "+"), ("(", "["), (")", "]"), ("x", "y"), ("\\pi", "2")]
        for old, new in changes:
            if old in gold and old != new:
                tried += 1
                wrong = gold.replace(old, new, 1)
                if evaluate.is_correct(f"\\boxed{{{wrong}}}", gold):
                    passed.append((wrong, gold))
    assert tried > 1200 and len(passed) <= 3, passed


HOSTILE = [
    "9" * 100000, "1." * 50000, "\\boxed{" * 20000, "\\boxed{" * 9000 + "}" * 8999, "{" * 100000,
    "\\boxed{" * 9000 + "}" * 9000, "\\boxed{1}" * 9000, "#### " + "1," * 50000, "(" * 100000,
    "(" * 400 + "1" + ")" * 400, "-" * 900 + "1", "answer is " * 20000, "$" * 100000, "\n" * 100000,
    "\\sqrt" * 190 + "2", "\\exp" * 150 + "9", "9^{9^{9^9}}", "100000000!", "9" + "!" * 300,
    "((((((2^99)^99)^99)^99)^99)^99)", "(x+1)^{499}" * 20, "x<" * 300 + "1", "\\pm1" * 150,
    "10^{400}\\pi", "\\begin{pmatrix}" + "1&" * 50000 + "\\end{pmatrix}", ",".join("abcdefgh" * 50),
    "١٢٣", "1\u200b2", "\u202e12", "1\x002", "²³" * 300, "\ud800 5",
    "__import__('os').system('ls')"]


def test_hostile_text_is_graded_quickly():
    """Guards evaluation of text, and searches whose time grows with the square of its length. (A
    machine short of memory may take its time once; not twice.)"""
    def seconds(shape: str, text: str) -> float:
        start = time.process_time()
        assert evaluate.is_correct(shape, "3") is False, shape[:30]
        if shape == text:
            evaluate.is_correct(shape, f"1+{text[:900]}")
        return time.process_time() - start

    for text in HOSTILE:
        for shape in (text, f"\\boxed{{{text}}}", f"${text}$"):
            assert seconds(shape, text) < 1 or seconds(shape, text) < 1, shape[:30]
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(FRAGMENTS, k=rng.choice((3, 6, 12, 40))))
        gold = rng.choice(("3", "x+1", "1,2", "(1,2)", "x<3", "50%", text + "+0"))
        evaluate.is_correct(text, gold)


FRAGMENTS = [
    *"{}()[]1x^_+-*/|i!%,;=<:& .'e0$", "23", "y_1", "9^9", "10^{400}", "and", "answer is ", "####",
    "²", *(f"\\{name}" for name in ("frac", "sqrt", "sin", "pi", "pm", "cup", "le", "approx", "\\",
                                    "in", "begin{pmatrix}", "end{pmatrix}", "text{ab}", "boxed{",
                                    "binom", "infty", "log_2", "{", "}"))]
