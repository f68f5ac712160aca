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
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import evaluate
import loss
import train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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


def fit(student: Path, traces: Path, out: Path, options: str) -> dict:
    paths = f"--student {student} --traces {traces} --out {out}"
    return train.train(train.parse_args([*paths.split(), *COMMON.split(), *options.split()]))


def answer(model: Path, problems: Path, out: Path, options: str) -> list[dict]:
    paths = f"--model {model} --benchmark {problems} --out {out}"
    evaluate.main(["accuracy", *paths.split(), *ANSWER.split(), *options.split()])
    return evaluate.read_answers(out)


def shares_of_ways(records: list[dict]) -> np.ndarray:
    counts = Counter("".join(record["response"] for record in records))
    shares = np.array([counts[way] + 1 for way in WAYS])  # none is 0, so the KL is finite
    return shares / shares.sum()


def measure(world: World, model: Path, problems: str = "held-out", samples: int = 1,
            ) -> dict:
    """Greedy accuracy, and that of samples at T = 1, on problems that nobody has seen; the KL
    of the teacher's shares of the four ways to those in the samples."""
    found = {}
    file = world.teacher.parent / f"{problems}.jsonl"
    for name, options in (("greedy", "--temperature 0"),
                          ("sampled", f"--temperature 1 --samples {samples}")):
        out = model / f"{problems}-{name}-{samples}.jsonl"
        records = answer(model, file, out, options)
        summary = evaluate.summarize(records)
        found[name] = float(summary["accuracy"])
    shares = shares_of_ways(records)
    found["shares"] = shares.tolist()
    found["kl"] = float((TEACHER_SHARES * np.log(TEACHER_SHARES / shares)).sum())
    found["pass"] = float(summary["pass"])
    found["tokens"] = float(summary["mean_tokens"])
    found["marker"] = np.mean(["####" in record["response"] for record in records])
    return found


# ---- Runs


@dataclass(frozen=True)
class Run:
    """A student's training in stages: options of train.py and a key of WEIGHTS. Without a
    stage, the student before."""

    world: World
    seed: int
    label: str
    stages: tuple[tuple[str, str], ...] = ()
    problems: str = "held-out"
    samples: int = 1

    def do(self) -> dict:
        home = self.world.home(self.seed)
        model, lines = home / "student", []
        for i, (options, weight) in enumerate(self.stages):
            loss.discord_weight = WEIGHTS[weight]
            if options.split()[0] in ("kl", "rkl"):
                options += f" --teacher {self.world.teacher}"
            folder = home / self.label.replace(" ", "-") / f"{i}"
            fit(model, home / "traces.jsonl", folder, f"--seed {self.seed} --objective {options}")
            model = folder
            lines += [line for _, line in data.read_jsonl(folder / "log.jsonl")]
        row = measure(self.world, model, self.problems, self.samples)
        if lines:
            losses = [line["unweighted"] for line in lines]
            row |= {"start": losses[0], "worst": max(losses), "end": losses[-1]}
            row |= {"weight": lines[0]["weight"], "ess": lines[0]["ess"]}
        return row


def work(job: tuple) -> object:
    """In a process of its own: one thread, and nothing printed but errors."""
    torch.set_num_threads(1)
    function, *arguments = job
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*arguments)


Columns = dict[str, list]  # {metric: [its value for each seed]}


def do_all(runs: list[Run]) -> dict[tuple[World, str], Columns]:
    """Results by world and label, after what the runs need has been made."""
    teachers = {}
    students = {}
    for run in runs:
        teachers[run.world.teacher] = (World.prepare_teacher, run.world)
        students[run.world, run.seed] = (World.prepare_student, run.world, run.seed)
    jobs = [(Run.do, run) for run in runs]
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(cores, maxtasksperchild=1) as pool:
        for name, stage in (("teachers", [*teachers.values()]),
                            ("students", [*students.values()]), ("runs", jobs)):
            rows = list(tqdm(pool.imap(work, stage), name, len(stage)))
    found: dict[tuple[World, str], Columns] = {}
    for run, row in zip(runs, rows, strict=True):
        column = found.setdefault((run.world, run.label), {key: [] for key in row})
        for key, value in row.items():
            column[key].append(value)
    return found


# ---- Tables


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean over seeds (Student's t)."""
    n = len(values)
    return STUDENT_T[n] * np.std(values, ddof=1) / np.sqrt(n)


def mean(values: list[float], digits: int = 3) -> str:
    return f"{np.mean(values):.{digits}f} ± {half_interval(values):.{digits}f}"


def print_table(head: list[str], rows: list[list]) -> None:
    rule = ["---"] * len(head)
    for row in (head, rule, *rows):
        cells = " | ".join(map(str, row))
        print(f"| {cells} |")


def show(runs: list[Run], *keys: str) -> None:
    """A table for each world, a line for each label."""
    lines: dict[World, list] = {}
    for (world, label), column in do_all(runs).items():
        cells = [mean(column[key]) if key in column else "" for key in keys]
        lines.setdefault(world, []).append([label, *cells])
    for world, rows in lines.items():
        print(f"\n{world.folder().name}\n")
        print_table(["", *keys], rows)


# ---- main, rates, times: which objective?

MAIN_WORLD = World(ways=True, lessons=600)
RATES = 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2
METHODS = {  # name: (options, weight, what training needs of the teacher)
    "SFT": ("sft", "discord", "nothing"),
    "KL": ("kl", "discord", "all of it"),
    "reverse KL": ("rkl", "discord", "all of it"),
    "DFT": ("discord", "dft", "nothing"),
    "DisCorD": ("discord", "discord", "a number a token"),
    "DisCorD, τ = 1": ("discord --tau 1", "discord", "a number a token"),
}


def method_run(name: str, lr: float, seed: int, problems: str, samples: int = 1) -> Run:
    options, weight, _ = METHODS[name]
    stages = ((f"{options} --lr {lr:g} --steps 800", weight),)
    return Run(MAIN_WORLD, seed, f"{name} {lr:g}", stages, problems, samples)


def rate_rows() -> dict[str, dict[float, Columns]]:
    """Every method at every rate, on the validation problems, two seeds."""
    runs = []
    for name in METHODS:
        for lr in RATES:
            runs += [method_run(name, lr, seed, "validation") for seed in range(2)]
    found = do_all(runs)
    return {name: {lr: found[MAIN_WORLD, f"{name} {lr:g}"] for lr in RATES} for name in METHODS}


def best_rates() -> dict[str, float]:
    """By the mean of greedy and sampled accuracy."""
    best = {}
    for name, found in rate_rows().items():
        scores = {}
        for lr, column in found.items():
            scores[lr] = np.mean(column["greedy"] + column["sampled"])
        best[name] = max(scores, key=scores.get)
    return best


def main_rows() -> dict[str, Columns]:
    """Each method at its best rate: five seeds, held-out problems, eight samples."""
    runs = [Run(MAIN_WORLD, seed, "student before", samples=8) for seed in range(5)]
    for name, lr in best_rates().items():
        runs += [method_run(name, lr, seed, "held-out", 8) for seed in range(5)]
    found = do_all(runs)
    return dict(zip(["student before", *METHODS], found.values(), strict=True))


def main_table() -> None:
    rates = best_rates()
    lines = []
    for name, column in main_rows().items():
        cells = [mean(column[key]) for key in ("greedy", "sampled", "pass", "kl", "tokens")]
        shares = [f"{share:.2f}" for share in np.mean(column["shares"], axis=0)]
        lines.append([name, rates.get(name, ""), *cells, " ".join(shares)])
    print_table(["", "rate", "greedy", "sampled", "pass@8", "KL of shares", "tokens", "shares"],
                lines)


def rates_table() -> None:
    rows = rate_rows()
    for key in ("greedy", "sampled", "kl"):
        print(f"\n{key}, mean of two seeds\n")
        lines = []
        for name, found in rows.items():
            cells = [f"{np.mean(column[key]):.3f}" for column in found.values()]
            lines.append([name, *cells])
        print_table(["", *RATES], lines)


def times_table(rounds: int = 5) -> None:
    """Every method in turn, on one thread; the ratio to SFT's time in the same round."""
    torch.set_num_threads(1)
    home = MAIN_WORLD.home(0)
    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    for _ in range(rounds):
        seconds = {}
        for name, (options, weight, needs) in METHODS.items():
            loss.discord_weight = WEIGHTS[weight]
            if needs == "all of it":
                options += f" --teacher {MAIN_WORLD.teacher}"
            with TemporaryDirectory() as out, contextlib.redirect_stdout(sys.stderr):
                run = fit(home / "student", home / "traces.jsonl", Path(out),
                          f"--objective {options} --steps 200")
            seconds[name] = run["seconds"]
            ratios[name].append(seconds[name] / seconds["SFT"])
    lines = []
    for name, column in ratios.items():
        median, least, most = np.median(column), min(column), max(column)
        lines.append([name, f"{median:.2f} ({least:.2f} to {most:.2f})"])
    print_table(["", "time / SFT's"], lines)


# ---- shares: a softmax table, where each weight leads

TABLE_TEACHER = 0.5, 0.3, 0.2
STARTS = (0.4, 0.35, 0.25), (0.2, 0.3, 0.5), (0.9, 0.09, 0.01), (0.01, 0.09, 0.9)
TABLE_WEIGHTS = {  # name: (weight, tau)
    "DisCorD, τ = 0.5": ("discord", 0.5),
    "DisCorD, τ = 0.7": ("discord", 0.7),
    "DisCorD, τ = 1": ("discord", 1.0),
    "min(1, q/p)": ("clipped", 1.0),
    "DFT": ("dft", 1.0),
}


def softmax_table(name: str, rounds: int = 20000) -> list[list[float]]:
    """Where gradient descent on the expected loss leads a student from each of STARTS."""
    weight, tau = TABLE_WEIGHTS[name]
    p = torch.tensor([TABLE_TEACHER] * len(STARTS), dtype=torch.double)
    logits = torch.tensor(STARTS, dtype=torch.double).log()
    for _ in range(rounds):
        q = logits.softmax(-1)
        w = WEIGHTS[weight](q.log(), p.log(), tau)
        push = p * w
        logits += 0.5 * (push - push.sum(-1, keepdim=True) * q)
    return logits.softmax(-1).tolist()


def shares_table() -> None:
    lines = []
    for name in TABLE_WEIGHTS:
        ends = softmax_table(name)
        cells = [" ".join(f"{share:.3f}" for share in end) for end in ends]
        lines.append([name, *cells])
    print_table(["from", *map(str, STARTS)], lines)


# ---- tau, capacity, dead, far

SFT = (("sft --lr 3e-2 --steps 800", "discord"),)
CORRECTED = (("discord --lr 1e-3 --steps 800", "discord"),)
TAUS = 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 4.0
SKIPS = 0.2, 0.6, 0.9
LESSONS = 1, 25, 50, 100, 150, 300
Stages = dict[str, tuple[tuple[str, str], ...]]


def runs_in(worlds: list[World], stages: Stages, seeds: int) -> list[Run]:
    runs = []
    for world in worlds:
        for label, some in {"student before": (), **stages}.items():
            runs += [Run(world, seed, label, some) for seed in range(seeds)]
    return runs


def sft_first(steps: int, lr: float) -> tuple[tuple[str, str], ...]:
    return ((f"sft --lr {lr:g} --steps {steps}", "discord"),
            (f"discord --lr 1e-3 --steps {800 - steps}", "discord"))


def tau_runs() -> list[Run]:
    stages = {}
    for tau in TAUS:
        stages[f"tau {tau:g}"] = ((f"discord --lr 1e-3 --steps 800 --tau {tau}", "discord"),)
    return runs_in([MAIN_WORLD], stages, 5)


def capacity_runs() -> list[Run]:
    worlds = [World(times=0.0)]
    for layers in (1, 2):
        worlds += [World(skip=skip, layers=layers) for skip in SKIPS]
    return runs_in(worlds, {"SFT": SFT, "DisCorD": CORRECTED}, 5)


def dead_runs() -> list[Run]:
    """The student has never ended an answer with ####, as the teacher always does."""
    stages: Stages = {"SFT": SFT, "DisCorD": CORRECTED}
    for floor in ("floor 0.05", "floor 0.3"):
        stages[f"DisCorD, {floor}"] = (("discord --lr 1e-3 --steps 800", floor),)
    for steps in (25, 50):
        stages[f"SFT {steps}, then DisCorD"] = sft_first(steps, 1e-3)
    rarely = runs_in([World(marked=0.05)], {"DisCorD": CORRECTED}, 3)
    return runs_in([World(marked=0.0)], stages, 3) + rarely


def far_runs() -> list[Run]:
    stages: Stages = {"SFT": SFT}
    for lr in (1e-4, 1e-3, 1e-2):
        stages[f"DisCorD {lr:g}"] = ((f"discord --lr {lr:g} --steps 800", "discord"),)
    stages["DisCorD, tau 2"] = (("discord --lr 1e-3 --steps 800 --tau 2", "discord"),)
    for steps in (25, 100, 400):
        stages[f"SFT {steps}, then DisCorD"] = sft_first(steps, 3e-2)
    worlds = [World(lessons=n) for n in LESSONS]
    return runs_in([*worlds, World(cut=True)], stages, 3)


# ---- Figures: white, so that they are readable in dark mode, too; large letters for a projector

FIGURES = Path(__file__).parent / "figures"
COLORS = {"SFT": "#e66101", "KL": "#fdb863", "reverse KL": "0.6", "DFT": "0.1",
          "DisCorD": "#5e3c99", "DisCorD, τ = 1": "#b2abd2"}
WAY_COLORS = "#5e3c99", "#b2abd2", "#fdb863", "#e66101"


def curve(axis: "Axes", x: tuple, points: list[list[float]], **style: object) -> None:
    """Means over seeds, and their intervals."""
    middle = np.mean(points, axis=1)
    half = np.array([half_interval(values) for values in points])
    line, = axis.plot(x, middle, marker="o", **style)
    if len(points[0]) > 2:
        axis.fill_between(x, middle - half, middle + half, alpha=0.15, color=line.get_color())


def rates_panel(axis: "Axes") -> None:
    axis.set(title="Which learning rate? (two seeds)", xscale="log", xlabel="learning rate",
             ylabel="sampled accuracy")
    for name, found in rate_rows().items():
        points = [column["sampled"] for column in found.values()]
        curve(axis, RATES, points, color=COLORS[name], label=name)


def tau_panel(axis: "Axes") -> None:
    axis.set(title="Which τ?", xscale="log", xlabel="τ (dotted: 1/2)", xticks=TAUS)
    axis.set_xticklabels([f"{tau:g}" for tau in TAUS])
    axis.minorticks_off()
    axis.axvline(0.5, color="0.6", linestyle=":")
    found = do_all(tau_runs())
    for key, label, style in (("greedy", "greedy accuracy", "-"), ("kl", "KL of shares", ":"),
                              ("sampled", "sampled accuracy", "--")):
        points = [found[MAIN_WORLD, f"tau {tau:g}"][key] for tau in TAUS]
        curve(axis, TAUS, points, color=COLORS["DisCorD"], linestyle=style, label=label)


def shares_panel(axis: "Axes") -> None:
    axis.set(title="A softmax table: where each weight leads", xlim=(-0.03, 1.03),
             xlabel="share of the token that the teacher writes half of the time",
             yticks=range(len(TABLE_WEIGHTS)))
    axis.set_yticklabels(TABLE_WEIGHTS)
    axis.axvline(0.5, color="0.6", linestyle=":")
    for y, name in enumerate(TABLE_WEIGHTS):
        for i, (end, marker) in enumerate(zip(softmax_table(name), "osD^", strict=True)):
            label = f"from {STARTS[i]}" if y == 0 else None
            axis.plot(end[0], y + 0.12 * (i - 1.5), marker, color=WAY_COLORS[i], label=label)


def capacity_panel(axis: "Axes") -> None:
    axis.set(title="When does it help?", xlabel="how readily the teacher skips a value",
             ylabel="sampled accuracy", xticks=SKIPS)
    found = do_all(capacity_runs())
    for layers, style in ((1, "-"), (2, "--")):
        for name in ("SFT", "DisCorD"):
            points = [found[World(skip=skip, layers=layers), name]["sampled"] for skip in SKIPS]
            curve(axis, SKIPS, points, color=COLORS[name], linestyle=style,
                  label=f"{name}, {layers} layer" + "s" * (layers > 1))


def far_panel(axis: "Axes") -> None:
    axis.set(title="A student far away", xlabel="lessons before it meets the teacher",
             ylabel="greedy accuracy")
    found = do_all(far_runs())
    for label, color in (("SFT", COLORS["SFT"]), ("DisCorD 0.001", COLORS["DisCorD"]),
                         ("SFT 100, then DisCorD", "0.1")):
        points = [found[World(lessons=n), label]["greedy"] for n in LESSONS]
        curve(axis, LESSONS, points, color=color, label=label)


def weight_panel(axis: "Axes") -> None:
    axis.set(title="What the first log line says", xscale="log",
             xlabel="mean weight in the first ten steps", ylabel="loss: worst minus first, nats")
    for (_, label), column in do_all(far_runs()).items():
        if label in ("DisCorD 0.0001", "DisCorD 0.001", "DisCorD 0.01"):
            rise = np.subtract(column["worst"], column["start"])
            axis.plot(column["weight"], rise, "o", label=label)


def draw_result(plot: ModuleType) -> None:
    rows = main_rows()
    figure, (left, right) = plot.subplots(1, 2, figsize=(15, 6), layout="constrained", sharey=True)
    ticks = range(len(rows))[::-1]
    for y, (name, column) in zip(ticks, rows.items(), strict=True):
        color = COLORS.get(name, "0.45")
        for key, offset, fill in (("greedy", 0.14, color), ("sampled", -0.14, "white")):
            left.errorbar(np.mean(column[key]), y + offset, xerr=half_interval(column[key]),
                          marker="o", markersize=10, capsize=4, color=color, markerfacecolor=fill)
        start = 0.0
        for share, color in zip(np.mean(column["shares"], axis=0), WAY_COLORS, strict=True):
            right.barh(y, share, left=start, height=0.6, color=color)
            start += share
    for line in np.cumsum(TEACHER_SHARES)[:-1]:
        right.axvline(line, color="black", linestyle=":")
    left.set(yticks=ticks, xlim=(0, 1.02), title="Accuracy (full: greedy; hollow: sampled)")
    left.set_yticklabels(rows)
    left.grid(axis="x", color="0.85")
    right.set(title="Shares of four right ways to write (dotted: teacher)")
    figure.savefig(FIGURES / "result.png")


def draw_study(plot: ModuleType) -> None:
    figure, axes = plot.subplots(2, 3, figsize=(19, 12), layout="constrained")
    panels = (rates_panel, tau_panel, shares_panel, capacity_panel, far_panel, weight_panel)
    for axis, panel in zip(axes.flat, panels, strict=True):
        panel(axis)
        axis.legend(fontsize=12, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False,
                    ncols=2)
    figure.savefig(FIGURES / "study.png")


def figures() -> None:
    """tests/figures/result.png from main, tests/figures/study.png from the other parts."""
    import matplotlib.pyplot as plot

    plot.switch_backend("agg")
    plot.rcParams.update({"font.size": 15, "savefig.facecolor": "white", "savefig.dpi": 80,
                          "axes.spines.top": False, "axes.spines.right": False})
    draw_result(plot)
    draw_study(plot)


PARTS = {
    "main": main_table,
    "rates": rates_table,
    "times": times_table,
    "shares": shares_table,
    "tau": lambda: show(tau_runs(), "greedy", "sampled", "kl"),
    "capacity": lambda: show(capacity_runs(), "greedy", "sampled"),
    "dead": lambda: show(dead_runs(), "greedy", "sampled", "marker"),
    "far": lambda: show(far_runs(), "greedy", "sampled", "weight", "ess", "start", "worst", "end"),
    "figures": figures,
}


def commit() -> str:
    """Which code this is, for reports."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    git = shutil.which("git") and subprocess.run(command, capture_output=True, text=True)
    return (git and git.stdout.strip()) or "unknown"


if __name__ == "__main__":
    print(f"commit {commit()}, torch {torch.__version__}")
    for part in sys.argv[1:] or PARTS:
        print(f"\n## {part}\n", flush=True)
        PARTS[part]()
