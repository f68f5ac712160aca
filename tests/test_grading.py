"""The grading section of evaluate.py: where the answer stands, and whether it is the gold one."""

import itertools
import json
import logging
import random
import re
import string
import time

import math_verify
import pytest

import evaluate

# (prediction, gold, right?), bare and boxed alike; more in ../shared/data/grading_cases.jsonl
CASES = {
    "number": [
        ("025", "25", 1), ("27", "27.0", 1), ("-5", "5", 0), ("- 18", "-18", 1), ("−18", "-18", 1),
        ("+18", "18", 1), ("1,000", "1000", 1), ("18.01", "18", 0), ("1,00", "1000", 0),
        ("1000000007", "1000000008", 0), ("12345678901234567890", "12345678901234567891", 0),
        ("0", "", 0)],
    "fraction": [
        (r"\frac12", "0.5", 1), (r"\dfrac{3}{4}", "3/4", 1), (r"\frac{-1}{2}", r"-\frac{1}{2}", 1),
        (r"\frac{1}{-2}", "-0.5", 1), (r"\frac{\frac12}{3}", "1/6", 1), (r"\frac3{3}", "1", 1),
        (r"\frac{3}{8}", r"\frac{3}{16}", 0), ("1/0", "1/0", 1), ("1/0", "2/0", 0),
        ("-2 1/2", "-1.5", 0), (r"1\frac{1}{10}", r"1\frac{1}{9}", 0),
        (r"0.\overline{3}", "0.3", 0)],
    "rounded": [
        ("0.3333", "1/3", 0), ("0.0833333333333", "1/12", 1), ("0.3334", "1/3", 0),
        ("1/3", "0.3", 0), ("1.5708", r"\pi/2", 0), ("1.57", r"\pi/2", 0), ("0.25", "0.2499", 0),
        ("0.2499", "0.25", 0), ("100", "99.9999", 0), (r"\frac{22}{7}", r"\pi", 0),
        ("(0.6,2.5]", r"(\frac{3}{5},\frac{5}{2}]", 1), ("1/3", "0.33", 0)],
    "percent, money, unit": [
        ("5%", "5", 1), ("5%", "50%", 0), ("5", r"5\%", 1), (r"\$18", "18", 1),
        (r"\$1,234.50", "1234.5", 1), ("28 pct", "28%", 1), ("5 cm", "5", 1),
        (r"5\text{ cm}", "5", 1), ("5 apples", "5", 1), ("18 dollars", "18", 1), ("5 km", "5 m", 0),
        ("0.64N", "0.64", 0)],
    "tuple, interval": [
        ("(1, 2)", "(1,2)", 1), ("(1,2)", "(2,1)", 0), ("(1,1)", "1", 0), ("[1,2]", "(1,2)", 0),
        ("[0,9)", "[0,1)", 0), ("(4,10]", "(4,10)", 0), ("[12,102]", "(12,102)", 0),
        ("(x+5]^2", "(x+5)^2", 0), ("(1,4.5)", r"(1,\frac{9}{2})", 1), ("(1,200)", "(1, 200)", 1),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", 1), ("1", "-[0,1)", 0)],
    "set, list": [
        ("1,2", "2,1", 1), (r"\{1,2\}", "2,1", 1), ("12, 13", "12", 0), ("12", "12, 13", 0),
        ("x = 1 or x = 2", "1,2", 1), ("1 and 2", "1, 2", 1), ("19, 46, and 82", "82,46,19", 1),
        (r"x \in \{1,2\}", r"\{2,1\}", 1), ("1,1,2", "1,2,2", 0), (r"\pm 3", "3", 0),
        ("3", r"\pm 3", 0), (r"(\pm 1, 2)", "(1,2)", 0)],
    "name = value": [
        ("x^2-1 = (x-1)(x+1) = 3", "3", 1), ("x=5", "5", 1), ("5", "x=5", 1), ("x=5", "x=6", 0),
        ("y=5", "x=5", 0), ("x_2=5, x_1=4", "x_1=5, x_2=4", 0), ("x = 5+6 = 11", "11", 1),
        (r"x\approx11", "11", 1), (r"x = 1/3 \approx 0.3", "x = 1/3", 1), ("0", "a^2+b=0", 0),
        ("AB=4,CD=5", "4, 5", 1), ("x=2,y=1", "x=1,y=2", 0)],
    "equation, inequality": [
        ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}", 1), ("x^2=1-y^2", "x^2+y^2=1", 1),
        ("x^{2}-y^{2}=1", "x^2+y^2=1", 0), ("y=2x+1", "2x+1", 1), ("y=2x+1", "x=2y+1", 0),
        ("2x=4", "x=2", 1), ("2", "2x=4", 0), ("x<5", "x>5", 0), ("x<=5", "x<5", 0),
        ("x > 5", r"[5,\infty)", 0), (r"x \neq 3", "3", 0), ("1 < 2 = x < 3", "2", 0)],
    "matrix, base, ratio, time": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", 0),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 0),
        ("[1,2][3,4]", "11", 0), ("101", "101_2", 0), ("2516_{8}", "2516_8", 1), ("3:4", "4:3", 0),
        ("12:00", "12:00", 1), ("12:30", "12:31", 0)],
    "text, choice": [
        ("(A)", "A", 1), ("A.", "A", 1), (r"\textbf{(B)}", "B", 1), ("B", "A", 0), ("a", "A", 0),
        ("even", r"\text{Even}", 1), ("odd", "even", 0), ("no solution", "one solution", 0),
        (r"\text{no solution}", "no solution", 1), ("dog bites man", "man bites dog", 0)],
    "formula": [
        ("(x+1)^2", "x^2+2x+1", 1), ("(x+1)^2", "x^2+1", 0), (r"\sqrt{8}", r"2\sqrt{2}", 1),
        (r"\frac{\sqrt{2}}2", r"\frac{1}{\sqrt2}", 1), (r"\sqrt{x^2}", "x", 0),
        (r"\sin^2 x", r"\sin x^2", 0), ("e^{x}e^{y}", "e^{x+y}", 1), (r"\log_2 8", "3x", 0),
        (r"\sin^{-1}(1)", "1", 0), ("n!", "n", 0), ("xy", "yx", 1), ("n(n+1)", "n^2+n", 1),
        (r"\frac{1}{x+1}+\frac{1}{x-1}", r"\frac{2x}{x^2-1}", 1), ("(1+i)^2", "2i", 1)]}


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
        ("The answer is 256 + 37 = 293 apples.", "256", 0), ("It is 3 * 4 = 12 in all.", "12", 1),
        ("The answer is 3 * 4 = 12 in all.", "3", 0), ("The answer is 3x + 5 dollars.", "5", 0)],
    "negated": [
        ("The answer is not 5 but 7", "5", 0), ("The answer is not 5 but 7", "7", 1),
        ("The answer is 7, not 5.", "5", 0), ("The answer isn't 5; it is 7.", "7", 1),
        ("The answer is 7 rather than 5", "5", 0), ("So there are 7 ways, not $5$.", "7", 1)],
    "two units": [
        (r"\boxed{1 \text{ hour } 20 \text{ minutes}}", "20", 0), ("1 hour 20 minutes", "20", 0),
        ("It takes 1 hour and 20 minutes.", "20", 0),
        (r"\boxed{5 \text{ feet } 3 \text{ inches}}", "15", 0), ("2 m 500 mm", "2500", 0),
        ("It weighs 3 pounds 4 ounces.", "4", 0)],
    "words that change a number": [
        ("9 p.m.", "9 a.m.", 0), ("They meet at 9 PM.", "9 a.m.", 0),
        ("They meet at 9 a.m.", "9 p.m.", 0), ("We meet at 9 a.m. sharp.", "9 a.m.", 1),
        ("3.5 billion", "3.5 million", 0), ("3.5", "3.5 million", 0), ("5 kg", "5 cm", 0),
        (r"10\% increase", r"10\% decrease", 0), ("65 tickets", r"65 \text{ children tickets}", 1)],
    "times of day": [
        ("1:15", "2:30", 0), ("2:30", "2:30", 1), ("02:30", "2:30", 1), ("12:00", "12:00", 1),
        (r"\text{4:30 p.m.}", r"\text{4:30 a.m.}", 0), ("6:3:1", "4:2:1", 0)],
    "LaTeX without dollar signs": [
        (r"Therefore, \frac{4}{7}.", "7", 0), (r"Hence x = \sqrt{5} here.", "5", 0),
        (r"We get 2\pi in the end.", "2", 0)],
    "one side of a gold equation": [
        ("11a+c", "7 = 11a+c", 0), ("7", "7 = 11a+c", 0), ("11a+c=7", "7 = 11a+c", 1),
        ("0", "a^2+b=0", 0), ("2", r"\sqrt{x}=2", 0), ("3", "|x|=3", 0)],
    "behind the last equals sign": [
        (r"\boxed{m+n = 113}", "113", 1), (r"$\binom{5}{2} = 10$", "10", 1), ("$|AB| = 1$", "1", 1),
        ("m+n = 113", "112", 0), ("x = 1 or x = 2", "2", 0), (r"\boxed{x = 1, y = 2}", "2", 0)],
    "a unit behind a letter": [
        (r"\boxed{12\pi \text{ inches}}", r"12\pi", 1), (r"12\pi", r"12\pi\text{ inches}", 1),
        (r"12x \text{ dollars}", "12x", 1), (r"12\pi \text{ inches}", "12", 0),
        (r"\boxed{125\textnormal{ miles}}", "125", 1), ("6 pi feet", r"6\pi", 1)],
    "the final answer": [
        (r"\boxed{34}. I am confident that the final answer is correct.", "34", 1),
        ("Final Answer: The value of $n$ is $34$.", "34", 1),
        ("Final Answer: The volume of $ABCD$ is 120. I hope so.", "120", 1)],
    "other spellings": [
        (r"\binom{5}{2}", "11", 0), ("x ∈ [1, 2]", r"x \in [1,2]", 1), ("x ∈ [1, 2]", "[1,2)", 0),
        ("1.2e5", "120000", 1), ("1.2e5", "1.2e6", 0), ("2√13", r"2\sqrt{13}", 1), ("√16", "4", 1)],
    "thousands that look like lists": [
        (r"\boxed{1}", "1,001", 0), ("999", "999,999", 0), ("45", "45,045", 0),
        ("1001", "1,001", 1), ("10,000", r"10,000\pi", 0), ("5,000", "5,000x", 0)],
    "raised and lowered digits": [
        (r"\boxed{10⁵}", "105", 0), ("2¹⁰", "210", 0), ("101₂", "1012", 0), ("2516_8", "25168", 0),
        ("36 cm²", "36", 1)],
    "signs and large powers": [
        ("|k|", "k", 0), ("|h|", "h", 0), ("|xy|", "xy", 0), ("n^{20}", "n^{20}-1", 0),
        ("z^{16}+1", "z^{16}", 0)],
    "where a number begins and ends": [
        ("The area is 36 cm².", "36", 1), ("The area is 36 cm².", "2", 0),
        ("The area is 36 cm^2.", "36", 1), ("Then it is x/2.", "2", 0), ("We need x ≥ 5.", "5", 0),
        ("#### 5 apples and 6 oranges", "5", 0)],
    "fractions and percent": [
        ("3¾", "33/4", 0), (r"\boxed{5\text{ percentage points}}", r"5\%", 1),
        ("5 percentage", "6%", 0)],
    "words that multiply": [
        (r"\boxed{5\text{ hundred}}", "5", 0), (r"2\operatorname{arctan} x", "2x", 0),
        ("2 sinh(x)", "2x", 0)],
    "read with care": [
        (r"\frac{1}{23}", r"\frac{12}{3}", 0), ("12 0", "120", 0), ("N+1", "n+1", 0),
        ("f(2) < f(5)", "f(2) < f(1)", 0), ("99999999999", "100000000000", 0), ("True", "1", 0)],
    "answer tags and thinking": [
        ("<think>6 * 3</think> <answer> 18 </answer>", "18", 1),
        ("</think> <answer> 18 </answer>", "18", 1),
        ("So 17 is wrong. </think> <answer>18</answer>", "17", 0),
        ("</think> <answer> The total is 120 + 20 = 140 pages. </answer>", "140", 1),
        ("</think>\n<answer>\n**42**\n</answer>", "42", 1)],
    "sums and thousands": [
        ("#### 1,050,500", "1050500", 1), (r"\boxed{371043400}", "371,043,400", 1),
        ("The answer is 1,360 - 142 = 1,218 meals.", "1218", 1),
        ("The answer is 1,360 - 142 = 1,218 meals.", "1360", 0),
        ("First 7 * 2, which gives 7 *", "7", 0), (r"\boxed{1, 234}", "1234", 0)],
    "a box that holds nothing": [
        (r"I put it in \boxed{}. So it is \boxed{5}", "5", 1),
        (r"It is \boxed{5}, in \boxed{}.", "5", 1),
        (r"It goes in \boxed{}. The answer is 5.", "5", 1), (r"\boxed{ } and 5", "6", 0)],
    "a minus sign before the box": [
        (r"y=-\boxed{8}", "8", 0), (r"y=-\boxed{8}", "-8", 1), (r"$-\boxed{\frac12}$", "0.5", 0)],
    "functions that are no factors": [
        (r"\log_2(3x)", r"3\log_2(x)", 0), (r"\arctan(2)", r"2\arctan(1)", 0),
        ("f(x+y)", "f(x)+f(y)", 0), (r"\lfloor xy\rfloor", r"x\lfloor y\rfloor", 0),
        (r"\sin(2x)", r"2\sin(x)", 0), (r"\sin^2(2x)", r"2\sin^2(x)", 0)],
    "all but": [
        ("all real numbers except x=-4", "-4", 0),
        (r"\boxed{\text{all real numbers except }x=-4}", "-4", 0),
        ("The set is all real numbers except $x=-4$ and $x=1$.", "1", 0),
        (r"\boxed{5 \text{ or more}}", "5", 0), (r"\boxed{\text{at least } 5}", "5", 0)],
    "names of coordinates, dates": [
        (r"\boxed{y=3, x=4}", "(3,4)", 0), ("2020-01-02", "2020-02-01", 0),
        (r"\boxed{3/6/2020}", "1/2/2020", 0), (r"\boxed{24 \text{ cm}^3}", r"24 \text{ cm}^2", 0),
        (r"40 \text{ minutes}", r"40\text{ min}", 1)],
    "several numbers in a sentence": [
        ("She has 12 of the 40 left.", "40", 0), ("The probability is 1 out of 4.", "4", 0),
        ("So it takes 3 trips of 4 each.", "4", 0), ("So the polynomial is x^2 - 5x + 6.", "6", 0),
        ("The midpoint is (3, 4).", "4", 0), ("The midpoint is (3, 4).", "(3,4)", 1),
        ("So x = -2 or x = 2.", "2", 0)],
    "where it stands": [
        ("#### 1,234", "Half of it.\n#### 1234", 1), ("AZYUK2A", "2", 0), ("", "", 0),
        ("#### 4 and then \\boxed{5}", "4", 0), (r"\boxed{1} or rather \boxed{2}", "2", 1),
        (r"\boxed{1} or rather \boxed{2}", "1", 0), (r"$\boxed{5}$ $\boxed{5}$", "5", 1),
        (r"\boxed{\boxed{5}}", "5", 1), ("The answer is $18.00.", "18", 1), ("A: 5", "5", 1),
        ("it costs 3 dollars", "3", 1), ("Answer \\[ \n 9 \n \\]", "9", 1),
        ("There are 2 cases, so $x=3$ or, in words, there are 12 apples.", "12", 1),
        ("Answer $ 9 $", "9", 1), ("So $x \\geq 5$ is the solution", "x >= 5", 1),
        (r"$\boxed{\frac{1}{2}}$", r"We get $\boxed{0.5}$, since 3 is odd", 1)]}


@pytest.mark.parametrize("kind", [*KINDS, *CASES])
def test_grading(kind):
    """Guards each rule of the policy at the head of the section, and kinds of verdicts that were
    once wrong on real text."""
    cases = list(KINDS.get(kind, []))
    for prediction, gold, right in CASES.get(kind, []):
        cases += [(text, gold, right) for text in (prediction, f"It is $\\boxed{{{prediction}}}$.")]
    assert [case for case in cases if evaluate.is_correct(*case[:2]) is not bool(case[2])] == []


def theirs(text: str, gold: str) -> bool:
    """The verdict of math-verify, the better of the text as it is and between dollar signs."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    pairs = [(text, gold)]
    if "$" not in text + gold:
        pairs.append((f"${text}$", f"${gold}$"))
    return any(math_verify.verify(math_verify.parse(b), math_verify.parse(a)) for a, b in pairs)


@pytest.mark.parametrize("name, count, least, accepted", [
    ("real_answers", 3018, 2990, 0), ("grading_cases", 230, 175, 1),
    ("grading_cases_2", 513, 470, 0), ("grading_cases_3", 391, 300, 3)])
def test_labeled_answers(shared, name, count, least, accepted):
    """Guards agreement with settled verdicts on what models wrote and with the labels of other
    graders' tests, and wrong answers that are accepted, in a box none. In a sample, math-verify
    agrees with less of them, but for its own tests."""
    cases = [json.loads(line) for line in open(shared / f"{name}.jsonl")]
    cases = [case for case in cases if not (case.get("suspect") or case.get("doubtful"))]
    labels = [case.get("correct", case.get("expected")) for case in cases]
    ours = [evaluate.is_correct(case["prediction"], case["gold"]) for case in cases]
    false = [case["prediction"] for got, label, case in zip(ours, labels, cases, strict=True)
             if got and not label]
    agree = [got == label for got, label in zip(ours, labels, strict=True)]
    assert len(cases) == count and sum(agree) >= least
    assert len(false) <= accepted and not any("boxed" in text for text in false), false
    if name != "grading_cases":  # half of these are its own tests
        step = len(cases) // 40  # it is slow
        reference = sum(theirs(case["prediction"], case["gold"]) == label
                        for case, label in zip(cases[::step], labels[::step], strict=True))
        assert sum(agree[::step]) >= reference - 1


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
    assert sum(map(evaluate.is_correct, boxed[:2500], golds[1:2501])) <= 24  # 19 are the same


def test_a_changed_sign_or_digit_is_seen(shared):
    """Guards a comparison that is too lenient: of MATH's answers with one digit, sign, bracket or
    letter changed, none passes."""
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
    assert tried > 1200 and passed == []


def test_letters_are_of_both_signs():
    """Guards |x| for x: each letter, and each product of two, is negative at some point."""
    letters = [letter for letter in string.ascii_letters if letter not in "ei"]
    names = [*letters, *map("".join, itertools.combinations(letters, 2))]
    assert [name for name in names
            if evaluate.is_correct(f"\\sqrt{{{'^2'.join(name)}^2}}", name)] == []


HOSTILE = [
    "9" * 100000, "1." * 50000, "1:" * 50000, "<" * 100000, "{" * 100000, "(" * 100000,
    "\\boxed{" * 20000, "\\boxed{" * 9000 + "}" * 8999, "\\boxed{" * 9000 + "}" * 9000,
    "\\boxed{1}" * 9000, "#### " + "1," * 50000, "$" * 100000, "\n" * 100000,
    "(" * 400 + "1" + ")" * 400, "-" * 900 + "1", "answer is " * 20000, "not " * 25000,
    "\\sqrt" * 190 + "2", "\\exp" * 150 + "9", "9^{9^{9^9}}", "100000000!", "9" + "!" * 300,
    "((((((2^99)^99)^99)^99)^99)^99)", "(x+1)^{499}" * 20, "x<" * 300 + "1", "\\pm1" * 150,
    "10^{400}\\pi", "\\begin{pmatrix}" + "1&" * 50000 + "\\end{pmatrix}", ",".join("abcdefgh" * 18),
    "١٢٣", "1\u200b2", "\u202e12", "1\x002", "²³" * 300, "\ud800 5",
    "__import__('os').system('ls')"]


def test_hostile_text_is_graded_quickly():
    """Guards evaluation of text, and searches whose time grows with the square of its length. (A
    machine short of memory may take its time once; not twice.)"""
    def seconds(shape: str, text: str) -> float:
        start = time.process_time()
        assert evaluate.is_correct(shape, "3") is False, shape[:30]
        if shape == text:
            evaluate.is_correct(shape, f"1+{text[:290]}")
        return time.process_time() - start

    for text in HOSTILE:
        for shape in (text, f"\\boxed{{{text}}}", f"${text}$"):
            assert seconds(shape, text) < 0.3 or seconds(shape, text) < 0.3, shape[:30]
