"""Distils a student from a teacher's traces, on one device. Without arguments: in the toy world.

    python train.py                                          # about two minutes on two CPU cores
    python train.py --student Qwen/Qwen2.5-0.5B --traces traces.jsonl --out runs/discord

--out becomes the Hugging Face folder of the trained student, with run.json (how it was made) and
log.jsonl (the log lines). After an interruption, the same command with --resume goes on.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import data
import evaluate
import loss
from model import BadInput, Config, Transformer, read_json

CHUNK = 1024  # so many supervised rows are V wide at a time
TOY = {"out": "runs/toy", "lr": 3e-3, "batch_size": 64, "grad_accum": 1, "steps": 800,
       "max_length": 64, "log_every": 100}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what
    add("--student", help="HF folder or Hub name; without it: the toy world")
    add("--traces", help="JSONL of traces; data.py says how they look")
    add("--out", help="folder of the run (toy world: runs/toy)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out")
    # objective
    add("--objective", default="discord", choices=loss.NAMES, help="see loss.py (default: discord)")
    add("--teacher", help="HF folder; needed by kl, rkl, todi, gkd and their discord- forms")
    add("--tau", type=float, default=loss.TAU, help="of the DisCorD weight (default: %(default)s)")
    add("--beta", type=float, default=0.5, help="of gkd: 0 is kl, 1 is rkl (default: 0.5)")
    # optimisation
    add("--epochs", type=float, default=3, help="passes over the traces (default: 3)")
    add("--steps", type=int, help="optimizer steps; if given, --epochs does not count")
    add("--batch-size", type=int, default=8, help="traces in a micro-batch (default: 8)")
    add("--grad-accum", type=int, default=4, help="micro-batches in a step (default: 4)")
    add("--lr", type=float, default=1e-5, help="peak; cosine down to a tenth (default: 1e-5)")
    add("--warmup", type=float, default=0.03, help="share of the steps (default: 0.03)")
    add("--weight-decay", type=float, default=0.0, help="of matrices (default: 0)")
    add("--clip", type=float, default=1.0, help="largest gradient norm (default: 1)")
    add("--max-length", type=int, default=2048, help="longer traces are left out (default: 2048)")
    # run
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the computation; "
        "weights and optimizer stay fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    add("--seed", type=int, default=0, help="of the order of the traces (default: 0)")
    add("--log-every", type=int, default=10, help="steps from log line to log line (default: 10)")
    add("--save-every", type=int, default=500, help="steps between checkpoints (default: 500)")
    args = parser.parse_args(argv)
    if args.student is None:
        parser.set_defaults(**TOY)
        args = parser.parse_args(argv)
    if (args.student is None) != (args.traces is None) or not args.out:
        parser.error("give --student, --traces and --out; or none of them, for the toy world")
    for name in ("tau", "epochs", "steps", "batch_size", "grad_accum", "lr", "clip", "max_length",
                 "log_every", "save_every"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: must be above 0")
    if not 0 <= args.beta <= 1 or not 0 <= args.warmup <= 1:
        parser.error("--beta and --warmup: must lie between 0 and 1")
    return args


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine from lr down to lr / 10."""
    warmup = round(args.warmup * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))


def backward(student: Transformer, batch: data.Batch, args: argparse.Namespace, tokens: int,
             vocab_size: int, teacher: Transformer | None = None) -> Tensor:
    """Adds one micro-batch's share of the gradient of sum(w * loss) / tokens, where `tokens` counts
    the supervised tokens of the whole step. Returns its sums of (w * loss, loss, w, w^2), [4].

    The head is V = 151 936 wide, so logits exist for CHUNK rows at a time: each chunk goes backward
    at once, as far as the rows of `hidden`; these go down the network after the last chunk."""
    hidden = student(batch.tokens).flatten(0, 1)[batch.rows]  # [N, D]; the prompt's rows stay out
    rows = hidden.detach().requires_grad_()
    with torch.no_grad():
        p_hidden = teacher(batch.tokens).flatten(0, 1)[batch.rows] if teacher else None
    sums = torch.zeros(4, dtype=torch.double, device=rows.device)
    for start in range(0, len(rows), CHUNK):
        part, p_logits = slice(start, start + CHUNK), None
        if teacher:
            with torch.no_grad():
                p_logits = teacher.logits(p_hidden[part])[:, :vocab_size]
        q_logits = student.logits(rows[part])[:, :vocab_size]  # some heads have unused rows
        p_logp = None if batch.p_logp is None else batch.p_logp[part]
        losses, w = loss.token_losses(args.objective, q_logits, batch.y[part], p_logits, p_logp,
                                      args.tau, args.beta)
        total = (w * losses).sum()
        (total / tokens).backward()
        sums += torch.stack([total, losses.sum(), w.sum(), w.square().sum()]).detach()
    hidden.backward(rows.grad)
    return sums


# ------------------------------------------------------------------------------- run and resume


def sha256(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def open_run(args: argparse.Namespace, facts: dict) -> dict:
    """run.json of --out: a new one; or with --resume the old one, if its options are the same."""
    out, file = Path(args.out), Path(args.out, "run.json")
    options = {key: value for key, value in vars(args).items() if key not in ("resume", "out")}
    if not file.exists():
        if out.exists() and any(out.iterdir()):
            raise BadInput(f"{out}: not empty, but no run of train.py; choose another --out")
        data.write_jsonl(file, [{**facts, "options": options}])
    run = read_json(file)
    for key, now in {**options, "traces_sha256": facts["traces_sha256"]}.items():
        before = {**run, **run["options"]}.get(key)
        if before != now:
            raise BadInput(f"{out}: cannot resume: {key} was {before} and is now {now}; use what "
                           "the run was started with, or choose another --out")
    return run


def save_checkpoint(out: Path, step: int, student: Transformer, optimizer) -> None:
    """All that a resumed run needs, with checksums. Written beside and renamed: whole or absent."""
    temporary, final = out / "checkpoint.tmp", out / f"checkpoint-{step:08}"
    shutil.rmtree(temporary, ignore_errors=True)
    student.save_pretrained(temporary)
    save_file({f"{name} {key}": value for name, parameter in student.named_parameters()
               for key, value in optimizer.state[parameter].items()},
              temporary / "optimizer.safetensors")  # a pickle from somebody else could run code
    data.write_jsonl(temporary / "sums.json", [{f.name: sha256(f) for f in temporary.iterdir()}])
    temporary.rename(final)
    for old in set(out.glob("checkpoint-*")) - {final}:
        shutil.rmtree(old)


def last_checkpoint(out: Path) -> Path | None:
    """The newest checkpoint of a run, its files checked against their checksums."""
    folder = max(out.glob("checkpoint-0*"), default=None)
    for name, expected in read_json(folder / "sums.json").items() if folder else ():
        if not (folder / name).exists() or sha256(folder / name) != expected:
            raise BadInput(f"{folder / name}: missing or damaged; delete {folder} to begin anew")
    return folder


# ---------------------------------------------------------------------------------------- train


def train(args: argparse.Namespace) -> dict:
    """One run, read from top to bottom. Returns its run.json."""
    # ---- what the objective needs
    name, weighted = loss.split_name(args.objective)
    if name != "sft" and not args.teacher:
        raise BadInput(f"--objective {args.objective} needs the teacher's whole distribution: give "
                       "--teacher; sft and discord do without a teacher in memory")
    if args.objective == "sft" and args.teacher:
        raise BadInput("--objective sft uses no --teacher; leave it out or choose another objective")
    out = Path(args.out)
    if (out / "run.json").exists() and not args.resume:
        raise BadInput(f"{out}: holds a run already; add --resume to continue it, or choose "
                       "another --out")

    # ---- models, traces, folder
    checkpoint = last_checkpoint(out)
    student, tokenizer = data.load(checkpoint or args.student, device=args.device)
    student.compute_dtype, teacher = getattr(torch, args.dtype), None
    if args.teacher:
        teacher, other = data.load(args.teacher, getattr(torch, args.dtype), args.device)
        if other.vocab != tokenizer.vocab:
            raise BadInput(f"vocabulary mismatch: {args.teacher} and {args.student} have different "
                           "tokenizers, so their probabilities are not of the same tokens")
    examples, dropped = data.load_traces(args.traces, tokenizer, args.max_length,
                                         teacher=weighted and teacher is None)
    args.steps = args.steps or math.ceil(
        args.epochs * len(examples) / (args.batch_size * args.grad_accum))
    run = open_run(args, {
        "commit": commit(), "torch": torch.__version__, "python": sys.version.split()[0],
        "traces": len(examples), "dropped": dropped, "traces_sha256": sha256(Path(args.traces)),
        "stored_as": student.config.raw.get("dtype") or student.config.raw.get("torch_dtype")})
    if "seconds" in run:
        print(f"{out}: this run is finished")
        return run

    # ---- optimizer, in which norms and biases do not decay
    matrices = [parameter for parameter in student.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in student.parameters() if parameter.dim() != 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, betas=(0.9, 0.95), fused=True)
    first, log = 0, out / "log.jsonl"
    if checkpoint:
        first = int(checkpoint.name.removeprefix("checkpoint-"))
        saved = load_file(checkpoint / "optimizer.safetensors", device=args.device)
        for name, parameter in student.named_parameters():
            optimizer.state[parameter] = {key: saved[f"{name} {key}"]
                                          for key in ("step", "exp_avg", "exp_avg_sq")}
    if log.exists():  # lines behind the checkpoint will come again
        data.write_jsonl(log, [row for _, row in data.read_jsonl(log) if row["step"] <= first])

    # ---- header
    tokens = sum(len(example.tokens) - example.prompt for example in examples)
    print(f"\n{out}: {args.objective} from step {first} to {args.steps}; commit {run['commit']}, "
          f"torch {run['torch']}, {args.device}, {args.dtype}\n"
          f"  student {args.student}: {sum(p.numel() for p in student.parameters()):,} parameters\n"
          f"  traces  {args.traces}: {len(examples):,} used with {tokens:,} supervised tokens; left "
          f"out: {', '.join(f'{n} {why}' for why, n in dropped.items()) or 'none'}\n"
          f"  options {' '.join(f'{k}={v}' for k, v in run['options'].items() if v is not None)}\n"
          f"  sample  {data.show(examples[0], tokenizer, sys.stdout.isatty())}")

    # ---- loop
    begin = last = time.perf_counter()
    pending: list[tuple[Tensor, list[str]]] = []  # of each step since the last log line
    progress = tqdm(range(first, args.steps), initial=first, total=args.steps, disable=None)
    for step in progress:
        rate = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = data.step_batches(examples, step, args.batch_size, args.grad_accum, args.seed)
        tokens = sum(len(batch.y) for batch in batches)
        sums = sum(backward(student, batch.to(args.device), args, tokens, tokenizer.vocab_size,
                            teacher) for batch in batches)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad()
        pending.append((torch.cat([sums, sums.new_tensor([tokens]), norm[None]]),
                        [name for batch in batches for name in batch.ids]))

        # ---- log, check, save
        done, save = step + 1, (step + 1) % args.save_every == 0
        if done % args.log_every and not save and done < args.steps:
            continue
        rows = torch.stack([row for row, _ in pending]).tolist()  # the interval's only wait
        for i, row in enumerate(rows):
            if not all(map(math.isfinite, row)):
                raise BadInput(f"{out}: loss or gradient is not finite at step "
                               f"{done - len(rows) + i + 1}, traces {', '.join(pending[i][1])}; the "
                               f"last checkpoint is good. Lower --lr, or look at these traces")
        total, plain, w, w2, tokens, norms = map(sum, zip(*rows, strict=True))
        now = time.perf_counter()
        line = {"step": done, "loss": total / tokens, "unweighted": plain / tokens,
                "weight": w / tokens, "ess": w * w / (w2 * tokens), "lr": rate,
                "grad_norm": norms / len(rows),
                "tokens_per_s": tokens / (now - last), "memory_gb": peak_memory_gb(args.device)}
        pending, last = [], now
        with open(log, "a") as file:
            file.write(json.dumps(line) + "\n")
        progress.write(f"step {done:5}/{args.steps}  loss {line['loss']:.4f}  unweighted "
                       f"{line['unweighted']:.4f}  w {line['weight']:.2f}  ess {line['ess']:.2f}  "
                       f"norm {line['grad_norm']:.2f}  lr {rate:.1e}  {line['tokens_per_s']:,.0f} "
                       f"tok/s  {line['memory_gb']:.2f} GB", file=sys.stdout)
        if save and done < args.steps:
            save_checkpoint(out, done, student, optimizer)

    # ---- the result, in the dtype that the student was stored in
    student.to(getattr(torch, run["stored_as"] or "float32")).save_pretrained(out)
    run["seconds"] = round(time.perf_counter() - begin, 1)
    data.write_jsonl(out / "run.json", [run])
    for folder in out.glob("checkpoint*"):
        shutil.rmtree(folder)
    return run


def commit() -> str:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = shutil.which("git") and subprocess.run(git, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found and found.returncode == 0 else "unknown"


def peak_memory_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    if sys.platform == "win32":
        return 0.0
    import resource  # absent on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere


# ------------------------------------------------------------------------------------- toy world


def blank(folder: Path, layers: int, width: int, seed: int) -> str:
    """An untrained Qwen2 with the toy tokenizer, as a Hugging Face folder."""
    if not (folder / "config.json").exists():
        words = data.save_toy_tokenizer(folder)
        torch.manual_seed(seed)
        Transformer(Config({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": words,
            "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
            "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
            "max_position_embeddings": 64})).save_pretrained(folder)
    return str(folder)


def toy(args: argparse.Namespace) -> list[dict]:
    """Builds the toy world in --out with what serves real models: Hugging Face folders, JSONL traces,
    `train` and `evaluate.answers`. Finished parts are reused. Returns the rows of the table."""
    root, home = Path(args.out), Path(args.out) / f"seed{args.seed}"

    def build(folder: Path, student: str, traces: Path, objective: str, steps: int, *more) -> str:
        common = {"--student": student, "--traces": traces, "--out": folder, "--steps": steps,
                  "--objective": objective, "--batch-size": 64, "--grad-accum": 1,
                  "--max-length": 64, "--log-every": 100, "--device": args.device, "--lr": 5e-3}
        train(parse_args(["--resume", *(str(x) for pair in common.items() for x in pair), *more]))
        return str(folder)

    def lessons(file: Path, count: int, **kind) -> Path:
        if not file.exists():
            rng = random.Random(str(file.relative_to(root)))
            data.write_jsonl(file, (data.toy_trace(rng, **kind) for _ in range(count)))
        return file

    # ---- a teacher of two layers that skips steps, a student of one layer that has seen none skipped
    teacher = build(root / "teacher", blank(root / "blank-teacher", 2, 96, seed=0),
                    lessons(root / "teacher-lessons.jsonl", 30000, skip=0.6), "sft", 1500)
    student = build(home / "student", blank(home / "blank-student", 1, 48, seed=args.seed + 1),
                    lessons(home / "student-lessons.jsonl", 8000, times=0.1), "sft", 250)

    # ---- the teacher answers the training problems; train() takes its right answers
    problems, traces = lessons(home / "problems.jsonl", 4000), home / "traces.jsonl"
    if not traces.exists():
        data.write_jsonl(traces, evaluate.answers(
            *data.load(teacher, device=args.device), data.load_problems(problems), temperature=1.0,
            max_new_tokens=12, batch_size=500, seed=args.seed))

    # ---- the student is distilled, by plain imitation and by the chosen objective
    models = {"teacher": teacher, "student before": student}
    for name in dict.fromkeys(("sft", args.objective)):
        more = ["--lr", args.lr, "--seed", args.seed, "--tau", args.tau, "--beta", args.beta,
                "--batch-size", args.batch_size, "--grad-accum", args.grad_accum]
        more += ["--teacher", teacher] if loss.split_name(name)[0] != "sft" else []
        models[name] = build(home / f"{name}-tau{args.tau:g}-lr{args.lr:g}", student, traces, name,
                             args.steps, *map(str, more))

    # ---- all four answer problems that none has seen
    table, held_out = [], data.load_problems(lessons(root / "held-out.jsonl", 1000))
    for name, folder in models.items():
        greedy, sampled = (evaluate.summarise(evaluate.answers(
            *data.load(folder, device=args.device), held_out, temperature=temperature,
            max_new_tokens=12, batch_size=500)) for temperature in (0.0, 1.0))
        table.append({"model": name, "greedy": greedy["accuracy"], "sampled": sampled["accuracy"],
                      "length": sampled["mean_tokens"],
                      "seconds": read_json(Path(folder, "run.json"))["seconds"]})
    data.write_jsonl(home / "table.jsonl", table)
    print(f"\naccuracy on {len(held_out)} held-out problems (standard error at most 0.016), seed "
          f"{args.seed}\n{'':16}{'greedy':>8}{'sampled':>9}{'mean length':>13}{'training':>11}")
    for row in table:
        print(f"{row['model']:16}{row['greedy']:8.3f}{row['sampled']:9.3f}{row['length']:13.1f}"
              f"{row['seconds']:9.1f} s")
    return table


if __name__ == "__main__":
    options = parse_args()
    try:
        train(options) if options.student else toy(options)
    except BadInput as error:
        raise SystemExit(f"error: {error}") from None
