"""Distill a student from a teacher's traces on one device. Without arguments: a toy world.

    python train.py                                   # about two minutes on two CPU cores
    python train.py --student Qwen/Qwen2.5-0.5B --traces traces.jsonl --out runs/discord

--out becomes the Hugging Face folder of the trained student, with run.json (how it was
made) and log.jsonl (the log lines). To resume an interrupted run, add --resume.
"""

import argparse
import hashlib
import math
import os
import resource
import shutil
import sys
import time
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import data
import evaluate
import loss
from model import Transformer, check, read_json

CHUNK = {"cpu": 256, "cuda": 1024}  # rows that have logits at the same time
WARMUP = 0.03  # share of the steps
CLIP = 1.0  # largest norm of the gradient
compiled = cache(lambda: torch.compile(loss.token_losses, dynamic=True))  # a slow import
TOY_DEFAULTS = {"out": "runs/toy", "lr": None, "batch_size": 64, "grad_accum": 1,
                "steps": 800, "max_length": 64, "log_every": 100, "dtype": "float32"}
TOY_LR = {"sft": 3e-2, "kl": 3e-2, "todi": 3e-2, "gkd": 3e-2,  # the best of a grid
          "rkl": 3e-3, "discord": 1e-3}

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    positive, share = data.number(int, 1), data.number(float, 0, 1)

    add = parser.add_argument_group("what").add_argument
    add("--student", help="HF folder or Hub name; without it: the toy world")
    add("--traces", help="JSONL of traces; data.py shows one")
    add("--out", help="folder of the run (toy: runs/toy)")
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")

    add = parser.add_argument_group("objective").add_argument
    add("--objective", default="discord", choices=loss.NAMES, help="see loss.py")
    add("--teacher", help="HF folder or Hub name; sft and discord need none")
    add("--tau", type=data.number(float, 1e-9), default=loss.TAU,
        help="temperature of the DisCorD weight; lower is stricter, inf is SFT; "
        "default: %(default)s")
    add("--beta", type=share, default=0.5, help="of gkd: 0 is kl, 1 is rkl (default: 0.5)")
    add("--on-policy", type=share, default=0.0,
        help="share of the traces that the student rewrites, for gkd (default: 0)")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=data.number(float, 1e-9, 1e6), default=3, help="default: 3")
    add("--steps", type=positive, help="optimizer steps; replaces --epochs")
    add("--batch-size", type=positive, default=8, help="traces a micro-batch (default: 8)")
    add("--grad-accum", type=positive, default=4, help="micro-batches a step (default: 4)")
    add("--lr", type=data.number(float, 1e-12, 1), default=1e-5,
        help="peak, then cosine to a tenth (default: 1e-5; toy: the best of a grid)")
    add("--max-length", type=positive, default=2048,
        help="tokens; longer traces are dropped (default: 2048)")
    add("--seed", type=data.number(int, 0), default=0, help="order of traces (default: 0)")

    add = parser.add_argument_group("machine").add_argument
    data.add_model_options(add)
    add("--recompute", action="store_true", help="recompute activations to save memory")
    add("--compile", action="store_true", help="torch.compile the blocks (needs g++)")
    add("--save-dtype", choices=["float32", "bfloat16"], default="float32",
        help="of the result; bfloat16 rounds small updates away (default: float32)")
    add("--log-every", type=positive, default=10, help="steps per line (default: 10)")
    add("--save-every", type=positive, default=500, help="per checkpoint (default: 500)")
    args = data.parse_args(parser, argv)
    if args.student is None:
        parser.set_defaults(**TOY_DEFAULTS)
        args = data.parse_args(parser, argv)
    if (args.student is None) != (args.traces is None) or not args.out:
        parser.error("give --student, --traces and --out; or none, for the toy world")
    return args

# ---- One optimizer step
def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine from lr down to lr / 10."""
    warmup = round(WARMUP * args.steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / (args.steps - warmup)
    return args.lr * (0.55 + 0.45 * math.cos(math.pi * progress))

def recompute_block(block: torch.nn.Module, *args: object) -> Tensor:
    """Activation checkpointing (arXiv 1604.06174). The recomputation needs the cast weights
    of `backward`, so they are passed as arguments."""
    weights = dict(block.named_parameters())
    return checkpoint(functional_call, block, weights, args, use_reentrant=False,
                      preserve_rng_state=False)  # nothing in a block is random

def backward(student: Transformer, batch: data.Batch, args: argparse.Namespace, tokens: int,
             teacher: Transformer | None = None) -> Tensor:
    """Add one micro-batch's share to the gradient of sum(w * loss) / tokens.

    `tokens` counts the supervised tokens of the whole step. Returns the sums of w * loss,
    loss, w and w^2: [4]. Logits are V = 151,936 wide, so CHUNK rows have them at a time. A
    chunk goes backward to the hidden states; these go through the network at the end."""
    dtype = getattr(torch, args.dtype)  # of the computation; the weights are fp32
    weights = {name: weight.to(dtype) for name, weight in student.named_parameters()}
    hidden = functional_call(student, weights, batch.tokens).flatten(0, 1)  # [B * T, D]
    hidden = hidden[batch.positions]  # [N, D]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    if teacher is not None:
        p_hidden = teacher(batch.tokens).flatten(0, 1)[batch.positions]
    rows = hidden.detach().requires_grad_()
    sums = torch.zeros(4, dtype=torch.double, device=rows.device)
    size = CHUNK[rows.device.type]
    token_losses = compiled() if args.compile else loss.token_losses
    for start in range(0, len(rows), size):
        chunk = slice(start, start + size)
        p_logits = p_logp = None
        if teacher is not None:
            p_logits = teacher.logits(p_hidden[chunk])
        elif batch.teacher_logp is not None:
            p_logp = batch.teacher_logp[chunk]
        q_logits = F.linear(rows[chunk], head)[:, :student.vocab_size]
        losses, w = token_losses(args.objective, q_logits, batch.labels[chunk],
                                 p_logits, p_logp, args.tau, args.beta)
        del q_logits, p_logits  # large, and not needed for the gradient
        total = (w * losses).sum()
        (total / tokens).backward()
        w = w.double()  # in fp32, the square of a tiny weight is 0
        sums += torch.stack([total, losses.sum(), w.sum(), w.square().sum()]).detach()
    hidden.backward(rows.grad)
    return sums

# ---- Runs and checkpoints
def peak_memory_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1e9 if sys.platform == "darwin" else 1e6)  # macOS counts bytes

def load_run(args: argparse.Namespace) -> dict:
    """run.json of --out if it has the same options; for a new folder, only the options."""
    out = Path(args.out)
    file = out / "run.json"
    options = dict(vars(args))
    for name in ("resume", "out", "device"):  # a run may continue on another device
        del options[name]
    with open(args.traces, "rb") as traces:
        options["traces_sha256"] = hashlib.file_digest(traces, "sha256").hexdigest()
    if not file.exists():
        check(all(path.suffix == ".tmp" for path in out.glob("*")), f"{out}: not empty, "
              "but no run of train.py; choose another --out")
        return {"options": options}
    check(args.resume, f"{out}: holds a run already; add --resume to continue it, or "
          "choose another --out")
    run = read_json(file)
    data.check_same_settings(file, run.get("options", {}), options)
    return run

def remove_checkpoints(out: Path, keep: Path | None = None) -> None:
    """Also removes what a killed process was saving."""
    for folder in [*out.glob("checkpoint*"), *out.glob(".saving-*")]:
        if folder != keep:
            shutil.rmtree(folder)

def save_checkpoint(out: Path, step: int, student: Transformer,
                    optimizer: torch.optim.Optimizer) -> None:
    """All that a resumed run needs, written beside and renamed: it is whole or absent."""
    final = out / f"checkpoint-{step:08}"
    with data.atomic_write(final) as folder:
        student.save_pretrained(folder)
        state = {}
        for name, parameter in student.named_parameters():
            for key, value in optimizer.state[parameter].items():
                state[f"{name} {key}"] = value
        save_file(state, folder / "optimizer.safetensors")  # a pickle could run code
    os.sync()  # the new checkpoint reaches the disk before the old one goes
    student.folder = final  # a later save takes the tokenizer files from here
    remove_checkpoints(out, keep=final)

def check_objective(args: argparse.Namespace) -> None:
    name, _ = loss.split_name(args.objective)
    check(name == "sft" or args.teacher, f"--objective {args.objective} needs the whole "
          "distribution of the teacher: give --teacher. sft and discord need none")
    check(args.objective != "sft" or not args.teacher, "--objective sft uses no --teacher")
    check(name != "sft" or not args.on_policy, f"--on-policy: {args.objective} learns from "
          "the teacher's tokens; kl, rkl, todi and gkd can judge the student's own")

def print_header(out: Path, run: dict, examples: list[data.Example], first: int,
                 args: argparse.Namespace) -> None:
    size = args.batch_size * args.grad_accum
    tokens = sum(len(example.tokens) - example.prompt_length for example in examples)
    print(f"\n{out}: {args.objective}, steps {first} to {args.steps}, torch {run['torch']}")
    print(f"  traces   {len(examples):,} with {tokens:,} supervised tokens; dropped: "
          f"{run['dropped'] or 'none'}")
    print(f"  a step   {size} traces, about {tokens / len(examples) * size:,.0f} tokens; "
          f"in all {args.steps * size / len(examples):.1f} epochs")
    if size > len(examples):
        print(f"  warning: a step holds each trace {size / len(examples):.1f} times; lower "
              "--batch-size or --grad-accum")
    print("  options ", *[f"{key}={value}" for key, value in run["options"].items()])
    print("  sample  ", run["sample"])

# ---- Training
def train(args: argparse.Namespace) -> dict:
    """One run, read from top to bottom. Returns its run.json."""
    # A finished run is not done again.
    check_objective(args)
    out, run = Path(args.out), load_run(args)
    if "seconds" in run:
        remove_checkpoints(out)
        print(f"{out}: this run is finished")
        return run

    # The student continues from the last checkpoint, if there is one.
    last_checkpoint = max(out.glob("checkpoint-????????"), default=None)
    student, tokenizer = data.load(last_checkpoint or args.student, device=args.device)
    if args.recompute:
        student.block_forward = recompute_block
    if args.compile:
        for block in student.model.layers:
            block.compile()
    teacher = None
    if args.teacher:
        teacher, teacher_tokenizer = data.load(args.teacher, args.dtype, args.device)
        teacher.requires_grad_(False)
        check(teacher_tokenizer.vocab == tokenizer.vocab, f"vocabulary mismatch: "
              f"{args.teacher} and {args.student} have different tokenizers")

    # The traces. Only a weight without a teacher in memory needs stored log-probabilities.
    weighted = args.objective in loss.WEIGHTED
    max_length = min(args.max_length, student.config.max_position_embeddings)
    examples, dropped = data.load_traces(args.traces, tokenizer, max_length,
                                         teacher=weighted and teacher is None)
    traces_per_step = args.batch_size * args.grad_accum
    args.steps = args.steps or math.ceil(args.epochs * len(examples) / traces_per_step)
    if "steps" not in run:
        run["torch"] = torch.__version__
        run["steps"] = args.steps
        run["traces"] = len(examples)
        run["dropped"] = dict(dropped)
        run["sample"] = data.show_example(examples[0], tokenizer)
        data.write_jsonl(out / "run.json", [run])

    # AdamW on fp32 weights, in the state of the checkpoint.
    optimizer = torch.optim.AdamW(student.parameters(), args.lr, (0.9, 0.95),
                                  weight_decay=0.0, fused=True)
    first = 0
    if last_checkpoint:
        first = int(last_checkpoint.name.removeprefix("checkpoint-"))
        saved = load_file(last_checkpoint / "optimizer.safetensors", device=args.device)
        for name, parameter in student.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][key] = saved[f"{name} {key}"]

    # Log lines behind the checkpoint will come again.
    log, lines = out / "log.jsonl", []
    if log.exists():
        data.cut_half_line(log)
        lines = [line for _, line in data.read_jsonl(log) if line["step"] <= first]
        data.write_jsonl(log, lines)
    print_header(out, run, examples, first, args)

    # The loop: one optimizer step a round.
    begin = last_line = time.perf_counter()
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(args.device)
    pending = []  # the sums of the steps since the last log line
    warned, first_loss = set(), lines[0]["unweighted"] if lines else None
    progress = tqdm(range(first, args.steps), "training", disable=None)
    for step in progress:
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        micro_batches = data.step_examples(examples, step, args.batch_size, args.grad_accum,
                                           args.seed)
        if args.on_policy:
            evaluate.resample_on_policy(student, micro_batches, step, args)
        batches = [data.collate(traces, args.device) for traces in micro_batches]
        tokens = sum(len(batch.labels) for batch in batches)
        sums = torch.stack([backward(student, batch, args, tokens, teacher)
                            for batch in batches]).sum(0)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        pending.append(torch.cat([sums, sums.new_tensor([tokens]), norm[None]]))

        # Most steps end here. A log line waits for the device once per interval.
        done = step + 1
        save = done < args.steps and done % args.save_every == 0
        if done % args.log_every and not save and done < args.steps:
            continue
        rows = torch.stack(pending).cpu()
        check(rows.isfinite().all(), f"{out}: loss or gradient is not finite in steps "
              f"{done - len(rows) + 1} to {done}; begin anew with a lower --lr")
        total, unweighted, w, w_squared, tokens, norms = rows.sum(0).tolist()
        first_loss = first_loss or (rows[0, 1] / rows[0, 4]).item()
        seconds = time.perf_counter() - last_line
        line = {
            "step": done,
            "loss": total / tokens,
            "unweighted": unweighted / tokens,
            "weight": w / tokens,
            "ess": w * w / (w_squared * tokens),
            "norm": norms / len(rows),
            "lr": optimizer.param_groups[0]["lr"],
            "gb": peak_memory_gb(args.device),
            "tok/s": round(tokens / seconds),
        }
        pending, last_line = [], time.perf_counter()
        data.write_lines(log, [line], "a")
        columns = [f"{key} {value:<8.5g}" for key, value in line.items()]
        progress.write(" ".join(columns), sys.stdout)
        for sign, warning in loss.signs_of_collapse(line, first_loss).items():
            if weighted and sign not in warned:
                progress.write(f"warning: {warning}", sys.stdout)
                warned.add(sign)
        if save:
            save_checkpoint(out, done, student, optimizer)

    # The result, in fp32 unless asked otherwise.
    if args.save_dtype == "bfloat16":
        start = Transformer.from_pretrained(args.student, device=args.device)
        share = evaluate.surviving_update(student, start)
        print(f"{out}: saved in bfloat16, {share:.0%} of the update survives the rounding")
        student.bfloat16()
    student.save_pretrained(out)
    run["seconds"] = round(time.perf_counter() - begin, 1)
    data.write_jsonl(out / "run.json", [run])
    remove_checkpoints(out)
    return run

# ---- The toy world, with the commands of real models
def toy(args: argparse.Namespace) -> None:
    """Build the toy world in --out. What is there is used again."""
    root = Path(args.out)
    home = root / f"seed{args.seed}"
    defaults = vars(parse_args([]))
    data.build_toy(root, args.seed)

    def run_train(student: Path, traces: Path, out: Path, options: dict) -> None:
        paths = {"student": str(student), "traces": str(traces), "out": str(out)}
        settings = {**defaults, "device": args.device, **options, **paths, "resume": True}
        train(argparse.Namespace(**settings))

    def run_accuracy(model: Path, benchmark: Path, *options: object) -> None:
        command = ["accuracy", "--resume", "--batch-size", 500, "--device", args.device,
                   "--dtype", "float32", "--model", model, "--benchmark", benchmark]
        evaluate.main([str(word) for word in (*command, *options)])

    # The teacher has two layers and skips steps. The student has one, and never saw a skip.
    run_train(root / "blank-teacher", root / "lessons.jsonl", root / "teacher",
              {"objective": "sft", "steps": 2000, "lr": 5e-3})
    run_train(home / "blank-student", home / "lessons.jsonl", home / "student",
              {"objective": "sft", "steps": 300, "lr": 5e-3})
    # The teacher answers the training problems: its right answers are the traces.
    run_accuracy(root / "teacher", home / "problems.jsonl", "--out", home / "traces.jsonl",
                 "--temperature", 1, "--max-new-tokens", 12, "--seed", args.seed)
    # The student learns from them, by plain SFT and by the chosen objective.
    runs = [root / "teacher", home / "student"]
    for objective in dict.fromkeys(["sft", args.objective]):
        options = {**vars(args), "objective": objective, "teacher": None}
        if objective == "sft":
            options |= {key: defaults[key] for key in ("tau", "beta", "on_policy")}
        names = [objective]  # of the folder: the objective, then what is not the default
        for key in ("tau", "beta", "on_policy", "steps", "lr", "batch_size", "grad_accum"):
            if options[key] != defaults[key]:
                names.append(f"{key}={options[key]}")
        if loss.split_name(objective)[0] != "sft":
            options["teacher"] = str(root / "teacher")
        options["lr"] = args.lr or TOY_LR.get(objective, TOY_LR["discord"])
        runs.append(home / "-".join(names))
        run_train(home / "student", home / "traces.jsonl", runs[-1], options)
    # All answer problems that nobody has seen.
    for run in runs:
        for temperature in (0, 1):
            run_accuracy(run, root / "held-out.jsonl", "--temperature", temperature,
                         "--max-new-tokens", 64)
    evaluate.main(["report", *map(str, runs)])

if __name__ == "__main__":
    options = parse_args()
    data.run_command(lambda: train(options) if options.student else toy(options))
