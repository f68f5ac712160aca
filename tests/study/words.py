"""Who is whose: six objectives with real pretrained weights, on two CPU cores or a GPU.

    python tests/study/words.py                     # SmolLM2-135M-Instruct, about 2.5 hours
    python tests/study/words.py --seeds 0 1 2       # for the table of tests/study/README.md

A problem is a few sentences and a question about them. The student is the teacher's model without
the layers between its first 12 and its last 8, healed on answers that are written out. --out holds
log.txt, table.md, table.csv, steps.md, weights.md and answers.md. The same command resumes, and a
further seed uses the same teacher. On a GPU, --scale 4 trains longer and on more problems.
"""

import argparse
import random
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))
import gsm8k

import data
import evaluate

NAMES = """Alice Amy Anna Ben Bob Carl David Emma Eva Frank Grace Henry Ivy Jack Jane Kate Leo Linda
Lucy Maria Mark Max Nick Paul Peter Rose Ruth Sam Sara Tom Tony Victor""".split()
ROLES = "boss coach doctor friend neighbor sister teacher uncle".split()
HOPS = 2, 3, 4
LAYERS = "12+8"
OBJECTIVES = ["sft", "dft", "kl", "rkl", "discord", "discord@1"]
RATES = ["1e-4", "3e-4"]
TEACHER_STEPS, STUDENT_STEPS, STEPS = 90, 150, 60  # of eight traces each
PROBLEMS, HELD_BACK, TEST = 900, 150, 300
MOST_TOKENS = 64  # of an answer; the longest right one has about 40


# ---- The task
def fact(rng: random.Random, name: str, role: str, other: str, back: float) -> str:
    if rng.random() < back:
        return f"{other} is the {role} of {name}."
    return f"{name}'s {role} is {other}."


def problem(rng: random.Random, back: float, skip: float) -> dict:
    """A chain of two to four facts and two facts beside it, in any order, and a question. `back`
    is the share of facts told backwards, `skip` the probability that two steps are written as one.
    An empty system turn replaces the default system prompt of the template."""
    hops = rng.choice(HOPS)
    names = rng.sample(NAMES, hops + 3)
    chain, others = names[:hops + 1], names[hops + 1:]
    roles = [rng.choice(ROLES) for _ in range(hops)]
    facts = list(zip(chain, roles, chain[1:], strict=False))
    for other in others:
        i = rng.randrange(hops)
        facts.append((chain[i], rng.choice([role for role in ROLES if role != roles[i]]), other))
    told = [fact(rng, *known, back) for known in facts]
    rng.shuffle(told)
    asked = " of ".join(f"the {role}" for role in reversed(roles))
    prompt = " ".join([*told, f"Who is {asked} of {chain[0]}?"])
    steps, i = [], 0
    while i < hops:
        left = f"{chain[i]}'s {roles[i]}"
        if i + 1 < hops and rng.random() < skip:
            i += 1
            left += f"'s {roles[i]}"
        i += 1
        steps.append(f"{left} is {chain[i]}.")
    return {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": prompt}],
            "response": " ".join([*steps, f"#### {chain[-1]}"]), "answer": chain[-1]}


def write(file: Path, count: int, back: float, skip: float = 0.0) -> None:
    if not file.exists():
        rng = random.Random(f"{file.parent.name}/{file.name}")
        data.write_jsonl(file, [{"id": i, **problem(rng, back, skip)} for i in range(count)])


# ---- The runs
class Words(gsm8k.Study):
    """The study of one seed, which says how far it is."""

    left = spent = worked = 0.0  # costs still to come; seconds, and the costs that took them
    rate = 1.0  # seconds of one unit of cost, before anything was measured

    def __init__(self, root: Path, seed: int, scale: float):
        self.root, self.home, self.scale = root, root / f"seed{seed}", scale
        self.teacher, self.before = root / "teacher", self.home / "before"
        super().__init__(*gsm8k.parse_args([
            "--teacher", str(self.teacher), "--out", str(self.home), "--seed", str(seed),
            "--objectives", *OBJECTIVES, "--rates", *RATES, "--exposure-length", "0",
            "--max-new-tokens", str(MOST_TOKENS), "--answers", "64", "--steps", self.size(STEPS),
            "--batch-size", "8", "--grad-accum", "1"]))

    def size(self, count: int) -> str:
        return str(max(round(count * self.scale), 2))

    def layers(self, model: object) -> int:
        teacher = model == self.teacher or not Path(str(model)).is_relative_to(self.home)
        return 30 if teacher else 20

    def count(self, cost: float, finished: bool, begin: float) -> None:
        """One command is over. Its cost is in layers times tokens; training counts three times."""
        Words.left -= cost
        if not finished:
            Words.spent += time.perf_counter() - begin
            Words.worked += cost
        rate = Words.spent / Words.worked if Words.worked else Words.rate
        print(f"[{Words.spent / 60:.0f} minutes; about {Words.left * rate / 60:.0f} to go]",
              flush=True)

    def train_cost(self, name: str, model: object, steps: int) -> float:
        judge = 30 if name in gsm8k.NEEDS_TEACHER else 0
        return (3 * self.layers(model) + judge) * steps * 8 * 80

    def answer_cost(self, model: object, count: int) -> float:
        return 1.5 * self.layers(model) * count * 80

    def train(self, name: str, student: object, traces: Path, out: Path, *more: object) -> dict:
        begin, finished = time.perf_counter(), (out / "config.json").exists()
        made = super().train(name, student, traces, out, *more)
        self.count(self.train_cost(name, student, made["steps"]), finished, begin)
        return made

    def answer(self, model: object, problems: str, out: Path, *more: object) -> list[dict]:
        begin, finished = time.perf_counter(), out.exists()
        answers = super().answer(model, problems, out, *more)
        self.count(self.answer_cost(model, len(answers)), finished, begin)
        return answers

    def cost(self) -> float:
        """Of all stages of this seed but the teacher."""
        steps, problems, held_back, tests = (
            int(self.size(count)) for count in (STEPS, PROBLEMS, HELD_BACK, 5 * TEST))
        total = self.train_cost("sft", self.before, int(self.size(STUDENT_STEPS)))
        total += self.train_cost("sft", self.before, steps)  # the check
        total += self.answer_cost(self.teacher, problems + tests)
        total += (2 + len(OBJECTIVES)) * self.answer_cost(self.before, tests)
        for name in OBJECTIVES:
            one = self.train_cost(name, self.before, steps)
            total += len(RATES) * (one + self.answer_cost(self.before, 2 * held_back))
        return total

    def make_student(self, weights: str) -> None:
        lessons = self.home / "lessons.jsonl"
        write(lessons, int(self.size(STUDENT_STEPS)) * 8, back=0.1)
        blank = gsm8k.cut(weights, LAYERS, self.home / "cut")
        self.train("sft", blank, lessons, self.before, "--steps", self.size(STUDENT_STEPS),
                   "--lr", "2e-4")

    def check_gain(self) -> list[dict]:
        """If not even right answers that are written out help, no objective has much to gain."""
        lessons, out = self.home / "check.jsonl", self.home / "check"
        write(lessons, int(self.size(STEPS)) * 8, back=0.5)
        self.train("sft", self.before, lessons, out, "--lr", RATES[0])
        rows = []
        for folder, model in ((self.home / "before", self.before), (out, out)):
            rows.append(self.measure(model, folder, None))
        print(f"check, student before: {rows[0]}\ncheck, after lessons without skips: {rows[1]}")
        return rows

    def make_all_traces(self) -> None:
        write(self.home / "known.jsonl", int(self.size(PROBLEMS)) + int(self.size(HELD_BACK)), 0.5)
        write(self.home / "new.jsonl", int(self.size(TEST)), 0.5)
        known = evaluate.load_problems(self.home / "known.jsonl")
        count = int(self.size(PROBLEMS))
        data.write_jsonl(self.home / "train.jsonl", known[:count])
        data.write_jsonl(self.home / "dev.jsonl", known[count:])
        data.write_jsonl(self.home / "test.jsonl",
                         evaluate.load_problems(self.home / "new.jsonl"))
        answers = self.answer(self.teacher, "train", self.home / "answers.jsonl",
                              "--temperature", 1)
        usable = self.make_traces(answers, self.home / "traces.jsonl")
        print(f"{usable} of {len(answers)} answers are traces", flush=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--weights", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub name")
    add("--seeds", type=data.bounded(int, 0), nargs="+", default=[0])
    add("--scale", type=data.bounded(float, 1e-3), default=1.0, help="times all steps and problems")
    add("--out", default="runs/words")
    args = parser.parse_args(argv)
    studies = [Words(Path(args.out), seed, args.scale) for seed in args.seeds]
    first = studies[0]
    lessons = first.root / "teacher-lessons.jsonl"
    write(lessons, int(first.size(TEACHER_STEPS)) * 8, back=0.5, skip=0.25)
    if not Words.worked:
        probe = first.root / "probe"
        begin = time.perf_counter()
        gsm8k.Study.train(first, "sft", args.weights, lessons, probe, "--steps", 3,
                          "--log-every", 1)
        Words.spent += time.perf_counter() - begin
        speeds = [line["tok/s"] for _, line in data.read_jsonl(probe / "log.jsonl")]
        Words.rate = 1 / (3 * 30 * max(speeds))
    teacher_steps = int(first.size(TEACHER_STEPS))
    Words.left = first.train_cost("sft", first.teacher, teacher_steps)
    Words.left += sum(one.cost() for one in studies)
    print(f"this will take about {Words.left * Words.rate / 3600:.1f} hours, less what is done")
    first.train("sft", args.weights, lessons, first.teacher, "--steps", teacher_steps,
                "--lr", "2e-4", "--seed", 0)
    for one in studies:
        one.make_all_traces()
        one.make_student(args.weights)
        one.check_gain()
        one.table(one.before)


if __name__ == "__main__":
    data.run_command(lambda: main(sys.argv[1:]), "the same command continues")
