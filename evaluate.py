"""Answers, their grading and accuracy; `python evaluate.py accuracy --help`.

One engine samples, grades and records, for a student's accuracy and for a teacher's traces alike:
the right answers of a teacher's evaluation *are* the traces that train.py reads.
"""

import argparse
import math
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

from data import Tokenizer, load, load_problems, write_jsonl
from model import BadInput, Transformer, read_json


def last_boxed(text: str) -> str | None:
    r"""What stands in the last whole \boxed{...}, braces matched, in one pass.

    >>> last_boxed(r"so \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    found, last, opened = None, -1, []
    for mark in re.finditer(r"\\boxed\s*\{|\\[{}]|[{}]", text):  # an escaped brace is no brace
        if mark[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{" and start.start() > last:
                found, last = text[start.end():mark.start()].strip(), start.start()
        elif mark[0].endswith("{") and mark[0] != "\\{":
            opened.append(mark)
    return found


def extract_answer(text: str, gold: bool = False) -> str:
    """The last \\boxed{}, else what follows ####, else (a gold answer has only these) what follows
    "the answer is", else the last number, else the whole text."""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (r"####(.*)",) if gold else (r"####(.*)", r"[Aa]nswer is:?(.*)"):
        if found := re.findall(pattern, text):
            return found[-1].strip()
    numbers = [] if gold else re.findall(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?", text)
    return numbers[-1] if numbers else text.strip()


def as_number(text: str) -> Fraction | None:
    r"""
    >>> as_number("$1,234.50"), as_number(r"-\frac{3}{4}"), as_number("007"), as_number("x+1")
    (Fraction(2469, 2), Fraction(-3, 4), Fraction(7, 1), None)
    """
    plain = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    plain = re.sub(r"[\s$\\!%]|,(?=\d{3}(?!\d))", "", plain).rstrip(".")
    if not re.fullmatch(r"[+-]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40})(/\d{1,40})?", plain):
        return None
    number, _, below = plain.partition("/")
    if below and not int(below):
        return None
    return Fraction(number) / Fraction(below or 1)


def is_correct(prediction: str, gold: str) -> bool:
    """Do the final answers agree: as numbers (exactly, so 1/2 = 0.5), else letter by letter but for
    spaces, dollars and a full stop? No text is ever evaluated.

    >>> is_correct("He has 1,200 + 34 = 1234 left.\\n#### 1,234", "1234")
    True
    """
    prediction, gold = extract_answer(prediction), extract_answer(gold, gold=True)
    numbers = as_number(prediction), as_number(gold)
    if None not in numbers:
        return numbers[0] == numbers[1]
    prediction, gold = (re.sub(r"[\s$]", "", text).rstrip(".") for text in (prediction, gold))
    return prediction == gold != ""


def answers(model: Transformer, tokenizer: Tokenizer, problems: list[dict], samples: int = 1,
            temperature: float = 0.0, top_p: float = 1.0, max_new_tokens: int = 1024,
            batch_size: int = 64, seed: int = 0) -> list[dict]:
    """One trace record (see data.py) for each problem and sample, in that order, with `correct` and
    `finished` added. Every answer has a seed of its own, so batching does not change a draw. Text
    that was cut off is wrong unless its answer was boxed already."""
    prompts = [tokenizer.prompt([{"role": "user", "content": problem["prompt"]}])
               for problem in problems]
    jobs = [(i, k) for i in range(len(problems)) for k in range(samples)]
    jobs.sort(key=lambda job: len(prompts[job[0]]))  # neighbours need little padding
    records = {}
    for start in tqdm(range(0, len(jobs), batch_size), desc="answering", disable=None):
        batch = jobs[start:start + batch_size]
        drawn = model.sample([prompts[i] for i, _ in batch], max_new_tokens, temperature,
                             [(seed, i, k) for i, k in batch], top_p,
                             vocab_size=tokenizer.vocab_size)
        for (i, k), (ids, logp) in zip(batch, drawn, strict=True):
            finished = ids[-1] in model.eos_token_ids
            text = tokenizer.decode(ids[:-1] if finished else ids)
            gradable = text if finished else last_boxed(text) and text
            record = {**problems[i], "sample": k, "response": text, "finished": finished,
                      "extracted": extract_answer(text), "temperature": temperature,
                      "correct": bool(gradable) and is_correct(text, problems[i]["answer"]),
                      "teacher_logprobs": [round(value, 4) for value in logp]}
            if ids != [*tokenizer.encode(text), tokenizer.end]:
                record["tokens"] = ids
            records[i, k] = record
    return [records[job] for job in sorted(records)]


def summarise(records: list[dict]) -> dict:
    """Accuracy, its standard error over problems, and what one must know to compare it."""
    marks: dict[str, list[bool]] = {}
    for record in records:
        marks.setdefault(str(record["id"]), []).append(record["correct"])
    means = [sum(mark) / len(mark) for mark in marks.values()]
    n, accuracy = len(means), sum(means) / len(means)
    variance = sum((mean - accuracy) ** 2 for mean in means) / max(n - 1, 1)
    return {"accuracy": accuracy, "standard_error": math.sqrt(variance / n), "problems": n,
            "samples": len(records) // n,
            "mean_tokens": sum(len(r["teacher_logprobs"]) for r in records) / len(records),
            "truncated": sum(not r["finished"] for r in records) / len(records)}


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
    """Answers a benchmark, grades the answers, prints accuracy with its standard error."""
    problems = load_problems(args.benchmark)[:args.limit]
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.device)
    records = answers(model, tokenizer, problems, args.samples, args.temperature, args.top_p,
                      args.max_new_tokens, args.batch_size, args.seed)
    if args.out:
        write_jsonl(args.out, records)
    got = summarise(records)
    decoding = f"T={args.temperature:g}, top-p {args.top_p:g}" if args.temperature else "greedy"
    print(f"{args.model} on {Path(args.benchmark).name}: accuracy {got['accuracy']:.3f} +- "
          f"{got['standard_error']:.3f} (n={got['problems']} x {got['samples']}, {decoding}, "
          f"{got['mean_tokens']:.1f} tokens, {got['truncated']:.1%} cut off at "
          f"{args.max_new_tokens}; {peak_memory_gb(args.device):.2f} GB, commit {commit()})")


def table(models: dict[str, Path], problems: Path, device: str = "cpu") -> None:
    """Prints models side by side: accuracy greedy and sampled at temperature 1 with its standard
    error, the answers' mean length, and the seconds that the training took."""
    held_out = load_problems(problems)
    lines = [f"\n{len(held_out)} problems of {problems}, accuracy +- standard error",
             f"{'':16}{'greedy':>16}{'sampled, T=1':>16}{'mean length':>13}{'training':>10}"]
    for name, folder in models.items():
        model, tokenizer = load(folder, device=device)
        greedy, sampled = (summarise(answers(model, tokenizer, held_out, temperature=temperature,
                                             max_new_tokens=64, batch_size=500))
                           for temperature in (0.0, 1.0))
        marks = [f"{got['accuracy']:.3f} +- {got['standard_error']:.3f}"
                 for got in (greedy, sampled)]
        seconds = read_json(folder / "run.json")["seconds"]
        lines.append(f"{name:16}{marks[0]:>16}{marks[1]:>16}{sampled['mean_tokens']:13.1f}"
                     f"{seconds:8.0f} s")
    print("\n".join(lines))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("accuracy", help=accuracy.__doc__, allow_abbrev=False)
    command.set_defaults(run=accuracy)
    add = command.add_argument
    add("--model", required=True, help="HF folder or Hub name")
    add("--benchmark", required=True, metavar="FILE.jsonl", help="problems with their answers")
    add("--out", metavar="OUT.jsonl", help="one record an answer; a teacher's are traces")
    add("--samples", type=int, default=1, help="answers for each problem")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0, help="nucleus sampling below 1")
    add("--max-new-tokens", type=int, default=1024, help="longer answers are cut off, and wrong")
    add("--batch-size", type=int, default=64, help="answers at a time")
    add("--limit", type=int, help="only the first so many problems")
    add("--seed", type=int, default=0, help="each answer's seed is made from it")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args(argv)
    if args.samples > 1 and not args.temperature:
        parser.error("--samples > 1 needs a --temperature above 0: greedy answers are all alike")
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except BadInput as error:
        raise SystemExit("error: " + " ".join(str(error).split())) from None
