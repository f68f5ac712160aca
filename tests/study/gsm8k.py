"""SFT, DFT, KL, reverse KL and DisCorD on GSM8K: the README's three commands for each of them.

    python tests/study/gsm8k.py --teacher Qwen/Qwen2.5-1.5B-Instruct

The traces come from the training split without its last problems; on these, each objective gets
its rate from one grid; the test split gives the table. What is there is not done again, so the
same command resumes. It begins with an estimate of the time; --estimate ends with it. Options
that are not below go to every train.py. --out holds log.txt and table.md. Not a test.
"""

import argparse
import math
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1] / "checks"))
from server import ungraded

import data
import evaluate
import train
from model import check, read_json

HOME = Path(__file__).parents[2]
NEEDS_TEACHER = {"kl", "rkl"}
COLUMNS = ["run", "lr", "greedy", "- SFT", "sampled", "- SFT ", "ExAccErr, %", "tokens", "steps",
           "sec.", "GB"]


def run(log: Path, *words: object) -> str:
    """A command in a process of its own, so that its peak memory is its own. Returns its lines."""
    command = list(map(str, words))
    said = []
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        for line in (f"$ python {shlex.join(command)}\n",):
            print(line, end="", flush=True)
            file.write(line)
        file.flush()
        command[0] = str(HOME / command[0])
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            print(line, end="", flush=True)
            file.write(line)
            said.append(line)
    check(process.wait() == 0, f"failed: python {shlex.join(command)}")
    return "".join(said)


class Study:
    """The commands of one study, with its options filled in."""

    def __init__(self, args: argparse.Namespace, more: list[str]):
        self.args, self.more, self.out = args, more, Path(args.out)
        self.log = self.out / "log.txt"
        self.learn = train.parse_args(["--student", "s", "--traces", "t", "--out", "o", *more])

    def answer(self, model: object, problems: str, out: Path, *more: object) -> list[dict]:
        args = self.args
        run(self.log, "evaluate.py", "accuracy", "--model", model, "--benchmark",
            self.out / f"{problems}.jsonl", "--out", out, "--max-new-tokens", args.max_new_tokens,
            "--batch-size", args.answers, "--seed", args.seed, "--resume", *more)
        return evaluate.read_answers(out)

    def train(self, name: str, student: object, traces: Path, out: Path, *more: object) -> dict:
        """`name` is an objective, or one with a tau: discord@0.7."""
        name, _, tau = name.partition("@")
        options = ["--tau", tau] if tau else []
        if name in NEEDS_TEACHER:
            options += ["--teacher", self.args.teacher]
        run(self.log, "train.py", "--student", student, "--traces", traces, "--out", out, "--seed",
            self.args.seed, "--objective", name, "--resume", *self.more, *options, *more)
        return read_json(out / "run.json")

    def make_traces(self, answers: list[dict], file: Path) -> int:
        kept = ungraded(answers) if self.args.keep_wrong else answers
        data.write_jsonl(file, kept)
        return sum(not data.drop_reason(record) for record in kept)

    # ---- What it will take
    def decode_seconds(self, model: object, name: str) -> float:
        """Seconds of one full batch, without loading: two commands, and their difference."""
        times, out = [], self.out / "probe"
        for tokens in (1, self.args.max_new_tokens):
            file = out / f"{name}-{tokens}.jsonl"
            begin = time.perf_counter()
            self.answer(model, "train", file, "--limit", self.args.answers, "--temperature",
                        self.args.temperature, "--max-new-tokens", tokens)
            times.append(time.perf_counter() - begin)
        return max(times[1] - times[0], 0.1)

    def step_seconds(self, name: str, student: object) -> float:
        out = self.out / "probe" / name
        self.train(name, student, self.out / "probe/traces.jsonl", out, "--steps", 4,
                   "--log-every", 2)
        *_, (_, line) = data.read_jsonl(out / "log.jsonl")
        traces, run = data.read_jsonl(self.out / "probe/traces.jsonl"), read_json(out / "run.json")
        tokens = [record["prompt_tokens"] + len(record["teacher_logprobs"])
                  for _, record in traces if not data.drop_reason(record)]
        size = run["options"]["batch_size"] * run["options"]["grad_accum"]
        return sum(tokens) / len(tokens) * size / line["tok/s"]

    def estimate(self, student: object) -> None:
        args, out = self.args, self.out / "probe"
        shutil.rmtree(out, ignore_errors=True)  # it may have had other options
        counts = {name: len(list(data.read_jsonl(self.out / f"{name}.jsonl")))
                  for name in ("train", "dev", "test")}
        teacher = self.decode_seconds(args.teacher, "teacher")
        answers = evaluate.read_answers(out / f"teacher-{args.max_new_tokens}.jsonl")
        usable = self.make_traces(answers, out / "traces.jsonl") / len(answers)
        pupil = self.decode_seconds(student, "student")
        step = {False: self.step_seconds("sft", student), True: 0.0}
        if NEEDS_TEACHER & set(args.objectives):
            step[True] = self.step_seconds("kl", student)
        traces = counts["train"] * args.samples * usable
        steps = self.learn.steps or math.ceil(
            self.learn.epochs * traces / (self.learn.batch_size * self.learn.grad_accum))
        training = sum(step[name in NEEDS_TEACHER] for name in args.objectives) * steps
        runs = len(args.objectives) * len(args.rates)
        batches = {name: math.ceil(count / args.answers) for name, count in counts.items()}
        test = batches["test"] + math.ceil(args.test_samples * counts["test"] / args.answers)
        parts = {
            "traces of the teacher": math.ceil(counts["train"] * args.samples / args.answers)
            * teacher,
            "warm-up": args.warm_up * step[False],
            f"{runs} runs of {steps} steps": training * len(args.rates),
            "held-back problems": 2 * runs * batches["dev"] * pupil,
            "test problems": (len(args.objectives) + 1) * test * pupil + test * teacher,
        }
        lines = [f"{seconds / 3600:8.2f} h  {what}\n" for what, seconds in parts.items()]
        total = f"{sum(parts.values()) / 3600:8.2f} h  in all, and loading {3 * runs} times\n"
        print("".join(lines) + total, flush=True)
        (self.out / "estimate.txt").write_text("".join(lines) + total)

    # ---- The study
    def train_at(self, rate: str, name: str, student: object, traces: str = "traces") -> Path:
        label = name if traces == "traces" else f"{name}-{traces}"
        out = self.out / f"{label}-{rate}"
        self.train(name, student, self.out / f"{traces}.jsonl", out, "--lr", rate)
        return out

    def best_rate(self, name: str, student: object, traces: str = "traces") -> tuple[str, Path]:
        """The rate with the best accuracy on the held-back problems, half of it greedy and half
        sampled, and its run."""
        found = []
        for rate in self.args.rates:
            out = self.train_at(rate, name, student, traces)
            greedy = evaluate.summarize(self.answer(out, "dev", out / "dev-greedy.jsonl"))
            sampled = evaluate.summarize(self.answer(out, "dev", out / "dev-T1.jsonl",
                                                     "--temperature", 1))
            found.append((greedy["accuracy"] + sampled["accuracy"], rate, out))
        best = max(found, key=lambda one: one[0])
        _, rate, out = best
        if sum(one[0] == best[0] for one in found) > 1:
            print(f"note: of several equal rates of {name}, {rate} is the first", flush=True)
        if len(self.args.rates) > 2 and rate in (self.args.rates[0], self.args.rates[-1]):
            print(f"note: the best rate of {name}, {rate}, is at an end of the grid", flush=True)
        return rate, out

    def measure(self, model: object, folder: Path, base: Path | None) -> dict:
        """A row of the table; `base` is the folder with SFT's answers, to compare with."""
        row = {}
        for column, gain, file, more in (
                ("greedy", "- SFT", "test-greedy.jsonl", []),
                ("sampled", "- SFT ", "test-T1.jsonl",
                 ["--temperature", 1, "--samples", self.args.test_samples])):
            s = evaluate.summarize(self.answer(model, "test", folder / file, *more))
            row[column] = f"{s['accuracy']:.3f} ± {s['standard_error']:.3f}"
            row.setdefault("tokens", f"{s['mean_tokens']:.0f}")
            if base and base != folder:
                said = run(self.log, "evaluate.py", "compare", folder / file, base / file)
                found = re.search(r"A - B: (\S+), 95 % interval (\S+) to (\S+);", said)
                row[gain] = "{} [{}, {}]".format(*found.groups())
        return row

    def exposure(self, folder: Path) -> str:
        if not self.args.exposure_length:
            return ""
        file = folder / "exposure.jsonl"
        if not file.exists():
            run(self.log, "evaluate.py", "exposure", "--teacher", self.args.teacher, "--student",
                folder, "--benchmark", self.out / "test.jsonl", "--limit", 100, "--samples", 2,
                "--max-new-tokens", self.args.exposure_length, "--batch-size", self.args.answers,
                "--out", file)
        *_, (_, line) = data.read_jsonl(file)
        return "{excess:+.0f} [{low:+.0f}, {high:+.0f}]".format(**line)

    def table(self, student: object) -> list[dict]:
        rows = [{"run": f"teacher: {self.args.teacher}",
                 **self.measure(self.args.teacher, self.out / "teacher", None)}]
        chosen = {name: self.best_rate(name, student) for name in self.args.objectives}
        base = chosen["sft"][1] if "sft" in chosen else None
        for name, (rate, folder) in chosen.items():
            *_, (_, line) = data.read_jsonl(folder / "log.jsonl")
            made = read_json(folder / "run.json")
            rows.append({"run": name, "lr": rate, **self.measure(folder, folder, base),
                         "ExAccErr, %": self.exposure(folder), "steps": made["steps"],
                         "sec.": f"{made['seconds']:.0f}", "GB": f"{line['gb']:.1f}"})
        rows.insert(1, {"run": "student before",
                        **self.measure(student, self.out / "before", base)})
        return rows


def write_table(file: Path, head: list[str], rows: list[list[str]]) -> None:
    """Write a table in Markdown, and print it."""
    lines = [f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *rows)]
    print("".join(lines))
    file.write_text("".join(lines), encoding="utf-8")


def cut(model: object, layers: str, out: Path) -> Path:
    """A student made of a model's first layers ("12"), or of its first and last ones ("12+8")."""
    if not (out / "config.json").exists():
        student, _ = data.load(model)
        first, _, last = layers.partition("+")
        blocks = student.model.layers
        check(int(first) + int(last or 0) <= len(blocks),
              f"--layers {layers}: {model} has only {len(blocks)}")
        student.model.layers = blocks[:int(first)] + blocks[len(blocks) - int(last or 0):]
        student.config.raw["num_hidden_layers"] = len(student.model.layers)
        student.save_pretrained(out)
    return out


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the study, and those for train.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add, positive = parser.add_argument, data.bounded(int, 1)
    add("--teacher", default="Qwen/Qwen2.5-1.5B-Instruct")
    add("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
    add("--layers", help="of --student: 12, the first ones, or 12+8, without those between")
    add("--train", default="gsm8k:train", help="name or JSONL file of the training problems")
    add("--test", default="gsm8k", help="the same of the test problems")
    add("--problems", type=positive, help="only the first ones for training")
    add("--held-back", type=positive, default=500, help="the last ones of --train")
    add("--suffix", default="box", help="what follows each question (default: asks for a box)")
    add("--limit", type=positive, help="only the first test problems")
    add("--test-samples", type=positive, default=4, help="of each test problem, at T = 1")
    add("--samples", type=positive, default=4, help="of the teacher for each problem")
    add("--temperature", default="1", help="of the teacher (default: 1)")
    add("--keep-wrong", action="store_true", help="train on wrong answers, too: a try-out")
    add("--warm-up", type=data.bounded(int, 0), default=0, help="steps of SFT before all others")
    add("--warm-up-lr", default="1e-5")
    add("--lessons", help="traces of the warm-up (default: the teacher's)")
    add("--objectives", nargs="+", default=["sft", "dft", "kl", "rkl", "discord"],
        help="discord@0.7 is discord with tau = 0.7")
    add("--rates", nargs="+", default=["1e-6", "3e-6", "1e-5", "3e-5", "1e-4"])
    add("--max-new-tokens", type=positive, default=512)
    add("--answers", type=positive, default=256, help="at a time")
    add("--exposure-length", type=data.bounded(int, 0), default=128, help="tokens of ExAccErr")
    add("--seed", type=int, default=0)
    add("--estimate", action="store_true", help="only say how long it will take")
    add("--out", default="runs/gsm8k")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> list[dict]:
    args, more = parse_args(argv)
    study = Study(args, more)
    known = evaluate.load_problems(args.train, args.suffix)
    check(len(known) > args.held_back, f"--held-back {args.held_back}: of {len(known)} problems")
    data.write_jsonl(study.out / "train.jsonl", known[:-args.held_back][:args.problems])
    data.write_jsonl(study.out / "dev.jsonl", known[-args.held_back:])
    data.write_jsonl(study.out / "test.jsonl",
                     evaluate.load_problems(args.test, args.suffix)[:args.limit])
    student: object = args.student
    if args.layers:
        student = cut(args.student, args.layers, study.out / "cut")
    if args.estimate or not (study.out / "estimate.txt").exists():
        study.estimate(student)
    if args.estimate:
        return []
    answers = study.answer(args.teacher, "train", study.out / "answers.jsonl", "--temperature",
                           args.temperature, "--samples", args.samples)
    usable = study.make_traces(answers, study.out / "traces.jsonl")
    print(f"{usable} of {len(answers)} answers are traces", flush=True)
    if args.warm_up:
        study.train("sft", student, args.lessons or study.out / "traces.jsonl",
                    study.out / "warm", "--steps", args.warm_up, "--lr", args.warm_up_lr)
        student = study.out / "warm"
    rows = study.table(student)
    write_table(study.out / "table.md", COLUMNS,
                [[str(row.get(column, "")) for column in COLUMNS] for row in rows])
    return rows


if __name__ == "__main__":
    data.run_command(lambda: main(sys.argv[1:]), "the same command continues")
