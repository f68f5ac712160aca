"""Answers, their grading, accuracy, comparison, exposure bias, a page of token weights.

One engine serves the student's accuracy and the teacher's traces alike: the right answers
of a teacher's evaluation are the traces that train.py reads.
"""

import argparse
import ast
import cmath
import copy
import hashlib
import html
import json
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from functools import lru_cache
from operator import add, mul, sub, truediv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants, errors, utils
from tokenizers.decoders import DecodeStream

import data
import loss
from model import BadInput, Transformer, check, read_json

# ---- Grading. The policy, all of it:
# - The answer is the last \boxed{}; neighboring boxes are a list. "The final answer is 5"
#   behind the boxes wins. Without a box, the answer follows #### or "answer is", or is the
#   last number or formula. "not 5" and what stands before </think> are skipped.
# - Units are dropped; if both answers have some, they must agree. 20% is 20 or 0.2. 1,234
#   is a number or a list, 1,034 a number. 2 1/2 is mixed. Lists have no order, points do.
# - A gold x = 5 accepts 5, but not y = 5. If the gold answer has no "=", what follows the
#   last "=" of a prediction counts. Equations may be multiples of each other.
# - 1 < x <= 2 is the interval (1, 2], x < 2 is (-infinity, 2). The letter does not matter.
# - Whole numbers are compared exactly, others to nine digits (0.3333 is not 1/3), formulas
#   at four random points, the rest letter by letter. Python's parser takes formulas apart,
#   and only `evaluate` computes them: no model text is ever run.
LONGEST = 1000  # characters of an answer
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, "infty": math.inf, "infinity": math.inf}
CONSTANTS |= {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6,
              "billion": 10**9, "trillion": 10**12}
FUNCTIONS: dict[str, Callable] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "exp": cmath.exp,
    "log": cmath.log, "ln": cmath.log, "abs": abs, "frac": truediv,
    "root": lambda degree, x: power(x, 1 / degree),
    "binom": lambda n, k: math.gamma(n + 1) / math.gamma(k + 1) / math.gamma(n - k + 1),
}
SPELLINGS = {
    "−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "±": r"\pm ", "∞": r"\infty ",
    "∪": ",", "π": r"\pi ", "√": r"\sqrt ", "∈": r"\in ", "½": r"\frac12 ",
    "¼": r"\frac14 ", "¾": r"\frac34 ", r"\!": "", r"\ ": " ", "\u200b": " ",
}
for words in (r"≤ \leq \le \leqslant", r"≥ \geq \ge \geqslant", r"≠ \neq \ne", r"< \lt",
              r"> \gt", r"\frac \dfrac \tfrac \cfrac", r"\binom \dbinom", r"% \%",
              r"* \cdot \times", r", \cup", r"| \lvert \rvert"):
    spelling, *others = words.split()
    SPELLINGS |= dict.fromkeys(others, spelling)
SPACES = (r"° € £ ~ \, \; \: \degree \displaystyle \quad \qquad \left \right "
          r"\big \Big \bigl \bigr \Bigl \Bigr")
SPELLINGS |= dict.fromkeys(SPACES.split(), " ")
SPELLINGS |= {digit: f"^{i}" for i, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {"⁻": "^-"}
SPELLINGS |= {digit: f"_{i}" for i, digit in enumerate("₀₁₂₃₄₅₆₇₈₉")}
# A line break of a matrix, a command (doubled in some data sets), any other symbol.
SYMBOL = re.compile(r"\\\\(?![a-zA-Z]{2})|\\?(\\q?quad|\\[a-zA-Z]{2,}|\\.|[^\x00-\x7f]|~)")
TEXT = r"\\(?:text(?:bf|rm|normal)?|mbox|math(?:rm|bf)|operatorname)\s*\{"
FUNCTION = rf"(?:{'|'.join(FUNCTIONS)})"
NO_UNIT = (rf"(?!\s*(?:{FUNCTION}|{'|'.join(CONSTANTS)}|sqrt|and|or|mod|arc[a-z]+|"
           r"sinh|cosh|tanh)(?![a-zA-Z]))")
UNIT = re.compile(
    rf"(?<=[\w}})%])\s*{TEXT}{NO_UNIT}([^{{}}]{{2,}}|m)\}}"  # \text{ cm}^2
    r"(?:\s*\^\s*\{?[23]\}?)?|"
    rf"(?:(?<=[0-9}})%])|(?<=pi)|(?<=llion))(\s+{NO_UNIT}[a-zA-Z]{{3,}}|"  # 18 feet
    r"\s*(?:[cmk]m|kg|ft|[apAP]\.?[mM]|m(?=\^[23]))(?![a-zA-Z]))"  # 18cm, 9 a.m.
    r"([a-zA-Z /.]*)(?:\^\{?[23]\}?)?"
)
BRACES = "[^{}]*"
for _ in range(5):  # five deep
    BRACES = rf"[^{{}}]*(?:\{{{BRACES}\}}[^{{}}]*)*"
BRACKET = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
ARGUMENT = rf"(?!{FUNCTION})[\w.]+(?:\^\w+|\^?{BRACKET})?"

def rewrite(text: str, rules: list[str]) -> str:
    """Apply rules such as "a => b", which replaces the regular expression a by b."""
    for rule in rules:
        old, new = rule.split(" => ")
        text = re.sub(old, new, text)
    return text

# Rules that bring answers into one spelling, and examples of what they change.
CLEAN = [
    r"\{,\} => ,", r",\s*\.\.\. => ,dots",  # 10{,}000; 1, 2, ...
    r"(?<=[0-9])(?<![0-9]{4}),(?=0[0-9]{2}(?![0-9])) => ",  # 10,000
    r"(?<=\^[-0-9])\^(?=[0-9]) => ", r"(?<=_[0-9])_(?=[0-9]) => ",  # 2^1^0, from 2¹⁰
    r"\\sqrt\s*([0-9]+) => \\sqrt{\1}",  # √13
    r"(?<=[0-9]) (?=[0-9]{3}(?![0-9])) => ",  # 10 000
    r"\\[()\[\]]|[$`] =>  ",  # \( and money
    r"\^\s*\{?\s*\\circ\s*\}?|\bdegrees?\b|\*\* =>  ",  # 90^\circ, **bold**
    rf"(?:{TEXT})?\s*\b(?:percent(?:age(?: points?)?)?|pct)\b\}}? => %",
    r"\\(frac|sqrt)\s*([0-9]|\\pi) => \\\1{\2}",  # \frac12
    rf"(\\frac\{{{BRACES}\}})\s*([0-9]) => \1{{\2}}",  # \frac{1}2
    r"(?<![0-9.}^_])([0-9]+)\s*\\frac\{([0-9]+)\}\{([0-9]+)\} => (\1+\2/\3)",  # 2\frac12
    r"(?<![0-9.}^_])([0-9]+) ([0-9]+)/([0-9]+) => (\1+\2/\3)",  # 2 1/2
    r":00(?=\s*(?:\\text\{)?\s*[apAP]\.?[mM]) => ",  # 9:00 a.m.
    r"^[^=:]*[a-zA-Z][^=:]*:[^=]*= => ",  # A:B = 3:4
    r"(?<![0-9.:])([0-9.]+):([0-9.]+)(?![0-9.:]) => (\1,\2)",  # 3:4, 2:30
    r"^\s*[a-zA-Z]\s*\\in(?![a-z]) => ",  # x \in
    r"\\?\w*\s*\([a-zA-Z, ]+,[a-zA-Z ]+\)\s*= => ",  # f(x, y) =
    r"^([^0-9=]*)\\approx => \1=", r"\\approx.* => ",  # x \approx 3, 1/3 \approx 0.33
    r"<= => ≤", r">= => ≥", r"!= => ≠", r"; => ,",
]
WORDS = [
    rf"{TEXT}([^{{}}]*)\}} =>  \1 ", r"(?<![\\a-zA-Z])(?:and|or)(?![a-zA-Z]) => ,",
    r"\s+ =>  ", r"\s*,[\s,]* => ,", r" ?([^\w\s]) ? => \1",
    r"^[\s,.:\"]+(?![0-9])|[\s,.:\"]+$ => ",  # . and "
    r"=[^=,]*(?==) => ",  # x = 1 + 1 = 2
]
NAME = r"[a-zA-Z](?:_\w)?(?:\([a-z]\))?"
ENDS = r"(?:[^()\[\]]|\([^()\[\]]*\))*"
# Rules that turn an answer into Python. A name at the end of a tuple marks what it is.
PYTHON = [
    r"(?<![\w)}\]!])\+ => ",  # +5
    r"([^<>≤≥,]+)>([^<>≤≥,]+) => \2<\1", r"([^<>≤≥,]+)≥([^<>≤≥,]+) => \2≤\1",  # 2 > x
    rf"(?<![^,])({NAME}[<≤][^<≤,]+)(?![^,]) => -infty<\1",  # x < 2
    rf"(?<![^,])([^<≤,]+[<≤]{NAME})(?![^,]) => \1<infty",  # 2 < x
    rf"([^<≤,]+)<{NAME}<([^<≤,]+) => (\1,\2)", rf"([^<≤,]+)<{NAME}≤([^<≤,]+) => (\1,\2]",
    rf"([^<≤,]+)≤{NAME}<([^<≤,]+) => [\1,\2)", rf"([^<≤,]+)≤{NAME}≤([^<≤,]+) => [\1,\2]",
    rf"\(({ENDS})\] => (\1,open_closed)", rf"\[({ENDS})\) => (\1,closed_open)",
    r"\\begin\{[bp]matrix\} => ((", r"(?:\\\\)?\s*\\end\{[bp]matrix\} => ),matrix)",
    r"\\\\ => ),(", r"& => ,", r"\\\{|\\\}|^\{([^{}]*)\}$ => \1",  # \{1,2\}
    r"\|([^|]*)\| => abs{\1}", r"\\?sqrt\s*\[(\w+)\]\s*\{ =>  root{\1,",  # \sqrt[3]{x}
    r"\\?sqrt\s*[({] =>  root{2,", r"\\?sqrt\s*(\\?\w+) =>  root(2,\1)",  # \sqrt{2}
    r"_\s*(?:\{\\?(\w+)\}|\\([a-zA-Z]+)) => _\1\2",  # a_{n}
    r"(?<=[0-9])_(?=[0-9]) => *base",  # 101_2 -> 101*base2
    r"\}\s*\{ => ,", r"\{ => (", r"\} => )",  # frac{1}{2} -> frac(1,2)
    r"\\([a-zA-Z]+(?:_\w+)?) =>  \1 ", r" *\^ * => ^",
    r"(?<![a-zA-Z_])(?!pi|ln)([a-zA-Z])(?=[a-zA-Z](?![a-zA-Z])) => \1 ",  # xy -> x y
    r"(?<=[0-9])(?=[a-zA-Z])(?![eE][-+]?[0-9]) =>  ",  # 2x -> 2 x
    r"(?<![\w.])0+(?=[0-9]) => ",  # 025
    r"(?<=[\w)]) *(?=\()|(?<=[\w)]) +(?=[a-zA-Z])|(?<=\))(?=[a-zA-Z]) => *",  # 2 x -> 2*x
    rf"\b({FUNCTION})\*(?=\() => \1",  # frac*(1,2) -> frac(1,2)
    rf"\b({FUNCTION}(?:\^\w+)?)\*({ARGUMENT}(?:\*{ARGUMENT})*) => \1(\2)",
    rf"\b({FUNCTION})\^\(?([0-9]+)\)?\*?({BRACKET}) => \1\3^\2",  # sin^2(x)
    r"% => /100", r"\^ => **", r"= => ==", r"≠ => !=",
]

@lru_cache
def parse(text: str) -> list:
    """The items of a list, taken apart by Python's parser. Plus-minus makes two of one."""
    if r"\pm" in text:
        items = parse(text.replace(r"\pm", "+")) + parse(text.replace(r"\pm", "-"))
        return list({ast.dump(node): node for node in items}.values())
    code: Any = ast.parse(f"[{rewrite(text, PYTHON)}]", mode="eval")
    items = code.body.elts
    one_value = not re.search(THOUSANDS, text) and all(
        equivalent(items[0], item) for item in items[1:])
    return items[:1] if one_value else items

def power(base, exponent):
    """Exact, unless that takes too many digits."""
    if isinstance(base, Fraction):
        bits = (base.numerator * base.denominator).bit_length()
        if abs(exponent) * bits > 4 * LONGEST:
            base = float(base)
    return base ** exponent

OPERATORS = {ast.Add: add, ast.Sub: sub, ast.Mult: mul, ast.Div: truediv, ast.Pow: power,
             ast.Eq: sub, ast.NotEq: sub}

def evaluate(node: Any, point: int):
    """The value of a formula at a random point; of an equation, left minus right side."""
    def value(node: Any):
        return evaluate(node, point)
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.Name(id=name):
            size = random.Random(f"{name} {point}").randrange(101, 999)
            negative = (ord(name[0]) + point) % 3 == 0  # at one or two of four points
            return Fraction(-size if negative else size, 500)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -value(operand)
        case (ast.BinOp(left=left, op=op, right=right)
              | ast.Compare(left=left, ops=[op], comparators=[right])):
            return OPERATORS[type(op)](value(left), value(right))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return FUNCTIONS[name](*map(value, arguments))
    raise ValueError(f"{node} is not in the grammar")

def close(a, b) -> bool:
    """To nine digits: 0.0833333333333 may be a computed 1/12. A whole number is exact."""
    exact = isinstance(a, Fraction) and isinstance(b, Fraction)
    if exact and 1 in (a.denominator, b.denominator):
        return a == b
    return cmath.isclose(a, b, rel_tol=1e-9, abs_tol=0 if a and b else 1e-12)

def equivalent(a: Any, b: Any) -> bool:
    """Are two answers equivalent?"""
    if isinstance(a, ast.Tuple | ast.List) or isinstance(b, ast.Tuple | ast.List):
        same_shape = type(a) is type(b) and len(a.elts) == len(b.elts)
        return same_shape and all(map(equivalent, a.elts, b.elts))
    values = []
    for point in range(4):
        values.append((evaluate(a, point), evaluate(b, point)))
    if isinstance(a, ast.Compare) and isinstance(b, ast.Compare):
        first, *ratios = [x / y for x, y in values]  # Is one a multiple of the other?
        same_sign = type(a.ops[0]) is type(b.ops[0])
        return same_sign and first != 0 and all(close(ratio, first) for ratio in ratios)
    if isinstance(a, ast.Compare) or isinstance(b, ast.Compare):
        return False
    return all(close(x, y) for x, y in values)

def equivalent_lists(a: list, b: list) -> bool:
    """Are two lists equivalent in any order?"""
    rest = list(b[:50])
    for item in a:
        matches = [other for other in rest if equivalent(item, other)]
        if not matches:
            return False
        rest.remove(matches[0])
    return len(a) == len(b) > 0

# $18 is money, not the beginning of a formula.
MONEY = re.compile(r"\\\$|\$(?=[0-9][0-9,.]{0,15}(?: +[a-zA-Z]{2}|[^$\n]*$))", re.MULTILINE)
BOX = re.compile(rf"\\boxed\s*\{{({BRACES})\}}")
BOXES = re.compile(rf"{BOX.pattern}(?:(?:\W|text|and|or)*{BOX.pattern})*")
FORMULA = r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\$[^$\n]+\$"
# A formula, or text without words that begins with a number, such as 3x + 5. It may have
# the words of a longer answer, as in 1 hour 20 minutes, and ends with two words of a unit.
PLACE = (
    rf"(?:{FORMULA}|(?<![\w\\.^/])(?<![\w)][-+*])(?<![-+*/^<>≤≥≠] )[-+(.]*"
    r"(?:[0-9]|\\[a-zA-Z]+)(?:\\[a-zA-Z]+|(?<![a-zA-Z])"
    r"(?:and|or|pi|(?:dollar|pound|week|day|hour|minute)s?|feet|[mb]illion|[ap]\.?m|[AP]M|"
    r"[b-zA-HJ-Z])(?![a-zA-Z])"
    r"|(?![.!?](?:\s|$))[-+*/=^_(){}\[\],.:;%'!<>| 0-9])*(?:[a-zA-Z]{3,} ?){0,2}|\$)"
)
FINAL = re.compile(rf"(?is)final answer(?: is\b|:)[\s:*\"]*(?={PLACE})")
STATED = re.compile(r"(?i)(?:####|answers?(?: is\b| are\b|:))(?:[\s:*]|\\\[)*")
SENTENCE = re.compile(r"(?:(?!\.(?:\s|$)).)*")
NEGATED = rf"(?s)(?:\b(?:not|never|instead of|rather than)|n't)\b[^$0-9\\.]*{PLACE}"
WORD = re.compile(rf"(?<![a-zA-Z\\]){NO_UNIT}[a-zA-Z]{{3}}")

def extract_answer(text: str, gold: bool = False) -> str:
    r"""Where the answer stands. A gold answer without a mark is all answer.
    >>> extract_answer(r"First \boxed{3}, so it is \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    >>> extract_answer("The answer is not 5 but 7 apples.")
    '7 apples'
    """
    text = SYMBOL.sub(lambda found: SPELLINGS.get(found[1], found[1] or found[0]), text)
    text = MONEY.sub("", unicodedata.normalize("NFKC", text))
    text = re.sub(r"(?i)\b(?:minus|negative)\s+(\$?)(?=[0-9.\\])", r"\1-", text)
    text = text.rpartition("</think>")[2].strip() or text
    boxed = list(BOXES.finditer(text))
    marks = list(FINAL.finditer(text, boxed[-1].end()) if boxed else STATED.finditer(text))
    if boxed and not marks:
        return "; ".join(BOX.findall(boxed[-1][0]))
    if not marks and gold:
        return text.strip()
    if marks:
        start = marks[-1].end()
        text = SENTENCE.match(text, start, start + 2 * LONGEST)[0]
    text = re.sub(NEGATED, " ", text[-2 * LONGEST:])
    prose = re.sub(r"\\[a-zA-Z]+(?:\s*\{[a-zA-Z ]*\})?", " ", text)
    places = re.findall(f"(?s){PLACE}", text)
    if not places or not WORD.search(prose):
        return text.strip()
    said = re.search(rf"(?s)(?:^|\b(?:is|are|equals))[\s:*]*({PLACE})", text)
    if marks and said:
        return text if re.match(r"[,\s]*[0-9]", text[said.end():]) else said[1]
    return places[0 if marks else -1]

def normalize(text: str) -> tuple[str, set[str]]:
    """The answer in one spelling, and the words of its units."""
    text = rewrite(text[:2 * LONGEST], CLEAN)
    units = " ".join(map(" ".join, UNIT.findall(text)))
    text = rewrite(UNIT.sub(" ", text), WORDS)
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3}", text):
        text = text.lower()
    return text, {*re.findall(r"[a-z]+?(?=s?\b)", units.lower().replace(".", ""))}

THOUSANDS = r"(?<=[0-9])(?<![0-9]{4}),(?=[0-9]{3}(?![0-9]))"
# What a gold equation is about: x, a_n, AB, f(2) or |AB|.
LEFT_SIDE = r"(?:\|[A-Z]+\||[a-zA-Z(][a-zA-Z_'(),]*(?:\{[\\\w ]+\}|\w)?(?:\([0-9]\))?)"
UNREADABLE = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError,
              SyntaxError, TypeError, ValueError)

def is_correct(prediction: str, gold: str) -> bool:
    """Is the final answer of the prediction the gold answer, by the policy above?
    >>> is_correct("He has 1,200 + 34 = 1234 left.\\n#### 1,234", "1234")
    True
    >>> is_correct("It is a 10% increase.", "10% decrease")
    False
    """
    a, a_units = normalize(extract_answer(prediction))
    b, b_units = normalize(extract_answer(gold, gold=True))
    units_agree = a_units <= b_units or b_units <= a_units
    if not units_agree or max(len(a), len(b)) > LONGEST:
        return False
    if a == b:
        return a != ""
    if any(re.fullmatch("[a-zA-Z ]{3,}", text) for text in (a, b)):
        return False  # words, and different ones
    if "=" in a and "=" not in b:
        a = re.sub(r"[^=,<>≤≥≠]*=", "", a)
    if "=" in b and "=" not in a:
        b = re.sub(f"(?<![^,]){LEFT_SIDE}=", "", b)
    attempts = [(a, b), (a.replace("%", ""), b.replace("%", ""))]
    attempts += [(f"({a})", b), (a, f"({b})")]  # 1, 2 for (1, 2)
    if not re.search(r"[(\[]", a + b):
        attempts.append((re.sub(THOUSANDS, "", a), re.sub(THOUSANDS, "", b)))
    for a, b in attempts:
        try:
            if equivalent_lists(parse(a), parse(b)):
                return True
        except UNREADABLE:
            continue
    return False

# ---- Problems: benchmarks with a name, or files
BENCHMARKS = {  # data set on the Hub, configuration, default split
    "gsm8k": "openai/gsm8k main test",
    "math": "DigitalLearningGmbH/MATH-lighteval default test",
    "math500": "HuggingFaceH4/MATH-500 default test",
    "amc23": "math-ai/amc23 default test",
    "aime24": "math-ai/aime24 default test",
    "aime25": "math-ai/aime25 default test",
    "olympiadbench": "Hothan/OlympiadBench OE_TO_maths_en_COMP train",
}
SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."
QUESTIONS = ["prompt", "question", "problem"]
GOLDS = ["answer", "final_answer", "expected_answer", "solution"]

def download_benchmark(name: str) -> Path:
    """The JSONL file of a benchmark, like "math" or "math:train", downloaded once."""
    key, _, split = name.partition(":")
    repo, config, default_split = BENCHMARKS[key].split()
    split = split or default_split
    file = Path(constants.HF_HUB_CACHE, "benchmarks", f"{key}-{split}.jsonl")
    if file.exists():
        return file
    url = constants.ENDPOINT.replace("https://", "https://datasets-server.") + "/rows"
    query = {"dataset": repo, "config": config, "split": split, "length": 100}
    rows, total = [], 1
    try:
        while len(rows) < total:
            query["offset"] = len(rows)
            reply = utils.http_backoff("GET", url, params=query, timeout=10,
                                       headers=utils.build_hf_headers(), base_wait_time=0.2)
            utils.hf_raise_for_status(reply)
            page = reply.json()
            check(page["rows"], f"no rows behind row {len(rows)}")
            for row in page["rows"]:
                check(not row["truncated_cells"], f"row {len(rows)} is cut")
                rows.append(row["row"])
            total = page["num_rows_total"]
    except (OSError, ValueError, LookupError, TypeError, errors.HTTPError) as error:
        raise BadInput(f"--benchmark {name}: cannot get {repo} from the Hub: {error!s:.200}"
                       ) from error
    data.write_jsonl(file, rows)
    return file

def load_problems(benchmark: str | Path, suffix: str | None = None) -> list[dict]:
    """[{"id", "prompt" or "messages", "answer"}] of a named benchmark or a JSONL file. The
    suffix ("box", and for a name: SUFFIX) follows each question that asks for no box."""
    name = str(benchmark).partition(":")[0]
    if name in BENCHMARKS and not Path(benchmark).exists():
        benchmark = download_benchmark(str(benchmark))
        suffix = "box" if suffix is None else suffix
    suffix = SUFFIX if suffix == "box" else suffix
    problems = []
    for where, record in data.read_jsonl(benchmark):
        present = [record[name] for name in GOLDS if name in record]
        golds = [gold for gold in present if gold not in (None, []) and str(gold).strip()]
        check(present, f"{where}: no {' or '.join(GOLDS)}; it has {', '.join(record)}")
        if not golds:
            print(f"{where}: dropped, its answer is empty")
            continue
        answer = golds[0] if isinstance(golds[0], list) else [golds[0]]
        check(not isinstance(answer[0], dict), f"{where}: the answer is an object")
        messages = [{}]
        if "messages" in record:
            messages = [dict(turn) for turn in data.get_messages(record, where)]
        text = messages[-1].get("content") or data.text_field(record, where, *QUESTIONS)
        if suffix and "\\boxed" not in text and not text.endswith(suffix):
            text += suffix
        messages[-1]["content"] = text
        problem = {"id": record.get("id", where.rpartition(" ")[2])}
        problem |= {"messages": messages} if "messages" in record else {"prompt": text}
        problem["answer"] = ", ".join(map(str, answer))
        if "prefix" in record:
            problem["prefix"] = record["prefix"]
        problems.append(problem)
    check(problems, f"{benchmark}: no problems")
    return problems

# ---- Answers and their accuracy
def encode_problems(problems: list[dict], tokenizer: data.Tokenizer) -> list[list]:
    """Prompts as ids. A `prefix`, from `data.py mix`, is the beginning of the answer."""
    prompts, known = [], range(tokenizer.vocab_size)
    for problem in problems:
        where, prefix = f"problem {problem['id']}", problem.get("prefix", [])
        valid = isinstance(prefix, list) and all(i in known for i in prefix)
        check(valid, f"{where}: prefix: not ids of the tokenizer in {tokenizer.folder}")
        messages = data.get_messages(problem, where)
        prompts.append(tokenizer.encode_prompt(messages, where) + prefix)
    return prompts

def generate_answers(model: Transformer, tokenizer: data.Tokenizer, problems: list[dict],
                     samples: int = 1, temperature: float = 0.0,
                     max_new_tokens: int = 1024, batch_size: int = 64, seed: int = 0,
                     done: Collection = ()) -> Iterator[dict]:
    """Yield a graded trace for each (problem id, sample) that is not `done`. Each answer
    has a seed of its own. A resumed run repeats the batches of the whole run, since the
    last digits of a sum depend on what shares its batch."""
    prompts = encode_problems(problems, tokenizer)
    jobs = [(i, k) for i in range(len(problems)) for k in range(samples)]
    jobs.sort(key=lambda job: -len(prompts[job[0]]))  # little padding, largest batch first
    starts = range(0, len(jobs), batch_size)
    for start in data.progress(starts, "answering"):
        batch = jobs[start:start + batch_size]
        keys = [(str(problems[i]["id"]), k) for i, k in batch]
        if all(key in done for key in keys):
            continue
        seeds = [(seed, i, k) for i, k in batch]
        batch_prompts = [prompts[i] for i, _ in batch]
        answers = model.sample(batch_prompts, max_new_tokens, temperature, seeds)
        for key, (i, k), (ids, logp) in zip(keys, batch, answers, strict=True):
            if key not in done:
                record = grade_answer(model, tokenizer, problems[i], prompts[i], ids, logp)
                record["sample"] = k
                record["temperature"] = temperature
                yield record

def grade_answer(model: Transformer, tokenizer: data.Tokenizer, problem: dict,
                 prompt: list, ids: list, logp: list) -> dict:
    """A sampled answer as a trace with its verdict. An answer that was cut off, by the
    limit or by the model's context, is wrong unless its box was complete."""
    check(not np.isnan(logp).any(), f"problem {problem['id']}: NaN among the "
          "log-probabilities of the answer; try --dtype float32")
    room = max(model.config.max_position_embeddings - len(prompt), 0)
    ids, logp = ids[:room], logp[:room]
    prefix = problem.get("prefix", [])
    if prefix:  # the teacher's log-probabilities of what the student wrote
        example = data.Example(np.array(prompt), len(prompt) - len(prefix))
        logp = [*data.response_logp(model, [example])[0], *logp]
        ids = prefix + ids
    finished = bool(ids) and ids[-1] in model.eos_token_ids
    record = {key: value for key, value in problem.items() if key != "prefix"}
    record["rendered"] = tokenizer.apply_chat_template(data.get_messages(problem, ""))
    record |= data.trace_fields(ids, logp, tokenizer, finished)
    response = record["response"]
    record["extracted"] = extract_answer(response)
    if not finished:
        up_to_box = re.match(rf"(?s).*{BOX.pattern}", response.rpartition("</think>")[2])
        response = up_to_box[0] if up_to_box else ""
    record["correct"] = is_correct(response, problem["answer"])
    return record

def read_answers(path: str | Path) -> list[dict]:
    """The records that `accuracy` wrote."""
    records = [record for _, record in data.read_jsonl(path)]
    for record in records:
        check("setup" in record, f"{path}: expected a file that `accuracy` wrote")
    check(records, f"{path}: the file is empty")
    return records

def accuracy_per_problem(records: list[dict]) -> dict[str, float]:
    """{problem id: share of its answers that are right}"""
    right, answers = Counter(), Counter()
    for record in records:
        answers[str(record["id"])] += 1
        right[str(record["id"])] += record["correct"]
    return {name: right[name] / answers[name] for name in answers}

def summarize(records: list[dict]) -> dict:
    """avg@k with its standard error over problems, pass@k, and what a comparison needs."""
    means = np.array(list(accuracy_per_problem(records).values()))
    n = len(means)
    lengths = [len(record["teacher_logprobs"]) for record in records]
    return {
        "accuracy": means.mean(),
        "standard_error": means.std(ddof=n > 1) / math.sqrt(n),
        "pass": np.mean(means > 0),
        "problems": n,
        "samples": len(records) // n,
        "mean_tokens": np.mean(lengths),
        "cut_off": np.mean([not record["finished"] for record in records]),
    }

def summary_line(records: list[dict]) -> str:
    s, setup = summarize(records), records[0]["setup"]
    decoding = f"T={setup['temperature']:g}" if setup["temperature"] else "greedy"
    pass_at_k = f", pass@{s['samples']} {s['pass']:.3f}" if s["samples"] > 1 else ""
    return (f"{setup['model']} on {setup['benchmark']}: accuracy {s['accuracy']:.3f} +- "
            f"{s['standard_error']:.3f}{pass_at_k} (n={s['problems']} x {s['samples']}, "
            f"{decoding}, {s['mean_tokens']:.1f} tokens, {s['cut_off']:.1%} cut off at "
            f"{setup['max_new_tokens']})")

def say_what_is_not_applied(folder: Path) -> None:
    """transformers and vLLM decode by generation_config.json, greedily, too. We do not."""
    file = folder / "generation_config.json"
    settings = []
    for key, value in (read_json(file) if file.exists() else {}).items():
        neutral = value in (None, 0, 1) or key in ("temperature", "transformers_version")
        if not neutral and not key.endswith("_token_id"):
            settings.append(f"{key}={value}")
    if settings:
        print(f"{file}: not applied here, unlike in transformers and vLLM:", *settings)

def accuracy(args: argparse.Namespace) -> None:
    """Answer a benchmark, grade the answers, keep a record of each, print the accuracy."""
    check(args.samples == 1 or args.temperature, "--samples > 1 needs a --temperature "
          "above 0: greedy answers are all the same")
    problems = load_problems(args.benchmark, args.suffix)[:args.limit or None]
    order = {str(problem["id"]): i for i, problem in enumerate(problems)}
    check(len(order) == len(problems), f"{args.benchmark}: problems with the same id")
    # What a resumed evaluation must have in common with the interrupted one.
    setup = {"problems_sha256": hashlib.sha256(json.dumps(problems).encode()).hexdigest()}
    for name in ("model", "benchmark", "suffix", "dtype", "samples", "temperature",
                 "max_new_tokens", "seed"):
        setup[name] = vars(args)[name]
    # OUT.part has a line per answer so far. It becomes OUT when all are there.
    decoding = f"T{args.temperature:g}x{args.samples}" if args.temperature else "greedy"
    folder = Path(args.model if Path(args.model).is_dir() else f"answers/{args.model}")
    name = f"{Path(args.benchmark).stem.replace(':', '-')}-{decoding}.jsonl"
    out = Path(args.out or folder / name)
    part = Path(f"{out}.part")
    for file in (part, out):
        check(args.resume or not file.exists(), f"{file}: holds an evaluation; add "
              "--resume to continue or to print it, or remove the file")
    if part.exists():
        data.cut_half_line(part)
    finished = out.exists() and not part.exists()
    file = out if finished else part
    records = read_answers(file) if file.exists() and file.stat().st_size else []
    for record in records:
        data.check_same_settings(file, record["setup"], setup)
    if not finished:
        model, tokenizer = data.load(args.model, args.dtype, args.device)
        say_what_is_not_applied(model.folder)
        part.parent.mkdir(parents=True, exist_ok=True)
        done = {(str(record["id"]), record["sample"]) for record in records}
        for record in generate_answers(model, tokenizer, problems, args.samples,
                                       args.temperature, args.max_new_tokens,
                                       args.batch_size, args.seed, done):
            record["setup"] = setup
            data.write_lines(part, [record], "a")
            records.append(record)
        records.sort(key=lambda record: (order[str(record["id"])], record["sample"]))
        data.write_jsonl(out, records)
        part.unlink()
    wanted = len(problems) * args.samples
    check(len(records) == wanted, f"{out}: {len(records)} answers instead of {wanted}")
    print(f"{summary_line(records)}; {out}")

def compare(args: argparse.Namespace) -> None:
    """Paired comparison of two files of answers to the same problems."""
    sides = []
    for file in (args.a, args.b):
        records = read_answers(file)
        print(summary_line(records))
        golds = {str(record["id"]): record["answer"] for record in records}
        sides.append((golds, accuracy_per_problem(records)))
    (golds_a, a), (golds_b, b) = sides
    check(golds_a == golds_b, f"{args.a} and {args.b}: not answers to the same problems")
    gain = np.array([a[problem] - b[problem] for problem in a])
    rng = np.random.default_rng(0)
    means = [rng.choice(gain, len(gain)).mean() for _ in range(10000)]
    low, high = np.percentile(means, (2.5, 97.5))
    print(f"A - B: {gain.mean():+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; A is "
          f"better on {sum(gain > 0)}, B on {sum(gain < 0)} of {len(gain)} problems")

# ---- For train.py: what the student says now, and what is left of it in bf16
def resample_on_policy(student: Transformer, micro_batches: list[list[data.Example]],
                       step: int, args: argparse.Namespace) -> None:
    """Replace a random share of the traces by the student's own answers at temperature 1,
    at most as long as the longest trace of the micro-batch (GKD, arXiv 2306.13649)."""
    writer = student
    if args.dtype == "bfloat16":
        writer = copy.deepcopy(student).bfloat16()
    number = 0  # of the trace in the step, however the step is cut into micro-batches
    for examples in micro_batches:
        prompts, seeds = {}, []
        for i, example in enumerate(examples, number):
            draw = np.random.default_rng((args.seed, step, i, 1)).random()
            if draw < args.on_policy:
                prompts[i - number] = example.tokens[:example.prompt_length].tolist()
                seeds.append((args.seed, step, i))
        number += len(examples)
        longest = max(len(example.tokens) - example.prompt_length for example in examples)
        answers = writer.sample([*prompts.values()], longest, 1.0, seeds) if prompts else []
        for (i, prompt), (ids, _) in zip(prompts.items(), answers, strict=True):
            examples[i] = data.Example(np.array(prompt + ids), len(prompt))

def surviving_update(student: Transformer, start: Transformer) -> float:
    """The share of the update that is left when the weights are rounded to bf16."""
    kept = total = 0.0
    for weight, before in zip(student.parameters(), start.parameters(), strict=True):
        update = weight.detach() - before
        rounded = weight.detach().bfloat16() - before
        kept += (rounded * update).sum().item()
        total += update.square().sum().item()
    return kept / total if total else 1.0

# ---- Exposure bias
@torch.no_grad()
def kl_along_samples(author: Transformer, teacher: Transformer, student: Transformer,
                     prompts: list[list], args: argparse.Namespace) -> np.ndarray:
    """KL(p || q) in nats at each position of what `author` samples, from the first token to
    the EOS: [prompts, max_new_tokens]. NaN after the EOS."""
    result = np.full((len(prompts), args.max_new_tokens), np.nan)
    starts = range(0, len(prompts), args.batch_size)
    for start in data.progress(starts, "measuring"):
        part = prompts[start:start + args.batch_size]
        seeds = [(args.seed, start + i) for i in range(len(part))]
        answers = author.sample(part, args.max_new_tokens, 1.0, seeds)
        examples = []
        for prompt, (ids, _) in zip(part, answers, strict=True):
            examples.append(data.Example(np.array(prompt + ids), len(prompt)))
        batch = data.collate(examples, args.device)
        p_hidden = teacher(batch.tokens).flatten(0, 1)[batch.positions]
        q_hidden = student(batch.tokens).flatten(0, 1)[batch.positions]
        chunks = []  # logits are V wide, so 256 rows at a time have them
        for p, q in zip(p_hidden.split(256), q_hidden.split(256), strict=True):
            chunks.append(loss.kl(student.logits(q), teacher.logits(p)))
        kl = torch.cat(chunks).cpu().numpy()
        check(np.isfinite(kl).all(), "exposure: KL is not finite; try --dtype float32")
        for row, (ids, _) in enumerate(answers, start):
            result[row, :len(ids)] = kl[:len(ids)]
            kl = kl[len(ids):]
    return result

def exposure_curve(student: np.ndarray, teacher: np.ndarray, draws: int = 1000) -> dict:
    """ExAccErr(l) = (R(l) - epsilon(l)) / epsilon(l) in percent (arXiv 2204.01171). R and
    epsilon sum the mean KL of the first l positions on student and on teacher prefixes
    (`kl_along_samples`, [problems, samples, L]). A mean is over the answers that reach the
    position. The 95 % interval is a bootstrap over problems."""
    n = len(student)
    weights = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)
    weights = np.concatenate([np.ones((1, n)), weights])  # row 0: the estimate itself
    def sum_of_means(kl: np.ndarray) -> np.ndarray:
        total = weights @ np.nansum(kl, 1)
        count = weights @ np.isfinite(kl).sum(1)
        return np.cumsum(total / count, 1)  # [1 + draws, L]
    with np.errstate(invalid="ignore", divide="ignore"):
        R = sum_of_means(student)
        epsilon = sum_of_means(teacher)
        curve = (R - epsilon) / epsilon * 100
    curve[np.maximum(R, epsilon) < 1e-6] = 0  # but for rounding: p = q
    end = int(np.isfinite(curve[0]).sum())  # where the last answer of one side ends
    low, high = np.nanpercentile(curve[1:, :end], (2.5, 97.5), axis=0)
    return {"excess": curve[0, :end], "low": low, "high": high,
            "R": R[0, :end], "epsilon": epsilon[0, :end]}

def exposure(args: argparse.Namespace) -> None:
    """ExAccErr: how much more a student errs on its own prefixes than on the teacher's."""
    teacher, teacher_tokenizer = data.load(args.teacher, args.dtype, args.device)
    student, tokenizer = data.load(args.student, args.dtype, args.device)
    check(teacher_tokenizer.vocab == tokenizer.vocab, "exposure: different tokenizers")
    problems = load_problems(args.benchmark, args.suffix)[:args.limit or None]
    prompts = sorted(encode_problems(problems, tokenizer), key=len)
    repeated = [prompt for prompt in prompts for _ in range(args.samples)]
    shape = len(prompts), args.samples, args.max_new_tokens
    on_student = kl_along_samples(student, teacher, student, repeated, args)
    on_teacher = kl_along_samples(teacher, teacher, student, repeated, args)
    curve = exposure_curve(on_student.reshape(shape), on_teacher.reshape(shape))
    lines = []
    for i in range(len(curve["R"])):
        line: dict = {"length": i + 1}
        for key, column in curve.items():
            line[key] = round(float(column[i]), 6)
        lines.append(line)
    data.write_jsonl(args.out, lines)
    for line in lines[::max(len(lines) // 8, 1)]:
        print("ExAccErr({length}) = {excess:+.2f} % [{low:+.2f}, {high:+.2f}] of summed KL "
              "{epsilon:.4f}".format(**line))

# ---- A page of traces, a table of runs
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>DisCorD</title>
<style>body { font: 16px/1.9 system-ui, sans-serif; max-width: 60em; margin: 2em auto;
              color: #111; background: #fff; padding: 0 1em; print-color-adjust: exact }
p { white-space: pre-wrap; overflow-wrap: anywhere; break-inside: avoid; margin: 0 }
.prompt { background: #f4f4f4; margin-top: 1.5em }
.low { border-bottom: 2px dotted #b35806 } .high { border-bottom: 3px double #5e3c99 }
</style><h1>DisCorD weights</h1>
"""

def token_span(piece: str, w: float, title: str = "") -> str:
    """A token: orange if it counts less than in SFT, violet if it counts more."""
    rgb = "230,97,1" if w < 1 else "94,60,153"
    style = f"background:rgba({rgb},{abs(w - 1) * 0.7:.2f})"
    name = ""
    if w < 0.5:
        name = "low"
    elif w > 1.5:
        name = "high"
    text = html.escape(piece).replace("\n", "\u21b5\n")
    return f'<span class="{name}" style="{style}" title="{title}">{text}</span>'

def weights(args: argparse.Namespace) -> None:
    """Write a page of the first ten traces, each token in the color of its weight."""
    student, tokenizer = data.load(args.student, args.dtype, args.device)
    examples, dropped = data.load_traces(args.traces, tokenizer, teacher=True)
    page = [PAGE, f"<p>w = 2 sigmoid((log q - log p) / {args.tau:g}), student "
            f"{html.escape(args.student)}. Orange tokens count less than in SFT (dotted: "
            "w < 0.5), violet ones more (double: w > 1.5). Point at one to see q, p and w."]
    logps = data.response_logp(student, examples[:10])
    for example, q_logp in zip(examples, logps, strict=False):
        start, p_logp = example.prompt_length, example.teacher_logp
        w = loss.discord_weight(torch.tensor(q_logp), torch.tensor(p_logp), args.tau)
        prompt = tokenizer.decode(example.tokens[:start].tolist())
        page.append(f'</p>\n<p class="prompt">{html.escape(prompt)}</p>\n<p>')
        stream = DecodeStream(skip_special_tokens=False)
        for i, token in enumerate(example.tokens[start:].tolist()):
            piece = stream.step(tokenizer.backend, token) or ""  # part of a character
            q, p = math.exp(q_logp[i]), math.exp(p_logp[i])
            title = f"q {q:.3g}, p {p:.3g}, w {w[i]:.3f}"
            page.append(token_span(piece, w[i].item(), title))
        page.append(f" (mean weight {w.mean():.3f})")
    with data.atomic_write(args.out) as temporary:
        temporary.write_text("".join(page), encoding="utf-8")
    print(f"{args.out}: {len(logps)} traces; dropped: {dict(dropped)}")

def report(args: argparse.Namespace) -> None:
    """Print a table of finished runs: accuracy +- standard error in their answers."""
    rows = []
    for folder in map(Path, args.runs):
        run = read_json(folder / "run.json")
        check("seconds" in run, f"{folder}: not finished; add --resume to its command")
        row, lengths = {"run": f"{folder.parent.name}/{folder.name}"}, []
        for file in sorted(folder.glob("*-*.jsonl")):
            s = summarize(read_answers(file))
            row[file.stem] = f"{s['accuracy']:.3f} +- {s['standard_error']:.3f}"
            lengths.append(s["mean_tokens"])
        row["tokens"] = f"{np.mean(lengths):.1f}" if lengths else ""
        row["steps"] = f"{run['steps']}"
        row["seconds"] = f"{run['seconds']:.0f}"
        rows.append(row)
    names = list(dict.fromkeys(name for row in rows for name in row))
    for row in [{name: name for name in names}, dict.fromkeys(names, "---"), *rows]:
        print("|", " | ".join(f"{row.get(name, ''):14}" for name in names), "|")

# ---- The command line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    positive, count = data.number(int, 1), data.number(int, 0)
    def add_command(function: Callable) -> Callable:
        about = function.__doc__
        command = commands.add_parser(function.__name__, help=about, description=about)
        command.set_defaults(run=function)
        add = command.add_argument
        if function in (accuracy, exposure, weights):
            data.add_model_options(add)
        if function in (accuracy, exposure):
            add("--benchmark", required=True, help=f"{', '.join(BENCHMARKS)}; with a "
                "split: gsm8k:train; or FILE.jsonl")
            add("--suffix", help="text after each question that asks for no \\boxed; box, "
                f"the default for a benchmark with a name, is {SUFFIX!r}")
            add("--limit", type=count, default=0, help="only the first problems")
            add("--max-new-tokens", type=positive, default=1024, help="default: 1024")
            size = 256 if torch.cuda.is_available() else 16
            add("--batch-size", type=positive, default=size,
                help="answers at a time (default: 256 with a GPU, else 16)")
            add("--seed", type=count, default=0, help="of the answers (default: 0)")
        return add
    add = add_command(accuracy)
    add("--model", required=True, help="HF folder or Hub name")
    add("--out", help="OUT.jsonl: a record per answer; a teacher's are traces (default: "
        "BENCHMARK-DECODING.jsonl in the model's folder, or in answers/NAME)")
    add("--resume", action="store_true", help="continue an interrupted evaluation")
    add("--samples", type=positive, default=1, help="answers per problem (default: 1)")
    add("--temperature", type=data.number(float, 0), default=0.0, help="default: 0, greedy")
    add = add_command(compare)
    add("a", help="A.jsonl, from `accuracy`")
    add("b", help="B.jsonl: answers to the same problems")
    add = add_command(exposure)
    add("--teacher", required=True, help="HF folder or Hub name")
    add("--student", required=True, help="HF folder or Hub name")
    add("--out", required=True, help="CURVE.jsonl: a line per length")
    add("--samples", type=positive, default=4, help="answers per problem (default: 4)")
    add = add_command(weights)
    add("--student", required=True, help="HF folder or Hub name")
    add("--traces", required=True, help="T.jsonl with teacher_logprobs")
    add("--out", required=True, help="PAGE.html: opens in any browser")
    add("--tau", type=data.number(float, 1e-9), default=loss.TAU, help="default: 0.7")
    add = add_command(report)
    add("runs", nargs="+", help="folders of train.py, with answers of `accuracy` in them")
    args = data.parse_args(parser, argv)
    args.run(args)

if __name__ == "__main__":
    data.run_command(main)
