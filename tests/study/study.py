"""What helps, when does it hurt, what does the teacher add? python tests/study/study.py [PART]

The README's tables and figures, from nothing: worlds, teachers, students and traces are made with
the commands of real models (train.py, evaluate.py accuracy), in runs/study, as many runs at a time
as there are cores, each on one. What is finished is not done again. Parts: main (half an hour on
two cores), rates, times, shares, tau, prefixes, reach, capacity, dead, ends, ways, far, figures.
Another, `steps FOLDER...`, counts what students of the toy do, step by step.
"""

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import matplotlib.pyplot as plot
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import evaluate
import loss
import train
from model import check

ROOT = Path("runs/study")
COMMON = "--batch-size 64 --grad-accum 1 --max-length 64 --log-every 10 --device cpu --resume"
ANSWER = "--batch-size 500 --max-new-tokens 18 --device cpu --resume"
STUDENT_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}  # 97.5 %, by the number of seeds
LOAD, TOKEN_LOSSES = data.load, loss.token_losses
END = 3  # the id of <end>
WAYS = "=:~>"  # four right ways to write a value: b=6 b:6 b~6 b>6
TEACHER_SHARES = 0.4, 0.3, 0.2, 0.1
STUDENT_SHARES = 0.7, 0.1, 0.1, 0.1

# ---- Weights of the softmax table. They get log q(y), log p(y) and tau.
def clipped_ratio(q_logp: Tensor, p_logp: Tensor, tau: float) -> Tensor:
    """min(1, q / p)."""
    log_ratio = q_logp.detach() - p_logp
    return log_ratio.clamp(max=0).exp()

WEIGHTS: dict[str, Callable] = {
    "discord": loss.discord_weight,
    "dft": loss.dft_weight,
    "clipped": clipped_ratio,
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
    cut: bool = False  # the student is the teacher without its second layer
    ended: bool = True  # the student learned to end an answer; a base model has not

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
            record = train.toy_trace(rng, times, skip)
            *words, _, answer = record["response"].split()
            if self.ways:
                chosen = rng.choices(WAYS, shares, k=len(words))
                for place, way in enumerate(chosen):
                    words[place] = words[place].replace("=", way)
            if rng.random() < marked:
                words += ["####", answer]
            records.append({"id": i, **record, "response": " ".join(words)})
        data.write_jsonl(file, records)

    def save_tokenizer(self, folder: Path, save: Callable = train.save_toy_tokenizer) -> int:
        """The toy's, with a token for each way to write a value."""
        size = save(folder)
        file = folder / "tokenizer.json"
        raw = json.loads(file.read_text())
        for way in WAYS[1:] if self.ways else "":
            for letter in train.LETTERS:
                for digit in range(10):
                    raw["model"]["vocab"][f"{letter}{way}{digit}"] = size
                    size += 1
        file.write_text(json.dumps(raw))
        return size

    def save_model(self, folder: Path, layers: int, width: int, seed: int) -> None:
        train.save_toy_tokenizer = self.save_tokenizer
        train.save_toy_model(folder, layers, width, seed)

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
            if not self.ended:
                data.collate = collate_without_ends
            self.save_model(home / "blank-student", 1, 48, seed + 1)
            fit(home / "blank-student", home / "lessons.jsonl", home / "student",
                f"--objective sft --steps {self.lessons} --lr 5e-3")
        answer(self.teacher, home / "problems.jsonl", home / "traces.jsonl",
               f"--temperature 1 --seed {seed}")

def collate_without_ends(examples: list, *device: str, collate: Callable = data.collate,
                         ) -> data.Batch:
    batch = collate(examples, *device)
    kept = batch.labels != END
    return batch._replace(positions=batch.positions[kept], labels=batch.labels[kept])

def load_without_ends(*args: object, load: Callable = data.load, **options: object) -> tuple:
    """A student whose ends of turn have the weight of the formula, not 1: it knows none."""
    model, tokenizer = load(*args, **options)
    model.eos_token_ids = []
    return model, tokenizer

def losses_of_prefixes(objective: str, q_logits: Tensor, y: Tensor, *rest: object,
                       token_losses: Callable = loss.token_losses) -> tuple[Tensor, Tensor]:
    """A weight is multiplied by the smallest one before it in the answer, if that is below 1: what
    follows a refused token is refused, too. The rows are whole answers."""
    losses, w = token_losses(objective, q_logits, y, *rest)
    before = torch.cat([w.new_ones(1), w[:-1].clamp(max=1)])
    begins = (y[:-1] == END).nonzero()[:, 0] + 1
    before[begins] = 1
    smallest = [answer.cummin(0).values for answer in before.tensor_split(begins)]
    return losses, w * torch.cat(smallest)

def keep_reachable(student: Path, traces: Path, out: Path) -> None:
    if not out.exists():
        data.main(["reach", "--student", str(student), "--traces", str(traces), "--out", str(out)])

def fit(student: Path, traces: Path, out: Path, options: str) -> dict:
    """A finished run is read, whatever was edited since. To make it again, remove its folder."""
    command = f"--student {student} --traces {traces} --out {out} {COMMON} {options}"
    args = train.parse_args(command.split())
    run = train.saved_run(out)
    if "seconds" not in run:
        return train.train(args)
    for key in ("student", "traces", "steps", "lr", "tau", "seed"):
        was, now = run["options"][key], vars(args)[key]
        check(was == now, f"{out}: {key} was {was}, is now {now}; remove the folder")
    return run

def answer(model: Path, problems: Path, out: Path, options: str) -> list[dict]:
    command = f"accuracy --model {model} --benchmark {problems} --out {out} {ANSWER} {options}"
    evaluate.main(command.split())
    return evaluate.read_answers(out)

def shares_of_ways(records: list[dict]) -> np.ndarray:
    counts = Counter()
    for record in records:
        counts.update(record["response"])
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
    kl = TEACHER_SHARES @ np.log(TEACHER_SHARES / shares)
    found["shares"] = shares.tolist()
    found["kl"] = float(kl)
    found["pass"] = float(summary["pass"])
    found["cut_off"] = float(summary["cut_off"])
    found["tokens"] = float(summary["mean_tokens"])
    marked = ["####" in record["response"] for record in records]
    found["marker"] = float(np.mean(marked))
    return found

# ---- Runs
Stages = tuple[str, ...]

@dataclass(frozen=True)
class Run:
    """A student's training in stages, each with an objective and options of train.py. Without
    a stage, the student before."""
    world: World
    seed: int
    label: str
    stages: Stages = ()
    problems: str = "held-out"
    samples: int = 1

    def do(self) -> dict:
        home = self.world.home(self.seed)
        out = home / self.label.replace(" ", "-")
        model, traces, row = home / "student", home / "traces.jsonl", {}
        if "in reach" in self.label:
            traces = out / "traces.jsonl"
            keep_reachable(model, home / "traces.jsonl", traces)
        for i, options in enumerate(self.stages):
            data.load = load_without_ends if "by the formula" in self.label else LOAD
            loss.token_losses = TOKEN_LOSSES
            if "prefixes" in self.label:  # they need whole answers: all of a step in one chunk
                loss.token_losses, train.CHUNK["cpu"] = losses_of_prefixes, 64 * 64
            if options.startswith(("kl", "rkl")):
                options += f" --teacher {self.world.teacher}"
            folder = out / f"{i}"
            run = fit(model, traces, folder,
                      f"--seed {self.seed} --objective {options.format(home=home)}")
            lines = [line for _, line in data.read_jsonl(folder / "log.jsonl")]
            losses = [line["unweighted"] for line in lines]
            row = {
                "weight": lines[0]["weight"],
                "ess": lines[0]["ess"],
                "first": losses[0],
                "worst": max(losses),
                "last": losses[-1],
                "seconds": run["seconds"],
            }
            model = folder
        data.load = LOAD
        return row | measure(self.world, model, self.problems, self.samples)

def work(job: tuple) -> object:
    """In a process of its own: one thread, and nothing printed but errors."""
    torch.set_num_threads(1)
    function, *arguments = job
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*arguments)

Columns = dict[str, list]  # {metric: [its value for each seed]}
def do_all(runs: list[Run]) -> dict[tuple[World, str], Columns]:
    """Results by world and label, after what the runs need has been made."""
    teachers, students = {}, {}
    for run in runs:
        teachers[run.world.teacher] = (World.prepare_teacher, run.world)
        students[run.world, run.seed] = (World.prepare_student, run.world, run.seed)
    stages = {
        "teachers": list(teachers.values()),
        "students": list(students.values()),
        "runs": [(Run.do, run) for run in runs],
    }
    cores = len(os.sched_getaffinity(0))
    # Not "fork": a process could be made while tqdm's lock is held, and wait for it forever.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    with context.Pool(cores, maxtasksperchild=1) as pool:
        for name, jobs in stages.items():
            rows = list(tqdm(pool.imap(work, jobs), name, len(jobs)))
    found: dict[tuple[World, str], Columns] = {}
    for run, row in zip(runs, rows, strict=True):
        column = found.setdefault((run.world, run.label), {})
        for key, value in row.items():
            column.setdefault(key, []).append(value)
    return found

# ---- Tables
def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean over seeds (Student's t)."""
    n = len(values)
    return STUDENT_T[n] * np.std(values, ddof=1) / np.sqrt(n)

def mean(values: list[float]) -> str:
    if len(values) == 2:
        return f"{np.mean(values):.3f}"
    return f"{np.mean(values):.3f} ± {half_interval(values):.3f}"

def print_table(head: list[str], rows: list[list[str]]) -> None:
    rule = ["---"] * len(head)
    for row in (head, rule, *rows):
        cells = " | ".join(row)
        print(f"| {cells} |")

def show(runs: list[Run], *keys: str) -> None:
    """A table for each world, a line for each label."""
    tables: dict[World, list] = {}
    for (world, label), column in do_all(runs).items():
        cells = [mean(column[key]) if key in column else "" for key in keys]
        tables.setdefault(world, []).append([label, *cells])
    for world, rows in tables.items():
        print(f"\n{world.folder().name}\n")
        print_table(["", *keys], rows)

# ---- main, rates, times: which objective?
TOY = World()
FOUR_WAYS = World(ways=True, lessons=600)  # so that the student is as good as in the toy
RATES = 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2
METHODS = {
    "SFT": "sft",
    "KL": "kl",
    "reverse KL": "rkl",
    "DFT": "dft",
    "DisCorD": "discord",
    "DisCorD, τ = 0.7": "discord --tau 0.7",
}

def method_run(world: World, name: str, lr: float, seed: int, problems: str = "held-out",
               samples: int = 8) -> Run:
    stages = (f"{METHODS[name]} --lr {lr:g} --steps 800",)
    return Run(world, seed, f"{name} {lr:g}", stages, problems, samples)

def rate_runs() -> list[Run]:
    """Every method at every rate in both worlds, on the validation problems."""
    runs = []
    for world, name, lr in itertools.product((TOY, FOUR_WAYS), METHODS, RATES):
        runs += [method_run(world, name, lr, seed, "validation", 1) for seed in range(2)]
    return runs

@functools.cache
def rate_results() -> dict[tuple[World, str], Columns]:
    """Read once; of both worlds, so that their teachers are trained at the same time."""
    return do_all(rate_runs())

def best_rates(world: World) -> dict[str, float]:
    """By the mean of greedy and sampled accuracy over two seeds."""
    found = rate_results()
    best = {}
    for name in METHODS:
        scores = {}
        for lr in RATES:
            column = found[world, f"{name} {lr:g}"]
            scores[lr] = np.mean(column["greedy"] + column["sampled"])
        best[name] = max(scores, key=scores.get)
    return best

def main_runs(world: World) -> list[Run]:
    """The student before, then each method at its best rate."""
    runs = [Run(world, seed, "student before", samples=8) for seed in range(5)]
    for name, lr in best_rates(world).items():
        runs += [method_run(world, name, lr, seed) for seed in range(5)]
    return runs

def times(rounds: int = 3) -> None:
    """Every method in turn, on one core; its time over SFT's in the same round."""
    ratios: dict[str, list[float]] = {name: [] for name in METHODS}
    for i in range(rounds):
        for name, options in METHODS.items():
            run = Run(TOY, 0, f"{name}, round {i}", (f"{options} --steps 200",), "validation")
            seconds = work((Run.do, run))["seconds"]
            if name == "SFT":
                of_sft = seconds
            ratios[name].append(seconds / of_sft)
    rows = [[name, mean(column)] for name, column in ratios.items()]
    print_table(["", "time / SFT's"], rows)

# ---- shares: a softmax table, where each weight leads
TABLE_TEACHER = 0.5, 0.3, 0.2
STARTS = [
    (0.4, 0.35, 0.25),
    (0.2, 0.3, 0.5),
    (0.9, 0.09, 0.01),
    (0.01, 0.09, 0.9),
]
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

def shares() -> None:
    lines = []
    for name in TABLE_WEIGHTS:
        ends = softmax_table(name)
        cells = [" ".join(f"{share:.3f}" for share in end) for end in ends]
        lines.append([name, *cells])
    print_table(["from", *map(str, STARTS)], lines)

# ---- tau, capacity, dead, ends, far
SFT = ("sft --lr 3e-2 --steps 800",)
DISCORD = ("discord --lr 1e-3 --steps 800",)
TAUS = 0.3, 0.5, 0.7, 1.0, 2.0
ACCURACY = "greedy", "sampled"
LOG = "weight", "ess", "first", "worst", "last"  # first line's; unweighted losses

def sft_first(steps: int, lr: float) -> Stages:
    return f"sft --lr {lr:g} --steps {steps}", f"discord --lr 1e-3 --steps {800 - steps}"

def runs_in(worlds: list[World], stages: dict[str, Stages], seeds: int) -> list[Run]:
    runs = []
    for world in worlds:
        for label, some in {"student before": (), **stages}.items():
            runs += [Run(world, seed, label, some) for seed in range(seeds)]
    return runs

def tau_runs() -> list[Run]:
    stages = {}
    for tau in TAUS:
        stages[f"tau {tau:g}"] = (f"discord --lr 1e-3 --steps 800 --tau {tau}",)
    return runs_in([TOY], stages, 5)

def prefix_runs() -> list[Run]:
    """The traces of the problems by the rule: the teacher's four ways, without a skip. Then the
    teacher's traces, once with weights that know their prefix."""
    no_skips = ("sft --lr 1e-3 --steps 800 --traces {home}/problems.jsonl",)
    stages = {"SFT without skips": no_skips, "DisCorD": DISCORD, "DisCorD of prefixes": DISCORD}
    return runs_in([TOY, FOUR_WAYS], stages, 3)

def reach_runs() -> list[Run]:
    """A teacher that skips less, so that some traces have no skip: refuse tokens, or traces?"""
    stages = {"SFT": SFT, "DisCorD": DISCORD, "SFT on traces in reach": SFT,
              "DisCorD on traces in reach": DISCORD}
    return runs_in([World(skip=0.2)], stages, 5)

def capacity_runs() -> list[Run]:
    """In the last world, the student has never seen a multiplication."""
    worlds = [World(skip=skip) for skip in (0.2, 0.6, 0.9)]
    worlds.append(World(times=0.0))
    return runs_in(worlds, {"SFT": SFT, "DisCorD": DISCORD}, 5)

def dead_runs() -> list[Run]:
    """The student has never ended an answer with ####, as the teacher always does; last: rarely."""
    stages = {"SFT": SFT, "DisCorD": DISCORD}
    for steps in (25, 50):
        stages[f"SFT {steps}, then DisCorD"] = sft_first(steps, 1e-3)
    rarely = runs_in([World(marked=0.05)], {"DisCorD": DISCORD}, 3)
    return runs_in([World(marked=0.0)], stages, 3) + rarely

def ends_runs() -> list[Run]:
    """A student that has never ended an answer, and the toy's. In training, does the end of turn
    count as in SFT (ours), or by the formula, perhaps after a few steps of SFT?"""
    dft = ("dft --lr 1e-3 --steps 800",)
    stages = {"SFT": SFT, "DisCorD": DISCORD, "DisCorD by the formula": DISCORD, "DFT": dft,
              "DFT by the formula": dft}
    for steps in (10, 50):
        stages[f"SFT {steps}, then DisCorD by the formula"] = sft_first(steps, 1e-3)
    return runs_in([World(ended=False), TOY], stages, 3)

def ways_runs() -> list[Run]:
    """Exercise 7 of the workshop: two seeds of the world of four ways."""
    stages = {f"{name} 0.0001": (f"{METHODS[name]} --lr 0.0001 --steps 800",)
              for name in ("DFT", "DisCorD")}
    return runs_in([FOUR_WAYS], stages, 2)

def far_runs() -> list[Run]:
    """The last student is the teacher's first layer; the others had few lessons."""
    stages = {"SFT": SFT, "DisCorD": DISCORD}
    for change in ("--lr 1e-2", "--tau 2"):
        stages[f"DisCorD {change}"] = (f"discord --lr 1e-3 --steps 800 {change}",)
    for steps in (100, 200, 400):
        stages[f"SFT {steps}, then DisCorD"] = sft_first(steps, 3e-2)
    worlds = [World(lessons=n) for n in (25, 100, 300)]
    worlds.append(World(cut=True))
    return runs_in(worlds, stages, 3)

# ---- steps: what a student of the toy does
def count_steps(folder: Path) -> dict[str, float]:
    """For greedy answers to the held-out problems of the toy: the share of right values after each
    operation, given the last value that the student wrote; of those after a skipped value (merged);
    and the share of skipped values."""
    model, tokenizer = data.load(folder)
    problems = evaluate.load_problems(folder.parents[1] / "held-out.jsonl")
    right, written = Counter(), Counter()
    for record in evaluate.generate_answers(model, tokenizer, problems, max_new_tokens=64,
                                            batch_size=500):
        first, *operations = record["prompt"].split()
        values = dict(word.split("=") for word in record["response"].split() if "=" in word)
        value, steps = int(first), 0  # right after the last value written, and steps since then
        for letter, sign, k in operations:
            value, steps = train.SIGNS[sign](value, int(k)) % 10, steps + 1
            if letter in values:
                kind = sign if steps == 1 else "merged"
                written[kind] += 1
                right[kind] += value == int(values[letter])
                value, steps = int(values[letter]), 0
    found = {kind: right[kind] / max(written[kind], 1) for kind in ("+", "-", "*", "merged")}
    return found | {"skipped": 1 - written.total() / (6 * len(problems))}

# ---- Figures: white, so that they are readable in dark mode, too. Shown 830 pixels wide, letters
# have 14 pixels. Each objective has one hue in all figures; shares of spellings are grey.
FIGURES = Path(__file__).parent / "figures"
COLORS = {"student before": "0.45", "SFT": "#e66101", "KL": "#1b9e77", "reverse KL": "#2166ac",
          "DFT": "#b2182b", "DisCorD": "#5e3c99", "DisCorD, τ = 0.7": "#b2abd2"}
GREYS = "0.25", "0.5", "0.7", "0.87"

def rates_panel(axis: Axes, world: World, title: str) -> None:
    found = rate_results()
    for name in METHODS:
        points = [np.mean(found[world, f"{name} {lr:g}"]["sampled"]) for lr in RATES]
        axis.plot(RATES, points, marker="o", color=COLORS[name], label=name)
    axis.set(title=title, ylim=(0, 1.02), xlabel="learning rate", xscale="log")
    axis.set_xticks([1e-4, 1e-3, 1e-2])

def shares_panel(axis: Axes) -> None:
    axis.set(title="A softmax table", xlim=(-0.03, 1.03), xlabel="first share at the end")
    axis.set_yticks(range(len(TABLE_WEIGHTS)), TABLE_WEIGHTS)
    axis.axvline(TABLE_TEACHER[0], color="0.4", linestyle=":")
    for i, (marker, start) in enumerate(zip("osD^", STARTS, strict=True)):
        ends = [softmax_table(name)[i][0] for name in TABLE_WEIGHTS]
        heights = np.arange(len(ends)) + 0.14 * (i - 1.5)
        label = "from " + " ".join(f"{share:.2g}".removeprefix("0") for share in start)
        axis.plot(ends, heights, marker, color=GREYS[i], markeredgecolor="black", label=label)

def accuracy_panel(axis: Axes, world: World) -> None:
    for y, (color, column) in enumerate(zip(COLORS.values(), do_all(main_runs(world)).values(),
                                            strict=True)):
        for key, offset, fill in (("greedy", -0.16, color), ("sampled", 0.16, "white")):
            values = column[key]
            axis.errorbar(np.mean(values), y + offset, xerr=half_interval(values), marker="o",
                          markersize=8, capsize=3, color=color, markerfacecolor=fill)
    axis.set(xlim=(0, 1.04), xlabel="accuracy", xticks=(0, 0.5, 1))
    axis.grid(axis="x", color="0.85")

def ways_panel(axis: Axes) -> None:
    for y, column in enumerate(do_all(main_runs(FOUR_WAYS)).values()):
        start = 0.0
        for share, color in zip(np.mean(column["shares"], axis=0), GREYS, strict=True):
            axis.barh(y, share, left=start, height=0.6, color=color)
            start += share
    for line in np.cumsum(TEACHER_SHARES)[:-1]:
        axis.axvline(line, color="black", linestyle=":")
    axis.set(title="Shares of the four ways", xlabel="dotted: the teacher's")
    axis.set_xticks((0, 0.5, 1))

def draw_result() -> None:
    figure, axes = plot.subplots(1, 3, figsize=(10.4, 4.6), layout="constrained", sharey=True)
    toy, four_ways, ways = axes
    accuracy_panel(toy, TOY)
    toy.set(title="The toy")
    toy.set_yticks(range(len(COLORS)), COLORS)
    toy.invert_yaxis()
    accuracy_panel(four_ways, FOUR_WAYS)
    four_ways.set(title="Four ways")
    ways_panel(ways)
    figure.savefig(FIGURES / "result.png")

def figures() -> None:
    """Draw figures/result.png from main, figures/study.png from rates and shares."""
    plot.rcParams.update({"font.size": 12.5, "savefig.facecolor": "white", "savefig.dpi": 160,
                          "axes.spines.top": False, "axes.spines.right": False})
    draw_result()
    figure, axes = plot.subplots(1, 3, figsize=(10.4, 5.2), layout="constrained")
    toy, four_ways, table = axes
    rates_panel(toy, TOY, "The toy")
    toy.set_ylabel("sampled accuracy, two seeds")
    rates_panel(four_ways, FOUR_WAYS, "Four ways")
    shares_panel(table)
    handles, labels = toy.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, fontsize=11)
    handles, labels = table.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, fontsize=11)
    figure.savefig(FIGURES / "study.png")

PARTS = {
    "main": lambda: show(main_runs(TOY) + main_runs(FOUR_WAYS), *ACCURACY, "pass", "kl", "tokens"),
    "rates": lambda: show(rate_runs(), *ACCURACY, "kl"),
    "times": times,
    "shares": shares,
    "tau": lambda: show(tau_runs(), *ACCURACY),
    "prefixes": lambda: show(prefix_runs(), *ACCURACY, "kl"),
    "reach": lambda: show(reach_runs(), *ACCURACY, "tokens"),
    "capacity": lambda: show(capacity_runs(), *ACCURACY),
    "dead": lambda: show(dead_runs(), *ACCURACY, "marker"),
    "ends": lambda: show(ends_runs(), *ACCURACY, "cut_off"),
    "ways": lambda: show(ways_runs(), *ACCURACY, "kl"),
    "far": lambda: show(far_runs(), *ACCURACY, *LOG),
    "figures": figures,
}

if __name__ == "__main__":
    if sys.argv[1:2] == ["steps"]:
        for name in sys.argv[2:]:
            print(f"{name}:", *(f" {kind} {x:.3f}" for kind, x in count_steps(Path(name)).items()))
    else:
        for part in sys.argv[1:] or PARTS:
            print(f"\n## {part}\n", flush=True)
            PARTS[part]()
