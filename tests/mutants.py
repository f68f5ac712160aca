"""Breaks the code in one place after the other and runs the tests: python tests/mutants.py

Each line of MUTANTS is (file, what stands there, what stands there instead). A mutant that the tests
let live is printed; it says which test is missing. Not a test itself: about a quarter of a minute a
mutant. With arguments: only mutants whose text contains one of them.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HOME = Path(__file__).parents[1]
MUTANTS = [
    # ---- loss.py: signs, axes, p and q exchanged, a missing detach, tau inverted
    ("loss.py", "(log_p.exp() * (log_p - log_q)).sum(-1)", "(log_q.exp() * (log_p - log_q)).sum(-1)"),
    ("loss.py", "return kl(p_logits, q_logits)", "return kl(q_logits, p_logits)"),
    ("loss.py", "ratio = log_p - log_q\n", "ratio = log_q - log_p\n"),
    ("loss.py", "ratio.sigmoid().detach()", "ratio.sigmoid()"),
    ("loss.py", "log_p + math.log(beta), log_q + math.log(1 - beta)",
     "log_q + math.log(beta), log_p + math.log(1 - beta)"),
    ("loss.py", "(beta * to_p + (1 - beta) * to_q)", "((1 - beta) * to_p + beta * to_q)"),
    ("loss.py", "return rkl(q_logits, p_logits) if beta else", "return kl(q_logits, p_logits) if beta else"),
    ("loss.py", "fp32(q_logp.detach()) - fp32(p_logp.detach())", "fp32(q_logp) - fp32(p_logp.detach())"),
    ("loss.py", "fp32(q_logp.detach()) - fp32(p_logp.detach())",
     "fp32(p_logp.detach()) - fp32(q_logp.detach())"),
    ("loss.py", "(ratio / tau)", "(ratio * tau)"),
    ("loss.py", "return 2 * (ratio", "return (ratio"),
    ("loss.py", ".clamp(-80, 16)", ""),
    ("loss.py", "fp32(q_logits).log_softmax(-1), fp32(p_logits)", "q_logits.log_softmax(-1), fp32(p_logits)"),
    ("loss.py", "q_logp = -(losses if", "q_logp = (losses if"),
    ("loss.py", "log_softmax(-1)", "log_softmax(0)"),
    # ---- model.py: norms, biases, RoPE, masks, sampling, files
    ("model.py", "x = x + self.self_attn(self.input_layernorm(x)",
     "x = x + self.self_attn(self.post_attention_layernorm(x)"),
    ("model.py", "return self.model.norm(x)", "return x"),
    ("model.py", "(self.q_norm(q), self.k_norm(k))", "(self.k_norm(q), self.q_norm(k))"),
    ("model.py", "(nn.Linear(D, K * Dh, bias=bias or qwen2)", "(nn.Linear(D, K * Dh, bias=bias)"),
    ("model.py", "bias=bias and not qwen2", "bias=bias"),
    ("model.py", "F.silu(self.gate_proj(x)) * self.up_proj(x)", "F.silu(self.up_proj(x)) * self.gate_proj(x)"),
    ("model.py", "(-angle.sin(), angle.sin())", "(angle.sin(), -angle.sin())"),
    ("model.py", "((turns - low) / (high - low)).clamp(0, 1)", "((turns - low) / (high - low))"),
    ("model.py", "config.rope_theta ** (pair / config.head_dim)",
     "config.rope_theta ** (pair / config.hidden_size)"),
    ("model.py", "(column <= query)", "(column <= query + 1)"),
    ("model.py", "(column >= first)", "(column > first)"),
    ("model.py", "seen = end, min(end + -end % 64, cache.data.shape[4])", "seen = end, end"),
    ("model.py", "past[0].index_copy_(3, past[1]", "past[0].index_copy_(3, past[1].flip(0)"),
    ("model.py", "(parts @ x).flatten(0, 1)", "(parts @ x).transpose(0, 1).flatten(0, 1)"),
    ("model.py", "is_causal=mask is None", "is_causal=False"),
    ("model.py", "length[rows] += ~done[rows]", "length[rows] += 1"),
    ("model.py", "draw * total[:, -1:]", "draw"),
    ("model.py", "p.cumsum(-1) - p < top_p", "p.cumsum(-1) < top_p"),
    ("model.py", "cache.data = cache.data[:, :, alive]", "pass"),
    ("model.py", "Path(file).name", "file"),
    ("model.py", "strict=True, assign=True", "strict=False, assign=True"),
    # ---- data.py: the shift, the mask, order, what is refused, files
    ("data.py", "example.tokens[:-1]\n        rows.append(b * T + np.arange(example.prompt - 1, len(example.tokens) - 1))",
     "example.tokens[:-1]\n        rows.append(b * T + np.arange(example.prompt, len(example.tokens)))"),
    ("data.py", "np.arange(example.prompt - 1, len(example.tokens) - 1)",
     "np.arange(example.prompt, len(example.tokens) - 1)"),
    ("data.py", "np.concatenate([example.tokens[example.prompt:]", "np.concatenate([example.tokens[example.prompt - 1:-1]"),
    ("data.py", "rows.append(b * T", "rows.append(b * (T + 1)"),
    ("data.py", "shuffled(count, seed, i // count)", "shuffled(count, seed, 0)"),
    ("data.py", "width > 1 and width * len(", "width > 1 and len("),
    ("data.py", "self.file.read(4 * (length - prompt))", "self.file.read(4 * length)"),
    ("data.py", "range(step * size, (step + 1) * size)", "range(step * size + 1, (step + 1) * size + 1)"),
    ("data.py", "[*tokenizer.encode(response), tokenizer.end]", "[*tokenizer.encode(response)]"),
    ("data.py", "bos=not self.template", "bos=True"),
    ("data.py", "len(example.tokens) > max_length", "len(example.tokens) >= max_length"),
    ("data.py", "-math.inf < x <= 1e-3", "-math.inf < x"),
    ("data.py", 'record.get("correct") is False', 'record.get("correct") is None'),
    ("data.py", "math.log(args.ratio)", "math.log(1 / args.ratio)"),
    ("data.py", "itertools.islice(windows, done, None)", "windows"),
    ("data.py", "check(part.exists(), f\"{args.traces}: the file is empty\")", ""),
    ("data.py", "            remove(temporary)  # of a killed process\n", ""),
    ("data.py", "        lock.acquire()\n    except Timeout", "        pass\n    except Timeout"),
    ("data.py", "        with suppress(OSError):  # Windows does not remove a file that is open\n            Path(lock.lock_file).unlink()\n", ""),
    ("data.py", "file.truncate(file.read().rfind(b\"\\n\") + 1)", "file.seek(0, 2)"),
    ("data.py", "            temporary.replace(path)\n", "            shutil.copyfile(temporary, path)\n"),
    ("data.py", 'intercepted_binops = frozenset({"**"})', "intercepted_binops = frozenset()"),
    ("data.py", "signal.setitimer(signal.ITIMER_REAL, seconds)", "pass"),
    ("data.py", "                    if whole or b\"\\\\u\" in line:", "                    if False:"),
    ("data.py", "most if soft == resource.RLIM_INFINITY else min(most, soft), hard", "soft, hard"),
    ("data.py", "for name in signal.SIGINT, signal.SIGTERM:\n        signal.signal(name, on_signal)", "pass"),
    # ---- train.py: the reduction, accumulation, checkpoints, signals
    ("train.py", "        block.compile()", "        pass"),
    ("data.py", "was[key] == value if key in was else not value", "True"),
    ("train.py", "(total / tokens).backward()", "(total / len(rows)).backward()"),
    ("train.py", "hidden.detach().requires_grad_()", "hidden"),
    ("train.py", "functional_call, block, dict(block.named_parameters()), args, use", "block, *args, use"),
    ("train.py", "part = slice(start, start + CHUNK)", "part = slice(start, start + CHUNK - 1)"),
    ("train.py", "[:vocab_size]\n    p_hidden", "\n    p_hidden"),
    ("train.py", "clip_grad_norm_(student.parameters(), CLIP)", "clip_grad_norm_(student.parameters(), 1e9)"),
    ("train.py", "args.lr * (step + 1) / warmup", "args.lr * step / warmup"),
    ("train.py", '("step", "exp_avg", "exp_avg_sq")', '("step", "exp_avg")'),
    ("train.py", "        optimizer.zero_grad()\n", ""),
    ("train.py", "weight_decay=0.0", "weight_decay=0.1"),
    ("train.py", "(STOP or done % args.save_every == 0)", "(done % args.save_every == 0)"),
    ("train.py", '        sums["../run.json"] = data.sha256(out / "run.json")  # it belongs to this run\n', ""),
    ("train.py", "data.sha256(file) == expected", "True"),
    ("train.py", "            if not all(map(math.isfinite, row)):", "            if False:"),
    ("train.py", "    student.folder = final  #", "    #"),
    ("train.py", "if row[\"step\"] <= first", "if True"),
    ("train.py", "        data.cut_half_line(log)\n", ""),
    ("train.py", "    with data.alone(args.out):\n", "    if True:\n"),
    ("train.py", "    with data.writable(out):\n        student.to", "    if True:\n        student.to"),
    # ---- evaluate.py: averages, intervals, resuming
    ("evaluate.py", "means.std(ddof=n > 1) / math.sqrt(n)", "means.std(ddof=n > 1) / math.sqrt(len(records))"),
    ("evaluate.py", "(R - epsilon) / epsilon", "(R - epsilon) / R"),
    ("evaluate.py", "            if not found:\n                return False\n            del rest[found[0]]", "            if not found:\n                return False"),
    ("evaluate.py", "for file in (out, part) if args.resume", "for file in (part,) if args.resume"),
    ("evaluate.py", "loss.kl(student.logits(q_rows)[:, :vocab_size],", "loss.rkl(student.logits(q_rows)[:, :vocab_size],"),
    ("evaluate.py", "finished = bool(ids) and ids[-1] in", "finished = not ids or ids[-1] in"),
    ("evaluate.py", "text = html.escape(piece)", "text = piece"),
]
FIRST = {"loss.py": ["test_loss.py"], "model.py": ["test_model.py"],
         "data.py": ["test_properties.py", "test_data.py", "test_traces.py", "test_faults.py"],
         "train.py": ["test_train.py", "test_faults.py"],
         "evaluate.py": ["test_evaluate.py", "test_faults.py"]}


def lives(mutant: tuple[str, str, str]) -> bool:
    """Do all tests pass with it? Those of its file come first."""
    file, old, new = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "main")
        shutil.copytree(HOME, copy, ignore=shutil.ignore_patterns("runs", ".git", "*cache*"))
        if (HOME.parent / "shared").exists():
            Path(folder, "shared").symlink_to(HOME.parent / "shared")
        text = (copy / file).read_text()
        if text.count(old) < 1:
            raise SystemExit(f"{file} has no {old!r}: the table is behind the code")
        (copy / file).write_text(text.replace(old, new))
        for tests in [f"tests/{name}" for name in FIRST[file]], ["tests"]:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:randomly", "-p",
                     "no:cacheprovider", *tests], cwd=copy, capture_output=True, timeout=400,
                    env={**os.environ, "OMP_NUM_THREADS": "1"})
            except subprocess.TimeoutExpired:  # a loop that never ends is seen, too
                return False
            if done.returncode:
                return False
    return True


def main(wanted: list[str]) -> None:
    mutants = [one for one in MUTANTS if not wanted or any(w in " ".join(one) for w in wanted)]
    alive = 0
    with ThreadPoolExecutor(2) as pool:
        for (file, old, new), survived in zip(mutants, pool.map(lives, mutants), strict=True):
            alive += survived
            print("ALIVE" if survived else "caught", f"{file}: {old!r:.60} -> {new!r:.60}",
                  flush=True)
    print(f"{len(mutants) - alive} of {len(mutants)} mutants caught")


if __name__ == "__main__":
    main(sys.argv[1:])
