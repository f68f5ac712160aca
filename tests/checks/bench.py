"""Ours against transformers and TRL on the same work: python tests/checks/bench.py [ROW...]

One table: medians of the ratio over alternating rounds, and their spread. The same random weights
on both sides; a Qwen2 of Qwen2.5's vocabulary, narrow enough for a CPU, the real 0.5B and 1.5B
shapes on a GPU (--shape). Not a test; --rounds 5 takes about ten minutes on two cores, five on a
GPU.
"""

import argparse
import copy
import gc
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
import data
import train
from model import KVCache, Transformer

# (prompt, response) tokens of 32 GSM8K training problems, with the suffix, by Qwen2.5's tokenizer
LENGTHS = [
    (115, 109), (144, 203), (133, 94), (125, 112), (199, 222), (160, 161), (133, 140), (112, 81),
    (104, 108), (107, 87), (150, 219), (85, 93), (123, 107), (138, 183), (96, 112), (92, 193),
    (177, 249), (86, 118), (117, 90), (95, 226), (88, 164), (118, 128), (96, 94), (95, 93),
    (81, 95), (125, 134), (104, 123), (99, 127), (137, 196), (105, 81), (119, 108), (75, 97)]
V = 151665  # of the tokenizer; the head has 151,936 rows
SHAPES = {  # hidden, intermediate, layers, heads, key/value heads, tied
    "cpu": (256, 1376, 6, 4, 2, True), "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True)}


class Bench:
    def __init__(self, args: argparse.Namespace):
        self.args, self.dtype = args, getattr(torch, args.dtype)
        self.options = train.parse_args([
            "--student", "s", "--traces", "t", "--out", "o", "--objective", "sft", "--dtype",
            args.dtype, "--device", args.device])
        if args.child:
            self.folder = Path(args.child[1])
            return
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        hidden, inner, layers, heads, groups, tied = SHAPES[args.shape]
        raw = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 151936,
               "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
               "num_attention_heads": heads, "num_key_value_heads": groups, "rope_theta": 1e6,
               "rms_norm_eps": 1e-6, "tie_word_embeddings": tied, "hidden_act": "silu",
               "max_position_embeddings": 32768, "bos_token_id": 0, "eos_token_id": 151645}
        (self.folder / "config.json").write_text(json.dumps(raw))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder))
        model.to(torch.float32).save_pretrained(self.folder)
        words = tokenizers.models.WordLevel({str(i): i for i in range(V)}, unk_token="0")
        backend = tokenizers.Tokenizer(words)
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens([str(V - 1)])
        backend.save(str(self.folder / "tokenizer.json"))
        (self.folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": str(V - 1)}))

    # ---- both sides
    def ours(self) -> Transformer:
        model = Transformer.from_pretrained(self.folder, torch.float32, self.args.device)
        model.vocab_size = V
        return model

    def theirs(self):
        return AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="sdpa").to(self.args.device)

    def examples(self, ragged: bool, count: int = 0) -> list[data.Example]:
        rng, count = np.random.default_rng(0), count or self.args.batch
        lengths = LENGTHS[:count] if ragged else [(1, self.args.length - 1)] * count
        return [data.Example(rng.integers(0, V, a + b).astype(np.int32), a,
                             np.full(b, -3, dtype=np.float32)) for a, b in lengths]

    def our_step(self, model, examples, objective="sft", teacher=None):
        options, optimizer = copy.copy(self.options), torch.optim.AdamW(
            model.parameters(), 1e-5, (0.9, 0.95), weight_decay=0.0, fused=True)
        options.objective = objective
        batch = data.collate(examples, self.args.device)

        def step() -> None:
            train.backward(model, batch, options, len(batch.labels), teacher)
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.CLIP)
            optimizer.step()
            optimizer.zero_grad()
            self.wait()
        return step

    def their_step(self, model, examples, accumulate=1):
        """One optimizer step; logits of 64 x 512 x V do not fit, so they may come in parts."""
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, (0.9, 0.95), weight_decay=0.0,
                                      fused=True)
        longest = max(len(example.tokens) for example in examples)
        shape = len(examples), longest
        tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        mask = torch.zeros(shape, dtype=torch.long)
        for b, example in enumerate(examples):
            ids = torch.from_numpy(example.tokens.astype(np.int64))
            tokens[b, :len(ids)], mask[b, :len(ids)] = ids, 1
            labels[b, example.prompt_length:len(ids)] = ids[example.prompt_length:]
        tokens, labels, mask = (x.to(self.args.device) for x in (tokens, labels, mask))

        def step() -> None:
            for x, m, y in zip(tokens.chunk(accumulate), mask.chunk(accumulate),
                               labels.chunk(accumulate), strict=True):
                with torch.autocast(self.args.device, torch.bfloat16,
                                    enabled=self.dtype == torch.bfloat16):
                    loss = model(input_ids=x, attention_mask=m, labels=y).loss
                (loss / accumulate).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), train.CLIP)
            optimizer.step()
            optimizer.zero_grad()
            self.wait()
        return step

    def wait(self) -> None:
        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def alternate(self, *sides) -> list[list[float]]:
        """Seconds of each side, in turn; the first round warms up."""
        seconds = [[] for _ in sides]
        for turn in range(self.args.rounds + 1):
            for side, found in zip(sides, seconds, strict=True):
                begin = time.perf_counter()
                side()
                self.wait()
                if turn:
                    found.append(time.perf_counter() - begin)
        return seconds

    def row(self, name: str, work: float, unit: str, ours, others: dict, floor: float = 0) -> None:
        seconds = self.alternate(ours, *others.values())
        cells = [f"{work / statistics.median(seconds[0]):,.4g} {unit}"]
        for found in seconds[1:]:
            ratios = sorted(b / a for a, b in zip(seconds[0], found, strict=True))
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        limit = f"{floor / statistics.median(seconds[0]):.0%}" if floor else ""
        ratios = "; ".join(map(" ".join, zip(others, cells[1:], strict=True)))
        print(f"| {name} | {cells[0]} | {ratios} | {limit} |", flush=True)

    # ---- what the machine can do
    def peaks(self) -> tuple[float, float]:
        """Multiply-adds x 2 and bytes a second, measured: a large matrix product, a large sum."""
        n = 8192 if self.args.device == "cuda" else 1536
        a = torch.randn(n, n, dtype=self.dtype, device=self.args.device)
        big = torch.ones(64 << 20, device=self.args.device)  # zeros share one page
        times = self.alternate(lambda: a @ a, lambda: big.sum())
        return 2 * n ** 3 / min(times[0]), 4 * len(big) / min(times[1])

    def flops(self, examples: list[data.Example]) -> float:
        """Of a training step: 6 for each weight and token; the head only for supervised rows."""
        hidden, inner, layers, heads, groups, _ = SHAPES[self.args.shape]
        head_size = hidden // heads
        body = layers * (2 * hidden * hidden + 2 * hidden * groups * head_size + 3 * hidden * inner)
        tokens = sum(len(example.tokens) - 1 for example in examples)
        rows = sum(len(example.tokens) - example.prompt_length for example in examples)
        attention = layers * sum(2 * len(e.tokens) ** 2 / 2 * hidden for e in examples)
        return 6 * (body * tokens + V * hidden * rows) + 6 * attention


def training(bench: Bench) -> None:
    peak, _ = bench.peaks()
    ours, theirs = bench.ours(), bench.theirs()
    for name, ragged in (("training step, all supervised", False),
                         ("training step, ragged GSM8K", True)):
        examples = bench.examples(ragged)
        tokens = sum(len(example.tokens) for example in examples)
        others = {"transformers": bench.their_step(theirs, examples)}
        if ragged and bench.args.trl:
            others["TRL"] = trl_step(bench, examples)
        bench.row(name, tokens, "tok/s", bench.our_step(ours, examples), others,
                  bench.flops(examples) / peak)
    if bench.args.large:
        examples = bench.examples(False, bench.args.large)
        parts = bench.args.large // bench.args.batch
        bench.row(f"training step, {bench.args.large} x {bench.args.length}",
                  bench.args.large * bench.args.length, "tok/s", bench.our_step(ours, examples),
                  {f"transformers in {parts} parts": bench.their_step(theirs, examples, parts)},
                  bench.flops(examples) / peak)


def trl_step(bench: Bench, examples: list[data.Example]):
    """One optimizer step of TRL's SFTTrainer on the same traces, its loop included."""
    import datasets
    import trl
    rows = [{"input_ids": e.tokens.tolist(), "completion_mask":
             [0] * e.prompt_length + [1] * (len(e.tokens) - e.prompt_length)} for e in examples]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(
            tokenizers.models.WordLevel({"<eos>": 0}, unk_token="<eos>")),
        eos_token="<eos>", pad_token="<eos>", unk_token="<eos>")
    trainer = trl.SFTTrainer(
        bench.theirs(), trl.SFTConfig(
            output_dir=str(bench.folder / "trl"), per_device_train_batch_size=len(rows),
            max_steps=1, learning_rate=1e-5, report_to="none", save_strategy="no",
            logging_strategy="no", use_cpu=bench.args.device == "cpu", max_length=4096,
            bf16=bench.dtype == torch.bfloat16, gradient_checkpointing=False, disable_tqdm=True,
            completion_only_loss=True),
        train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer)
    return trainer.train


def objectives(bench: Bench) -> None:
    ours, teacher, examples = bench.ours(), bench.ours(), bench.examples(True)
    teacher.requires_grad_(False)
    tokens = sum(len(example.tokens) for example in examples)
    bench.row("DisCorD step, seconds of SFT over its", tokens, "tok/s",
              bench.our_step(ours, examples, "discord"),
              {"SFT": bench.our_step(ours, examples)})
    for name in ("kl", "todi", "gkd"):
        bench.row(f"{name} step, teacher in memory", tokens, "tok/s",
                  bench.our_step(ours, examples, name, teacher),
                  {"SFT": bench.our_step(ours, examples)})


def generation(bench: Bench) -> None:
    ours, theirs = bench.ours().to(bench.dtype), bench.theirs().to(bench.dtype)
    ours.eos_token_ids, new = [], bench.args.new_tokens
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    rng, (peak, bandwidth) = np.random.default_rng(0), bench.peaks()
    count = sum(p.numel() for p in ours.parameters())
    head = ours.model.embed_tokens.weight.numel()
    for size in bench.args.generate:
        prompts = [rng.integers(0, V, LENGTHS[i % 32][0]).tolist() for i in range(size)]
        longest = max(map(len, prompts))
        # the prompts' tokens are multiplied once; then each step multiplies, and reads the weights
        # and, in the middle, the keys and values of the prompts and half of the answers
        cache = KVCache(ours.config, torch.zeros(size, dtype=torch.long, device="meta"),
                        longest + new // 2, bench.dtype).data  # only its size is wanted
        floor = 2 * (count - head) * sum(map(len, prompts)) / peak + new * max(
            (count * cache.element_size() + cache.nbytes) / bandwidth, 2 * count * size / peak)
        tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        tokens, mask = tokens.to(bench.args.device), mask.to(bench.args.device)
        for temperature in (0.0, 0.7):
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if (
                temperature) else {"do_sample": False}
            bench.row(f"generate, batch {size}, T = {temperature:g}", size * new, "tok/s",
                      lambda p=prompts, t=temperature: ours.generate(p, new, t, seed=0),
                      {"transformers": lambda x=tokens, m=mask, s=sampling: theirs.generate(
                          x, attention_mask=m, max_new_tokens=new, pad_token_id=0, **s)}, floor)


def loading(bench: Bench) -> None:
    size = (bench.folder / "model.safetensors").stat().st_size
    bench.row("load a checkpoint", size / 1e9, "GB/s", bench.ours,
              {"transformers": bench.theirs})


def memory(bench: Bench) -> None:
    """Peaks of fresh processes: resident memory on a CPU, allocated on a GPU."""
    size = (bench.folder / "model.safetensors").stat().st_size
    for what in ("load", "step", "discord", "recompute"):
        peaks = [int(subprocess.run(
            [sys.executable, __file__, "--device", bench.args.device, "--dtype", bench.args.dtype,
             "--shape", bench.args.shape, "--child", f"{side}-{what}", str(bench.folder)],
            capture_output=True, text=True, check=True).stdout.split()[-1])
            for side in ("ours", "theirs")]
        print(f"| peak memory, {what} | {peaks[0] / 1e9:.2f} GB ({peaks[0] / size:.2f} x the file) "
              f"| transformers {peaks[1] / peaks[0]:.2f} | |", flush=True)


def child(bench: Bench, what: str) -> None:
    """Prints by how much the peak of this process grew."""
    side, _, work = what.partition("-")

    def peak() -> int:
        if bench.args.device == "cuda":
            return torch.cuda.max_memory_allocated()
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    torch.optim.AdamW([torch.zeros(1)])  # imports torch's compiler, on both sides
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here (Linux)
    before = peak()
    model = bench.ours() if side == "ours" else bench.theirs()
    for parameter in model.parameters():
        parameter.sum()  # what is mapped has to be read
    if side == "ours" and work == "recompute":
        model.block_forward = train.recompute_block
    if work != "load":
        examples = bench.examples(False)
        step = (bench.our_step(model, examples, "discord" if work == "discord" else "sft")
                if side == "ours" else bench.their_step(model, examples))
        step()
        step()
    print(peak() - before)


ROWS = {"training": training, "objectives": objectives, "generation": generation,
        "loading": loading, "memory": memory}


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32")
    parser.add_argument("--shape", default="0.5b" if gpu else "cpu", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8 if gpu else 4)
    parser.add_argument("--large", type=int, default=64 if gpu else 0, help="of a second batch")
    parser.add_argument("--length", type=int, default=512 if gpu else 256)
    parser.add_argument("--new-tokens", type=int, default=256 if gpu else 128)
    parser.add_argument("--generate", type=int, nargs="*", default=[1, 32, 256] if gpu else [1, 32])
    parser.add_argument("--no-trl", dest="trl", action="store_false")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(sys.argv[1:])
    transformers.logging.set_verbosity_error()
    bench = Bench(args)
    if args.child:
        child(bench, args.child[0])
        return
    peak, bandwidth = bench.peaks()
    name = torch.cuda.get_device_name() if args.device == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads")
    print(f"{name}; {args.dtype}; shape {args.shape} {SHAPES[args.shape]}, V = 151,936; torch "
          f"{torch.__version__}, transformers {transformers.__version__}; measured peak "
          f"{peak / 1e9:.0f} Gflop/s, {bandwidth / 1e9:.1f} GB/s; {args.rounds} rounds in turn\n\n"
          "| work | ours | seconds of the other / ours: median (spread) | share of the limit |\n"
          "|---|---|---|---|")
    for row in args.rows:
        ROWS[row](bench)
        gc.collect()


if __name__ == "__main__":
    main()
