"""Distils a student from a teacher's traces on one device. Without arguments: in the toy world.

    python train.py                                          # about a minute on two CPU cores
    python train.py --student Qwen/Qwen2.5-0.5B --traces traces.jsonl --out runs/discord

--out becomes the Hugging Face folder of the trained student, with run.json (how it was made) and
log.jsonl (the log lines). After an interruption, the same command with --resume goes on.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from tqdm import tqdm

import data
import evaluate
import loss
from model import BadInput, Transformer, check, read_json

CHUNK = 256  # so many supervised rows are V wide at a time
WARMUP, CLIP = 0.03, 1.0  # share of the steps; largest norm of the gradient. No weight decay
TOY = {"out": "runs/toy", "lr": None, "batch_size": 64, "grad_accum": 1, "steps": 800,
       "max_length": 64, "log_every": 100}
TOY_LR = {"sft": 3e-2, "kl": 3e-2, "todi": 3e-2, "gkd": 3e-2, "rkl": 3e-3,
          "discord": 1e-3}


STOP: list[int] = []  # signals that have come


def stop(number: int, frame) -> None:
    """The first SIGINT or SIGTERM lets the step finish and be saved; the next one interrupts."""
    if STOP:
        raise KeyboardInterrupt
    STOP.append(number)
    os.write(2, b"\nsaving after this step; once more stops at once\n")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count, real = parser.add_argument, data.number(int), data.number(float)  # above 0
    share = data.number(float, 0, 1)
    add("--student", help="HF folder or Hub name; without it: the toy world")
    add("--traces", help="JSONL of traces; data.py says how they look")
    add("--out", help="folder of the run (toy world: runs/toy)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    add("--objective", default="discord", choices=loss.NAMES, help="see loss.py (default: discord)")
    add("--teacher", help="HF folder; needed by kl, rkl, todi, gkd and their discord- forms")
    add("--tau", type=real, default=loss.TAU, help="of the DisCorD weight (default: %(default)s)")
    add("--beta", type=share, default=0.5, help="of gkd: 0 is kl, 1 is rkl (default: 0.5)")
    add("--on-policy", type=share, default=0.0,
        help="share of the traces that the student writes anew each time (gkd; default: 0)")
    add("--epochs", type=real, default=3, help="passes over the traces (default: 3)")
    add("--steps", type=count, help="optimizer steps; if given, --epochs does not count")
    add("--batch-size", type=count, default=8, help="traces in a micro-batch (default: 8)")
    add("--grad-accum", type=count, default=4, help="micro-batches in a step (default: 4)")
    add("--batch-tokens", type=count, help="cut the step (batch-size x grad-accum traces) into "
        "micro-batches of at most so many tokens, padding included, instead")
    add("--recompute", action="store_true", help="activations are computed again on the way back, "
        "not kept: less memory, a third more time")
    add("--compile", action="store_true", help="torch.compile of the blocks: a minute at the start")
    add("--lr", type=real, default=1e-5, help="peak; cosine down to a tenth (default: 1e-5; toy "
        "world: the best of tests/study.py)")
    add("--max-length", type=count, default=2048, help="longer traces are left out (default: 2048)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--seed", type=data.number(int, 0), default=0, help="order of the traces (default: 0)")
    add("--log-every", type=count, default=10, help="steps from log line to log line (default: 10)")
    add("--save-every", type=count, default=500, help="steps between checkpoints (default: 500)")
    args = parser.parse_args(argv)
    if args.student is None:
        parser.set_defaults(**TOY)
        args = parser.parse_args(argv)
    if (args.student is None) != (args.traces is None) or not args.out:
        parser.error("give --student, --traces and --out; or none of them, for the toy world")
    return args


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine from lr down to lr / 10."""
    warmup = round(WARMUP * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (args.steps - warmup)))


def recomputed(block: torch.nn.Module, *args) -> Tensor:
    """Activation checkpointing (arXiv 1604.06174) of a block. On the way back it must be computed
    with the weights of now, which `backward` has cast and which are gone by then: they go along."""
    return torch.utils.checkpoint.checkpoint(
        functional_call, block, dict(block.named_parameters()), args, use_reentrant=False)


def backward(student: Transformer, batch: data.Batch, args: argparse.Namespace, tokens: int,
             vocab_size: int, teacher: Transformer | None = None) -> Tensor:
    """Adds one micro-batch's share of the gradient of sum(w * loss) / tokens, where `tokens` counts
    the supervised tokens of the whole step. Returns its sums of (w * loss, loss, w, w^2), [4].

    The head is V = 151 936 wide, so logits exist for CHUNK rows at a time: each chunk goes backward
    at once, as far as the rows of `hidden`; these go down the network after the last chunk."""
    weights = {name: p.to(getattr(torch, args.dtype)) for name, p in student.named_parameters()}
    hidden = functional_call(student, weights, batch.tokens)  # fp32 weights compute in args.dtype
    hidden = hidden.flatten(0, 1)[batch.rows]  # [N, D]; the prompt's rows stay out
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])[:vocab_size]
    p_hidden = teacher(batch.tokens).flatten(0, 1)[batch.rows] if teacher else None
    rows = hidden.detach().requires_grad_()
    sums = torch.zeros(4, dtype=torch.double, device=rows.device)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        p_logits = teacher.logits(p_hidden[part])[:, :vocab_size] if teacher else None
        losses, w = loss.token_losses(
            args.objective, F.linear(rows[part], head), batch.y[part], p_logits,
            None if batch.p_logp is None else batch.p_logp[part], args.tau, args.beta)
        total = (w * losses).sum()
        (total / tokens).backward()
        sums += torch.stack([total, losses.sum(), w.sum(), w.square().sum()]).detach()
    if rows.grad is not None:  # something was supervised
        hidden.backward(rows.grad)
    return sums


def written_by(student: Transformer, step: int, args: argparse.Namespace, vocab_size: int,
               examples: list[data.Example], first: int) -> list[data.Example]:
    """GKD's costly part (arXiv 2306.13649): a share of the traces, chosen at random, gives way to
    what the student now answers at temperature 1, at most as long as the longest one here."""
    if not args.on_policy:
        return examples
    seeds = [(args.seed, step, first + i) for i in range(len(examples))]
    own = [i for i, seed in enumerate(seeds)
           if np.random.default_rng((*seed, 1)).random() < args.on_policy]
    prompts = [examples[i].tokens[:examples[i].prompt].tolist() for i in own]
    longest = max(len(example.tokens) - example.prompt for example in examples)
    drawn = student.sample(prompts, longest, 1.0, [seeds[i] for i in own],
                           vocab_size=vocab_size) if own else []
    for i, prompt, (ids, _) in zip(own, prompts, drawn, strict=True):
        examples[i] = data.Example(examples[i].id, np.array(prompt + ids), len(prompt), None)
    return examples


def open_run(args: argparse.Namespace) -> dict:
    """run.json of --out, if it is there and has these options; else only the options."""
    out, file = Path(args.out), Path(args.out, "run.json")
    options = {key: value for key, value in vars(args).items() if key not in ("resume", "out")}
    options["traces_sha256"] = data.sha256(args.traces)
    if not file.exists():
        check(not out.exists() or (out.is_dir() and all(
            one.suffix == ".tmp" for one in out.iterdir())),
              f"{out}: not empty, but no run of train.py; choose another --out")
        return {"options": options}
    check(args.resume, f"{out}: holds a run already; add --resume to continue it, or choose "
          "another --out")
    run = read_json(file)
    data.unchanged(file, run["options"], options)
    return run


def clear(out: Path, but: Path | None = None) -> None:
    """Removes checkpoints, and what a killed process was just saving."""
    for folder in {*out.glob("checkpoint*"), *out.glob(".saving-*")} - {but}:
        shutil.rmtree(folder)


def save_checkpoint(out: Path, step: int, student: Transformer, optimizer) -> None:
    """All that a resumed run needs, with checksums. Written beside and renamed: whole or absent."""
    final = out / f"checkpoint-{step:08}"
    with data.writing(final) as folder:
        student.save_pretrained(folder)
        save_file({f"{name} {key}": value for name, parameter in student.named_parameters()
                   for key, value in optimizer.state[parameter].items()},
                  folder / "optimizer.safetensors")  # a pickle from somebody else could run code
        sums = {file.name: data.sha256(file) for file in folder.iterdir()}
        sums["../run.json"] = data.sha256(out / "run.json")  # it belongs to this run
        data.write_jsonl(folder / "sums.json", [sums])
    if hasattr(os, "sync"):  # not on Windows
        os.sync()  # on the disk, for a machine that goes, before the last one is removed
    student.folder = final  # a later save takes the tokenizer from here: its source may be removed
    clear(out, but=final)


def last_checkpoint(out: Path) -> Path | None:
    folder = max(out.glob("checkpoint-????????"), default=None)
    for name, expected in read_json(folder / "sums.json").items() if folder else ():
        file = (folder / name).resolve()
        check(file.exists() and data.sha256(file) == expected, f"{file}: missing, damaged or of "
              f"another run; delete {folder} to begin anew")
    return folder


def train(args: argparse.Namespace) -> dict:
    """One run, in a folder that no other process writes. Returns its run.json."""
    with data.alone(args.out):
        return distil(args)


def distil(args: argparse.Namespace) -> dict:
    """The run, read from top to bottom."""
    # ---- what the objective needs
    out, (name, weighted) = Path(args.out), loss.split_name(args.objective)
    check(name == "sft" or args.teacher, f"--objective {args.objective} needs the teacher's whole "
          "distribution: give --teacher; sft and discord do without a teacher in memory")
    check(name != "sft" or not args.on_policy, f"--on-policy: {args.objective} learns from the "
          "teacher's tokens; kl, rkl, todi and gkd (and --teacher) can judge the student's own")
    check(args.objective != "sft" or not args.teacher, "--objective sft uses no --teacher")
    check(not args.compile or shutil.which(os.environ.get("CXX", "g++")), "--compile needs a C++ "
          "compiler: install g++, or name another in the environment variable CXX")
    run = open_run(args)
    if "seconds" in run:
        clear(out)
        print(f"{out}: this run is finished")
        return run

    # ---- models, traces
    checkpoint, teacher = last_checkpoint(out), None
    student, tokenizer = data.load(checkpoint or args.student, device=args.device)
    if args.recompute:
        student.run = recomputed
    for block in student.model.layers if args.compile else ():
        block.compile()  # one graph for all of them
    if args.teacher:
        teacher, other = data.load(args.teacher, args.dtype, args.device)
        teacher.requires_grad_(False)
        check(other.vocab == tokenizer.vocab, f"vocabulary mismatch: {args.teacher} and "
              f"{args.student} have different tokenizers, so p and q are not of the same tokens")
    examples, dropped = data.load_traces(args.traces, tokenizer, args.max_length,
                                         teacher=weighted and teacher is None)
    size = args.batch_size * args.grad_accum  # traces in a step
    args.steps = args.steps or math.ceil(args.epochs * len(examples) / size)
    if "steps" not in run:
        run |= {
            "commit": evaluate.commit(), "torch": torch.__version__,
            "python": sys.version.split()[0], "traces": len(examples), "dropped": dropped,
            "steps": args.steps, "sample": data.show(examples[0], tokenizer, color=False),
            "stored_as": student.config.raw.get("dtype") or student.config.raw.get("torch_dtype")}
        data.write_jsonl(out / "run.json", [run])

    # ---- optimizer
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, (0.9, 0.95), weight_decay=0.0,
                                  fused=True)
    first, log = 0, out / "log.jsonl"
    if checkpoint:
        first = int(checkpoint.name.removeprefix("checkpoint-"))
        saved = load_file(checkpoint / "optimizer.safetensors", device=args.device)
        for name, parameter in student.named_parameters():
            optimizer.state[parameter] = {key: saved[f"{name} {key}"]
                                          for key in ("step", "exp_avg", "exp_avg_sq")}
    if log.exists():  # lines behind the checkpoint will come again
        data.cut_half_line(log)
        data.write_jsonl(log, [row for _, row in data.read_jsonl(log) if row["step"] <= first])

    # ---- header
    tokens = sum(len(example.tokens) - example.prompt for example in examples)
    left_out = ", ".join(f"{count} {why}" for why, count in dropped.items()) or "none"
    print(f"\n{out}: {args.objective}, steps {first} to {args.steps}; commit {run['commit']}, "
          f"torch {run['torch']}, python {run['python']}, {torch.get_num_threads()} threads\n"
          f"  student  {args.student}: {sum(p.numel() for p in student.parameters()):,} weights\n"
          f"  traces   {args.traces}: {len(examples):,}, {tokens:,} supervised tokens; left out: "
          f"{left_out}\n"
          f"  a step   {args.batch_size} x {args.grad_accum} traces, about "
          f"{tokens / len(examples) * size:,.0f} supervised tokens; {args.steps} steps are "
          f"{args.steps * size / len(examples):.1f} passes over the traces\n"
          "  options  " + " ".join(f"{k}={v}" for k, v in run["options"].items() if v is not None),
          f"\n  sample   {data.show(examples[0], tokenizer, sys.stdout.isatty())}")

    # ---- loop
    begin, last, writing = time.perf_counter(), time.perf_counter(), 0.0  # seconds
    pending: list[tuple[Tensor, list[str]]] = []  # of the steps since the last log line
    progress = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=None)
    for step in progress:
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        waited = time.perf_counter()
        batches = data.step_batches(
            examples, step, args.batch_size, args.grad_accum, args.seed,
            partial(written_by, student, step, args, tokenizer.vocab_size), args.batch_tokens)
        writing += time.perf_counter() - waited
        tokens = sum(len(batch.y) for batch in batches)
        sums = torch.stack([backward(student, batch.to(args.device), args, tokens,
                                     tokenizer.vocab_size, teacher) for batch in batches]).sum(0)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        pending.append((torch.cat([sums, sums.new_tensor([tokens]), norm[None]]),
                        [name for batch in batches for name in batch.ids]))

        # ---- log, check, save
        done = step + 1
        save = done < args.steps and (STOP or done % args.save_every == 0)
        if done % args.log_every and not save and done < args.steps:
            continue
        rows = torch.stack([row for row, _ in pending]).tolist()  # the interval's only wait
        for i, (row, (_, ids)) in enumerate(zip(rows, pending, strict=True), done - len(rows)):
            if not all(map(math.isfinite, row)):
                raise BadInput(f"{out}: loss or gradient is not finite at step {i + 1}, traces "
                               f"{', '.join(ids)}; the last good checkpoint: "
                               f"{last_checkpoint(out) or 'none yet'}. Begin anew with a lower "
                               "--lr, or without these traces")
        total, plain, w, w2, tokens, norms = map(sum, zip(*rows, strict=True))
        line = {"step": done, "loss": total / tokens, "unweighted": plain / tokens,
                "weight": w / tokens, "ess": w * w / (w2 * tokens), "norm": norms / len(rows),
                "lr": optimizer.param_groups[0]["lr"], "gb": evaluate.peak_memory_gb(args.device),
                "tok/s": round(tokens / (time.perf_counter() - last))}
        if args.on_policy:  # its cost: the share of the time
            line["sampling"] = writing / (time.perf_counter() - last)
        pending, last, writing = [], time.perf_counter(), 0.0
        with data.writable(log), open(log, "a") as file:
            file.write(json.dumps(line) + "\n")
        progress.write(" ".join(f"{k} {v:<8.5g}" for k, v in line.items()).rstrip(), sys.stdout)
        if save:
            save_checkpoint(out, done, student, optimizer)
        if save and STOP:
            raise KeyboardInterrupt(f"{signal.Signals(STOP[0]).name}: step {done} is saved in "
                                    f"{out}; the same command with --resume goes on")

    # ---- the result, in the dtype that the student came in
    with data.writable(out):
        student.to(getattr(torch, str(run["stored_as"]), torch.float32)).save_pretrained(out)
    run["seconds"] = round(time.perf_counter() - begin, 1)
    data.write_jsonl(out / "run.json", [run])
    clear(out)
    return run


def toy(args: argparse.Namespace) -> None:
    """Builds the toy world in --out with the commands of real models; what is there is reused."""
    root, home, plain = Path(args.out), Path(args.out, f"seed{args.seed}"), vars(parse_args([]))
    data.build_toy(root, args.seed)

    def fit(student: Path, traces: Path, out: Path, options: dict) -> None:
        train(argparse.Namespace(**plain | {"device": args.device} | options | {
            "student": str(student), "traces": str(traces), "out": str(out), "resume": True}))

    def answer(model: Path, benchmark: Path, **options) -> None:
        options |= {"model": model, "benchmark": benchmark, "device": args.device}
        evaluate.main(["accuracy", "--resume", "--batch-size=500", *(
            f"--{key.replace('_', '-')}={value}" for key, value in options.items())])

    # a teacher of two layers that skips steps; a student of one layer, which never saw it done
    fit(root / "blank-teacher", root / "lessons.jsonl", root / "teacher",
        {"objective": "sft", "steps": 2000, "lr": 5e-3})
    fit(home / "blank-student", home / "lessons.jsonl", home / "student",
        {"objective": "sft", "steps": 300, "lr": 5e-3})
    # the teacher answers the training problems: its right answers are the traces
    answer(root / "teacher", home / "problems.jsonl", temperature=1, max_new_tokens=12,
           seed=args.seed, out=home / "traces.jsonl")
    # the student learns from them, by plain imitation and by the chosen objective
    runs = [root / "teacher", home / "student"]
    for name in dict.fromkeys(("sft", args.objective)):
        whole = loss.split_name(name)[0] != "sft"  # the teacher's distribution is needed
        options = vars(args) | {"objective": name,
                                "teacher": str(root / "teacher") if whole else None}
        if name == "sft":
            options |= {key: plain[key] for key in ("tau", "beta", "on_policy")}
        changed = [f"{key}={value}" for key, value in options.items() if value != plain[key]
                   and key not in ("objective", "teacher", "out", "resume", "seed", "device")]
        runs.append(home / "-".join([name, *changed]))
        options["lr"] = args.lr or TOY_LR.get(name, TOY_LR["discord"])
        fit(home / "student", home / "traces.jsonl", runs[-1], options)
    for run, temperature in itertools.product(runs, (0, 1)):  # all answer unseen problems
        answer(run, root / "held-out.jsonl", temperature=temperature, max_new_tokens=64)
    evaluate.main(["report", *map(str, runs)])


if __name__ == "__main__":
    options = parse_args()
    data.one_line_errors(train if options.student else toy, options, on_signal=stop)
