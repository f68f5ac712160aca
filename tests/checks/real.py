"""Real weights in one command, next to transformers: python tests/checks/real.py

--model NAME_OR_FOLDER is SmolLM2-135M-Instruct from the Hub by default. --gguf FILE is taken apart
into a folder first; that needs `pip install gguf` and, for the exact tokenizer, --tokenizer. With
--convert, it ends there. The folder --out keeps every answer with its verdict. Not a test: about
ten minutes on one core.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))
from server import ungraded

import data
import evaluate
import train
from model import Transformer, model_folder

ROWS: list[tuple[str, str, bool]] = []  # of the table: what, how much, is it as it should be
LOAD = """import sys, time, torch
{}
start = time.perf_counter()
model = {}
print(time.perf_counter() - start)
sum(weight.sum() for weight in model.parameters())  # loading only maps the file
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])"""
LOADERS = [
    LOAD.format("from model import Transformer", "Transformer.from_pretrained(sys.argv[1])"),
    LOAD.format("from transformers import AutoModelForCausalLM as Auto",
                "Auto.from_pretrained(sys.argv[1], dtype=torch.float32)"),
]


def row(what: str, value: str, good: bool = True) -> None:
    ROWS.append((what, value, bool(good)))
    print("|", " | ".join((what, value, "ok" if good else "NOT OK")), "|", flush=True)


def convert(gguf: Path, folder: Path, tokenizer: str | None) -> None:
    """Dequantize with transformers, which also undoes llama.cpp's order of the rows of q and k.
    It loses the pre-tokenizer, so "1/2" or a special digit may become other tokens."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                                 dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    if tokenizer is None:
        print(f"warning: {folder} has the tokenizer of the GGUF file, without its rules for digits;"
              " give the real one with --tokenizer")
        return
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    source = model_folder(tokenizer)
    for file in [*source.glob("tokenizer*.json"), *source.glob("*.jinja")]:
        (folder / file.name).write_bytes(file.read_bytes())


def compare_logits(folder: Path, prompts: list[list[int]]) -> None:
    ours, _ = data.load(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = logp = 0.0
    for prompt in prompts:
        x = torch.tensor([prompt])
        with torch.no_grad():
            a, b = ours.logits(ours(x)), theirs(x).logits[..., :ours.vocab_size]
        logits = max(logits, (a - b).abs().max().item())
        logp = max(logp, (a.log_softmax(-1) - b.log_softmax(-1)).abs().max().item())
    row("logits, fp32, largest difference", f"{logits:.1e}", logits <= 1e-4)
    row("log-probabilities, fp32, largest difference", f"{logp:.1e}", logp <= 1e-4)


def compare_greedy(folder: Path, prompts: list[list[int]], length: int) -> None:
    """Equal in fp32. In bf16 two tokens can be as likely: the margin says how near they were."""
    exact, _ = data.load(folder)
    for dtype in ("float32", "bfloat16"):
        ours, _ = data.load(folder, dtype)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        begin = time.perf_counter()
        answers = ours.generate(prompts, length)
        seconds, equal, margin, theirs_seconds = time.perf_counter() - begin, 0, 0.0, 0.0
        for prompt, answer in zip(prompts, answers, strict=True):
            begin = time.perf_counter()
            x = torch.tensor([prompt])
            other = theirs.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=length,
                                    do_sample=False, eos_token_id=ours.eos_token_ids,
                                    pad_token_id=0)[0, len(prompt):].tolist()
            theirs_seconds += time.perf_counter() - begin
            same = [a == b for a, b in zip(answer, other, strict=False)]
            equal += answer == other
            if not all(same):  # how far apart fp32 sees the two tokens
                first = same.index(False)
                with torch.no_grad():
                    hidden = exact(torch.tensor([prompt + answer[:first]]))[0, -1:]
                pair = exact.logits(hidden)[0, [answer[first], other[first]]]
                margin = max(margin, (pair[0] - pair[1]).abs().item())
        row(f"greedy answers of {length} tokens, {dtype}, equal; margin at the first other token",
            f"{equal} of {len(prompts)}; {margin:.2g}",
            equal == len(prompts) or (dtype == "bfloat16" and margin < 0.5))
        row(f"seconds for them, {dtype}, ours in one batch, transformers' one by one",
            f"{seconds:.1f}, {theirs_seconds:.1f}")


def compare_loading(folder: Path) -> None:
    found = []
    for code in LOADERS:
        runs = [subprocess.run([sys.executable, "-c", code, folder], check=True, text=True,
                               capture_output=True, cwd=Path(__file__).parents[2])
                for _ in range(2)]  # the second reads from the page cache
        found.append([float(word) for word in runs[1].stdout.split()])
    (seconds, kb), (their_seconds, their_kb) = found
    row("load: seconds, peak GB; transformers'",
        f"{seconds:.2f}, {kb / 1e6:.2f}; {their_seconds:.2f}, {their_kb / 1e6:.2f}",
        kb <= their_kb)


def answer(model: Path, args: argparse.Namespace, out: Path, *more: str) -> list[dict]:
    """`evaluate.py accuracy` on the first problems."""
    evaluate.main(["accuracy", "--model", str(model), "--benchmark", args.benchmark, "--limit",
                   str(args.problems), "--max-new-tokens", str(args.max_new_tokens), "--device",
                   "cpu", "--out", str(out), "--suffix", "box", "--resume", *more])
    return evaluate.read_answers(out)


def mean_loss(student: Transformer, examples: list[data.Example]) -> float:
    return -float(np.concatenate(data.response_logp(student, examples)).mean())


def compare_training(folder: Path, args: argparse.Namespace) -> None:
    """A model learns from its own answers, right or wrong: q = p at the first step."""
    out = Path(args.out)
    records = answer(folder, args, out / "sampled.jsonl", "--temperature", "1")
    data.write_jsonl(out / "traces.jsonl", ungraded(records))
    examples, _ = data.load_traces(out / "traces.jsonl", data.Tokenizer(folder), 1024, True)
    trained, save = [], Transformer.save_pretrained

    def spy(student: Transformer, place: Path) -> None:
        trained.append(mean_loss(student, examples))
        save(student, place)

    Transformer.save_pretrained = spy
    try:
        run = train.train(train.parse_args([
            "--student", str(folder), "--traces", str(out / "traces.jsonl"), "--out",
            str(out / "student"), "--steps", "12", "--batch-size", "2", "--grad-accum", "2",
            "--max-length", "1024", "--log-every", "1", "--device", "cpu"]))
    finally:
        Transformer.save_pretrained = save
    lines = [line for _, line in data.read_jsonl(out / "student/log.jsonl")]
    weight = lines[0]["weight"]
    row("mean weight of a model on its own answers, first step", f"{weight:.4f}",
        abs(weight - 1) <= 0.01)
    row(f"unweighted loss, step 1, 12 ({run['traces']} traces, {run['seconds']:.0f} s)",
        f"{lines[0]['unweighted']:.4f}, {lines[-1]['unweighted']:.4f}")
    student, _ = data.load(out / "student")
    theirs = AutoModelForCausalLM.from_pretrained(out / "student", dtype=torch.float32)
    lost, count = 0.0, 0
    for example in examples:
        ids, start = torch.tensor(example.tokens).long(), example.prompt_length
        with torch.no_grad():
            logp = theirs(ids[None]).logits[0, start - 1:-1, :student.vocab_size].log_softmax(-1)
        lost -= logp.gather(-1, ids[start:, None]).sum().item()
        count += len(ids) - start
    before, after = mean_loss(data.load(folder)[0], examples), mean_loss(student, examples)
    row("loss on all traces: before; after, in memory, reloaded, in transformers",
        f"{before:.4f}; {trained[-1]:.4f}, {after:.4f}, {lost / count:.4f}",
        max(abs(after - trained[-1]), abs(after - lost / count)) < 1e-4 and after < before)


def main(argv: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    add("--gguf", type=Path, help="take the weights of this file instead")
    add("--tokenizer", help="folder or Hub name of the tokenizer of --gguf")
    add("--convert", action="store_true", help="only take --gguf apart")
    add("--benchmark", default="gsm8k", help="or a JSONL file of problems")
    add("--problems", type=int, default=16)
    add("--max-new-tokens", type=int, default=320)
    add("--out", default="runs/real")
    args = parser.parse_args(argv)
    if args.convert and not args.gguf:
        parser.error("--convert needs --gguf")
    ROWS.clear()
    logging.disable_progress_bar()
    folder = model_folder(args.model) if args.gguf is None else Path(args.out) / args.gguf.stem
    if args.gguf and not (folder / "config.json").exists():
        convert(args.gguf, folder, args.tokenizer)
    if args.convert:
        print(f"{folder}: use it as a model")
        return True
    _, tokenizer = data.load(folder)
    problems = evaluate.load_problems(args.benchmark, "box")
    prompts = [evaluate.encode_problem(problem, tokenizer) for problem in problems[:8]]
    compare_logits(folder, prompts)
    compare_greedy(folder, prompts, 128)
    compare_loading(folder)
    found = evaluate.summarize(answer(folder, args, Path(args.out, "greedy.jsonl")))
    row(f"accuracy, greedy, {found['problems']} problems; mean tokens; cut off",
        f"{found['accuracy']:.3f}; {found['mean_tokens']:.0f}; {found['cut_off']:.0%}")
    compare_training(folder, args)
    print(f"\n| {folder.name}, {torch.get_num_threads()} threads | found | |\n|---|---|---|")
    for what, value, good in ROWS:
        print(f"| {what} | {value} | {'ok' if good else 'NOT OK'} |")
    return all(good for *_, good in ROWS)


if __name__ == "__main__":
    sys.exit(not main())
