"""Breaks the code in one place after the other and runs the tests: python tests/checks/mutants.py

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

HOME = Path(__file__).parents[2]
MUTANTS = [
    # ---- loss.py: signs, axes, p and q exchanged, a missing detach, tau inverted
    ("loss.py", "(log_p.exp() * (log_p - log_q)).sum(-1)", "(log_q.exp() * (log_p - log_q)).sum(-1)"),
    ("loss.py", "return kl(p_logits, q_logits)", "return kl(q_logits, p_logits)"),
    ("loss.py", "log_ratio = log_p - log_q\n", "log_ratio = log_q - log_p\n"),
    ("loss.py", "log_ratio.sigmoid().detach()", "log_ratio.sigmoid()"),
    ("loss.py", "log_p + math.log(beta), log_q + math.log(1 - beta)",
     "log_q + math.log(beta), log_p + math.log(1 - beta)"),
    ("loss.py", "(beta * kl_p + (1 - beta) * kl_q)", "((1 - beta) * kl_p + beta * kl_q)"),
    ("loss.py", "if beta == 0 else rkl", "if beta == 1 else rkl"),
    ("loss.py", "fp32(q_logp.detach()) - fp32(p_logp.detach())", "fp32(q_logp) - fp32(p_logp.detach())"),
    ("loss.py", "fp32(q_logp.detach()) - fp32(p_logp.detach())",
     "fp32(p_logp.detach()) - fp32(q_logp.detach())"),
    ("loss.py", "(log_ratio / tau)", "(log_ratio * tau)"),
    ("loss.py", "return 2 * (log_ratio", "return (log_ratio"),
    ("loss.py", ".clamp(-80, 16)", ""),
    ("loss.py", "fp32(q_logits).log_softmax(-1), fp32(p_logits)", "q_logits.log_softmax(-1), fp32(p_logits)"),
    ("loss.py", "q_logp = -losses if", "q_logp = losses if"),
    ("loss.py", "log_softmax(-1)", "log_softmax(0)"),
    ("loss.py", "return fp32(q_logp.detach()).exp()", "return fp32(q_logp.detach())"),
    ("loss.py", "return fp32(q_logp.detach()).exp()", "return fp32(q_logp).exp()"),
    ("loss.py", '"dft": (sft, dft_weight)', '"dft": (sft, None)'),
    # ---- model.py: norms, biases, RoPE, masks, sampling, files
    ("model.py", "x = x + self.self_attn(self.input_layernorm(x)",
     "x = x + self.self_attn(self.post_attention_layernorm(x)"),
    ("model.py", "return self.model.norm(x)", "return x"),
    ("model.py", "q = self.q_norm(", "q = self.k_norm("),
    ("model.py", "self.k_proj = nn.Linear(D, K * Dh, bias=bias)", "self.k_proj = nn.Linear(D, K * Dh, bias=False)"),
    ("model.py", "bias=bias and not is_qwen2", "bias=bias"),
    ("model.py", "gate = F.silu(self.gate_proj(x))", "gate = self.gate_proj(x)"),
    ("model.py", "torch.cat((-sin, sin), dim=-1)", "torch.cat((sin, -sin), dim=-1)"),
    ("model.py", "((turns - low) / (high - low)).clamp(0, 1)", "((turns - low) / (high - low))"),
    ("model.py", "config.rope_theta ** (pair / config.head_dim)",
     "config.rope_theta ** (pair / config.hidden_size)"),
    ("model.py", "visible = column <= positions", "visible = column <= positions + 1"),
    ("model.py", "visible = column <= positions", "visible = column < self.used"),
    ("model.py", "torch.arange(self.used + -self.used % 64,", "torch.arange(self.used,"),
    ("model.py", "        self.lengths += 1\n", ""),
    ("model.py", "q.reshape(len(q), k.shape[1], -1, Dh)", "q.reshape(len(q), -1, k.shape[1], Dh)"),
    ("model.py", "hidden[rows, lengths - 1]", "hidden[:, -1]"),
    ("model.py", "cache.lengths = cache.lengths[alive]", "pass"),
    ("model.py", " and not (folder / names[0]).exists()", ""),
    ("model.py", "cache.tokens.copy_(tokens)", "pass"),
    ("model.py", "        cache.used += 1\n", "        pass\n"),
    ("model.py", "logits.flatten(0, 1)[:self.vocab_size]", "logits.transpose(0, 1).flatten(0, 1)[:self.vocab_size]"),
    ("model.py", "F.linear(hidden, head)[..., :self.vocab_size]", "F.linear(hidden, head)"),
    ("model.py", "is_causal=True", "is_causal=False"),
    ("model.py", "length[rows] += ~done[rows]", "length[rows] += 1"),
    ("model.py", "draw * total[:, -1:]", "draw"),
    ("model.py", "cache.data = cache.data[:, :, alive]", "pass"),
    ("model.py", "Path(str(name)).name", "str(name)"),
    ("model.py", "strict=True, assign=True", "strict=False, assign=True"),
    # ---- data.py: the shift, the mask, order, what is refused, files
    ("data.py", "np.arange(start - 1, length - 1)", "np.arange(start, length)"),
    ("data.py", "labels.append(example.tokens[start:]", "labels.append(example.tokens[start - 1:-1]"),
    ("data.py", "positions.append(row * T", "positions.append(row * (T + 1)"),
    ("data.py", "shuffled(len(examples), seed, epoch)", "shuffled(len(examples), seed, 0)"),
    ("data.py", "range(step * size, (step + 1) * size)", "range(step * size + 1, (step + 1) * size + 1)"),
    ("data.py", "return [*ids[len(self.encode(start)):], self.eot_id]", "return ids[len(self.encode(start)):]"),
    ("data.py", "start + self.without_end(text)", "start + text"),
    ("data.py", 'start = "\\n" if "\\u2581" in self.vocab else ""', 'start = ""'),
    ("data.py", 'f"[turn {i}]" in rendered', "True"),
    ("data.py", 'messages and messages[-1]["role"] != "assistant"', "messages"),
    ("data.py", "strftime_now=datetime(2024, 7, 26).strftime", "strftime_now=lambda form: datetime.now().strftime(form)"),
    ("data.py", "check(not OF_THE_PROMPT.fullmatch(name),", "check(True,"),
    ("data.py", "check(not THINKING.fullmatch(name),", "check(True,"),
    ("data.py", "check(not mark,", "check(True,"),
    ("data.py", ' or not stopped', ""),
    ("data.py", 'fields.get("truncated") or not', "not"),
    ("data.py", "    if last[\"role\"] == \"assistant\":\n        sources.append(last)", "    sources.append(last)"),
    ("data.py", "ids[-1:] == [self.eot_id]:  # BERT", "False:  # BERT"),
    ("data.py", "object_pairs_hook=no_duplicates", "strict=True"),
    ("data.py", "target = Path(path).resolve()", "target = Path(path)"),
    ("data.py", "check(np.isfinite(results[i]).all(),", "check(True,"),
    ("data.py", '        record.setdefault("prompt_tokens", len(tokenizer.encode_prompt(turns)))\n', ""),
    ("data.py", "[:-1]  # without the end of turn", ""),
    ("data.py", "log_ratio.max(initial=0)", "log_ratio.mean()"),
    ("data.py", "byte_level and split.add_prefix_space", "False"),
    ("data.py", "tokenizer.find_mark(response) or", "False or"),
    ("data.py", "for name in turn.keys() - TURN_FIELDS", "for name in []"),
    ("data.py", "ensure_ascii=False)  # jinja's", "ensure_ascii=True)  # jinja's"),
    ("data.py", 'return "bfloat16" if own == "bfloat16" else "float32"', 'return "bfloat16"'),
    ("model.py", 'config["rope_theta"] = self.config.rope_theta', "pass"),
    ("model.py", 'config["rope_scaling"] = config["rope_parameters"]', "pass"),
    ("train.py", "end_weight = (w * is_end[chunk]).sum()", "end_weight = w.sum()"),
    ("train.py", 'if not (out / "README.md").exists():', "if True:"),
    ("data.py", "if thinking not in", "if [] not in"),
    ("data.py", "given in (None, len(prompt), prompt)", "True"),
    ("data.py", "in (None, tokenizer.vocab_hash)", 'in (None, record.get("vocab"))'),
    ("data.py", "any(example.teacher_logp.any() for example in examples)", "True"),
    ("data.py", "type(value) in (int, float)", "isinstance(value, int | float)"),
    ("data.py", "bos=self.template is None", "bos=True"),
    ("data.py", "len(example.tokens) > max_length", "len(example.tokens) >= max_length"),
    ("data.py", "-math.inf < value <= 1e-3", "-math.inf < value"),
    ("data.py", "if value == 0 and", "if value is False and"),
    ("data.py", "check(value in (None, False, True),", "check(True,"),
    ("data.py", " and value < -1000)", " and value == -9999)"),
    ("data.py", "spelled = tokenizer.backend.decode(body, skip_special_tokens=False)", "spelled = response"),
    ("data.py", "body = ids if cut_off else ids[:-1]", "body = ids[:-1]"),
    ("data.py", "ids[-1] in tokenizer.end_ids and ", ""),
    ("data.py", "type(i) is int and i in known", "type(i) is int"),
    ("data.py", "p - q > math.log(2)", "q - p > math.log(2)"),
    ("data.py", "file.truncate(file.read().rfind(b\"\\n\") + 1)", "file.seek(0, 2)"),
    ("data.py", "        shutil.rmtree(temporary, ignore_errors=True)\n        temporary.unlink(missing_ok=True)\n", "        pass\n"),
    ("data.py", "        temporary.replace(target)\n", "        shutil.copyfile(temporary, target)\n"),
    ("data.py", "                json.dumps(record, ensure_ascii=False).encode()  # no half of an emoji\n", ""),
    ("data.py", "check(before.get(key) == value,", "check(True,"),
    ("data.py", "model.vocab_size = tokenizer.vocab_size", "pass"),
    ("data.py", "if before.get(name) != CODE[name])", "if False)"),
    ("data.py", "        unread.update(unread_fields(record, TRACE_FIELDS))\n", ""),
    ("data.py", "unknown += np.sum", "unknown = np.sum"),
    ("data.py", "max_length=model.config.max_position_embeddings,", "max_length=math.inf,"),
    ("data.py", 'check("id" in record,', "check(True,"),
    # ---- train.py: the reduction, accumulation, checkpoints
    ("train.py", "del q_logits, p_logits", "pass"),
    ("train.py", "            block.compile()", "            pass"),
    ("train.py", "(total / tokens).backward()", "(total / len(rows)).backward()"),
    ("train.py", "hidden.detach().requires_grad_()", "hidden"),
    ("train.py", "checkpoint(functional_call, block, weights, args, use", "checkpoint(block, *args, use"),
    ("train.py", "chunk = slice(start, start + size)", "chunk = slice(start, start + size - 1)"),
    ("train.py", "F.linear(rows[chunk], head)[:, :student.vocab_size]", "F.linear(rows[chunk], head)"),
    ("train.py", "clip_grad_norm_(student.parameters(), CLIP)", "clip_grad_norm_(student.parameters(), 1e9)"),
    ("train.py", "args.lr * (step + 1) / warmup", "args.lr * step / warmup"),
    ("train.py", '("step", "exp_avg", "exp_avg_sq")', '("step", "exp_avg")'),
    ("train.py", "        optimizer.zero_grad()\n", ""),
    ("train.py", "weight_decay=0.0", "weight_decay=0.1"),
    ("train.py", "        check(recent.isfinite().all(),", "        check(True,"),
    ("train.py", "    student.folder = final  #", "    #"),
    ("train.py", "if line[\"step\"] <= first", "if True"),
    ("train.py", "        data.cut_half_line(log)\n", ""),
    ("train.py", "            number += 1\n", ""),
    ("train.py", "for examples in micro_batches for example in examples)", "for example in micro_batches[0])"),
    ("train.py", "> 1.5 * start + 0.5", "> 1.5 * start"),
    ("train.py", "return weight not in (None, loss.dft_weight)", "return weight is not None"),
    ("train.py", 'check(not names or "seconds" not in run,', "check(True,"),
    ("train.py", '    if names:\n        print(f"{out}: {names} changed since this run began")\n', ""),
    ("train.py", "        forget_old_code(runs[-1])\n", ""),
    ("train.py", "evaluate.edited_since(evaluate.read_answers(answers))", "False"),
    ("train.py", 'lines[-1]["seconds"] if lines else 0.0', "0.0"),
    ("train.py", """        if save and done < args.steps:
            save_checkpoint(out, done, student, optimizer)
            last_save = time.perf_counter()
        lines.append(line)
        pending, read, last_line = [], 0, time.perf_counter()
""", """        pending, read, last_line = [], 0, time.perf_counter()
        if save and done < args.steps:
            save_checkpoint(out, done, student, optimizer)
            last_save = time.perf_counter()
"""),
    ("train.py", " or now - last_line > LOG_SECONDS", ""),
    ("train.py", "now - last_save > SAVE_SECONDS", "now - begin > SAVE_SECONDS"),
    ("train.py", "read += sum(len(trace.tokens) for", "read += sum(trace.prompt_length for"),
    ("train.py", "    os.sync()  #", "    #"),
    ("train.py", "        w = w.masked_fill(is_end[chunk], 1)", "        pass"),
    # ---- evaluate.py: averages, intervals, resuming
    ("evaluate.py", ", base_wait_time=0.2", ""),
    ("evaluate.py", "means.std(ddof=n > 1) / math.sqrt(n)", "means.std(ddof=n > 1) / math.sqrt(len(records))"),
    ("evaluate.py", "(R - epsilon) / epsilon", "(R - epsilon) / R"),
    ("evaluate.py", "file = part if part.exists() else out", "file = out if out.exists() else part"),
    ("evaluate.py", "args.resume or not file.exists()", "args.resume or not part.exists()"),
    ("evaluate.py", '        text = re.sub(rf"(?s)^(?:.*</think>)?(.*{BOX.pattern})?.*", r"\\1", text)\n', "        pass\n"),
    ("evaluate.py", "    data.print_unread(file, unread)\n", ""),
    ("evaluate.py", "    if names := edited_since(records):\n", "    if names := \"\":\n"),
    ("evaluate.py", "loss.kl(student.logits(q)", "loss.rkl(student.logits(q)"),
    ("evaluate.py", "finished = bool(ids) and ids[-1] in", "finished = not ids or ids[-1] in"),
    ("evaluate.py", "text = html.escape(piece)", "text = piece"),
    ("evaluate.py", "return units_agree and equivalent(a, b)", "return equivalent(a, b)"),
    ("evaluate.py", "return x == y if whole else", "return"),
    ("evaluate.py", "            y.remove(match)\n        return not y", "        return True"),
    ("evaluate.py", "len(x) == len(y) and all(map(equivalent, x, y))", "equivalent(','.join(x[1:-1]), ','.join(y[1:-1]))"),
    ("evaluate.py", 'if "=" in formula else numbers', "if formula else numbers"),
    ("evaluate.py", "</think(?:ing)?>|", ""),
    ("evaluate.py", "randrange(-1999, 1999)", "randrange(1, 1999)"),
    ("evaluate.py", "(\\b[fgP])", "(\\bQ)"),
    ("evaluate.py", "re.sub(NEGATED, \" \", text)", "text"),
]
FIRST = {"loss.py": ["test_loss.py"], "model.py": ["test_model.py", "test_gpu.py"],
         "data.py": ["test_properties.py", "test_data.py", "test_traces.py", "test_errors.py",
                     "test_faults.py"],
         "train.py": ["test_train.py", "test_faults.py"],
         "evaluate.py": ["test_evaluate.py", "test_grading.py", "test_errors.py", "test_hub.py", "test_faults.py"]}


def lives(mutant: tuple[str, str, str]) -> bool:
    """Do all tests pass with it? Those of its file come first."""
    file, old, new = mutant
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "main")
        shutil.copytree(HOME, copy, ignore=shutil.ignore_patterns("runs", ".git", "*cache*"))
        if (HOME.parent / "shared").exists():
            Path(folder, "shared").symlink_to(HOME.parent / "shared")
        text = (copy / file).read_text()
        (copy / file).write_text(text.replace(old, new))
        for tests in [f"tests/{name}" for name in FIRST[file]], ["tests"]:
            try:
                done = subprocess.run(
                    [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:randomly", "-p",
                     "no:cacheprovider", *tests], cwd=copy, capture_output=True, timeout=400,
                    env={**os.environ, "OMP_NUM_THREADS": "1"})
            except subprocess.TimeoutExpired:  # a loop that never ends is seen, too
                return False
            if done.returncode:
                return False
    return True


def behind() -> list[tuple[str, str]]:
    """Mutants whose text is no longer in the code."""
    return [(file, old) for file, old, _ in MUTANTS if old not in (HOME / file).read_text()]


def main(wanted: list[str]) -> None:
    if behind():
        raise SystemExit(f"the table is behind the code: {behind()}")
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
