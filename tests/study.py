"""Does the correction work, when does it hurt? python tests/study.py [PART...]

The README's tables and figures, from nothing: worlds, teachers, students and traces are made with
the commands of real models (train.py, evaluate.py accuracy), in runs/study, as many runs at a time
as there are cores, each on one. What is finished is not done again. Parts: main (half an hour on
two cores), rates, tau, probe, spelling, length, capacity, ahead, dead, figures.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import evaluate
import loss
import train

ROOT = Path("runs/study")
COMMON = "--batch-size 64 --grad-accum 1 --max-length 64 --log-every 100 --device cpu --resume"
ANSWER = "--batch-size 500 --device cpu --resume"
STUDENT_T = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 10: 2.262}  # 97.5 %, by the number of seeds


# ---- Worlds


@dataclass(frozen=True)
class World:
    """What may differ from the toy of train.py, which is World()."""

    steps: int = 6  # operations of a problem
    spelling: str = "joint"  # of a value: "b=6"; choice-first: "b 6"; value-first: "6 b"
    skip: float = 0.6  # how readily the teacher skips a value
    times: float = 0.1  # share of multiplications in the student's own lessons; 1/3 in problems
    lessons: int = 300  # training steps of the student before it meets the teacher
    marked: float = 1.0  # share of the student's lessons that end in "#### answer"
    layers: int = 1  # of the student, of width 48; the teacher has two of width 96

    def folder(self, *only: str) -> Path:
        """A name of what differs (in these fields)."""
        parts = [f"{one.name}={getattr(self, one.name)}" for one in fields(self)
                 if (one.name in only or not only) and getattr(self, one.name) != one.default]
        return ROOT / (",".join(parts) or "toy")

    @property
    def teacher(self) -> Path:
        return self.folder("steps", "spelling", "skip") / "teacher"

    def home(self, seed: int) -> Path:
        return self.folder() / f"seed{seed}"

    def records(self, file: Path, count: int, times: float = 1 / 3, skip: float = 0.0,
                marked: float = 1.0) -> None:
        """Write problems with their traces by the rule, in this world's spelling."""
        if file.exists():
            return
        rng, found = random.Random(str(file.relative_to(ROOT))), []
        for i in range(count):
            record = data.toy_trace(rng, times, skip)
            *values, _, answer = record["response"].split()
            if self.spelling != "joint":
                order = 1 if self.spelling == "choice-first" else -1
                values = [" ".join(value.split("=")[::order]) for value in values]
            values += [f"#### {answer}"] * (rng.random() < marked)
            found.append({"id": i, **record, "response": " ".join(values)})
        data.write_jsonl(file, found)

    def model(self, folder: Path, layers: int, width: int, seed: int) -> None:
        if (folder / "config.json").exists():
            return
        data.save_toy_tokenizer = self.tokenizer
        data.save_toy_model(folder, layers, width, seed)

    def tokenizer(self, folder: Path, save: Callable = data.save_toy_tokenizer) -> int:
        """The toy's, with a word for each step where the spelling needs one."""
        size, file = save(folder), folder / "tokenizer.json"
        raw = json.loads(file.read_text())
        letters = "" if self.spelling == "joint" else data.LETTERS
        raw["model"]["vocab"] |= {letter: size + i for i, letter in enumerate(letters)}
        file.write_text(json.dumps(raw))
        return size + len(letters)

    @property
    def longest(self) -> int:
        return 2 * self.steps + 6

    def prepare_teacher(self) -> None:
        home = self.teacher.parent
        self.model(home / "blank-teacher", 2, 96, 0)
        self.records(home / "lessons.jsonl", 30000, skip=self.skip)
        self.records(home / "held-out.jsonl", 1000)
        self.records(home / "validation.jsonl", 500)
        steps = 2000 if self.spelling == "joint" else 6000
        fit(home / "blank-teacher", home / "lessons.jsonl", self.teacher,
            f"--objective sft --steps {steps} --lr 5e-3")
        accuracies(self, self.teacher)

    def prepare_student(self, seed: int) -> None:
        home = self.home(seed)
        self.model(home / "blank-student", self.layers, 48, seed + 1)
        self.records(home / "lessons.jsonl", 8000, times=self.times, marked=self.marked)
        self.records(home / "problems.jsonl", 4000)
        fit(home / "blank-student", home / "lessons.jsonl", home / "student",
            f"--objective sft --steps {self.lessons} --lr 5e-3")
        evaluate.main([*f"accuracy --model {self.teacher} --benchmark {home}/problems.jsonl --seed "
                       f"{seed} --temperature 1 --max-new-tokens {self.longest} --out "
                       f"{home}/traces.jsonl".split(), *ANSWER.split()])
        accuracies(self, home / "student")


def fit(student: Path, traces: Path, out: Path, options: str) -> dict:
    return train.train(train.parse_args([
        "--student", str(student), "--traces", str(traces), "--out", str(out), *COMMON.split(),
        *options.split()]))


def accuracies(world: World, model: Path, problems: str = "held-out") -> dict[str, float]:
    """Greedy and sampled once at T = 1, on problems that nobody has seen."""
    found = {}
    for name, temperature in (("greedy", 0), ("sampled", 1)):
        out = model / f"{problems}-{name}.jsonl"
        evaluate.main([*f"accuracy --model {model} --benchmark {world.teacher.parent}/"
                       f"{problems}.jsonl --temperature {temperature} --max-new-tokens "
                       f"{world.longest} --out {out}".split(), *ANSWER.split()])
        records = evaluate.read_answers(out)
        found |= {name: evaluate.summarize(records)["accuracy"],
                  "length": evaluate.summarize(records)["mean_tokens"],
                  "marker": np.mean(["####" in record["response"] for record in records])}
    return {key: round(float(value), 4) for key, value in found.items()}


# ---- Runs


@dataclass(frozen=True)
class Run:
    """A student's training in one or several stages, each (options of train.py, changes below).
    A stage continues from the one before; with a probe, from the student again."""

    world: World
    seed: int
    label: str
    stages: tuple
    measured: bool = False  # on validation problems, and its exposure bias

    @property
    def folder(self) -> Path:
        return self.world.home(self.seed) / self.label.replace(" ", "_")

    def do(self) -> dict:
        out = self.folder / "row.json"
        if out.exists():
            return json.loads(out.read_text())
        home = self.world.home(self.seed)
        model, row = home / "student", {"seconds": 0.0}
        for i, (options, changes) in enumerate(self.stages):
            weight = dict(changes)
            if "probe" in weight:
                weight["probe"], model = model, home / "student"
            changed(home / "traces.jsonl", **weight)
            if loss.split_name(options.split()[0])[0] != "sft":
                options += f" --teacher {self.world.teacher}"
            run = fit(model, home / "traces.jsonl", self.folder / str(i),
                      f"--seed {self.seed} --objective {options}")
            model, row["seconds"] = self.folder / str(i), row["seconds"] + run["seconds"]
            *_, (_, line) = data.read_jsonl(model / "log.jsonl")
            row |= {"gb": round(line["gb"], 3), "weight": round(line["weight"], 3)}
        row |= accuracies(self.world, model)
        if self.measured:
            valid = accuracies(self.world, model, "validation")
            row["valid"] = (valid["greedy"] + valid["sampled"]) / 2
            curve = self.folder / "curve.jsonl"
            evaluate.main(f"exposure --teacher {self.world.teacher} --student {model} --benchmark "
                          f"{self.world.teacher.parent}/held-out.jsonl --limit 200 --device cpu "
                          f"--max-new-tokens 12 --batch-size 400 --out {curve}".split())
            *_, (_, found) = itertools.islice(data.read_jsonl(curve), 7)  # or at the last length
            row |= {"excess": found["excess"], "epsilon": found["epsilon"]}
        data.write_jsonl(out, [row])
        return row


def changed(traces: Path, gamma: float = 0.0, floor: float = 0.0, probe: Path | None = None,
            ) -> None:
    """Put another weight (none of these is in the paper) in the place of loss.discord_weight, for
    this process: look-ahead r_t <- sum over k >= t of gamma^(k-t) r_k within the response; a least
    weight; the larger of the student's and a probe's log q(y) as the support."""
    loss.discord_weight, train.backward = WEIGHT, BACKWARD
    if not gamma and not floor and probe is None:
        return
    train.CHUNK["cpu"] = 10 ** 9  # a micro-batch at a time, since responses are whole
    now, known = [], {}
    if probe is not None:
        model, tokenizer = data.load(probe)
        examples, _ = data.load_traces(traces, tokenizer, 64)
        keys = [example.tokens[:-1].astype(np.int64).tobytes() for example in examples]
        known = dict(zip(keys, map(torch.from_numpy, data.response_logp(model, examples, 500)),
                         strict=True))

    def traces_of(batch):
        """The bytes of each trace's tokens but the last, which a batch does not have."""
        rows, columns = np.divmod(batch.positions.numpy(), batch.tokens.shape[1])
        ends = dict(zip(rows.tolist(), (columns + 1).tolist(), strict=True))  # the last one counts
        return [batch.tokens[row, :end].numpy().tobytes() for row, end in ends.items()]

    def backward(student, batch, *more):
        now[:] = [batch]
        return BACKWARD(student, batch, *more)

    def weight(q_logp, p_logp, tau):
        support = q_logp.detach()
        if known:
            support = support.maximum(torch.cat([known[key] for key in traces_of(now[0])]))
        r, positions = (support - p_logp).tolist(), now[0].positions.tolist()
        for t in range(len(r) - 2, -1, -1):
            if positions[t + 1] == positions[t] + 1:  # of one response
                r[t] += gamma * r[t + 1]
        r = torch.tensor(r)
        return WEIGHT(r, torch.zeros_like(r), tau).clamp(min=floor)

    loss.discord_weight, train.backward = weight, backward


WEIGHT, BACKWARD = loss.discord_weight, train.backward


def work(job: tuple) -> object:
    """In a process of its own: one thread, and nothing printed but errors."""
    torch.set_num_threads(1)
    function, world, *rest = job
    data.LETTERS = "abcdefghijkl"[:world.steps]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        return function(*rest)


def all_of(runs: list[Run]) -> dict[Run, dict]:
    """Their rows, after what they need has been made."""
    worlds = {run.world: None for run in runs}
    teachers = {world.teacher: world for world in worlds}
    students = dict.fromkeys((run.world, run.seed) for run in runs)
    stages = [(World.prepare_teacher, w, w) for w in teachers.values()], [
        (World.prepare_student, w, w, seed) for w, seed in students], [
        (Run.do, run.world, run) for run in runs]
    rows: list = []
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("fork").Pool(cores, maxtasksperchild=1) as pool:
        for name, jobs in zip(("teachers", "students", "runs"), stages, strict=True):
            rows = list(tqdm(pool.imap(work, jobs, chunksize=1), name, len(jobs)))
    return dict(zip(runs, rows, strict=True))


# ---- Tables


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean over seeds (Student's t)."""
    return STUDENT_T[len(values)] * np.std(values, ddof=1) / np.sqrt(len(values))


def mean(values: list[float], digits: int = 3) -> str:
    return f"{np.mean(values):.{digits}f} ± {half_interval(values):.{digits}f}"


def table(head: list[str], rows: list[list]) -> None:
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(map(str, row)), "|")


def spread(rows: dict[Run, dict], key: str) -> dict[tuple, tuple[float, float]]:
    """{(world, label): (mean, half of the 95 % interval)}."""
    found: dict[tuple, list[float]] = {}
    for run, row in rows.items():
        found.setdefault((run.world, run.label), []).append(row[key])
    return {place: (np.mean(v), half_interval(v)) for place, v in found.items()}


def show(rows: dict[Run, dict], metrics: tuple = ("greedy", "sampled")) -> None:
    """Labels down, worlds across, over the seeds."""
    worlds = dict.fromkeys(run.world for run in rows)
    for metric in metrics:
        found = spread(rows, metric)
        print(f"\n{metric}, mean and 95 % interval over {len({run.seed for run in rows})} seeds\n")
        table(["", *(world.folder().name for world in worlds)], [
            [label, *("{:.3f} ± {:.3f}".format(*found[world, label])
                      if (world, label) in found else "" for world in worlds)]
            for label in dict.fromkeys(run.label for run in rows)])


def once(objective: str, changes: dict | None = None, lr: float = 1e-3, steps: int = 800,
         more: str = "") -> tuple:
    return (f"{objective} --lr {lr:g} --steps {steps} {more}".strip(),
            tuple((changes or {}).items()))


# ---- Parts

RATES = 3e-4, 1e-3, 3e-3, 1e-2, 3e-2
MORE_RATES = *RATES, 1e-1
OBJECTIVES = {  # name in the table: (objective, options, the teacher's part while training)
    "sft": ("sft", "", "none"), "kl": ("kl", "", "whole model"), "rkl": ("rkl", "", "whole model"),
    "todi": ("todi", "", "whole model"), "gkd": ("gkd", "", "whole model"),
    "gkd, half on-policy": ("gkd", "--on-policy 0.5", "whole model"),
    "discord": ("discord", "", "a number a token"), "discord-kl": ("discord-kl", "", "whole model"),
    "discord-todi": ("discord-todi", "", "whole model"),
    "discord-gkd": ("discord-gkd", "", "whole model")}


Methods = dict[str, Callable[[float], tuple]]  # the stages, for a learning rate


def at_rate(world: World, name: str, method: Callable, lr: float, seeds: range) -> list[Run]:
    label = f"{name.replace(', ', '-').replace(' ', '-')}-{lr:g}"
    return [Run(world, seed, label, method(lr), measured=True) for seed in seeds]


def at_rates(world: World, methods: Methods, rates: tuple, seeds: range) -> dict[str, dict]:
    """{method: {learning rate: [a row for each seed]}}"""
    runs = {name: {lr: at_rate(world, name, method, lr, seeds) for lr in rates}
            for name, method in methods.items()}
    rows = all_of([run for found in runs.values() for some in found.values() for run in some])
    return {name: {lr: [rows[run] for run in some] for lr, some in found.items()}
            for name, found in runs.items()}


def best_rates(world: World, methods: Methods, rates: tuple, trial: range,
               ) -> dict[str, dict[str, list]]:
    """{method: {column: [a number for each of five seeds]}}, each with the rate that is best on the
    validation problems (mean of greedy and sampled accuracy over the trial seeds); judged on the
    held-out ones."""
    seeds = range(5)
    best = {name: max(rates, key=lambda lr, found=found: np.mean([r["valid"] for r in found[lr]]))
            for name, found in at_rates(world, methods, rates, trial).items()}
    runs = {name: at_rate(world, name, methods[name], lr, seeds) for name, lr in best.items()}
    rows = all_of(list(itertools.chain(*runs.values())))
    with contextlib.redirect_stdout(sys.stderr):
        before = [accuracies(world, world.home(seed) / "student") for seed in seeds]
    columns = {"student before": {key: [one[key] for one in before] for key in before[0]}}
    for name, some in runs.items():
        columns[name] = {key: [rows[run][key] for run in some] for key in rows[some[0]]} | {
            "lr": [best[name]]}
    return columns


MAIN: Methods = {name: lambda lr, objective=objective, more=more: (
    once(objective, lr=lr, more=more),) for name, (objective, more, _) in OBJECTIVES.items()}


def rates_table() -> None:
    of_rates = at_rates(World(), MAIN, MORE_RATES, range(2))
    for key in ("greedy", "sampled"):
        print(f"\n{key}, mean of two seeds\n")
        table(["", *MORE_RATES], [[name, *(f"{np.mean([row[key] for row in rows]):.3f}"
                                           for rows in found.values())]
                                  for name, found in of_rates.items()])


def main_rows() -> dict[str, dict[str, list]]:
    return best_rates(World(), MAIN, RATES, range(2))


def main_table() -> None:
    rows, lines = main_rows(), []
    for name, column in rows.items():
        paired = {key: mean(list(np.subtract(column[key], rows["sft"][key])))
                  for key in ("greedy", "sampled")} if name != "sft" else dict.fromkeys(column, "")
        cells = ["", "", mean(column["length"], 1), "", "", ""]
        if name in OBJECTIVES:
            cells = [f"{column['lr'][0]:g}",
                     f"{mean(column['excess'], 0)} % of {np.mean(column['epsilon']):.1f}",
                     mean(column["length"], 1), f"{np.median(column['seconds']):.0f}",
                     f"{np.median(column['gb']):.2f}", OBJECTIVES[name][2]]
        lines.append([name, cells[0], mean(column["greedy"]), paired["greedy"],
                      mean(column["sampled"]), paired["sampled"], *cells[1:]])
    table(["objective", "lr", "greedy", "− sft", "sampled, T = 1", "− sft", "ExAccErr(7) of ε",
           "tokens", "seconds", "GB", "teacher while training"], lines)


CHOICE_FIRST = World(spelling="choice-first", lessons=800)  # two tokens a value: longer lessons
VALUE_FIRST = replace(CHOICE_FIRST, spelling="value-first")
LONGER = replace(CHOICE_FIRST, steps=9)
TAUS = 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.85, 1.0, 1.5, 2.0, 4.0


def tau_runs(seeds: range = range(5)) -> list[Run]:
    return [Run(World(), seed, f"discord {tau:g}", (once("discord", more=f"--tau {tau}"),))
            for tau in TAUS for seed in seeds]


def tabular(tau: float, start: list[float], rounds: int = 20000) -> list[float]:
    """Where DisCorD leads a softmax table whose teacher is (.5, .3, .2): its expected gradient."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    logits = torch.tensor(start, dtype=torch.double).log()
    for _ in range(rounds):
        q = logits.softmax(-1)
        push = p * loss.discord_weight(q.log(), p.log(), tau).double()
        logits += 0.5 * (push - push.sum() * q)
    return logits.softmax(-1).tolist()


def tau_table() -> None:
    show(all_of(tau_runs()))
    print("\nthe table (.5, .3, .2), from (.4, .35, .25) and from (.9, .09, .01)\n")
    table(["tau", "from the first", "from the second"], [
        [tau, *("(" + ", ".join(f"{x:.3f}" for x in tabular(tau, start)) + ")"
                for start in ([0.4, 0.35, 0.25], [0.9, 0.09, 0.01]))] for tau in TAUS])


# All at 0.001 but for the second: the best rates of DisCorD and of SFT in the main table.
PLAIN = {"sft": once("sft"), "sft, 0.03": once("sft", lr=3e-2), "rkl": once("rkl"), **{
    f"discord {tau:g}": once("discord", more=f"--tau {tau}") for tau in (1.0, 0.7, 0.5)}}
FEW = {key: PLAIN[key] for key in ("sft", "sft, 0.03", "discord 0.7")}


def runs_in(worlds: list[World], stages: dict[str, tuple], seeds: range) -> list[Run]:
    return [Run(world, seed, label, some if isinstance(some[0], tuple) else (some,))
            for seed in seeds for world in worlds for label, some in stages.items()]


def spelling_runs(seeds: range = range(5)) -> list[Run]:
    return runs_in([World(), CHOICE_FIRST, VALUE_FIRST], PLAIN, seeds)


def length_runs(seeds: range = range(3)) -> list[Run]:
    return runs_in([World(steps=n) for n in (3, 6, 12)], FEW, seeds)


def capacity_runs(seeds: range = range(5)) -> list[Run]:
    return runs_in([World(skip=skip, layers=layers) for layers in (1, 2)
                    for skip in (0.2, 0.6, 0.9)], FEW, seeds)


def dead_runs(seeds: range = range(3)) -> list[Run]:
    """The student has never ended an answer with ####, as the teacher always does; last: rarely."""
    stages = FEW | {f"discord, floor {w}": once("discord", {"floor": w}) for w in (0.05, 0.3)} | {
        f"sft {n}, then discord": (once("sft", steps=n), once("discord", steps=800 - n))
        for n in (10, 25, 50, 100)}
    return runs_in([World(marked=0.0)], stages, seeds) + runs_in([World(marked=0.05)], FEW, seeds)


def ahead_runs(seeds: range = range(5)) -> list[Run]:
    """The third world was not used to choose anything."""
    stages = {"discord 0.7": PLAIN["discord 0.7"], **{
        f"gamma {g}": once("discord", {"gamma": g}) for g in (0.3, 0.6, 0.9)}}
    return runs_in([World(), CHOICE_FIRST, LONGER], stages, seeds)


def probed(gamma: float) -> Callable[[float], tuple]:
    return lambda lr: (once("sft", lr=3e-2, steps=500),
                       once("discord", {"probe": True, "gamma": gamma}, lr=lr, steps=500))


PROBE: Methods = {f"{name}, 1000": lambda lr, name=name: (once(name, lr=lr, steps=1000),)
                  for name in ("sft", "kl", "todi", "rkl", "discord")} | {
    "probe": probed(0.0), "probe, gamma 0.7": probed(0.7)}
PROBE_WORLDS = [replace(CHOICE_FIRST, times=0.0), World(times=0.0), LONGER]


def probe_rows() -> dict[World, dict[str, dict[str, list]]]:
    """All methods cost 1000 steps, the probe's own 500 included. gamma and the probe's rate were
    chosen on seed 0 of the first world; the third one was not used to choose anything."""
    return {world: best_rates(world, PROBE, RATES[1:], range(1)) for world in PROBE_WORLDS}


def probe_table() -> None:
    for world, columns in probe_rows().items():
        print(f"\n{world.folder().name}\n")
        table(["", "lr", "greedy", "sampled"], [
            [name, *(f"{lr:g}" for lr in column.get("lr", [])), *[""] * ("lr" not in column),
             mean(column["greedy"]), mean(column["sampled"])] for name, column in columns.items()])


# ---- Figures: white, so that they are readable in dark mode, too; large letters for a projector

FIGURES = Path(__file__).parent / "figures"
COLORS = {"sft": "#e66101", "discord": "#5e3c99", "other": "0.45"}
LABELS = {"sft, 0.03": COLORS["sft"], "discord 0.7": COLORS["discord"]}


def short(world: World) -> str:
    names = {"spelling=": "", ",lessons=800": "", "times=0.0": "no products", "steps=9": "nine"}
    return reduce(lambda name, pair: name.replace(*pair), names.items(), world.folder().name)


def curve(axis, x: list, points: list[tuple], **how) -> None:
    middle, half = map(np.array, zip(*points, strict=True))
    axis.plot(x, middle, marker="o", **how)
    axis.fill_between(x, middle - half, middle + half, alpha=0.15, color=how.get("color"))


def dots(axis, points: dict[tuple, tuple], names: Callable = short, first: int = 0) -> None:
    """{(world, label): (mean, half interval)}: labels down, a color and a sign for each world."""
    labels = list(dict.fromkeys(label for _, label in points))
    for i, world in enumerate(dict.fromkeys(world for world, _ in points), first):
        middle, half = zip(*(points[world, label] for label in labels), strict=True)
        axis.errorbar(middle, np.arange(len(labels))[::-1] + (0.5 - i / 3) * 0.4, xerr=half,
                      marker="osD"[i], linestyle="", capsize=3, label=names(world),
                      color=("#5e3c99", "#e66101", "0.35")[i])
    axis.set(yticks=range(len(labels)), xlim=(-0.02, 1.04), xlabel="sampled accuracy")
    axis.set_yticklabels(labels[::-1], fontsize=12)
    axis.grid(axis="x", color="0.85")


def over_tau(axis) -> None:
    axis.axvline(0.5, color="0.6", linestyle=":")
    axis.set(xscale="log", xlabel="tau (dotted: 1/2)", xticks=(0.3, 0.5, 0.7, 1, 2, 4))
    axis.set_xticklabels(("0.3", "0.5", "0.7", "1", "2", "4"))
    axis.minorticks_off()


def tau_panel(axis) -> None:
    for key, style in (("greedy", "-"), ("sampled", "--")):
        curve(axis, TAUS, list(spread(all_of(tau_runs()), key).values()), linestyle=style,
              color=COLORS["discord"], label=key)
    axis.set_ylabel("accuracy")
    over_tau(axis)


def rates_panel(axis) -> None:
    found = at_rates(World(), MAIN, MORE_RATES, range(2))
    colors = {**COLORS, "rkl": "0.1", "kl": "0.55"}
    for name in ("sft", "discord", "kl", "rkl"):
        axis.plot(MORE_RATES, [np.mean([row["sampled"] for row in rows])
                               for rows in found[name].values()], marker="o", color=colors[name],
                  linestyle="--" if name in ("kl", "rkl") else "-", label=name)
    axis.set(xscale="log", xlabel="learning rate", ylabel="sampled accuracy")


def table_panel(axis) -> None:
    for style, start in (("-", [0.4, 0.35, 0.25]), ("--", [0.9, 0.09, 0.01])):
        axis.plot(TAUS, [tabular(tau, start)[0] for tau in TAUS], style, marker="o",
                  color=COLORS["discord"], label=f"from {tuple(start)}")
    axis.axhline(0.5, color="0.6", linewidth=1)
    axis.set_ylabel("q of the first entry; the teacher's is .5")
    over_tau(axis)


def length_panel(axis) -> None:
    points = spread(all_of(length_runs()), "sampled")
    for label, color in LABELS.items():
        some = {world.steps: value for (world, one), value in points.items() if one == label}
        curve(axis, list(some), list(some.values()), color=color, label=label)
    axis.set(xlabel="operations in a problem", xticks=list(some), ylabel="sampled accuracy")


def capacity_panel(axis) -> None:
    points = spread(all_of(capacity_runs()), "sampled")
    for (layers, style), (label, color) in itertools.product(
            ((1, "-"), (2, "--")), LABELS.items()):
        some = {world.skip: value for (world, one), value in points.items()
                if one == label and world.layers == layers}
        curve(axis, list(some), list(some.values()), color=color, linestyle=style,
              label=f"{label}, {layers} layer" + "s" * (layers > 1))
    axis.set(xlabel="how readily the teacher merges steps", xticks=list(some),
             ylabel="sampled accuracy")


def dead_panel(axis) -> None:
    rows = all_of([run for run in dead_runs() if not run.world.marked])
    dots(axis, spread(rows, "sampled"), lambda world: "sampled accuracy")
    dots(axis, spread(rows, "marker"), lambda world: "answers with ####", 1)


def ahead_panel(axis) -> None:
    dots(axis, spread(all_of(ahead_runs()), "sampled"))


def spelling_panel(axis) -> None:
    dots(axis, spread(all_of(spelling_runs()), "sampled"), lambda world: world.spelling)


def probe_panel(axis) -> None:
    dots(axis, {(world, name): (np.mean(column["greedy"]), half_interval(column["greedy"]))
                for world, columns in probe_rows().items() for name, column in columns.items()})
    axis.set_xlabel("greedy accuracy")


PANELS = {"Learning rate (two seeds)": rates_panel, "Temperature": tau_panel,
          "A softmax table: where it ends": table_panel,
          "Length": length_panel, "Where it helps, where it hurts": capacity_panel,
          "What a token decides": spelling_panel,
          "Dead tokens and cures": dead_panel,
          "Look-ahead (not in the paper)": ahead_panel,
          "A probe (not in the paper)": probe_panel}


def figures() -> None:
    """tests/figures/result.png from main, tests/figures/study.png from the other parts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plot
    plot.rcParams.update({"font.size": 15, "savefig.facecolor": "white", "savefig.dpi": 80,
                          "axes.spines.top": False, "axes.spines.right": False})
    FIGURES.mkdir(exist_ok=True)
    rows = main_rows()
    figure, axis = plot.subplots(figsize=(12, 6), layout="constrained")
    for offset, key, full in ((0.15, "greedy", True), (-0.15, "sampled", False)):
        for i, (name, values) in enumerate(reversed(rows.items())):
            color = COLORS.get(name.partition("-")[0], COLORS["other"])
            axis.errorbar(np.mean(values[key]), i + offset, xerr=half_interval(values[key]),
                          marker="o", markersize=9, capsize=4, color=color,
                          markerfacecolor=color if full else "white")
    axis.set(xlim=(0, 1.02), xlabel="accuracy on unseen problems, mean and 95 % interval over five "
             "seeds\n(full: greedy; hollow: sampled at T = 1)", yticks=range(len(rows)))
    axis.set_yticklabels(reversed(rows))
    axis.grid(axis="x", color="0.85")
    figure.savefig(FIGURES / "result.png")

    figure, axes = plot.subplots(3, 3, figsize=(18, 18), layout="constrained")
    for i, (axis, (title, draw)) in enumerate(zip(axes.flat, PANELS.items(), strict=True)):
        draw(axis)
        axis.set_title(title)
        if i < 5:
            axis.set_ylim(0, 1.04)
        axis.legend(fontsize=12, loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False,
                    ncols=2 if i < 7 else 1)
    figure.savefig(FIGURES / "study.png")


SHOWN = {"spelling": spelling_runs, "length": length_runs, "capacity": capacity_runs,
         "ahead": ahead_runs}
PARTS = {"main": main_table, "rates": rates_table, "tau": tau_table, "probe": probe_table,
         **{name: lambda runs=runs: show(all_of(runs())) for name, runs in SHOWN.items()},
         "dead": lambda: show(all_of(dead_runs()), ("greedy", "sampled", "marker")),
         "figures": figures}


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
