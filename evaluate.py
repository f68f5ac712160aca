"""Answers, their accuracy, comparison, exposure bias, a page of token weights, grading.

One engine serves the student's accuracy and the teacher's traces alike: the right answers
of a teacher's evaluation are the traces that train.py reads.
"""

import argparse
import ast
import cmath
import hashlib
import html
import json
import math
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import constants, errors, utils
from tokenizers.decoders import DecodeStream

import data
import loss
from model import BadInput, Transformer, check, read_json

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
            check(page["rows"], f"no rows after row {len(rows)}")
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
    file, name = Path(benchmark), str(benchmark).partition(":")[0]
    if not file.exists():
        check(name in BENCHMARKS, f"--benchmark {benchmark}: no such file; the benchmarks "
              f"with a name are {', '.join(BENCHMARKS)}")
        file = download_benchmark(str(benchmark))
        suffix = "box" if suffix is None else suffix
    suffix = SUFFIX if suffix == "box" else suffix
    problems, unread = [], Counter()
    for where, record in data.read_jsonl(file):
        unread.update(record.keys() - data.TRACE_FIELDS - {*QUESTIONS, *GOLDS, "prefix"})
        problem = {"id": record.get("id", where.rpartition(" ")[2])}
        if "messages" in record:
            turns = [dict(turn) for turn in data.get_messages(record, where)]
            problem["messages"], last, key = turns, turns[-1], "content"
        else:
            problem["prompt"] = data.text_field(record, where, *QUESTIONS)
            last, key = problem, "prompt"
        if suffix and "\\boxed" not in last[key] and not last[key].endswith(suffix):
            last[key] += suffix
        golds = [record[name] for name in GOLDS if name in record]
        check(golds, f"{where}: no {' or '.join(GOLDS)}; it has {', '.join(record)}")
        gold = next((x for x in golds if str(x).strip() not in ("", "None", "[]")), "")
        check(not isinstance(gold, dict), f"{where}: the answer is an object")
        problem["answer"] = ", ".join(map(str, gold if isinstance(gold, list) else [gold]))
        if "prefix" in record:
            problem["prefix"] = record["prefix"]
        if problem["answer"]:
            problems.append(problem)
        else:
            print(f"{where}: dropped, its answer is empty")
    data.print_unread(file, unread)
    check(problems, f"{benchmark}: no problems")
    return problems

# ---- Answers and their accuracy
def encode_problem(problem: dict, tokenizer: data.Tokenizer) -> list[int]:
    """Prompt as ids. A `prefix`, from `data.py mix`, is the beginning of the answer."""
    where, prefix = f"problem {problem['id']}", problem.get("prefix", [])
    known = range(tokenizer.vocab_size)
    check(isinstance(prefix, list) and all(i in known for i in prefix), f"{where}: prefix: "
          f"not ids of the tokenizer in {tokenizer.folder}")
    return tokenizer.encode_prompt(data.get_messages(problem, where), where) + prefix

def generate_answers(model: Transformer, tokenizer: data.Tokenizer, problems: list[dict],
                     samples: int = 1, temperature: float = 0.0,
                     max_new_tokens: int = 1024, batch_size: int = 64, seed: int = 0,
                     done: Collection = ()) -> Iterator[dict]:
    """Yield a graded trace for each (problem id, sample) that is not `done`. Each answer
    has a seed of its own. A resumed run repeats the batches of the whole run, since the
    last digits of a sum depend on what shares its batch."""
    prompts = [encode_problem(problem, tokenizer) for problem in problems]
    jobs = [(i, k) for i in range(len(problems)) for k in range(samples)]
    jobs.sort(key=lambda job: -len(prompts[job[0]]))  # little padding, largest batch first
    starts = range(0, len(jobs), batch_size)
    for start in data.progress(starts, "answering"):
        batch = jobs[start:start + batch_size]
        missing = [(i, k) for i, k in batch if (str(problems[i]["id"]), k) not in done]
        if not missing:
            continue
        seeds = [(seed, i, k) for i, k in batch]
        batch_prompts = [prompts[i] for i, _ in batch]
        answers = model.sample(batch_prompts, max_new_tokens, temperature, seeds)
        for (i, k), (ids, logp) in zip(batch, answers, strict=True):
            if (i, k) in missing:
                record = grade_answer(model, tokenizer, problems[i], prompts[i], ids, logp)
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
    response = tokenizer.decode(ids[:-1] if finished else ids)
    record = {key: value for key, value in problem.items() if key != "prefix"}
    record["rendered"] = tokenizer.apply_chat_template(data.get_messages(problem, ""))
    record["response"] = response
    record["finished"] = finished
    record["teacher_logprobs"] = data.round_logp(logp)
    record["vocab"] = tokenizer.vocab_hash
    if ids != tokenizer.encode_response(response):
        record["tokens"] = ids
    record["extracted"] = extract_answer(response)
    graded = response if finished else up_to_last_box(response)
    record["correct"] = is_correct(graded, problem["answer"])
    return record

def read_answers(path: str | Path) -> list[dict]:
    """The records that `accuracy` wrote."""
    records = [record for _, record in data.read_jsonl(path)]
    check(records and all("setup" in record for record in records),
          f"{path}: empty, or not a file that `accuracy` wrote")
    return records

def accuracy_per_problem(records: list[dict]) -> dict[str, float]:
    """{problem id: share of its answers that are right}"""
    right, answers = Counter(), Counter()
    for record in records:
        answers[str(record["id"])] += 1
        right[str(record["id"])] += record["correct"]
    return {name: right[name] / answers[name] for name in answers}

def summarize(records: list[dict]) -> dict:
    """avg@k with its standard error over problems, pass@k, mean length, share cut off."""
    means = np.array(list(accuracy_per_problem(records).values()))
    n = len(means)
    return {
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
    ignored = {key: value for key, value in config.items() if value not in (None, 0, 1)
               and key in ("repetition_penalty", "top_k", "top_p", "min_p", "typical_p")}
    if ignored:
        print(f"{file}: not applied here, unlike in transformers and vLLM: {ignored}")

def accuracy(args: argparse.Namespace) -> None:
    """Answer a benchmark, grade the answers, keep a record of each, print the accuracy."""
    check(args.samples == 1 or args.temperature, "--samples > 1 needs a --temperature "
          "above 0: greedy answers are all the same")
    problems = load_problems(args.benchmark, args.suffix)[:args.limit or None]
    order = {str(problem["id"]): i for i, problem in enumerate(problems)}
    check(len(order) == len(problems), f"{args.benchmark}: problems with the same id")
    # What a resumed evaluation must have in common with the interrupted one.
    setup = {name: vars(args)[name] for name in ("model", "benchmark", "suffix", "samples",
                                                 "temperature", "max_new_tokens", "seed")}
    setup["dtype"] = data.compute_dtype(args)
    setup["problems_sha256"] = hashlib.sha256(json.dumps(problems).encode()).hexdigest()
    # OUT.part has a line per answer so far. It becomes OUT when all are there.
    decoding = f"T{args.temperature:g}x{args.samples}" if args.temperature else "greedy"
    folder = Path(args.model if Path(args.model).is_dir() else f"runs/answers/{args.model}")
    name = f"{Path(args.benchmark).stem.replace(':', '-')}-{decoding}.jsonl"
    out = Path(args.out or folder / name)
    part = Path(f"{out}.part")
    file, records = out if out.exists() else part, []
    if file.exists():
        check(args.resume, f"{file}: holds an evaluation; add --resume to continue or to "
              "print it, or remove the file")
        data.cut_half_line(file)
        records = [record for _, record in data.read_jsonl(file)]
    for record in records:
        data.check_same_settings(file, record.get("setup", {}), setup)
    if edited_since(records):
        print(f"{file}: {edited_since(records)} changed since these answers were written")
    if not out.exists():
        model, tokenizer = data.load(args.model, setup["dtype"], args.device)
        warn_ignored_generation_config(model.folder)
        part.parent.mkdir(parents=True, exist_ok=True)
        done = {(str(record["id"]), record["sample"]) for record in records}
        for record in generate_answers(model, tokenizer, problems, args.samples,
                                       args.temperature, args.max_new_tokens,
                                       args.batch_size, args.seed, done):
            record["setup"] = {**setup, "code": data.CODE}
            data.write_lines(part, [record], "a")
            records.append(record)
        records.sort(key=lambda record: (order[str(record["id"])], record["sample"]))
        data.write_jsonl(out, records)
    part.unlink(missing_ok=True)
    wanted = len(problems) * args.samples
    check(len(records) == wanted, f"{out}: {len(records)} answers instead of {wanted}")
    print(f"{summary_line(records)}\n  {out}")

def edited_since(records: list[dict]) -> str:
    """Which files that shape an answer were edited since the first of these? "" if none."""
    code = records[0]["setup"].get("code", {}) if records else data.CODE
    return data.edited(code, "model.py", "data.py", "evaluate.py")

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
        batch = data.collate([data.Example(np.array(prompt + ids), len(prompt))
                              for prompt, (ids, _) in zip(part, answers, strict=True)],
                             args.device)
        p_hidden = teacher(batch.tokens).flatten(0, 1)[batch.positions]
        q_hidden = student(batch.tokens).flatten(0, 1)[batch.positions]
        kl = data.map_rows(lambda p, q: loss.kl(student.logits(q), teacher.logits(p)),
                           p_hidden, q_hidden).cpu().numpy()
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
    times = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)
    times = np.concatenate([np.ones((1, n)), times])  # row 0: the estimate itself
    def sum_of_means(kl: np.ndarray) -> np.ndarray:
        total = times @ np.nansum(kl, 1)
        count = times @ np.isfinite(kl).sum(1)
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
    dtype = data.compute_dtype(args)
    teacher, teacher_tokenizer = data.load(args.teacher, dtype, args.device)
    student, tokenizer = data.load(args.student, dtype, args.device)
    check(teacher_tokenizer.vocab == tokenizer.vocab, "exposure: different tokenizers")
    problems = load_problems(args.benchmark, args.suffix)[:args.limit or None]
    prompts = sorted([encode_problem(problem, tokenizer) for problem in problems], key=len)
    repeated = [prompt for prompt in prompts for _ in range(args.samples)]
    shape = len(prompts), args.samples, args.max_new_tokens
    on_student = kl_along_samples(student, teacher, student, repeated, args)
    on_teacher = kl_along_samples(teacher, teacher, student, repeated, args)
    curve = exposure_curve(on_student.reshape(shape), on_teacher.reshape(shape))
    lines: list[dict] = []
    for length, values in enumerate(zip(*curve.values(), strict=True), 1):
        numbers = [round(float(value), 6) for value in values]
        lines.append({"length": length, **dict(zip(curve, numbers, strict=True))})
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
</style><h1>DisCorD weights</h1>
"""

def token_span(piece: str, w: float, title: str = "") -> str:
    """A token: orange if it counts less than in SFT, violet if it counts more."""
    rgb = "230,97,1" if w < 1 else "94,60,153"
    style = f"background:rgba({rgb},{abs(w - 1) * 0.7:.2f})"
    text = html.escape(piece).replace("\n", "\u21b5\n")
    return f'<span style="{style}" title="{title}">{text}</span>'

def weights(args: argparse.Namespace) -> None:
    """Write a page of the first ten traces, each token in the color of its weight."""
    tokenizer, _, examples, logps = data.load_scored(args.student, args, True, 10)
    page = [PAGE, f"<p>w = 2 sigmoid((log q - log p) / {args.tau:g}), student "
            f"{html.escape(args.student)}. Orange tokens count less than in SFT, violet "
            "ones more. Point at one to see q, p and w."]
    for example, q_logp in zip(examples, logps, strict=True):
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
    print(f"{args.out}: {len(logps)} traces")

def report(args: argparse.Namespace) -> None:
    """Print a table of finished runs: accuracy +- standard error in their answers."""
    table = []
    for folder in map(Path, args.runs):
        run = read_json(folder / "run.json")
        check("seconds" in run, f"{folder}: not finished; add --resume to its command")
        row, lengths = {"run": f"{folder.parent.name}/{folder.name}"}, []
        for file in sorted(folder.glob("*-*.jsonl")):
            s = summarize(read_answers(file))
            row[file.stem] = f"{s['accuracy']:.3f} +- {s['standard_error']:.3f}"
            lengths.append(s["mean_tokens"])
        row["tokens"] = f"{np.mean(lengths):.1f}" if lengths else ""
        row["steps"] = str(run["steps"])
        row["seconds"] = f"{run['seconds']:.0f}"
        table.append(row)
    names = list(dict.fromkeys(name for row in table for name in row))
    widths = {name: max(len(row.get(name, "")) for row in [{name: name}, *table])
              for name in names}
    rule = {name: "-" * width for name, width in widths.items()}
    for row in [{name: name for name in names}, rule, *table]:
        print("|", " | ".join(f"{row.get(name, ''):{widths[name]}}" for name in names), "|")

# ---- Grading: is the final answer of a text the gold answer?
LONGEST = 500  # characters of an answer
STATED = re.compile(r"(?i)####|answer(?: is(?! not)|:)")
WORD = re.compile(r"(?<![\\a-zA-Z{])(?!sqrt)[a-zA-Z][a-z]{2}|\bis\b")
# A formula in its delimiters, or a number that is not a part of one.
PLACE = re.compile(r"(?s)\$([^$\n]+)\$(?![0-9])|\\\((.+?)\\\)|\\\[(.+?)\\\]|"
                   r"(?<![\w.{}()/^\\])(-?\$?(?:[0-9]|\.[0-9])(?:[0-9,./]*[0-9])?)")

def last_boxed(text: str) -> str:
    r"""What the last \boxed{} holds; nothing if it was cut off."""
    inside = text.rpartition(r"\boxed{")[2]
    depth = 1
    for end, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return inside[:end]
    return ""

def extract_answer(text: str, gold: bool = False) -> str:
    """The last box, or what is stated as the answer, or the last number or formula."""
    text = text.replace("−", "-").replace("–", "-")
    text = text.rpartition("</think>")[2].strip() or text
    text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    if r"\boxed{" in text:
        return last_boxed(text)
    before, *stated = STATED.split(text)
    if stated:
        text = re.split(r"\n|\.(?:\s|$)", stated[-1].strip(" \n:*"))[0]
    if not WORD.search(text) or gold and not stated:
        return text
    if stated:
        text = re.split("(?<![<>!])=", text)[-1].strip()
    places = PLACE.findall(text[-10 * LONGEST:])
    if not places:
        return text
    place = places[0 if stated and PLACE.match(text) else -1]
    return next(filter(None, place))

# Spellings that are left out, and rules that replace one by another, in this order.
DROPPED = (r",\! \! \left \right \displaystyle ^\circ ^{\circ} \degree ° \$ $ \% % ** "
           r"\( \) \[ \] \{ \}").split()
RULES = {
    r"\\\\(?=[a-zA-Z]{2})": r"\\",  # \\frac, in texts that were escaped twice
    r"\\begin\{[bp]matrix\}": "((", r"\\end\{[bp]matrix\}": "))", r"\\\\": "),(", "&": ",",
    r"\\[,;: ]|~|\\q?quad": " ", r"\{,\}": ",", r"\\[dt]frac": r"\\frac", r"\\ln": r"\\log",
    r"\\(mbox|textbf|textnormal|mathrm)": r"\\text", "×|·|\\\\times|\\\\cdot": "*",
    "√": r"\\sqrt", "π": r"\\pi", "∞": r"\\infty",
    r"\\leq?(?![a-z])|<=": "≤", r"\\geq?(?![a-z])|>=": "≥",
    r"\\text\s*\{ *(and|or) *\}|\b(and|or)\b|\\cup|;": ",",
    r"\\sqrt ?([0-9]+)": r"\\sqrt{\1}", r"\\frac ?([0-9])": r"\\frac{\1}",  # \frac12
    r"(\\frac\{[^{}]*\}) ?([0-9])": r"\1{\2}",
    r"\b([0-9]+) ?\\frac\{([0-9]+)\}\{([0-9]+)\}": r"(\1+\2/\3)",  # 2\frac{1}{2}
    r"\b([0-9]+) ([0-9]+)/([0-9]+)": r"(\1+\2/\3)",  # 2 1/2
    r"_\{(\w+)\}": r"_\1", r"(?<![\w.,])0+(?=[0-9])": "",  # 025
    r"^x *\\in(?![a-z])": "",
}
THOUSANDS = r"(?<=[0-9])[, ](?=[0-9]{3}(?![0-9]))"
UNIT = re.compile(
    r"(?<=[\w})]) *\\text *\{([^{}]*)\}(?:\^\{?[23]\}?)?|"  # 5\text{ cm}^2, 5 cm^2
    r"(?<=[0-9}])(?: *([cmk]?m|kg|g|ft)| +(?!sqrt|sin|cos|tan|log)([a-zA-Z]{3}[a-zA-Z /.]*)"
    r")(?:\^\{?[23]\}?|[²³])?$")

def normalize(text: str) -> tuple[str, set[str]]:
    """The answer in one spelling, and the words of its units."""
    for spelling in DROPPED:
        text = text.replace(spelling, "")
    for old, new in RULES.items():
        text = re.sub(old, new, text.strip())
    if not re.search(r"[(\[]", text):  # (1,234) is a point
        text = re.sub(THOUSANDS, "", text)
    text = text.rstrip(".")
    units = " ".join(map("".join, UNIT.findall(text))).lower()
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", UNIT.sub(" ", text))
    text = re.sub(r" *([^\w ]) *", r"\1", " ".join(text.split()))
    text = re.sub(r"^\(([A-Z])\)", r"\1", text)  # (A)
    if r"\pm" in text:
        text = ",".join(text.replace(r"\pm", sign) for sign in "+-")
    if re.search(r"(?<![\\a-zA-Z])[a-zA-Z]{3}", text):
        text = text.lower()
    return text, set(re.findall(r"[a-z]+?(?=s?\b)", units))

TOKEN = re.compile(r"\\?(?:sqrt|pi|sin|cos|tan|log|infty)|\\[a-z]+|\*\*|"
                   r"[a-zA-Z](?:_\w)?|[0-9.]+(?:e-?[0-9]+)?|\S")
CONSTANTS = {"pi": math.pi, "e": math.e, "i": 1j, "infty": math.inf}
GREEK = ("alpha", "beta", "theta", "mu", "omega")
FUNCTIONS = {name: getattr(cmath, name) for name in ("sqrt", "sin", "cos", "tan", "log")}
UNREADABLE = (ArithmeticError, LookupError, MemoryError, RecursionError, SyntaxError,
              TypeError, ValueError)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Div: operator.truediv, ast.Pow: operator.pow}

def to_python(formula: str) -> str:
    r"""\frac{1}{2}x^2 becomes (1)/(2)*x**2, an equation its left minus its right side."""
    formula = "(" + formula.replace("=", ")-(") + ")"
    for old, new in {"}{": ")/(", r"\frac": "", "{": "(", "}": ")", "^": "**"}.items():
        formula = formula.replace(old, new)
    code, before = "", ""
    for token in TOKEN.findall(formula):
        token = token.lstrip("\\")
        is_function = re.fullmatch("f|g|P|(?!pi)[a-z]{2,}", before)
        if re.match(r"[\w)]", before) and re.match(r"[a-zA-Z(]", token) and not is_function:
            code += "*"
        code += token + " "
        before = token
    return code

def evaluate(node: ast.AST, point: int):
    """The value of a formula, with random numbers for its letters."""
    match node:
        case ast.Constant(value=int() | float() as number):
            return Fraction(str(number))
        case ast.Name(id=name) if name in CONSTANTS:
            return CONSTANTS[name]
        case ast.Name(id=name) if len(name) == 1 or "_" in name or name in GREEK:
            return Fraction(random.Random(f"{name} {point}").randrange(-999, 999), 500)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluate(operand, point)
        case ast.BinOp(left=left, op=op, right=right):
            x, y = evaluate(left, point), evaluate(right, point)
            if isinstance(op, ast.Pow) and abs(y) * len(str(x)) > 2 * LONGEST:
                raise ValueError("too many digits")
            return OPERATORS[type(op)](x, y)
        case ast.Call(func=ast.Name(id=name), args=[operand]):
            return FUNCTIONS[name](evaluate(operand, point))
    raise ValueError(f"{node} is not in the grammar")

def same_value(a: str, b: str) -> bool:
    """Whole numbers are compared exactly, others to nine digits, formulas at four points.
    Equations may be multiples of each other."""
    if re.search(r"[/^]\\frac", a + b) or a.count("=") != b.count("="):
        return False
    try:
        trees = [ast.parse(to_python(text), mode="eval").body for text in (a, b)]
        for point in range(4):
            x, y = (evaluate(tree, point) for tree in trees)
            if "=" in a:
                x, y = x / evaluate(trees[0], 0), y / evaluate(trees[1], 0)
            whole = any(isinstance(z, Fraction) and z.denominator == 1 for z in (x, y))
            if not (x == y if whole else cmath.isclose(x, y, rel_tol=1e-9)):
                return False
    except UNREADABLE:
        return False
    return True

def split(text: str) -> list[str]:
    """The parts between the commas that are in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts

def equivalent(a: str, b: str) -> bool:
    """Are two answers the same number, formula, point, interval or list?"""
    if a == b:
        return a != ""
    x, y = split(a), split(b)
    if len(x) > 1 or len(y) > 1:  # a list, in any order
        in_x = len(x) == len(y) and all(any(equivalent(i, j) for i in x) for j in y)
        return in_x and all(any(equivalent(i, j) for j in y) for i in x)
    if "=" in a and "=" not in b:  # x = 5
        return equivalent(a.rpartition("=")[2], b)
    if re.match(r"[a-zA-Z|]+(_\w)?(\(\w\))?=", b) and "=" not in a:
        return equivalent(a, b.partition("=")[2])
    x, y = split(a[1:-1]), split(b[1:-1])
    if len(x) > 1 or len(y) > 1:  # a point, an interval, a matrix
        same_brackets = a[:1] + a[-1:] == b[:1] + b[-1:]
        return same_brackets and len(x) == len(y) and all(map(equivalent, x, y))
    return same_value(a, b)

def is_correct(prediction: str, gold: str) -> bool:
    """Is the final answer of the prediction the gold answer?"""
    a, b = extract_answer(prediction), extract_answer(gold, gold=True)
    if max(len(a), len(b)) > LONGEST:
        return False
    (a, a_units), (b, b_units) = normalize(a), normalize(b)
    return (a_units <= b_units or b_units <= a_units) and equivalent(a, b)

def up_to_last_box(text: str) -> str:
    return text if r"\boxed{" in text and last_boxed(text) else ""

# ---- The command line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    positive, count = data.bounded(int, 1), data.bounded(int, 0)
    def add_problem_options(add: Callable, samples: int) -> None:
        add("--benchmark", required=True, help=f"{', '.join(BENCHMARKS)}; with a split: "
            "gsm8k:train; or FILE.jsonl")
        add("--suffix", help="text after each question that asks for no \\boxed; box, the "
            f"default for a benchmark with a name, is {SUFFIX!r}")
        add("--limit", type=count, default=0, help="only the first N problems; 0 is all")
        add("--samples", type=positive, default=samples, help="answers per problem")
        add("--max-new-tokens", type=positive, default=1024, help="of an answer")
        size = 256 if torch.cuda.is_available() else 16
        add("--batch-size", type=positive, default=size, help="answers at a time")
        add("--seed", type=count, default=0, help="of the answers")
        data.add_model_options(add)

    add = data.add_command(commands, accuracy)
    add("--model", required=True, help="HF folder or Hub name")
    add_problem_options(add, samples=1)
    add("--temperature", type=data.bounded(float, 0), default=0.0, help="0 is greedy")
    add("--out", help="OUT.jsonl: a record per answer; a teacher's are traces (default: "
        "BENCHMARK-DECODING.jsonl in the model's folder, or in runs/answers/NAME)")
    add("--resume", action="store_true", help="continue an interrupted evaluation")
    add = data.add_command(commands, compare)
    add("a", help="A.jsonl, from `accuracy`")
    add("b", help="B.jsonl: answers to the same problems")
    add = data.add_command(commands, exposure)
    add("--teacher", required=True, help="HF folder or Hub name")
    add("--student", required=True, help="HF folder or Hub name")
    add("--out", required=True, help="CURVE.jsonl: a line per length")
    add_problem_options(add, samples=4)
    add = data.add_command(commands, weights)
    add("--student", required=True, help="HF folder or Hub name")
    add("--traces", required=True, help="T.jsonl with teacher_logprobs")
    add("--out", required=True, help="PAGE.html: opens in any browser")
    add("--tau", type=data.bounded(float, 1e-9), default=loss.TAU, help="of the weight")
    data.add_model_options(add)
    add = data.add_command(commands, report)
    add("runs", nargs="+", help="folders of train.py, with answers of `accuracy` in them")
    args = parser.parse_args(argv)
    args.run(args)

if __name__ == "__main__":
    data.run_command(main, "to continue an evaluation, add --resume")
