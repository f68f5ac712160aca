"""Who is whose: six objectives with real pretrained weights, on two CPU cores or a GPU.

    python tests/study/words.py                     # SmolLM2-135M-Instruct, three hours
    python tests/study/words.py --seeds 0 1 2       # three seeds, seven hours

A problem is a few sentences and a question about them. The student is the teacher's model without
the layers between its first 12 and its last 8, healed on answers that are written out. --out holds
table.md, table.csv, steps.md, weights.md, answers.md and, in the folder of each seed, log.txt. The
same command resumes. A further seed has the same teacher and the first seed's rates, so it takes
two hours. On a GPU, --scale 4 trains longer and on more problems.
"""

import argparse
import csv
import random
import re
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import gsm8k
import study

import data
import evaluate
import loss
from model import read_json

NAMES = [
    "Alice", "Amy", "Anna", "Ben", "Bob", "Carl", "David", "Emma", "Eva", "Frank", "Grace", "Henry",
    "Ivy", "Jack", "Jane", "Kate", "Leo", "Linda", "Lucy", "Maria", "Mark", "Max", "Nick", "Paul",
    "Peter", "Rose", "Ruth", "Sam", "Sara", "Tom", "Tony", "Victor"]
ROLES = ["boss", "coach", "doctor", "friend", "neighbor", "sister", "teacher", "uncle"]
HOPS = 2, 3, 4
LAYERS = "12+8"
OBJECTIVES = {"sft": "SFT", "dft": "DFT", "discord": "DisCorD",
              "discord@0.7": "DisCorD, τ = 0.7", "kl": "KL", "rkl": "reverse KL"}
OF_REACHABLE = ["sft", "discord"]  # these also learn from a part of the traces
RATES = ["3e-5", "1e-4"]
TEACHER_STEPS, STUDENT_STEPS = 90, 150  # of eight lessons
STEPS = 120  # of four traces: in 60 of eight, even good lessons taught the student little
PROBLEMS, HELD_BACK, TEST = 900, 150, 300
MOST_TOKENS = 64  # of an answer; the longest right one has about 40
STEP = re.compile(r"(\w+)((?:'s \w+)+) is (\w+)\.")


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
    facts = dict(zip(zip(chain, roles, strict=False), chain[1:], strict=True))
    while others:
        known = rng.choice(chain[:-1]), rng.choice(ROLES)
        if known not in facts:
            facts[known] = others.pop()
    told = [fact(rng, *known, other, back) for known, other in facts.items()]
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

    # Of all seeds: the costs still to come; the seconds so far, and the costs that took them.
    left = spent = worked = 0.0
    rate = 1.0  # seconds of one unit of cost, before anything was measured

    def __init__(self, root: Path, seed: int, scale: float, rates: dict[tuple, str]):
        """`rates` has the learning rates that an earlier seed found best."""
        self.root, self.home, self.scale = root, root / f"seed{seed}", scale
        self.teacher, self.before, self.rates = root / "teacher", self.home / "before", rates
        super().__init__(*gsm8k.parse_args([
            "--teacher", str(self.teacher), "--out", str(self.home), "--seed", str(seed),
            "--objectives", *OBJECTIVES, "--rates", *RATES, "--exposure-length", "0",
            "--max-new-tokens", str(MOST_TOKENS), "--answers", "64", "--batch-size", "4",
            "--grad-accum", "1", "--steps", str(self.size(STEPS))]))

    def size(self, count: int) -> int:
        return max(round(count * self.scale), 2)

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

    def train_cost(self, name: str, model: object, traces: int) -> float:
        of_teacher = 30 if name in gsm8k.NEEDS_TEACHER else 0
        return (3 * self.layers(model) + of_teacher) * traces * 80

    def answer_cost(self, model: object, count: int) -> float:
        return 1.5 * self.layers(model) * count * 80

    def train(self, name: str, student: object, traces: Path, out: Path, *more: object) -> dict:
        begin, finished = time.perf_counter(), (out / "config.json").exists()
        made = super().train(name, student, traces, out, *more)
        traces = made["steps"] * made["options"]["batch_size"]
        self.count(self.train_cost(name, student, traces), finished, begin)
        return made

    def answer(self, model: object, problems: str, out: Path, *more: object) -> list[dict]:
        begin, finished = time.perf_counter(), out.exists()
        answers = super().answer(model, problems, out, *more)
        self.count(self.answer_cost(model, len(answers)), finished, begin)
        return answers

    def cost(self, first: bool) -> float:
        """Of all stages of this seed but the teacher. The first seed also finds the rates."""
        traces, problems = 4 * self.size(STEPS), self.size(PROBLEMS)
        held_back, tests = self.size(HELD_BACK), 5 * self.size(TEST)
        total = self.train_cost("sft", self.before, 8 * self.size(STUDENT_STEPS))
        total += self.answer_cost(self.teacher, problems + tests)
        total += (2 + len(OBJECTIVES) + len(OF_REACHABLE)) * self.answer_cost(self.before, tests)
        total += self.train_cost("sft", self.before, traces)  # the check
        for name in [*OBJECTIVES, *OF_REACHABLE]:
            one = self.train_cost(name, self.before, traces)
            if first:
                one = len(RATES) * (one + self.answer_cost(self.before, 2 * held_back))
            total += one
        return total

    def make_student(self, weights: str) -> None:
        lessons = self.home / "lessons.jsonl"
        write(lessons, self.size(STUDENT_STEPS) * 8, back=0.02)
        blank = gsm8k.cut(weights, LAYERS, self.home / "cut")
        self.train("sft", blank, lessons, self.before, "--steps", self.size(STUDENT_STEPS),
                   "--batch-size", 8, "--lr", "2e-4")

    def check_gain(self) -> Path:
        """If not even right answers that are written out help, no objective has much to gain."""
        lessons = self.home / "check.jsonl"
        write(lessons, self.size(STEPS) * 4, back=0.5)
        out = self.home / f"check-{RATES[-1]}"
        self.train("sft", self.before, lessons, out, "--lr", RATES[-1])
        before = self.measure(self.before, self.before, None)
        after = self.measure(out, out, None)
        print(f"check, student before: {before}\ncheck, after lessons without skips: {after}")
        return out

    def run_all(self, weights: str) -> dict[str, Path]:
        """The folder with the test answers of each row of the table."""
        self.make_all_traces()
        self.make_student(weights)
        folders = {"teacher": self.home / "teacher", "student before": self.before,
                   "lessons without skips": self.check_gain()}
        self.measure(self.teacher, folders["teacher"], None)
        for objective, name in OBJECTIVES.items():
            folders[name] = self.run_objective(objective, "traces")
        study.keep_reachable(self.before, self.home / "traces.jsonl", self.home / "reachable.jsonl")
        for objective in OF_REACHABLE:
            name = f"{OBJECTIVES[objective]}, traces in reach"
            folders[name] = self.run_objective(objective, "reachable")
        return folders

    def run_objective(self, objective: str, traces: str) -> Path:
        """The run at the best rate, with its test answers."""
        rate = self.rates.get((objective, traces))
        if rate:
            out = self.train_at(rate, objective, self.before, traces)
        else:
            rate, out = self.best_rate(objective, self.before, traces)
            self.rates[objective, traces] = rate
        self.measure(out, out, None)
        return out

    def make_all_traces(self) -> None:
        count = self.size(PROBLEMS)
        write(self.home / "known.jsonl", count + self.size(HELD_BACK), back=0.5)
        write(self.home / "new.jsonl", self.size(TEST), back=0.5)
        known = evaluate.load_problems(self.home / "known.jsonl")
        data.write_jsonl(self.home / "train.jsonl", known[:count])
        data.write_jsonl(self.home / "dev.jsonl", known[count:])
        data.write_jsonl(self.home / "test.jsonl",
                         evaluate.load_problems(self.home / "new.jsonl"))
        answers = self.answer(self.teacher, "train", self.home / "answers.jsonl",
                              "--temperature", 1)
        usable = self.make_traces(answers, self.home / "traces.jsonl")
        print(f"{usable} of {len(answers)} answers are traces", flush=True)


# ---- Reading the answers
def known_facts(prompt: str) -> dict[tuple[str, str], tuple[str, str]]:
    """(name, role) -> the other name, and how the fact was told."""
    facts = {}
    for name, role, other in re.findall(r"(\w+)'s (\w+) is (\w+)\.", prompt):
        facts[name, role] = other, "forwards"
    for other, role, name in re.findall(r"(\w+) is the (\w+) of (\w+)\.", prompt):
        facts[name, role] = other, "backwards"
    return facts


def roles_of(step: tuple) -> list[str]:
    """The roles of a match of STEP: one for a look-up, two or more for a skip."""
    return re.findall(r"'s (\w+)", step[1])


def follow(facts: dict, name: str, roles: list[str]) -> str | None:
    for role in roles:
        name, _ = facts.get((name, role), (None, None))
    return name


def read_steps(record: dict) -> Counter:
    """How many steps of each kind an answer has, and how many of them are right."""
    prompt = record["messages"][-1]["content"]
    facts, found, hops = known_facts(prompt), Counter(answers=1), 0
    for step in STEP.findall(record["response"]):
        (name, _, other), path = step, roles_of(step)
        if len(path) > 1:
            kind = "skip"
        else:
            _, kind = facts.get((name, path[0]), (None, "invented"))
        right = follow(facts, name, path)
        found[kind] += 1
        found[f"{kind}, right"] += other == right
        hops += len(path)
    asked = prompt.rpartition("Who is")[2].count(" of ")
    found["with a skip"] += found["skip"] > 0
    found["too early"] += record["finished"] and hops < asked
    found["too late"] += not record["finished"] or hops > asked
    return found


def steps_row(name: str, records: list[dict]) -> list[str]:
    total = sum((read_steps(record) for record in records), Counter())

    def share(part: str, whole: str) -> str:
        return f"{total[part] / total[whole]:.2f}" if total[whole] else ""

    return [name, *(share(f"{kind}, right", kind) for kind in ("forwards", "backwards")),
            share("with a skip", "answers"), share("skip, right", "skip"),
            share("invented", "answers"), share("too early", "answers"),
            share("too late", "answers")]


def kinds_of_tokens(record: dict, tokenizer: data.Tokenizer) -> list[str]:
    """What each token of a trace is: the name that ends a step, the answer, its mark, an end."""
    text, facts = record["response"], known_facts(record["messages"][-1]["content"])
    kinds, after = {}, ""
    for step in STEP.finditer(text):
        name, path = step[1], roles_of(step.groups())
        after = "a step told " + facts.get((name, path[0]), (None, "nowhere"))[1]
        if len(path) > 1:
            after = "a skip"
            kinds[text.index("'s", step.start(2) + 1)] = "'s, which begins a skip"
        kinds[step.start(3)] = f"name after {after}"
    last = "after a skip" if after == "a skip" else "after a step"
    if "#### " in text:
        kinds[text.index("####")] = f"#### {last}"
        kinds[text.index("#### ") + 5] = f"answer {last}"
    found, place = [], 0
    for piece in tokenizer.pieces(data.response_ids(record, tokenizer)):
        places = range(place, place + len(piece))
        found.append(next((kinds[i] for i in places if i in kinds), "rest"))
        place += len(piece)
    return [*found[:-1], f"end of turn {last}"]


def weight_rows(student: Path, traces: Path) -> list[list[str]]:
    """The mean weights of each kind of token before the first step."""
    args = argparse.Namespace(traces=traces, dtype="float32", device="cpu")
    tokenizer, records, examples, logps = data.load_scored(str(student), args, True)
    groups = defaultdict(list)
    for record, example, logp in zip(records, examples, logps, strict=True):
        kinds = kinds_of_tokens(record, tokenizer)
        for one in zip(kinds, logp, example.teacher_logp, strict=True):
            groups[one[0]].append(one[1:])
    rows = []
    for kind in sorted(groups):
        q, p = torch.tensor(np.array(groups[kind])).T
        rows.append([kind, str(len(q)), f"{q.exp().mean():.2f}", f"{p.exp().mean():.2f}",
                     *(f"{loss.discord_weight(q, p, tau).mean():.2f}" for tau in (1.0, 0.7))])
    return rows


# ---- The tables
def per_problem(folder: Path, decoding: str) -> np.ndarray:
    found = evaluate.summarize(evaluate.read_answers(folder / f"test-{decoding}.jsonl"))
    return np.array(list(found["per_problem"].values()))


def result_row(seed: str, name: str, place: Path, base: Path) -> dict[str, object]:
    """A row of table.csv, with half of each 95 % interval over the problems. `base` has SFT's
    answers."""
    rate = re.search(r"-(\de-\d)$", place.name)
    row: dict = {"seed": seed, "run": name, "rate": rate[1] if rate else ""}
    for column, decoding in (("greedy", "greedy"), ("sampled", "T1")):
        values = per_problem(place, decoding)
        for title, each in ((column, values),
                            (f"{column} - SFT", values - per_problem(base, decoding))):
            row[title] = each.mean()
            row[f"± {title}"] = 1.96 * each.std(ddof=1) / len(each) ** 0.5
    row["minutes"] = ""
    if (place / "run.json").exists():
        row["minutes"] = read_json(place / "run.json")["seconds"] / 60
    return row


def mean_cells(rows: list[dict]) -> list[str]:
    """A row of table.md, from one row of each seed. The intervals are over the problems of all
    seeds; how much the seeds themselves differ is in table.csv."""
    cells = [rows[0]["run"], rows[0]["rate"]]
    for title in ("greedy", "sampled", "greedy - SFT", "sampled - SFT"):
        mean = np.mean([row[title] for row in rows])
        half = np.sqrt(sum(row[f"± {title}"] ** 2 for row in rows)) / len(rows)
        sign = "+" if title.endswith("SFT") else ""
        cells.append(f"{mean:{sign}.3f} ± {half:.3f}")
    minutes = [row["minutes"] for row in rows if row["minutes"]]
    return [*cells, f"{np.mean(minutes):.1f}" if minutes else ""]


def write_results(root: Path, folders: list[dict[str, Path]]) -> None:
    """table.csv and table.md; each of `folders` is of one seed."""
    rows = {name: [result_row(one[name].parent.name, name, one[name], one["SFT"])
                   for one in folders] for name in folders[0]}
    with open(root / "table.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows["SFT"][0])
        writer.writeheader()
        for of_seeds in rows.values():
            writer.writerows(of_seeds)
    head = ["", "rate", "greedy", "sampled", "greedy - SFT", "sampled - SFT", "minutes"]
    gsm8k.write_table(root / "table.md", head, [mean_cells(each) for each in rows.values()])


def write_steps(root: Path, folders: list[dict[str, Path]]) -> None:
    head = ["sampled answers", "right: told forwards", "told backwards", "with a skip",
            "right: skips", "look-ups of no fact, per answer", "stops early", "stops late"]
    rows = []
    for name in folders[0]:
        records = [record for one in folders
                   for record in evaluate.read_answers(one[name] / "test-T1.jsonl")]
        rows.append(steps_row(name, records))
    gsm8k.write_table(root / "steps.md", head, rows)


def write_answers(root: Path, folders: dict[str, Path]) -> None:
    """The answers of each model to ten problems of the first seed: greedy, then one sample."""
    lines = defaultdict(list)  # of each problem
    for name, place in folders.items():
        for decoding in ("greedy", "T1"):
            for record in evaluate.read_answers(place / f"test-{decoding}.jsonl"):
                if record["sample"] or record["id"] >= 10:
                    continue
                question = f"\n**{record['messages'][-1]['content']}** *{record['answer']}*\n"
                verdict = "right" if record["correct"] else "wrong"
                lines[question].append(f"- {name}, {decoding}, {verdict}: {record['response']}")
    lines = [line for question, answers in lines.items() for line in (question, *answers)]
    (root / "answers.md").write_text("\n".join(lines), encoding="utf-8")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--weights", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or Hub name")
    add("--seeds", type=data.bounded(int, 0), nargs="+", default=[0])
    add("--scale", type=data.bounded(float, 1e-3), default=1.0, help="times all steps and problems")
    add("--out", default="runs/words")
    args = parser.parse_args(argv)
    rates: dict = {}
    studies = [Words(Path(args.out), seed, args.scale, rates) for seed in args.seeds]
    first = studies[0]
    lessons = first.root / "teacher-lessons.jsonl"
    write(lessons, first.size(TEACHER_STEPS) * 8, back=0.5, skip=0.25)
    probe = first.root / "probe"  # three steps, to know how fast this machine is
    gsm8k.Study.train(first, "sft", args.weights, lessons, probe, "--batch-size", 8, "--steps", 3,
                      "--log-every", 1, "--seed", 0)
    speeds = [line["tok/s"] for _, line in data.read_jsonl(probe / "log.jsonl")]
    Words.rate = 1 / (3 * 30 * max(speeds))
    teacher_steps = first.size(TEACHER_STEPS)
    Words.left = first.train_cost("sft", first.teacher, 8 * teacher_steps)
    Words.left += sum(one.cost(one is first) for one in studies)
    print(f"this will take about {Words.left * Words.rate / 3600:.1f} hours, less what is done")
    first.train("sft", args.weights, lessons, first.teacher, "--steps", teacher_steps,
                "--batch-size", 8, "--lr", "2e-4", "--seed", 0)
    folders = [one.run_all(args.weights) for one in studies]
    write_results(first.root, folders)
    write_steps(first.root, folders)
    write_answers(first.root, folders[0])
    rows = weight_rows(first.before, first.home / "traces.jsonl")
    gsm8k.write_table(first.root / "weights.md",
                      ["token", "number", "q", "p", "w", "w, τ = 0.7"], rows)


if __name__ == "__main__":
    data.run_command(lambda: main(sys.argv[1:]), "the same command continues")
