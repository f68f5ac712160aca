"""Answers, accuracy, comparison, exposure bias, a page of token weights, grading. The right
answers of a teacher's evaluation are the traces that train.py reads."""

import ast
import cmath
import hashlib
import html
import json
import math
import operator
import random
import re
from argparse import ArgumentParser, Namespace
from collections import Counter, defaultdict
from collections.abc import Container, Iterator
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants, errors, utils

import data
import loss
from model import BadInput, Transformer, check, read_json, said

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
PROBLEM = ["id", "prompt", "messages", "answer", "prefix"]
SETUP = ["dtype", "model", "benchmark", "suffix", "samples", "temperature",
         "max_new_tokens", "seed"]  # which a resumed evaluation must have in common

def download_benchmark(name: str) -> Path:
    """The JSONL file of a benchmark, like "math" or "math:train", downloaded once."""
    key, _, split = name.partition(":")
    check(key in BENCHMARKS, f"--benchmark {name}: no such file; the benchmarks with a "
          f"name are {', '.join(BENCHMARKS)}")
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
            check(page["rows"], f"no rows after row {len(rows)}")
            for row in page["rows"]:
                check(not row["truncated_cells"], f"row {len(rows)} is cut")
                rows.append(row["row"])
            total = page["num_rows_total"]
    except (OSError, ValueError, LookupError, TypeError, ImportError,
            errors.HTTPError) as error:
        raise BadInput(f"--benchmark {name}: cannot get {repo} from the Hub: {said(error)}"
                       "; a mirror may lack it: give a JSONL file") from error
    data.write_jsonl(file, rows)
    return file

def load_problems(benchmark: str | Path, suffix: str | None = None) -> list[dict]:
    """[{"id", "prompt" or "messages", "answer"}] of a named benchmark or a JSONL file. The
    suffix ("box", and for a name: SUFFIX) follows each question that asks for no box."""
    file = Path(benchmark)
    if not file.exists():
        file = download_benchmark(str(benchmark))
        suffix = "box" if suffix is None else suffix
    if suffix == "box":
        suffix = SUFFIX
    problems, unread = [], Counter()
    for where, record in data.read_jsonl(file):
        with data.about(where):
            problem = read_problem(record, suffix)
        if problem["answer"]:
            problems.append({"id": where.rpartition(" ")[2], **problem})
        else:
            print(f"{where}: dropped, its answer is empty")
        others = [name for name in QUESTIONS if record.get(name) is not None][1:]
        known = {"response", *QUESTIONS, *GOLDS, *PROBLEM}
        unread.update(data.unread_fields(record, known.difference(others)))
    data.print_unread(file, unread)
    check(problems, f"{benchmark}: no problems")
    return problems

def read_problem(record: dict, suffix: str | None) -> dict:
    """The fields of a problem; its answer is "" if all gold answers are empty."""
    data.check_fields(record, thinking=False)
    problem = dict(record)
    last, key = problem, "prompt"
    if record.get("messages") is not None:
        last, key = data.get_messages(record)[-1], "content"
    else:
        problem["prompt"] = data.text_field(record, *QUESTIONS)
    if suffix and "\\boxed" not in last[key] and not last[key].endswith(suffix):
        last[key] += suffix
    golds = [record[name] for name in GOLDS if name in record]
    check(golds, f"no {' or '.join(GOLDS)}; it has {', '.join(record)}")
    golds = [gold for gold in golds if gold not in (None, []) and str(gold).strip()]
    gold = golds[0] if golds else ""
    check(not isinstance(gold, dict), "the answer is an object")
    parts = gold if isinstance(gold, list) else [gold]
    problem["answer"] = ", ".join(map(str, parts))
    return {name: problem[name] for name in PROBLEM if name in problem}

# ---- Answers and their accuracy
def encode_problem(problem: dict, tokenizer: data.Tokenizer) -> list[int]:
    """Prompt as ids. A `prefix`, from `data.py mix`, is the beginning of the answer."""
    prefix = problem.get("prefix", [])
    with data.about(f"problem {problem['id']}"):
        check(tokenizer.knows(prefix), f"prefix: not ids of {tokenizer.folder}'s tokenizer")
        return tokenizer.encode_prompt(data.get_messages(problem)) + prefix

def generate_answers(model: Transformer, tokenizer: data.Tokenizer, problems: list[dict],
                     samples: int = 1, temperature: float = 0.0,
                     max_new_tokens: int = 1024, batch_size: int = 64, seed: int = 0,
                     done: Container = ()) -> Iterator[dict]:
    """Yield a graded trace for each (index of a problem, sample) that is not `done`, in the
    batches of the whole run: the last digits of a sum depend on what shares its batch."""
    prompts = [encode_problem(problem, tokenizer) for problem in problems]
    context = model.config.max_position_embeddings
    if too_long := sum(len(prompt) >= context for prompt in prompts):
        print(f"{too_long} problems are longer than the model's {context} tokens: wrong")
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # little padding
    jobs = [(i, k) for i in order for k in range(samples)]
    for start in data.progress(range(0, len(jobs), batch_size), "answering"):
        batch = jobs[start:start + batch_size]
        if all(job in done for job in batch):
            continue
        seeds = [(seed, *job) for job in batch]
        batch_prompts = [prompts[i] for i, _ in batch]
        answers = model.sample(batch_prompts, max_new_tokens, temperature, seeds)
        for (i, k), answer in zip(batch, answers, strict=True):
            if (i, k) not in done:
                record = grade_answer(model, tokenizer, problems[i], prompts[i], *answer)
                yield {**record, "sample": k, "temperature": temperature}

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
    response = text = tokenizer.decode(ids[:-1] if finished else ids)
    if not finished:  # up to the last complete box
        text = re.sub(rf"(?s)^(?:.*</think>)?(.*{BOX.pattern})?.*", r"\1", text)
    record = {
        **problem,
        "rendered": tokenizer.apply_chat_template(data.get_messages(problem)),
        "prompt_tokens": len(prompt) - len(prefix),  # a student with another one is told
        "response": response,
        "finished": finished,
        "teacher_logprobs": data.round_logp(logp),
        "vocab": tokenizer.vocab_hash,
        "extracted": extract_answer(response),
        "correct": is_correct(text, problem["answer"]),
    }
    record.pop("prefix", None)
    if ids != tokenizer.encode_response(response):
        record["tokens"] = ids
    return record

def read_answers(path: str | Path) -> list[dict]:
    """The records that `accuracy` wrote."""
    records = [record for _, record in data.read_jsonl(path)]
    check(records, f"{path}: the file is empty")
    for record in records:
        valid = record.keys() >= {"setup", "id", "answer", "finished", "teacher_logprobs"}
        check(valid and isinstance(record.get("correct"), bool),
              f"{path}: expected a file that `accuracy` wrote")
    return records

def summarize(records: list[dict]) -> dict:
    """avg@k with its standard error over problems, pass@k, mean length, share cut off, and
    `per_problem`: (id, gold answer) -> share of its answers that are right."""
    verdicts = defaultdict(list)
    for record in records:
        problem = str(record["id"]), record["answer"]
        verdicts[problem].append(record["correct"])
    per_problem = {problem: np.mean(right) for problem, right in verdicts.items()}
    means = np.array(list(per_problem.values()))
    n = len(means)
    return {
        "per_problem": per_problem,
        "accuracy": means.mean(),
        "standard_error": means.std(ddof=n > 1) / math.sqrt(n),
        "pass": np.mean(means > 0),
        "problems": n,
        "samples": len(records) // n,
        "mean_tokens": np.mean([len(record["teacher_logprobs"]) for record in records]),
        "cut_off": np.mean([not record["finished"] for record in records]),
    }

def summary_line(records: list[dict]) -> str:
    s, setup = summarize(records), records[0]["setup"]
    decoding = f"T={setup['temperature']:g}" if setup["temperature"] else "greedy"
    pass_at_k = f", pass@{s['samples']} {s['pass']:.3f}" if s["samples"] > 1 else ""
    return (f"{setup['model']} on {setup['benchmark']}:\n  accuracy {s['accuracy']:.3f} +- "
            f"{s['standard_error']:.3f}{pass_at_k} ({decoding}, {s['problems']} x "
            f"{s['samples']} answers of {s['mean_tokens']:.1f} tokens, {s['cut_off']:.1%} "
            f"cut off at {setup['max_new_tokens']})")

def warn_ignored_generation_config(folder: Path) -> None:
    """transformers and vLLM decode by generation_config.json, greedily, too. We do not."""
    file = folder / "generation_config.json"
    config = read_json(file) if file.exists() else {}
    ignored = []
    for name in ("repetition_penalty", "top_k", "top_p", "min_p", "typical_p"):
        if config.get(name) not in (None, 0, 1):
            ignored.append(f"{name}={config[name]}")
    if ignored:
        print(f"{file}: not applied here, unlike in transformers and vLLM:", *ignored)

def accuracy(args: Namespace) -> None:
    """Answer a benchmark, grade the answers, keep a record of each, print the accuracy."""
    check(args.samples == 1 or args.temperature, "--samples > 1 needs --temperature > 0")
    problems = load_problems(args.benchmark, args.suffix)[:args.limit]
    index = {str(problem["id"]): i for i, problem in enumerate(problems)}
    check(len(index) == len(problems), f"{args.benchmark}: problems with the same id")
    args.dtype = data.compute_dtype(args, args.model)
    setup = {name: vars(args)[name] for name in SETUP}
    digest = hashlib.sha256(json.dumps(problems).encode())
    setup["problems_sha256"] = digest.hexdigest()
    decoding = f"T{args.temperature:g}x{args.samples}" if args.temperature else "greedy"
    name = f"{Path(args.benchmark).stem.replace(':', '-')}-{decoding}.jsonl"
    folder = args.model if Path(args.model).is_dir() else f"runs/answers/{args.model}"
    out = Path(args.out or f"{folder}/{name}")
    part = Path(f"{out}.part")  # a line per answer so far; becomes OUT when all are there
    file = part if part.exists() else out
    check(args.resume or not file.exists(), f"{file}: holds an evaluation; add --resume to "
          "continue or to print it, or remove the file")
    if part.exists():
        data.cut_half_line(part)
    begun = file.exists() and file.stat().st_size
    records = read_answers(file) if begun else []
    for record in records:
        data.check_same_settings(file, record["setup"], setup)
    if names := edited_since(records):
        print(f"{file}: {names} changed since these answers were written")
    def job(record: dict) -> tuple:
        return index[str(record["id"])], record["sample"]
    answers = {job(record): record for record in records}
    if len(answers) < len(problems) * args.samples:
        model, tokenizer = data.load(args.model, args.dtype, args.device)
        warn_ignored_generation_config(model.folder)
        part.parent.mkdir(parents=True, exist_ok=True)
        for record in generate_answers(model, tokenizer, problems, args.samples,
                                       args.temperature, args.max_new_tokens,
                                       args.batch_size, args.seed, answers):
            record["setup"] = {**setup, "code": data.CODE}
            data.write_lines(part, [record], "a")
            answers[job(record)] = record
    records = [answers[key] for key in sorted(answers)]
    data.write_jsonl(out, records)
    part.unlink(missing_ok=True)
    print(f"{summary_line(records)}\n  {out}")

def edited_since(records: list[dict]) -> str:
    """Which files that shape an answer were edited since the first of these? "" if none."""
    code = records[0]["setup"].get("code", {}) if records else data.CODE
    return data.edited(code, "model.py", "data.py", "evaluate.py")

def compare(args: Namespace) -> None:
    """Paired comparison of two files of answers to the same problems."""
    answers_a = read_answers(args.a)
    answers_b = read_answers(args.b)
    print(f"{summary_line(answers_a)}\n{summary_line(answers_b)}")
    a = summarize(answers_a)["per_problem"]
    b = summarize(answers_b)["per_problem"]
    check(a.keys() == b.keys(), f"{args.a} and {args.b}: not answers to the same problems")
    gain = np.array([a[problem] - b[problem] for problem in a])
    rng = np.random.default_rng(0)
    means = [rng.choice(gain, len(gain)).mean() for _ in range(10000)]
    low, high = np.percentile(means, (2.5, 97.5))
    print(f"A - B: {gain.mean():+.4f}, 95 % interval {low:+.4f} to {high:+.4f}; A is "
          f"better on {sum(gain > 0)}, B on {sum(gain < 0)} of {len(gain)} problems")

# ---- Exposure bias
@torch.no_grad()
def kl_along_samples(author: Transformer, teacher: Transformer, student: Transformer,
                     prompts: list, args: Namespace) -> np.ndarray:
    """KL(p || q) in nats at each position of what `author` samples, from the first token to
    the EOS: [prompts, max_new_tokens]. NaN after the EOS."""
    result = np.full((len(prompts), args.max_new_tokens), np.nan)
    seeds = [(args.seed, row) for row in range(len(prompts))]
    for start in data.progress(range(0, len(prompts), args.batch_size), "measuring"):
        rows = slice(start, start + args.batch_size)
        answers = author.sample(prompts[rows], args.max_new_tokens, 1.0, seeds[rows])
        examples = []
        for prompt, (ids, _) in zip(prompts[rows], answers, strict=True):
            examples.append(data.Example(np.array(prompt + ids), len(prompt)))
        batch = data.collate(examples, args.device)
        hidden = []
        for model in (student, teacher):
            hidden.append(model(batch.tokens).flatten(0, 1)[batch.positions])
        kl = data.map_rows(lambda q, p: loss.kl(student.logits(q), teacher.logits(p)),
                           *hidden).cpu().numpy()
        check(np.isfinite(kl).all(), "exposure: KL is not finite; try --dtype float32")
        for row, (ids, _) in enumerate(answers, start):
            result[row, :len(ids)] = kl[:len(ids)]
            kl = kl[len(ids):]
    return result

@np.errstate(invalid="ignore", divide="ignore")  # 0 / 0 where nobody is left
def exposure_curve(student: np.ndarray, teacher: np.ndarray) -> dict:
    """ExAccErr(l) = (R(l) - epsilon(l)) / epsilon(l) in percent (arXiv 2204.01171), with a
    95 % bootstrap interval over problems. R and epsilon sum, up to position l, the mean KL
    of the answers that reach it, on student and teacher prefixes [problems, samples, L]."""
    n = len(student)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), 1000)
    times = np.vstack([np.ones(n), drawn])  # row 0: each problem once, the estimate itself
    sums = []
    for kl in (student, teacher):
        total = times @ np.nansum(kl, 1)
        count = times @ np.isfinite(kl).sum(1)
        sums.append(np.cumsum(total / count, 1))  # [1 + draws, L]
    R, epsilon = sums
    curve = (R - epsilon) / epsilon * 100
    curve[np.maximum(R, epsilon) < 1e-6] = 0  # but for rounding: p = q
    end = np.isfinite(curve[0]).sum()  # where the last answer of one side ends
    low, high = np.nanpercentile(curve[1:, :end], (2.5, 97.5), axis=0)
    return {
        "excess": curve[0, :end],
        "low": low,
        "high": high,
        "R": R[0, :end],
        "epsilon": epsilon[0, :end],
    }

def exposure(args: Namespace) -> None:
    """ExAccErr: how much more a student errs on its own prefixes than on the teacher's."""
    dtype = data.compute_dtype(args, args.student)
    teacher, teacher_tokenizer = data.load(args.teacher, dtype, args.device)
    student, tokenizer = data.load(args.student, dtype, args.device)
    check(teacher_tokenizer.vocab == tokenizer.vocab, "exposure: different tokenizers")
    problems = load_problems(args.benchmark, args.suffix)[:args.limit]
    prompts = [encode_problem(problem, tokenizer) for problem in problems]
    prompts.sort(key=len)
    room = min(model.config.max_position_embeddings for model in (teacher, student))
    check(len(prompts[-1]) + args.max_new_tokens <= room, f"--max-new-tokens "
          f"{args.max_new_tokens} and prompts of up to {len(prompts[-1])} do not fit into "
          f"{room} tokens, the models' context")
    repeated = [prompt for prompt in prompts for _ in range(args.samples)]
    kl = [kl_along_samples(author, teacher, student, repeated, args)
          for author in (student, teacher)]
    shape = 2, len(prompts), args.samples, args.max_new_tokens
    curve = exposure_curve(*np.reshape(kl, shape))
    lines = []
    for i in range(len(curve["R"])):
        numbers = {key: round(float(column[i]), 6) for key, column in curve.items()}
        lines.append({"length": i + 1, **numbers})
    data.write_jsonl(args.out, lines)
    for line in lines[::max(len(lines) // 8, 1)]:
        print("ExAccErr({length}) = {excess:+.2f} % [{low:+.2f}, {high:+.2f}] of summed KL "
              "{epsilon:.4f}".format(**line))

# ---- A page of traces, a table of runs
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>DisCorD</title><style>
body { font: 16px/1.9 sans-serif; max-width: 60em; margin: auto; print-color-adjust: exact }
p { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 0 1em }
.prompt { background: #f4f4f4; margin-top: 1.5em }</style><h1>DisCorD weights</h1>"""

def token_span(piece: str, w: float, title: str) -> str:
    """A token: orange if it counts less than in SFT, violet if it counts more."""
    rgb = "230,97,1" if w < 1 else "94,60,153"
    style = f"background:rgba({rgb},{abs(w - 1) * 0.7:.2f})"
    text = html.escape(piece).replace("\n", "\u21b5\n")
    return f'<span style="{style}" title="{title}">{text}</span>'

def weights(args: Namespace) -> None:
    """Write a page of the first ten traces, each token in the color of its weight."""
    tokenizer, _, examples, logps = data.load_scored(args.student, args, True, 10)
    page = [PAGE, f"<p>w = 2 sigmoid((log q - log p) / {args.tau:g}), student "
            f"{html.escape(args.student)}. Orange tokens count less than in SFT, violet "
            "ones more; the end of turn counts as in SFT. Point at one to see q, p and w."]
    ends = []
    for example, logp in zip(examples, logps, strict=True):
        prompt, response = np.split(example.tokens, [example.prompt_length])
        text = html.escape(tokenizer.decode(prompt.tolist()))
        page.append(f'</p>\n<p class="prompt">{text}</p>\n<p>')
        q_logp = torch.tensor(logp)
        p_logp = torch.tensor(example.teacher_logp)
        w = loss.discord_weight(q_logp, p_logp, args.tau)
        for i, piece in enumerate(tokenizer.pieces(response)):
            title = f"q {q_logp[i].exp():.3g}, p {p_logp[i].exp():.3g}, w {w[i]:.3f}"
            page.append(token_span(piece, w[i].item(), title))
        ends.append((q_logp[-1].exp().item(), w[-1].item()))
        page.append(f" (mean weight {w[:-1].mean():.3f}; of the end of turn {w[-1]:.3f})")
    with data.atomic_write(args.out) as temporary:
        temporary.write_text("".join(page), encoding="utf-8")
    q, w = np.mean(ends, 0)
    print(f"{args.out}: {len(logps)} traces; end of turn: mean q {q:.3g}, mean w {w:.3f}")

def report(args: Namespace) -> None:
    """Print a table of finished runs: accuracy +- standard error in their answers."""
    table, decoding = [], {}
    for folder in map(Path, args.runs):
        run = read_json(folder / "run.json")
        check("seconds" in run, f"{folder}: not finished; add --resume to its command")
        row, lengths = {"run": f"{folder.parent.name}/{folder.name}"}, []
        for file in sorted(folder.glob("*-*.jsonl")):
            records = read_answers(file)
            s, setup = summarize(records), records[0]["setup"]
            decoding[file.stem] = (
                f"T={setup['temperature']:g}, {s['samples']} answers a problem, cut at "
                f"{setup['max_new_tokens']} tokens, {setup['dtype']}")
            row[file.stem] = (f"{s['accuracy']:.3f} +- {s['standard_error']:.3f}, "
                              f"{s['cut_off']:.0%} cut")
            lengths.append(s["mean_tokens"])
        row["tokens"] = f"{np.mean(lengths):.1f}" if lengths else ""
        row["steps"] = str(run["steps"])
        row["seconds"] = f"{run['seconds']:.0f}"
        table.append(row)
    names = {name: name for row in table for name in row}
    rows = [[row.get(name, "") for name in names] for row in (names, *table)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths])
    for cells in rows:
        print("|", " | ".join(map(str.ljust, cells, widths)), "|")
    for name, settings in decoding.items():
        print(f"{name}: {settings}")

# ---- Grading: is the final answer of a text the gold answer?
# - In doubt the verdict is "no": a refused right answer is one trace less, an accepted
#   wrong one is trained on. Python's parser takes formulas apart, and only `value_at`
#   computes them: no model text is ever run.
# - The answer is the last \boxed{} that holds something, else what follows "answer is" or
#   ####, else the number that the last sentence states. What stands before </think> or
#   behind "not" is skipped. Units are dropped, but must agree if both answers have some.
# - Lists have no order, points do. A gold x = 5 accepts 5, but not y = 5. Whole numbers are
#   compared exactly, others to nine digits, formulas at random points, the rest by letters.
LONGEST = 300  # characters of an answer that are read

def is_correct(prediction: str, gold: str) -> bool:
    """Is the final answer of the prediction the gold answer, by the policy above?
    >>> is_correct("He has 1,200 + 34 = 1234 left.\\n#### 1,234", "1234")
    True
    """
    a, a_units = normalize(extract_answer(prediction))
    b, b_units = normalize(extract_answer(gold, gold=True))
    units_agree = a_units <= b_units or b_units <= a_units
    return units_agree and equivalent(a, b)

BRACES = r"[^{}]*(?:\{" * 4 + "[^{}]*" + r"\}[^{}]*)*" * 4  # four deep
BOX = re.compile(rf"\\boxed\s*\{{\s*(?!\}})({BRACES})\}}")
STATED = re.compile(r"(?im)(?:####|answers?:|answers? (?:is|are)\b|^A:)[\s:*]*")
NEGATED = r"\b(?:not|never|\w+n't|except|rather than)\b.*?(?=\bbut\b|[,;.]\s|\n|$)"
FORMULA = r"\$[^$\n]+\$(?![0-9])|[(\[][-0-9., /]+[)\]]"  # or a point
NUMBER = (r"(?<![\w.,:{}()^\\/<>≤≥≠-])(?<![-+*/^<>≤≥≠] )"  # that is no part of a formula
          r"-?\$?(?:[0-9]|\.[0-9])(?:[0-9,./:]*[0-9])?(?:\\?%)?"
          r"(?![\w^\\(*/]|[.,:][0-9]| ?[-+*/^=<>≤≥≠])")
UNIT_WORD = r"(?!(?:and|or|but)\b)(?:[a-zA-Z]{3,}|pi\b|[apAP]\.?[mM]\b\.?)"
ONE = rf"(?:{FORMULA}|{NUMBER})(?: +{UNIT_WORD}){{0,2}}"
PLACE = rf"{ONE}(?:(?:,? +(?:and|or)(?: +\w+ *=)?)? +{ONE})*"  # 5 feet 3 inches
SAID = re.compile(rf"((?:\b(?:is|are|be|equals)|(?<![<>!])=)[\s:]*)?({PLACE})")
WORD = re.compile(r"(?<![\\a-zA-Z{])(?!sqrt)[a-zA-Z][a-z]{2}|\b(?:is|[Ss]o)\b")

def extract_answer(text: str, gold: bool = False) -> str:
    """Where the answer stands. A gold answer without a mark is all answer.
    >>> extract_answer("The answer is not 5 but 7 apples.")
    '7 apples'
    """
    text = re.split(r"</think(?:ing)?>|<answer>", text)[-1].strip() or text
    text = re.sub(r"-(\\+boxed\s*\{)", r"\1-", re.sub("[−–]", "-", text))
    if boxes := BOX.findall(text):
        return boxes[-1]
    *before, text = STATED.split(text[-20 * LONGEST:])
    if gold and not before:
        return text
    text = re.sub(r"(?<!\w)\*\*|\*\*(?!\w)|`|<{1,2}[^<> ]{0,99}>{1,2}", "", text)  # <u>
    text = re.sub(r"\s{0,9}(?:\\[\])]|\$\$)|\\[\[(]\s{0,9}", "$", text)  # \[ ... \]
    text = re.sub(r"(?i)\b(?:minus|negative) +(?=\$?[0-9])", "-", text)
    text = re.sub(NEGATED, " ", text)
    sentences = re.split(r"\n|[.?](?:\s|$)", text)
    with_place = [part for part in sentences if SAID.search(part)] or [text]
    sentence = sentences[0] if before else with_place[-1]
    if not WORD.search(UNIT.sub("", sentence)):
        return sentence
    places = SAID.findall(sentence)
    said = [place for verb, place in places if verb]
    if (before and re.match(PLACE, sentence)) or (not said and len(set(places)) == 1):
        return places[0][1]
    return said[-1] if said else sentence

FUNCTIONS = {**vars(cmath), "frac": operator.truediv}  # to_python calls those in CALLS
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j}
CALLS = "frac|sqrt|sin|cos|tan"
NAMES = "pi|infty|theta|alpha|beta|dozen|hundred|thousand|million|billion"
TEXT = r"\\(?:text|mbox|textbf|textnormal|mathrm)\s*\{"
# Rules that bring answers into one spelling, in this order.
RULES = {
    r"\\boxed|\\left|\\right|\\displaystyle|\\degree|\^\{?\\circ\}?|[°$%]|\\[$%!{}()]": "",
    r"\\\\(?=[a-zA-Z]{2})": r"\\",  # \\frac, in texts that were escaped twice
    rf"{TEXT}([^{{}}]*)\}}": r" \1 ", r"^\{([^{}]*)\}$": r"\1", r"^\(([A-Z])\)": r"\1",
    r"\\begin\{[bp]matrix\}": "((", r"(?:\\\\)?\\end\{[bp]matrix\}": "))",
    r"\\\\": "),(", "&": ",", r"\\[,;: ]|~|\\q?quad": " ",
    r"\{,\}": ",", r"(?<=[0-9])(?<![0-9]{4}),(?=[0-9]{3}(?![0-9]))(?![^(\[]*[)\]])": "",
    r"\\[dtc]frac": r"\\frac", r"×|·|\\times|\\cdot": "*", "π": r"\\pi",
    r"\\leq|<=|≤": r"\\le", r"\\geq|>=|≥": r"\\ge",
    r"\b(?:and|or)\b|\\cup|∪|;": ",", r"\\in(?![a-z])|∈": "=",
    r"(?<=[0-9}])\s*\\approx.*": "", r"\\approx": "=",  # 1/3 \approx 0.33
    r"=[^=,]*(?==)": "",  # x = 1 + 1 = 2
    rf"(?<![\\a-zA-Z])({CALLS}|{NAMES})(?![a-z])": r"\\\1", r"√([0-9]+)": r"\\sqrt{\1}",
    r"\\(frac|sqrt) ?([0-9])": r"\\\1{\2}",  # \frac12
    rf"(\\frac\{{{BRACES}\}}) ?([0-9])": r"\1{\2}",  # \frac{1}2
    r"(?<![\w.^}])([0-9]+)(?: ?\\frac\{([0-9]+)\}\{([0-9]+)\}| ([0-9]+)/([0-9]+))":
        r"(\1+\2\4/\3\5)",  # 2\frac{1}{2}, 2 1/2
    r"_\{(\w+)\}": r"_\1", r"(?<=[0-9]) (?=[0-9]{3}(?![0-9]))": "",  # a_{1}, 1 000
    r"(?<![\w.,])0+(?=[0-9])": "", r"([0-9])([-/])([0-9]+)\2(?=[0-9])": r"\1:\3:",  # a date
    r"\s*([^\w\s])\s*": r"\1", ",+": ",", r'^"|[",.\\]$': "",  # "even".
    r"^(.*)\\pm(.*)$": r"\1+\2,\1-\2",
}
UNIT = re.compile(
    rf"(?<=[\w}})%])(?:\\[ ,]|[ $])*{TEXT}(?! *(?:or|and|{NAMES}))([^{{}},\\]*)\}}"
    r"(?:\^\{?([23])\}?)?|"  # 5\text{ cm}^2, 5 cm^2
    r"(?:(?<=[0-9}%])|(?<=pi))\$?(?: *([cmk]?m|kg|g|ft|[apAP]\.?[mM])(?![a-zA-Z])|"
    rf" +((?!{CALLS}|{NAMES}){UNIT_WORD}[a-zA-Z /.]*))(?:\^\{{?([23])\}}?)?[.$ ]*$")

def normalize(text: str) -> tuple[str, set[str]]:
    """The answer in one spelling, and the words of its units."""
    text = text[:LONGEST].replace("²", "^2")
    units = " ".join(map(" ".join, UNIT.findall(text))).lower()
    text = UNIT.sub(" ", text)
    for old, new in RULES.items():
        text = re.sub(old, new, text.strip())
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3}", text):  # words are no products
        text = re.sub(r"(?<![\\a-z])(?=[a-z]{3})", r"\\", text.lower())
    return text, set(re.findall(r"\b[a-z0-9]{1,3}", units))

def split(text: str) -> list[str]:
    """The parts between the commas that are in no bracket."""
    marked, depth = "", 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        marked += "\n" if character == "," and depth == 0 else character
    return marked.split("\n")

# What a gold equation is about: x, AB, a_n, f(2) or (x,y).
NAME = r"^(?:[a-z]|[A-Z]+|\([a-z](?:,[a-z])*\))(?:_\w+)?(?:\(\w\))?="
UNREADABLE = (ArithmeticError, LookupError, MemoryError, RecursionError, SyntaxError,
              TypeError, ValueError)

def equivalent(a: str, b: str) -> bool:
    """Are two answers the same list, equation, point, interval or formula?"""
    x, y = split(a), split(b)
    if len(x) > 1 or len(y) > 1:  # a list, in any order
        for item in x:
            match = next((other for other in y if equivalent(item, other)), None)
            if match is None:
                return False
            y.remove(match)
        return not y
    if "=" not in b:  # x = 5 for 5, but not "all except x = 5"
        a = re.sub(r"^(?!.*[a-z]{2} ?\\[a-z]{2}).*=", "", a)
    if "=" not in a:
        b = re.sub(NAME, "", b)
    if a == b:
        return a != ""
    x, y = ([text[:1], *split(text[1:-1]), text[-1:]] for text in (a, b))
    if len(x) > 3 or len(y) > 3:  # a point, an interval, a matrix
        return len(x) == len(y) and all(map(equivalent, x, y))
    try:
        return all(map(close, values(a), values(b)))
    except UNREADABLE:
        return False

def close(x, y) -> bool:
    """To nine digits: 0.0833333333333 may be a computed 1/12. A whole number is exact."""
    whole = {type(x), type(y)} == {Fraction} and 1 in (x.denominator, y.denominator)
    return x == y if whole else cmath.isclose(x, y, rel_tol=1e-9)

@lru_cache
def values(formula: str) -> list:
    """At twelve random points. Those of an equation are divided by the first."""
    tree = ast.parse(to_python(formula), mode="eval").body
    numbers = [value_at(tree, point) for point in range(12)]
    return [x / numbers[0] for x in numbers] if "=" in formula else numbers

TOKEN = re.compile(r"\\[a-z]+|\*\*|[a-zA-Z](?:_\w+)?|[0-9.]+(?:[eE]-?[0-9]+)?|\S")

def to_python(formula: str) -> str:
    r"""\frac{1}{2}x^2 becomes frac(1,2)*x**2, an equation its left minus its right side."""
    formula = "(" + formula.replace("=", ")-(") + ")"
    for old, new in {"}{": ",", "{": "(", "}": ")", "^": "**"}.items():
        formula = formula.replace(old, new)
    code = " ".join(TOKEN.findall(formula))
    code = re.sub(rf"\\({NAMES})\b", r"\1", code)
    code = re.sub(r"(?<=[\w)]) (?=[\\a-zA-Z(])", "*", code)
    return re.sub(rf"(?:\\({CALLS})|(\b[fgP]))\*", r"\1\2 ", code)  # f is not a factor

OPERATORS: dict = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.UAdd: operator.pos, ast.USub: operator.neg,
    ast.Pow: lambda x, y: x ** y if abs(y) * len(str(x)) < 2 * LONGEST else math.nan}

def value_at(node, point: int):
    """The value of a formula, with a random number of either sign for a letter."""
    match node:
        case ast.Constant(number):
            return Fraction(str(number))
        case ast.Name(name):
            number = random.Random(f"{point}{name}").randrange(-1999, 1999)
            return CONSTANTS.get(name, Fraction(number, 997))
        case ast.UnaryOp(op, operand):
            return OPERATORS[type(op)](value_at(operand, point))
        case ast.BinOp(left, op, right):
            return OPERATORS[type(op)](value_at(left, point), value_at(right, point))
        case ast.Call(ast.Name(name), arguments):
            return FUNCTIONS[name](*[value_at(argument, point) for argument in arguments])
    raise ValueError(f"{node} is not in the grammar")

# ---- The command line
def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    positive = data.bounded(int, 1)
    model = "HF folder or Hub name"
    required = {
        accuracy: {"--model": model},
        exposure: {"--teacher": model, "--student": model, "--out": "CURVE.jsonl"},
        weights: {"--student": model, "--traces": "T.jsonl, scored", "--out": "PAGE.html"},
    }
    for function, options in required.items():
        add = data.add_command(commands, function)
        for name, meaning in options.items():
            kind = data.output if name == "--out" else str
            add(name, type=kind, required=True, help=meaning)
        data.add_model_options(add)
        if function is weights:
            add("--tau", type=data.bounded(float, 1e-9), default=loss.TAU,
                help="temperature of the weight")
            continue
        add("--benchmark", required=True, help=f"{', '.join(BENCHMARKS)}; with a split: "
            "gsm8k:train; or FILE.jsonl")
        add("--suffix", help="text after each question that asks for no \\boxed; box, the "
            f"default for a benchmark with a name, is {SUFFIX!r}")
        add("--limit", type=positive, help="only the first N problems (default: all)")
        samples = 1 if function is accuracy else 4
        add("--samples", type=positive, default=samples, help="answers per problem")
        add("--max-new-tokens", type=positive, default=1024, help="tokens of an answer")
        size = 256 if torch.cuda.is_available() else 16
        add("--batch-size", type=positive, default=size, help="answers at a time")
        add("--seed", type=data.bounded(int, 0), default=0, help="of the answers")
        if function is accuracy:
            add("--temperature", type=data.bounded(float, 0), default=0.0,
                help="of sampling; 0 is greedy")
            add("--out", type=data.output, help="OUT.jsonl: a record per answer (default: "
                "BENCHMARK-DECODING.jsonl in the model's folder, or in runs/answers/NAME)")
            add("--resume", action="store_true", help="continue an interrupted evaluation")
    add = data.add_command(commands, compare)
    add("a", help="A.jsonl, from `accuracy`")
    add("b", help="B.jsonl: answers to the same problems")
    add = data.add_command(commands, report)
    add("runs", nargs="+", help="folders of train.py, with answers of `accuracy` in them")
    args = parser.parse_args(argv)
    args.run(args)

if __name__ == "__main__":
    data.run_command(main, "to continue an evaluation, add --resume")
