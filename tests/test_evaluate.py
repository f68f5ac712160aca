"""evaluate.py: grading, answers, accuracy, and that a teacher's right answers train a student."""

import itertools
import json
import logging
import math
import random
import re
import sys
import time
from argparse import Namespace

import math_verify
import numpy as np
import pytest
import torch
from conftest import make_hf
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import evaluate
import train
from model import BadInput, Config, Transformer

# (prediction, gold, right?), bare and boxed alike; more in ../shared/data/grading_cases.jsonl
CASES = {
    "number": [
        ("025", "25", 1), ("27", "27.0", 1), ("-5", "5", 0), ("- 18", "-18", 1), ("−18", "-18", 1),
        ("+18", "18", 1), ("1,000", "1000", 1), ("1 000", "1000", 1), ("10{,}000", "10000", 1),
        (r"32,\! 349", "32349", 1), ("18.0", "18", 1), ("18.01", "18", 0), ("1.000", "1", 1),
        ("1,00", "1000", 0), ("12,34", "12.34", 1), ("1000000007", "1000000008", 0),
        ("12345678901234567890", "12345678901234567891", 0), ("0.1+0.2", "0.3", 1),
        (r"1.23\times10^{5}", "123000", 1), (r"6\cdot 10^{-3}", "0.006", 1), ("0", "", 0)],
    "fraction": [
        (r"\frac12", "0.5", 1), (r"\dfrac{3}{4}", "3/4", 1), (r"\frac{-1}{2}", r"-\frac{1}{2}", 1),
        (r"\frac{1}{-2}", "-0.5", 1), (r"\frac{\frac12}{3}", "1/6", 1), (r"\frac3{3}", "1", 1),
        (r"\frac{3}{8}", r"\frac{3}{16}", 0), ("1/0", "1/0", 1), ("1/0", "2/0", 0),
        (r"2\frac{1}{2}", "2.5", 1), ("2 1/2", "5/2", 1), ("-2 1/2", "-2.5", 1),
        ("-2 1/2", "-1.5", 0), (r"1\frac{1}{10}", r"1\frac{1}{9}", 0),
        (r"0.\overline{3}", "1/3", 1), (r"0.\overline{3}", "0.3", 0)],
    "rounded": [
        ("0.3333", "1/3", 1), ("0.333", "1/3", 0), ("0.3334", "1/3", 0), ("1/3", "0.33", 1),
        ("1/3", "0.3", 0), ("1.5708", r"\pi/2", 1), ("1.57", r"\pi/2", 0), ("0.25", "0.2499", 0),
        ("0.2499", "0.25", 0), ("100", "99.9999", 0), (r"\frac{22}{7}", r"\pi", 0),
        ("(0.6,2.6667]", r"(\frac{3}{5},\frac{8}{3}]", 1), ("0.24996", "0.25", 1)],
    "percent, money, unit": [
        ("5%", "5", 1), ("0.05", "5%", 1), ("5%", "50%", 0), (r"50\%", "0.5", 1), ("5", r"5\%", 1),
        ("1/2", "50%", 1), (r"\$18", "18", 1), (r"\$1,234.50", "1234.5", 1), ("28 pct", "28%", 1),
        ("5 cm", "5", 1), (r"5\text{ cm}", "5", 1), ("5 apples", "5", 1), ("18 dollars", "18", 1),
        ("10 square feet", "10", 1), (r"15\mbox{ cm}^2", "15", 1), ("5 km", "5 m", 0),
        (r"90^\circ", "90", 1), ("90 degrees", r"90^{\circ}", 1), ("0.64N", "0.64", 0),
        (r"3\sqrt{2}\text{ inches}", r"3\sqrt2", 1), (r"8\sqrt{3} \text { square inches}",
                                                     r"8\sqrt{3}", 1)],
    "tuple, interval": [
        ("(1, 2)", "(1,2)", 1), ("(1,2)", "(2,1)", 0), ("(1,1)", "1", 0),
        ("[1,2]", "(1,2)", 0), ("[0,9)", "[0,1)", 0), ("(4,10]", "(4,10)", 0),
        ("[12,102]", "(12,102)", 0), ("(x+5]^2", "(x+5)^2", 0),
        ("1,3", "(1,3)", 1), ("(1,4.5)", r"(1,\frac{9}{2})", 1), ("(1,200)", "(1, 200)", 1),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)", 1), ("1", "-[0,1)", 0),
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
        ("y=2x", "f(x)=2x", 1), ("x_2=5, x_1=4", "x_1=5, x_2=4", 1), ("x = 5+6 = 11", "11", 1),
        (r"x\approx11", "11", 1), (r"x = 1/3 \approx 0.3", "x = 1/3", 1), ("0", "a^2+b=0", 0),
        ("AB=4,CD=5", "4, 5", 1), ("x=1,y=2", "(1,2)", 1), ("x=1,y=2", "y=2,x=1", 1),
        ("x=2,y=1", "x=1,y=2", 0), ("p=5,q=2;p=7,q=2", "(7,2),(5,2)", 1),
        ("(p,q)=(3,2)", "(3,2)", 1),
        (r"\Phi (x,y)=\frac{x+1}{2y}", r"\frac{x}{2y} + \frac{1}{2y}", 1), ("f(x)=2x", "2x", 1)],
    "equation, inequality": [
        ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}", 1), ("x^2=1-y^2", "x^2+y^2=1", 1),
        ("x^{2}-y^{2}=1", "x^2+y^2=1", 0), ("y=2x+1", "2x+1", 1), ("y=2x+1", "x=2y+1", 0),
        ("2x=4", "x=2", 1), ("2", "2x=4", 0), (r"5 \ge x", r"x \leq 5", 1), ("-x > -1", "x < 1", 1),
        ("x<5", "x>5", 0), ("x<=5", "x<5", 0), (r"x \ge 5", r"[5,\infty)", 1),
        ("x > 5", r"[5,\infty)", 0), (r"-3<x\le 2", "(-3,2]", 1), ("0<f(x)<1", "(0,1)", 1),
        (r"x \neq 3", "x != 3", 1), (r"x \neq 3", "3", 0), ("1 < 2 = x < 3", "2", 0)],
    "matrix, base, ratio, time": [
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", 1),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", 0),
        (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", 0),
        (r"\begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} \begin{pmatrix}5\\6\end{pmatrix}",
         r"\begin{pmatrix}17\\39\end{pmatrix}", 1), ("[1,2][3,4]", "11", 0),
        ("101_2", "5", 1), ("101", "101_2", 0), (r"2516_{8}", "2516_8", 1), ("7:32", "14:64", 1),
        ("3:4", "4:3", 0), ("12:00", "12:00", 1), ("12:30", "12:31", 0)],
    "text, choice": [
        ("(A)", "A", 1), ("A.", "A", 1), (r"\textbf{(B)}", "B", 1), ("B", "A", 0), ("a", "A", 0),
        ("even", r"\text{Even}", 1), ("odd", "even", 0), ("no solution", "one solution", 0),
        (r"\text{no solution}", "no solution", 1), ("dog bites man", "man bites dog", 0)],
    "formula": [
        ("(x+1)^2", "x^2+2x+1", 1), ("(x+1)^2", "x^2+1", 0), (r"\sqrt{8}", r"2\sqrt{2}", 1),
        (r"\frac{\sqrt{2}}2", r"\frac{1}{\sqrt2}", 1), (r"\sqrt{x^2}", "|x|", 1),
        (r"\sqrt{x^2}", "x", 0), (r"\sqrt[3]{-27}", "-3", 1), ("x^{1/3}", r"\sqrt[3]{x}", 1),
        (r"\tan^2 x + 1", r"\sec^2 x", 1), (r"\sin^2 x", r"\sin x^2", 0),
        ("e^{x}e^{y}", "e^{x+y}", 1),
        (r"\log_2 8", "3", 1), (r"\sin^{-1}(1)", r"\frac{\pi}{2}", 1), ("n!", "n(n-1)!", 1),
        ("xy", "yx", 1),
        ("2xyz", "2", 0), ("2", "2xyz", 0), ("2xyz", "2xyz", 1), ("a_1", "a_2", 0),
        ("a_{1}", "a_1", 1), ("v^2_0", "v_0^2", 1),
        ("(1+i)^2", "2i", 1), (r"\frac{x}{2}", r"\frac{2}{x}", 0), ("2^{x}", "x^{2}", 0),
        (r"\frac{1}{x+1}+\frac{1}{x-1}", r"\frac{2x}{x^2-1}", 1), ("x", "y", 0),
        (r"16/3 \pi", r"\frac{16\pi}{3}", 1), ("10^{10}", "10^{10^{10^{10}}}", 0)]}


@pytest.mark.parametrize("kind", CASES)
def test_grading(kind):
    """Guards each rule of the policy at the head of evaluate.py, and its false positives."""
    got = [(text, gold, evaluate.is_correct(text, gold)) for prediction, gold, _ in CASES[kind]
           for text in (prediction, f"So it is $\\boxed{{{prediction}}}$. Done.")]
    want = [case for case in CASES[kind] for _ in range(2)]
    assert [(text, gold) for (text, gold, right), (*_, truth) in zip(got, want, strict=True)
            if right is not bool(truth)] == []


@pytest.mark.parametrize("prediction, gold, right", [
    ("so it is 12.\n#### 12", "12", True), ("#### 1,234", "Half of it.\n#### 1234", True),
    ("#### 12", "13", False), ("#### 4 and then \\boxed{5}", "4", False), ("", "", False),
    (r"\boxed{1} or rather \boxed{2}", "2", True), (r"\boxed{1} or rather \boxed{2}", "1", False),
    (r"\boxed{1} and $\boxed{2}$", "1, 2", True), (r"$\boxed{5}$ $\boxed{5}$", "5", True),
    (r"$\boxed{15\frac{39}{40}}$ or $\boxed{\frac{639}{40}}$", "15.975", True),
    (r"\boxed{200} at first. Final Answer: The final answer is $10,455$.", "10455", True),
    (r"\boxed{\text{a \{ b}} then \boxed{7}", "7", True), ("The answer is $18.00.", "18", True),
    ("The answer is therefore 18 of 20.", "18", True), ("it costs 3 dollars", "3", True),
    ("Answer $ 9 $", "9", True), ("Answer \\[ \n 9 \n \\]", "9", True),
    ("Answer $ \n 9 \n $", "9", False),
    ("There are 2 cases, so $x=3$ or, in words, 12 apples.", "12", True), ("AZYUK2A", "2", False),
    ("So $x \\geq 5$ is the solution", "x >= 5", True), ("it is 1,000.99m²", "1000.99", True),
    (r"$\boxed{\frac{1}{2}}$", r"We get $\boxed{0.5}$, since 3 is odd", True)])
def test_where_the_answer_stands(prediction, gold, right):
    """Guards the order of the places an answer is looked for."""
    assert evaluate.is_correct(prediction, gold) is right


def test_grading_cases(shared):
    """Guards agreement with the labels of four other graders' tests: 95 % in all, 99 % on integers,
    decimals and fractions, no false positive, and at least as many as math-verify, which parses
    gold and prediction as LaTeX or expressions, with $ added where there is none."""
    cases = [json.loads(line) for line in open(shared / "grading_cases.jsonl")]
    cases = [case for case in cases if not case.get("suspect")]
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def theirs(text, gold):
        pairs = [(text, gold), *([(f"${text}$", f"${gold}$")] * ("$" not in text + gold))]
        return any(math_verify.verify(math_verify.parse(b), math_verify.parse(a)) for a, b in pairs)

    ours = [evaluate.is_correct(case["prediction"], case["gold"]) for case in cases]
    agree = [got == case["expected"] for got, case in zip(ours, cases, strict=True)]
    simple = [right for right, case in zip(agree, cases, strict=True)
              if case["kind"] in ("integer", "decimal", "fraction", "integer with separators")]
    false = [(case["prediction"], case["gold"]) for got, case in zip(ours, cases, strict=True)
             if got and not case["expected"]]
    reference = sum(theirs(case["prediction"], case["gold"]) == case["expected"] for case in cases)
    assert len(cases) == 230 and len(simple) == 91
    assert sum(agree) >= 0.95 * len(cases) and sum(simple) >= 0.99 * len(simple)
    assert false == [] and sum(agree) >= reference


def test_every_gold_answer_of_math_is_read(shared):
    """Guards golds that cannot agree with themselves in other words: all 5000 with a box agree, and
    next to none with the next problem's."""
    golds = [json.loads(line)["solution"] for line in open(shared / "benchmarks/math/test.jsonl")]
    boxed = [f"It is $\\boxed{{{evaluate.extract_answer(gold)}}}$, I think." for gold in golds]
    assert all(map(evaluate.is_correct, boxed, golds))
    chance = sum(map(evaluate.is_correct, boxed, golds[1:]))
    plain = sum(evaluate.extract_answer(a) == evaluate.extract_answer(b)
                for a, b in itertools.pairwise(golds))
    assert plain <= chance <= plain + 5


def test_a_changed_sign_or_digit_is_seen(shared):
    """Guards a comparison that is too lenient: of MATH's answers with one digit, sign, bracket or
    letter changed, next to none pass (an exponent of a unit does, since units are dropped)."""
    rng, tried, passed = random.Random(0), 0, []
    for line in itertools.islice(open(shared / "benchmarks/math/test.jsonl"), 2500):
        gold = evaluate.extract_answer(json.loads(line)["solution"])
        changes = [(rng.choice(re.findall("[0-9]", gold) or "?"), rng.choice("123456789"))]
        changes += [("+", "-"), ("-", "+"), ("(", "["), (")", "]"), ("x", "y"), ("\\pi", "2")]
        for old, new in changes:
            if old in gold and old != new:
                tried += 1
                wrong = gold.replace(old, new, 1)
                if evaluate.is_correct(f"\\boxed{{{wrong}}}", gold):
                    passed.append((wrong, gold))
    assert tried > 2500 and len(passed) <= 3, passed


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
        evaluate.is_correct(shape, f"1+{text[:900]}")
        return time.process_time() - start

    for text in HOSTILE:
        for shape in (text, f"\\boxed{{{text}}}", f"${text}$"):
            assert seconds(shape, text) < 1 or seconds(shape, text) < 1, shape[:30]
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(FRAGMENTS, k=rng.choice((3, 6, 12, 40))))
        gold = rng.choice(("3", "x+1", "1,2", "(1,2)", "x<3", "50%", text + "+0"))
        evaluate.is_correct(text, gold)


FRAGMENTS = [
    *"{}()[]1x^_+-*/|i!%,;=<:& .'e0$", "23", "y_1", "9^9", "10^{400}", "and", "answer is ", "####",
    "²", *(f"\\{name}" for name in ("frac", "sqrt", "sin", "pi", "pm", "cup", "le", "approx", "\\",
                                    "in", "begin{pmatrix}", "end{pmatrix}", "text{ab}", "boxed{",
                                    "binom", "infty", "log_2", "{", "}"))]


@pytest.fixture(scope="module")
def problems():
    rng = random.Random(5)
    return [{"id": i, **data.toy_trace(rng)} for i in range(30)]


def test_answers_do_not_depend_on_batching(toy_model, problems):
    """Guards seeds by batch or by row: any batch size and order give the same answers, samples of
    one problem differ, and another seed gives others."""
    model, tokenizer = data.load(toy_model)

    def texts(batch_size, seed=0, chosen=problems):
        records = sorted(evaluate.answers(model, tokenizer, chosen, 3, 1.0, max_new_tokens=9,
                                          batch_size=batch_size, seed=seed),
                         key=lambda record: (record["id"], record["sample"]))
        assert [(r["id"], r["sample"]) for r in records] == [(p["id"], k) for p in chosen
                                                              for k in range(3)]
        return [record["response"] for record in records]

    assert texts(7) == texts(90)
    assert texts(7, chosen=problems[:11]) == texts(7)[:33]
    assert len(set(texts(7))) > 60 and texts(7) != texts(7, seed=1)
    twins = texts(7, chosen=[{**problems[0], "id": name} for name in ("a", "b")])
    assert twins[:3] != twins[3:]  # the same question, asked twice


class Script:
    """Stands for a model that answers with given texts, in the order of the prompts' lengths."""

    def __init__(self, tokenizer, replies, context=99):
        self.tokenizer, self.replies, self.eos_token_ids = tokenizer, replies, [tokenizer.end]
        self.folder, self.config = "script", Namespace(max_position_embeddings=context)

    def sample(self, prompts, max_new_tokens, *_, **__):
        replies = [self.replies[self.tokenizer.backend.decode(p).split()[0]] for p in prompts]
        ids = [[*self.tokenizer.encode(text), self.tokenizer.end][:max_new_tokens]
               for text in replies]
        return [(row, [-0.123456] * len(row)) for row in ids]


def test_verdicts_and_summary(toy_model):
    """Guards credit for text that was cut off, and a standard error over answers instead of over
    problems. Problem 1 is right, 2 wrong, 3 cut off although its last number is right."""
    tokenizer = data.Tokenizer(toy_model)
    model = Script(tokenizer, {"1": "f=5 #### 5", "2": "f=5 #### 4",
                               "3": "a=5 b=5 c=5 d=5 e=5 f=5"})
    problems = [{"id": k, "prompt": f"{k} a+2", "answer": "5"} for k in (1, 2, 3)]
    records = list(evaluate.answers(model, tokenizer, problems, max_new_tokens=5))
    assert [r["correct"] for r in records] == [True, False, False]
    assert [r["finished"] for r in records] == [True, True, False]
    assert records[0] == {"id": 1, "prompt": "1 a+2", "answer": "5", "sample": 0, "correct": True,
                          "response": "f=5 #### 5", "finished": True, "extracted": "5",
                          "rendered": "<user> 1 a+2 <assistant>", "temperature": 0.0,
                          "teacher_logprobs": [-0.1235] * 4}
    assert records[2]["tokens"] == tokenizer.encode("a=5 b=5 c=5 d=5 e=5")
    got = evaluate.summarise(records)
    assert got["accuracy"] == pytest.approx(1 / 3)
    assert got["standard_error"] == pytest.approx((1 / 3 / 3) ** 0.5)
    assert got["mean_tokens"] == pytest.approx(13 / 3) and got["truncated"] == pytest.approx(1 / 3)
    twice = evaluate.summarise([r for r in records for _ in range(2)])
    assert twice["standard_error"] == got["standard_error"] and twice["samples"] == 2


def test_any_eos_ends_an_answer(toy_model):
    """Guards "#### 5<|endoftext|>" being graded as text, and traces that say another end than the
    one that was sampled: base models end with either of two tokens."""
    model, tokenizer = data.load(toy_model)
    other, ids = tokenizer.vocab["<user>"], tokenizer.encode("f=5 #### 5")
    model.eos_token_ids = [tokenizer.end, other]
    model.sample = lambda prompts, *_, **__: [([*ids, other], [-1.0] * 4) for _ in prompts]
    record, = evaluate.answers(model, tokenizer, [{"id": 1, "prompt": "1 a+2", "answer": "5"}])
    assert record["response"] == "f=5 #### 5" and record["correct"] and record["finished"]
    assert data.encode(record, tokenizer, "line 1").tokens[-4:].tolist() == [*ids, other]


def test_context_and_nan(toy_model):
    """Guards a crash, or credit, for answers beyond the model's context, and silent NaN."""
    tokenizer = data.Tokenizer(toy_model)
    problems = [{"id": 7, "prompt": "1 a+2", "answer": "5"}]  # a prompt of 4 tokens
    for context, length, right in ((8, 4, True), (7, 3, False), (4, 0, False), (3, 0, False)):
        model = Script(tokenizer, {"1": "f=5 #### 5"}, context)
        record, = evaluate.answers(model, tokenizer, problems)
        assert len(record["teacher_logprobs"]) == length and record["correct"] is right
        assert record["finished"] is right
    model.sample = lambda prompts, *_, **__: [([5], [math.nan]) for _ in prompts]
    with pytest.raises(BadInput, match="NaN among the probabilities of the answer to problem 7"):
        list(evaluate.answers(model, tokenizer, problems))


def run(*words):
    evaluate.main([str(word) for word in words])


@pytest.fixture
def benchmark(tmp_path, problems):
    path = tmp_path / "p.jsonl"
    data.write_jsonl(path, [{"id": p["id"], "prompt": p["prompt"][:9 + 3 * (i % 4)],
                             "answer": p["answer"]} for i, p in enumerate(problems)])
    return path


def test_broken_off_evaluation_goes_on(toy_model, benchmark, tmp_path, capsys, monkeypatch):
    """Guards an hour's answers lost to an interrupt, a half-written line, and answers of other
    settings mixed in. The summary needs no model afterwards."""
    settings = ["accuracy", "--model", toy_model, "--benchmark", benchmark, "--samples", 2,
                "--temperature", 1.0, "--max-new-tokens", 9, "--batch-size", 16]
    run(*settings, "--out", tmp_path / "whole.jsonl")
    whole, out, part = capsys.readouterr().out, tmp_path / "r.jsonl", tmp_path / "r.jsonl.part"
    calls, original = [], Transformer.sample

    def interrupted(self, *args, **options):
        calls.append(len(args[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Transformer, "sample", interrupted)
        run(*settings, "--out", out)
    lines = part.read_text().splitlines(keepends=True)
    assert len(lines) == 32 and not out.exists()
    part.write_text("".join(lines[:20]) + '{"id": 3, "resp')  # killed within the second batch
    with pytest.raises(BadInput, match="broken off here; add --resume"):
        run(*settings, "--out", out)
    with pytest.raises(BadInput, match="cannot resume: max_new_tokens was 9, is now 8"):
        run(*settings, "--max-new-tokens", 8, "--resume", "--out", out)
    capsys.readouterr()
    monkeypatch.setattr(Transformer, "sample", lambda self, prompts, *args, **options: (
        calls.append(len(prompts)), original(self, prompts, *args, **options))[1])
    run(*settings, "--out", out, "--resume")
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes() and not part.exists()
    assert [(int(r["id"]), r["sample"]) for r in map(json.loads, open(out))] == list(
        itertools.product(range(30), range(2)))
    assert calls[3:] == [16, 16, 12]  # the batches of the whole run: its sums, to the last digit
    assert capsys.readouterr().out.split(";")[0] == whole.split(";")[0]
    monkeypatch.delattr(Transformer, "sample")
    run(*settings, "--out", out, "--resume")
    assert capsys.readouterr().out.split(";")[0] == whole.split(";")[0]


def result(path, verdicts, benchmark="b", **setup):
    """A file of answers with the given verdicts, one list for each problem."""
    setup = {"model": path.stem, "benchmark": benchmark, "temperature": 1.0, "top_p": 1.0,
             "max_new_tokens": 9} | setup
    data.write_jsonl(path, [
        {"id": i, "prompt": f"{benchmark}{i}", "answer": "5", "sample": k, "correct": right,
         "finished": True, "teacher_logprobs": [0.0] * 4, "setup": setup}
        for i, several in enumerate(verdicts) for k, right in enumerate(several)])
    return path


def test_grade(tmp_path, toy_model, capsys):
    """Guards traces from elsewhere that are trained on although their answer is wrong, verdicts in
    the wrong line, and fields that get lost."""
    traces = [{"id": i, "prompt": "1 a+2", "response": f"a={i} #### {i}", "answer": "3", "x": [i]}
              for i in range(6)]
    traces.append({"id": 6, "answer": "\\frac{1}{2}", "messages": [
        {"role": "user", "content": "?"}, {"role": "assistant", "content": "so \\boxed{0.5}"}]})
    data.write_jsonl(tmp_path / "t.jsonl", traces)
    run("grade", "--traces", tmp_path / "t.jsonl", "--out", tmp_path / "g.jsonl")
    graded = [record for _, record in data.read_jsonl(tmp_path / "g.jsonl")]
    assert [record["id"] for record in graded if record["correct"]] == [3, 6]
    assert all(old.items() <= new.items() for old, new in zip(traces, graded, strict=True))
    assert "2 of 7 traces are right" in capsys.readouterr().out
    examples, dropped = data.load_traces(tmp_path / "g.jsonl", data.Tokenizer(toy_model), 64)
    assert [example.id for example in examples] == ["3", "6"] and dropped == {"wrong": 5}
    data.write_jsonl(tmp_path / "t.jsonl", [{"prompt": "?", "response": "5"}])
    with pytest.raises(BadInput, match=r"t\.jsonl line 1: no field answer"):
        run("grade", "--traces", tmp_path / "t.jsonl", "--out", tmp_path / "g.jsonl")


def test_compare(tmp_path, capsys):
    """Guards an unpaired comparison. 100 problems: both right on 60, only A on 18, only B on 6:
    the difference is .12 +- .048, and of 24 flips a fair coin gives 6 or fewer of one kind with
    p = .0227 (math.comb by hand); the unpaired error would be .064."""
    a = result(tmp_path / "a.jsonl", [[True]] * 60 + [[True]] * 18 + [[False]] * 22)
    b = result(tmp_path / "b.jsonl", [[True]] * 60 + [[False]] * 18 + [[True]] * 6 + [[False]] * 16)
    run("compare", a, b)
    first, second, last = capsys.readouterr().out.splitlines()
    assert "a on b: accuracy 0.780 +- 0.042 (n=100 x 1" in first and "accuracy 0.660" in second
    low, high = map(float, re.search(r"interval ([+-]\S+) to ([+-]\S+) ", last).groups())
    assert last.startswith("A - B: +0.1200") and abs(high - low - 2 * 1.96 * 0.0477) < 0.015
    assert "A is better on 18, B on 6 of 100, exact McNemar p = 0.023" in last
    several = result(tmp_path / "c.jsonl", [[True, False]] * 50 + [[False, False]] * 50)
    run("compare", several, several)
    out = capsys.readouterr().out
    assert "accuracy 0.250 +- 0.025, pass@2 0.500 (n=100 x 2" in out and "+0.0000 to +0.0000" in out
    assert "p = 1" in out
    with pytest.raises(BadInput, match="not answers to the same problems"):
        run("compare", a, result(tmp_path / "d.jsonl", [[True]] * 100, benchmark="c"))
    data.write_jsonl(tmp_path / "e.jsonl", [{"id": 1, "prompt": "x", "answer": "y"}])
    with pytest.raises(BadInput, match=r"e\.jsonl line 1: no correct, finished, setup"):
        run("compare", a, tmp_path / "e.jsonl")


V = 8  # of the tabular models below; token 7 ends an answer


def tabular(folder, table):
    """A real Transformer whose next token depends on the last one alone: p(j | i) = table[i, j].
    Attention and MLP add nothing, the norm turns one-hot embeddings into sqrt(V) one-hot."""
    model = Transformer(Config({
        "model_type": "llama", "vocab_size": V, "hidden_size": V, "intermediate_size": V,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-9, "rope_theta": 1e4, "tie_word_embeddings": False,
        "hidden_act": "silu", "max_position_embeddings": 99}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(V))
        model.lm_head.weight.copy_(torch.tensor(np.log(table).T / math.sqrt(V)))
    model.eos_token_ids = [7]
    return model


def tables(seed, spread):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(V, V))
    other = logits + spread * rng.normal(size=(V, V))
    return [np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits, other)]


def exact(author, p, q, start, length):
    """Summed KL(p || q) over prefixes that `author` writes, by carrying the distribution along."""
    kl = (p * np.log(p / q)).sum(1)
    state, means = np.eye(V)[start], []
    for _ in range(length):
        means.append(state @ kl)
        state = state @ author
        state[7] = 0  # an answer that ended has no further prefix
        state /= state.sum()
    return np.cumsum(means)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5])
def test_exposure_of_tabular_models(spread):
    """Guards an ExAccErr that is off by one, drops the EOS, or counts zeros behind it: for models
    that know one token back everything is known. The same model twice gives 0."""
    p, q = tables(3, spread)
    teacher, student = tabular("p", p), tabular("q", q)
    args = Namespace(max_new_tokens=12, batch_size=500, seed=0, device="cpu")
    kl = [evaluate.drift(author, teacher, student, [[0, 1]] * 3000, args, V).reshape(300, 10, 12)
          for author in (student, teacher)]
    assert (np.isfinite(kl[0][:, :, 0])).all() and np.isnan(kl[0][:, :, 5]).any()
    got = evaluate.excess(*kl)
    R, epsilon = exact(q, p, q, 1, 12), exact(p, p, q, 1, 12)
    if spread == 0:
        assert np.abs(got["excess"]).max() == got["low"].min() == got["high"].max() == 0
        return
    assert got["R"][0] == pytest.approx(R[0], rel=1e-4)  # the first token, from the prompt
    assert got["R"] == pytest.approx(R, rel=0.03)
    assert got["epsilon"] == pytest.approx(epsilon, rel=0.03)
    truth = (R - epsilon) / epsilon * 100
    assert ((got["low"] <= truth + 1e-3) & (truth - 1e-3 <= got["high"])).mean() > 0.8
    assert np.abs(truth).max() > 2 and (got["high"] - got["low"])[-1] < 15


def test_exposure_counts_rows_that_are_still_there():
    """Guards means over rows that have ended. Two problems, one answer each: the student's prefixes
    cost 1, 3 and 2, the teacher's 1, 1 and then nobody is left: R = 1, 3, epsilon = 1, 2."""
    nan = math.nan
    got = evaluate.excess(np.array([[[1.0, 3.0, 1.0]], [[1.0, 1.0, nan]]]),
                          np.array([[[1.0, 1.0, nan]], [[1.0, nan, nan]]]))
    assert got["R"].tolist() == [1, 3] and got["epsilon"].tolist() == [1, 2]
    assert got["excess"].tolist() == [0, 50]


def test_exposure_command(toy_model, benchmark, tmp_path, capsys):
    """Guards the curve's file, its picture, and models with different tokenizers."""
    make_hf(tmp_path / "other", "llama", vocab_size=data.save_toy_tokenizer(tmp_path / "other"))
    words = ["exposure", "--teacher", toy_model, "--benchmark", benchmark, "--limit", 5,
             "--samples", 3, "--max-new-tokens", 6, "--device", "cpu",
             "--out", tmp_path / "c.jsonl"]
    run(*words, "--student", tmp_path / "other", "--plot", tmp_path / "c.png")
    lines = [json.loads(line) for line in open(tmp_path / "c.jsonl")]
    assert [line["length"] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > 3
    assert all(line["low"] <= line["excess"] <= line["high"] for line in lines)
    assert lines[0]["excess"] == pytest.approx(0, abs=1e-3) and lines[0]["R"] > 0.1
    assert max(abs(line["R"] - line["epsilon"]) for line in lines) > 0.01  # two authors
    assert f"ExAccErr({len(lines)}) = {lines[-1]['excess']:+.2f} %" in capsys.readouterr().out
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    file = tmp_path / "other" / "tokenizer.json"
    file.write_text(file.read_text().replace("####", "@@@@"))
    with pytest.raises(BadInput, match="two vocabularies"):
        run(*words, "--student", tmp_path / "other")


def test_weights_page(toy_model, tmp_path, problems):
    """Guards a page with wrong numbers or unescaped text: every token is there with its weight, as
    computed from full logits, once for each student."""
    make_hf(tmp_path / "<b>", "qwen2", seed=5, num_hidden_layers=1,
            vocab_size=data.save_toy_tokenizer(tmp_path / "<b>"))
    plain, traces, page = tmp_path / "p.jsonl", tmp_path / "t.jsonl", tmp_path / "w.html"
    data.write_jsonl(plain, problems[:3])
    data.main(["score", "--traces", str(plain), "--teacher", str(toy_model), "--out", str(traces)])
    run("weights", toy_model, tmp_path / "<b>", "--traces", traces, "--out", page, "--tau", 0.5,
        "--limit", 2, "--device", "cpu")
    text = page.read_text()
    assert "<b>" not in text and "&lt;b&gt;" in text and "&lt;user&gt;" in text
    assert "http" not in text and "<script" not in text  # self-contained
    rows = re.findall(r'<td>(.*?)</td>', text, re.DOTALL)
    assert len(rows) == 4
    model, tokenizer = data.load(tmp_path / "<b>")
    example = data.load_traces(traces, tokenizer, 99, teacher=True)[0][1]
    ids = torch.tensor(example.tokens.astype(int))
    logp = model.logits(model(ids[None, :-1]))[0].log_softmax(-1)
    q = logp[torch.arange(len(ids) - 1), ids[1:]][example.prompt - 1:]
    w = 2 * torch.sigmoid((q - torch.tensor(example.p_logp)) / 0.5)
    spans = re.findall(r'title="student (\S+), teacher (\S+), weight (\S+)">(.*?)</span>', rows[3])
    assert [float(span[2]) for span in spans] == pytest.approx(w.tolist(), abs=2e-3)
    assert [float(span[0]) for span in spans] == pytest.approx(q.exp().tolist(), rel=0.01)
    assert "".join(span[3] for span in spans) == (
        problems[1]["response"] + " &lt;end&gt;").replace("#### ", "#### ")
    colors = re.findall(r'class="(\w*)" style="background:rgba\((\d+),', rows[3])
    assert all((color == "230") == (x < 1) and (kind == "low") == (x < 0.5)
               for (kind, color), x in zip(colors, w.tolist(), strict=True))


def test_a_saved_student_says_the_same_elsewhere(tmp_path, problems):
    """Guards generation_config.json: other harnesses (IFEval) generate with what stands there. With
    its own settings transformers writes the same text, and stops where we stop."""
    make_hf(tmp_path / "llama", "llama", vocab_size=data.save_toy_tokenizer(tmp_path / "llama"))
    model, tokenizer = data.load(tmp_path / "llama")
    with torch.no_grad():
        model.lm_head.weight[tokenizer.end] *= 2  # so that some answers end
    model.save_pretrained(tmp_path / "student")
    ours, tokenizer = data.load(tmp_path / "student")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    other = AutoTokenizer.from_pretrained(tmp_path / "student")
    ended = 0
    for problem in problems:
        turns = [{"role": "user", "content": problem["prompt"]}]
        ids, = ours.generate([tokenizer.prompt(turns)], 20)
        inputs = other.apply_chat_template(turns, add_generation_prompt=True, return_dict=True,
                                           return_tensors="pt")
        text = theirs.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1]:]
        assert other.decode(text) == tokenizer.backend.decode(ids, skip_special_tokens=False)
        ended += len(ids) < 20
    assert 3 < ended < 30


def finished_run(folder, objective, accuracies, seconds=5.0, **options):
    folder.mkdir(parents=True)
    options = {"objective": objective, "tau": 0.7, "beta": 0.5, "lr": 1e-3, "steps": 20} | options
    data.write_jsonl(folder / "run.json", [{"options": options, "seconds": seconds, "steps": 20}])
    data.write_jsonl(folder / "log.jsonl", [
        {"step": step, "loss": 1 / step, "weight": 0.9, "ess": 0.8} for step in (10, 20)])
    for name, share in accuracies.items():
        result(folder / f"{name}-greedy.jsonl", [[i < share] for i in range(100)])
    return folder


def test_report(tmp_path, capsys, monkeypatch):
    """Guards a spread over answers instead of over seeds, and runs of different settings in one
    row. Accuracies .70, .80, .90 have mean .80 and standard deviation .10."""
    runs = [finished_run(tmp_path / f"seed{seed}/discord", "discord", {"b": share, "c": 50}, seed)
            for seed, share in ((1, 70), (2, 80), (3, 90))]
    runs.append(finished_run(tmp_path / "sft-seed1", "sft", {"b": 50}))
    run("report", *runs, "--plot", tmp_path / "r.png")
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["run", "seeds", "b-greedy", "c-greedy", "tokens", "steps", "seconds"]
    assert rows[2] == ["discord", "3", "0.800 +- 0.100", "0.500 +- 0.000", "4.0", "20", "2"]
    assert rows[3] == ["sft", "1", "0.500 +- 0.050", "", "4.0", "20", "5"]
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(BadInput, match=r"discord: tau is 0\.5, but it was 0\.7 in another run"):
        run("report", *runs, finished_run(tmp_path / "x" / "discord", "discord", {}, tau=0.5))
    broken = finished_run(tmp_path / "broken", "sft", {})
    data.write_jsonl(broken / "run.json", [{"options": {}}])
    with pytest.raises(BadInput, match="broken: this run has not finished"):
        run("report", broken)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match=r"pictures need matplotlib: pip install -r tests/req"):
        run("report", *runs, "--plot", tmp_path / "s.png")
    run("report", *runs)  # the table needs none


def test_right_answers_become_traces(tmp_path, toy_model, problems, capsys):
    """Guards the three commands: evaluate a teacher, train on its file, evaluate the student. The
    records load with their log-probabilities, those of the model over the sampled tokens."""
    benchmark, out = tmp_path / "p.jsonl", tmp_path / "teacher.jsonl"
    data.write_jsonl(benchmark, [{k: p[k] for k in ("id", "prompt", "answer")} for p in problems])
    evaluate.main(["accuracy", "--model", str(toy_model), "--benchmark", str(benchmark),
                   "--samples", "20", "--temperature", "1.5", "--max-new-tokens", "40", "--out",
                   str(out)])
    records = [json.loads(line) for line in open(out)]
    right = [r for r in records if r["correct"]]
    assert 5 < len(right) < 300 and len(records) == 600
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert f"accuracy {len(right) / 600:.3f} +- " in line and "n=30 x 20" in line
    assert "T=1.5" in line and "cut off at 40" in line
    model, tokenizer = data.load(toy_model)
    examples, dropped = data.load_traces(out, tokenizer, 99, teacher=True)
    assert len(examples) == len(right)
    assert dropped["wrong"] + dropped["unfinished"] == 600 - len(right)
    for example in examples:
        logp, = data.response_logp(model, [example], tokenizer.vocab_size)
        assert abs(logp - example.p_logp).max() < 1e-3
    train.train(train.parse_args(["--student", str(toy_model), "--traces", str(out), "--out",
                                  str(tmp_path / "run"), "--steps", "2", "--device", "cpu"]))
    evaluate.main(["accuracy", "--model", str(tmp_path / "run"), "--benchmark", str(benchmark),
                   "--limit", "3", "--max-new-tokens", "5"])
    assert "n=3 x 1, greedy" in capsys.readouterr().out


def test_command_line_refuses(toy_model, tmp_path):
    with pytest.raises(BadInput, match="--samples > 1 needs a --temperature above 0"):
        evaluate.main(["accuracy", "--model", "m", "--benchmark", "b", "--samples", "2"])
    with pytest.raises(BadInput, match=r"b\.jsonl: cannot be read"):
        evaluate.main(["accuracy", "--model", str(toy_model), "--benchmark",
                       str(tmp_path / "b.jsonl")])
    make_hf(tmp_path / "m", "llama")
    data.write_jsonl(tmp_path / "b.jsonl", [{"prompt": "x", "answer": "y"}])
    with pytest.raises(BadInput, match=r"tokenizer\.json: no such file"):
        evaluate.main(["accuracy", "--model", str(tmp_path / "m"), "--benchmark",
                       str(tmp_path / "b.jsonl")])
