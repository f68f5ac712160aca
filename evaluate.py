"""Answers, their grading, accuracy, comparison, exposure bias, pictures: `evaluate.py --help`.

One engine samples, grades and records, for a student's accuracy and for a teacher's traces alike:
the right answers of a teacher's evaluation *are* the traces that train.py reads.
"""

import argparse
import cmath
import hashlib
import html
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial, reduce
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers.decoders import DecodeStream
from tqdm import tqdm

import data
import loss
from model import BadInput, Transformer, check, read_json

# ---- Grading. The policy, all of it:
# - The answer is the last \boxed{} (boxes with at most "and" between them are a list), unless "the
#   final answer is" comes behind it; without a box what follows #### or "answer is", else the last
#   formula or number. A $ formula ends on its line. Cut-off text counts only with its box complete.
# - Units, degrees and money signs are dropped. 20% is 20 or 0.2; 1,234 is a number or a list, so is
#   12,34 (a decimal comma). 3:4 is a ratio, 2 1/2 is mixed, 101_2 is five.
# - Lists and sets come in any order, points and intervals do not; all values are needed. x = 5 says
#   5 (and y = 5 does not say so), a < x <= b says (a, b]. Equations and inequalities may be
#   multiples of each other.
# - Values are equal exactly; but a decimal of 4 significant digits (a gold one of 2) may stand for
#   an exact value that rounds to it, and a gold one of 2 for a decimal that is 3 digits longer.
# - Formulas are equal if they are so at four points where every name has a random value of its own
#   (logarithms are natural, odd roots real). Only Reader reads them: no model text is ever run.
# - What Reader cannot read is equal letter by letter, but for spaces (and capitals, if in words).
POINTS, LONGEST = 4, 1000  # of an answer, in characters; a longer one counts as unreadable
FUNCTIONS: dict[str, Callable] = {name: getattr(cmath, name) for name in (
    "sin", "cos", "tan", "sinh", "cosh", "tanh", "exp", "log")}
FUNCTIONS |= {"arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log,
              "sec": lambda x: 1 / cmath.cos(x), "csc": lambda x: 1 / cmath.sin(x),
              "cot": lambda x: 1 / cmath.tan(x)}
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, "infty": math.inf, "infinity": math.inf}
NO_WORD = f"(?:{'|'.join([*FUNCTIONS, *CONSTANTS, 'sqrt', 'and', 'or'])})(?![a-zA-Z])"
SPELLING = {old: new for new, spellings in {
    "\\le": r"\leq \leqslant <= ≤", "\\ge": r"\geq \geqslant >= ≥", "\\ne": r"\neq != ≠",
    "<": r"\lt", ">": r"\gt", "*": r"\cdot \times × ·", "/": r"\div ÷ :", "-": "− –", "%": r"\% "
    "percent pct", "|": r"\vert \lvert \rvert", ",": "&", ";": r"and or \\", "pi": "π",
    "\\cup": "∪", "infty": "∞", "sqrt": "√", "\\begin": r"\begin{pmatrix} \begin{bmatrix}",
    "\\end": r"\end{pmatrix} \end{bmatrix}"}.items() for old in spellings.split()}
TEXT = r"\\(?:text|mbox|textbf|textrm|mathrm|mathbf|mathbb|operatorname|rm)(?![a-z])\s*"
CLEAN = [(re.compile(old), new) for old, new in (
    (r"(?<!\\)\\\\(?=[a-zA-Z]{2})", r"\\"),  # a backslash that JSON doubled
    (r",\\!\s*|(?<=[0-9])\{,\}(?=[0-9]{3})", ""),  # 10{,}000
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits|q?quad)(?![a-z]{2})\.?|\\?\$|[€£\u200b~`]|"
     r"(?<!\\)\\[!,;: \[\]()\"]|\^\s*\{?\s*\\circ\s*\}?|\\degree|°|\bdegrees?\b", " "),
    (r"\\[dtc]frac", r"\\frac"), (r"\\frac\s*([0-9])", r"\\frac{\1}"),  # \frac12
    (r"(\\frac\s*\{[^{}]*\})\s*([0-9])", r"\1{\2}"), (r"\^\s*\{?\s*\\prime\s*\}?", "'"),
    ("²", "^2"), ("³", "^3"), ("½", r"\\frac{1}{2}"), ("±", r"\\pm "),
    (r"\\overline\{([0-9]+)\}", r"\1" * 12),
    (rf"(?<=[0-9}})%])\s*(?:{TEXT}\{{(?!\s*(?:and|or|per))[^{{}}]{{2,}}\}}|"  # \text{ cm}^2
     r"\\(?:text|mbox)\s*\{.\})(\s*\^\s*\{?[23]\}?)?", ""),
    (rf"{TEXT}\{{([^{{}}]*)\}}|{TEXT}", r" \1 "),
    (rf"(?<=[0-9}})%])(?:\s+(?!{NO_WORD})[a-zA-Z]{{3,}}|\s*(?:[cmk]m|kg|ft)(?![a-zA-Z]))"
     r"[a-zA-Z /.]*(?:\^\{?[23]\}?)?(?=\s*(?:[;,]|and|or|$))", ""),  # 18 square feet
    (r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))", ""),
    (r"(?<![0-9.}^_])([0-9]+)\s*(?:\s([0-9]+)/([0-9]+)|\\frac\{([0-9]+)\}\{([0-9]+)\})",
     r"(\1+\2\4/\3\5)"), (r"(\^\s*(?:\{[^{}]*\}|\w))\s*(_\s*(?:\{[^{}]*\}|\w))", r"\2\1"),  # v^2_0
    (r"(\w)\s*\([^()=]*,[^()=]*\)\s*=", r"\1="), (r"\s+", " "),  # f(x, y) =
    (r"^[\s,;:\"*]+|[\s,.;:\"*]+$", ""))]
COMMAS = r"[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?(?![0-9,])|[0-9]+,[0-9]{2}(?![0-9,])|"
LEXEME = (r"\\(?:begin|end)\{\w+\}|or(?![a-z])|"
          r"(?:\\[a-zA-Z]+|pi|ln|[a-zA-Z]{3,}|[a-zA-Z])(?:\s*_\s*(?:\{[^{}]*\}|\\[a-zA-Z]+|\w))?'*|"
          r"[0-9]+_\{?[0-9]+\}?|[0-9]+\.?[0-9]*|\.[0-9]+|[<>!]=|\\.|\S")
CLOSING = {"": [""], "(": ")]", "[": ")]", "{": "}", "\\{": ["\\}"], "|": ["|)"],
           "\\begin": ["\\end"]}
TURNED = {">": "<", "\\ge": "\\le"}
RELATIONS = "=", "\\ne", "<", "\\le", *TURNED, "\\approx", "\\in", "\\cup"
STOPS = {"", *")]}", "\\}", "|)", "\\end"}
ENDS = {*STOPS, ",", ";", *RELATIONS}  # of a value, and of what sin is applied to:
ARGUMENT_ENDS = {*ENDS, *"+-*/^!%", *FUNCTIONS, *("\\" + name for name in FUNCTIONS)}


@dataclass
class Answer:
    """A final answer taken apart. `kind` is "" for a value; "," for items in any order, and their
    brackets, like "(]", for items in this one; or a relation: then `values` are its left minus its
    right side, and an item is what it says of a name."""

    kind: str = ""
    items: list["Answer"] = field(default_factory=list)
    values: Any = None  # [Fraction, float or complex], at each of POINTS points
    name: str = ""  # if it is one: x, a_n, AB, f(x), (p, q)
    text: str = ""  # of a number, without its sign
    percent: bool = False


def together(names: list[str]) -> str:
    return "".join(names) if all(names) else ""


def apply(function: Callable, *sides: Answer) -> Answer:
    """At each point. A product of names is a name, and so is a ratio; matrices are multiplied."""
    if function is mul and sides[0].kind == sides[1].kind == "[]":
        columns = list(zip(*(row.items for row in sides[1].items), strict=True))
        return Answer("[]", [Answer("[]", [
            reduce(partial(apply, add), map(partial(apply, mul), row.items, column))
            for column in columns]) for row in sides[0].items])
    values = [function(*point) for point in zip(*(side.values for side in sides), strict=True)]
    named = function in (mul, truediv)
    return Answer(values=values, name=together([side.name * named for side in sides]))


def is_constant(answer: Answer) -> bool:
    return bool(answer.values) and len(set(answer.values)) == 1


def factorial(n):
    whole = isinstance(n, Fraction) and n.denominator == 1 and 0 <= n <= 100
    return Fraction(math.factorial(int(n))) if whole else math.gamma(n.real + 1)


def power(base, exponent):
    """Exact where that is short."""
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        digits = abs(exponent) * math.log10(abs(base.numerator) + base.denominator)
        if exponent.denominator == 1 and digits < 1000:
            return base ** int(exponent)
        if base < 0 and exponent.denominator % 2:
            return (-1) ** exponent.numerator * float(-base) ** float(exponent)
    return complex(base) ** complex(exponent)


OPERATIONS: dict[str, tuple[int, Callable]] = {  # sign: how tightly it binds
    "+": (1, add), "-": (1, sub), "*": (2, mul), "/": (2, truediv), "^": (4, power),
    "!": (5, factorial), "%": (5, lambda x: x / 100)}
ONE = Answer(values=[Fraction(1)] * POINTS)


class Reader:
    """Reads LaTeX or plain algebra by precedence climbing and evaluates it as it goes. What is not
    in its grammar raises ValueError; what makes no sense, like 1 + (2, 3), TypeError."""

    def __init__(self, text: str, commas: bool):
        commas = commas and not re.search(r"[(\[]", text)  # (1,234] is no number
        bars, lexemes = itertools.cycle(("|", "|)")), re.findall(commas * COMMAS + LEXEME, text)
        lexemes = [SPELLING.get(lexeme, lexeme) for lexeme in lexemes]
        self.rest = ["", *[next(bars) if lex == "|" else lex for lex in lexemes][::-1]]

    def take(self, *wanted: str) -> str:
        """The next lexeme, if it is one of these, else ''."""
        return self.rest.pop() if self.rest[-1] in wanted else ""

    def answer(self, opening: str = "") -> Answer:
        """1, x = 2; (3, 4), 5 < y < 6: all, or up to the bracket that closes the opening one."""
        rows = [[]]
        while self.rest[-1] not in STOPS:
            if self.take(";"):
                rows.append([])
            elif not self.take(","):
                parts: list[Any] = [self.value()]
                while sign := self.take(*RELATIONS):
                    parts += [sign, self.value()]
                rows[-1].append(related(parts))
        rows = [row for row in rows if row]
        kind, items = opening + self.rest[-1], [item for row in rows for item in row]
        if self.rest.pop() not in CLOSING[opening]:
            raise ValueError("a bracket is not closed, or not opened")
        if opening == "\\begin":
            return Answer("[]", [Answer("[]", row) for row in rows])
        if len(items) == 1 and kind not in ("(]", "[)"):
            return apply(abs, items[0]) if opening == "|" else items[0]
        if items and not opening and all(same(items[0], item) for item in items[1:]):
            return items[0]  # one answer in several spellings
        if kind[:1] in ("(", "[") and (kind != "[]" or len(items) == 2):
            return Answer(kind, items, name=together([item.name for item in items]))
        if len(rows) > 1 and {len(row) for row in rows} == {len(rows[0])} != {1}:
            return Answer(",", [Answer("()", row) for row in rows])  # p=5, q=2; p=7, q=2
        names = {item.name.partition("_")[0] for item in items if item.kind == "="} - {""}
        if len(names) == len(items):  # x = 1, y = 2
            return Answer("()", sorted(items, key=lambda item: item.name))
        return Answer(",", items)

    def value(self, level: int = 0) -> Answer:
        """A term, and what follows that binds more tightly than `level`."""
        if sign := self.take("-", "+"):
            left = self.value(max(level, 1))
            if sign == "-":
                left = replace(left, values=[-value for value in left.values], name="")
        else:
            left = self.atom()
        while self.rest[-1] not in ENDS:
            binds, operation = OPERATIONS.get(self.rest[-1], (2, mul))  # 2x needs no sign
            if binds <= level:
                break
            sign = self.take(*OPERATIONS)
            if binds == 5:
                left = replace(apply(operation, left), percent=sign == "%")
            else:
                left = apply(operation, left, self.value(binds))
        return left

    def atom(self) -> Answer:
        lexeme = self.rest.pop()
        name, _, index = re.sub(r"[\\{}\s]", "", lexeme).partition("_")
        if lexeme in CLOSING:
            return self.answer(lexeme)
        if name == "frac":
            return apply(truediv, self.atom(), self.atom())
        if name == "sqrt":
            degree = self.atom() if self.rest[-1] == "[" else apply(add, ONE, ONE)
            return apply(power, self.atom(), apply(truediv, ONE, degree))
        if name in FUNCTIONS:  # sin^2 x, sin^{-1}(x), log_2 x
            exponent = self.atom() if self.take("^") else ONE
            x = self.atom() if self.rest[-1] in CLOSING else self.value(3)
            while self.rest[-1] not in ARGUMENT_ENDS:
                x = apply(mul, x, self.value(3))
            if exponent.values[0] == -1:
                return apply(FUNCTIONS["arc" + name], x)
            base = cmath.log(Fraction(index)) if index else 1
            return apply(power, apply(lambda x: FUNCTIONS[name](x) / base, x), exponent)
        if re.match(r"\.?[0-9]", name):
            name = re.sub(",(?=[0-9]{3})", "", name).replace(",", ".")
            number = Fraction(int(name, int(index)) if index else name)
            return Answer(values=[number] * POINTS, text=name)
        if not name[:1].isalpha():
            raise ValueError(f"{lexeme} is not in the grammar")
        if name in CONSTANTS and not index:
            return Answer(values=[CONSTANTS[name]] * POINTS, name=name)
        draws = [random.Random(f"{name}_{index} {point}").choice for point in range(POINTS)]
        return Answer(values=[Fraction(draw(range(101, 999)), draw((100, 100, -100)))
                              for draw in draws], name=f"{name}_{index}")


def related(parts: list[Any]) -> Answer:
    """[side, sign, side, ...] as one answer; more becomes less by turning it round."""
    if "\\approx" in parts:  # the exact value, if one is given
        about = parts.index("\\approx")
        parts = [parts[0], "=", parts[2]] if about == 1 and parts[0].name else parts[:about]
    parts = parts[parts.index("\\in") + 1:] if "\\in" in parts else parts
    if set(TURNED) & set(parts[1::2]):
        parts = [TURNED.get(part, part) if isinstance(part, str) else part for part in parts[::-1]]
    left, right, signs, says = parts[0], parts[-1], parts[1::2], []
    if not signs:
        return left
    if set(signs) == {"\\cup"}:
        return Answer(",", parts[::2])
    known = parts[-3].values and right.values
    values = apply(sub, parts[-3], right).values if known else None
    if set(signs) == {"="}:  # the end of a chain, or what a name or number is
        says = [right] if len(signs) > 1 or left.name or is_constant(left) else []
        return Answer("=", says, values, left.name)
    if len(signs) == 1 and signs != ["\\ne"] and (left.name or right.name):
        infinity = Answer(values=[math.inf if right.name else -math.inf] * POINTS)
        parts = [*parts, "<", infinity] if right.name else [infinity, "<", *parts]
    if len(parts) == 5 and parts[2].name and {parts[1], parts[3]} <= {"<", "\\le"}:
        says = [Answer("[("[parts[1] == "<"] + "])"[parts[3] == "<"], [parts[0], parts[4]])]
    elif len(parts) > 3:
        raise ValueError("a chain of relations that is no interval")
    return Answer(signs[0], says, values)


def close(a, b) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return cmath.isclose(a, b, rel_tol=1e-9, abs_tol=0 if a and b else 1e-12)


def rounds(decimal: Answer, digits: int, other: Answer) -> bool:
    """Is the decimal, of so many significant digits at least, what the other one rounds to?"""
    whole, _, places = decimal.text.partition(".")
    longer = len(other.text.partition(".")[2]) >= len(places) + 3 or not other.text
    return bool(places and longer and len((whole + places).lstrip("0")) >= digits and all(
        abs(x - y) < 0.50001 * 10 ** -len(places) for x, y in zip(decimal.values, other.values,
                                                                  strict=True)))


def same(a: Answer, b: Answer) -> bool:
    """Does the prediction a say what the gold answer b says?"""
    if a.kind == b.kind in RELATIONS and all(a.values or [0]) and all(b.values or [0]):
        first, *ratios = [x / y for x, y in zip(a.values, b.values, strict=True)]
        turned = a.kind in ("<", "\\le") and first.real < 0
        if all(close(ratio, first) for ratio in ratios) and not turned:
            return True
    stems = [x.name.partition("_")[0] for x in (a, b) if x.kind == "="]
    a, b = (x.items[0] if x.kind in RELATIONS and x.items else x for x in (a, b))
    if "" not in stems and len(set(stems)) == 2 and is_constant(a):
        return False  # x = 5 is not y = 5, while y = 2x and f(x) = 2x may be the same
    if a.kind == "" == b.kind:
        if all(map(close, a.values, b.values)) or rounds(a, 4, b) or rounds(b, 2, a):
            return True
        times = Fraction(100) ** (a.percent - b.percent)  # 20 for 20%, or the other way round
        return times != 1 and all(map(close, [value * times for value in a.values], b.values))
    if not 0 < len(a.items) == len(b.items) <= 50:
        return False
    if a.kind == "," == b.kind:
        rest = list(b.items)
        for item in a.items:
            found = [i for i, other in enumerate(rest) if same(item, other)]
            if not found:
                return False
            del rest[found[0]]
        return True
    fits = a.kind == b.kind or {a.kind, b.kind} == {",", "()"}
    return fits and all(map(same, a.items, b.items))


def read(text: str, commas: bool) -> Answer:
    """`commas`: 1,234 is a number. An answer with a plus-minus sign is two answers in one."""
    if "\\pm" not in text:
        return Reader(text, commas).answer()
    found = []
    for plus, minus in ("+-", "-+"):
        answer = read(text.replace("\\pm", plus).replace("\\mp", minus), commas)
        items = answer.items if answer.kind == "," else [answer]
        found += [item for item in items if not any(same(item, other) for other in found)]
    return Answer(",", found)


def boxes(text: str) -> list[tuple[int, int, slice]]:
    r"""(start, end, inside) of each whole \boxed{...}, braces matched, in one pass."""
    found, opened = [], []
    for mark in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):  # an escaped brace is no brace
        if mark[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{":
                found.append((start.start(), mark.end(), slice(start.end(), mark.start())))
        elif mark[0].endswith("{") and mark[0] != "\\{":
            opened.append(mark)
    return sorted(found, key=lambda box: box[0])


FORMULA = re.compile(r"\$\$(.+?)\$\$|\\\[(.+?)\\\]|\\\((.+?)\\\)|\$((?:\\\$|[^$\n])+)\$", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.])-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:/[0-9]+)?%?")
BETWEEN = re.compile(r"(?:[\s,;$.&+{}()\[\]\\]|q?quad|text|and|or)*")
STATED = re.compile(r"(?i)(final )?answer(?: is\b|:)[:*\s]*|####")
WORD = re.compile(rf"(?<![a-zA-Z0-9\\])(?!{NO_WORD})[a-zA-Z]{{2}}(?:[a-zA-Z]| [a-z]{{2}})")


def extract_answer(text: str, gold: bool = False) -> str:
    r"""Where the answer stands; a gold one without box, #### or "final answer is" is all answer.

    >>> extract_answer(r"First \boxed{3}, so it is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    found = boxes(text)
    stated = [mark for mark in STATED.finditer(text) if not gold or mark[1] or mark[0] == "####"]
    if found and not (stated and stated[-1][1] and stated[-1].start() > found[-1][0]):
        parts, start = [text[found[-1][2]].strip()], found[-1][0]
        for before, end, inside in found[-2:-20:-1]:
            if end > start or not BETWEEN.fullmatch(text[end:start]):
                break
            parts, start = [text[inside].strip(), *parts], before
        return "; ".join(dict.fromkeys(parts))
    if gold and not stated:
        return text.strip()
    text = text[stated[-1].end():][:2000].strip() if stated else text[-2000:]
    if stated:  # up to the end of the sentence, or of the formula that it begins with
        sentence, formula = re.split(r"\.(?:\s|$)|\n", text)[0], FORMULA.match(text)
        text = formula[0] if formula and formula.end() > len(sentence) else sentence
    prose = FORMULA.sub(lambda formula: " " * len(formula[0]), text)
    places = sorted([*FORMULA.finditer(text), *NUMBER.finditer(prose)], key=re.Match.start)
    if re.search(r"\n\s*\$\s*$", text):
        return ""
    if not places or not WORD.search(re.sub(r"\\[a-zA-Z]+\s*\{[a-zA-Z ]*\}", "", prose)):
        return text.strip()
    return places[0 if stated else -1][0]


def is_correct(prediction: str, gold: str) -> bool:
    """Do the final answers agree, by the policy above?

    >>> is_correct("He has 1,200 + 34 = 1234 left.\\n#### 1,234", "1234")
    True
    """
    texts = [extract_answer(prediction), extract_answer(gold, gold=True)]
    for old, new in CLEAN:
        texts = [old.sub(new, text[:2 * LONGEST]) for text in texts]
    plain = [re.sub(r"[\s{}]", "", text) for text in texts]
    plain = [text.lower() if re.search("[a-zA-Z]{3}", text) else text for text in plain]
    if plain[0] == plain[1]:
        return plain[0] != ""
    if any(re.fullmatch("[a-zA-Z ]{3,}", text) or len(text) > LONGEST for text in texts):
        return False  # words, and different ones
    for commas in (True, False):
        try:
            if same(*(read(text, commas) for text in texts)):
                return True
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError):
            continue  # not in the grammar, or without a value
    return False


# ---- Answers, accuracy, comparison


def ask(problems: list[dict], tokenizer: data.Tokenizer) -> list[list[int]]:
    """The tokens to go on from: the rendered prompt, and the beginning of an answer if there is one
    (`data.py mix`)."""
    known, prompts = range(tokenizer.vocab_size), []
    for problem in problems:
        prefix = problem.get("prefix", [])
        check(isinstance(prefix, list) and all(i in known for i in prefix), f"problem "
              f"{problem['id']}: prefix: not ids of the tokenizer in {tokenizer.folder}")
        prompts.append(tokenizer.prompt(data.turns(problem, "")) + prefix)
    return prompts


def answers(model: Transformer, tokenizer: data.Tokenizer, problems: list[dict], samples: int = 1,
            temperature: float = 0.0, top_p: float = 1.0, max_new_tokens: int = 1024,
            batch_size: int = 64, seed: int = 0, done: Collection = ()) -> Iterator[dict]:
    """Trace records (see data.py) with verdicts, of all (problem's id, sample) that are not `done`.
    Every answer has a seed of its own, so batching does not change a draw; and batches are those of
    a run from the beginning, since the last digit of a sum depends on what is computed along. Text
    that was cut off, by the limit or by the model's context, is wrong unless its answer was boxed
    already."""
    prompts = ask(problems, tokenizer)
    context = model.config.max_position_embeddings
    jobs = [(i, k) for i in range(len(problems)) for k in range(samples)]
    jobs.sort(key=lambda job: -len(prompts[job[0]]))  # little padding, and the largest batch first
    starts = range(0, len(jobs), batch_size)
    for start in tqdm(starts, desc="answering", unit="batch", disable=None):
        batch = jobs[start:start + batch_size]
        missing = [(str(problems[i]["id"]), k) not in done for i, k in batch]
        if not any(missing):
            continue
        drawn = model.sample([prompts[i] for i, _ in batch], max_new_tokens, temperature,
                             [(seed, i, k) for i, k in batch], top_p,
                             vocab_size=tokenizer.vocab_size)
        for (i, k), (ids, logp) in itertools.compress(zip(batch, drawn, strict=True), missing):
            check(not any(map(math.isnan, logp)), f"{model.folder}: NaN among the probabilities of "
                  f"the answer to problem {problems[i]['id']}; try --dtype float32")
            ids, problem = ids[:max(context - len(prompts[i]), 0)], dict(problems[i])
            logp, prefix = logp[:len(ids)], problem.pop("prefix", [])
            if prefix:  # the teacher's opinion of what the student wrote
                whole = data.Example("", np.array(prompts[i]), len(prompts[i]) - len(prefix), None)
                before, = data.response_logp(model, [whole], tokenizer.vocab_size)
                ids, logp = prefix + ids, before.tolist() + logp
            finished = bool(ids) and ids[-1] in model.eos_token_ids
            record = data.response_fields(ids, logp, tokenizer, finished)
            text = record["response"]
            answer = extract_answer(text)
            graded = text if finished else f"\\boxed{{{answer}}}" if boxes(text) else ""
            yield {**problem, "rendered": tokenizer.text(data.turns(problem, "")), "sample": k,
                   "temperature": temperature, **record, "extracted": answer,
                   "correct": is_correct(graded, problem["answer"])}


def read_answers(path: str | Path) -> list[dict]:
    """The records that `accuracy` wrote."""
    lines = list(data.read_jsonl(path))
    for where, record in lines:
        missing = {"id", "correct", "finished", "setup", "teacher_logprobs"} - record.keys()
        check(not missing, f"{where}: no {', '.join(sorted(missing))}; this should be a file that "
              "`evaluate.py accuracy` wrote")
    check(lines, f"{path}: the file is empty")
    return [record for _, record in lines]


def marks(records: list[dict]) -> dict[str, float]:
    """The share of right answers to each problem."""
    found: dict[str, list[bool]] = {}
    for record in records:
        found.setdefault(str(record["id"]), []).append(record["correct"])
    return {problem: float(np.mean(correct)) for problem, correct in found.items()}


def summarise(records: list[dict]) -> dict:
    """avg@k with its standard error over problems, pass@k, and what one must know to compare."""
    means = np.array(list(marks(records).values()))
    n = len(means)
    return {"accuracy": means.mean(), "standard_error": means.std(ddof=n > 1) / math.sqrt(n),
            "pass": np.mean(means > 0), "problems": n, "samples": len(records) // n,
            "mean_tokens": np.mean([len(record["teacher_logprobs"]) for record in records]),
            "truncated": np.mean([not record["finished"] for record in records])}


def describe(records: list[dict]) -> str:
    """The summary as a line, from the records alone."""
    got, setup = summarise(records), records[0]["setup"]
    several = f", pass@{got['samples']} {got['pass']:.3f}" if got["samples"] > 1 else ""
    decoding = f"T={setup['temperature']:g}, top-p {setup['top_p']:g}"
    return (f"{setup['model']} on {setup['benchmark']}: accuracy {got['accuracy']:.3f} +- "
            f"{got['standard_error']:.3f}{several} (n={got['problems']} x {got['samples']}, "
            f"{decoding if setup['temperature'] else 'greedy'}, {got['mean_tokens']:.1f} tokens, "
            f"{got['truncated']:.1%} cut off at {setup['max_new_tokens']})")


def commit() -> str:
    """Which code this is, for reports."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = shutil.which("git") and subprocess.run(command, capture_output=True, text=True)
    return (git and git.stdout.strip()) or "unknown"


def peak_memory_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return 0.0  # not known without a further package
    import resource
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1e9 if sys.platform == "darwin" else 1e6)  # macOS counts bytes


def accuracy(args: argparse.Namespace) -> None:
    """Answers a benchmark, grades the answers, keeps a record of each, prints their accuracy."""
    check(args.samples == 1 or args.temperature, "--samples > 1 needs a --temperature above 0: "
          "greedy answers are all alike")
    problems = data.load_problems(args.benchmark, args.suffix, args.system)[:args.limit or None]
    order = {str(problem["id"]): i for i, problem in enumerate(problems)}
    check(len(order) == len(problems), f"{args.benchmark}: some problems have the same id")
    setup = {key: vars(args)[key] for key in ("model", "benchmark", "suffix", "system", "dtype",
                                              "temperature", "top_p", "max_new_tokens", "seed")}
    setup["problems_sha256"] = hashlib.sha256(json.dumps(problems).encode()).hexdigest()[:16]
    home = Path(args.model) if Path(args.model).is_dir() else Path("answers", Path(args.model).name)
    decoding = f"T{args.temperature:g}x{args.samples}" if args.temperature else "greedy"
    out = Path(args.out or home / f"{Path(args.benchmark).stem.replace(':', '-')}-{decoding}.jsonl")
    with data.resumable(out, setup, args.resume) as (part, add):
        records = {(str(record["id"]), record["sample"]): record  # OUT: there may be more --samples
                   for file in (out, part) if args.resume and file.exists()
                   for record in read_answers(file)}
        if len(records) < len(problems) * args.samples:
            model, tokenizer = data.load(args.model, args.dtype, args.device)
            for record in answers(model, tokenizer, problems, args.samples, args.temperature,
                                  args.top_p, args.max_new_tokens, args.batch_size, args.seed,
                                  set(records)):
                records[str(record["id"]), record["sample"]] = add(record)
        found = [records[key] for key in sorted(records, key=lambda key: (order[key[0]], key[1]))]
        if part.exists():
            data.write_jsonl(out, found)
    print(f"{describe(found)}; {out}, {peak_memory_gb(args.device):.2f} GB, commit {commit()}")


def grade(args: argparse.Namespace) -> None:
    """Adds verdicts to traces from elsewhere that have an `answer`; training needs them right."""
    records = []
    for where, record in data.read_jsonl(args.traces):
        response, gold = (data.conversation(record, where)[1],
                          data.text_field(record, ["answer"], where))
        records.append({**record, "extracted": extract_answer(response),
                        "correct": is_correct(response, gold)})
    check(records, f"{args.traces}: the file is empty")
    data.write_jsonl(args.out, records)
    print(f"{args.out}: {sum(r['correct'] for r in records)} of {len(records)} traces are right")


def compare(args: argparse.Namespace) -> None:
    """Paired comparison of two files of answers to the same problems: what "A beats B" means."""
    sides = [read_answers(file) for file in args.files]
    print(*map(describe, sides), sep="\n")
    asked = [{str(r["id"]): (r.get("prompt"), r.get("answer")) for r in side} for side in sides]
    check(asked[0] == asked[1], f"{' and '.join(args.files)}: not answers to the same problems")
    a, b = map(marks, sides)
    gain, rng = np.array([a[problem] - b[problem] for problem in a]), np.random.default_rng(0)
    low, high = np.percentile([rng.choice(gain, len(gain)).mean() for _ in range(10000)],
                              (2.5, 97.5))
    more, less = int(sum(gain > 0)), int(sum(gain < 0))
    tail = sum(math.comb(more + less, k) for k in range(min(more, less) + 1))  # of a fair coin
    print(f"A - B: {gain.mean():+.4f}, 95 % interval {low:+.4f} to {high:+.4f} (bootstrap over the "
          f"problems); A is better on {more}, B on {less} of {len(gain)}, exact McNemar p = "
          f"{min(1.0, 2 * tail / 2 ** (more + less)):.2g}")


# ---- Exposure bias


@torch.no_grad()
def drift(author: Transformer, teacher: Transformer, student: Transformer, prompts: list[list[int]],
          args: argparse.Namespace, vocab_size: int) -> np.ndarray:
    """[prompts, max_new_tokens]: KL(p || q), in nats, at each position of what `author` samples,
    from the first token to the EOS; NaN behind it."""
    found = np.full((len(prompts), args.max_new_tokens), np.nan)
    for start in tqdm(range(0, len(prompts), args.batch_size), desc="measuring", disable=None):
        some = prompts[start:start + args.batch_size]
        drawn = author.sample(some, args.max_new_tokens, 1.0, [
            (args.seed, start + i) for i in range(len(some))], vocab_size=vocab_size)
        batch = data.collate([data.Example("", np.array(prompt + ids), len(prompt), None)
                              for prompt, (ids, _) in zip(some, drawn, strict=True)])
        batch = batch.to(args.device)
        p, q = (model(batch.tokens).flatten(0, 1)[batch.rows] for model in (teacher, student))
        kl = torch.cat([loss.kl(student.logits(q_rows)[:, :vocab_size],  # V is wide: some at a time
                                teacher.logits(p_rows)[:, :vocab_size])
                        for p_rows, q_rows in zip(p.split(256), q.split(256), strict=True)])
        check(kl.isfinite().all(), "exposure: logits are not finite; try --dtype float32")
        for row, values in enumerate(kl.cpu().split([len(ids) for ids, _ in drawn]), start):
            found[row, :len(values)] = values
    return found


def excess(student: np.ndarray, teacher: np.ndarray, draws: int = 1000) -> dict[str, np.ndarray]:
    """ExAccErr(l) = (R(l) - epsilon(l)) / epsilon(l), in percent (Arora et al. 2022, arXiv
    2204.01171), from `drift` [problems, samples, L] on student and teacher prefixes, with the 95 %
    interval of a bootstrap over problems. A position's mean is over the answers that reach it."""
    n = len(student)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)
    weights = np.concatenate([np.ones((1, n)), weights])  # the first row is the estimate itself
    with np.errstate(invalid="ignore", divide="ignore"):
        R, epsilon = (np.cumsum(weights @ np.nansum(kl, 1) / (weights @ np.isfinite(kl).sum(1)), 1)
                      for kl in (student, teacher))
        equal = np.maximum(R, epsilon) < 1e-6 * np.arange(1, R.shape[1] + 1)  # but for rounding
        curve = np.where(equal, 0.0, (R - epsilon) / epsilon * 100)
    end = int(np.isfinite(curve[0]).sum())  # where the last answer of one side ends
    low, high = np.nanpercentile(curve[1:, :end], (2.5, 97.5), axis=0)
    return {"excess": curve[0, :end], "low": low, "high": high, "R": R[0, :end],
            "epsilon": epsilon[0, :end]}


def pyplot():
    try:
        import matplotlib
    except ImportError as error:
        raise BadInput("pictures need matplotlib: pip install -r tests/requirements.txt") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot
    return matplotlib.pyplot


def exposure(args: argparse.Namespace) -> None:
    """ExAccErr: how much more a student errs on its own prefixes than on those of the teacher."""
    plot = args.plot and pyplot()
    (teacher, other), (student, tokenizer) = (data.load(name, args.dtype, args.device)
                                              for name in (args.teacher, args.student))
    check(other.vocab == tokenizer.vocab, f"{args.teacher} and {args.student}: two vocabularies")
    problems = data.load_problems(args.benchmark, args.suffix, args.system)[:args.limit or None]
    prompts = sorted(ask(problems, tokenizer), key=len)
    shape = len(prompts), args.samples, args.max_new_tokens
    prompts = [prompt for prompt in prompts for _ in range(args.samples)]
    own, theirs = (drift(author, teacher, student, prompts, args, tokenizer.vocab_size)
                   .reshape(shape) for author in (student, teacher))
    curve = excess(own, theirs)
    lines = [{"length": i + 1, **{key: round(float(values[i]), 6) for key, values in curve.items()}}
             for i in range(len(curve["R"]))]
    data.write_jsonl(args.out, lines)
    for line in lines[len(lines) - 1::-max(len(lines) // 8, 1)][::-1]:
        print("ExAccErr({length}) = {excess:+.2f} %  [{low:+.2f}, {high:+.2f}]; summed KL on the "
              "student's prefixes {R:.4f}, on the teacher's {epsilon:.4f}".format(**line))
    if plot:
        figure, axes = plot.subplots(figsize=(7, 4), layout="constrained")
        lengths = [line["length"] for line in lines]
        axes.axhline(0, color="0.5", linewidth=0.8)
        axes.plot(lengths, curve["excess"], color="#5e3c99", label=args.student)
        axes.fill_between(lengths, curve["low"], curve["high"], alpha=0.2, color="#5e3c99",
                          label="95 % interval")
        axes.set(xlabel="length l (tokens)", ylabel="ExAccErr(l), %",
                 title=f"Excess error on its own prefixes ({shape[0]} x {shape[1]} answers)")
        axes.legend()
        figure.savefig(args.plot, dpi=150)


# ---- A page of traces, a report of runs


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>DisCorD weights</title><style>
body {{ font: 16px/1.9 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em;
        color: #111; print-color-adjust: exact; -webkit-print-color-adjust: exact }}
table {{ width: 100%; border-collapse: collapse; table-layout: fixed }}
tbody {{ break-inside: avoid }} .prompt {{ background: #f4f4f4 }}
td, th {{ white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; text-align: left;
          padding: .3em .6em; border: 1px solid #ccc }}
.low {{ border-bottom: 2px dotted #b35806 }} .high {{ border-bottom: 3px double #5e3c99 }}
</style><h1>What counts in these traces</h1><p>Each token in the colour of its weight
w = 2 sigmoid((log q - log p) / {tau:g}); point at one for the student's q and the teacher's p.
<p>w = {legend} (below 0.5 dotted, above 1.5 underlined twice)<table>{table}</table></html>
"""


def token_span(piece: str, w: float, title: str = "") -> str:
    """A token of the page: orange if it counts less than in SFT, violet if more."""
    color = f"rgba({'230,97,1' if w < 1 else '94,60,153'},{abs(w - 1) * 0.7:.2f})"
    kind = "low" if w < 0.5 else "high" if w > 1.5 else ""
    text = html.escape(piece).replace("\n", "\u21b5\n")
    return f'<span class="{kind}" style="background:{color}" title="{title}">{text}</span>'


@torch.no_grad()
def weights(args: argparse.Namespace) -> None:
    """Writes a page of traces, each token in the colour of its weight, one column a student."""
    columns = []
    for name in args.students:
        model, tokenizer = data.load(name, args.dtype, args.device)
        examples = data.load_traces(args.traces, tokenizer, args.max_length, True)[0][:args.limit]
        columns.append([f"<th>{html.escape(name)}</th>"])
        found = data.response_logp(model, examples, tokenizer.vocab_size)
        for example, q_logp in zip(examples, found, strict=True):
            w = loss.discord_weight(torch.tensor(q_logp), torch.tensor(example.p_logp), args.tau)
            stream = DecodeStream()
            spans = [token_span(stream.step(tokenizer.backend, token) or "", weight,
                                f"student {q:.3g}, teacher {p:.3g}, weight {weight:.3f}")
                     for token, weight, q, p in zip(
                         example.tokens[example.prompt:].tolist(), w.tolist(), np.exp(q_logp),
                         np.exp(example.p_logp), strict=True)]
            columns[-1].append(f"<td>{''.join(spans)}\n(mean weight {w.mean():.3f})</td>")
    rows = ["".join(row) for row in zip(*columns, strict=True)]
    for i, example in enumerate(examples, 1):
        text = tokenizer.backend.decode(example.tokens[:example.prompt].tolist(),
                                        skip_special_tokens=False)
        rows[i] = (f'<td class="prompt" colspan="{len(columns)}">{html.escape(text)}</td></tr>'
                   f"\n<tr>{rows[i]}")
    legend = " ".join(token_span(f"\xa0{w:g}\xa0", w) for w in np.linspace(0, 2, 9))
    with data.writing(args.out) as temporary:
        temporary.write_text(PAGE.format(tau=args.tau, legend=legend, table="".join(
            f"<tbody><tr>{row}</tr></tbody>\n" for row in rows)), encoding="utf-8")
    print(f"{args.out}: {len(examples)} traces, students {', '.join(args.students)}")


def report(args: argparse.Namespace) -> None:
    """Prints a table of runs and draws their curves. Folders that have one name, but for "seed7",
    are the seeds of one run: mean +- standard deviation; a single one +- standard error."""
    plot, groups, tests = args.plot and pyplot(), {}, {}
    for folder in map(Path, args.runs):
        run, log = read_json(folder / "run.json"), list(data.read_jsonl(folder / "log.jsonl"))
        check("seconds" in run, f"{folder}: this run has not finished; add --resume to its command")
        got = {file.stem: summarise(read_answers(file)) for file in folder.glob("*-*.jsonl")}
        tests |= dict.fromkeys(sorted(got))
        name = re.sub(r"[-_]?seed[-_]?\d+[-_]?", "", folder.name) or folder.name
        group = groups.setdefault(name, [])
        group.append({"run": run, "log": [line for _, line in log], **got})
        for key in ("objective", "tau", "beta", "lr", "steps"):
            now, was = run["options"][key], group[0]["run"]["options"][key]
            check(now == was, f"{folder}: {key} is {now}, but it was {was} in another run of the "
                  "same folder name: not two seeds of one run; rename a folder")
    table = [["run", "seeds", *tests, "tokens", "steps", "seconds"]]
    bars: dict[str, list[tuple[float, float]]] = {test: [] for test in tests}
    for name, group in groups.items():
        cells, lengths = [], []
        for test in tests:
            found = [one[test] for one in group if test in one]
            means = [summary["accuracy"] for summary in found] or [math.nan]
            spread = np.std(means, ddof=1) if found[1:] else sum(s["standard_error"] for s in found)
            bars[test].append((np.mean(means), spread))
            cells.append("{:.3f} +- {:.3f}".format(*bars[test][-1]) if found else "")
            lengths += [summary["mean_tokens"] for summary in found]
        seconds = np.mean([one["run"]["seconds"] for one in group])
        table.append([name, len(group), *cells, f"{np.mean(lengths):.1f}" if lengths else "",
                      group[0]["run"]["steps"], f"{seconds:.0f}"])
    widths = [max(len(str(cell)) for cell in column) for column in zip(*table, strict=True)]
    for row in [table[0], ["-" * width for width in widths], *table[1:]]:
        print("|", " | ".join(f"{cell!s:<{w}}" for cell, w in zip(row, widths, strict=True)), "|")
    if plot:
        figure, axes = plot.subplots(2, 2, figsize=(11, 7), layout="constrained")
        axes[0, 0].set(title="accuracy", ylim=(0, 1.05), xticks=range(len(groups)))
        axes[0, 0].set_xticklabels(groups, rotation=15, horizontalalignment="right")
        for i, (test, values) in enumerate(bars.items()):
            x = np.arange(len(groups)) + (i - (len(bars) - 1) / 2) * 0.8 / len(bars)
            heights, spreads = zip(*values, strict=True)
            axes[0, 0].bar(x, heights, 0.8 / len(bars), yerr=spreads, capsize=3, label=test,
                           color=f"{0.85 - 0.5 * i / len(bars):.2f}", edgecolor="0.2")
        titles = {"loss": "weighted loss", "weight": "mean weight", "ess": "effective sample size"}
        for axis, (key, title) in zip(axes.flat[1:], titles.items(), strict=True):
            for i, (name, group) in enumerate(groups.items()):
                for one in group:
                    points = zip(*((line["step"], line[key]) for line in one["log"]), strict=True)
                    axis.plot(*points, ("-", "--", ":", "-.")[i % 4], color=f"C{i}",
                              label=name if one is group[0] else None)
            axis.set(title=title, xlabel="step")
        for axis in axes.flat:
            axis.legend(fontsize="small")
        figure.savefig(args.plot, dpi=150)


# ---- The command line


def main(argv: list[str] | None = None) -> None:
    name, answering = "HF folder or Hub name", {
        "--benchmark": (str, f"{', '.join(data.BENCHMARKS)}; a split: gsm8k:train; or FILE.jsonl"),
        "--suffix": (None, "behind each question that has no \\boxed in it (default: "
                     f"{data.SUFFIX!r}; for a file nothing)"),
        "--system": ("", "system prompt"),
        "--limit": (0, "only the first so many problems"),
        "--max-new-tokens": (1024, "longer answers are cut off, and wrong"),
        "--batch-size": (64, "answers at a time"),
        "--seed": (0, "each answer's seed is made from it"), **data.MODEL_OPTIONS}
    data.command_line(__doc__.splitlines()[0], {
        accuracy: {
            "--model": (str, name), **answering,
            "--out": ("", "OUT.jsonl: a record of each answer; a teacher's are traces. Without it: "
                      "BENCHMARK-DECODING.jsonl in the model's folder, or in answers/NAME"),
            "--resume": (False, "go on where it was broken off"),
            "--samples": (1, "answers to each problem"),
            "--temperature": (0.0, "of sampling; 0 is greedy"),
            "--top-p": (1.0, "nucleus sampling below 1")},
        grade: {"--traces": (str, "T.jsonl: traces with an `answer`"),
                "--out": (str, "OUT.jsonl: the same traces with verdicts")},
        compare: {"files": (2, "ANSWERS.jsonl of A and of B")},
        exposure: {
            "--teacher": (str, name), "--student": (str, name), **answering,
            "--samples": (4, "answers of each model to each problem"),
            "--out": (str, "CURVE.jsonl: a line for each length"),
            "--plot": ("", "CURVE.png: draw it, too (needs matplotlib)")},
        weights: {
            "students": ("+", "models, a column for each: before, after"),
            "--traces": (str, "T.jsonl, with teacher_logprobs"),
            "--out": (str, "PAGE.html: opens in any browser, needs nothing else"),
            "--tau": (loss.TAU, "temperature of the weight"), "--limit": (10, "how many traces"),
            "--max-length": (4096, "longer traces are left out (tokens)"), **data.MODEL_OPTIONS},
        report: {
            "runs": ("+", "folders of train.py, with the answers that `accuracy` put there"),
            "--plot": ("", "REPORT.png: draw the curves, too (needs matplotlib)")}}, argv)


if __name__ == "__main__":
    data.one_line_errors(main)
