"""DASD's three stages in the toy, beside SFT and DisCorD, by python tests/study/dasd.py [SEED...]

The same teacher's traces for all (one answer to each problem at temperature 0.6, four at 1), the
same 800 steps of 64, each objective at its best rate. Not a test: about two minutes a seed, into
runs/toy/seedS/dasd.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import evaluate
import train

LEARN = "--batch-size 64 --grad-accum 1 --max-length 64 --log-every 100 --resume"
ANSWER = "--max-new-tokens 12 --batch-size 500 --resume"
ROWS = {"low": "1   T=0.6 (400 steps)", "high": "1   then T=1 (400)",
        "selected-low": "1+2 selected T=0.6 (400)", "selected": "1+2 then selected T=1 (400)",
        "mixed": "1-3 400 + 300, then mixed and selected T=1 (100)",
        "sft": "SFT on all traces", "discord": "DisCorD on all traces"}


def stages(seed: int) -> dict[str, tuple[float, float]]:
    """{row: (greedy, sampled accuracy)} on the held-out problems."""
    train.toy(train.parse_args(["--seed", str(seed)]))
    root = Path("runs/toy")
    home, out = root / f"seed{seed}", root / f"seed{seed}" / "dasd"

    def run(main, line: str) -> None:
        main([word.format(root=root, home=home, out=out, seed=seed) for word in line.split()])

    def learn(name: str, student: str, steps: int, traces: str, objective: str = "sft") -> None:
        lr = train.TOY_LR.get(objective, 1e-3)
        run(lambda words: train.train(train.parse_args(words)),
            f"--student {student} --traces {{out}}/{traces}.jsonl --objective {objective} --steps "
            f"{steps} --lr {lr} --seed {{seed}} --out {{out}}/{name} " + LEARN)

    def join(name: str, *parts: str) -> None:
        data.write_jsonl(out / f"{name}.jsonl", [
            record for part in parts for _, record in data.read_jsonl(out / f"{part}.jsonl")])

    teacher = "accuracy --model {root}/teacher --seed {seed} " + ANSWER
    run(evaluate.main, teacher + " --benchmark {home}/problems.jsonl --temperature 0.6 --out "
                                 "{out}/low.jsonl")
    run(evaluate.main, teacher + " --benchmark {home}/problems.jsonl --temperature 1 --samples 4 "
                                 "--out {out}/high.jsonl")
    join("all", "low", "high")
    # 1. low temperature, then high
    learn("low", "{home}/student", 400, "low")
    learn("high", "{out}/low", 400, "high")
    # 2. of both, the traces with most steps that the student would not have written
    for name, source, keep in (("selected-low", "low", 0.5), ("selected", "high", 0.25)):
        run(data.main, f"select --traces {{out}}/{source}.jsonl --student {{home}}/student --keep "
                       f"{keep} --separator \\s --out {{out}}/{name}.jsonl")
    learn("selected-low", "{home}/student", 400, "selected-low")
    learn("selected", "{out}/selected-low", 400, "selected")
    # 3. the student begins, the teacher completes; with ordinary traces
    learn("selected-300", "{out}/selected-low", 300, "selected")
    run(evaluate.main, "accuracy --model {out}/selected-300 --benchmark {home}/problems.jsonl "
                       "--temperature 1 --seed {seed} --out {out}/answers.jsonl " + ANSWER)
    run(data.main, "mix --answers {out}/answers.jsonl --traces {out}/low.jsonl --student "
                   "{out}/selected-300 --continue-all --seed {seed} "  # none was cut off
                   "--out {out}/mixed-problems.jsonl")
    run(evaluate.main, teacher + " --benchmark {out}/mixed-problems.jsonl --temperature 0.6 --out "
                                 "{out}/completed.jsonl")
    join("mixed", "completed", "selected")
    learn("mixed", "{out}/selected-300", 100, "mixed")
    # what they are compared with
    learn("sft", "{home}/student", 800, "all")
    learn("discord", "{home}/student", 800, "all", "discord")
    found = {}
    for name in ROWS:
        scores = []
        for temperature in (0, 1):
            file = f"{{out}}/{name}/held-out-{temperature}.jsonl"
            run(evaluate.main, f"accuracy --model {{out}}/{name} --temperature {temperature} --out "
                               f"{file} --benchmark {{root}}/held-out.jsonl {ANSWER}")
            records = evaluate.read_answers(file.format(out=out))
            scores.append(evaluate.summarize(records)["accuracy"])
        found[name] = tuple(scores)
    return found


if __name__ == "__main__":
    seeds = sys.argv[1:] or ["0"]
    results = [stages(int(seed)) for seed in seeds]
    print(f"\n| seeds {' '.join(seeds)} | greedy | sampled, T = 1 |\n|---|---|---|")
    for row, text in ROWS.items():
        values = np.array([result[row] for result in results])
        spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(2)
        print(f"| {text} |", " | ".join(f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in
                                        zip(values.mean(0), spread, strict=True)), "|")
