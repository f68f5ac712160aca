"""What helps, when does it hurt, what does the teacher's number add? python tests/study.py [PART]

The README's tables and figures, from nothing: worlds, teachers, students and traces are made with
the commands of real models (train.py, evaluate.py accuracy), in runs/study, as many runs at a time
as there are cores, each on one. What is finished is not done again. Parts: main (half an hour on
two cores), rates, times, shares, tau, capacity, dead, far, figures.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import evaluate
import loss
import train

ROOT = Path("runs/study")
COMMON = "--batch-size 64 --grad-accum 1 --max-length 64 --log-every 10 --device cpu --resume"
ANSWER = "--batch-size 500 --max-new-tokens 18 --device cpu --resume"
STUDENT_T = {2: 12.71, 3: 4.303, 5: 2.776}  # 97.5 %, by the number of seeds
WAYS = "=:~>"  # four right ways to write a value: b=6 b:6 b~6 b>6
TEACHER_SHARES = 0.4, 0.3, 0.2, 0.1
STUDENT_SHARES = 0.7, 0.1, 0.1, 0.1

# ---- Weights in place of loss.discord_weight. They get log q(y), log p(y) and tau.


def dft(q_logp: Tensor, p_logp: Tensor, tau: float) -> Tensor:
    """The student's own probability (arXiv 2508.05629)."""
    return q_logp.detach().exp()


def clipped_ratio(q_logp: Tensor, p_logp: Tensor, tau: float) -> Tensor:
    """min(1, q / p)."""
    return (q_logp.detach() - p_logp).clamp(max=0).exp()


DISCORD = loss.discord_weight
WEIGHTS: dict[str, Callable] = {
    "discord": DISCORD,
    "dft": dft,
    "clipped": clipped_ratio,
    "floor 0.05": lambda q, p, tau: DISCORD(q, p, tau).clamp(min=0.05),
    "floor 0.3": lambda q, p, tau: DISCORD(q, p, tau).clamp(min=0.3),
}

# ---- Worlds


@dataclass(frozen=True)
class World:
    """What may differ from the toy of train.py, which is World()."""

    ways: bool = False  # each value is written in one of four ways
    skip: float = 0.6  # how readily the teacher skips a value
    times: float = 0.1  # share of multiplications in the student's own lessons; 1/3 in problems
    lessons: int = 300  # training steps of the student before it meets the teacher
    marked: float = 1.0  # share of the student's lessons that end in "#### answer"
    layers: int = 1  # of the student, of width 48; the teacher has two of width 96
    cut: bool = False  # the student is the teacher without its second layer

    def folder(self, *only: str) -> Path:
        """A name of what differs (in these fields)."""
        parts = []
        for field in fields(self):
            value = getattr(self, field.name)
            if (field.name in only or not only) and value != field.default:
                parts.append(f"{field.name}={value}")
        return ROOT / (",".join(parts) or "toy")

    @property
    def teacher(self) -> Path:
        return self.folder("ways", "skip") / "teacher"

    def home(self, seed: int) -> Path:
        return self.folder() / f"seed{seed}"

    def write_problems(self, file: Path, count: int, times: float = 1 / 3, skip: float = 0.0,
                       marked: float = 1.0, shares: tuple = TEACHER_SHARES) -> None:
        """Write problems with their traces by the rule."""
        if file.exists():
            return
        rng = random.Random(str(file.relative_to(ROOT)))
        records = []
        for i in range(count):
            record = data.toy_trace(rng, times, skip)
            *words, _, answer = record["response"].split()
            if self.ways:
                chosen = rng.choices(WAYS, shares, k=len(words))
                words = [word.replace("=", way) for word, way in zip(words, chosen, strict=True)]
            if rng.random() < marked:
                words += ["####", answer]
            records.append({"id": i, **record, "response": " ".join(words)})
        data.write_jsonl(file, records)

    def save_tokenizer(self, folder: Path, save: Callable = data.save_toy_tokenizer) -> int:
        """The toy's, with a token for each way to write a value."""
        size = save(folder)
        file = folder / "tokenizer.json"
        raw = json.loads(file.read_text())
        for way in WAYS[1:] if self.ways else "":
            for letter in data.LETTERS:
                for digit in range(10):
                    raw["model"]["vocab"][f"{letter}{way}{digit}"] = size
                    size += 1
        file.write_text(json.dumps(raw))
        return size

    def save_model(self, folder: Path, layers: int, width: int, seed: int) -> None:
        if not (folder / "config.json").exists():
            data.save_toy_tokenizer = self.save_tokenizer
            data.save_toy_model(folder, layers, width, seed)

    def prepare_teacher(self) -> None:
        home = self.teacher.parent
        self.save_model(home / "blank-teacher", 2, 96, 0)
        self.write_problems(home / "lessons.jsonl", 30000, skip=self.skip)
        self.write_problems(home / "held-out.jsonl", 1000)
        self.write_problems(home / "validation.jsonl", 500)
        steps = 4500 if self.ways else 2000
        fit(home / "blank-teacher", home / "lessons.jsonl", self.teacher,
            f"--objective sft --steps {steps} --lr 5e-3")
        measure(self, self.teacher)

    def prepare_student(self, seed: int) -> None:
        home = self.home(seed)
        self.write_problems(home / "problems.jsonl", 4000)
        self.write_problems(home / "lessons.jsonl", 8000, self.times, marked=self.marked,
                            shares=STUDENT_SHARES)
        if self.cut:
            model, _ = data.load(self.teacher)
            del model.model.layers[1:]
            model.config.raw["num_hidden_layers"] = 1
            model.save_pretrained(home / "student")
        else:
            self.save_model(home / "blank-student", self.layers, 48, seed + 1)
            fit(home / "blank-student", home / "lessons.jsonl", home / "student",
                f"--objective sft --steps {self.lessons} --lr 5e-3")
        answer(self.teacher, home / "problems.jsonl", home / "traces.jsonl",
               f"--temperature 1 --seed {seed}")
        measure(self, home / "student")


def fit(student: Path, traces: Path, out: Path, options: str) -> dict:
    paths = f"--student {student} --traces {traces} --out {out}"
    return train.train(train.parse_args([*paths.split(), *COMMON.split(), *options.split()]))


def answer(model: Path, problems: Path, out: Path, options: str) -> list[dict]:
    paths = f"--model {model} --benchmark {problems} --out {out}"
    evaluate.main(["accuracy", *paths.split(), *ANSWER.split(), *options.split()])
    return evaluate.read_answers(out)


def share_kl(records: list[dict]) -> float:
    """KL of the teacher's shares of the four ways to those in these answers."""
    counts = Counter("".join(record["response"] for record in records))
    total = sum(counts[way] + 1 for way in WAYS)  # one more of each: none is 0
    kl = 0.0
    for p, way in zip(TEACHER_SHARES, WAYS, strict=True):
        kl += p * np.log(p * total / (counts[way] + 1))
    return kl


def measure(world: World, model: Path, problems: str = "held-out", samples: int = 1,
            ) -> dict[str, float]:
    """Greedy accuracy, and that of samples at T = 1, on problems that nobody has seen."""
    found = {}
    file = world.teacher.parent / f"{problems}.jsonl"
    for name, options in (("greedy", "--temperature 0"),
                          ("sampled", f"--temperature 1 --samples {samples}")):
        out = model / f"{problems}-{name}-{samples}.jsonl"
        records = answer(model, file, out, options)
        summary = evaluate.summarize(records)
        found[name] = summary["accuracy"]
    found["pass"] = summary["pass"]
    found["tokens"] = summary["mean_tokens"]
    found["marker"] = np.mean(["####" in record["response"] for record in records])
    found["kl"] = share_kl(records)
    return {key: round(float(value), 4) for key, value in found.items()}


# ---- Runs


@dataclass(frozen=True)
class Run:
    """A student's training in stages: options of train.py and a key of WEIGHTS."""

    world: World
    seed: int
    label: str
    stages: tuple[tuple[str, str], ...]
    problems: str = "held-out"
    samples: int = 1

    def do(self) -> dict:
        home = self.world.home(self.seed)
        folder = home / self.label.replace(" ", "-")
        model, log = home / "student", []
        for i, (options, weight) in enumerate(self.stages):
            loss.discord_weight = WEIGHTS[weight]
            if loss.split_name(options.split()[0])[0] != "sft":
                options += f" --teacher {self.world.teacher}"
            fit(model, home / "traces.jsonl", folder / f"{i}",
                f"--seed {self.seed} --objective {options}")
            model = folder / f"{i}"
            log += [line for _, line in data.read_jsonl(model / "log.jsonl")]
        row = measure(self.world, model, self.problems, self.samples)
        row["start"] = log[0]["unweighted"]
        row["end"] = log[-1]["unweighted"]
        row["worst"] = max(line["unweighted"] for line in log)
        for key in ("weight", "ess"):
            row[f"first {key}"] = log[0][key]
            row[f"least {key}"] = min(line[key] for line in log)
        return row


def work(job: tuple) -> object:
    """In a process of its own: one thread, and nothing printed but errors."""
    torch.set_num_threads(1)
    function, *arguments = job
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*arguments)


def do_all(runs: Iterable[Run]) -> dict[Run, dict]:
    """Their rows, after what they need has been made."""
    runs = list(dict.fromkeys(runs))
    teachers = {run.world.teacher: (World.prepare_teacher, run.world) for run in runs}
    students = dict.fromkeys((World.prepare_student, run.world, run.seed) for run in runs)
    stages = {"teachers": teachers.values(), "students": students,
              "runs": [(Run.do, run) for run in runs]}
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(cores, maxtasksperchild=1) as pool:
        for name, jobs in stages.items():
            rows = list(tqdm(pool.imap(work, jobs, chunksize=1), name, len(jobs)))
    return dict(zip(runs, rows, strict=True))


# ---- Tables


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean over seeds (Student's t)."""
    return STUDENT_T[len(values)] * np.std(values, ddof=1) / np.sqrt(len(values))


def mean(values: list[float], digits: int = 3) -> str:
    return f"{np.mean(values):.{digits}f} ± {half_interval(values):.{digits}f}"


def print_table(head: list[str], rows: list[list]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(map(str, row)), "|")


Columns = dict[str, list[float]]  # {metric: [a number for each seed]}


def columns(rows: list[dict]) -> Columns:
    return {key: [row[key] for row in rows] for key in rows[0]}


def by_label(rows: dict[Run, dict]) -> dict[tuple[World, str], Columns]:
    groups: dict[tuple[World, str], list[dict]] = {}
    for run, row in rows.items():
        groups.setdefault((run.world, run.label), []).append(row)
    return {place: columns(group) for place, group in groups.items()}


def students_before(world: World, samples: int = 1, seeds: Iterable[int] = range(5)) -> Columns:
    with contextlib.redirect_stdout(sys.stderr):
        return columns([measure(world, world.home(seed) / "student", samples=samples)
                        for seed in seeds])


# ---- main and rates: which objective?

MAIN_WORLD = World(ways=True, lessons=600)
RATES = 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2
METHODS = {  # name: (options, weight, what training needs of the teacher)
    "SFT": ("sft", "discord", "none"),
    "KL": ("kl", "discord", "whole model"),
    "reverse KL": ("rkl", "discord", "whole model"),
    "DFT": ("discord", "dft", "none"),
    "DisCorD": ("discord", "discord", "a number a token"),
    "DisCorD, τ = 1": ("discord --tau 1", "discord", "a number a token"),
}


def method_run(name: str, lr: float, seed: int, problems: str, samples: int = 1) -> Run:
    options, weight, _ = METHODS[name]
    stage = f"{options} --lr {lr:g} --steps 800", weight
    return Run(MAIN_WORLD, seed, f"{name} {lr:g}", (stage,), problems, samples)


def rate_runs(name: str, lr: float) -> list[Run]:
    return [method_run(name, lr, seed, "validation") for seed in range(2)]


def rate_rows() -> dict[str, dict[float, Columns]]:
    """Every method at every rate, on the validation problems, two seeds."""
    rows = do_all(run for name in METHODS for lr in RATES for run in rate_runs(name, lr))
    return {name: {lr: columns([rows[run] for run in rate_runs(name, lr)]) for lr in RATES}
            for name in METHODS}


def best_rates() -> dict[str, float]:
    """By the mean of greedy and sampled accuracy."""
    best = {}
    for name, found in rate_rows().items():
        best[name] = max(RATES, key=lambda lr, found=found: np.mean(
            [found[lr]["greedy"], found[lr]["sampled"]]))
    return best


# ---- shares: a softmax table, where each weight leads

TABLE_TEACHER = 0.5, 0.3, 0.2
STARTS = (0.4, 0.35, 0.25), (0.2, 0.3, 0.5), (0.9, 0.09, 0.01), (0.01, 0.09, 0.9)


def softmax_table(weight: str, tau: float, start: Iterable[float], rounds: int = 20000,
                  ) -> list[float]:
    """The student of a table after gradient descent on the expected loss."""
    p = torch.tensor(TABLE_TEACHER, dtype=torch.double)
    logits = torch.tensor(list(start), dtype=torch.double).log()
    for _ in range(rounds):
        q = logits.softmax(-1)
        push = p * WEIGHTS[weight](q.log(), p.log(), tau)
        logits += 0.5 * (push - push.sum() * q)
    return logits.softmax(-1).tolist()


# ---- far: a student that finds nearly everything unlikely

FAR_WORLDS = [World(lessons=n) for n in (1, 25, 50, 100, 150, 300)] + [World(cut=True)]


def far_runs(seeds: Iterable[int] = range(3)) -> list[Run]:
    stages = {f"DisCorD {lr:g}": ((f"discord --lr {lr:g} --steps 800", "discord"),)
              for lr in (1e-4, 1e-3, 1e-2)}
    stages["DisCorD, tau 2"] = (("discord --tau 2 --lr 1e-3 --steps 800", "discord"),)
    stages["SFT 0.03"] = (("sft --lr 3e-2 --steps 800", "discord"),)
    for n in (25, 100, 400):
        stages[f"SFT {n}, then DisCorD"] = (
            (f"sft --lr 3e-2 --steps {n}", "discord"),
            (f"discord --lr 1e-3 --steps {800 - n}", "discord"))
    return [Run(world, seed, label, stage) for seed in seeds for world in FAR_WORLDS
            for label, stage in stages.items()]
