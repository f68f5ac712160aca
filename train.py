"""Distill a student from a teacher's traces on one device. Without arguments: a toy world.

    python train.py                                   # about three minutes on two cores
    python train.py --student Qwen/Qwen2.5-0.5B-Instruct --traces traces.jsonl --out runs/my

--out becomes the Hugging Face folder of the trained student, with run.json (how it was
made) and log.jsonl (the log lines). To resume an interrupted run, add --resume.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import random
import resource
import shutil
import sys
import textwrap
import time
from functools import cache
from pathlib import Path

import numpy as np
import tokenizers
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
from model import Config, Transformer, check, read_json

CHUNK = {"cpu": 256, "cuda": 1024}  # rows that have logits at the same time
WARMUP = 0.03  # share of the steps
CLIP = 1.0  # largest norm of the gradient
LOG_SECONDS, SAVE_SECONDS = 60, 600  # on a slow machine, steps alone would be too rare

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=data.HelpFormatter)
    positive, share = data.bounded(int, 1), data.bounded(float, 0, 1)

    add = parser.add_argument_group("what: these three, or none for the toy").add_argument
    add("--student", help="HF folder or Hub name")
    add("--traces", help="JSONL of traces; data.py shows one")
    add("--out", type=data.output, help="folder of the run (toy: runs/toy)")

    add = parser.add_argument_group("objective").add_argument
    add("--objective", default="discord", choices=loss.OBJECTIVES, help="see loss.py")
    add("--teacher", help="HF folder or Hub name; for kl, rkl, todi and gkd")
    add("--tau", type=data.bounded(float, 1e-9), default=loss.TAU,
        help="of the DisCorD weight; lower is stricter, inf is SFT")
    add("--beta", type=share, default=0.5, help="of gkd; 0 is kl, 1 is rkl")
    add("--on-policy", type=share, default=0.0, help="share of the traces that the "
        "student's own answers replace; for kl, rkl, todi and gkd")

    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=data.bounded(float, 1e-9, 1e6), default=3, help="of the traces")
    add("--steps", type=positive, help="optimizer steps, in place of --epochs")
    add("--batch-size", type=positive, default=8, help="traces in a micro-batch")
    add("--grad-accum", type=positive, default=4, help="micro-batches in a step")
    add("--lr", type=data.bounded(float, 1e-12, 1), default=1e-5,
        help="peak, then cosine to a tenth; toy: the best of a grid")
    add("--max-length", type=positive, default=2048, help="drop traces with more tokens")
    add("--seed", type=data.bounded(int, 0), default=0, help="of the order of traces and "
        "of on-policy answers; toy: of the student and the problems, too")

    add = parser.add_argument_group("machine").add_argument
    data.add_model_options(add)
    add("--resume", action="store_true", help="continue from the last checkpoint in --out")
    add("--recompute", action="store_true", help="recompute activations to save memory")
    add("--compile", action="store_true", help="torch.compile blocks and loss (needs g++)")
    add("--log-every", type=positive, default=10, help="steps in a log line, "
        f"or {LOG_SECONDS} seconds")
    add("--save-every", type=positive, default=500, help="steps between "
        f"checkpoints, or {SAVE_SECONDS // 60} minutes")
    return parser

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.student is None and args.traces is None:
        if args.teacher or args.epochs != parser.get_default("epochs"):
            parser.error("the toy world has its own teacher, and --steps for --epochs")
        parser.set_defaults(**TOY_DEFAULTS)
        return parser.parse_args(argv)
    if None in (args.student, args.traces, args.out):
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

@cache
def compiled_token_losses():
    return torch.compile(loss.token_losses, dynamic=True)  # its import takes seconds

def backward(student: Transformer, batch: data.Batch, args: argparse.Namespace, tokens: int,
             teacher: Transformer | None = None) -> Tensor:
    """Add one micro-batch's share to the gradient of sum(w * loss) / tokens.

    `tokens` counts the supervised tokens of the whole step. Logits are V = 151,936 wide, so
    CHUNK rows have them at a time. A chunk goes backward to the head and to the hidden
    states, and these at the end through the network. Returns sums over tokens, of w * loss,
    loss, w and w^2, and over the ends of turn, of their weights and of 1: [6]."""
    dtype = getattr(torch, data.compute_dtype(args))  # the weights themselves are fp32
    weights = {name: weight.to(dtype) for name, weight in student.named_parameters()}
    hidden = functional_call(student, weights, batch.tokens).flatten(0, 1)  # [B * T, D]
    hidden = hidden[batch.positions]  # [N, D]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    if teacher is not None:
        p_hidden = teacher(batch.tokens).flatten(0, 1)[batch.positions]
    rows = hidden.detach().requires_grad_()
    ends = torch.tensor(student.eos_token_ids, dtype=torch.long, device=rows.device)
    is_end = torch.isin(batch.labels, ends)  # [N]
    sums = torch.zeros(6, dtype=torch.double, device=rows.device)
    size = CHUNK[rows.device.type]
    token_losses = compiled_token_losses() if args.compile else loss.token_losses
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
        end_weight = (w * is_end[chunk]).sum()
        w = w.masked_fill(is_end[chunk], 1)  # ours: see loss.py
        total = (w * losses).sum()
        (total / tokens).backward()
        w = w.double()  # in fp32, the square of a tiny weight is 0
        sums += torch.stack([total, losses.sum(), w.sum(), w.square().sum(), end_weight,
                             is_end[chunk].sum()]).detach()
    hidden.backward(rows.grad)
    return sums

def resample_on_policy(student: Transformer, micro_batches: list[list[data.Example]],
                       step: int, args: argparse.Namespace) -> None:
    """Replace a random share of the traces by the student's own answers at temperature 1,
    at most as long as the longest trace of the step (GKD, arXiv 2306.13649)."""
    writer = student
    if data.compute_dtype(args) == "bfloat16":
        writer = copy.deepcopy(student).bfloat16()
    longest = max(len(example.tokens) - example.prompt_length
                  for examples in micro_batches for example in examples)
    number = 0  # of the trace in the step, however the step is cut into micro-batches
    for examples in micro_batches:
        prompts, seeds = {}, []
        for i, example in enumerate(examples):
            draw = np.random.default_rng((args.seed, step, number, 1)).random()
            if draw < args.on_policy:
                prompts[i] = example.tokens[:example.prompt_length].tolist()
                seeds.append((args.seed, step, number))
            number += 1
        answers = writer.sample([*prompts.values()], longest, 1.0, seeds) if prompts else []
        for (i, prompt), (ids, _) in zip(prompts.items(), answers, strict=True):
            tokens = np.array(prompt + ids)[:student.config.max_position_embeddings]
            examples[i] = data.Example(tokens, len(prompt))

# ---- What is said about a run
def has_ratio(objective: str) -> bool:
    """Does the weight compare q(y) with p(y)? Then it needs log p(y) of each token."""
    _, weight = loss.OBJECTIVES[objective]
    return weight not in (None, loss.dft_weight)

def check_objective(args: argparse.Namespace) -> None:
    name = f"--objective {args.objective}"
    token_loss, _ = loss.OBJECTIVES[args.objective]
    if token_loss is not loss.sft:
        check(args.teacher, f"{name} needs the whole distribution of the teacher: give "
              "--teacher. sft, dft and discord need none")
        return
    check(not args.on_policy, f"--on-policy: {name} learns from the teacher's tokens; kl, "
          "rkl, todi and gkd can judge the student's own")
    check(has_ratio(args.objective) or not args.teacher, f"{name} uses no --teacher")

def command_line(out: Path, run: dict) -> str:
    """The command that makes this run, with the options that are not the default."""
    defaults = vars(make_parser().parse_args([]))
    words = ["python train.py"]
    for key, value in run["options"].items():
        if key in defaults and value != defaults[key]:
            option = "--" + key.replace("_", "-")
            words.append(option if value is True else f"{option} {value}")
    return " ".join([*words, f"--out {out}"])

def model_card(out: Path, run: dict) -> str:
    """README.md of the saved student, for the Hub."""
    options, last = run["options"], run["last"]
    head = ["library_name: transformers", f"tags: [distillation, {options['objective']}]"]
    if not Path(options["student"]).exists():  # else it has no name on the Hub
        head.append(f"base_model: {options['student']}")
    return "\n".join([
        "---", *head, "---", f"# {out.name}", "",
        f"{options['student']}, trained on {run['traces']:,} reasoning traces "
        f"({Path(options['traces']).name}) in {run['steps']} steps; dropped: "
        f"{run['dropped'] or 'none'}.", "", f"    {command_line(out, run)}", "",
        f"Objective {options['objective']}, tau {options['tau']:g}. Unweighted loss: "
        f"{run['first']['unweighted']:.3f} in the first steps, {last['unweighted']:.3f} in "
        f"the last, with mean weight {last['weight']:.3f}.", ""])

def print_header(out: Path, run: dict, examples: list[data.Example], first: int,
                 args: argparse.Namespace) -> None:
    size = args.batch_size * args.grad_accum
    tokens = sum(len(example.tokens) - example.prompt_length for example in examples)
    print(f"{out}: {args.objective}, steps {first} to {args.steps}, torch {run['torch']}")
    print(textwrap.fill(command_line(out, run), 100, initial_indent="  command  ",
                        subsequent_indent=" " * 11, break_on_hyphens=False))
    print(f"  traces   {len(examples):,} with {tokens:,} supervised tokens; dropped: "
          f"{run['dropped'] or 'none'}")
    print(f"  a step   {size} traces, about {tokens / len(examples) * size:,.0f} tokens; "
          f"in all {args.steps * size / len(examples):.1f} epochs")
    if size > len(examples):
        print(f"  warning: a step holds each trace {size / len(examples):.1f} times; lower "
              "--batch-size or --grad-accum")
    print("  sample  ", run["sample"])

def collapse_warnings(line: dict, start: float) -> dict[str, str]:
    """What a log line says about a student too far from its teacher; `start` is the first
    logged unweighted loss. The weighted loss falls all the same: w falls faster. In the
    toy, a mean weight of .55 led to guessing, .66 to a gain; SFT gained more in both."""
    warnings = {}
    if line["weight"] < 0.6:
        warnings["weight"] = "many tokens are unlikely for the student; try --objective sft"
    if line["end"] < 0.1:
        warnings["end"] = ("ends of turn are new to this student; they count as in SFT. An "
                           "Instruct student knows them")
    if line["unweighted"] > 1.5 * start + 0.5:
        warnings["loss"] = (f"the unweighted loss was {start:.2f} at first; lower --lr, or "
                            "try --objective sft")
    return warnings

def peak_memory_gb(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / (1e9 if sys.platform == "darwin" else 1e6)  # macOS counts bytes

# ---- Runs and checkpoints
TRAINING_CODE = "model.py", "data.py", "loss.py", "train.py"

def saved_run(folder: Path) -> dict:
    """The run.json of a folder, or {}. A finished run has `seconds`."""
    file = folder / "run.json"
    return read_json(file) if file.exists() else {}

def load_run(args: argparse.Namespace) -> dict:
    """run.json of --out if it has the same options; for a new folder, a beginning of it.
    A run keeps its dtype when it continues on another device."""
    out = Path(args.out)
    run = saved_run(out)
    args.dtype = args.dtype or run.get("options", {}).get("dtype")
    args.dtype = data.compute_dtype(args)
    options = dict(vars(args))
    for name in ("resume", "out", "device"):
        del options[name]
    check(not Path(args.traces).exists() or Path(args.traces).is_file(),
          f"{args.traces}: not a file; a pipe could not be read again")
    with open(args.traces, "rb") as traces:
        options["traces_sha256"] = hashlib.file_digest(traces, "sha256").hexdigest()
    if not run:
        check(all(path.suffix == ".tmp" for path in out.glob("*")), f"{out}: not empty, "
              "but no run of train.py; choose another --out")
        return {"options": options, "code": data.CODE}
    check(args.resume, f"{out}: holds a run already; add --resume to continue it, or "
          "choose another --out")
    data.check_same_settings(out / "run.json", run.get("options", {}), options)
    names = data.edited(run.get("code", {}), *TRAINING_CODE)
    check(not names or "seconds" not in run, f"{out}: finished, but {names} changed since: "
          "to train again, choose another --out or remove the folder")
    if names:
        print(f"{out}: {names} changed since this run began")
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

# ---- Training
def train(args: argparse.Namespace) -> dict:
    """One run, read from top to bottom. Returns its run.json."""
    # A finished run is not done again.
    check_objective(args)
    needs_compiler = args.compile and args.device == "cpu"
    check(not needs_compiler or shutil.which(os.environ.get("CXX", "g++")),
          "--compile needs a C++ compiler: install g++, or leave the option out")
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
    need_logprobs = has_ratio(args.objective) and teacher is None
    max_length = min(args.max_length, student.config.max_position_embeddings)
    if teacher is not None:
        max_length = min(max_length, teacher.config.max_position_embeddings)
    examples, dropped = data.load_traces(args.traces, tokenizer, max_length, need_logprobs)
    traces_per_step = args.batch_size * args.grad_accum
    args.steps = args.steps or math.ceil(args.epochs * len(examples) / traces_per_step)
    if "steps" not in run:
        run["torch"] = torch.__version__
        run["steps"] = args.steps
        run["traces"] = len(examples)
        run["dropped"] = dict(dropped)
        run["sample"] = show_example(examples[0], tokenizer)
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

    # Log lines after the checkpoint will come again.
    log, lines = out / "log.jsonl", []
    if log.exists():
        data.cut_half_line(log)
        lines = [line for _, line in data.read_jsonl(log) if line["step"] <= first]
        data.write_jsonl(log, lines)
    print_header(out, run, examples, first, args)

    # The loop: one optimizer step a round.
    begin = last_line = last_save = time.perf_counter()
    seconds_before = lines[-1]["seconds"] if lines else 0.0  # of earlier processes
    if args.device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(args.device)
    pending, read = [], 0  # since the last log line: sums of each step; all tokens
    printed = 0  # lines
    warned, first_loss = set(), lines[0]["unweighted"] if lines else None
    progress = tqdm(range(first, args.steps), "training", disable=None)
    for step in progress:
        optimizer.param_groups[0]["lr"] = learning_rate(step, args)
        micro_batches = data.step_examples(examples, step, args.batch_size, args.grad_accum,
                                           args.seed)
        if args.on_policy:
            resample_on_policy(student, micro_batches, step, args)
        batches = [data.collate(traces, args.device) for traces in micro_batches]
        tokens = sum(len(batch.labels) for batch in batches)
        sums = torch.stack([backward(student, batch, args, tokens, teacher)
                            for batch in batches]).sum(0)
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        pending.append(torch.cat([sums, sums.new_tensor([tokens]), norm[None]]))
        read += sum(len(trace.tokens) for traces in micro_batches for trace in traces)

        # Most steps end here. A log line waits for the device once per interval.
        now, done = time.perf_counter(), step + 1
        save = done % args.save_every == 0 or now - last_save > SAVE_SECONDS
        log_now = done % args.log_every == 0 or now - last_line > LOG_SECONDS
        if not save and not log_now and done < args.steps:
            continue
        recent = torch.stack(pending).cpu()  # on a GPU, the steps end here
        check(recent.isfinite().all(), f"{out}: loss or gradient is not finite in steps "
              f"{done - len(recent) + 1} to {done}; begin anew with a lower --lr")
        total, unweighted, w, w_squared, end, ends, tokens, norms = recent.sum(0).tolist()
        first_loss = first_loss or (recent[0, 1] / recent[0, 6]).item()
        now = time.perf_counter()
        line = {
            "step": done,
            "loss": total / tokens,
            "unweighted": unweighted / tokens,
            "weight": w / tokens,
            "ess": w * w / (w_squared * tokens),
            "end": end / max(ends, 1),
            "norm": norms / len(recent),
            "lr": optimizer.param_groups[0]["lr"],
            "gb": peak_memory_gb(args.device),
            "tok/s": round(read / (now - last_line)),
            "seconds": round(seconds_before + now - begin),
        }
        data.write_lines(log, [line], "a")
        if printed % 20 == 0:
            progress.write(" ".join(f"{key:>8}" for key in line), sys.stdout)
        columns = [f"{value:{max(8, len(key))}.3g}" if isinstance(value, float) else
                   f"{value:8}" for key, value in line.items()]
        if progress.disable:  # no terminal, so no bar that shows it
            left = (now - begin) / (done - first) * (args.steps - done)
            columns.append(f" {tqdm.format_interval(left)} to go")
        progress.write(" ".join(columns), sys.stdout)
        printed += 1
        for sign, warning in collapse_warnings(line, first_loss).items():
            if has_ratio(args.objective) and sign not in warned:
                progress.write(f"warning: {warning}", sys.stdout)
                warned.add(sign)
        if save and done < args.steps:
            save_checkpoint(out, done, student, optimizer)
            last_save = time.perf_counter()
        lines.append(line)
        pending, read, last_line = [], 0, time.perf_counter()

    # The result, in fp32: bfloat16 would round most of a short run at 1e-5 away.
    student.save_pretrained(out)
    run["seconds"] = round(seconds_before + time.perf_counter() - begin, 1)
    run["first"], run["last"] = lines[0], lines[-1]
    if not (out / "README.md").exists():
        (out / "README.md").write_text(model_card(out, run), encoding="utf-8")
    data.write_jsonl(out / "run.json", [run])
    remove_checkpoints(out)
    print(f"{out}: finished; next: python evaluate.py accuracy --model {out}")
    return run

def show_example(example: data.Example, tokenizer: data.Tokenizer) -> str:
    """The text of a trace, with its supervised tokens in brackets."""
    ids, start = example.tokens.tolist(), example.prompt_length
    response = tokenizer.backend.decode(ids[start:], skip_special_tokens=False)
    return f"{tokenizer.decode(ids[:start])}[{response}]"

# ---- The toy world: a digit and six operations modulo 10, with the commands of real models
TOY_DEFAULTS = {"out": "runs/toy", "lr": None, "batch_size": 64, "grad_accum": 1,
                "steps": 800, "max_length": 64, "log_every": 100, "dtype": "float32"}
TOY_LR = {"sft": 3e-2, "kl": 3e-2, "todi": 3e-2, "gkd": 3e-2, "rkl": 3e-3}  # else 1e-3
LETTERS = "abcdef"
SIGNS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
TOY_TEMPLATE = """{% for m in messages %}<{{ m.role }}> {{ m.content }} \
{{ '<end> ' if m.role == 'assistant' }}{% endfor %}\
{{ '<assistant>' if add_generation_prompt }}"""

def toy_trace(rng: random.Random, times: float = 1 / 3, skip: float = 0.0) -> dict:
    """A problem and the value after each operation, then the answer. `times` is the share
    of multiplications, `skip` the probability that a value is left out."""
    value = rng.randrange(10)
    words, values = [str(value)], []
    for letter in LETTERS:
        sign = "*" if rng.random() < times else rng.choice("+-")
        digit = rng.choice("234")
        words.append(letter + sign + digit)
        value = SIGNS[sign](value, int(digit)) % 10
        values.append(f"{letter}={value}")
    written, step = [], 0
    while step < len(LETTERS):
        if step + 1 < len(LETTERS) and rng.random() < skip:
            step += 1
        written.append(values[step])
        step += 1
    response = " ".join([*written, f"#### {value}"])
    return {"prompt": " ".join(words), "response": response, "answer": str(value)}

def save_toy_tokenizer(folder: Path) -> int:
    """One token for each word of the toy world, as files of a Hugging Face tokenizer."""
    words = ["<unk>", "<user>", "<assistant>", "<end>", "####", *map(str, range(10))]
    words += [letter + sign + k for letter in LETTERS for sign in SIGNS for k in "234"]
    words += [f"{letter}={value}" for letter in LETTERS for value in range(10)]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(words[:4])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>",
              "unk_token": "<unk>", "chat_template": TOY_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(words)

def save_toy_model(folder: Path, layers: int, width: int, seed: int) -> None:
    """An untrained Llama with the toy's tokenizer."""
    torch.manual_seed(seed)
    config = Config({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": save_toy_tokenizer(folder), "max_position_embeddings": 64,
        "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4})
    Transformer(config).save_pretrained(folder)

def build_toy(root: Path, seed: int) -> None:
    """Untrained models, lessons, training and held-out problems. Existing problems stay.
    The seed changes the student, its lessons and its problems, not the teacher."""
    home = root / f"seed{seed}"
    save_toy_model(root / "blank-teacher", layers=2, width=96, seed=0)
    save_toy_model(home / "blank-student", layers=1, width=48, seed=seed + 1)
    for file, count, times, skip in ((root / "lessons.jsonl", 30000, 1 / 3, 0.6),
                                     (root / "held-out.jsonl", 1000, 1 / 3, 0),
                                     (home / "lessons.jsonl", 8000, 0.1, 0),
                                     (home / "problems.jsonl", 4000, 1 / 3, 0)):
        if not file.exists():
            rng = random.Random(str(file.relative_to(root)))
            traces = [{"id": i, **toy_trace(rng, times, skip)} for i in range(count)]
            data.write_jsonl(file, traces)

def is_kept(folder: Path) -> bool:
    """The toy's teacher and student are trained once, whatever is edited later."""
    finished = "seconds" in saved_run(folder)
    if finished:
        print(f"{folder}: kept; remove the folder to train it anew")
    return finished

def forget_old_code(folder: Path) -> None:
    """After an edit, a run of the toy is made again."""
    run = saved_run(folder)
    names = data.edited(run.get("code", {}), *TRAINING_CODE)
    if run and names:
        print(f"{folder}: {names} changed, so it is trained again")
        shutil.rmtree(folder)

def toy(args: argparse.Namespace) -> None:
    """Build the toy world in --out. What is there is used again, unless code changed."""
    if "OMP_NUM_THREADS" not in os.environ:  # more threads would wait for each other
        torch.set_num_threads(min(2, torch.get_num_threads()))
    root = Path(args.out)
    home = root / f"seed{args.seed}"
    teacher, student, traces = root / "teacher", home / "student", home / "traces.jsonl"
    defaults = vars(parse_args([]))
    build_toy(root, args.seed)

    def run_train(model: Path, traces: Path, out: Path, options: dict) -> None:
        paths = {"student": str(model), "traces": str(traces), "out": str(out)}
        settings = {**defaults, "device": args.device, **options, **paths, "resume": True}
        train(argparse.Namespace(**settings))

    def run_accuracy(model: Path, benchmark: Path, *options: object) -> None:
        command = ["accuracy", "--resume", "--batch-size", 500, "--device", args.device,
                   "--dtype", "float32", "--model", model, "--benchmark", benchmark]
        evaluate.main([str(word) for word in (*command, *options)])

    # The teacher has two layers and skips steps. The student has one, and never saw a skip.
    print("\n1 of 5: the teacher learns from lessons with skipped steps")
    if not is_kept(teacher):
        run_train(root / "blank-teacher", root / "lessons.jsonl", teacher,
                  {"objective": "sft", "steps": 2000, "lr": 5e-3})
    print("\n2 of 5: the student learns from fewer lessons without")
    if not is_kept(student):
        run_train(home / "blank-student", home / "lessons.jsonl", student,
                  {"objective": "sft", "steps": 300, "lr": 5e-3})
    print("\n3 of 5: the teacher answers 4,000 problems; right answers become the traces")
    if not traces.exists():
        run_accuracy(teacher, home / "problems.jsonl", "--out", traces, "--temperature", 1,
                     "--max-new-tokens", 12, "--seed", args.seed)
    print(f"\n4 of 5: the student learns from the traces, by sft and by {args.objective}")
    runs = [teacher, student]
    for objective in dict.fromkeys(["sft", args.objective]):
        options = {**vars(args), "objective": objective}
        if objective == "sft":
            options |= {key: defaults[key] for key in ("tau", "beta", "on_policy")}
        names = [objective]  # of the folder: the objective, then what is not the default
        for key in ("tau", "beta", "on_policy", "steps", "lr", "batch_size", "grad_accum"):
            if options[key] != defaults[key]:
                names.append(f"{key}={options[key]}")
        if loss.OBJECTIVES[objective][0] is not loss.sft:
            options["teacher"] = str(teacher)
        options["lr"] = args.lr or TOY_LR.get(objective, 1e-3)
        runs.append(home / "-".join(names))
        forget_old_code(runs[-1])
        run_train(student, traces, runs[-1], options)
    print("\n5 of 5: all answer 1,000 problems that nobody has seen")
    for run in runs:
        for temperature in (0, 1):
            answers = run / f"held-out-{'T1x1' if temperature else 'greedy'}.jsonl"
            if answers.exists() and evaluate.edited_since(evaluate.read_answers(answers)):
                answers.unlink()
            run_accuracy(run, root / "held-out.jsonl", "--temperature", temperature,
                         "--max-new-tokens", 64)
    evaluate.main(["report", *map(str, runs)])
    print(f"\nThe runs are in {home}. Now edit discord_weight in loss.py, and run again.")

if __name__ == "__main__":
    options = parse_args()
    if options.student:
        data.run_command(lambda: train(options), "to continue, add --resume")
    else:
        data.run_command(lambda: toy(options), "the same command continues")
