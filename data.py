"""Tokenizers, traces, batches and the toy; the commands score, select and mix.

A trace is one JSON object per line:

>>> trace = {"id": 3, "prompt": "0 a+4 b-2", "response": "b=2 #### 2", "answer": "2",
...          "teacher_logprobs": [-0.39, -0.31, -0.0, 0.0], "correct": True}

`prompt` is what the user says. `messages`, a list of {"role", "content"}, can replace it
and can end in the response. Optional: `tokens`, ids of the response and its end of turn;
`teacher_logprobs`, the log-probability of each (natural log, temperature 1); what these are
compared with: `prompt_tokens` (ids or their number), `vocab` (a hash). A trace with a false
`correct` or `finished` is dropped and counted. Its path: load_traces, encode_trace,
step_examples, [train.resample_on_policy], collate, train.backward, loss.token_losses.
"""

import argparse
import hashlib
import json
import math
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jinja2  # comes with torch
import numpy as np
import tokenizers
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm  # comes with huggingface-hub

from model import BadInput, Config, KVCache, Transformer, check, model_folder, read_json

PathLike = str | Path
# ---- Files and command lines, for the three programs
MAGIC = {b"\x1f\x8b": "gzip", b"PAR1": "Parquet", b"[": "a JSON array"}
FORMATS = {  # what is not JSONL of traces, and the rows that make it so
    "gzip": "map(json.loads, gzip.open(FILE))",
    "Parquet": 'json.loads(__import__("pandas").read_parquet(FILE)'
               '.to_json(orient="records"))',
    "a JSON array": "json.load(open(FILE))",
    "ShareGPT": '({**r, "messages": [{"role": {"human": "user", "gpt": "assistant"}.get('
                't["from"], t["from"]), "content": t["value"]} for t in r["conversations"]]'
                "} for _, r in data.read_jsonl(FILE))",
    "Alpaca": '({**r, "prompt": (r["instruction"] + "\\n\\n" + (r.get("input") or ""))'
              '.strip(), "response": r["output"]} for _, r in data.read_jsonl(FILE))',
}

def conversion(name: str, where: str) -> str:
    """What to say of a file in another format: its name, and a command that converts it."""
    rows = FORMATS[name].replace("FILE", json.dumps(where.partition(" line ")[0]))
    return (f"this is {name}, not JSONL of traces; convert it with python -c 'import "
            f"data, gzip, json; data.write_jsonl(\"new.jsonl\", {rows})'")

def read_jsonl(path: PathLike) -> Iterator[tuple[str, dict]]:
    """Yield ("FILE line K", record) for each line that is not blank."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where, hint = f"{path} line {number}", ""
            for start, name in MAGIC.items():
                if number == 1 and line.startswith(start):
                    hint = f"; {conversion(name, where)}"
            try:
                record = json.loads(line)
                json.dumps(record, ensure_ascii=False).encode()  # no half of an emoji
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where}: not valid JSON: {error!s:.200}{hint}") from error
            check(isinstance(record, dict), f"{where}: not a JSON object{hint}")
            yield where, record

@contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Give a temporary path for a file or folder; move it to `path` once it is whole."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: cannot be written ({error}). Older files are whole; make "
                       "room, then add --resume") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)

def write_lines(path: Path, records: Iterable[dict], mode: str = "w") -> None:
    with open(path, mode, encoding="utf-8") as file:
        for record in records:
            line = json.dumps(record, ensure_ascii=False, separators=(",", ":"))
            file.write(line + "\n")

def write_jsonl(path: PathLike, records: Iterable[dict]) -> None:
    with atomic_write(path) as temporary:
        write_lines(temporary, records)

def cut_half_line(path: Path) -> None:
    """Remove the last line if a killed process did not finish it."""
    with open(path, "r+b") as file:
        file.truncate(file.read().rfind(b"\n") + 1)

def check_same_settings(file: Path, before: dict, now: dict) -> None:
    """Raise if a setting differs from the saved run."""
    for key, value in now.items():
        check(before.get(key) == value, f"{file}: cannot resume: {key} was "
              f"{before.get(key)}, is now {value}")

def number(kind: type, low: float, high: float = math.inf) -> Callable:
    """A type for argparse: an int or a float from low to high."""
    def numeric(text: str) -> float:
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text}: must be from {low:g} to {high:g}")
    return numeric

def add_model_options(add: Callable) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help=f"cpu or cuda (default here: {device})")
    add("--dtype", choices=["float32", "bfloat16"], help="of the computation (default: "
        "bfloat16 on a GPU, float32 on a CPU)")

def parse_args(parser: argparse.ArgumentParser,
               argv: list[str] | None) -> argparse.Namespace:
    """Parse a command line; a --dtype that is not given depends on --device."""
    args = parser.parse_args(argv)
    if "dtype" in args:
        args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    return args

def run_command(main: Callable) -> None:
    """Run a program. Bad input and interrupts become one line, not a traceback."""
    try:
        main()
    except torch.OutOfMemoryError as error:
        sys.exit(f"error: out of memory: halve --batch-size (train.py: and double "
                 f"--grad-accum); {error!s:.120}")
    except (BadInput, OSError, SafetensorError, re.error) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        sys.exit("interrupted; to continue training or an evaluation, add --resume")

def progress(items: Iterable, name: str) -> tqdm:
    """A bar on a terminal; elsewhere, a line a minute."""
    if sys.stderr.isatty():
        return tqdm(items, name, delay=1)
    form = "{desc}: {n_fmt} of {total_fmt}, {elapsed} so far, {remaining} to go\n"
    return tqdm(items, name, bar_format=form, delay=60, mininterval=60)

# ---- Tokenizers and chat templates
def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)

# Chat templates come from strangers. This sandbox, the one of transformers, keeps them from
# files and from Python's internals, but not from running forever.
TEMPLATES = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=["jinja2.ext.loopcontrols"])
# Llama 3's template prints a date. It is always its default, so a prompt stays the same.
TEMPLATES.globals.update(raise_exception=raise_exception,
                         strftime_now=datetime(2024, 7, 26).strftime)

class Tokenizer:
    """tokenizer.json, chat template and end-of-turn token of a Hugging Face folder."""

    def __init__(self, path_or_repo: PathLike):
        self.folder = model_folder(path_or_repo)
        file = self.folder / "tokenizer.json"
        try:
            self.backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises no narrower class
            raise BadInput(f"{file}: missing, or not a tokenizer: {error}") from error
        self.backend.no_padding()  # some files have padding or truncation baked in
        self.backend.no_truncation()
        self.vocab = self.backend.get_vocab()
        self.vocab_size = max(self.vocab.values()) + 1  # the head may have more
        words = "\n".join(sorted(self.vocab, key=lambda word: self.vocab[word]))
        self.vocab_hash = hashlib.sha256(words.encode()).hexdigest()[:8]
        file = self.folder / "tokenizer_config.json"
        config = read_json(file) if file.exists() else {}
        if config.get("legacy") is False and "\u2581" in self.vocab:
            # Llama 2 puts a word mark before a text, not behind each special token.
            self.backend.normalizer = None
            self.backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(
                prepend_scheme="first", split=False)
        self.special_tokens = {}
        for key, value in config.items():
            content = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(content, str):
                self.special_tokens[key] = content
        source = config.get("chat_template")
        file = self.folder / "chat_template.jinja"
        if file.exists():
            source = file.read_text(encoding="utf-8")
        try:
            if isinstance(source, list):  # several templates, each with a name
                source = {entry["name"]: entry["template"] for entry in source}["default"]
            self.template = TEMPLATES.from_string(source) if source else None
        except (jinja2.TemplateError, LookupError, TypeError) as error:
            raise BadInput(f"{self.folder}: chat template: {error!s:.300}") from error
        self.eot_id = self._find_end_of_turn()
        ends = [self.backend.id_to_token(self.eot_id), self.special_tokens.get("eos_token")]
        self.ends = rf"(?:(?:{'|'.join(map(re.escape, filter(None, ends)))})\s*)+\Z"

    def _find_end_of_turn(self) -> int:
        """The special token that the template writes after an answer, else the EOS."""
        candidates = []
        if self.template is not None:
            turns = [{"role": "user", "content": "?"},
                     {"role": "assistant", "content": "ANSWER"}]
            text = self.apply_chat_template(turns, add_generation_prompt=False)
            _, answer, after = text.rpartition("ANSWER")
            if answer:  # a template may have no place for an answer
                candidates = self.backend.encode(after, add_special_tokens=False).tokens
        candidates.append(self.special_tokens.get("eos_token", ""))
        added = self.backend.get_added_tokens_decoder()
        for token in candidates:
            if self.vocab.get(token) in added:
                return self.vocab[token]
        raise BadInput(f"{self.folder}: no end-of-turn token in the chat template, and no "
                       "eos_token in tokenizer_config.json")

    def apply_chat_template(self, messages: list[dict],
                            add_generation_prompt: bool = True,
                            where: str = "", **options: object) -> str:
        """The text that a model is given. Every prompt of the project is rendered here."""
        where = where or str(self.folder)
        if self.template is None:
            check(len(messages) == 1, f"{where}: no chat template for several turns")
            return messages[0]["content"]
        try:
            return self.template.render(messages=messages, **self.special_tokens, **options,
                                        add_generation_prompt=add_generation_prompt)
        except Exception as error:  # a template is a program: it can fail in any way
            raise BadInput(f"{where}: chat template: {error!r:.300}") from error

    def encode_prompt(self, messages: list[dict], where: str = "prompt") -> list[int]:
        """Refuses a prompt that lacks a turn: templates drop the roles they do not know."""
        check(messages and messages[-1]["role"] != "assistant", f"{where}: messages: no "
              "question, or an answer that would be in the prompt; remove it or `response`")
        marked = [{**turn, "content": f"{turn['content']}[turn {i}]"}
                  for i, turn in enumerate(messages)]
        rendered = self.apply_chat_template(marked, where=where)
        for i, turn in enumerate(messages):
            check(f"[turn {i}]" in rendered, f"{where}: the chat template leaves out the "
                  f"turn of role {turn['role']!r}; use system, user and assistant")
        text = self.apply_chat_template(messages, where=where)
        return self.encode(text, bos=self.template is None)  # a template writes BOS itself

    def encode(self, text: str, bos: bool = False) -> list[int]:
        return self.backend.encode(text, add_special_tokens=bos).ids

    def encode_response(self, text: str) -> list[int]:
        """The ids of a response and of one end of turn, which some texts have already.
        SentencePiece puts a word mark before a text. Behind a prompt, there is none."""
        start = "\n" if "\u2581" in self.vocab else ""
        ids = self.encode(start + re.sub(self.ends, "", text))
        return [*ids[len(self.encode(start)):], self.eot_id]

    def decode(self, ids: list[int]) -> str:
        """The text of a response, without its end-of-turn token."""
        if ids[-1:] == [self.eot_id]:
            ids = ids[:-1]
        return self.backend.decode(ids, skip_special_tokens=False)

def replay_step(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """A decoding step as one launch instead of 700: 3 ms instead of 11 for 0.5B on a H200.
    The first step of a shape runs as usual, the second one is recorded as a CUDA graph;
    from then on, the recorded kernels run again, on the same addresses."""
    shape = (*tokens.shape, cache.used // 64)  # columns come 64 at a time
    if shape != getattr(cache, "shape", None):
        cache.shape, cache.graph = shape, None
        return model(tokens, cache)
    if cache.graph is None:
        cache.tokens = tokens.clone()
        cache.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cache.graph):
            cache.hidden = model(cache.tokens, cache)
    else:
        cache.used += 1
    cache.tokens.copy_(tokens)
    cache.graph.replay()
    return cache.hidden

def load(path_or_repo: PathLike, dtype: str = "float32",
         device: str = "cpu") -> tuple[Transformer, Tokenizer]:
    """A model and its tokenizer. The model also stops at the template's end of turn, which
    the config of a base model does not name (Qwen2.5: <|im_end|>)."""
    check(device == "cpu" or torch.cuda.is_available(), f"--device {device}: no CUDA here")
    tokenizer = Tokenizer(path_or_repo)
    model = Transformer.from_pretrained(tokenizer.folder, getattr(torch, dtype), device)
    check(tokenizer.vocab_size <= model.vocab_size, f"{path_or_repo}: vocabulary mismatch: "
          f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.vocab_size}")
    model.vocab_size = tokenizer.vocab_size
    if device != "cpu":
        model.decode = replay_step
    model.eos_token_ids = sorted({*model.eos_token_ids, tokenizer.eot_id})
    return model, tokenizer

# ---- Traces
class Example(NamedTuple):
    """A trace as tokens."""
    tokens: np.ndarray  # [prompt + response] int32, the end-of-turn token last
    prompt_length: int
    teacher_logp: np.ndarray | None = None  # [response] float32: log p of each token

def text_field(record: dict, where: str, *names: str) -> str:
    """The first of these fields that the record has. It must be text, and not empty."""
    text = next((record[name] for name in names if name in record), None)
    check(isinstance(text, str) and text.strip(), f"{where}: {' or '.join(names)} = "
          f"{str(text)[:40]!r}: expected text that is not empty")
    return text

# Fields of a trace or of a turn that hold a part of it, and that nothing here reads.
TO_TEXT = 'put it into the text: "<think>\\n" + thinking + "\\n</think>\\n\\n" + answer'
UNREAD = dict.fromkeys(["reasoning_content", "reasoning", "thinking"], TO_TEXT)
UNREAD |= dict.fromkeys(["tools", "tool_calls", "functions", "function_call"],
                        "tools are not supported; remove the trace")

def get_messages(record: dict, where: str) -> list:
    """The turns of a trace or a problem. A plain prompt is one user turn."""
    turns = record.get("messages")
    if "messages" not in record:
        for field, name in (("conversations", "ShareGPT"), ("instruction", "Alpaca")):
            if field in record and "prompt" not in record:
                raise BadInput(f"{where}: {conversion(name, where)}")
        turns = [{"role": "user", "content": text_field(record, where, "prompt")}]
    check(isinstance(turns, list) and turns, f"{where}: messages: not a list of turns")
    for fields in [record, *turns]:
        for name, advice in UNREAD.items():
            unread = isinstance(fields, dict) and fields.get(name)
            check(not unread, f"{where}: {name} would be lost; {advice}")
    for turn in turns:
        texts = isinstance(turn, dict) and [turn.get("role"), turn.get("content")]
        check(texts and all(isinstance(text, str) for text in texts),
              f"{where}: messages: expected turns with role and content, both text")
    return turns

def prompt_and_response(record: dict, where: str) -> tuple[list[dict], str]:
    messages = get_messages(record, where)
    if record.get("response") is None and messages[-1]["role"] == "assistant":
        return messages[:-1], text_field(messages[-1], where, "content")
    return messages, text_field(record, where, "response")

def trace_fields(ids: list[int], logp: Iterable, tokenizer: Tokenizer,
                 finished: bool) -> dict:
    """Write a sampled response. `tokens` is left out if the text gives the same ids."""
    text = tokenizer.decode(ids[:-1] if finished else ids)
    fields = {"response": text, "finished": finished, "teacher_logprobs": round_logp(logp),
              "vocab": tokenizer.vocab_hash}
    if ids != tokenizer.encode_response(text):
        fields["tokens"] = ids
    return fields

def round_logp(logp: Iterable) -> list[float]:
    return [round(float(value), 4) for value in logp]

def response_ids(record: dict, tokenizer: Tokenizer, where: str) -> list[int]:
    """Read the ids of a response, its end of turn last: `tokens`, or else the text's."""
    response = prompt_and_response(record, where)[1]
    ids = record.get("tokens")
    if ids is None:
        return tokenizer.encode_response(response)
    size = tokenizer.vocab_size
    known = isinstance(ids, list) and all(type(i) is int and 0 <= i < size for i in ids)
    finished = record.get("finished") in (None, True)
    body = ids[:-1] if known and finished else ids
    check(ids and known and tokenizer.backend.decode(body, skip_special_tokens=False)
          == re.sub(tokenizer.ends, "", response),
          f"{where}: tokens do not spell the response and its end of turn; of another "
          "tokenizer? Then remove them and teacher_logprobs; use --objective sft")
    return ids

def encode_trace(record: dict, tokenizer: Tokenizer, where: str,
                 teacher: bool = False) -> Example:
    """Read a trace as tokens; with `teacher`, it must have teacher_logprobs. Prompt and
    response are tokenized separately: in one string, tokens can merge across the seam."""
    prompt = tokenizer.encode_prompt(prompt_and_response(record, where)[0], where)
    ids = response_ids(record, tokenizer, where)
    given = record.get("prompt_tokens")  # the ids of the teacher's prompt, or their number
    if given not in (None, len(prompt), prompt):
        count = len(given) if isinstance(given, list) else given
        raise BadInput(f"{where}: prompt_tokens: {count} there, {len(prompt)} other ones "
                       f"here: {tokenizer.decode(prompt)!r:.200}; was the trace made under "
                       "another prompt, perhaps with a default system prompt or a date?")
    think = tokenizer.vocab.get("<think>")
    if ids[0] == think and think in prompt[-2:]:  # the template opens the thinking, too
        prompt = prompt[:prompt.index(think, -2)]
    check(prompt, f"{where}: the prompt has no token, so nothing predicts the response")
    logp = None
    if teacher:
        check(record.get("vocab") in (None, tokenizer.vocab_hash), f"{where}: the "
              "teacher_logprobs are of another tokenizer's tokens; use --objective sft")
        values = record.get("teacher_logprobs") or []
        check(isinstance(values, list) and len(values) == len(ids),
              f"{where}: teacher_logprobs: expected {len(ids)} numbers, one for each token "
              f"and the end of turn, not {str(values)[:40]}. Score it with `python data.py "
              "score`, or check that both models share a tokenizer")
        for value in values:
            valid = type(value) in (int, float) and -math.inf < value <= 1e-3
            check(valid, f"{where}: teacher_logprobs: {value!r} is not a log-probability: "
                  "these are finite and at most 0 (a loss or a probability is above)")
        logp = np.array(values, dtype=np.float32)
    return Example(np.array(prompt + ids, dtype=np.int32), len(prompt), logp)

def drop_reason(record: dict, where: str = "trace", teacher: bool = False) -> str:
    """Why a trace is dropped, or "". With `teacher`, it needs all its log-probabilities."""
    for name, reason in (("finished", "unfinished"), ("correct", "wrong")):
        value = record.get(name)  # spreadsheets write 0 and 1; null is unknown
        check(value in (None, False, True), f"{where}: {name} {value!r}: not true or false")
        if value == 0:
            return reason
    values = record.get("teacher_logprobs") if teacher else None
    if isinstance(values, list) and (None in values or -9999 in values):  # vLLM's -inf
        return "with a log-probability of null or -9999"
    return ""

def load_traces(path: PathLike, tokenizer: Tokenizer, max_length: float = math.inf,
                teacher: bool = False,
                records: list | None = None) -> tuple[list[Example], Counter]:
    """The usable traces, and counts of the dropped ones by reason; `records` gets their
    lines. A long trace is not cut: half a trace teaches the student not to stop."""
    examples, dropped = [], Counter()
    for where, record in progress(read_jsonl(path), "reading traces"):
        reason = drop_reason(record, where, teacher)
        if not reason:
            example = encode_trace(record, tokenizer, where, teacher)
            if len(example.tokens) > max_length:
                reason = f"longer than {max_length} tokens"
        if reason:
            dropped[reason] += 1
            continue
        examples.append(example)
        if records is not None:
            records.append(record)
    check(examples, f"{path}: no usable trace; dropped: {dict(dropped) or 'none'}")
    check(not teacher or any(example.teacher_logp.any() for example in examples),
          f"{path}: all teacher_logprobs are 0, as processed at temperature 0; ask for raw "
          "ones (vLLM: logprobs_mode raw_logprobs), or use `python data.py score`")
    return examples, dropped

# ---- Batches
class Batch(NamedTuple):
    """B traces, padded on the right to T columns, and their N supervised positions."""
    tokens: Tensor  # [B, T]: what the model reads, all but the last token of each trace
    positions: Tensor  # [N]: where it predicts a response token, as indices into B * T
    labels: Tensor  # [N]: the token that the teacher wrote there
    teacher_logp: Tensor | None = None  # [N]: log p of that token

@lru_cache(maxsize=2)
def shuffled(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)

def step_examples(examples: list[Example], step: int, batch_size: int, grad_accum: int,
                  seed: int) -> list[list[Example]]:
    """The micro-batches of one optimizer step. The seed alone decides the order, so a
    resumed run reads the same. Neighbors in length share a micro-batch to save padding."""
    size = batch_size * grad_accum
    chosen = []
    for i in range(step * size, (step + 1) * size):
        epoch, position = divmod(i, len(examples))
        chosen.append(examples[shuffled(len(examples), seed, epoch)[position]])
    chosen.sort(key=lambda example: len(example.tokens))
    return [chosen[i:i + batch_size] for i in range(0, size, batch_size)]

def collate(examples: list[Example], device: str = "cpu") -> Batch:
    """Supervise response tokens only, the end of turn included. Position t predicts token
    t + 1, so positions begin at the last prompt token. Lengths make the mask, not ids."""
    T = max(len(example.tokens) for example in examples) - 1
    tokens = np.zeros((len(examples), T), dtype=np.int64)
    positions, labels, logps = [], [], []
    for row, example in enumerate(examples):
        length, start = len(example.tokens), example.prompt_length
        tokens[row, :length - 1] = example.tokens[:-1]
        positions.append(row * T + np.arange(start - 1, length - 1))
        labels.append(example.tokens[start:].astype(np.int64))
        logps.append(example.teacher_logp)
    arrays = [tokens, np.concatenate(positions), np.concatenate(labels)]
    if logps[0] is not None:
        arrays.append(np.concatenate(logps))
    return Batch(*[torch.from_numpy(array).to(device) for array in arrays])

def show_example(example: Example, tokenizer: Tokenizer) -> str:
    """The text of a trace, with its supervised tokens in brackets."""
    ids, start = example.tokens.tolist(), example.prompt_length
    response = tokenizer.backend.decode(ids[start:], skip_special_tokens=False)
    return f"{tokenizer.decode(ids[:start])}[{response}]"

# ---- The commands score, select and mix: JSONL in, JSONL out
@torch.no_grad()
def response_logp(model: Transformer, examples: list, batch_size: int = 16) -> list:
    """fp32 log-probabilities, at temperature 1, of the tokens of each response."""
    device = model.model.embed_tokens.weight.device
    order = np.argsort([len(example.tokens) for example in examples], kind="stable")
    results: list = [None] * len(examples)
    for start in progress(range(0, len(order), batch_size), "scoring"):
        rows = order[start:start + batch_size]
        batch = collate([examples[i] for i in rows], device)
        hidden = model(batch.tokens).flatten(0, 1)[batch.positions]  # [N, D]
        chunks = []  # logits are V wide, so 256 rows at a time have them
        for part, y in zip(hidden.split(256), batch.labels.split(256), strict=True):
            log_q = model.logits(part).float().log_softmax(-1)
            chunks.append(log_q.gather(-1, y[:, None])[:, 0])
        logp = torch.cat(chunks).cpu().numpy()
        for i in rows:
            length = len(examples[i].tokens) - examples[i].prompt_length
            results[i], logp = logp[:length], logp[length:]
    return results

def score(args: argparse.Namespace) -> None:
    """Add a local teacher's log-probabilities to traces."""
    teacher, tokenizer = load(args.teacher, args.dtype, args.device)
    records: list = []
    examples, dropped = load_traces(args.traces, tokenizer, records=records)
    logps = response_logp(teacher, examples)
    for record, logp in zip(records, logps, strict=True):
        record["teacher"] = args.teacher
        record["teacher_logprobs"] = round_logp(logp)
        record["vocab"] = tokenizer.vocab_hash
    write_jsonl(args.out, records)
    print(f"{args.out}: {len(records)} traces scored; dropped: {dict(dropped)}")

def sentence_means(tokenizer: Tokenizer, example: Example, logp: np.ndarray,
                   separator: re.Pattern) -> np.ndarray:
    """Mean log-probability of the tokens that begin in each sentence: [sentences]."""
    stream = tokenizers.decoders.DecodeStream(skip_special_tokens=False)
    text, starts = "", []
    for token in example.tokens[example.prompt_length:].tolist():
        starts.append(len(text))
        text += stream.step(tokenizer.backend, token) or ""  # None: part of a character
    ends = [gap.start() for gap in separator.finditer(text)]
    sentence = np.searchsorted(ends, starts, side="right")
    count = np.bincount(sentence)
    return np.bincount(sentence, logp)[count > 0] / count[count > 0]

def select(args: argparse.Namespace) -> None:
    """DASD's divergence-aware sampling (arXiv 2601.09088): keep the traces with most
    sentences that the teacher finds twice as likely as the student, per token."""
    student, tokenizer = load(args.student, args.dtype, args.device)
    records: list = []
    examples, dropped = load_traces(args.traces, tokenizer, math.inf, True, records)
    shares = []
    for example, q_logp in zip(examples, response_logp(student, examples), strict=True):
        p = sentence_means(tokenizer, example, example.teacher_logp, args.separator)
        q = sentence_means(tokenizer, example, q_logp, args.separator)
        shares.append(np.mean(p - q > math.log(2)))
    ranked = np.argsort(-np.array(shares), kind="stable")
    kept = np.sort(ranked[:math.ceil(args.keep * len(records))])
    write_jsonl(args.out, [records[i] for i in kept])
    print(f"{args.out}: kept {len(kept)} of {len(shares)} traces; dropped: {dict(dropped)}")

def mix(args: argparse.Namespace) -> None:
    """DASD's mixed-policy distillation (arXiv 2601.09088): student answers that were cut
    off or are 1.5 times as long as the teacher's become problems: the teacher completes a
    `prefix` that ends at a random point in the second half."""
    tokenizer, rng = Tokenizer(args.student), random.Random(args.seed)
    longest = Counter()  # problem: tokens of the teacher's longest right answer
    for where, record in read_jsonl(args.traces):
        if not drop_reason(record, where):
            name = str(record.get("id"))
            longest[name] = max(longest[name], len(response_ids(record, tokenizer, where)))
    problems, answers = [], list(read_jsonl(args.answers))
    for where, record in answers:
        check("id" in record, f"{where}: no id, so its problem is unknown")
        ids, limit = [], int(1.5 * longest[str(record["id"])])
        if record.get("response"):
            ids = response_ids(record, tokenizer, where)[:limit]
        cut_off = drop_reason(record, where) == "unfinished" or len(ids) == limit
        if ids and (cut_off or args.continue_all):
            if not cut_off or ids[-1] == tokenizer.eot_id:  # drop the end of turn
                ids = ids[:-1]
            problem = {key: record[key] for key in ("prompt", "messages") if key in record}
            problem["id"] = f"{record['id']}/{record.get('sample', 0)}"
            problem["answer"] = text_field(record, where, "answer")
            problem["prefix"] = ids[:rng.randint(len(ids) // 2 + 1, len(ids))]
            problems.append(problem)
    check(problems, f"{args.answers}: no answer was cut off; --continue-all takes all")
    write_jsonl(args.out, problems)
    missing = sum(str(record["id"]) not in longest for _, record in answers)
    print(f"{args.out}: {len(problems)} of {len(answers)} kept, no right trace: {missing}")

# ---- The toy world: a digit and six operations modulo 10
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
    def write(file: Path, count: int, **options: float) -> None:
        if not file.exists():
            rng = random.Random(str(file.relative_to(root)))
            traces = [{"id": i, **toy_trace(rng, **options)} for i in range(count)]
            write_jsonl(file, traces)

    write(root / "lessons.jsonl", 30000, skip=0.6)
    write(root / "held-out.jsonl", 1000)
    write(home / "lessons.jsonl", 8000, times=0.1)
    write(home / "problems.jsonl", 4000)

# ---- The command line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="JSONL in, JSONL out.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (score, select, mix):
        about = function.__doc__
        command = commands.add_parser(function.__name__, help=about, description=about)
        command.set_defaults(run=function)
        add = command.add_argument
        model = "--teacher" if function is score else "--student"
        add(model, required=True, help="HF folder or Hub name")
        add("--traces", required=True, help="T.jsonl: the teacher's traces")
        add("--out", required=True, help="OUT.jsonl")
        if function is mix:
            add("--answers", required=True, help="A.jsonl: the student's answers")
            add("--continue-all", action="store_true", help="continue short answers, too")
            add("--seed", type=number(int, 0), default=0, help="of the cuts (default: 0)")
        else:
            add_model_options(add)
        if function is select:
            add("--keep", type=number(float, 1e-9, 1), default=0.5, help="share of traces")
            add("--separator", type=re.compile, default=r"(?<=[.!?])\s+|\n+",
                help="regular expression that splits sentences")
    args = parse_args(parser, argv)
    args.run(args)

if __name__ == "__main__":
    run_command(main)
